"""What a method is: a frozen set of parts, and its line in the table of names."""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flatmin import methods as p
from flatmin.methods import KINDS, Need, Part


class ContradictionError(ValueError):
    """One part needs what another takes away.

    Attributes:
        one, other: the part that needs, and the part that does not give.
        need: what.
        reason: why not.
    """

    def __init__(self, one: Part, need: Need, other: Part, reason: str, names: Sequence[str] = ()) -> None:
        self.one, self.need, self.other, self.reason = one, need, other, reason
        head = f"{' and '.join(map(repr, names))} do not go together: " if len(names) > 1 else ""
        super().__init__(
            f"{head}{one.kind} {one} needs {need.value}, which {other.kind} {other} does not give: {reason}."
        )

    def between(self, names: Sequence[str]) -> ContradictionError:
        """The same, naming the methods that brought the parts."""
        return ContradictionError(self.one, self.need, self.other, self.reason, names)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A method: one part for each question. The defaults are SAM.

    Args:
        objective, direction, geometry, mask, radius, when, points, samples, combine: the parts; see `flatmin.methods`.
        name: what tables print. Default "recipe".

    Raises:
        TypeError: a part of another kind.
        ContradictionError: a ValueError, for a part that needs what another takes away.
    """

    objective: p.Objective = field(default_factory=p.SameLoss)
    direction: p.Direction = field(default_factory=p.Gradient)
    geometry: p.Geometry = field(default_factory=p.L2)
    mask: p.Mask = field(default_factory=p.All)
    radius: p.Radius = field(default_factory=p.Constant)
    when: p.When = field(default_factory=p.Always)
    points: p.Points = field(default_factory=p.One)
    samples: p.Samples = field(default_factory=p.EverySample)
    combine: p.Combine = field(default_factory=p.Descent)
    name: str = "recipe"

    def __post_init__(self) -> None:
        for kind, part in self.parts.items():
            if not isinstance(part, Part) or part.kind != kind:
                raise TypeError(f"{kind} must be a part of kind {kind!r}, got {part!r}.")
        for one in self.parts.values():
            for need in sorted(_demands(one), key=lambda n: n.name):
                for other in self.parts.values():
                    reason = _withheld(other, need)
                    if reason and other is not one:
                        raise ContradictionError(one, need, other, reason)
            interval = one.parameters().get("interval")
            if isinstance(interval, int) and not self.when.meets(interval):
                raise ValueError(
                    f"{one.kind} {one} works on every {interval}th step, and {self.when} ascends on none of them; "
                    "choose another interval or phase."
                )

    @property
    def parts(self) -> dict[str, Part]:
        """The parts by kind."""
        return {kind: getattr(self, kind) for kind in KINDS}

    @functools.cached_property
    def needs(self) -> frozenset[Need]:
        """What the loop must serve."""
        asked = frozenset[Need]().union(*(part.demands() for part in self.parts.values()))
        return asked - p.INTERNAL

    @property
    def default_rho(self) -> float:
        """The geometry's default radius."""
        return self.geometry.default_rho

    @property
    def gradient_evaluations(self) -> float:
        """Gradients of one batch per step, on average."""
        full = self.points.evaluations(1 if self.direction.evaluates else 0)
        on = self.when.duty
        return on * (full + sum(part.surcharge for part in self.parts.values())) + (1.0 - on)

    @property
    def ascends(self) -> bool:
        """False for the plain base optimizer."""
        return not isinstance(self.when, p.Never)

    @property
    def extra_copies(self) -> int:
        """Copies of the moved weights held during the last pass, beyond the base optimizer's own.

        One snapshot of w; what the ascents hold; one for g where the combination needs it. A tensor that is remembered
        counts two where it changes before the last pass (the old one is kept until the step is known to be good), else
        one.
        """
        if not self.ascends:
            return 0
        learns_late = {self.combine} | ({self.direction} if not self.direction.evaluates else set())
        slots = 0
        for part in self.parts.values():
            slots += (1 if part in learns_late else 2) * sum(k == "param" for k in part.slots.values())
        return int(self.points.leaves) + slots + self.points.copies + int(self.combine.uses_gradient)

    @property
    def remembers(self) -> bool:
        """Whether a gradient of one pass is looked at after the next one has begun."""
        return self.combine.uses_gradient or any(part.slots for part in self.parts.values())

    @property
    def moves(self) -> bool:
        """Whether a step can leave w at all."""
        return self.ascends and self.points.leaves

    @property
    def two_pass(self) -> bool:
        """Whether a step is one gradient at w and one at w + eps: what `perturbed()` and `first_step` serve."""
        plain = self.direction.evaluates and not self.direction.moves_start and isinstance(self.points, p.One)
        return plain and Need.SECOND_ORDER not in self.needs

    @property
    def one_pass(self) -> bool:
        """Whether a step is one gradient, at a point known before it: what `train()` and `eval()` serve."""
        return self.moves and not self.direction.evaluates and isinstance(self.points, p.One) and not self.when.looks

    def for_length(self, total: int) -> Recipe:
        """This recipe for a training of `total` updates: every part's `total` that is 0 is set to it.

        Args:
            total: updates of the whole training, >= 1.

        Raises:
            ValueError: total is not a whole number >= 1.
        """
        given: Any = total
        if isinstance(given, bool) or not isinstance(given, numbers.Integral) or given < 1:
            raise ValueError(f"for_length: total must be a whole number of updates >= 1, got {total!r}.")
        changed = {
            kind: dataclasses.replace(part, **{"total": int(total)})
            for kind, part in self.parts.items()
            if part.parameters().get("total") == 0
        }
        return dataclasses.replace(self, **changed) if changed else self  # type: ignore[arg-type]

    def parameters(self) -> dict[str, Any]:
        """Every parameter by its qualified name, e.g. {"direction.theta": 0.9}."""
        return {f"{kind}.{k}": v for kind, part in self.parts.items() for k, v in part.parameters().items()}

    def __str__(self) -> str:
        inner = ", ".join(f"{k}={v!r}" for k, v in self.parameters().items())
        return f"{self.name}({inner})"


