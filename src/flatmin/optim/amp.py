"""Gradient scaling: every pass is unscaled, and an inf in any of them reaches the `torch.amp.GradScaler`."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from flatmin.optim import tensors as ta


class GradScaling:
    """Gradients come in scaled, parts see them unscaled, and the scaler hears of an inf in any pass.

    Only the scaler's public methods are used: `scale` tells the factor without a synchronisation, and `unscale_` of a
    stand-in for the optimizer, which holds one number, records what was found.

    Args:
        scaler: the scaler of the loop.
        optimizer: the object whose `step` the scaler calls and on which it leaves its marks.
        device: where the verdict is kept.

    Attributes:
        scale: the factor of this update's losses.
        found: whether an entry has been found that is not finite, 0 or 1.
    """

    def __init__(self, scaler: Any, optimizer: object, device: torch.device) -> None:
        self.scaler, self._device = scaler, device
        self._optimizer = weakref.ref(optimizer)
        self._probe = torch.zeros((), dtype=torch.float32, device=device)
        self._view = SimpleNamespace(param_groups=[{"params": [self._probe]}])
        # A scaler that has scaled nothing yet refuses step() before the closure can run.
        scaler.scale(self._probe)
        self.begin()

    def begin(self) -> None:
        """Read the scale that this update's losses carry."""
        self.scale: Tensor = self.scaler.scale(torch.ones((), dtype=torch.float32, device=self._device))
        self.found = torch.zeros((), dtype=torch.float32, device=self._device)

    def begin_again(self) -> None:
        """Take the scale from the marks of the scaler's step: the update began before its last `update()`."""
        scale, found = self._marks()
        self.scale = torch.ones_like(self.scale) if scale is None else scale
        self.found += found

    def finish_manual(self, grads: Sequence[Tensor | None]) -> None:
        """Unscale what the last pass of a manual loop left scaled, as the marks of the scaler's step say."""
        scale, found = self._marks()
        if scale is not None:
            self.unscale_(grads, scale.double().reciprocal().float())
        self.found += found

    def _marks(self) -> tuple[Tensor | None, Tensor]:
        """What `scaler.step(optimizer)` has set on the optimizer: the scale (None: already off) and an inf."""
        optimizer: Any = self._optimizer()
        if not hasattr(optimizer, "found_inf"):
            raise RuntimeError("the gradients are scaled: end the update with scaler.step(optimizer).")
        return optimizer.grad_scale, optimizer.found_inf

    @property
    def inverse(self) -> Tensor:
        """1 / scale, rounded once."""
        inverse: Tensor = self.scale.double().reciprocal().float()
        return inverse

    def unscale_(self, grads: Sequence[Tensor | None], inverse: Tensor | None = None) -> None:
        """Divide by the scale, in place, and note entries that are not finite.

        Raises:
            ValueError: gradients in fp16, in which the quotient would underflow.
        """
        present = ta.values(grads)
        if any(g.dtype == torch.float16 for g in present):
            raise ValueError(
                "a GradScaler cannot serve weights in float16; keep them in float32 and use autocast(dtype=float16)."
            )
        ta.nonfinite_(present, self.found, self.inverse if inverse is None else inverse)

    def rescale_(self, grads: Sequence[Tensor | None]) -> None:
        """Multiply by the scale, in place: what the scaler expects to find after the last pass of a manual loop."""
        for group in ta.buckets(present := ta.local(ta.values(grads))):
            head = present[group[0]]
            torch._foreach_mul_([present[i] for i in group], self.scale.to(head.device, head.dtype))

    def report(self) -> None:
        """Tell the scaler what this update found."""
        if self._unscaled(self._view):
            raise RuntimeError("call scaler.update() after each step of the optimizer.")
        self._probe.grad = torch.where(self.found > 0, math.inf, 0.0).to(torch.float32)
        self.scaler.unscale_(self._view)
        self._probe.grad = None

    def unscaled_early(self) -> bool:
        """Whether `scaler.unscale_(optimizer)` has been called since its last update."""
        return self._unscaled(self._optimizer())

    def _unscaled(self, optimizer: object) -> bool:
        state = getattr(self.scaler, "_per_optimizer_states", {}).get(id(optimizer))
        return state is not None and state["stage"].name == "UNSCALED"
