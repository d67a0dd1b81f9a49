"""Measures how much a batch's loss rises along a method's own ascent, without changing anything."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flatmin.methods import (
    Always,
    ConstantRadius,
    Descent,
    EverySample,
    Gradients,
    Need,
    Never,
    Perturbation,
    Recipe,
    Tensors,
    accumulate,
)
from flatmin.optim import tensors as ta
from flatmin.optim.closures import Closure, as_list
from flatmin.optim.containers import loss_in
from flatmin.optim.criterion import Callback
from flatmin.optim.model_snapshot import ModelSnapshot
from flatmin.optim.other_gradients import reached
from flatmin.optim.random_state import RandomState, generators_of
from flatmin.optim.step import Step
from flatmin.optim.support import processes
from flatmin.optim.tensors import is_sharded
from flatmin.optim.tools import Tools
from flatmin.words import warn

_PLAIN = Recipe(schedule=Never(), name="plain")


@dataclass(frozen=True, kw_only=True)
class Rise:
    """The rise of one batch's loss along a method's ascent, at several radii.

    Args:
        loss: L(w).
        predicted: <grad L(w), eps> at each radius. If micro-batches have their own perturbations, the mean over them.
        measured: L(w + eps) - L(w) at each radius, averaged likewise.
        lengths: the L2 norm of eps at each radius, averaged likewise.
    """

    loss: float
    predicted: tuple[float, ...]
    measured: tuple[float, ...]
    lengths: tuple[float, ...]


@dataclass(frozen=True)
class _Way:
    """A perturbation that the method has made, the loss there, and the micro-batch (None: the whole batch)."""

    chunk: int | None
    index: Sequence[int]
    eps: Tensors
    loss: float


class Ascents:
    """Runs a method's own ascent on a batch at multiples of its radii, without taking a step.

    Each run is an update that is aborted after its loss at w + eps. The schedule, the radius rule, the choice of
    samples and the combination of the gradients are not used, since they do not affect the direction of the ascent.

    Args:
        tools: the optimizer's collaborators.
        owner: the optimizer, which the criterion calls.
        begin: function that begins an update with this number of micro-batches.
        abort: function that aborts the update.
        generators: the user's random generators that the loss draws from.
        model: the model whose state is restored; None: no model is known.
        cleared: whether gradients were cleared after the last loss that the criterion computed.
    """

    def __init__(
        self,
        tools: Tools,
        owner: Callback,
        begin: Callable[[int], Step],
        abort: Callable[[], None],
        generators: Sequence[Any],
        model: nn.Module | None,
        *,
        cleared: bool,
    ) -> None:
        if _holds_first_pass(tools, cleared=cleared):
            raise RuntimeError(
                "rise(): the first loss of an update has been computed already; call rise() before the first loss of "
                "the step or after optimizer.step(), or discard the loss with optimizer.zero_grad()."
            )
        self._tools, self._owner, self._begin, self._abort = tools, owner, begin, abort
        self._recipe = ascent_of(tools.recipe)
        self._check()
        devices = {w.device for w in tools.base.weights}
        self._random = RandomState(devices, [*generators, *(() if model is None else generators_of(model))])
        self._model = None if model is None else ModelSnapshot(model, tools.base.weights)

    def _check(self) -> None:
        tools = self._tools
        if not tools.recipe.moves:
            raise ValueError(f"{tools.recipe.name} never perturbs the weights, so it has no ascent to measure.")
        if not any(tools.weights.rho(group) > 0 for group in tools.base.optimizer.param_groups):
            raise ValueError(
                "every param group has rho = 0, so no weight is perturbed; set a rho above 0, which is the unit of the "
                "multiples."
            )
        if processes() > 1 or any(map(is_sharded, tools.base.weights)):
            raise ValueError("rise() supports only one process, with weights that are not sharded.")

    def rise(self, closure: Closure | Sequence[Closure], multiples: float | Sequence[float]) -> Rise:
        """Measure the rise on one batch.

        Raises:
            ValueError, ArithmeticError, RuntimeError: see `flatmin.SAM.rise`.
        """
        if isinstance(closure, (list, tuple)) and not closure:
            raise ValueError("rise() got an empty list of closures.")
        closures, multiples = as_list(closure), _numbers(multiples)
        if Need.MICRO_BATCHES in self._recipe.needs and len(closures) < 2:
            raise ValueError(f"{self._recipe.name} needs {Need.MICRO_BATCHES.value}; got one closure.")
        with self._unchanged():
            base = self._at_w(closures)
            ways = [self._at(closures, multiple) for multiple in multiples]
        return Rise(
            loss=math.fsum(loss for loss, _ in base) / len(base),
            predicted=tuple(_mean([_predicted(way, base) for way in each]) for each in ways),
            measured=tuple(_mean([way.loss - _of(way, [x for x, _ in base]) for way in each]) for each in ways),
            lengths=tuple(_mean([float(ta.norm(way.eps)) for way in each]) for each in ways),
        )

    def _at_w(self, closures: Sequence[Closure]) -> list[tuple[float, Gradients]]:
        """The loss at w and its gradient, of each closure."""
        tools, found = self._tools, []
        with self._update(_PLAIN, 1.0, len(closures)) as step:
            step.enter(bracketed=True)
            for closure in closures:
                for w in step.weights:
                    w.grad = None
                result = self._run(closure)
                loss = float(result)
                self._find_others(result)
                grads: Gradients = [w.grad for w in step.weights]
                if all(g is None for g in grads):
                    raise RuntimeError(
                        "no weight received a gradient; the closure must compute the loss from the model and call "
                        "loss.backward()."
                    )
                if tools.scaling is not None:
                    tools.scaling.unscale_(grads)
                if not math.isfinite(loss) or not math.isfinite(float(ta.norm([g for g in grads if g is not None]))):
                    raise ArithmeticError(f"the loss at w is {loss}, or its gradient is not finite.")
                found.append((loss, grads))
        if self._model is not None and (name := self._model.written()) is not None:
            raise RuntimeError(
                f"the forward writes to the parameter {name}, which this optimizer does not train. Untrained "
                "parameters are not copied if together they are more than twice as large as the trained ones, so this "
                "one could not be restored. Make it a buffer; buffers are restored."
            )
        return found

    def _find_others(self, result: Any) -> None:
        """Remember parameters outside the optimizer and the model that get their first gradient from this loss."""
        new = [p for p in reached(result) if p not in self._gradients and p.grad is not None]
        if any(p.grad is not None and p.grad._version for p in new):
            warn(
                "the loss depends on parameters that belong neither to the optimizer nor to the model, and their "
                "existing gradients have been changed. Pass every network of the loss as model=, several of them as an "
                "nn.ModuleList."
            )
        self._gradients.update((p, None) for p in new if p.grad is not None and not p.grad._version)

    def _at(self, closures: Sequence[Closure], multiple: float) -> list[_Way]:
        """The perturbations at a multiple of the radii: one, or one for each micro-batch."""
        ways: list[_Way] = []
        with self._update(self._recipe, multiple, len(closures)) as step:
            while (request := step.request) is not None:
                at = request.at if request.role == "descent" else None
                eps = [] if at is None else _displacement(at)
                index = () if at is None else at.index
                new = at is not None and request.chunk not in [way.chunk for way in ways]
                step.enter(bracketed=True)
                which = closures if request.chunk is None else [closures[request.chunk]]
                loss = self._pass(step, which)
                if new:
                    ways.append(_Way(request.chunk, index, eps, loss))
                    if request.share in (0.0, 1.0):  # not one of several micro-batches
                        break
                step.leave()
        if not ways:
            raise ValueError(
                f"{self._recipe.name} did not perturb any weight: it has no memory of the training yet, or its mask "
                "selects no weight in the next step (esam draws them). Take a step first."
            )
        return ways

    def _pass(self, step: Step, closures: Sequence[Closure]) -> float:
        """Run one pass on these micro-batches; leave the mean of their gradients, return the mean of their losses."""
        weights, losses = step.weights, []
        total: Gradients = []
        step.share = 1.0 / len(closures)
        for closure in closures:
            for w in weights:
                w.grad = None
            losses.append(float(self._run(closure)))
            total = accumulate(total, [w.grad for w in weights], step.share)
        for w, g in zip(weights, total, strict=True):
            w.grad = g
        return _mean(losses)

    def _run(self, closure: Closure) -> Tensor | float:
        """The loss of a micro-batch. The model's state is restored before, so that losses can be compared."""
        if self._model is not None:
            self._model.restore()
        with torch.enable_grad():
            loss = loss_in(closure())
        if not isinstance(loss, (Tensor, int, float)) or (isinstance(loss, Tensor) and loss.numel() != 1):
            raise TypeError(
                "each closure must return the loss, or a dict, tuple or object that holds it as 'loss' or as its first "
                f"item; got {type(loss).__name__}."
            )
        return loss

    # -- nothing is changed ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _update(self, recipe: Recipe, multiple: float, chunks: int) -> Iterator[Step]:
        """A context with an update by this recipe that is aborted at the end. All updates start from the same state."""
        tools, key = self._tools, self._tools.base.rho_key
        own, criterion = tools.recipe, tools.criterion
        groups = tools.base.optimizer.param_groups
        rhos = [group[key] for group in groups]
        self._again()
        flat, tools.flat = tools.flat, None  # directions are compared weight by weight
        tools.recipe = recipe
        for group, rho in zip(groups, rhos, strict=True):
            group[key] = float(rho) * multiple
        if criterion is not None:
            criterion.bind(self._owner, recipe)
        try:
            yield self._begin(chunks)
        finally:
            try:
                self._abort()
            finally:
                tools.recipe, tools.flat = own, flat
                for group, rho in zip(groups, rhos, strict=True):
                    group[key] = rho
                if criterion is not None:
                    criterion.bind(self._owner, own)

    def _again(self) -> None:
        """Restore everything besides the weights that a pass may change."""
        self._random.replay()
        self._tools.state.generator.cpu.set_state(self._draws)
        if self._model is not None:
            self._model.restore()

    @contextlib.contextmanager
    def _unchanged(self) -> Iterator[None]:
        """A context that restores gradients, random states, the model's state and the optimizer's diagnostics."""
        tools = self._tools
        model = () if self._model is None else self._model.parameters
        self._gradients = {w: w.grad for w in (*tools.base.weights, *tools.others.in_training(), *model)}
        fresh, diagnostics = tools.weights.new_gradient() is not None, tools.diagnostics
        self._draws = tools.state.generator.cpu.get_state()
        self._random.capture()
        for w in self._gradients:
            w.grad = None
        tools.diagnostics = None
        try:
            yield
        finally:
            tools.diagnostics = diagnostics
            try:
                self._again()
            finally:
                for w, g in self._gradients.items():
                    w.grad = g
                if not fresh:
                    tools.weights.leave_gradients()


