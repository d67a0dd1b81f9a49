"""flatmin."""

from __future__ import annotations

from typing import Any

import flatmin
from conformance.adapter import Adapter, Base, Closure, Form, Subject


class Flatmin(Subject):
    """Closures and `perturbed()`, a scaler given at construction, and lists of closures."""

    def by_hand(self, backward: Closure) -> None:
        """One step."""
        backward()
        with self.optimizer.perturbed():
            backward()
        self.optimizer.step()

    def scaled_step(self, scaler: Any, closure: Closure) -> None:
        """One step."""
        scaler.step(self.optimizer, closure)
        scaler.update()

    def accumulate(self, closures: list[Closure]) -> None:
        """One step."""
        self.optimizer.step(closures)


class ADAPTER(Adapter):
    """How it is built."""

    title = "flatmin"
    forms = frozenset({"sam", "asam"})

    def version(self) -> str:
        """The version, also of a source tree that is not installed."""
        return flatmin.__version__

    def build(
        self, params: Any, base: Base, *, rho: float, form: Form | None = None, model: Any = None, **options: Any
    ) -> Subject:
        """Around a base."""
        return Flatmin(flatmin.wrap(base.make(params), form or "sam", rho=rho, model=model, **options))
