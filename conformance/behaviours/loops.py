"""What a model sees of the two passes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from conformance.adapter import Adapter, sgd
from conformance.problems import RHO, closure_of, difference, loss_on, net, noisy_net, train
from conformance.verdict import Behaviour, at_most, behaviour, demand


def _statistics_of(layer: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in layer.state_dict().items() if k not in ("weight", "bias")}


def _touched_once(adapter: Adapter, model: nn.Module, layer: int, loss_of: Callable[[nn.Module], Any]) -> str:
    """Whether a layer's statistics after a step are those of one forward at w."""
    reference = copy.deepcopy(model)
    loss_of(reference)()
    subject = adapter.build(list(model.parameters()), sgd(), rho=0.5, model=model)
    subject.step(closure_of(subject, loss_of(model)))
    wanted, counted = (_statistics_of(m[layer]) for m in (reference, model))
    for k, v in wanted.items():
        gap = float((counted[k].double() - v.double()).abs().max())
        demand(gap == 0, f"{k} is off by {gap:.2g}")
    return "bit for bit"


@behaviour
def batchnorm_statistics(adapter: Adapter) -> str:
    """After a step the running mean and variance are those of one forward at w.

    Statistics of w + eps get into the averages that the model is evaluated with.
    """
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    layer = model[1]
    layer.register_buffer("num_batches_tracked", None)
    return _touched_once(adapter, model, 1, lambda m: loss_on(m, 0))


@behaviour
def batchnorm_count(adapter: Adapter) -> str:
    """BatchNorm with momentum=None, a plain average, counts each batch once.

    num_batches_tracked runs twice as fast, and the average weighs the batches wrongly.
    """
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=None), nn.ReLU(), nn.Linear(8, 3))
    return _touched_once(adapter, model, 1, lambda m: loss_on(m, 0))


@behaviour
def instancenorm_statistics(adapter: Adapter) -> str:
    """InstanceNorm with running statistics sees each batch once.

    Helpers that look for BatchNorm pass it by.
    """
    model = nn.Sequential(
        nn.Linear(6, 8),
        nn.Unflatten(1, (2, 4)),
        nn.InstanceNorm1d(2, track_running_stats=True),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    return _touched_once(adapter, model, 2, lambda m: loss_on(m, 0))


@behaviour
def layers_after_an_exception(adapter: Adapter) -> str:
    """One step after an exception in pass 2 the BatchNorm layers track as before.

    A helper that is not undone leaves the momentum at 0, and the statistics never change again.
    """
    model = noisy_net()
    layer = model[1]
    before = (layer.momentum, layer.track_running_stats, layer.training)
    subject = adapter.build(list(model.parameters()), sgd(), rho=RHO, model=model)
    inner, calls = loss_on(model, 0), [0]

    def loss_of() -> Tensor:
        calls[0] += 1
        if calls[0] == 2:
            raise ArithmeticError
        return inner()

    with contextlib.suppress(ArithmeticError):
        subject.step(closure_of(subject, loss_of))
    mean = layer.running_mean.clone()
    train(subject, model, range(1, 2))
    after = (layer.momentum, layer.track_running_stats, layer.training)
    demand(before == after, f"(momentum, tracks, training) {before} -> {after}")
    demand(not torch.equal(mean, layer.running_mean), "the statistics stand still")
    return ""


@behaviour
def dropout_masks(adapter: Adapter) -> str:
    """Both passes of a step draw the same dropout masks, and two steps different ones.

    The second gradient is of another function than the first, and the ascent is partly noise.
    """
    model = nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.Linear(32, 3))
    masks: list[Tensor] = []
    model[1].register_forward_hook(lambda module, args, out: masks.append(out == 0))
    subject = adapter.build(list(model.parameters()), sgd(), rho=RHO, model=model)
    train(subject, model, range(2))
    demand(len(masks) == 4, f"{len(masks)} forwards in 2 steps")
    apart = [float((masks[i] != masks[i + 1]).double().mean()) for i in (0, 1, 2)]
    demand(apart[1] > 0, "two steps draw the same masks")
    return at_most(max(apart[0], apart[2]), 0.0, "share of the mask that differs:")


@behaviour
def loop_by_hand(adapter: Adapter) -> str:
    """A loop that calls backward itself gives the weights that the closure gives.

    Loops that cannot be turned into a closure cannot use the optimizer.
    """
    model = net()
    reference = copy.deepcopy(model)
    subject, other = (adapter.build(list(m.parameters()), sgd(), rho=RHO, model=m) for m in (model, reference))
    for k in range(5):
        loss_of = loss_on(model, k)
        subject.zero_grad()
        subject.by_hand(lambda loss_of=loss_of: loss_of().backward())
    train(other, reference, range(5))
    return at_most(difference(model, reference), 1e-12, "weights differ by")


@behaviour(limit_s=180)
def compiled_model(adapter: Adapter) -> str:
    """A model under torch.compile is not compiled again once both passes have run.

    Each recompilation costs seconds to minutes, and after eight of them the model runs uncompiled.
    """
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    compiled = torch.compile(model, backend=counter)
    subject = adapter.build(list(model.parameters()), sgd(), rho=RHO, model=compiled)
    try:
        train(subject, compiled, range(2))
        warm = counter.frame_count
        train(subject, compiled, range(2, 6))
    finally:
        torch._dynamo.reset()
    demand(warm, "nothing was compiled")
    return at_most(counter.frame_count - warm, 0, "recompilations in 4 steps:")


BEHAVIOURS: tuple[Behaviour, ...] = (
    batchnorm_statistics,
    batchnorm_count,
    instancenorm_statistics,
    layers_after_an_exception,
    dropout_masks,
    loop_by_hand,
    compiled_model,
)
