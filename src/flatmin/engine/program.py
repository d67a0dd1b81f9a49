"""One update as a program: a generator that asks for gradients and ends with what the base shall take.

It knows neither closures nor in-place moves, so the optimizer and the functional door run the same one.
"""

from __future__ import annotations

import operator
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from flatmin.engine import tensors as ta
from flatmin.parts import Descent, Direction, Eval, Gradients, Offset, State, Tensors
from flatmin.recipes import Recipe


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
    ) -> None:
        self.weights, self.groups, self.names = weights, groups, names
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
    def options(self) -> Sequence[Mapping[str, Any]]:
        return [self._site.groups[i] for i in self._index]

    @property
    def step(self) -> int:
        return self._site.step

    def norm(self, tensors: Tensors) -> Tensor:
        return ta.norm(tensors, self._site.layout)

    def dot(self, a: Tensors, b: Tensors) -> Tensor:
        return ta.dot(a, b)

    def noise(self) -> Tensors:
        cpu = self._site.generator.cpu
        return [torch.randn(w.shape, generator=cpu, dtype=_real(w)).to(w.device, w.dtype) for w in self.w]

    def bernoulli(self, p: float) -> Tensors:
        cpu = self._site.generator.cpu
        return [(torch.rand(w.shape, generator=cpu) < p).to(w.device, w.dtype) for w in self.w]


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


def _gather(grads: Gradients, index: Sequence[int]) -> tuple[Sequence[int], Tensors]:
    """The positions in `index` that have a gradient, and these gradients; sparse ones become dense."""
    found = [g for g in _pick(grads, index) if g is not None]
    if len(found) < len(index):
        index = [i for i in index if grads[i] is not None]
    if any(map(_IS_SPARSE, found)):
        found = [g.to_dense() if g.is_sparse else g for g in found]
    return index, found


def _in_all(lists: Sequence[Gradients]) -> Sequence[int]:
    """The positions at which every list has a gradient."""
    return [i for i, column in enumerate(zip(*lists, strict=True)) if not any(g is None for g in column)]


def program(recipe: Recipe, site: Site, store: Reader, eps: float) -> Generator[Eval, Gradients, Outcome]:
    """The update of `recipe` at `site`: yields evaluations, is sent their gradients, returns the outcome."""
    everything = range(len(site.weights))
    out = Outcome(update=[])
    if not recipe.ascends or not site.moved:
        out.update, out.untouched = (yield Eval("descent")), True
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

    def ascend(at: Offset | None = None) -> Generator[Eval, Gradients, Offset | None]:
        nonlocal kept, first
        direction = recipe.direction
        index: Sequence[int] = site.moved
        g: Tensors | None = None
        if direction.evaluates:
            if first is None:
                if at is None and direction.moves_start:
                    at = Offset.of(index, direction.start(read("direction", index), moved), moved)
                grads = yield Eval("ascent", at)
            else:
                grads, first = first, None
            index, g = _gather(grads, index)
            if not index:
                return None
            if recipe.combine.uses_gradient and kept is None:
                kept = grads
            del grads
        c = site.context(index)
        d, new = direction(g, read("direction", index), c)
        stage("direction", index, new)
        if d is None:
            return None
        factors, new = recipe.mask(read("mask", index), c)
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
        if isinstance(radius, Tensor) or radius != 1.0:
            # One product per distinct rho, so that equal radii stay one object.
            products = {rho: rho * radius for rho in set(reach)}
            reach = [products[rho] for rho in reach]
        # Only the gradients of this very pass are the engine's to overwrite, and only if nobody wants them later.
        spent = g is not None and kept is None and not out.staged and len(t) == len(g)
        scratch = spent and all(map(operator.is_, t, g or ()))
        return Offset(index, t, norm, size, reach, eps, scratch)

    when = recipe.when
    on = when.before(read("when", site.moved), moved)
    if on is None:
        first = yield Eval("ascent")
        index, g = _gather(first, site.moved)
        on, new = when.after(g, read("when", index), site.context(index)) if index else (False, {})
        stage("when", index, new)
        if on and recipe.combine.uses_gradient:
            kept = first
    if not on:
        grads = first if first is not None else (yield Eval("descent"))
        index, g = _gather(grads, everything)
        u, new = recipe.combine.off(g, read("combine", index), site.context(index))
        stage("combine", index, new)
        out.update = _spread(grads, index, u)
        return out

    points = yield from recipe.points(ascend, moved)
    last = points[-1]
    if type(recipe.direction).observe is not Direction.observe:
        index, seen = _gather(last, site.moved)
        new = recipe.direction.observe(seen, read("direction", index), site.context(index))
        out.staged["direction"] = (index, new)
    if isinstance(recipe.combine, Descent):
        out.update, out.untouched = last, True
        return out
    index = _in_all(points if kept is None else [kept, *points])
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
