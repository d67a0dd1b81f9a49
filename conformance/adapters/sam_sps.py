"""sam_sps: SAM with its own SGD, which uses Polyak's step size with an upper bound."""

from __future__ import annotations

from typing import Any

from sam_sps import SAM_SPS

from conformance.adapter import Adapter, Base, Form, NotOfferedError, Subject, one_radius


class OwnStepSize(Subject):
    """An optimizer that computes its step size in each step."""

    @property
    def schedulable(self) -> Any:
        """Not offered."""
        raise NotOfferedError("sets its own learning rate")


class ADAPTER(Adapter):
    """Builds it: the learning rate is the upper bound; there is no momentum and no base optimizer."""

    title = "sam_sps"
    distribution = "sam_sps"
    forms = frozenset()

    def plain(self, params: Any, base: Base) -> Any:
        """Not offered."""
        raise NotOfferedError("no base")

    def build(
        self, params: Any, base: Base, *, rho: float, form: Form | None = None, model: Any = None, **options: Any
    ) -> Subject:
        """Build it without a base optimizer."""
        self.claims(form, options)
        one_radius(params)
        return OwnStepSize(
            SAM_SPS(params, rho=rho, gamma_b=base.options["lr"], weight_decay=base.options.get("weight_decay", 0.0))
        )
