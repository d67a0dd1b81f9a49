"""pytorch_optimizer's SAM: `closure(); optimizer.step(closure)`, as in its documentation."""

from __future__ import annotations

from typing import Any

from pytorch_optimizer import SAM, disable_running_stats, enable_running_stats

from conformance.adapter import Adapter, Base, Closure, Form, Subject
from conformance.adapters.single_file import TwoCallSubject


class WithClosure(TwoCallSubject):
    """The documented step. Models with BatchNorm use the two calls, so that the package's helper can be used."""

    def step(self, closure: Closure) -> Any:
        """One step."""
        if self.model is not None:
            return super().step(closure)
        loss = closure()
        self.optimizer.step(closure)
        return loss


class ADAPTER(Adapter):
    """How it is built."""

    title = "pytorch_optimizer"
    distribution = "pytorch_optimizer"
    forms = frozenset({"sam", "asam"})

    def build(
        self, params: Any, base: Base, *, rho: float, form: Form | None = None, model: Any = None, **options: Any
    ) -> Subject:
        """From parameters and the base's class."""
        self.claims(form, options)
        optimizer = SAM(params, base.cls, rho=rho, adaptive=form == "asam", **base.options)
        return WithClosure(optimizer, model, enable_running_stats, disable_running_stats)
