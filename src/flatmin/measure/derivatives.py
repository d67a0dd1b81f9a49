"""Test whether derivatives from autograd are correct, against finite differences in float64 on a few examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from flatmin.measure.nested import mapped, tensors
from flatmin.measure.problem import Problem, WeightedBatch, displaced, in_double

PROBED = 8  # examples on which derivatives are tested
Product = Callable[[Problem, list[Tensor], WeightedBatch, Tensor], Tensor]
# Distances from the weights to try, in multiples of each tensor's root mean square: a kink may lie at the weights.
_FAR = (1e-2, 0.0, 0.3, 1.0)
# Step sizes of the differences, in multiples of the weights.
_STEPS = (1e-5, 1e-6, 1e-7, 1e-4, 1e-8, 1e-3)
_LEAST = 1e-8  # a smaller change of the loss, when all weights move by their own size, is round-off


@dataclass(frozen=True)
class _Precision:
    """The relative error above which a derivative counts as wrong, and the round-off of the evaluated values."""

    tol: float
    noise: float

    @classmethod
    def of(cls, problem: Problem) -> _Precision:
        eps = torch.finfo(problem.dtype).eps
        return cls(1e-3 if problem.dtype == torch.float64 else 5e-2, 8.0 * eps)


def against_differences(problem: Problem, batch: WeightedBatch, product: Product) -> str | None:
    """Describe an error of the Hessian products on a few examples; None if there is none or it cannot be decided.

    Two differences of the gradient with different steps must agree in every weight tensor before they are used. They
    do not agree if a kink (ReLU, max pooling) lies between their ends, because it adds a jump divided by the step. Then
    smaller steps and other points are tried, so a network is not rejected because of its kinks. The test runs in
    float64, or in the problem's own precision if the network does not run in float64.

    The cost is one product and five gradients of these examples if the first steps are sufficient.

    Args:
        problem: the function.
        batch: a few examples.
        product: (problem, weights, batch, vector) -> product with the Hessian of the batch's loss at these weights.
    """
    return _tried(problem, batch, lambda clone, at, piece: _gradients(clone, at, piece, product))


def outputs_against_differences(problem: Problem, batch: WeightedBatch, outputs: Outputs, push: Product) -> str | None:
    """Like `against_differences`, for J v, the derivative of the outputs (or terms of the loss) along a vector.

    The cost is one product with J and five forward passes of these examples if the first steps are sufficient.

    Args:
        problem: the function.
        batch: a few examples.
        outputs: (problem, weights, batch) -> tensor.
        push: (problem, weights, batch, vector) -> J v.
    """
    return _tried(problem, batch, lambda clone, at, piece: _pushed(clone, at, piece, outputs, push))


Outputs = Callable[[Problem, list[Tensor], WeightedBatch], Tensor]
Verdict = tuple[bool, str | None]  # whether a decision was possible, and the error


def _tried(
    problem: Problem, batch: WeightedBatch, look: Callable[[Problem, list[Tensor], WeightedBatch], Verdict]
) -> str | None:
    """The result at the first point at which a decision is possible."""
    clones = (in_double(problem), problem)
    for clone in clones:
        piece = replace(batch, inputs=_cast(clone, batch.inputs), targets=_cast(clone, batch.targets))
        try:
            for far in _FAR:
                with clone.guard():
                    at = [w.detach() for w in (displaced(clone, far) if far else clone.weights)]
                    comparison, flaw = look(clone, at, piece)
                if comparison:
                    return flaw
            return None
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            if clone is clones[-1]:
                raise
    return None


class _Lookups(TorchFunctionMode):
    """Records the tables that embeddings look up, with their padding rows."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        given = dict(kwargs or {})
        if func is F.embedding and given.get("padding_idx") is not None:
            self.found.append((args[1], given["padding_idx"]))
        return func(*args, **given)


def padding_of(problem: Problem, batch: WeightedBatch) -> list[tuple[int, int]]:
    """For embeddings with a `padding_idx`: the index of the weight tensor, and of the padding row in it.

    Autograd treats such a row as a constant, because it is not trained, and so does L.
    """
    with problem.guard(), torch.no_grad(), _Lookups() as lookups:
        problem.outputs(batch)
    pairs = [(i, row % len(w)) for table, row in lookups.found for i, w in enumerate(problem.weights) if table is w]
    return sorted(set(pairs))


