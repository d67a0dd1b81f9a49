"""An exponential moving average of the weights, for evaluation and as MESA's teacher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from flatmin.optim.tensors import LOW, is_sharded


class WeightAverage:
    """An exponential moving average of the weights: a <- decay a + (1 - decay) w after every update.

    It averages parameters and floating-point buffers; other buffers are copied. The average starts at the weights after
    the first update, so it needs no bias correction. Averages of bf16 and fp16 tensors are stored in float32, where
    steps of (1 - decay) (w - a) are not rounded away.

    Call it like the model: it returns the model's outputs with the averaged weights, in eval mode and without
    gradients. MESA uses them as the reference in `flatmin.methods.losses.trajectory`:

        >>> import torch
        >>> from flatmin.methods.losses import trajectory
        >>> from flatmin.optim import WeightAverage
        >>> model, x = torch.nn.Linear(4, 3), torch.randn(8, 4)
        >>> teacher = WeightAverage(model, 0.9998)
        >>> teacher.update()  # after every step
        >>> trajectory(model(x), teacher(x)).item()
        0.0

    Args:
        model: the module whose weights are averaged, not wrapped in DistributedDataParallel or torch.compile.
        decay: weight of the old average, in (0, 1). MESA's code uses 0.9998.

    Raises:
        ValueError: decay outside (0, 1).

    Source: Du, Zhou, Feng, Tan & Zhou, Sharpness-Aware Training for Free, NeurIPS 2022 (MESA).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"decay must be in (0, 1), got {decay!r}.")
        self.decay = decay
        self._model = model
        self._kept: dict[str, Tensor] = {}

    def _live(self) -> dict[str, Tensor]:
        """The model's current tensors by name, shared ones once. Read each time, since tensors may be replaced."""
        tensors: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, tensor in self._model.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor) and id(tensor) not in seen:
                seen.add(id(tensor))
                tensors[name] = tensor
        return tensors

    @property
    def begun(self) -> bool:
        """Whether there is an average."""
        return bool(self._kept)

    def buffers(self) -> list[Tensor]:
        """The averages of buffers."""
        live = self._live()
        return [tensor for name, tensor in self._kept.items() if not isinstance(live.get(name), nn.Parameter)]

    def forget(self) -> None:
        """Drop the average; the next update starts a new one."""
        self._kept = {}

    @torch.no_grad()
    def update(self) -> None:
        """Add the current weights. The average of a tensor that is new or has a new shape starts at the tensor."""
        live, kept = self._live(), self._kept
        self._kept = {name: self._average_of(name, tensor) for name, tensor in live.items()}
        going = [name for name, tensor in live.items() if tensor.is_floating_point() and name in kept]
        if going:
            torch._foreach_lerp_([self._kept[n] for n in going], [_wide(live[n]) for n in going], 1 - self.decay)
        for name, tensor in live.items():
            if not tensor.is_floating_point():
                self._kept[name].copy_(tensor)

    def _average_of(self, name: str, tensor: Tensor) -> Tensor:
        """The average on the tensor's current device; the tensor itself if there is no average of its shape."""
        kept = self._kept.get(name)
        return _wide(tensor).clone() if kept is None or kept.shape != tensor.shape else _like(kept, tensor)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the model with the averaged weights, in eval mode and without gradients.

        Args:
            args: passed to the model.
            kwargs: passed to the model.

        Raises:
            RuntimeError: there is no average yet, or the weights are sharded.
        """
        live = self._live()
        if any(map(is_sharded, live.values())):
            raise RuntimeError("the weights are sharded, but the averaged model needs whole weights; train with DDP.")
        if not self._kept:
            raise RuntimeError("there is no average yet: call update() after a step before you call the average.")
        weights = self._as_in_model(live)
        # A forward may write to buffers in eval mode too, also to those that are not saved.
        seen = set(map(id, live.values()))
        weights |= {name: tensor for name, tensor in self._model.named_buffers() if id(tensor) not in seen}
        weights = {n: t if isinstance(live.get(n), nn.Parameter) else t.clone() for n, t in weights.items()}
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
        """A context in which the model has the averaged weights; without an average the model is unchanged."""
        if not self._kept:
            yield
            return
        live = self._live()
        before = {name: tensor.detach().clone() for name, tensor in live.items()}
        self._put(self._as_in_model(live))
        try:
            yield
        finally:
            self._put(before)

    def _as_in_model(self, live: dict[str, Tensor]) -> dict[str, Tensor]:
        """The averages in the dtypes of the model."""
        return {name: self._average_of(name, tensor).to(tensor.dtype) for name, tensor in live.items()}

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, tensor in self._live().items():
            if name in values:
                tensor.copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        """Copies of the averages on the CPU, by name; empty before the first update."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._kept.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load averages that `state_dict` returned.

        Raises:
            ValueError: their names or shapes differ from those of the model's tensors.
        """
        if not state:
            return self.forget()
        live = self._live()
        shaped = [n for n, t in live.items() if n in state and state[n].shape != t.shape]
        wrong = {
            "missing": [name for name in live if name not in state],
            "unknown": [name for name in state if name not in live],
            "of another shape": [f"{n} {tuple(state[n].shape)} for {tuple(live[n].shape)}" for n in shaped],
        }
        if any(wrong.values()):
            said = "; ".join(f"{what}: {', '.join(names)}" for what, names in wrong.items() if names)
            raise ValueError(f"the averages do not match the model ({said}); load the averages of this model.")
        self._kept = {name: _like(state[name], tensor).clone() for name, tensor in live.items()}


def _like(average: Tensor, tensor: Tensor) -> Tensor:
    """An average on the tensor's device, in the precision that its average is stored in."""
    return average.to(tensor.device, torch.float32 if tensor.dtype in LOW else tensor.dtype)


def _wide(tensor: Tensor) -> Tensor:
    """The values in the precision in which they are averaged."""
    return tensor.detach().float() if tensor.dtype in LOW else tensor.detach()
