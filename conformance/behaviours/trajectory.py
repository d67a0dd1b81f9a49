"""The weights go where the formula says."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conformance.adapter import Adapter, Form, NotOfferedError, Subject, adamw, sgd
from conformance.problems import (
    RHO,
    batch,
    closure_of,
    copies,
    difference,
    displacement,
    follows_formula,
    global_norm,
    loss_on,
    net,
    noisy_net,
    same_model,
    unmoved,
)
from conformance.verdict import Behaviour, at_most, behaviour, demand, within


@behaviour
def sam_with_sgd(adapter: Adapter) -> str:
    """20 steps with SGD, momentum and weight decay are SAM's formula, to 1e-6.

    Another algorithm runs under SAM's name, and published values of rho mean nothing to it.
    """
    return at_most(follows_formula(adapter, sgd()), 1e-6, "weights differ by")


@behaviour
def sam_with_adamw(adapter: Adapter) -> str:
    """20 steps with AdamW are SAM's formula, to 1e-6.

    What the wrapper keeps in the base's state can keep AdamW from setting up its moments.
    """
    return at_most(follows_formula(adapter, adamw()), 1e-6, "weights differ by")


@behaviour
def asam(adapter: Adapter) -> str:
    """20 steps are ASAM's formula with T = |w| on all tensors, to 1e-6.

    The scale invariance that ASAM is chosen for is lost.
    """
    return at_most(follows_formula(adapter, sgd(), "asam"), 1e-6, "weights differ by")


@behaviour
def double_precision(adapter: Adapter) -> str:
    """In float64 the formulas hold to 1e-12.

    A norm in float32 limits what gradient checks, scientific models and tests of one's own can resolve.
    """
    forms: list[Form] = [form for form in ("sam", "asam") if form in adapter.forms]
    if not forms:
        raise NotOfferedError("neither SAM nor ASAM")
    worst = max(float(follows_formula(adapter, base, form)) for form in forms for base in (sgd(), adamw()))
    return at_most(worst, 1e-12, "weights differ by")


@behaviour
def rho_zero_is_the_base(adapter: Adapter) -> str:
    """With rho = 0, a net with BatchNorm and dropout trains as with the base alone, bit for bit.

    A comparison of rho values with rho = 0 as its baseline compares two training procedures.
    """
    model, base = noisy_net(), sgd()
    reference = copy.deepcopy(model)
    subject = adapter.build(list(model.parameters()), base, rho=0.0, model=model)
    plain = Subject(adapter.plain(list(reference.parameters()), base))
    for k in range(5):
        for one, trained in ((subject, model), (plain, reference)):
            torch.manual_seed(k)
            one.step(closure_of(one, loss_on(trained, k)))
    return same_model(model, reference, "after 5 steps")


class _Branches(nn.Module):
    """Every forward runs one of three branches, drawn at random."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.branches = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.branches[random.randrange(3)](self.trunk(x).tanh()))


@behaviour
def lr_zero_stays(adapter: Adapter) -> str:
    """With lr = 0, 50 steps through randomly drawn branches leave every weight, bit for bit.

    Weights of stochastic depth or of experts wander off by rho each time their branch is not drawn again.
    """
    model = _Branches()
    before = copies(model.parameters())
    subject = adapter.build(list(model.parameters()), sgd(lr=0.0), rho=RHO, model=model)
    for k in range(50):
        subject.step(closure_of(subject, loss_on(model, k)))
    return unmoved(before, model.parameters(), "after 50 steps")


@behaviour
def one_global_norm(adapter: Adapter) -> str:
    """The second gradient is taken at distance rho from w, over all tensors together.

    A norm for each tensor makes the radius grow with the square root of the number of tensors.
    """
    adapter.claims("sam", {})
    model = net()
    params = list(model.parameters())
    subject = adapter.build(params, sgd(), rho=RHO, form="sam", model=model)
    gone = displacement(subject, params, closure_of(subject, loss_on(model, 0)))
    return within(global_norm(gone), RHO, 1e-6, "distance")


