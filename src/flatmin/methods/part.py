"""What a part is: a frozen set of parameters, and what it declares to the engine and to its fellow parts.

A step at weights w is one program made of nine parts, one for each question:

    g   = gradient of the objective's ascent loss          pass 1
    d   = direction(g)
    eps = rho * radius * geometry(mask(d))
    g_s = gradient of the descent loss at w + eps          pass 2, on the chosen samples
    u   = combine(g, g_s)                                  handed to the base optimizer

The base class of a question, with the contract of its methods, stands at the top of that question's file. Parts see
tensors through a `StepContext`, never a model, a closure or an optimizer. They return new state and change nothing in
place; the engine decides what is kept.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

__all__ = [
    "FORMER_KINDS",
    "INTERNAL",
    "KINDS",
    "Need",
    "Part",
    "check_choice",
    "check_count",
    "check_range",
    "current_word",
    "former_word",
    "learning_rate",
]

KINDS = ("objective", "direction", "geometry", "mask", "radius", "schedule", "inner_loop", "samples", "combine")
# What two kinds were called before: settings, run folders and checkpoints may still say so.
FORMER_KINDS = {"when": "schedule", "points": "inner_loop"}
_FORMER_OF = {present: former for former, present in FORMER_KINDS.items()}
RESERVED = frozenset(
    {*KINDS, *FORMER_KINDS, "rho", "base", "closure", "lr", "model", "criterion", "recipe", "eps", "nonfinite", "seed"}
)


def current_word(key: str) -> str:
    """A kind, or a parameter qualified by its kind, with the kind's present name.

    Example:
        >>> current_word("when.k"), current_word("points"), current_word("direction.theta")
        ('schedule.k', 'inner_loop', 'direction.theta')
    """
    kind, dot, rest = key.partition(".")
    return f"{FORMER_KINDS.get(kind, kind)}{dot}{rest}"


def former_word(key: str) -> str:
    """The same with the kind's former name, by which stored runs are found."""
    kind, dot, rest = key.partition(".")
    return f"{_FORMER_OF.get(kind, kind)}{dot}{rest}"


class Need(enum.Enum):
    """What a part asks of the loop, the engine or its fellow parts. The value completes "needs ..."."""

    GRADIENT_AT_W = "the descent loss's own gradient at w"
    LOSSES_AT_W = "the losses at w of the samples that are descended on"
    STAYS = "a step that stays at w"
    OWN_LOSS = "the descent loss's own gradient in pass 1"
    DESCENT_LOSS = "the loss's own gradient in pass 2"
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
    SGD = "torch.optim.SGD as its base"
    BARE_SGD = "torch.optim.SGD without momentum and weight decay as its base"
    DECIDES_BY_VALUE = "a decision by value (one synchronisation a step, no CUDA graph)"

    @property
    def word(self) -> str:
        """What tables call it."""
        return self.name.lower().replace("_", " ")


