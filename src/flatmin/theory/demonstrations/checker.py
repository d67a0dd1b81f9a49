"""Verdicts of the checker on pairs of rules that are common in practice."""

from __future__ import annotations

from flatmin.theory.checker import check
from flatmin.theory.classes import FunctionClass
from flatmin.theory.demonstrations.demonstration import (
    LETTERS,
    PAPER,
    Claim,
    Demonstration,
    DemonstrationResult,
    Marks,
    brief,
    same,
)

CONVEX = "convex, L=4, unique"
OPEN = "L=4, coercive, kl=0.5"
PAIRS: tuple[tuple[str, str, str, str, str, str], ...] = (
    ("sam", "0.1", "0.1", CONVEX, "none", "XXXXX"),
    ("sam", "cosine:T=1000,lr=0.1", "0.1", CONVEX, "none", "XXXXX"),
    ("sam", "harmonic:1", "0.1", CONVEX, "Theorem 3.2", "FFFFF"),
    ("sam", "diminish1", "0.1", CONVEX, "Theorem 3.2", "FFFFF"),
    ("sam", "diminish2", "0.1", CONVEX, "Theorem 3.2", "FFFFF"),
    ("sam", "diminish3", "0.1", CONVEX, "Theorem 3.2", "FFFFF"),
    ("sam", "power:p=0.5", "0.1", CONVEX, "none", "nnnnn"),
    ("vasso", "harmonic:1", "0.1", CONVEX, "none", "nnnnn"),
    ("sam", "0.1", "0.1", OPEN, "none", "XXXXX"),
    ("sam", "harmonic:1", "0.1", OPEN, "none", "nnnnn"),
    ("sam", "harmonic:1", "power:c=0.1,p=0.001", OPEN, "Corollary 3.5", "FFFFF"),
    ("vasso", "harmonic:1", "power:c=0.1,p=0.001", OPEN, "Corollary 3.5", "FFFFF"),
    ("sam", "diminish2", "power:c=0.1,p=0.001", OPEN, "none", "nnnnn"),
    ("sam", "diminish2", "power:c=0.1,p=0.5", OPEN, "Corollary 3.5", "FFFFn"),
    ("sam", "diminish3", "power:c=0.1,p=0,q=1,shift=1", OPEN, "Corollary 3.5", "FFFFF"),
    ("sam", "harmonic:1", "tied:0.5", OPEN, "Corollary 3.5", "FFFFF"),
    ("usam", "0.1", "0.1", OPEN, "Section 4", "FFFFF"),
    ("usam", "0.4", "0.1", OPEN, "none", "XXXXX"),
    ("usam", "0.1", "0.25", OPEN, "none", "nnnnn"),
    ("sgd", "0.1", "0", OPEN, "Section 4", "FFFFF"),
)
"""Method, step, radius, class, the theorem that applies, and the expected letters, worked out by hand."""


def _run() -> DemonstrationResult:
    rows, claims, names = [], list[Claim](), []
    for method, step, radius, words, theorem, letters in PAIRS:
        verdict = check(step, radius, FunctionClass.read(words), method)
        statuses = "".join(LETTERS[s] for s in verdict.statuses)
        missing = ", ".join(c.name for c in verdict.theorems[0].missing)
        applies = brief(verdict.theorem)
        rows.append(
            (method, step, radius, "convex" if words == CONVEX else "KL 1/2", statuses, applies, missing or "-")
        )
        where = "convex" if words == CONVEX else "not convex"
        names.append(f"{method},  t = {step},  ρ = {radius},  {where}")
        claims.append(
            same(f"{method}, t = {step}, rho = {radius}, {words}", f"{applies} {statuses}", f"{theorem} {letters}")
        )
    return DemonstrationResult(
        title="What the theory says about common pairs of rules, L = 4",
        statement=(
            f"The class 'convex' is '{CONVEX}', the class 'KL 1/2' is '{OPEN}'. Columns (1)-(5) are the five "
            "convergence properties. F: the property follows from a theorem. n: not shown. X: it fails for a quadratic "
            "of the class."
        ),
        columns=("method", "step", "radius", "class", "(1)-(5)", "theorem", "missing"),
        rows=tuple(rows),
        claims=tuple(claims),
        panels=(
            Marks(
                rows=tuple(names),
                columns=("(1)", "(2)", "(3)", "(4)", "(5)"),
                letters=tuple(str(row[4]) for row in rows),
            ),
        ),
    )


CHECKER = Demonstration(
    "checker",
    "the checker's verdicts on common pairs of rules",
    f"{PAPER}, Theorem 3.2, Corollary 3.5 and Section 4",
    _run,
)
