"""One update as a program: a generator that asks for gradients and ends with what the base shall take.

It knows neither closures nor in-place moves, so the optimizer and the functional door run the same one.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from flatmin.methods import Combine, Descent, Direction, Eval, Gradients, Offset, Products, State, Tensors
from flatmin.methods.compose import Recipe
from flatmin.optim import tensors as ta


class SecondOrder(Protocol):
    """Products with second derivatives over the weights at these positions."""

    def hessian(self, index: Sequence[int], vectors: Tensors) -> Tensors: ...

    def gauss_newton(self, index: Sequence[int], vectors: Tensors) -> Tensors: ...

    def squared_gradients(self, index: Sequence[int], limit: int) -> Tensors: ...


@dataclass(frozen=True, slots=True)
class Services:
    """What an optimizer knows beyond the weights.

    layers: the class name of the module that holds each weight. momentum: the base's momentum of each of
    these weights. chunks: the
    number of micro-batches of this step.
    """

    layers: Sequence[str] = ()
    momentum: Callable[[Tensors], list[Tensor | None]] | None = None
    chunks: int = 1


class Site:
    """The weights of one update: every trained tensor, and which of them move.

    Args:
        weights: trained tensors.
        groups: the param group of each.
        rhos: the radius of each.
        names: the name of each, "" if unknown.
        step: number of updates before this one.
        generator: the engine's own random numbers.
        layout: what is known of them; None where a transformation must see every operation.
        services: what else parts may ask for.
        keep_gradients: whether somebody looks at the gradients of pass 1 later.

    Attributes:
        products: second-order products at the last pass, where it kept its graph.
        start: where pass 1 was taken, for directions that move it.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        groups: Sequence[Mapping[str, Any]],
        rhos: Sequence[float],
        names: Sequence[str],
        step: int,
        generator: Generators,
        layout: ta.Layout | None = None,
        services: Services | None = None,
        *,
        keep_gradients: bool = False,
    ) -> None:
        self.weights, self.groups, self.names = weights, groups, names
        self.services, self.keep_gradients = services or Services(), keep_gradients
        self.products: SecondOrder | None = None
        self.start: Tensors = []
        self.step, self.generator, self.layout = step, generator, layout
        self.rhos = rhos
        self.moved: Sequence[int] = range(len(weights))
        if 0.0 in rhos:
            self.moved = [i for i, rho in enumerate(rhos) if rho > 0]

    def context(self, index: Sequence[int]) -> SiteContext:
        return SiteContext(self, index)


class Generators:
    """The engine's own random numbers: one seeded CPU generator, so that draws do not depend on device or shards."""

    def __init__(self, seed: int) -> None:
        self.cpu = torch.Generator()
        self.cpu.manual_seed(seed)


class SiteContext:
    """The context that parts see; lists run over `index`."""

    def __init__(self, site: Site, index: Sequence[int]) -> None:
        self._site, self._index = site, index

    @property
    def w(self) -> Tensors:
        return _pick(self._site.weights, self._index)

    @property
    def names(self) -> Sequence[str]:
        return [self._site.names[i] for i in self._index]

    @property
    def layers(self) -> Sequence[str]:
        return [self._site.services.layers[i] for i in self._index]

    @property
    def start(self) -> Tensors:
        moved = self._site.moved
        if len(moved) == len(self._index):
            return self._site.start
        at = dict(zip(moved, self._site.start, strict=True))
        return [at[i] for i in self._index]

    @property
    def momentum(self) -> list[Tensor | None]:
        find = self._site.services.momentum
        assert find is not None
        return find(self.w)

    @property
    def curvature(self) -> Products | None:
        products = self._site.products
        return None if products is None else BoundProducts(products, self._index)

    @property
    def chunks(self) -> int:
        return self._site.services.chunks

    @property
    def options(self) -> Sequence[Mapping[str, Any]]:
        return [self._site.groups[i] for i in self._index]

    @property
    def rhos(self) -> Sequence[float]:
        return _pick(self._site.rhos, self._index)

    @property
    def step(self) -> int:
        return self._site.step

    def norm(self, tensors: Tensors) -> Tensor:
        return ta.norm(tensors)

    def dot(self, a: Tensors, b: Tensors) -> Tensor:
        return ta.dot(a, b)

    def add_scaled(self, a: Tensors, b: Tensors, factor: Tensor, *, spent: bool = False) -> Tensors:
        if self._site.layout is None:
            return [x + factor.to(x.device, x.dtype) * y for x, y in zip(a, b, strict=True)]
        return ta.add_scaled(a, b, factor, self._site.layout, spent=spent)

    def share(self, a: Tensors, along: Tensors) -> Tensor:
        return ta.share(a, along)

    def reject(self, a: Tensors, along: Tensors) -> tuple[Sequence[Tensor], Tensor]:
        rest = self.add_scaled(a, along, -self.share(a, along))
        return rest, self.norm(rest)

    def copied(self, tensors: Tensors) -> Sequence[Tensor]:
        return [t.clone() for t in tensors]

    def noise(self) -> Tensors:
        cpu = self._site.generator.cpu
        return [ta.placed(torch.randn(w.shape, generator=cpu, dtype=_real(w)), w) for w in self.w]

    def bernoulli(self, p: float) -> Tensors:
        cpu = self._site.generator.cpu
        return [ta.placed(torch.rand(w.shape, generator=cpu) < p, w) for w in self.w]

    def uniform(self) -> Tensors:
        cpu = self._site.generator.cpu
        return [ta.placed(torch.rand(w.shape, generator=cpu, dtype=_real(w)), w) for w in self.w]

    def draws(self, count: int) -> list[float]:
        drawn: list[float] = torch.rand(count, generator=self._site.generator.cpu, dtype=torch.float64).tolist()
        return drawn


