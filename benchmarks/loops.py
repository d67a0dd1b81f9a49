"""The training steps that are counted and timed: the floor, plain SGD, flatmin's methods and other implementations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import flatmin
from benchmarks.nets import Net

BASES = ("default", "foreach", "fused")
LR, MOMENTUM, RHO = 1e-3, 0.9, 0.05


def make_base(params: Any, kind: str) -> torch.optim.SGD:
    """SGD with momentum in one of torch's three implementations ("default": torch's choice for the device)."""
    flags = {} if kind == "default" else {kind: True}
    base = torch.optim.SGD(params, lr=LR, momentum=MOMENTUM, **flags)
    if base.param_groups[0]["params"][0].is_meta:
        # torch refuses fused kernels on the meta device, where `launches` stands in for them.
        base._need_device_dtype_check_for_fused = False
    return base


@dataclass
class Loop:
    """One training step, ready to run.

    Args:
        step: runs a whole step.
        model: what it trains.
        optimizer: whose step it is.
        hooks: called as hook(where) with "start" and "end" of each pass, if given.
    """

    step: Callable[[], Any]
    model: nn.Module
    optimizer: Any
    hooks: list[Callable[[str], None]] = field(default_factory=list)


@dataclass(frozen=True)
class Setting:
    """What all loops of a comparison share.

    Args:
        net: the network.
        base: "default", "foreach" or "fused" SGD.
        device: where it runs.
        batch: batch size; None: the net's own.
        autocast: whether the forward runs in bfloat16.
    """

    net: Net
    base: str = "default"
    device: str = "cpu"
    batch: int | None = None
    autocast: bool = False


def _closure(
    setting: Setting,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    optimizer: Any,
    criterion: Callable[[Tensor, Tensor], Tensor],
    hooks: list[Callable[[str], None]],
) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        for hook in hooks:
            hook("start")
        precision = torch.autocast(setting.device, torch.bfloat16) if setting.autocast else contextlib.nullcontext()
        with precision:
            loss = criterion(model(x), y)
        loss.backward()
        for hook in hooks:
            hook("end")
        return loss

    return closure


def floor(setting: Setting, passes: int = 2) -> Loop:
    """`passes` times zero_grad, forward and backward, then one step of the base; passes=1 is plain SGD."""
    model, x, y = setting.net.make(setting.device, setting.batch)
    base = make_base(model.parameters(), setting.base)
    loop = Loop(lambda: None, model, base)
    once = _closure(setting, model, x, y, base, nn.CrossEntropyLoss(), loop.hooks)

    def step() -> None:
        for _ in range(passes):
            once()
        base.step()

    loop.step = step
    return loop


def ours(setting: Setting, method: str = "sam", nonfinite: str = "skip", *, model_handling: bool = True) -> Loop:
    """A step of flatmin, with `model=` and its defaults unless said otherwise."""
    model, x, y = setting.net.make(setting.device, setting.batch)
    recipe = flatmin.compose(method)
    asks = any(need.name == "CRITERION" for need in recipe.needs)
    criterion = flatmin.Criterion(nn.CrossEntropyLoss()) if asks else None
    optimizer = flatmin.wrap(
        make_base(model.parameters(), setting.base),
        recipe,
        model=model if model_handling else None,
        criterion=criterion,
        nonfinite=nonfinite,
    )
    loop = Loop(lambda: None, model, optimizer)
    closure = _closure(setting, model, x, y, optimizer, criterion or nn.CrossEntropyLoss(), loop.hooks)
    loop.step = lambda: optimizer.step(closure)
    return loop


def other(setting: Setting, build: Callable[[nn.Module, str], Any]) -> Loop:
    """A step of another implementation with first_step and second_step; `build` makes it for a model and a base."""
    model, x, y = setting.net.make(setting.device, setting.batch)
    optimizer = build(model, setting.base)
    loop = Loop(lambda: None, model, optimizer)
    closure = _closure(setting, model, x, y, optimizer, nn.CrossEntropyLoss(), loop.hooks)

    def step() -> None:
        closure()
        optimizer.first_step(zero_grad=True)
        closure()
        optimizer.second_step()

    loop.step = step
    return loop
