"""Other ways to write SAM, for comparison: each optional, none a dependency."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from benchmarks.loops import RHO
from benchmarks.nets import LR, MOMENTUM, make_base


class PlainLoop:
    """SAM as a loop over tensors, the form of the common single-file implementations.

    Per tensor: its norm, a copy of the weight, a scaled gradient added; afterwards the pointer goes back to the copy.
    """

    def __init__(self, params: Any, base: str = "default", rho: float = RHO) -> None:
        self.params = list(params)
        self.base = make_base(self.params, base)
        self.rho = rho
        self.saved: dict[nn.Parameter, torch.Tensor] = {}

    def zero_grad(self) -> None:
        """Clear all gradients."""
        self.base.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The base's checkpoint."""
        return self.base.state_dict()

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Climb to w + eps."""
        norms = [p.grad.norm(p=2) for p in self.params if p.grad is not None]
        scale = self.rho / (torch.stack(norms).norm(p=2) + 1e-12)
        for p in self.params:
            if p.grad is not None:
                self.saved[p] = p.data.clone()
                p.add_(p.grad * scale)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        """Back to w, and the base's step."""
        for p, data in self.saved.items():
            p.data = data
        self.saved.clear()
        self.base.step()


def _pytorch_optimizer(model: nn.Module, base: str, **options: Any) -> Any:
    from pytorch_optimizer import SAM

    flags = {} if base == "default" else {base: True}
    return SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, momentum=MOMENTUM, **flags, **options)


def found() -> dict[str, Callable[[nn.Module, str], Any]]:
    """Implementations that can be run here: label -> builder for (model, kind of base)."""
    builders: dict[str, Callable[[nn.Module, str], Any]] = {
        "plain per-tensor loop": lambda model, base: PlainLoop(model.parameters(), base)
    }
    if importlib.util.find_spec("pytorch_optimizer"):
        builders[f"pytorch_optimizer {version('pytorch_optimizer')}"] = _pytorch_optimizer
    return builders


def missing() -> list[str]:
    """Implementations that would be compared if they were installed."""
    return [] if importlib.util.find_spec("pytorch_optimizer") else ["pytorch_optimizer"]
