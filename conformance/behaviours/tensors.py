"""Tensors that are not a dense real weight with a gradient in both passes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conformance.adapter import Adapter, NotOfferedError, Subject, sgd
from conformance.problems import (
    RHO,
    LossOf,
    batch,
    both_trained,
    closure_of,
    copies,
    difference,
    displacement,
    global_norm,
    in_turn,
    loss_on,
    net,
    unmoved,
)
from conformance.verdict import Behaviour, at_most, behaviour, demand, within


class _Detour(nn.Module):
    """A net with a layer that a pass may leave out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.extra, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.double()

    def forward(self, x: Tensor, *, detour: bool) -> Tensor:
        h = self.first(x).tanh()
        return self.last(self.extra(h).tanh() if detour else h)


def _step(subject: Subject, model: nn.Module, k: int, detours: Sequence[bool]) -> None:
    x, y = batch(k)
    losses: list[LossOf] = [lambda d=d: F.cross_entropy(model(x, detour=d), y) for d in detours]
    subject.step(in_turn(subject, losses))


@behaviour
def gradient_in_pass_1_only(adapter: Adapter) -> str:
    """A weight without gradient in pass 2 goes back to w, and the base leaves it alone.

    Restoring by the gradients of pass 2 leaves it at w + eps, for good.
    """
    model = _Detour()
    subject = adapter.build(list(model.parameters()), sgd(weight_decay=0.0), rho=RHO, model=model)
    before = copies(model.extra.parameters())
    for k in range(6):
        _step(subject, model, k, (True, False))
    gone = global_norm([p.detach() - b for p, b in zip(model.extra.parameters(), before, strict=True)])
    return at_most(gone, 1e-6, "moved by")


@behaviour
def gradient_in_pass_2_only(adapter: Adapter) -> str:
    """A weight without gradient in pass 1 stays at w in pass 2, and the base steps it.

    Nothing was saved for it, so restoring fails with a KeyError in the middle of training.
    """
    model = _Detour()
    subject = adapter.build(list(model.parameters()), sgd(momentum=0.0, weight_decay=0.0), rho=RHO, model=model)
    extra = list(model.extra.parameters())
    before, seen = copies(extra), []
    model.extra.register_forward_hook(lambda *_: seen.append(copies(extra)))
    x, y = batch(0)
    grads = torch.autograd.grad(F.cross_entropy(model(x, detour=True), y), extra)
    _step(subject, model, 0, (False, True))
    demand(len(seen) == 2, "the second pass did not run")
    unmoved(before, seen[1], "in pass 2")
    stepped = [b - p.detach() for p, b in zip(extra, before, strict=True)]
    # The gradient at w + eps is near that at w.
    return within(global_norm(stepped), 0.1 * global_norm(grads), 0.2, "step")


@behaviour
def gradient_in_earlier_steps_only(adapter: Adapter) -> str:
    """A weight that had gradients once and has none now stays.

    What was added to it in its last step is subtracted again in every later one.
    """
    model = _Detour()
    subject = adapter.build(list(model.parameters()), sgd(momentum=0.0, weight_decay=0.0), rho=RHO, model=model)
    for k in range(3):
        _step(subject, model, k, (True,))
    before = copies(model.extra.parameters())
    for k in range(3, 8):
        _step(subject, model, k, (False,))
    gone = global_norm([p.detach() - b for p, b in zip(model.extra.parameters(), before, strict=True)])
    return at_most(gone, 1e-6, "moved by")


@behaviour
def never_a_gradient(adapter: Adapter) -> str:
    """Weights that are frozen or unused stay, and stay frozen.

    Fine-tuning hands over models most of whose weights are frozen; torch's bases do not even decay those.
    """
    model = net()
    model.unused = nn.Linear(3, 3).double()  # a submodule after the last layer, never called
    frozen = model[0].weight.requires_grad_(False)
    rest = [frozen, *model.unused.parameters()]
    before = copies(rest)
    subject = adapter.build(list(model.parameters()), sgd(), rho=RHO, model=model)
    for k in range(4):
        subject.step(closure_of(subject, loss_on(model[:5], k)))
    demand(not frozen.requires_grad, "a frozen weight is not frozen any more")
    return unmoved(before, rest, "frozen and unused weights")