def _ascent(adapter: Adapter, model: nn.Module, params: list[Any]) -> list[Tensor]:
    subject = adapter.build(params, sgd(lr=0.0), rho=RHO, model=model)

    def loss_of() -> Tensor:
        # Also of the tensors that are not the optimizer's.
        model.zero_grad()
        return loss_on(model, 0)()

    return displacement(subject, list(model.parameters()), closure_of(subject, loss_of))


def _two_groups(model: nn.Sequential, first: float, second: float) -> list[dict]:
    params = list(model.parameters())
    return [{"params": params[:2], "rho": first}, {"params": params[2:], "rho": second}]


@behaviour
def rho_of_a_group(adapter: Adapter) -> str:
    """Each group moves with its own rho.

    A model whose parts want different radii cannot be trained, or silently gets one radius.
    """
    model = net()
    one = _ascent(adapter, model, list(model.parameters()))
    two = _ascent(adapter, model, _two_groups(model, 2 * RHO, 0.5 * RHO))
    gaps = [float((b - f * a).norm() / a.norm()) for a, b, f in zip(one, two, [2, 2, *[0.5] * 4], strict=True)]
    return at_most(max(gaps), 1e-6, "off by a share of")


@behaviour
def group_at_rest(adapter: Adapter) -> str:
    """A group with rho = 0 stays where it is, and the others move as if it were not there.

    Layers that are excluded from the ascent still shorten it for all others, without a word.
    """
    model = net()
    gone = _ascent(adapter, model, _two_groups(model, 0.0, RHO))
    alone = _ascent(adapter, model, list(model.parameters())[2:])
    demand(not global_norm(gone[:2]), f"the group moved by {global_norm(gone[:2]):.2g}")
    return within(global_norm(gone[2:]), global_norm(alone[2:]), 1e-6, "distance of the others")


@behaviour
def micro_batches(adapter: Adapter) -> str:
    """Accumulation over four micro-batches is the step on the whole batch.

    Large batches do not fit, and accumulating around two passes by hand mixes the gradients of both.
    """
    model = net()
    reference = copy.deepcopy(model)
    parts, whole = (adapter.build(list(m.parameters()), sgd(), rho=RHO, model=m) for m in (model, reference))
    for k in range(5):
        x, y = batch(k)
        pieces = list(zip(x.chunk(4), y.chunk(4), strict=True))
        parts.accumulate([closure_of(parts, lambda x=a, y=b: F.cross_entropy(model(x), y)) for a, b in pieces])
        whole.step(closure_of(whole, loss_on(reference, k)))
    return at_most(difference(model, reference), 1e-6, "weights differ by")


@behaviour
def clipping_in_the_closure(adapter: Adapter) -> str:
    """Gradients clipped at the end of the closure reach the base clipped.

    With a gradient that the wrapper has replaced, or with both added up, clipping does not bound the step.
    """
    model = net()
    params = list(model.parameters())
    plain_sgd = sgd(lr=1.0, momentum=0.0, weight_decay=0.0)
    subject = adapter.build(params, plain_sgd, rho=RHO, model=model)
    before = copies(params)
    inner = closure_of(subject, loss_on(model, 0))

    def closure() -> Tensor:
        loss = inner()
        nn.utils.clip_grad_norm_(params, 0.01)
        return loss

    subject.step(closure)
    return within(global_norm([p - b for p, b in zip(params, before, strict=True)]), 0.01, 1e-3, "step")


BEHAVIOURS: tuple[Behaviour, ...] = (
    sam_with_sgd,
    sam_with_adamw,
    asam,
    double_precision,
    rho_zero_is_the_base,
    lr_zero_stays,
    one_global_norm,
    rho_of_a_group,
    group_at_rest,
    micro_batches,
    clipping_in_the_closure,
)
