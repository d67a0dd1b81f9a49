"""Recipes: nine parts that are checked against each other, with the facts that follow from them."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flatmin.methods.combine import Combine, Descent
from flatmin.methods.direction import Direction, Gradient
from flatmin.methods.geometry import L2, Geometry
from flatmin.methods.inner_loop import InnerLoop, OneStep
from flatmin.methods.mask import All, Mask
from flatmin.methods.objective import Objective, SameLoss
from flatmin.methods.part import INTERNAL, KINDS, Need, Part, current_word
from flatmin.methods.radius import ConstantRadius, Radius
from flatmin.methods.samples import EverySample, Samples
from flatmin.methods.schedule import Always, Schedule

__all__ = ["DEFAULTS", "ContradictionError", "Method", "Recipe"]

# The parts of SAM.
DEFAULTS: dict[str, Part] = {
    "objective": SameLoss(),
    "direction": Gradient(),
    "geometry": L2(),
    "mask": All(),
    "radius": ConstantRadius(),
    "schedule": Always(),
    "inner_loop": OneStep(),
    "samples": EverySample(),
    "combine": Descent(),
}
_SEE_NO_TENSORS = frozenset({"objective", "samples"})


class ContradictionError(ValueError):
    """A part needs something that another part of the recipe makes impossible.

    Attributes:
        one: the part with the need.
        other: the part that makes it impossible.
        need: what the first part needs.
        reason: why the other part makes it impossible.
    """

    def __init__(self, one: Part, need: Need, other: Part, reason: str, names: Sequence[str] = ()) -> None:
        self.one, self.need, self.other, self.reason = one, need, other, reason
        head = f"{' and '.join(map(repr, names))} cannot be combined: " if len(names) > 1 else ""
        super().__init__(
            f"{head}{one.kind} {one} needs {need.value}, but {other.kind} {other} does not provide it: {reason}."
        )

    def between(self, names: Sequence[str]) -> ContradictionError:
        """The same error, with the names of the methods that were composed."""
        return ContradictionError(self.one, self.need, self.other, self.reason, names)


def _fact() -> Any:
    """A field that `Recipe` computes."""
    return field(init=False, repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A method: one part for each of the nine questions. The default parts are those of SAM.

    A recipe is a value: frozen, hashable and comparable. Change one with `dataclasses.replace`. Everything that follows
    from the parts is computed once, at construction.

    Args:
        objective: the loss that is climbed. Default: the loss of the batch.
        direction: along what the weights are displaced. Default: the gradient.
        geometry: the norm in which rho is a length. Default: Euclidean.
        mask: which entries are displaced. Default: all.
        radius: the length of the displacement. Default: rho of the param group.
        schedule: on which steps the method ascends. Default: all.
        inner_loop: at which points gradients are taken. Default: one, at w + eps.
        samples: which samples count in the descent. Default: all.
        combine: what the base optimizer gets. Default: the gradient at w + eps.
        name: the name in tables and messages. Default "recipe".

    Attributes:
        parts: the parts by kind.
        demands: all needs of the parts, met by the training loop or by other parts.
        needs: the needs among these that the training loop must meet.
        needs_names, needs_layers: whether the names of the weights, or the types of their layers, are needed.
        is_random: whether a step draws random numbers.
        joins: whether a step can work on weights that are joined into few large tensors, as with `SAM(flat=True)`.
        remembers: whether a gradient of one pass is still used after the next pass has begun.
        ascends: False for the base optimizer alone.
        moves: whether any step perturbs the weights.
        two_pass: whether a step is one gradient at w and one at w + eps, as `perturbed()` and `first_step` require.
        one_pass: whether a step is one gradient at a point that is known beforehand, as `train()` and `eval()` require.
        direction_factor: the factor of the direction on the perturbation, see `Direction.factor`.
        default_rho: the radius of param groups without one: the geometry's default, else that of another part, else
            SAM's 0.05 (Foret et al., ICLR 2021, Section 3).
        gradient_evaluations: average number of batch gradients in a step.
        extra_copies: copies of the perturbed weights held during the last pass, in addition to the base optimizer's
            state: one snapshot of w, those of the inner loop, and one of g if the combination uses it. A "param" slot
            counts two if it changes before the last pass (the old value is kept until the step is taken), else one.

    Raises:
        TypeError: a part of the wrong kind.
        ContradictionError: a part needs something that another part makes impossible. It is a ValueError.
        ValueError: a schedule that never ascends on the steps on which another part is due.
    """

    objective: Objective = field(default_factory=SameLoss)
    direction: Direction = field(default_factory=Gradient)
    geometry: Geometry = field(default_factory=L2)
    mask: Mask = field(default_factory=All)
    radius: Radius = field(default_factory=ConstantRadius)
    schedule: Schedule = field(default_factory=Always)
    inner_loop: InnerLoop = field(default_factory=OneStep)
    samples: Samples = field(default_factory=EverySample)
    combine: Combine = field(default_factory=Descent)
    name: str = "recipe"

    parts: Mapping[str, Part] = _fact()
    demands: frozenset[Need] = _fact()
    needs: frozenset[Need] = _fact()
    needs_names: bool = _fact()
    needs_layers: bool = _fact()
    is_random: bool = _fact()
    joins: bool = _fact()
    remembers: bool = _fact()
    ascends: bool = _fact()
    moves: bool = _fact()
    two_pass: bool = _fact()
    one_pass: bool = _fact()
    direction_factor: float = _fact()
    default_rho: float = _fact()
    gradient_evaluations: float = _fact()
    extra_copies: int = _fact()

    def __post_init__(self) -> None:
        parts: dict[str, Part] = {kind: getattr(self, kind) for kind in KINDS}
        for kind, part in parts.items():
            if not isinstance(part, Part) or part.kind != kind:
                raise TypeError(f"{kind} must be a part of kind {kind!r}, got {part!r}.")
        for part in parts.values():
            self._check_fellows(part, parts)
        direction, inner_loop, combine = self.direction, self.inner_loop, self.combine
        demands = frozenset[Need]().union(*(part.demands() for part in parts.values()))
        moves = self.schedule.ascends and inner_loop.ascends
        self._set(
            parts=parts,
            demands=demands,
            needs=demands - INTERNAL,
            needs_names=Need.NAMES in demands,
            needs_layers=Need.LAYERS in demands,
            is_random=Need.RANDOM in demands,
            joins=all(part.entrywise for kind, part in parts.items() if kind not in _SEE_NO_TENSORS)
            and (combine.uses_gradient or not combine.mixes)
            and not demands & {Need.RANDOM, Need.DECIDES_BY_VALUE},
            remembers=combine.uses_gradient or inner_loop.uses_gradient or any(part.slots for part in parts.values()),
            ascends=self.schedule.ascends,
            moves=moves,
            two_pass=direction.evaluates
            and not direction.moves_start
            and inner_loop.one_ascent
            and Need.SECOND_ORDER not in demands,
            one_pass=moves and not direction.evaluates and inner_loop.one_ascent and not self.schedule.by_gradient,
            direction_factor=direction.factor(),
            default_rho=self._default_rho(parts),
            gradient_evaluations=self._evaluations(parts),
            extra_copies=self._copies(parts),
        )

    def _default_rho(self, parts: Mapping[str, Part]) -> float:
        stated = (part.default_rho for part in (self.geometry, *parts.values()))
        return next((rho for rho in stated if rho is not None), 0.05)

    def _set(self, **facts: Any) -> None:
        for name, value in facts.items():
            object.__setattr__(self, name, value)

    def _check_fellows(self, one: Part, parts: Mapping[str, Part]) -> None:
        """Raise an error if another part conflicts with this one, or if no step that ascends is one of its own."""
        for need in sorted(_asked(one), key=lambda n: n.name):
            for other in parts.values():
                reason = other.conflict(need)
                if reason and other is not one:
                    raise ContradictionError(one, need, other, reason)
        if self.combine.descents > self.inner_loop.descents:
            raise ValueError(
                f"combine {self.combine} needs {self.combine.descents} descent gradients, but inner_loop "
                f"{self.inner_loop} gives {self.inner_loop.descents}."
            )
        for origin in one.reads.values():
            kind, _, slot = origin.partition(".")
            if slot not in parts[kind].slots:
                raise ValueError(f"{one.kind} {one} reads {slot!r} of {kind} {parts[kind]}, which has no such slot.")
        interval = one.parameters().get("interval")
        if isinstance(interval, int) and not self.schedule.meets(interval):
            raise ValueError(
                f"{one.kind} {one} is due on every {interval}th step, but {self.schedule} ascends on none of these; "
                "choose another interval or phase."
            )

    def _evaluations(self, parts: Mapping[str, Part]) -> float:
        full = self.inner_loop.evaluations(1 if self.direction.evaluates else 0)
        on = self.schedule.ascent_fraction
        return (
            on * (full + sum(part.surcharge for part in parts.values()))
            + (1.0 - on) * self.inner_loop.plain_evaluations
        )

    def _copies(self, parts: Mapping[str, Part]) -> int:
        if not self.schedule.ascends:
            return 0
        learns_late = {"combine"} | ({"direction"} if not self.direction.evaluates else set())
        slots = 0
        for kind, part in parts.items():
            slots += (1 if kind in learns_late else 2) * sum(k == "param" for k in part.slots.values())
        return int(self.inner_loop.ascends) + slots + self.inner_loop.copies + int(self.combine.uses_gradient)

    def for_length(self, total: int, data_size: int | None = None) -> Recipe:
        """This recipe with the length of the training filled in, wherever a part's `total` or `data_size` is 0.

        Args:
            total: number of updates of the whole training, >= 1.
            data_size: number of training samples, >= 1. Default None: `data_size` is left as it is.

        Returns:
            The new recipe, or this one if nothing had to be filled in.

        Raises:
            ValueError: not a whole number >= 1.
        """
        lengths: dict[str, Any] = {"total": total} | ({} if data_size is None else {"data_size": data_size})
        for name, value in lengths.items():
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
                unit = "updates" if name == "total" else "samples"
                raise ValueError(f"for_length: {name} must be a whole number of {unit} >= 1, got {value!r}.")
        changed: dict[str, Part] = {}
        for kind, part in self.parts.items():
            unset = {
                name: type(value)(lengths[name])
                for name, value in part.parameters().items()
                if name in lengths and value == 0
            }
            if unset:
                changed[kind] = dataclasses.replace(part, **unset)
        return dataclasses.replace(self, **changed) if changed else self  # type: ignore[arg-type]

    def parameters(self) -> dict[str, Any]:
        """All parameters by their qualified names, for example {"direction.theta": 0.9}."""
        return {f"{kind}.{k}": v for kind, part in self.parts.items() for k, v in part.parameters().items()}

    def qualified(self, word: str) -> list[str]:
        """The qualified names of all parameters that a word such as "theta" or "direction.theta" may stand for."""
        word = current_word(word)
        return [name for name in self.parameters() if word in (name, name.partition(".")[2])]

    def __str__(self) -> str:
        inner = ", ".join(f"{k}={v!r}" for k, v in self.parameters().items())
        return f"{self.name}({inner})"


