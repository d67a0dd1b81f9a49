"""sam_sps: SAM with its own SGD, whose step size is Polyak's with an upper bound."""

from __future__ import annotations

from typing import Any

from sam_sps import SAM_SPS

from conformance.adapter import Adapter, Base, Form, NotOfferedError, Subject, one_radius


class OwnStepSize(Subject):
    """Its step size is computed in each step."""

    @property
    def schedulable(self) -> Any:
        """Nothing."""
        raise NotOfferedError("sets its own learning rate")


class ADAPTER(Adapter):
    """How it is built: the learning rate is the upper bound; there is no momentum and no base."""

    title = "sam_sps"
    distribution = "sam_sps"
    forms = frozenset()

    def plain(self, params: Any, base: Base) -> Any:
        """There is none."""
        raise NotOfferedError("no base")

    def build(
        self, params: Any, base: Base, *, rho: float, form: Form | None = None, model: Any = None, **options: Any
    ) -> Subject:
        """On its own."""
        self.claims(form, options)
        one_radius(params)
        return OwnStepSize(
            SAM_SPS(params, rho=rho, gamma_b=base.options["lr"], weight_decay=base.options.get("weight_decay", 0.0))
        )
