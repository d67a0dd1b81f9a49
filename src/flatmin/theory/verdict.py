"""What the checker says: conditions, theorems, and which of the five properties follow."""

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
        holds: True, False, or None where it could not be decided.
        reason: why, in words.
        proof: "symbolic", from what is known of the rules, or "numeric", from their first million values.
        about: whether it speaks of the "rules", or of the "setting", the function and the method.
    """

    name: str
    holds: bool | None
    reason: str
    proof: Proof = "symbolic"
    about: Literal["rules", "setting"] = "rules"

    @classmethod
    def of(cls, name: str, finding: Judgement) -> Condition:
        """From a finding about a rule."""
        return cls(name, finding.holds, finding.reason, finding.proof)

    def __str__(self) -> str:
        return f"{self.name}: {MARKS[self.holds]} ({self.reason})"


@dataclass(frozen=True)
class Theorem:
    """One theorem, held against a pair of rules, a class of functions and a method.

    Attributes:
        name: number and title.
        conditions: its hypotheses.
        gives: number of a property (1 to 5) -> why it follows, if all conditions hold.
        lacks: number of a property -> what is missing for it even then.
    """

    name: str
    conditions: tuple[Condition, ...]
    gives: dict[int, str] = field(default_factory=dict)
    lacks: dict[int, str] = field(default_factory=dict)

    @property
    def holds(self) -> bool | None:
        """Whether every condition does; None if none fails and some could not be decided."""
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
        status: "follows" from a theorem that applies; "fails" for a known member of the class; "not shown".
        reason: by which theorem, which counter-example, or what is missing; says so where numeric evidence was used.
        elsewhere: whether it is known to fail only for another member of the class than the function asked about.
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
    """What is known of a method with a step size and a radius on a class of functions.

    Attributes:
        step, radius: the rules; the radius as the method uses it.
        functions: the class.
        family: the method.
        theorem: the name of the theorem that applies, of several the one that gives most; None if none does.
        conditions: of that theorem, or of the one that comes nearest.
        theorems: all that were tried, that one first.
        properties: the five.
        rate: how fast, in words; "" where nothing is known.
        distance: to the minimiser, where a closed form says that the iterates stay away from it; else None.
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

        Of a function that is no quadratic a counter-example in its class says nothing: None.
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
        """Whether anything that was used is numeric evidence and no proof."""
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
        lines += [] if self.distance is None else [f"distance to the minimiser in the end: {self.distance:.6g}"]
        return "\n".join(lines)
