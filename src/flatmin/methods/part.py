"""The base class of all parts: frozen parameters, and declarations for the engine and the other parts of a recipe.

A recipe has nine parts, one for each question about a step. A step at the weights w computes

    g   = gradient of the ascent loss at w                 pass 1; `objective` chooses the loss
    d   = direction(g)
    eps = rho * radius * geometry(mask(d))                 the perturbation
    g_s = gradient of the descent loss at w + eps          pass 2, on the samples that `samples` chooses
    u   = combine(g, g_s)                                  the gradient that the base optimizer takes

`schedule` decides on which steps the weights are perturbed, `inner_loop` how often and on which batches.

The base class of each question is at the top of the question's file and documents the methods to implement. Parts see
tensors through a `StepContext`, never a model, a closure or an optimizer. They change nothing in place: they return
new state, and the engine stores it if the step is taken.
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
# Earlier names of two kinds, which settings, run folders and checkpoints may still contain.
FORMER_KINDS = {"when": "schedule", "points": "inner_loop"}
_FORMER_OF = {present: former for former, present in FORMER_KINDS.items()}
RESERVED = frozenset(
    {*KINDS, *FORMER_KINDS, "rho", "base", "closure", "lr", "model", "criterion", "recipe", "eps", "nonfinite", "seed"}
)


def current_word(key: str) -> str:
    """A kind, or a parameter qualified by its kind, with the kind's current name.

    Examples:
        >>> current_word("when.k"), current_word("points"), current_word("direction.theta")
        ('schedule.k', 'inner_loop', 'direction.theta')
    """
    kind, dot, rest = key.partition(".")
    return f"{FORMER_KINDS.get(kind, kind)}{dot}{rest}"


def former_word(key: str) -> str:
    """The same with the kind's earlier name, which stored runs and checkpoints use."""
    kind, dot, rest = key.partition(".")
    return f"{_FORMER_OF.get(kind, kind)}{dot}{rest}"


class Need(enum.Enum):
    """What a part needs from the training loop, the engine or the other parts. The value completes "needs ..."."""

    GRADIENT_AT_W = "the gradient of the training loss at w"
    LOSSES_AT_W = "the losses at w of the samples of pass 2"
    STAYS = "a step that does not perturb the weights"
    OWN_LOSS = "the gradient of the training loss in pass 1"
    DESCENT_LOSS = "the gradient of the training loss in pass 2"
    ONE_ASCENT = "one ascent in each step"
    PASS_1 = "a gradient in pass 1"
    FREE_START = "a pass 1 at weights that it chooses"
    WHOLE_BATCH = "one gradient of the whole batch in pass 1"
    ASCENT = "an ascent in every step"
    RULE = "a step other than the base optimizer's own"
    CRITERION = "the loss (pass criterion=flatmin.Criterion(loss))"
    NAMES = "parameter names (pass model=, or build the base from named_parameters())"
    LAYERS = "the types of the layers (pass model=)"
    RANDOM = "random numbers"
    PER_SAMPLE = "per-sample losses (pass criterion=flatmin.Criterion(loss))"
    MICRO_BATCHES = "micro-batches (step([closure, closure, ...]) or passes(chunks=m))"
    GLOBAL_ORDER = "a ranking of all entries (not available for sharded weights)"
    SECOND_ORDER = "the graph of a pass (call optimizer.backward(loss) instead of loss.backward())"
    LR = "the learning rate of the param groups"
    BASE_MOMENTUM = "the base optimizer's momentum"
    SGD = "torch.optim.SGD as its base"
    BARE_SGD = "torch.optim.SGD without momentum and weight decay as its base"
    DECIDES_BY_VALUE = "a value on the host (one synchronisation a step, no CUDA graph)"

    @property
    def word(self) -> str:
        """Its short name in tables, such as "second order"."""
        return self.name.lower().replace("_", " ")


