"""Weights in bfloat16, and gradients that a GradScaler has scaled."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from conformance.adapter import Adapter, Closure, Subject, sgd
from conformance.problems import (
    RHO,
    closure_of,
    copies,
    difference,
    displacement,
    global_norm,
    loss_on,
    net,
    same_model,
    train,
    unmoved,
)
from conformance.verdict import Behaviour, at_most, behaviour, demand, within


@behaviour
def bf16_distance(adapter: Adapter) -> str:
    """With bfloat16 weights the displacement has the length asked for along its direction, within 5 % over 16 steps.

    Entries of eps that are smaller than half a rounding step vanish: most of the ascent does not happen.
    """
    torch.manual_seed(0)
    w = nn.Parameter((0.5 * torch.randn(20000)).bfloat16())
    c = 0.01 * torch.randn(20000)
    subject = adapter.build([w], sgd(lr=0.0), rho=RHO)
    asked = adapter.asked([w.detach()], [c.bfloat16()], RHO)
    length = global_norm(asked)
    shares = []
    for _ in range(16):
        gone = displacement(subject, [w], closure_of(subject, lambda: (w.float() * c).sum()))
        shares.append(float((gone[0].double() * asked[0].double()).sum()) / length**2)
    return within(sum(shares) / len(shares), 1.0, 0.05, "share of the length")


@behaviour
def bf16_return(adapter: Adapter) -> str:
    """With lr = 0, 50 steps leave bfloat16 weights, bit for bit.

    Subtracting eps again rounds a second time, and the weights walk at random.
    """
    model = net(torch.bfloat16)
    before = copies(model.parameters())
    subject = adapter.build(list(model.parameters()), sgd(lr=0.0), rho=0.5, model=model)
    train(subject, model, range(50))
    return unmoved(before, model.parameters(), "after 50 steps")


def _scaler() -> Any:
    return torch.amp.GradScaler("cpu", init_scale=1024.0)


def _scaled(subject: Subject, scaler: Any, model: nn.Module, k: int) -> Closure:
    loss_of = loss_on(model, k)

    def closure() -> Tensor:
        subject.zero_grad()
        loss = loss_of()
        scaler.scale(loss).backward()
        return loss

    return closure


def _with_scaler(adapter: Adapter, **options: Any) -> tuple[nn.Module, Subject, Any]:
    model, scaler = net(torch.float32), _scaler()
    base = sgd(**options.pop("base", {}))
    return model, adapter.build(list(model.parameters()), base, rho=RHO, model=model, scaler=scaler, **options), scaler


@behaviour
def scaler_changes_nothing(adapter: Adapter) -> str:
    """Under a GradScaler, 10 steps are those without one, to 1e-6.

    The second gradient stays scaled and the step is thousands of times too long; or fp16 cannot be used at all.
    """
    model, subject, scaler = _with_scaler(adapter)
    reference = net(torch.float32)
    plain = adapter.build(list(reference.parameters()), sgd(), rho=RHO, model=reference)
    for k in range(10):
        subject.scaled_step(scaler, _scaled(subject, scaler, model, k))
    train(plain, reference, range(10))
    return at_most(difference(model, reference), 1e-6, "weights differ by")


def _overflows(adapter: Adapter, at: int) -> str:
    """With inf in one pass, weights and momentum are as if the step had not been, and the scale goes down."""
    model, subject, scaler = _with_scaler(adapter)
    reference, other, scaler_2 = _with_scaler(adapter)
    for k in range(2):
        subject.scaled_step(scaler, _scaled(subject, scaler, model, k))
        other.scaled_step(scaler_2, _scaled(other, scaler_2, reference, k))
    before, inner, calls = copies(model.parameters()), _scaled(subject, scaler, model, 2), [0]

    def closure() -> Tensor:
        loss = inner()
        calls[0] += 1
        if calls[0] == at:
            next(model.parameters()).grad.view(-1)[0] = math.inf
        return loss

    subject.scaled_step(scaler, closure)
    unmoved(before, model.parameters(), "weights")
    demand(scaler.get_scale() == 512.0, f"the scale is {scaler.get_scale():g} after an inf, not 512")
    for k in range(3, 5):
        subject.scaled_step(scaler, _scaled(subject, scaler, model, k))
        other.scaled_step(scaler_2, _scaled(other, scaler_2, reference, k))
    # The scales differ by a factor of 2, which is exact.
    return same_model(model, reference, "two steps later")


@behaviour
def scaler_and_inf_in_pass_1(adapter: Adapter) -> str:
    """An overflow in pass 1 skips the step and halves the scale.

    A scaler that hears of pass 2 only keeps its scale, and every step overflows.
    """
    return _overflows(adapter, 1)


@behaviour
def scaler_and_inf_in_pass_2(adapter: Adapter) -> str:
    """An overflow in pass 2 skips the step and halves the scale.

    inf is written to the weights, or the skip leaves them at w + eps.
    """
    return _overflows(adapter, 2)


@behaviour
def scaler_and_clipping(adapter: Adapter) -> str:
    """Under a GradScaler, what the base takes is clipped by its true norm.

    A closure that clips sees scaled gradients, and unscaling twice is refused.
    """
    options = {"clip_norm": 0.01, "base": {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0}}
    model, subject, scaler = _with_scaler(adapter, **options)
    before = copies(model.parameters())
    subject.scaled_step(scaler, _scaled(subject, scaler, model, 0))
    return within(global_norm([p - b for p, b in zip(model.parameters(), before, strict=True)]), 0.01, 1e-3, "step")


@behaviour
def scaler_unknown_to_it(adapter: Adapter) -> str:
    """`scaler.step(optimizer, closure)` with a scaler that the optimizer does not know of is refused, or is right.

    Accelerate makes this call: the second gradient stays scaled, and the step is as many times too long.
    """
    model, scaler = net(torch.float32), _scaler()
    reference = copy.deepcopy(model)
    base = sgd(momentum=0.0, weight_decay=0.0)
    subject, plain = (adapter.build(list(m.parameters()), base, rho=RHO, model=m) for m in (model, reference))
    before = copies(model.parameters())
    closure = _scaled(subject, scaler, model, 0)
    closure()
    try:
        scaler.step(subject.optimizer, closure)
    except Exception as error:
        unmoved(before, model.parameters(), "weights after the refusal")
        return f"refused: {type(error).__name__}"
    train(plain, reference, range(1))
    steps = [
        global_norm([p.detach() - b for p, b in zip(m.parameters(), before, strict=True)]) for m in (model, reference)
    ]
    return within(steps[0] / steps[1], 1.0, 1e-3, "step, in true steps:")


BEHAVIOURS: tuple[Behaviour, ...] = (
    bf16_distance,
    bf16_return,
    scaler_changes_nothing,
    scaler_and_inf_in_pass_1,
    scaler_and_inf_in_pass_2,
    scaler_and_clipping,
    scaler_unknown_to_it,
)
