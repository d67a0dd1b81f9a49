"""Small networks and batches, the formula in plain code, and measurements."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conformance.adapter import Adapter, Base, Closure, Form, Subject, sgd
from conformance.verdict import Fault

RHO = 0.05
LossOf = Callable[[], Tensor]


def net(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """A perceptron with six tensors, without dropout and without running statistics."""
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)]
    return nn.Sequential(*layers).to(dtype)


def noisy_net(seed: int = 0, **batchnorm: Any) -> nn.Sequential:
    """A float32 network with BatchNorm and dropout."""
    torch.manual_seed(seed)
    norm = nn.BatchNorm1d(8, **batchnorm)
    return nn.Sequential(nn.Linear(6, 8), norm, nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3))


def batch(step: int, size: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The batch of a step. Does not use the global random generator."""
    g = torch.Generator().manual_seed(1000 + step)
    x, y = torch.randn(size, 6, generator=g, dtype=torch.float64), torch.randint(3, (size,), generator=g)
    return x.to(dtype), y


def loss_on(model: nn.Module, step: int, size: int = 8) -> LossOf:
    """The loss of a model on the batch of a step."""
    x, y = batch(step, size, next(model.parameters()).dtype)
    return lambda: F.cross_entropy(model(x), y)


def closure_of(subject: Subject, loss_of: LossOf) -> Closure:
    """A closure in torch's convention."""

    def closure() -> Tensor:
        subject.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss

    return closure


def train(subject: Subject, model: nn.Module, steps: Iterable[int], after: Callable[[], None] | None = None) -> None:
    """Train on the batches of these steps."""
    for k in steps:
        subject.step(closure_of(subject, loss_on(model, k)))
        if after is not None:
            after()


class Formula:
    """SAM or ASAM written out, one tensor after the other, around a torch optimizer.

    eps = rho T(T g) / ||T g||, T = 1 or |w|, the norm over all weights whose rho is not zero.
    """

    def __init__(self, params: Iterable[Any], base: Base, rho: float = RHO, form: Form = "sam") -> None:
        self.base, self.rho, self.form = base.make(params), rho, form

    def step(self, loss_of: LossOf) -> None:
        """One step."""
        pairs = [(w, group.get("rho", self.rho)) for group in self.base.param_groups for w in group["params"]]
        pairs = [(w, rho) for w, rho in pairs if w.requires_grad]
        ws = [w for w, _ in pairs]
        moved = [
            (w, g, w.abs() if self.form == "asam" else torch.ones_like(w), rho)
            for (w, rho), g in zip(pairs, torch.autograd.grad(loss_of(), ws), strict=True)
            if rho > 0
        ]
        norm = sum(((t * g).abs() ** 2).sum().double() for _, g, t, _ in moved) ** 0.5
        home = [w.detach().clone() for w in ws]
        with torch.no_grad():
            for w, g, t, rho in moved:
                w += (rho / (norm + 1e-12)).to(w.dtype) * (t * t * g).detach()
        grads = torch.autograd.grad(loss_of(), ws)
        with torch.no_grad():
            for w, h, g in zip(ws, home, grads, strict=True):
                w.copy_(h)
                w.grad = g
        self.base.step()


def follows_formula(adapter: Adapter, base: Base, form: Form = "sam", steps: int = 20) -> Tensor:
    """The largest difference to the formula over some float64 steps."""
    model = net()
    reference = copy.deepcopy(model)
    subject = adapter.build(list(model.parameters()), base, rho=RHO, form=form, model=model)
    formula = Formula(list(reference.parameters()), base, form=form)
    worst = torch.zeros((), dtype=torch.float64)
    for k in range(steps):
        subject.step(closure_of(subject, loss_on(model, k)))
        formula.step(loss_on(reference, k))
        worst = torch.maximum(worst, difference(model, reference))
    return worst


def both_trained(
    adapter: Adapter,
    one: nn.Module,
    other: nn.Module,
    losses: Callable[[nn.Module, int], LossOf] | None = None,
    *,
    base: Base | None = None,
    steps: int = 5,
    **options: Any,
) -> Tensor:
    """The largest difference between two models, each trained with an optimizer of its own on its own losses."""
    losses = losses or loss_on
    for model in (one, other):
        subject = adapter.build(list(model.parameters()), base or sgd(), rho=RHO, model=model, **options)
        for k in range(steps):
            subject.step(closure_of(subject, losses(model, k)))
    return difference(one, other)


def in_turn(subject: Subject, losses: Sequence[LossOf]) -> Closure:
    """A closure whose calls use these losses in turn."""
    calls = [0]

    def loss_of() -> Tensor:
        calls[0] += 1
        return losses[(calls[0] - 1) % len(losses)]()

    return closure_of(subject, loss_of)


def difference(a: nn.Module, b: nn.Module) -> Tensor:
    """The largest difference between the weights of two models; nan if there is one."""
    gaps = [
        (p.detach() - q.detach()).abs().max().double()
        for p, q in zip(a.parameters(), b.parameters(), strict=True)
        if p.numel()
    ]
    return torch.stack(gaps).max()


def displacement(subject: Subject, params: Sequence[Tensor], closure: Closure) -> list[Tensor]:
    """How far each tensor is from w in the last pass of a step, measured inside the closure."""
    seen: list[list[Tensor]] = []

    def watched() -> Any:
        seen.append(copies(params))
        return closure()

    subject.step(watched)
    if len(seen) < 2:
        raise Fault(f"the closure ran {len(seen)} time(s)")
    return [b.double() - a.double() for a, b in zip(seen[0], seen[-1], strict=True)]


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Detached copies."""
    return [t.detach().clone() for t in tensors]


def global_norm(tensors: Iterable[Tensor]) -> float:
    """The norm of all tensors as one vector."""
    return float(torch.stack([t.detach().double().norm() for t in tensors]).norm())


_KINDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def unequal(a: Iterable[Tensor], b: Iterable[Tensor]) -> int:
    """The number of entries that differ in any bit."""
    pairs = zip(a, b, strict=True)
    return sum(int((_bits(x) != _bits(y)).sum()) for x, y in pairs)


def _bits(t: Tensor) -> Tensor:
    return t.detach().contiguous().view(_KINDS[t.element_size()])


def same_model(a: nn.Module, b: nn.Module, what: str) -> str:
    """Raise Fault with the largest difference unless weights and buffers of two models are equal, bit for bit."""
    x, y = a.state_dict(), b.state_dict()
    wrong = [k for k in x if unequal([x[k]], [y[k]])]
    if not wrong:
        return "bit for bit"
    gaps = [float((x[k] - y[k]).abs().max()) for k in wrong if x[k].is_floating_point()]
    raise Fault(f"{what}: {len(wrong)} of {len(x)} tensors differ, by up to {max(gaps, default=1):.2g}")


def unmoved(before: Sequence[Tensor], now: Iterable[Tensor], what: str) -> str:
    """Raise Fault with the distance unless tensors are unchanged, bit for bit."""
    now = list(now)
    if unequal(before, now):
        gone = global_norm([b.detach().double() - a.double() for a, b in zip(before, now, strict=True)])
        raise Fault(f"{what}: moved by {gone:.2g}")
    return "bit for bit"
