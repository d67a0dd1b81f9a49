"""An exponential average of the weights: evaluated in their place, or the teacher of MESA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from flatmin.optim.tensors import LOW, is_sharded


class WeightAverage:
    """a <- decay a + (1 - decay) w after every update, of parameters and floating-point buffers; others are copied.

    It begins at the weights after the first update, so it needs no correction of its start. Averages of bf16 and fp16
    tensors are kept in float32, where steps of (1 - decay) (w - a) do not round away.

    Called as the model is, it gives the model's outputs with the averaged weights, in eval mode and without gradient.
    MESA takes them as the reference of `flatmin.methods.losses.trajectory`:

        >>> import torch
        >>> from flatmin.methods.losses import trajectory
        >>> from flatmin.optim import WeightAverage
        >>> model, x = torch.nn.Linear(4, 3), torch.randn(8, 4)
        >>> teacher = WeightAverage(model, 0.9998)
        >>> teacher.update()  # after every step
        >>> trajectory(model(x), teacher(x)).item()
        0.0

    Args:
        model: whose weights are averaged: the module itself, not the one that DistributedDataParallel or torch.compile
            makes of it.
        decay: in (0, 1). MESA's code has 0.9998.

    Raises:
        ValueError: decay outside of (0, 1).

    Source: Du, Zhou, Feng, Tan & Zhou, Sharpness-Aware Training for Free, NeurIPS 2022 (MESA).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"decay must be in (0, 1), got {decay!r}.")
        self.decay = decay
        self._model = model
        self._live: dict[str, Tensor] = {}
        shared: set[int] = set()
        for name, tensor in model.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor) and id(tensor) not in shared:
                shared.add(id(tensor))
                self._live[name] = tensor
        self._kept: dict[str, Tensor] = {}

    @property
    def begun(self) -> bool:
        """Whether there is an average."""
        return bool(self._kept)

    def buffers(self) -> list[Tensor]:
        """The averages of buffers."""
        return [tensor for name, tensor in self._kept.items() if not isinstance(self._live[name], nn.Parameter)]

    def forget(self) -> None:
        """Start over with the next update."""
        self._kept = {}

    @torch.no_grad()
    def update(self) -> None:
        """Add the present weights."""
        if not self._kept:
            self._kept = {name: _wide(tensor).clone() for name, tensor in self._live.items()}
            return
        moving = [name for name, tensor in self._live.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([self._kept[n] for n in moving], [_wide(self._live[n]) for n in moving], 1 - self.decay)
        for name, tensor in self._live.items():
            if not tensor.is_floating_point():
                self._kept[name].copy_(tensor)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the model with the averaged weights, in eval mode and without gradient.

        Args:
            args: of the model.
            kwargs: of the model.

        Raises:
            RuntimeError: there is no average yet, or the weights are sharded.
        """
        if any(map(is_sharded, self._live.values())):
            raise RuntimeError("the weights are sharded, and the averaged model needs whole ones; train with DDP.")
        if not self._kept:
            raise RuntimeError("there is no average yet: call update() after a step before the average is asked.")
        weights = {name: self._kept[name].to(tensor.dtype) for name, tensor in self._live.items()}
        training = [module for module in self._model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            return functional_call(self._model, weights, args, kwargs)
        finally:
            for module in training:
                module.training = True

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the averaged weights, inside."""
        if not self._kept:
            yield
            return
        before = {name: tensor.detach().clone() for name, tensor in self._live.items()}
        self._put(self._kept)
        try:
            yield
        finally:
            self._put(before)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, tensor in self._live.items():
            tensor.copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        """The averages by name, on the CPU; empty before the first update."""
        return {name: tensor.detach().cpu() for name, tensor in self._kept.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from averages that `state_dict` gave."""
        self._kept = {name: state[name].to(tensor.device).clone() for name, tensor in self._live.items() if state}


def _wide(tensor: Tensor) -> Tensor:
    """The values in a precision in which they can be averaged."""
    return tensor.detach().float() if tensor.dtype in LOW else tensor.detach()
