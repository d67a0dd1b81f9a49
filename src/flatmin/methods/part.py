"""What a part is: a frozen set of parameters and a pure function on lists of tensors.

A step at weights w is one program made of nine parts:

    g   = gradient of the objective's ascent loss          pass 1
    d   = direction(g)
    eps = rho * radius * geometry(mask(d))
    g_s = gradient of the descent loss at w + eps          pass 2, on the chosen samples
    u   = combine(g, g_s)                                  handed to the base optimizer

Parts see tensors through a `Context`, never a model, a closure or an optimizer. They return new state and change
nothing in place; the engine decides what is kept.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import math
import numbers
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

Tensors = list[Tensor]
Gradients = list[Tensor | None]
# One list per tensor slot (None: never filled for that tensor), one tensor per scalar slot.
State = Mapping[str, Any]
NewState = dict[str, Any]

KINDS = ("objective", "direction", "geometry", "mask", "radius", "when", "points", "samples", "combine")
RESERVED = frozenset(
    {*KINDS, "rho", "base", "closure", "lr", "model", "criterion", "recipe", "eps", "nonfinite", "seed"}
)


class Need(enum.Enum):
    """What a part asks of the loop, the engine or its fellow parts. The value completes "needs ..."."""

    GRADIENT_AT_W = "the descent loss's own gradient at w"
    LOSSES_AT_W = "the losses at w of the samples that are descended on"
    STAYS = "a step that stays at w"
    ONE_ASCENT = "one ascent a step"
    PASS_1 = "a gradient in pass 1"
    FREE_START = "a pass 1 whose start it can move"
    WHOLE_BATCH = "one gradient of the whole batch in pass 1"
    ASCENT = "an ascent on every step"
    RULE = "a step that is more than the base's"
    CRITERION = "the loss object (pass criterion=flatmin.Criterion(loss))"
    NAMES = "parameter names (pass model=, or build the base from named_parameters())"
    LAYERS = "the kinds of layers (pass model=)"
    RANDOM = "random draws"
    PER_SAMPLE = "per-sample losses (pass criterion=flatmin.Criterion(loss))"
    MICRO_BATCHES = "micro-batches (step([closure, closure, ...]) or passes(chunks=m))"
    GLOBAL_ORDER = "the order of all entries (not on sharded weights)"
    SECOND_ORDER = "the graph of a pass (call optimizer.backward(loss) instead of loss.backward())"
    LR = "the learning rate of the param groups"
    BASE_MOMENTUM = "the base optimizer's momentum"
    DECIDES_BY_VALUE = "a decision by value (one synchronisation a step, no CUDA graph)"


# What a recipe settles between its own parts, and no loop has to serve.
INTERNAL = frozenset(
    {
        Need.GRADIENT_AT_W,
        Need.LOSSES_AT_W,
        Need.STAYS,
        Need.ONE_ASCENT,
        Need.PASS_1,
        Need.FREE_START,
        Need.WHOLE_BATCH,
        Need.ASCENT,
        Need.RULE,
        Need.LR,
    }
)


@dataclass(slots=True)
class Offset:
    """A displacement from w over some of the moved tensors: factors_i * direction_i / (norm + eps).

    `norm` None means unnormalised; `size` is the norm whose finiteness decides whether the weights move at all.
    `factors` holds each tensor's rho times the radius. An `Eval` consumes its offset: the engine frees it once the
    weights have moved, so a part that needs it later keeps its own copy through `tensors()`.
    """

    index: Sequence[int]
    direction: Tensors
    norm: Tensor | None
    size: Tensor
    factors: list[float | Tensor]
    eps: float
    scratch: bool = False  # whether the direction's tensors may be overwritten

    def tensors(self) -> Tensors:
        """The displacement itself, in fresh tensors; zero everywhere if the direction was not finite."""
        numbers = [f for f in self.factors if isinstance(f, float)]
        if len(numbers) == len(self.factors):
            scaled = list(torch._foreach_mul(self.direction, numbers))
        else:
            scaled = [d * f for d, f in zip(self.direction, self.factors, strict=True)]
        if self.norm is not None:
            scaled = [s / (self.norm + self.eps).to(s.device) for s in scaled]
        finite = self.size < math.inf
        return [s.where(finite.to(s.device), s.new_zeros(())) for s in scaled]

    @classmethod
    def of(cls, index: Sequence[int], tensors: Tensors, c: Context) -> Offset:
        """A displacement given as tensors, to be used as it is; `index` in any order."""
        order = sorted(range(len(index)), key=index.__getitem__)
        index, tensors = [index[i] for i in order], [tensors[i] for i in order]
        return cls(index, tensors, None, c.norm(tensors), [1.0] * len(tensors), 0.0)

    def clear(self) -> None:
        """Drop the tensors, so that nothing is held through the next pass."""
        self.direction, self.factors = [], []


@dataclass(slots=True)
class Eval:
    """A request for one gradient.

    Args:
        role: which loss.
        at: where; None: at w.
        chunk: on which micro-batch; None: the whole batch.
        graph: whether `Context.curvature` shall work while the program looks at this gradient.
    """

    role: Literal["ascent", "descent"]
    at: Offset | None = None
    chunk: int | None = None
    graph: bool = False


class Ascend(Protocol):
    """Takes one ascent: pass 1 where the direction wants it, then direction, mask, geometry and radius."""

    def __call__(self, at: Offset | None = None, chunk: int | None = None) -> Generator[Eval, Gradients, Offset | None]:
        """The offset of an ascent whose gradient is taken at `at` (None: where the direction starts, normally w).

        None means that no weight moves.
        """


class Products(Protocol):
    """Second-order products of the batch of the last pass; lists run over the context's tensors."""

    def hessian(self, vectors: Tensors) -> Tensors:
        """H v for the Hessian H of the pass's loss."""

    def gauss_newton(self, vectors: Tensors) -> Tensors:
        """J^T H_out J v, with J the Jacobian of the outputs and H_out the loss's Hessian in them."""

    def squared_gradients(self, limit: int) -> Tensors:
        """Sum over the first `limit` samples of the batch of their squared gradients, one backward each.

        Samples of which the loss counts nothing come last. An empty batch gives an empty list.
        """


