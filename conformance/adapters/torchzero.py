"""torchzero: a chain of modules.

Comparisons of the implementation with itself use its own momentum, weight decay and Adam. These differ from torch's, so
comparisons with the formula use the torch optimizer inside its `Wrap`.
"""

from __future__ import annotations

from typing import Any

import torch
import torchzero as tz

from conformance.adapter import Adapter, Base, Form, Subject


def _chain(base: Base) -> list[Any]:
    """Its modules in place of torch's SGD or AdamW. Schedulers need the module LR."""
    o = base.options
    decay = [tz.m.WeightDecay(o["weight_decay"])] if o.get("weight_decay") else []
    if base.cls is torch.optim.SGD:
        return [*decay, *([tz.m.HeavyBall(o["momentum"])] if o.get("momentum") else []), tz.m.LR(o["lr"])]
    return [tz.m.Adam(), *decay, tz.m.LR(o["lr"])]


class ADAPTER(Adapter):
    """How it is built."""

    title = "torchzero"
    distribution = "torchzero"
    forms = frozenset({"sam", "asam"})

    def plain(self, params: Any, base: Base) -> Any:
        """The chain without SAM."""
        return tz.Optimizer(params, *_chain(base))

    def build(
        self, params: Any, base: Base, *, rho: float, form: Form | None = None, model: Any = None, **options: Any
    ) -> Subject:
        """The chain with SAM."""
        self.claims(form, options)
        ascent = (tz.m.ASAM if form == "asam" else tz.m.SAM)(rho=rho)
        below = _chain(base) if form is None else [tz.m.Wrap(base.cls, **base.options)]
        return Subject(tz.Optimizer(params, ascent, *below))
