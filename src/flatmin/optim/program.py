"""The program of an update: a pure generator that requests gradients and returns what the base optimizer takes.

It does not depend on closures or in-place changes, so the optimizer and `value_and_grad` run the same program.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from flatmin.methods import GradientRequest, Gradients, Need, Part, Perturbation, Products, Recipe, State, Tensors
from flatmin.optim import tensors as ta


class SecondOrder(Protocol):
    """Products with second derivatives over the weights at these positions."""

    def hessian(self, index: Sequence[int], vectors: Tensors) -> Tensors: ...

    def gauss_newton(self, index: Sequence[int], vectors: Tensors) -> Tensors: ...

    def squared_gradients(self, index: Sequence[int], limit: int) -> Tensors: ...


class Generators:
    """The engine's random numbers: one seeded CPU generator, so that draws do not depend on devices or shards."""

    def __init__(self, seed: int) -> None:
        self.cpu = torch.Generator()
        self.cpu.manual_seed(seed)


@dataclass(slots=True)
class StepInputs:
    """The weights of one update and their properties.

    Args:
        weights: the trained tensors.
        groups: the param group of each.
        rhos: the radius of each.
        names: the name of each, "" if unknown; empty if no part needs names.
        step: number of updates before this one.
        generator: the engine's random numbers.
        layout: the layout of the weights. Default None: use only operations that `torch.func` can transform.
        layers: the class name of the module that holds each; empty if no part needs layers. Default empty.
        momentum: function that returns the base optimizer's momentum of some weights. Default None: no part needs it.
        chunks: number of micro-batches. Default 1.

    Attributes:
        moved: positions of the weights that may be perturbed; the program removes those that the mask excludes.
        products: second-order products at the last pass, if its graph was kept.
        start: where pass 1 was taken, one tensor for each position in `moved`, for directions that move it.
    """

    weights: Sequence[Tensor]
    groups: Sequence[Mapping[str, Any]]
    rhos: Sequence[float]
    names: Sequence[str]
    step: int
    generator: Generators
    layout: ta.Layout | None = None
    layers: Sequence[str] = ()
    momentum: Callable[[Tensors], list[Tensor | None]] | None = None
    chunks: int = 1
    moved: Sequence[int] = field(init=False)
    products: SecondOrder | None = field(init=False, default=None)
    start: Tensors = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.moved = range(len(self.weights))
        if 0.0 in self.rhos:
            self.moved = [i for i, rho in enumerate(self.rhos) if rho > 0]


class EngineContext:
    """Implements `flatmin.methods.StepContext` for the weights at the positions `index`."""

    __slots__ = ("index", "inputs")

    def __init__(self, inputs: StepInputs, index: Sequence[int]) -> None:
        self.inputs, self.index = inputs, index

    @property
    def w(self) -> Tensors:
        return _pick(self.inputs.weights, self.index)

    @property
    def names(self) -> Sequence[str]:
        return _pick(self.inputs.names, self.index)

    @property
    def layers(self) -> Sequence[str]:
        return _pick(self.inputs.layers, self.index)

    @property
    def start(self) -> Tensors:
        moved = self.inputs.moved
        if len(moved) == len(self.index):
            return self.inputs.start
        at = dict(zip(moved, self.inputs.start, strict=True))
        return [at[i] for i in self.index]

    @property
    def momentum(self) -> list[Tensor | None]:
        assert self.inputs.momentum is not None
        return self.inputs.momentum(self.w)

    @property
    def curvature(self) -> Products | None:
        products = self.inputs.products
        return None if products is None else BoundProducts(products, self.index)

    @property
    def chunks(self) -> int:
        return self.inputs.chunks

    @property
    def options(self) -> Sequence[Mapping[str, Any]]:
        return _pick(self.inputs.groups, self.index)

    @property
    def rhos(self) -> Sequence[float]:
        return _pick(self.inputs.rhos, self.index)

    @property
    def step(self) -> int:
        return self.inputs.step

    def norm(self, tensors: Tensors) -> Tensor:
        return ta.norm(tensors)

    def dot(self, a: Tensors, b: Tensors) -> Tensor:
        return ta.dot(a, b)

    def add_scaled(self, a: Tensors, b: Tensors, factor: Tensor, *, spent: bool = False) -> Tensors:
        if self.inputs.layout is None:
            return [x + factor.to(x.device, x.dtype) * y for x, y in zip(a, b, strict=True)]
        return ta.add_scaled(a, b, factor, self.inputs.layout, spent=spent)

    def share(self, a: Tensors, along: Tensors) -> Tensor:
        return ta.share(a, along)

    def reject(self, a: Tensors, along: Tensors) -> tuple[Sequence[Tensor], Tensor]:
        rest = self.add_scaled(a, along, -self.share(a, along))
        return rest, self.norm(rest)

    def copied(self, tensors: Tensors) -> Sequence[Tensor]:
        return [t.clone() for t in tensors]

    def noise(self) -> Tensors:
        cpu = self.inputs.generator.cpu
        return [ta.placed(torch.randn(w.shape, generator=cpu, dtype=_real(w)), w) for w in self.w]

    def bernoulli(self, p: float) -> Tensors:
        cpu = self.inputs.generator.cpu
        return [ta.placed(torch.rand(w.shape, generator=cpu) < p, w) for w in self.w]

    def uniform(self) -> Tensors:
        cpu = self.inputs.generator.cpu
        return [ta.placed(torch.rand(w.shape, generator=cpu, dtype=_real(w)), w) for w in self.w]

    def draws(self, count: int) -> list[float]:
        drawn: list[float] = torch.rand(count, generator=self.inputs.generator.cpu, dtype=torch.float64).tolist()
        return drawn