def without_padding(v: Sequence[Tensor], padding: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Set the padding rows of a direction (tensors shaped like the weights) to zero."""
    tensors = list(v)
    for i, row in padding:
        tensors[i] = tensors[i].index_fill(0, torch.tensor(row, device=tensors[i].device), 0.0)
    return tensors


def _direction(problem: Problem, at: list[Tensor], batch: WeightedBatch) -> Tensor:
    """A random vector scaled by the size of each weight tensor, so no tensor is dominated by larger ones."""
    sizes = [float(w.double().square().mean().sqrt()) for w in at]
    usual = sum(sizes) / len(sizes) or 0.1
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(w.numel(), generator=generator, dtype=torch.float64) for w in at]
    scaled = [(d.view_as(w) * (size or usual)).to(w) for w, d, size in zip(at, drawn, sizes, strict=True)]
    return problem.flat(without_padding(scaled, padding_of(problem, batch)))


def _gradients(problem: Problem, at: list[Tensor], batch: WeightedBatch, product: Product) -> Verdict:
    """Compare Hessian products with differences of gradients, and the gradient with differences of the loss."""
    v, precise = _direction(problem, at, batch), _Precision.of(problem)
    start = _gradient(problem, at, batch)[1]
    if not torch.isfinite(start).all():
        return False, None
    last: tuple[Tensor, float, float] | None = None
    for step in _STEPS:
        up, down = (
            _gradient(problem, [w + s * step * d for w, d in _along(problem, at, v)], batch) for s in (1.0, -1.0)
        )
        rise, difference, noise = (
            (up[0] - down[0]) / (2.0 * step),
            (up[1] - down[1]) / (2.0 * step),
            precise.noise / step,
        )
        if last is not None:
            other, before, rough = last[0], last[1], max(noise, last[2])
            if _agree(problem, other, difference, start, rough, precise.tol):
                slope = float(torch.dot(start.double(), v.double()))
                unsure = precise.tol * max(abs(slope), abs(rise)) + rough * (10.0 + abs(up[0]) + abs(slope)) + _LEAST
                if abs(rise - before) <= 0.2 * unsure and abs(rise - slope) > unsure:
                    said = f"along a test vector it is {slope:.4g}, but differences of the loss give {rise:.4g}"
                    return True, f"the gradient is not the gradient of the loss ({said})."
                exact = product(problem, at, batch, v)
                if max(float(difference.norm()), float(exact.norm())) * float(v.norm()) > _LEAST:
                    return True, _unlike(problem, exact, difference, other, start, rough, precise.tol)
        last = (difference, rise, noise)
    return False, None


def _pushed(problem: Problem, at: list[Tensor], batch: WeightedBatch, outputs: Outputs, push: Product) -> Verdict:
    """Compare J v with differences of the outputs."""
    v, precise = _direction(problem, at, batch), _Precision.of(problem)
    last: Tensor | None = None
    for step in _STEPS:
        with torch.no_grad():
            up, down = (
                outputs(problem, [w + s * step * d for w, d in _along(problem, at, v)], batch) for s in (1.0, -1.0)
            )
        difference, size = (up - down) / (2.0 * step), float(up.norm())
        if last is not None and torch.isfinite(difference).all():
            unsure = precise.noise / step * size
            if float((difference - last).norm()) <= 0.2 * precise.tol * float(difference.norm()) + unsure:
                exact = push(problem, at, batch, v)
                largest = max(float(difference.norm()), float(exact.norm()))
                off = float((exact - difference).norm()) - 10.0 * unsure
                if largest > _LEAST * size:
                    flaw = f"J v differs from differences of the outputs by {off / largest:.1%}."
                    return True, flaw if off > precise.tol * largest else None
        last = difference
    return False, None


def _along(problem: Problem, at: Sequence[Tensor], v: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(at, problem.shaped(v), strict=True)


def _gradient(problem: Problem, at: Sequence[Tensor], batch: WeightedBatch) -> tuple[float, Tensor]:
    weights = [w.detach().requires_grad_() for w in at]
    value = problem.value_of(batch, problem.outputs(batch, weights), weights)
    slopes = torch.autograd.grad(value, weights, materialize_grads=True)
    return float(value.detach()), problem.flat(slopes)


def _blocks(problem: Problem, *vectors: Tensor) -> Iterator[tuple[str, list[Tensor]]]:
    """The pieces of vectors that belong to each weight tensor, with its name."""
    sizes = [w.numel() for w in problem.weights]
    for tensor, *pieces in zip(problem.names, *(x.split(sizes) for x in vectors), strict=True):
        yield tensor, list(pieces)


def _agree(problem: Problem, a: Tensor, b: Tensor, start: Tensor, noise: float, tol: float) -> bool:
    """Whether two differences agree in every tensor to a fifth of the error that counts as wrong."""
    whole = float(b.norm())
    for _, (x, y, g) in _blocks(problem, a, b, start):
        if float((x - y).norm()) > 0.2 * tol * (float(y.norm()) + 1e-3 * whole) + noise * float(g.norm()):
            return False
    return noise * float(start.norm()) <= 0.2 * tol * whole or not whole


def _unlike(
    problem: Problem, exact: Tensor, difference: Tensor, other: Tensor, start: Tensor, noise: float, tol: float
) -> str | None:
    """Describe the tensor in which a product differs most from the differences; None if all agree."""
    worst, where = 0.0, ""
    whole = float(difference.norm())
    for name, (x, y, z, g) in _blocks(problem, exact, difference, other, start):
        size = max(float(y.norm()), float(x.norm())) + 1e-3 * whole
        off = float((x - y).norm()) - 10.0 * (float((y - z).norm()) + noise * float(g.norm()))
        if size and off / size > worst:
            worst, where = off / size, name
    if worst <= tol:
        return None
    return f"the products differ from differences of the gradient by {worst:.1%} in {where!r}."


def _cast(problem: Problem, part: Any) -> Any:
    return mapped(part, lambda t: problem._cast(t, data=True))


# -- where it may be ---------------------------------------------------------------------------------------------------

_WRONG = ("WeightNorm",)  # torch's second derivative of these is wrong


def suspects(problem: Problem, batch: WeightedBatch) -> str:
    """Describe the modules with a custom backward, or with a backward whose derivative is known to be wrong."""
    names: list[str] = []

    def look(name: str, module: nn.Module) -> Callable[..., None]:
        def hook(called: nn.Module, inputs: Any, outputs: Any) -> None:
            stops = {t.grad_fn for _, t in tensors(inputs)}
            for _, t in tensors(outputs):
                names.extend(f"{name or type(module).__name__!r} ({node})" for node in _own_nodes(t.grad_fn, stops))

        return hook

    leaves = [(name, leaf) for name, leaf in problem.model.named_modules() if next(leaf.children(), None) is None]
    handles = [leaf.register_forward_hook(look(name, leaf)) for name, leaf in leaves]
    try:
        with problem.guard():
            value = problem.value_of(batch, problem.outputs(batch))
    finally:
        for handle in handles:
            handle.remove()
    if not names:
        names = list(_own_nodes(value.grad_fn, set()))
    if not names:
        return " (a part of the network or loss is detached, or has a backward that autograd cannot differentiate)"
    some = list(dict.fromkeys(names))
    return f"; check {', '.join(some[:4])}{' and others' * (len(some) > 4)}"


def _own_nodes(start: Any, stops: set[Any]) -> Iterator[str]:
    """Names of the backward functions between tensors that are custom, or known to be wrong."""
    seen, left = set(stops), [start]
    while left:
        node = left.pop()
        if node is None or node in seen or len(seen) > 10_000:
            continue
        seen.add(node)
        kind = type(node).__name__
        if isinstance(node, torch.autograd.function.BackwardCFunction) or any(word in kind for word in _WRONG):
            yield "weight_norm" if "WeightNorm" in kind else kind.removesuffix("Backward")
        left.extend(following for following, _ in node.next_functions)