# Needs that the parts of a recipe must meet for each other. The training loop has nothing to do for them.
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
    """Base class of all parts. Its fields are parameters; its class variables are declarations.

    The engine reads only these declarations and never tests for a part's class, so a part of your own works like a
    built-in one. Declarations that say whether an optional method exists (`Combine.off_step` for the method `off`) are
    set when the class is created: True if the class or one of its bases defines the method. A class may also set them
    itself.

    Attributes:
        kind: which question of the recipe the part answers, such as "direction".
        question: the question in words.
        declared_by: declaration -> the method, or the methods, whose definition makes it True.
        slots: what the part remembers between steps: name -> "param" (one tensor for each weight) or "scalar" (one
            tensor). Default {}.
        reads: what the part reads of another part's memory: name in `state` -> "kind.slot". The values are those that
            the last step left. Default {}.
        default_rho: the radius of recipes with this part if none is given. Default None: no value. The geometry's value
            takes precedence, then that of any other part, then SAM's 0.05.
        needs: what the part needs. Default: nothing.
        conflicts: which needs of other parts it makes impossible, with the reason. Default {}.
        step_dependent: whether it depends on the number of the update. Default False.
        entrywise: whether it treats all entries alike, whichever tensor they are in: entry by entry, or through norms
            and inner products over all tensors. With `SAM(flat=True)` it then gets few large tensors, in which weights
            lie one after the other, with zeros between them. A class does not inherit it: state it in every class.
            Parts that never see tensors (objective, samples) need not. Default False.
        ascends: whether it acts on the ascent, so that it makes no sense in a recipe that never ascends. Default True.
            For a schedule: whether any step ascends. For an inner loop: whether the weights are perturbed.
        former_names: the names of its class in checkpoints of earlier versions. Default ().

    Raises:
        TypeError: when the class is created, if a parameter has the name of a kind or of an option of the optimizer.
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
    entrywise: ClassVar[bool] = False
    ascends: ClassVar[bool] = True
    former_names: ClassVar[tuple[str, ...]] = ()
    _declared: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if clash := RESERVED & set(inspect.get_annotations(cls)):
            raise TypeError(
                f"{cls.__name__}: a parameter must not be named {sorted(clash)[0]!r}; this name is reserved."
            )
        if "entrywise" not in vars(cls):
            cls.entrywise = False
        cls._declared = frozenset(cls.declared_by) & vars(cls).keys()
        for declaration, methods in cls.declared_by.items():
            if declaration not in cls._declared:
                names = {methods} if isinstance(methods, str) else set(methods)
                setattr(cls, declaration, _declares(cls, declaration, names))

    def demands(self) -> frozenset[Need]:
        """The needs of this instance. Override it where they depend on parameters."""
        return self.needs

    @property
    def implied(self) -> frozenset[Need]:
        """Needs that follow from other declarations."""
        return frozenset({Need.WHOLE_BATCH}) if self.slots else frozenset()

    def conflict(self, need: Need) -> str | None:
        """Why another part with this need cannot be combined with this part; None if it can."""
        return self.conflicts.get(need)

    def initial(self, slot: str) -> float | None:
        """The value of all entries of a "param" slot before its first update; None: the slot itself is None."""
        return None

    @property
    def surcharge(self) -> float:
        """Average cost of a step beyond its passes, in gradient evaluations."""
        return 0.0

    def validate(self) -> None:
        """Raise ValueError if a required parameter is missing. Called when an optimizer is built."""

    def parameters(self) -> dict[str, Any]:
        """The parameters, name -> value."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __str__(self) -> str:
        inner = ", ".join(f"{k}={v!r}" for k, v in self.parameters().items())
        return f"{type(self).__name__}({inner})"


def _declares(cls: type, declaration: str, methods: set[str]) -> bool:
    """The declaration of the nearest class in the method resolution order that sets it or defines one of the methods.

    The search ends at the base class of the question, whose own definitions of the methods do not count.
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
    """The learning rate of a param group; raises ValueError if the group has none."""
    rate = group.get("lr")
    if not isinstance(rate, (numbers.Real, Tensor)):
        raise ValueError(
            f"{type(owner).__name__} needs {Need.LR.value}, but a group has lr={rate!r}: give the base optimizer a "
            "number as learning rate, or choose a method that does not read group['lr']."
        )
    return float(rate)


def _plain_number(owner: Part, name: str) -> Any:
    """The parameter's value. Numbers of other libraries, such as numpy's, are converted to Python's and stored."""
    value = getattr(owner, name)
    if isinstance(value, numbers.Real) and not isinstance(value, (bool, int, float)):
        value = int(value) if isinstance(value, numbers.Integral) else float(value)
        object.__setattr__(owner, name, value)
    return value


def check_range(
    owner: Part, name: str, low: float, high: float, *, open_low: bool = False, open_high: bool = False
) -> None:
    """Raise ValueError unless the parameter is a number with low <= parameter <= high (< at an open end)."""
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