def _asked(part: Part) -> frozenset[Need]:
    """What a part needs from the others: its own needs, and those of every part that differs from SAM's."""
    asked = part.demands() | part.implied
    if part.kind != "schedule" and part != DEFAULTS.get(part.kind):
        asked |= {Need.RULE, Need.ASCENT} if part.ascends else {Need.RULE}
    return asked


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method in the table of names: the parts it sets, and what help texts and pages say about it.

    Args:
        name: its key in the table, such as "vasso".
        title: its name in the literature.
        parts: the parts it sets. All other parts are SAM's. Default ().
        formula: the update rule in one line. w: weights, g: gradient at w, eps: perturbation, g_s: gradient at w + eps,
            u: the gradient that the base optimizer takes.
        paper: authors, title, venue.
        url: where to read the paper. Default "".
        summary: what the method does, in one or two sentences. Default "".
        when: when to use it, in one sentence. Default "".
        note: differences from the paper or its code, and what else a user should know. Default "".
    """

    name: str
    title: str
    parts: tuple[Part, ...] = ()
    formula: str
    paper: str
    url: str = ""
    summary: str = ""
    when: str = ""
    note: str = ""

    def recipe(self) -> Recipe:
        """The recipe of this method alone, with its default parameters."""
        return Recipe(name=self.name, **{part.kind: part for part in self.parts})  # type: ignore[arg-type]
