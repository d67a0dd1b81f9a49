"""HeavyBall's SAMWrapper: its own base optimizers, and a perturbation along w^2 g without a fixed length."""

from __future__ import annotations

from typing import Any

import heavyball
import heavyball.utils
import torch
from torch import Tensor

from conformance.adapter import Adapter, Base, Form, Subject, one_radius

# Compilation takes minutes on a CPU and does not change the formulas.
heavyball.utils.compile_mode = None


class Wrapper(Subject):
    """The wrapper's groups have no learning rate, so schedulers and plain checkpoints use the wrapped optimizer."""

    @property
    def schedulable(self) -> Any:
        """The wrapped optimizer."""
        return self.optimizer.wrapped_optimizer

    def load_plain(self, state: Any) -> None:
        """Into the wrapped optimizer."""
        self.optimizer.wrapped_optimizer.load_state_dict(state)


class ADAPTER(Adapter):
    """Builds it with its own SGD or AdamW and the options of torch's."""

    title = "HeavyBall"
    distribution = "heavyball"
    forms = frozenset({"asam"})

    def plain(self, params: Any, base: Base) -> Any:
        """HeavyBall's own optimizer of that name."""
        options = dict(base.options)
        if base.cls is torch.optim.SGD:
            options["beta"] = options.pop("momentum")
            return heavyball.SGD(params, **options)
        return heavyball.AdamW(params, **options)

    def build(
        self, params: Any, base: Base, *, rho: float, form: Form | None = None, model: Any = None, **options: Any
    ) -> Subject:
        """Around one of its own optimizers."""
        self.claims(form, options)
        one_radius(params)
        return Wrapper(heavyball.SAMWrapper(params, self.plain(params, base), ball=rho))

    def asked(self, ws: list[Tensor], gs: list[Tensor], rho: float) -> list[Tensor]:
        """Its formula: ball w^2 g."""
        return [rho * w.double().square() * g.double() for w, g in zip(ws, gs, strict=True)]