def ascent_of(recipe: Recipe) -> Recipe:
    """The recipe reduced to its ascent: objective, direction, geometry, mask and inner loop, on every step, at rho.

    A part whose memory is read by one of these is kept too.
    """
    plain = {"radius": ConstantRadius(), "schedule": Always(), "samples": EverySample(), "combine": Descent()}
    kept = [part for kind, part in recipe.parts.items() if kind not in plain]
    read = {origin.partition(".")[0] for part in kept for origin in part.reads.values()}
    return dataclasses.replace(recipe, **{kind: part for kind, part in plain.items() if kind not in read})  # type: ignore[arg-type]


def _holds_first_pass(tools: Tools, *, cleared: bool) -> bool:
    """Whether a manual loop has computed the first loss of an update but has not perturbed the weights yet.

    Args:
        tools: the optimizer's collaborators.
        cleared: whether gradients were cleared after the last loss that the criterion computed.
    """
    gradients = any(w.grad is not None for w in tools.base.weights)
    if tools.criterion is not None and tools.criterion.calls and (gradients or not cleared):
        return True
    seen = tools.guard is not None and tools.guard.watch.forwards[0] > 0
    return seen and tools.weights.new_gradient() is not None


def _numbers(given: float | Sequence[float]) -> list[float]:
    """The multiples of the radii as a list of numbers.

    Raises:
        ValueError: a multiple is not a number above 0.
    """
    try:
        multiples = [float(m) for m in given] if isinstance(given, Iterable) else [float(given)]
    except (TypeError, ValueError):
        multiples = [math.nan]
    if not all(0 < m < math.inf for m in multiples):
        raise ValueError(f"multiples must be numbers above 0, got {given!r}.")
    return multiples


def _displacement(at: Perturbation) -> Tensors:
    if not math.isfinite(float(at.size)):
        raise ArithmeticError("the direction of the ascent is not finite on this batch.")
    return at.tensors()


def _of(way: _Way, values: Sequence[float]) -> float:
    return _mean(values) if way.chunk is None else values[way.chunk]


def _predicted(way: _Way, base: Sequence[tuple[float, Gradients]]) -> float:
    """The inner product <g, eps>, with the gradient at w of the perturbation's own batch."""
    chosen = base if way.chunk is None else [base[way.chunk]]
    products = []
    for _, grads in chosen:
        both = [(g, e) for i, e in zip(way.index, way.eps, strict=True) if (g := grads[i]) is not None]
        dense = [g.to_dense() if g.is_sparse else g for g, _ in both]
        products.append(float(ta.dot(dense, [e for _, e in both])) if both else 0.0)
    return _mean(products)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
