"""An exponential average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    """a <- decay a + (1 - decay) w after every update, of parameters and floating-point buffers; others are copied.

    It begins at the weights after the first update, so it needs no correction of its start.

    Args:
        model: whose weights are averaged.
        decay: in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._live = dict(model.state_dict(keep_vars=True))
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
            self._kept = {name: tensor.detach().clone() for name, tensor in self._live.items()}
            return
        moving = [name for name, tensor in self._live.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([self._kept[n] for n in moving], [self._live[n].detach() for n in moving], 1 - self.decay)
        for name, tensor in self._live.items():
            if not tensor.is_floating_point():
                self._kept[name].copy_(tensor)

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
        """The averages by name; empty before the first update."""
        return {name: tensor.detach().cpu() for name, tensor in self._kept.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from averages that `state_dict` gave."""
        self._kept = {name: state[name].to(tensor.device).clone() for name, tensor in self._live.items() if state}