class BoundProducts:
    """`SecondOrder` for the tensors of one context."""

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


class PassGradients(Gradients):
    """The gradients of one pass, one for each trained weight (None: no gradient).

    Attributes:
        owned: whether the program may overwrite them, because nothing else reads them afterwards. Default False.
    """

    owned = False


@dataclass(slots=True)
class Outcome:
    """The result of an update.

    Attributes:
        update: u for each trained tensor. If u is the gradients of the last pass, it is the same list object.
        staged: the new state by kind of part: positions of the weights, and slot -> value. It must not be stored if
            `size` or `remembered` is not finite.
        post: positions and terms to add to the weights after the base optimizer's step; None: nothing.
        size: the norm that decided whether the weights were perturbed; None: no ascent.
        remembered: the norm of further gradients of pass 1 that the combination has staged; None: nothing.
    """

    update: Gradients
    staged: dict[str, tuple[Sequence[int], Mapping[str, Any]]] = field(default_factory=dict)
    post: tuple[Sequence[int], Tensors] | None = None
    size: Tensor | None = None
    remembered: Tensor | None = None


class Reader(Protocol):
    """Read access to the state of the parts."""

    def read(self, kind: str, weights: Sequence[Tensor]) -> State:
        """The slots of the part of this kind, with one entry for each weight (None: no value yet)."""


def _pick(items: Sequence[T], index: Sequence[int]) -> list[T]:
    """The items at these positions."""
    return list(items) if len(index) == len(items) else [items[i] for i in index]


def _gather(grads: Gradients, index: Sequence[int]) -> tuple[Sequence[int], Tensors]:
    """The positions in `index` that have a gradient, and these gradients; sparse ones are made dense."""
    chosen: Any = _pick(grads, index)
    if not all(map(operator.is_not, chosen, itertools.repeat(None))):  # `in` would compare tensors by value
        chosen = [g for g in chosen if g is not None]
        index = [i for i in index if grads[i] is not None]
    if any([g.is_sparse for g in chosen]):
        chosen = [g.to_dense() if g.is_sparse else g for g in chosen]
    return index, chosen


def _in_all(lists: Sequence[Gradients]) -> Sequence[int]:
    """The positions at which every list has a gradient."""
    if all(all(map(operator.is_not, grads, itertools.repeat(None))) for grads in lists):
        return range(len(lists[0]))
    return [i for i, column in enumerate(zip(*lists, strict=True)) if not any(g is None for g in column)]


