"""An implementation in the style of common single-file implementations, written from the formulas.

It builds its base optimizer, takes two calls a step with a backward before each, stores the weights in its own state,
and restores them by assigning to `.data`. Many projects contain a copy of such a file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from conformance.adapter import Adapter, Base, Closure, Form, Subject, uses_batchnorm


class TwoCalls(torch.optim.Optimizer):
    """first_step perturbs the weights, second_step restores them and lets the base optimizer step."""

    def __init__(self, params: Any, base_optimizer: Any, rho: float = 0.05, adaptive: bool = False, **kw: Any) -> None:
        super().__init__(params, {"rho": rho, "adaptive": adaptive, **kw})
        self.base_optimizer = base_optimizer(self.param_groups, **kw)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    def _with_gradient(self) -> list[tuple[dict[str, Any], Tensor]]:
        return [(g, w) for g in self.param_groups for w in g["params"] if w.grad is not None]

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Move the weights to w + eps."""
        lengths = [((w.abs() if g["adaptive"] else 1.0) * w.grad).norm() for g, w in self._with_gradient()]
        length = torch.stack(lengths).norm()
        for g, w in self._with_gradient():
            self.state[w]["kept"] = w.data.clone()
            factor = w * w if g["adaptive"] else 1.0
            w.add_(factor * w.grad * (g["rho"] / (length + 1e-12)).to(w))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the weights and let the base optimizer step."""
        for _, w in self._with_gradient():
            w.data = self.state[w]["kept"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Closure | None = None) -> None:
        """Both calls, with the current gradients as those at w."""
        if closure is None:
            raise ValueError("needs a closure")
        self.first_step(zero_grad=True)
        with torch.enable_grad():
            closure()
        self.second_step()

    def load_state_dict(self, state_dict: Any) -> None:
        """Load the wrapper's own state, and link the groups again."""
        super().load_state_dict(state_dict)
        self.base_optimizer.param_groups = self.param_groups


def quiet(model: nn.Module) -> None:
    """The usual helper of such files: set the momentum of BatchNorm to 0."""
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.kept_momentum, layer.momentum = layer.momentum, 0


def loud(model: nn.Module) -> None:
    """Undo `quiet`."""
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and hasattr(layer, "kept_momentum"):
            layer.momentum = layer.kept_momentum


class TwoCallSubject(Subject):
    """The loop of such files: a backward before each call, and the helper around the second."""

    def __init__(self, optimizer: Any, model: nn.Module | None, before: Any = loud, after: Any = quiet) -> None:
        super().__init__(optimizer)
        self.model = model if uses_batchnorm(model) else None
        self.before, self.after = before, after

    def step(self, closure: Closure) -> Any:
        """One step."""
        if self.model is not None:
            self.before(self.model)
        loss = closure()
        self.optimizer.first_step(zero_grad=True)
        if self.model is not None:
            self.after(self.model)
        closure()
        self.optimizer.second_step(zero_grad=True)
        if self.model is not None:
            self.before(self.model)
        return loss

    def by_hand(self, backward: Closure) -> None:
        """One step."""
        backward()
        self.optimizer.first_step(zero_grad=True)
        backward()
        self.optimizer.second_step(zero_grad=True)


class ADAPTER(Adapter):
    """How it is built."""

    title = "single file"
    forms = frozenset({"sam", "asam"})

    def build(
        self, params: Any, base: Base, *, rho: float, form: Form | None = None, model: Any = None, **options: Any
    ) -> Subject:
        """From parameters and the base's class."""
        self.claims(form, options)
        optimizer = TwoCalls(params, base.cls, rho=rho, adaptive=form == "asam", **base.options)
        return TwoCallSubject(optimizer, model)
