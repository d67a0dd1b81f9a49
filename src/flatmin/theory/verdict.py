"""The verdict of the checker: conditions, theorems, and which of the five properties follow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from flatmin.theory.classes import FunctionClass
from flatmin.theory.families import Family
from flatmin.theory.rules import Rule
from flatmin.theory.sums import Judgement, Proof

Status = Literal["follows", "not shown", "fails"]
PROPERTIES = (
    "liminf ||grad f(x^k)|| = 0",
    "every accumulation point of x^k is stationary",
    "grad f(x^k) -> 0",
    "f(x^k) -> f(x), x stationary",
    "x^k -> x, x stationary",
)
"""The five fundamental convergence properties. Source: Khanh et al., NeurIPS 2024, Table 1."""
MARKS = {True: "yes", False: "no", None: "?"}


@dataclass(frozen=True)
class Condition:
    """One hypothesis of a theorem, and whether it holds.

    Attributes:
        name: the hypothesis, as a formula.
        holds: True, False, or None if it could not be decided.
        reason: the reason, as text.
        proof: "symbolic", from the growth of the rules, or "numeric", from their first million values.
        about: "rules" for a condition on the rules, "setting" for one on the function or the method.
    """

    name: str
    holds: bool | None
    reason: str
    proof: Proof = "symbolic"
    about: Literal["rules", "setting"] = "rules"

    @classmethod
    def of(cls, name: str, finding: Judgement) -> Condition:
        """A condition from a judgement about a rule."""
        return cls(name, finding.holds, finding.reason, finding.proof)

    def __str__(self) -> str:
        return f"{self.name}: {MARKS[self.holds]} ({self.reason})"


@dataclass(frozen=True)
class Theorem:
    """One theorem, applied to a pair of rules, a class of functions and a method.

    Attributes:
        name: number and title.
        conditions: its hypotheses.
        gives: number of a property (1 to 5) -> why it follows if all conditions hold.
        lacks: number of a property -> what is missing for it even if all conditions hold.
    """

    name: str
    conditions: tuple[Condition, ...]
    gives: dict[int, str] = field(default_factory=dict)
    lacks: dict[int, str] = field(default_factory=dict)

    @property
    def holds(self) -> bool | None:
        """Whether every condition holds; None if none fails but some could not be decided."""
        states = [c.holds for c in self.conditions]
        return False if False in states else None if None in states else True

    @property
    def missing(self) -> tuple[Condition, ...]:
        """The conditions that fail or could not be decided."""
        return tuple(c for c in self.conditions if not c.holds)


@dataclass(frozen=True)
class Property:
    """One of the five properties, for every member of the class.

    Attributes:
        number: 1 to 5, the position in `PROPERTIES`.
        status: "follows" from a theorem that applies; "fails" for a known member of the class; or "not shown".
        reason: the theorem, the counterexample, or what is missing. Numeric evidence is marked as such.
        elsewhere: whether it is known to fail only for a member of the class other than the function in question.
    """

    number: int
    status: Status
    reason: str
    elsewhere: bool = False

    @property
    def name(self) -> str:
        """The property as a formula."""
        return PROPERTIES[self.number - 1]

    def __str__(self) -> str:
        return f"({self.number}) {self.name}: {self.status}, {self.reason}"


@dataclass(frozen=True)
class Verdict:
    """What the theory says about a method with a step size and a radius on a class of functions.

    Attributes:
        step, radius: the rules; the radius as the method uses it.
        functions: the class.
        family: the method.
        theorem: the name of the theorem that applies; of several, the one that gives most; None if none does.
        conditions: the conditions of that theorem, or of the nearest one if none applies.
        theorems: all theorems that were tried, that one first.
        properties: the five properties.
        rate: the rate of convergence as text; "" if none is known.
        distance: the final distance from the minimiser if a closed form shows that the iterates stay away; else None.
    """

    step: Rule
    radius: Rule
    functions: FunctionClass
    family: Family
    theorem: str | None
    conditions: tuple[Condition, ...]
    theorems: tuple[Theorem, ...]
    properties: tuple[Property, ...]
    rate: str = ""
    distance: float | None = None

    @property
    def converges(self) -> bool | None:
        """Whether grad f(x^k) -> 0: True if it follows, False if it is known to fail, else None.

        A counterexample in the class of a function that is not a quadratic decides nothing for the function itself.
        """
        gradient_vanishes = self.properties[2]
        return (
            None
            if gradient_vanishes.elsewhere
            else {"follows": True, "fails": False, "not shown": None}[gradient_vanishes.status]
        )

    @property
    def statuses(self) -> tuple[Status, ...]:
        """The status of each of the five properties."""
        return tuple(p.status for p in self.properties)

    @property
    def numeric(self) -> bool:
        """Whether any condition rests on numeric evidence rather than a proof."""
        return any(c.proof == "numeric" for c in self.conditions)

    def __str__(self) -> str:
        nearest = f"none applies (nearest: {self.theorems[0].name})" if self.theorems else "none applies"
        lines = [
            f"{self.family.name} with t = {self.step}, rho = {self.radius} on f: {self.functions}",
            f"theorem: {self.theorem or nearest}",
            *(f"  {c}" for c in self.conditions),
            *(f"  {p}" for p in self.properties),
        ]
        lines += [f"rate: {self.rate}"] if self.rate else []
        lines += [] if self.distance is None else [f"final distance from the minimiser: {self.distance:.6g}"]
        return "\n".join(lines)