class Context(Protocol):
    """What a part may see. Lists run over the tensors that the call is about."""

    @property
    def w(self) -> Tensors:
        """The tensors at the step's own point."""

    @property
    def names(self) -> Sequence[str]:
        """Their names; only for parts that declare Need.NAMES."""

    @property
    def layers(self) -> Sequence[str]:
        """The class name of the module that holds each; only for parts that declare Need.LAYERS."""

    @property
    def start(self) -> Tensors:
        """Where pass 1 was taken, as a displacement from w; only for directions that move the start."""

    @property
    def momentum(self) -> list[Tensor | None]:
        """The base's momentum of each, None where it has none yet; only for parts that declare BASE_MOMENTUM."""

    @property
    def curvature(self) -> Products | None:
        """Products with second derivatives at the last pass, if it was asked for with a graph."""

    @property
    def chunks(self) -> int:
        """Number of micro-batches of this step; 1 if the loop gave none."""

    @property
    def options(self) -> Sequence[Mapping[str, Any]]:
        """The param group of each tensor (lr, ...)."""

    @property
    def rhos(self) -> Sequence[float]:
        """The radius of each tensor's group."""

    @property
    def step(self) -> int:
        """Number of updates begun and finished before this one."""

    def norm(self, tensors: Tensors) -> Tensor:
        """Global L2 norm, one scalar in fp32 or better, over all devices and shards."""

    def dot(self, a: Tensors, b: Tensors) -> Tensor:
        """Global inner product, one scalar in fp32 or better."""

    def add_scaled(self, a: Tensors, b: Tensors, factor: Tensor, *, spent: bool = False) -> Tensors:
        """A + factor b for a scalar tensor, in the dtype of a; `spent`: nobody needs a afterwards."""

    def share(self, a: Tensors, along: Tensors) -> Tensor:
        """K = <a, along> / ||along||^2, so that k along is the projection of a; 0 for a zero vector."""

    def reject(self, a: Tensors, along: Tensors) -> tuple[Sequence[Tensor], Tensor]:
        """A minus its projection on `along`, as new tensors, and the norm of that."""

    def copied(self, tensors: Tensors) -> Sequence[Tensor]:
        """The same values in memory of their own, as state that is to outlive the step's gradients."""

    def noise(self) -> Tensors:
        """Standard normal numbers, shaped like w, from the engine's own generator."""

    def bernoulli(self, p: float) -> Tensors:
        """0/1 draws with mean p, shaped like w, from the engine's own generator."""

    def uniform(self) -> Tensors:
        """Draws from [0, 1), shaped like w, from the engine's own generator."""

    def draws(self, count: int) -> list[float]:
        """Numbers from [0, 1), from the engine's own generator."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Base of all parts. Fields are parameters; class variables are what the part declares.

    kind: which question of the recipe it answers.
    slots: name -> "param" (a tensor per weight) or "scalar" (one tensor): what it remembers between steps.
    needs: what it asks for. withholds: what it takes away from its fellow parts, with the reason.
    counts: whether what it does depends on the number of the update.
    """

    kind: ClassVar[str] = ""
    slots: ClassVar[Mapping[str, Literal["param", "scalar"]]] = {}
    needs: ClassVar[frozenset[Need]] = frozenset()
    withholds: ClassVar[Mapping[Need, str]] = {}
    counts: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        clash = RESERVED & set(inspect.get_annotations(cls))
        clash -= {"kind", "slots", "needs", "withholds"}
        if clash:
            raise TypeError(
                f"{cls.__name__}: a parameter must not be named {sorted(clash)[0]!r}, the name is reserved."
            )

    def demands(self) -> frozenset[Need]:
        """The needs of this very instance; override where they depend on parameters."""
        return self.needs

    @property
    def surcharge(self) -> float:
        """Work beyond the passes that a step costs on average, in gradient evaluations."""
        return 0.0

    def examine(self) -> None:
        """Raise ValueError if a parameter that has no default is missing; asked when an optimizer is built."""

    def parameters(self) -> dict[str, Any]:
        """The parameters by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __str__(self) -> str:
        inner = ", ".join(f"{k}={v!r}" for k, v in self.parameters().items())
        return f"{type(self).__name__}({inner})"


def learning_rate(group: Mapping[str, Any], owner: Part) -> float:
    """The learning rate of a param group; ValueError if the base keeps none there."""
    rate = group.get("lr")
    if not isinstance(rate, (numbers.Real, Tensor)):
        raise ValueError(
            f"{type(owner).__name__} needs {Need.LR.value}, and a group has lr={rate!r}: give the base optimizer a "
            "number as its learning rate, or choose a method that does not read group['lr']."
        )
    return float(rate)


def _plain_number(owner: Part, name: str) -> Any:
    """The parameter; numbers of other libraries, such as numpy's, are turned into Python's."""
    value = getattr(owner, name)
    if isinstance(value, numbers.Real) and not isinstance(value, (bool, int, float)):
        value = int(value) if isinstance(value, numbers.Integral) else float(value)
        object.__setattr__(owner, name, value)
    return value


def check_range(owner: Part, name: str, low: float, high: float, *, open_low: bool = False) -> None:
    """Raise ValueError unless low <= parameter <= high (low < with open_low) and it is a number."""
    value = _plain_number(owner, name)
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value > high or value < low or (open_low and value == low):
        left = "(" if open_low else "["
        right = "inf)" if math.isinf(high) else f"{high:g}]"
        raise ValueError(f"{type(owner).__name__}: {name} must be in {left}{low:g}, {right}, got {value!r}.")


def check_count(owner: Part, name: str, low: int) -> None:
    """Raise ValueError unless the parameter is a whole number >= low."""
    value = _plain_number(owner, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{type(owner).__name__}: {name} must be a whole number >= {low}, got {value!r}.")


def check_choice(owner: Part, name: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless the parameter is one of these words."""
    value = getattr(owner, name)
    if value not in choices:
        listed = ", ".join(map(repr, choices[:-1])) + f" or {choices[-1]!r}"
        raise ValueError(f"{type(owner).__name__}: {name} must be {listed}, got {value!r}.")