class BoundProducts:
    """`SecondOrder` over the tensors of one context."""

    def __init__(self, products: SecondOrder, index: Sequence[int]) -> None:
        self._products, self._index = products, index

    def hessian(self, vectors: Tensors) -> Tensors:
        return self._products.hessian(self._index, vectors)

    def gauss_newton(self, vectors: Tensors) -> Tensors:
        return self._products.gauss_newton(self._index, vectors)

    def squared_gradients(self, limit: int) -> Tensors:
        return self._products.squared_gradients(self._index, limit)


def _real(w: Tensor) -> torch.dtype:
    return w.dtype if w.is_complex() else torch.promote_types(w.dtype, torch.float32)


T = TypeVar("T")
_IS_SPARSE = operator.attrgetter("is_sparse")


@dataclass(slots=True)
class Outcome:
    """What an update ends with: u per trained tensor, staged state, and the size of the ascent direction.

    `size` is the norm that decided whether the ascent was taken (None: no ascent); a state staged from a gradient
    that was not finite must not be kept.
    """

    update: Gradients
    staged: dict[str, tuple[Sequence[int], Mapping[str, Any]]] = field(default_factory=dict)
    untouched: bool = False  # u is what the last pass left in the weights' gradients
    post: tuple[Sequence[int], Tensors] | None = None
    size: Tensor | None = None


class Reader(Protocol):
    """Read access to what parts remember."""

    def read(self, kind: str, weights: Sequence[Tensor]) -> State:
        """The slots of the part of this kind, one entry per weight, None where a weight has none yet."""


def _pick(items: Sequence[T], index: Sequence[int]) -> list[T]:
    """The items at these positions."""
    return list(items) if len(index) == len(items) else [items[i] for i in index]


def _complete(grads: Gradients) -> bool:
    """Whether none is missing; `in` would compare tensors by value."""
    return all(map(operator.is_not, grads, itertools.repeat(None)))


def _gather(grads: Gradients, index: Sequence[int]) -> tuple[Sequence[int], Tensors]:
    """The positions in `index` that have a gradient, and these gradients; sparse ones become dense."""
    found: Any = _pick(grads, index)
    if not _complete(found):
        found = [g for g in found if g is not None]
        index = [i for i in index if grads[i] is not None]
    if any(map(_IS_SPARSE, found)):
        found = [g.to_dense() if g.is_sparse else g for g in found]
    return index, found


def _in_all(lists: Sequence[Gradients]) -> Sequence[int]:
    """The positions at which every list has a gradient."""
    if all(map(_complete, lists)):
        return range(len(lists[0]))
    return [i for i, column in enumerate(zip(*lists, strict=True)) if not any(g is None for g in column)]


