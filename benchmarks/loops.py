"""The training steps that are counted and timed: the floor, plain SGD, flatmin's methods and other implementations."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import flatmin
from benchmarks.nets import Net, make_base
from benchmarks.peers import Build
from flatmin.methods import Named, Need, Recipe, WarmUp

CHUNKS = 2
# Needs that the loss object answers for.
LOSS_NEEDS = frozenset({Need.CRITERION, Need.PER_SAMPLE})


@dataclass
class Loop:
    """One training step, ready to run.

    Args:
        step: runs a whole step.
        model: what it trains.
        optimizer: whose step it is.
        hooks: called as hook(where) with "start" and "end" of each pass, if given.
        share: of the batch that one pass works on.
    """

    step: Callable[[], Any]
    model: nn.Module
    optimizer: Any
    hooks: list[Callable[[str], None]] = field(default_factory=list)
    share: float = 1.0


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
    backward: Callable[[Tensor], None] = Tensor.backward,
    *,
    chooses: bool = False,
) -> Callable[[], Tensor]:
    def precision() -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(setting.device, torch.bfloat16) if setting.autocast else contextlib.nullcontext()

    def whole() -> None:
        with precision():
            criterion(model(x), y)

    def closure() -> Tensor:
        optimizer.zero_grad()
        for hook in hooks:
            hook("start")
        inputs, targets = x, y
        if chooses:
            chosen = optimizer.select_samples(whole)
            inputs, targets = x[chosen], y[chosen]
        with precision():
            loss = criterion(model(inputs), targets)
        backward(loss)
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


def recipe_of(method: str, total: int = 10, **params: Any) -> Recipe:
    """A method by name, with what its line in the table cannot know.

    That is the length of the training (`total` updates), the names in the model ("only" moves the head, which every net
    here has), and a warm-up that is over.
    """
    recipe = flatmin.compose(method, **params).for_length(total, data_size=1000)
    instead = {"only": Named(only="head.*"), "warm-up": WarmUp(steps=0)}.get(method)
    return dataclasses.replace(recipe, **{instead.kind: instead}) if instead else recipe


def ours(
    setting: Setting,
    method: str | Recipe = "sam",
    nonfinite: str = "skip",
    *,
    model_handling: bool = True,
    flat: bool = False,
    chooses: bool = False,
) -> Loop:
    """A step of flatmin, with `model=` and its defaults unless said otherwise.

    With `chooses`, the network runs on the samples that the method chooses. Methods on micro-batches get the batch in
    CHUNKS parts; "sam-db" and "imbsam" get the whole batch twice, as their closures run the network on all of it.

    Raises:
        ValueError: a method that cannot run on the net, with the reason.
    """
    model, x, y = setting.net.make(setting.device, setting.batch)
    recipe = recipe_of(method) if isinstance(method, str) else method
    criterion = flatmin.Criterion(nn.CrossEntropyLoss()) if LOSS_NEEDS & recipe.needs else None
    bare = Need.BARE_SGD in recipe.needs  # its own momentum stands in for that of the base
    optimizer = flatmin.wrap(
        torch.optim.SGD(model.parameters(), lr=0.01) if bare else make_base(model.parameters(), setting.base),
        recipe,
        model=model if model_handling or {Need.NAMES, Need.LAYERS} & recipe.needs else None,
        criterion=criterion,
        nonfinite=nonfinite,
        **({"flat": True} if flat else {}),  # commits before it do not know it
    )
    loop = Loop(lambda: None, model, optimizer)
    once = partial(_closure, setting, model, chooses=chooses)
    rest = (optimizer, criterion or nn.CrossEntropyLoss(), loop.hooks, optimizer.backward)
    if Need.MICRO_BATCHES not in recipe.needs:
        closure = once(x, y, *rest)
        loop.step = lambda: optimizer.step(closure)
        return loop
    if recipe.inner_loop.two_batches or recipe.inner_loop.closures_for:
        closures = [once(x, y, *rest)] * 2
    else:
        closures = [once(a, b, *rest) for a, b in zip(x.chunk(CHUNKS), y.chunk(CHUNKS), strict=True)]
        loop.share = 1.0 / CHUNKS
    loop.step = lambda: optimizer.step(closures)
    return loop


def other(setting: Setting, build: Build) -> Loop:
    """A step of another implementation."""
    model, x, y = setting.net.make(setting.device, setting.batch)
    optimizer = build(model, setting.base)
    loop = Loop(lambda: None, model, optimizer)
    closure = _closure(setting, model, x, y, optimizer, nn.CrossEntropyLoss(), loop.hooks)
    loop.step = lambda: optimizer.update(closure)
    return loop