# What a recipe settles between its own parts, and no loop has to serve.
INTERNAL = frozenset(
    {
        Need.GRADIENT_AT_W,
        Need.LOSSES_AT_W,
        Need.OWN_LOSS,
        Need.DESCENT_LOSS,
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


@dataclass(frozen=True, kw_only=True)
class Part:
    """Base of all parts. Fields are parameters; class variables are what the part declares.

    The engine acts on these declarations alone and never asks for a part's class, so that a part of your own is served
    like a built-in one. A declaration that says whether a method is there, such as `Combine.off_step` of `off`, is made
    for you when the class is created: it is true where the class or one of its bases defines the method. A class may
    still set it itself.

    Attributes:
        kind: which question of the recipe it answers.
        question: the question.
        declared_by: name of such a declaration -> the method, or several, that make it true.
        slots: name -> "param" (a tensor per weight) or "scalar" (one tensor): what it remembers between steps.
        reads: name -> "kind.slot": what it sees of a fellow part's memory, as the last step left it, in its state.
        default_rho: the radius of recipes with this part that are given none. Default None: it states none. The
            geometry's takes precedence, then that of any other part, then SAM's 0.05.
        needs: what it asks for.
        conflicts: what it takes away from its fellow parts, with the reason.
        step_dependent: whether what it does depends on the number of the update. Default False.
        ascends: whether it takes part in an ascent, so that it has no place in a recipe that never ascends. Default
            True. Of a schedule: whether any step ascends. Of an inner loop: whether the weights leave w.
        former_names: what checkpoints of earlier versions call its class.

    Raises:
        TypeError: at the creation of a class, for a parameter named like a kind or an option of the optimizer.
    """

    kind: ClassVar[str] = ""
    question: ClassVar[str] = ""
    declared_by: ClassVar[Mapping[str, str | tuple[str, ...]]] = {}
    slots: ClassVar[Mapping[str, Literal["param", "scalar"]]] = {}
    reads: ClassVar[Mapping[str, str]] = {}
    default_rho: ClassVar[float | None] = None
    needs: ClassVar[frozenset[Need]] = frozenset()
    conflicts: ClassVar[Mapping[Need, str]] = {}
    step_dependent: ClassVar[bool] = False
    ascends: ClassVar[bool] = True
    former_names: ClassVar[tuple[str, ...]] = ()
    _declared: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if clash := RESERVED & set(inspect.get_annotations(cls)):
            raise TypeError(
                f"{cls.__name__}: a parameter must not be named {sorted(clash)[0]!r}, the name is reserved."
            )
        cls._declared = frozenset(cls.declared_by) & vars(cls).keys()
        for declaration, methods in cls.declared_by.items():
            if declaration not in cls._declared:
                names = {methods} if isinstance(methods, str) else set(methods)
                setattr(cls, declaration, _declares(cls, declaration, names))

    def demands(self) -> frozenset[Need]:
        """The needs of this very instance; override where they depend on parameters."""
        return self.needs

    @property
    def implied(self) -> frozenset[Need]:
        """Needs that follow from other declarations."""
        return frozenset({Need.WHOLE_BATCH}) if self.slots else frozenset()

    def conflict(self, need: Need) -> str | None:
        """Why a fellow part cannot have what it needs from this one; None: it can."""
        return self.conflicts.get(need)

    def initial(self, slot: str) -> float | None:
        """What every entry of a tensor slot holds before anything is remembered there; None: the slot is None then."""
        return None

    @property
    def surcharge(self) -> float:
        """Work beyond the passes that a step costs on average, in gradient evaluations."""
        return 0.0

    def validate(self) -> None:
        """Raise ValueError if a parameter that has no default is missing; called when an optimizer is built."""

    def parameters(self) -> dict[str, Any]:
        """The parameters by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __str__(self) -> str:
        inner = ", ".join(f"{k}={v!r}" for k, v in self.parameters().items())
        return f"{type(self).__name__}({inner})"


def _declares(cls: type, declaration: str, methods: set[str]) -> bool:
    """What the nearest class says that declares it itself or defines one of these methods.

    The base class of a question, which says which methods declare what, defines them without declaring anything.
    """
    for one in cls.__mro__:
        if "declared_by" in vars(one):
            return False
        if declaration in vars(one).get("_declared", ()):
            return bool(vars(one)[declaration])
        if methods & vars(one).keys():
            return True
    return False


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


def check_range(
    owner: Part, name: str, low: float, high: float, *, open_low: bool = False, open_high: bool = False
) -> None:
    """Raise ValueError unless low <= parameter <= high (< where that end is open) and it is a number."""
    value = _plain_number(owner, name)
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value > high or value < low or (open_low and value == low) or (open_high and value == high):
        left = "(" if open_low else "["
        right = "inf)" if math.isinf(high) else f"{high:g}" + (")" if open_high else "]")
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