def _demands(part: Part) -> frozenset[Need]:
    asked = part.demands()
    if part.kind != "when" and part != DEFAULTS.get(part.kind) and _needs_ascent(part):
        asked |= {Need.ASCENT}
    if part.kind != "when" and part != DEFAULTS.get(part.kind):
        asked |= {Need.RULE}
    if isinstance(part, p.Combine) and type(part).graph is not p.Combine.graph:
        # Its products would be taken after the weights are put back.
        asked |= {Need.STAYS}
    if part.slots:
        asked |= {Need.WHOLE_BATCH}
    return asked


def _needs_ascent(part: Part) -> bool:
    if isinstance(part, p.Combine):
        return part.ascends
    return not isinstance(part, p.Points) or part.leaves


def _withheld(part: Part, need: Need) -> str | None:
    if need in part.withholds:
        return part.withholds[need]
    if need is Need.STAYS and isinstance(part, p.Points) and part.leaves:
        return "it leaves w"
    if need in (Need.GRADIENT_AT_W, Need.LOSSES_AT_W, Need.PASS_1) and isinstance(part, p.Direction):
        if part.moves_start and need is not Need.PASS_1:
            return "pass 1 is not taken at w"
        if not part.evaluates:
            return "it takes no pass 1"
    return None


DEFAULTS: dict[str, Part] = {
    "objective": p.SameLoss(),
    "direction": p.Gradient(),
    "geometry": p.L2(),
    "mask": p.All(),
    "radius": p.Constant(),
    "when": p.Always(),
    "points": p.One(),
    "samples": p.EverySample(),
    "combine": p.Descent(),
}


@dataclass(frozen=True, kw_only=True)
class Method:
    """One line in the table of names: the parts a name sets, and what the tables print of it.

    Args:
        name: the key in the table.
        title: its name in the literature.
        parts: the parts it sets; all others keep SAM's.
        formula: the update rule in one line.
        paper: authors, title, venue.
        url: where to read it.
        summary: one sentence.
    """

    name: str
    title: str
    parts: tuple[Part, ...] = ()
    formula: str
    paper: str
    url: str = ""
    summary: str = ""

    def recipe(self) -> Recipe:
        """The method alone, with its own defaults."""
        return Recipe(name=self.name, **{part.kind: part for part in self.parts})  # type: ignore[arg-type]