@behaviour
def zero_gradient(adapter: Adapter) -> str:
    """A gradient of exactly zero, in float32 and in float16, is no ascent and no nan.

    Division by a norm of 0 turns the weights to nan; a guard of 1e-12 is 0 in float16.
    """
    for dtype in (torch.float32, torch.float16):
        w = nn.Parameter(torch.ones(4, dtype=dtype))
        subject = adapter.build([w], sgd(momentum=0.0, weight_decay=0.0), rho=RHO)
        subject.step(closure_of(subject, lambda w=w: (w * w * 0.0).sum()))
        unmoved([torch.ones(4, dtype=dtype)], [w], f"in {dtype}")
    return "bit for bit"


class _WithEmpty(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.net, self.empty = inner, nn.Parameter(torch.empty(0, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.empty.sum()


@behaviour
def tensor_without_entries(adapter: Adapter) -> str:
    """A weight of no entries changes nothing for the others.

    Sharded and pruned models hold empty tensors, and so do adapters of rank 0.
    """
    model, inner = net(), net()
    with_empty = _WithEmpty(inner)
    for whole in (model, with_empty):
        subject = adapter.build(list(whole.parameters()), sgd(), rho=RHO, model=whole)
        for k in range(4):
            subject.step(closure_of(subject, loss_on(whole, k)))
    return at_most(difference(model, inner), 1e-6, "weights differ by")


class _Tied(nn.Module):
    """Two layers with one weight, or one layer used twice."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into = nn.Linear(6, 6, bias=False)
        self.out = nn.Linear(6, 6, bias=False) if tied else self.into
        self.out.weight = self.into.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.into(x).tanh())


@behaviour
def tied_weights(adapter: Adapter) -> str:
    """A weight that two layers share is moved and counted once, as that of one layer used twice.

    Language models tie their embedding to their head.
    """
    gap = both_trained(adapter, _Tied(tied=True), _Tied(tied=False), steps=10)
    return at_most(gap, 1e-6, "weights differ by")


def _base_takes(adapter: Adapter, model: nn.Module, losses: Callable[[nn.Module, int], LossOf], what: str) -> None:
    """Not offered where the plain base cannot do it either."""
    reference = copy.deepcopy(model)
    try:
        plain = Subject(adapter.plain(list(reference.parameters()), _PLAIN))
        plain.step(closure_of(plain, losses(reference, 0)))
    except NotOfferedError:
        return
    except Exception as error:
        raise NotOfferedError(f"its bases take no {what}") from error


_PLAIN = sgd(momentum=0.0, weight_decay=0.0)


class _Bag(nn.Module):
    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(12, 4, sparse=sparse), nn.Linear(4, 3)
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens).mean(1))


def _tokens(model: nn.Module, k: int) -> LossOf:
    g = torch.Generator().manual_seed(k)
    tokens, y = torch.randint(12, (8, 5), generator=g), torch.randint(3, (8,), generator=g)
    return lambda: F.cross_entropy(model(tokens), y)


@behaviour
def sparse_gradients(adapter: Adapter) -> str:
    """Sparse gradients of an embedding give the weights that dense ones give.

    Models with large embeddings cannot be trained, or get a wrong norm.
    """
    sparse, dense = _Bag(sparse=True), _Bag(sparse=False)
    _base_takes(adapter, sparse, _tokens, "sparse gradients")
    gap = both_trained(adapter, sparse, dense, _tokens, base=_PLAIN)
    return at_most(gap, 1e-6, "weights differ by")


class _Complex(nn.Module):
    """One complex map, its weights kept as complex numbers or as pairs of real ones."""

    def __init__(self, *, pairs: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        w = torch.randn(4, 6, dtype=torch.complex128)
        self.w = nn.Parameter(torch.view_as_real(w).clone() if pairs else w)

    def forward(self, x: Tensor) -> Tensor:
        w = self.w if self.w.is_complex() else torch.view_as_complex(self.w)
        return x.to(w.dtype) @ w.T


def _distance(model: nn.Module, k: int) -> LossOf:
    x, y = batch(k)
    return lambda: (model(x) - (1 + 2j) * y[:, None]).abs().square().mean()


@behaviour
def complex_weights(adapter: Adapter) -> str:
    """Complex weights train as the pairs of real numbers that they are.

    Signal processing and Fourier layers have complex weights.
    """
    one, two = _Complex(pairs=False), _Complex(pairs=True)
    _base_takes(adapter, one, _distance, "complex weights")
    for model in (one, two):
        subject = adapter.build(list(model.parameters()), sgd(lr=0.01), rho=RHO, form=_any_sam(adapter), model=model)
        for k in range(5):
            subject.step(closure_of(subject, _distance(model, k)))
    return at_most((torch.view_as_real(one.w) - two.w).abs().max(), 1e-6, "weights differ by")


def _any_sam(adapter: Adapter) -> Any:
    # ASAM on pairs is another method than on complex numbers.
    if adapter.forms == frozenset({"asam"}):
        raise NotOfferedError("ASAM only")
    return None


@behaviour
def complex_weights_in_asam(adapter: Adapter) -> str:
    """On complex weights ASAM moves along the gradient, scaled by |w| squared.

    Scaling by the square of w turns the gradient, and every other step climbs down.
    """
    model = _Complex(pairs=False)
    _base_takes(adapter, model, _distance, "complex weights")
    loss_of = _distance(model, 0)
    (g,) = torch.autograd.grad(loss_of(), [model.w])
    subject = adapter.build([model.w], sgd(), rho=RHO, form="asam", model=model)
    seen: list[Tensor] = []

    def watched() -> Tensor:
        seen.append(model.w.detach().clone())
        return loss_of()

    subject.step(closure_of(subject, watched))
    factor = (seen[-1] - seen[0]) / (seen[0].abs() ** 2 * g)
    return at_most((factor / factor.mean().abs() - 1).abs().max(), 1e-6, "off by a share of")


@behaviour
def channels_last(adapter: Adapter) -> str:
    """Weights in another memory format train as contiguous ones, and keep it.

    Arithmetic on flat copies can mix up the entries of tensors that are not contiguous.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(12, 3)).double()
    reference = copy.deepcopy(model)
    model = model.to(memory_format=torch.channels_last)

    def losses(model: nn.Module, k: int) -> LossOf:
        g = torch.Generator().manual_seed(k)
        x, y = torch.randn(4, 3, 6, 6, generator=g, dtype=torch.float64), torch.randint(3, (4,), generator=g)
        return lambda: F.cross_entropy(model(x), y)

    gap = both_trained(adapter, model, reference, losses)
    channels_last_kept = model[0].weight.is_contiguous(memory_format=torch.channels_last)
    demand(channels_last_kept, "the memory format is lost")
    return at_most(gap, 1e-6, "weights differ by")


@behaviour
def mixed_dtypes(adapter: Adapter) -> str:
    """A model in float32 with a float64 head climbs as far as in float64.

    Norm layers and heads are kept in a higher precision than the rest.
    """
    lengths = []
    for dtype in (torch.float32, torch.float64):
        model = net(dtype)
        model[4].double()
        params = list(model.parameters())
        x, y = batch(0, dtype=dtype)
        subject = adapter.build(params, sgd(), rho=RHO, model=model)
        head, body = model[4], model[:4]
        closure = closure_of(subject, lambda h=head, b=body, x=x, y=y: F.cross_entropy(h(b(x).double()), y))
        lengths.append(global_norm(displacement(subject, params, closure)))
    return within(lengths[0], lengths[1], 1e-4, "distance")


@behaviour
def addresses_stay(adapter: Adapter) -> str:
    """Weights keep their storage: the address is the same in both passes and after the step.

    CUDA graphs, flat buffers and views for averages keep pointing at memory that is no weight any more.
    """
    model = net()
    params = list(model.parameters())
    subject = adapter.build(params, sgd(), rho=RHO, model=model)
    home = [p.data_ptr() for p in params]
    moved = 0

    def check() -> None:
        nonlocal moved
        moved = max(moved, sum(p.data_ptr() != h for p, h in zip(params, home, strict=True)))

    inner = loss_on(model, 0)

    def loss_of() -> Tensor:
        check()
        return inner()

    for _ in range(3):
        subject.step(closure_of(subject, loss_of))
        check()
    demand(not moved, f"{moved} of {len(params)} tensors moved")
    return ""


BEHAVIOURS: tuple[Behaviour, ...] = (
    gradient_in_pass_1_only,
    gradient_in_pass_2_only,
    gradient_in_earlier_steps_only,
    never_a_gradient,
    zero_gradient,
    tensor_without_entries,
    tied_weights,
    sparse_gradients,
    complex_weights,
    complex_weights_in_asam,
    channels_last,
    mixed_dtypes,
    addresses_stay,
)