@dataclass(frozen=True, kw_only=True)
class Objective(Part):
    """Which loss is climbed?

    by_class: whether the ascent loss is one of class logits and class indices; `ascent` then gets the arguments of the
    wrapped loss by which targets count, as the keywords `weight`, `ignore_index` and `reduction`.
    """

    kind: ClassVar[str] = "objective"
    by_class: ClassVar[bool] = False

    def ascent(self, outputs: Tensor, target: Tensor) -> Tensor | None:
        """The ascent loss of a batch, or None for the descent loss itself."""
        return None


@dataclass(frozen=True, kw_only=True)
class Direction(Part):
    """Along what?"""

    kind: ClassVar[str] = "direction"
    evaluates: ClassVar[bool] = True  # False: takes no pass 1, is called with g = None
    moves_start: ClassVar[bool] = False  # True: pass 1 is taken at w + start()

    def factor(self) -> float:
        """A factor on the displacement along d; -1 goes against it."""
        return 1.0

    def start(self, state: State, c: Context) -> Tensors:
        """Where pass 1 is taken, as a displacement from w."""
        raise AttributeError(f"{type(self).__name__} declares moves_start and defines no start().")

    def __call__(self, g: Tensors | None, state: State, c: Context) -> tuple[Tensors | None, NewState]:
        """The direction d (None: stay at w this time) and the new state."""
        raise AttributeError(f"{type(self).__name__} defines no __call__().")

    def observe(self, gs: Tensors, state: State, c: Context) -> NewState:
        """New state from the descent gradient, for directions that learn from it."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Geometry(Part):
    """In which norm?"""

    kind: ClassVar[str] = "geometry"
    default_rho: ClassVar[float] = 0.05

    def __call__(self, d: Tensors, c: Context) -> tuple[Tensors, Tensor | None]:
        """T(T d) and ||T d||; None for no normalisation. May return d itself."""
        raise AttributeError(f"{type(self).__name__} defines no __call__().")


@dataclass(frozen=True, kw_only=True)
class Mask(Part):
    """Which weights move?

    norm: "inside" if the mask acts before the norm is taken, so that the masked displacement has length rho; "full" if
    it acts after.
    """

    kind: ClassVar[str] = "mask"
    norm: ClassVar[Literal["inside", "full"]] = "inside"

    def select(self, c: Context) -> Sequence[bool] | None:
        """Which tensors can move at all (None: every one); the others cost nothing.

        Asked at construction too, so that a selection of nothing is refused there by raising ValueError.
        """
        return None

    def graph(self, state: State, c: Context) -> bool:
        """Whether pass 1 shall keep its graph, so that `Context.curvature` works in this step's call."""
        return False

    def __call__(self, d: Tensors, state: State, c: Context) -> tuple[Tensors | list[float] | None, NewState]:
        """Factors per element or per tensor (None: all ones) and the new state."""
        return None, {}


