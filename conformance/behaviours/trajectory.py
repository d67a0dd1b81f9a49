"""The weights follow the formula."""

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
    """20 steps with SGD, momentum and weight decay follow SAM's formula, to 1e-6.

    Otherwise another algorithm runs under the name of SAM, and published values of rho do not apply to it.
    """
    return at_most(follows_formula(adapter, sgd()), 1e-6, "weights differ by")


@behaviour
def sam_with_adamw(adapter: Adapter) -> str:
    """20 steps with AdamW follow SAM's formula, to 1e-6.

    Entries that a wrapper adds to the base optimizer's state can keep AdamW from creating its moments.
    """
    return at_most(follows_formula(adapter, adamw()), 1e-6, "weights differ by")


@behaviour
def asam(adapter: Adapter) -> str:
    """20 steps follow ASAM's formula with T = |w| on all tensors, to 1e-6.

    Otherwise the scale invariance of ASAM is lost.
    """
    return at_most(follows_formula(adapter, sgd(), "asam"), 1e-6, "weights differ by")


@behaviour
def double_precision(adapter: Adapter) -> str:
    """In float64 the formulas hold to 1e-12.

    A norm in float32 limits the precision of gradient checks, scientific models and tests.
    """
    forms: list[Form] = [form for form in ("sam", "asam") if form in adapter.forms]
    if not forms:
        raise NotOfferedError("neither SAM nor ASAM")
    worst = max(float(follows_formula(adapter, base, form)) for form in forms for base in (sgd(), adamw()))
    return at_most(worst, 1e-12, "weights differ by")


@behaviour
def rho_zero_is_the_base(adapter: Adapter) -> str:
    """With rho = 0, a network with BatchNorm and dropout trains as with the base optimizer alone, bit for bit.

    Otherwise a comparison of rho values with rho = 0 as the baseline compares two training procedures.
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
    """With lr = 0, all weights are unchanged after 50 steps through randomly drawn branches, bit for bit.

    Otherwise weights of stochastic depth or of experts move by rho each time their branch is not drawn again.
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

    With a norm for each tensor the radius grows with the square root of the number of tensors.
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
    """Each param group is perturbed with its own rho.

    Otherwise models whose parts need different radii cannot be trained, or silently get one radius.
    """
    model = net()
    one = _ascent(adapter, model, list(model.parameters()))
    two = _ascent(adapter, model, _two_groups(model, 2 * RHO, 0.5 * RHO))
    gaps = [float((b - f * a).norm() / a.norm()) for a, b, f in zip(one, two, [2, 2, *[0.5] * 4], strict=True)]
    return at_most(max(gaps), 1e-6, "off by a share of")


@behaviour
def group_at_rest(adapter: Adapter) -> str:
    """A param group with rho = 0 is not perturbed, and the others are perturbed as if it were not there.

    Otherwise layers that are excluded from the ascent silently shorten it for all others.
    """
    model = net()
    gone = _ascent(adapter, model, _two_groups(model, 0.0, RHO))
    alone = _ascent(adapter, model, list(model.parameters())[2:])
    demand(not global_norm(gone[:2]), f"the group moved by {global_norm(gone[:2]):.2g}")
    return within(global_norm(gone[2:]), global_norm(alone[2:]), 1e-6, "distance of the others")


@behaviour
def micro_batches(adapter: Adapter) -> str:
    """Accumulation over four micro-batches equals the step on the whole batch.

    Large batches may not fit into memory, and accumulating by hand around two passes mixes their gradients.
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
    """Gradients that are clipped at the end of the closure reach the base optimizer clipped.

    If the wrapper replaces the gradient or adds up both, clipping does not bound the step.
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