def program(
    recipe: Recipe, inputs: StepInputs, store: Reader, eps: float
) -> Generator[GradientRequest, PassGradients, Outcome]:
    """Run one update of a recipe.

    The generator yields gradient requests, is sent the gradients, and returns the outcome. It calls only the methods
    that a part declares (`flatmin.methods.Part`).

    Args:
        recipe: the recipe.
        inputs: the weights of the update.
        store: the state of the parts.
        eps: added to every norm that divides.
    """
    direction, mask, schedule, combine = recipe.direction, recipe.mask, recipe.schedule, recipe.combine
    inner_loop = recipe.inner_loop
    out = Outcome(update=[])
    scheduled = inputs.moved  # what the schedule looks at: a mask that draws must not decide for it
    if recipe.ascends and inputs.moved and mask.selects:
        selected = mask.select(EngineContext(inputs, range(len(inputs.weights))))
        if selected is not None:
            inputs.moved = [i for i in inputs.moved if selected[i]]
        if Need.RANDOM not in mask.needs:
            scheduled = inputs.moved
    moved = EngineContext(inputs, inputs.moved)
    if not recipe.ascends or not (inputs.moved or combine.always):
        out.update = (yield from inner_loop.plain(moved)) if inner_loop.loops else (yield GradientRequest("descent"))
        return out

    at_w: Gradients | None = None  # the gradients of pass 1, for combinations that use them
    pass_1: PassGradients | None = None  # gradients that the schedule has used already, for the ascent

    def read(part: Part, index: Sequence[int]) -> State:
        if not (part.slots or part.reads):
            return {}
        weights = [inputs.weights[i] for i in index]
        state = dict(store.read(part.kind, weights)) if part.slots else {}
        origins = {slot: (part, slot) for slot in part.slots}
        for name, origin in part.reads.items():
            kind, _, slot = origin.partition(".")
            origins[name] = recipe.parts[kind], slot
            state[name] = store.read(kind, weights)[slot]
        for name, (owner, slot) in origins.items():
            if (value := owner.initial(slot)) is not None:
                state[name] = [
                    torch.full_like(w, value, dtype=torch.promote_types(w.dtype, torch.float32)) if s is None else s
                    for s, w in zip(state[name], weights, strict=True)
                ]
        return state

    def stage(part: Part, index: Sequence[int], new: Mapping[str, Any]) -> None:
        # State changes once in each step, at the first ascent.
        if new and part.kind not in out.staged:
            out.staged[part.kind] = (index, new)

    may_keep_graph = mask.keeps_graph or direction.keeps_graph

    def wants_graph() -> bool:
        return any(part.keeps_graph and part.graph(read(part, inputs.moved), moved) for part in (mask, direction))

    def asked(at: Perturbation | None = None, chunk: int | None = None) -> GradientRequest | None:
        """The request of the gradient that an ascent needs, if it needs one."""
        if not direction.evaluates or pass_1 is not None:
            return None
        if at is None and direction.moves_start:
            inputs.start = direction.start(read(direction, inputs.moved), moved)
            at = Perturbation.of(inputs.moved, list(inputs.start), moved)
        some = 0 < len(inputs.moved) < len(inputs.weights) and not (combine.uses_gradient or inner_loop.uses_gradient)
        return GradientRequest(
            "ascent", at, chunk, may_keep_graph and wants_graph(), weights=inputs.moved if some else None
        )

    def climbed(grads: Gradients | None) -> Perturbation | None:
        """The perturbation from this gradient, if one was asked for; None: no weight is perturbed."""
        nonlocal at_w, pass_1
        owned = False
        shown: Gradients = []  # for the inner loop
        index: Sequence[int] = inputs.moved
        g: Tensors | None = None
        if direction.evaluates and pass_1 is not None:
            grads, pass_1 = pass_1, None
        if grads is not None:
            if combine.uses_gradient and at_w is None:
                at_w = grads
            if inner_loop.uses_gradient:
                shown = grads
            # Inner loops may send a list of their own.
            owned = isinstance(grads, PassGradients) and grads.owned and at_w is None and not shown
            index, g = _gather(grads, index)
            del grads
            if not index:
                return None
        c = moved if index is inputs.moved else EngineContext(inputs, index)
        d = g
        if direction.turns:
            d, new = direction(g, read(direction, index), c)
            stage(direction, index, new)
        if d is None:
            return None
        inputs.start = []
        factors: Tensors | list[float] | None = None
        if mask.weighs:
            factors, new = mask(d, read(mask, index), c)
            stage(mask, index, new)
            if factors is not None and mask.norm == "inside":
                d = list(torch._foreach_mul(d, factors))
        t, norm = recipe.geometry(d, c) if recipe.geometry.scales else (d, c.norm(d))
        if factors is not None and mask.norm == "full":
            t = list(torch._foreach_mul(t, factors))
        size = c.norm(t) if norm is None else norm
        if out.size is None:
            out.size = size
        reach: list[Any] = _pick(inputs.rhos, index)
        if recipe.radius.scales:
            reach = _scaled(reach, recipe.radius(c))
        if (factor := recipe.direction_factor) != 1.0:
            reach = [factor * r for r in reach]
        # Staged state may consist of these tensors.
        owned = owned and not out.staged and len(t) == len(g or ()) and all(map(operator.is_, t, g or ()))
        return Perturbation(index, t, norm, size, reach, eps, owned, shown)

    def ascend(
        at: Perturbation | None = None, chunk: int | None = None
    ) -> Generator[GradientRequest, Gradients, Perturbation | None]:
        request = asked(at, chunk)
        return climbed(None if request is None else (yield request))

    on: bool | None = bool(inputs.moved)
    if on and schedule.conditional:
        on = schedule.before(read(schedule, scheduled), EngineContext(inputs, scheduled))
    if on is None:
        pass_1 = yield GradientRequest("ascent", graph=may_keep_graph and wants_graph())
        index, g = _gather(pass_1, scheduled)
        on, new = schedule.after(g, read(schedule, index), EngineContext(inputs, index)) if index else (False, {})
        stage(schedule, index, new)
        del g
        if on and combine.uses_gradient:
            at_w = pass_1
    if not on:
        if pass_1 is not None:
            grads: Gradients = pass_1
        else:
            grads = (yield from inner_loop.plain(moved)) if inner_loop.loops else (yield GradientRequest("descent"))
        if not combine.off_step:
            out.update = grads
            return out
        index, g = _gather(grads, range(len(inputs.weights)))
        u, new = combine.off(g, read(combine, index), EngineContext(inputs, index))
        stage(combine, index, new)
        out.update = _spread(grads, index, u)
        return out

    points: list[Gradients]
    if not (inner_loop.loops or combine.keeps_graph):
        # As `ascend`, but torch.compile sends nothing into a generator inside a generator.
        first = asked()
        points = [(yield GradientRequest("descent", climbed(None if first is None else (yield first))))]
    else:
        loop = inner_loop(ascend, read(inner_loop, inputs.moved), moved)
        try:
            request = next(loop)
            while True:
                if combine.keeps_graph and request.role == "descent":
                    request.graph = combine.graph(read(combine, inputs.moved), moved)
                request = loop.send((yield request))
        except StopIteration as stop:
            points, new = stop.value
            stage(inner_loop, inputs.moved, new)
    last = points[-1]
    if direction.observes:
        index, seen = _gather(last, inputs.moved)
        out.staged["direction"] = (index, direction.observe(seen, read(direction, index), EngineContext(inputs, index)))
    index = _in_all(points if at_w is None else [at_w, *points]) if combine.mixes else []
    if not index:
        out.update = last
        return out
    plain = None if at_w is None else _gather(at_w, index)[1]
    gs = [_gather(p, index)[1] for p in points]
    c = EngineContext(inputs, index)
    u, new = combine(plain, gs, read(combine, index), c)
    stage(combine, index, new)
    if new and plain is not None:
        # `size` covers the perturbed weights; for the others, g need not have entered u.
        ascended = set(inputs.moved)
        stayed = [(i, g) for i, g in zip(index, plain, strict=True) if i not in ascended]
        if stayed:
            out.remembered = EngineContext(inputs, [i for i, _ in stayed]).norm([g for _, g in stayed])
    post = combine.post(plain, gs, c) if combine.post_step else None
    out.post = None if post is None else (index, post)
    out.update = _spread(last, index, u)
    return out


def _scaled(rhos: list[Any], radius: float | Tensor | list[float]) -> list[Any]:
    """Each tensor's rho times the radius factor; equal products are the same object."""
    if isinstance(radius, list):
        return [rho * factor for rho, factor in zip(rhos, radius, strict=True)]
    if not isinstance(radius, Tensor) and radius == 1.0:
        return rhos
    products = {rho: rho * radius for rho in set(rhos)}
    return [products[rho] for rho in rhos]


def _spread(last: Gradients, index: Sequence[int], u: Tensors) -> Gradients:
    """The tensors u at the positions `index`; elsewhere the last pass's gradients, or None."""
    update = list(last)
    for i, x in zip(index, u, strict=True):
        update[i] = x
    return update