def program(recipe: Recipe, site: Site, store: Reader, eps: float) -> Generator[Eval, Gradients, Outcome]:
    """The update of `recipe` at `site`: yields evaluations, is sent their gradients, returns the outcome."""
    everything = range(len(site.weights))
    out = Outcome(update=[])
    if recipe.ascends and site.moved:
        chosen = recipe.mask.select(site.context(everything))
        if chosen is not None:
            site.moved = [i for i in site.moved if chosen[i]]
    if not recipe.ascends or not site.moved:
        out.update, out.untouched = (yield Eval("descent", chunk=recipe.points.plain_chunk)), True
        return out

    kept: Gradients | None = None
    first: Gradients | None = None
    moved = site.context(site.moved)

    def read(kind: str, index: Sequence[int]) -> State:
        if not getattr(recipe, kind).slots:
            return {}
        return store.read(kind, [site.weights[i] for i in index])

    def stage(kind: str, index: Sequence[int], new: Mapping[str, Any]) -> None:
        # State advances once a step: from the first ascent.
        if new and kind not in out.staged:
            out.staged[kind] = (index, new)

    def ascend(at: Offset | None = None, chunk: int | None = None) -> Generator[Eval, Gradients, Offset | None]:
        nonlocal kept, first
        direction = recipe.direction
        index: Sequence[int] = site.moved
        g: Tensors | None = None
        if direction.evaluates:
            if first is None:
                if at is None and direction.moves_start:
                    site.start = direction.start(read("direction", index), moved)
                    at = Offset.of(index, list(site.start), moved)
                grads = yield Eval("ascent", at, chunk, recipe.mask.graph(read("mask", site.moved), moved))
            else:
                grads, first = first, None
            if recipe.combine.uses_gradient and kept is None:
                kept = grads
            index, g = _gather(grads, index)
            del grads
            if not index:
                return None
        c = site.context(index)
        d, new = direction(g, read("direction", index), c)
        stage("direction", index, new)
        if d is None:
            return None
        site.start = []
        factors, new = recipe.mask(d, read("mask", index), c)
        stage("mask", index, new)
        if factors is not None and recipe.mask.norm == "inside":
            d = list(torch._foreach_mul(d, factors))
        t, norm = recipe.geometry(d, c)
        if factors is not None and recipe.mask.norm == "full":
            t = list(torch._foreach_mul(t, factors))
        size = c.norm(t) if norm is None else norm
        if out.size is None:
            out.size = size
        radius = recipe.radius(c)
        reach: list[Any] = _pick(site.rhos, index)
        if isinstance(radius, list):
            reach = [rho * factor for rho, factor in zip(reach, radius, strict=True)]
        elif isinstance(radius, Tensor) or radius != 1.0:
            # One product per distinct rho, so that equal radii stay one object.
            products = {rho: rho * radius for rho in set(reach)}
            reach = [products[rho] for rho in reach]
        if (factor := direction.factor()) != 1.0:
            reach = [factor * r for r in reach]
        # Only the gradients of this very pass are the engine's to overwrite, and only if nobody wants them later.
        spent = g is not None and kept is None and not site.keep_gradients and not out.staged and len(t) == len(g)
        scratch = spent and all(map(operator.is_, t, g or ()))
        return Offset(index, t, norm, size, reach, eps, scratch)

    when = recipe.when
    on = when.before(read("when", site.moved), moved)
    if on is None:
        first = yield Eval("ascent", graph=recipe.mask.graph(read("mask", site.moved), moved))
        index, g = _gather(first, site.moved)
        on, new = when.after(g, read("when", index), site.context(index)) if index else (False, {})
        stage("when", index, new)
        del g
        if on and recipe.combine.uses_gradient:
            kept = first
    if not on:
        grads = first if first is not None else (yield Eval("descent", chunk=recipe.points.plain_chunk))
        if type(recipe.combine).off is Combine.off:
            out.update, out.untouched = grads, first is None
            return out
        index, g = _gather(grads, everything)
        u, new = recipe.combine.off(g, read("combine", index), site.context(index))
        stage("combine", index, new)
        out.update = _spread(grads, index, u)
        out.untouched = first is None and all(map(operator.is_, u, _pick(grads, index)))
        return out

    asking = recipe.points(ascend, moved)
    try:
        request = next(asking)
        while True:
            if request.role == "descent":
                request.graph = recipe.combine.graph(read("combine", site.moved), moved)
            request = asking.send((yield request))
    except StopIteration as stop:
        points: list[Gradients] = stop.value
    last = points[-1]
    if type(recipe.direction).observe is not Direction.observe:
        index, seen = _gather(last, site.moved)
        new = recipe.direction.observe(seen, read("direction", index), site.context(index))
        out.staged["direction"] = (index, new)
    if isinstance(recipe.combine, Descent):
        out.update, out.untouched = last, not recipe.points.pooled
        return out
    index = _in_all(points if kept is None else [kept, *points])
    if not index:
        out.update, out.untouched = last, not recipe.points.pooled
        return out
    at_w = None if kept is None else _gather(kept, index)[1]
    gs = [_gather(p, index)[1] for p in points]
    c = site.context(index)
    u, new = recipe.combine(at_w, gs, read("combine", index), c)
    stage("combine", index, new)
    post = recipe.combine.post(at_w, gs, c)
    out.post = None if post is None else (index, post)
    out.update = _spread(last, index, u)
    return out


def _spread(last: Gradients, index: Sequence[int], u: Tensors) -> Gradients:
    """U at `index`; elsewhere what the last pass gave, so that a tensor without gradient stays without."""
    update = list(last)
    for i, x in zip(index, u, strict=True):
        update[i] = x
    return update