@dataclass(frozen=True, kw_only=True)
class Radius(Part):
    """How far? A factor on each group's rho.

    marks: keys, beginning with "flatmin.radius.", that the rule keeps in each param group, with their first values.
    They travel in checkpoints as `lr` does.
    """

    kind: ClassVar[str] = "radius"
    marks: ClassVar[Mapping[str, float]] = {}

    def __call__(self, c: Context) -> float | Tensor | list[float]:
        """One factor for all, or one per tensor."""
        return 1.0

    def remember(self, group: Mapping[str, Any]) -> Mapping[str, float]:
        """The new values of `marks` at the end of an update, with or without ascent; for rules that have any."""
        return {}


@dataclass(frozen=True, kw_only=True)
class When(Part):
    """On which steps?"""

    kind: ClassVar[str] = "when"

    @property
    def duty(self) -> float:
        """Share of the steps that ascend, on average."""
        return 1.0

    @property
    def looks(self) -> bool:
        """Whether it decides by the gradient at w, so that a step off costs what it costs on the base."""
        return type(self).after is not When.after

    def meets(self, interval: int) -> bool:
        """Whether a step that ascends can be a multiple of `interval`, on which a fellow part does its own work."""
        return True

    def before(self, state: State, c: Context) -> bool | None:
        """Whether to ascend, known before any gradient; None: ask `after` pass 1."""
        return True

    def after(self, g: Tensors, state: State, c: Context) -> tuple[bool, NewState]:
        """Whether to ascend, given the gradient at w."""
        return True, {}


