"""Exact returns, exceptions, and gradients that are not finite."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from conformance.adapter import Adapter, Closure, Subject, sgd
from conformance.problems import (
    RHO,
    closure_of,
    copies,
    displacement,
    global_norm,
    loss_on,
    net,
    same_model,
    train,
    unmoved,
)
from conformance.verdict import Behaviour, Fault, behaviour, demand, within


@behaviour
def return_is_exact(adapter: Adapter) -> str:
    """With lr = 0, 300 float32 steps leave every weight, bit for bit.

    (w + eps) - eps is not w in floating point: weights drift, and replicas apart.
    """
    model = net(torch.float32)
    before = copies(model.parameters())
    subject = adapter.build(list(model.parameters()), sgd(lr=0.0), rho=RHO, model=model)
    train(subject, model, range(300))
    return unmoved(before, model.parameters(), "after 300 steps")


class _StopError(Exception):
    pass


def _disturbed(inner: Closure, at: int, what: Callable[[], None]) -> Closure:
    """A closure that does something after its call number `at`."""
    calls = [0]

    def closure() -> Tensor:
        loss = inner()
        calls[0] += 1
        if calls[0] == at:
            what()
        return loss

    return closure


def _with_reference(
    adapter: Adapter, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, Subject, nn.Module, Subject]:
    """A model with its optimizer, twice, two steps into training."""
    model = net(dtype)
    reference = copy.deepcopy(model)
    one, other = (adapter.build(list(m.parameters()), sgd(), rho=RHO, model=m) for m in (model, reference))
    train(one, model, range(2))
    train(other, reference, range(2))
    return model, one, reference, other


@behaviour
def exception_in_pass_2(adapter: Adapter) -> str:
    """An exception in the second pass leaves the weights at w, and training continues as if the step had not been.

    A caught out-of-memory error or an interrupt before a checkpoint leaves w + eps in it.
    """
    for error in (_StopError(), KeyboardInterrupt()):

        def fail(error: BaseException = error) -> None:
            raise error

        model, subject, reference, other = _with_reference(adapter)
        before = copies(model.parameters())
        try:
            subject.step(_disturbed(closure_of(subject, loss_on(model, 2)), 2, fail))
        except (_StopError, KeyboardInterrupt):
            pass
        else:
            raise Fault("the exception is swallowed, or pass 2 never ran")
        unmoved(before, model.parameters(), "after the exception")
        train(subject, model, range(3, 5))
        train(other, reference, range(3, 5))
        same_model(model, reference, "two steps later")
    return "bit for bit"


def _spoil(model: nn.Module, value: float) -> Callable[[], None]:
    def write() -> None:
        for p in list(model.parameters())[:2]:
            assert p.grad is not None
            p.grad.view(-1)[0] = value

    return write


@behaviour
def not_finite_in_pass_1(adapter: Adapter) -> str:
    """With inf or nan in the gradient of pass 1, weights stay finite, in this step and the next.

    eps is inf or nan, so is w + eps, and nothing that is subtracted brings w back.
    """
    for value in (math.inf, math.nan):
        model, subject, *_ = _with_reference(adapter)
        subject.step(_disturbed(closure_of(subject, loss_on(model, 2)), 1, _spoil(model, value)))
        train(subject, model, range(3, 5))
        lost = sum(int((~p.isfinite()).sum()) for p in model.parameters())
        demand(not lost, f"{value}: {lost} of {sum(p.numel() for p in model.parameters())} weights are not finite")
    return "finite"


@behaviour
def not_finite_in_pass_2(adapter: Adapter) -> str:
    """With inf or nan in the gradient of pass 2, weights and momentum stay: the step is skipped, or raises.

    One bad batch in a long run turns the momentum to nan, and with it every later weight; plain torch does so too.
    """
    for value in (math.inf, math.nan):
        model, subject, reference, other = _with_reference(adapter)
        before = copies(model.parameters())
        closure = _disturbed(closure_of(subject, loss_on(model, 2)), 2, _spoil(model, value))
        with contextlib.suppress(FloatingPointError):
            subject.step(closure)
        lost = sum(int((~p.isfinite()).sum()) for p in model.parameters())
        demand(not lost, f"{value}: {lost} weights are not finite")
        unmoved(before, model.parameters(), f"{value}: weights")
        train(subject, model, range(3, 5))
        train(other, reference, range(3, 5))
        same_model(model, reference, "two steps later")
    return "bit for bit"


@behaviour
def fp16_norm(adapter: Adapter) -> str:
    """A float16 gradient whose norm is above 65504 still gives a distance of rho, within 5 %.

    The norm overflows in float16, eps becomes 0, and SAM is switched off without a word.
    """
    torch.manual_seed(0)
    w = nn.Parameter((0.1 * torch.rand(10000) - 0.05).half())
    subject = adapter.build([w], sgd(lr=0.0), rho=1.0, form="sam")
    gone = displacement(subject, [w], closure_of(subject, lambda: (w.float() * 1000.0).sum()))
    return within(global_norm(gone), 1.0, 0.05, "distance")


BEHAVIOURS: tuple[Behaviour, ...] = (
    return_is_exact,
    exception_in_pass_2,
    not_finite_in_pass_1,
    not_finite_in_pass_2,
    fp16_norm,
)
