"""temperon: SAM in the last part of the training; here, in the whole training."""

from __future__ import annotations

from typing import Any

from temperon import Temperon

from conformance.adapter import Adapter, Base, Form, Subject, one_radius


class Wrapped(Subject):
    """Schedulers use the base optimizer, as in its documentation."""

    @property
    def schedulable(self) -> Any:
        """The base optimizer."""
        return self.optimizer.optimizer

    def load_plain(self, state: Any) -> None:
        """Load it into the base optimizer."""
        self.optimizer.optimizer.load_state_dict(state)


class ADAPTER(Adapter):
    """How it is built."""

    title = "temperon"
    distribution = "temperon"

    def build(
        self, params: Any, base: Base, *, rho: float, form: Form | None = None, model: Any = None, **options: Any
    ) -> Subject:
        """Around a base."""
        self.claims(form, options)
        one_radius(params)
        return Wrapped(Temperon(base.make(params), total_steps=1000, tail_frac=1.0, rho=rho))