@dataclass(frozen=True, kw_only=True)
class Points(Part):
    """How many ascents?

    pooled: what is returned is not the last evaluation's own gradients but made of several.
    copies: of the moved weights that it holds during the last pass.
    leaves: whether the weights leave w at all.
    plain_chunk: the micro-batch of a step without ascent; None: all of them.
    """

    kind: ClassVar[str] = "points"
    pooled: ClassVar[bool] = False
    copies: ClassVar[int] = 0
    leaves: ClassVar[bool] = True
    plain_chunk: ClassVar[int | None] = None

    def evaluations(self, ascent: int) -> float:
        """Gradients a step, if one ascent costs `ascent`."""
        return ascent + 1

    def __call__(self, ascend: Ascend, c: Context) -> Generator[Eval, Gradients, list[Gradients]]:
        """Ask for evaluations; return the descent gradients."""
        raise AttributeError(f"{type(self).__name__} defines no __call__().")


@dataclass(frozen=True, kw_only=True)
class Samples(Part):
    """Which samples of the batch are descended on?"""

    kind: ClassVar[str] = "samples"

    def __call__(self, first: Tensor, second: Tensor) -> Tensor | None:
        """Positions of the samples, from each one's loss at w and at w + eps; None: all.

        A sample of which the loss counts nothing has the loss -inf in `second`.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class Combine(Part):
    """What goes to the base optimizer? Runs over every trained tensor that has a gradient in all passes."""

    kind: ClassVar[str] = "combine"
    uses_gradient: ClassVar[bool] = False  # True: g is kept through pass 2 (one more copy)
    rho_zero_is_base: ClassVar[bool] = True
    ascends: ClassVar[bool] = True  # False: works where the weights never leave w

    def graph(self, state: State, c: Context) -> bool:
        """Whether the descent pass shall keep its graph, so that `Context.curvature` works in this step's call."""
        return False

    def __call__(self, g: Tensors | None, gs: list[Tensors], state: State, c: Context) -> tuple[Tensors, NewState]:
        """The update's gradient u from g (at w, or None) and the descent gradients, one list per point."""
        raise AttributeError(f"{type(self).__name__} defines no __call__().")

    def off(self, g: Tensors, state: State, c: Context) -> tuple[Tensors, NewState]:
        """U on a step without ascent; g is the descent gradient at w, and may be given to `add_scaled` as spent."""
        return g, {}

    def post(self, g: Tensors | None, gs: list[Tensors], c: Context) -> Tensors | None:
        """Added to w after the base's step, for decoupled terms."""
        return None
