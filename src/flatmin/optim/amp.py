"""Gradient scaling: unscales the gradients of every pass and reports infs to the `torch.amp.GradScaler`."""

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
    """Unscales the gradients of every pass, and reports an inf in any pass to the scaler.

    It uses only public methods of the scaler: `scale` gives the factor without a synchronisation; `unscale_`, called
    with a stand-in for the optimizer that holds one number, reports what was found.

    Args:
        scaler: the scaler of the training loop.
        optimizer: the optimizer whose `step` the scaler calls, and on which it sets `grad_scale` and `found_inf`.
        device: where the result is stored.

    Attributes:
        scale: the factor of this update's losses, a scalar.
        found: 1 if an entry that is not finite has been found in this update, else 0; a scalar.
    """

    def __init__(self, scaler: Any, optimizer: object, device: torch.device) -> None:
        self.scaler, self._device = scaler, device
        self._optimizer = weakref.ref(optimizer)
        self._probe = torch.zeros((), dtype=torch.float32, device=device)
        self._view = SimpleNamespace(param_groups=[{"params": [self._probe]}])
        # A scaler that has not scaled anything yet raises an error in step(), before the closure can run.
        scaler.scale(self._probe)
        self.begin()

    def begin(self) -> None:
        """Start an update: read the scale of its losses."""
        self.scale: Tensor = self.scaler.scale(torch.ones((), dtype=torch.float32, device=self._device))
        self.found = torch.zeros((), dtype=torch.float32, device=self._device)

    def begin_again(self) -> None:
        """Read the scale that the scaler's step has set, for an update that began before the last `update()`."""
        scale, found = self._marks()
        self.scale = torch.ones_like(self.scale) if scale is None else scale
        self.found += found

    def finish_manual(self, grads: Sequence[Tensor | None]) -> None:
        """Unscale the gradients of the last pass of a manual loop, if the scaler has not done so."""
        scale, found = self._marks()
        if scale is not None:
            self.unscale_(grads, scale.double().reciprocal().float())
        self.found += found

    def _marks(self) -> tuple[Tensor | None, Tensor]:
        """The scale (None: already unscaled) and the inf flag that `scaler.step(optimizer)` set on the optimizer."""
        optimizer: Any = self._optimizer()
        if not hasattr(optimizer, "found_inf"):
            raise RuntimeError("the gradients are scaled: end the update with scaler.step(optimizer).")
        return optimizer.grad_scale, optimizer.found_inf

    @property
    def inverse(self) -> Tensor:
        """The factor 1 / scale, computed in float64 and rounded once."""
        inverse: Tensor = self.scale.double().reciprocal().float()
        return inverse

    def unscale_(self, grads: Sequence[Tensor | None], inverse: Tensor | None = None) -> None:
        """Divide by the scale, in place, and record entries that are not finite.

        Raises:
            ValueError: gradients in float16, in which the quotient would underflow.
        """
        present = ta.values(grads)
        if any(g.dtype == torch.float16 for g in present):
            raise ValueError(
                "a GradScaler does not support weights in float16; keep them in float32 and use "
                "autocast(dtype=float16)."
            )
        ta.nonfinite_(present, self.found, self.inverse if inverse is None else inverse)

    def rescale_(self, grads: Sequence[Tensor | None]) -> None:
        """Multiply by the scale, in place: the scaler expects scaled gradients after a manual loop's last pass."""
        for group in ta.buckets(present := ta.local(ta.values(grads))):
            head = present[group[0]]
            torch._foreach_mul_([present[i] for i in group], self.scale.to(head.device, head.dtype))

    def report(self) -> None:
        """Report to the scaler whether this update found an inf."""
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
