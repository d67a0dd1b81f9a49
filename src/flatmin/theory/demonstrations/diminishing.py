"""With diminishing steps and a constant radius, SAM's cycle shrinks to the minimiser."""

from __future__ import annotations

import numpy as np

from flatmin.theory.checker import check
from flatmin.theory.closed import limit_distance
from flatmin.theory.demonstrations.demonstration import (
    PAPER,
    Claim,
    Demonstration,
    DemonstrationResult,
    Panel,
    PanelCurve,
    brief,
    near,
    same,
)
from flatmin.theory.functions import Function, Quadratic, Square
from flatmin.theory.methods import run
from flatmin.theory.parse import read_rule

RHO = 0.1
RULES: tuple[tuple[str, str, int, float | None], ...] = (
    ("constant 0.1", "constant:0.1", 2000, None),
    ("1 / (k + 5)", "harmonic:1,shift=4", 100_000, 8e-12),
    ("0.5 / k^0.5001", "power:c=0.5,p=0.5001", 100_000, 2e-7),
    ("Diminish 1, 100 an epoch", "diminish1:lr=0.1,epoch=100", 20_000, None),
    ("Diminish 3, 100 an epoch", "diminish3:lr=0.1,epoch=100", 20_000, None),
)
"""Name, rule, number of updates, and the known gap f - f* at the end of such a run."""


def gap(problem: Quadratic, t: float, rho: float) -> float:
    """The gap f - f* on SAM's cycle for t and rho: lambda d^2 / 2 with d = t rho lambda / (2 - t lambda)."""
    top = float(problem.spectrum.max())
    return 0.5 * top * limit_distance(t, rho, [top]) ** 2


def _run() -> DemonstrationResult:
    rows: list[tuple[str | int | float, ...]] = []
    claims: list[Claim] = []
    quadratic, square = Quadratic([1.0, 4.0]), Square()
    left, right = [], []
    tasks: list[tuple[str, str, int, float | None, Quadratic]] = [(*rule, quadratic) for rule in RULES]
    tasks.append(("0.5 / k^0.5001", "power:c=0.5,p=0.5001", 100_000, None, square))
    for number, (label, words, updates, expected_gap, problem) in enumerate(tasks):
        trace = run(problem, "sam", steps=words, radius=RHO, updates=updates, driver="program", record=400)
        t = read_rule(words).at(updates)
        measured, expected = float(trace.f[-1]), gap(problem, t, RHO)
        verdict = check(words, RHO, problem)
        rows.append((problem.name, label, updates, t, measured, expected, brief(verdict.theorem)))
        lag = 0.06 if words.startswith("diminish") else 0.02  # the step jumps from epoch to epoch
        claims.append(
            near(f"{problem.name}, {label}: f - f* is that of the cycle for t_k", measured, expected, rel=lag)
        )
        if expected_gap is not None:
            text = f"{problem.name}, {label}: f - f* after {updates} updates"
            claims.append(near(text, measured, expected_gap, rel=0.05))
        theorem = brief(verdict.theorem)
        if words.startswith("constant"):
            claims.append(same(f"{problem.name}, {label}: theorem that applies", theorem, "none"))
        else:
            text = f"{problem.name}, {label}: theorem that applies"
            claims.append(same(text, theorem, "Theorem 3.2"))
        k = trace.k[1:].astype(float)
        if problem is quadratic:
            left.append(PanelCurve(label=label, x=k, y=trace.f[1:], color=number))
            left.append(_predicted(problem, words, updates, "on the cycle for tₖ" if number == 4 else ""))
        else:
            ends = "tₖρ/(1−tₖ)"
            claims.append(near("x^2: |x| after 100000 updates", float(trace.distance[-1]), 1.58e-4, rel=2e-3))
            right.append(PanelCurve(label="|xₖ|, step 0.5/k^0.5001", x=k, y=trace.distance[1:], color=2))
            steps = np.array([min(read_rule(words).at(int(n)), 0.9) for n in k])
            right.append(PanelCurve(label=ends, x=k, y=steps * RHO / (1 - steps), style="theory"))
    return DemonstrationResult(
        title="With diminishing steps and a constant radius, SAM converges",
        statement=(
            "On a convex function, sum t = inf and sum t^2 < inf are sufficient (Theorem 3.2); the radius is constant, "
            "rho = 0.1. The runs follow the cycle for the current step size, f - f* = lambda d^2 / 2 with "
            "d = t_k rho lambda / (2 - t_k lambda). They do so for all later k if n t_n -> c with c lambda > 1 or "
            "n t_n -> inf; otherwise f - f* is only known to be O((t_k rho)^2)."
        ),
        columns=("f", "step", "updates", "final t", "f - f*", "f - f* on the cycle", "theorem"),
        rows=tuple(rows),
        claims=tuple(claims),
        panels=(
            Panel(
                title="eigenvalues 1 and 4, ρ = 0.1 constant",
                xlabel="update k",
                ylabel="f(xₖ) − f*",
                curves=tuple(left),
                log_x=True,
                log_y=True,
                low=3e-13,
                high=10,
            ),
            Panel(
                title="f(x) = x², ρ = 0.1 constant",
                xlabel="update k",
                ylabel="distance to the minimiser",
                curves=tuple(right),
                log_x=True,
                log_y=True,
            ),
        ),
    )


def _predicted(problem: Function, words: str, updates: int, label: str) -> PanelCurve:
    rule = read_rule(words)
    k = np.geomspace(30, updates, 60).round()
    assert isinstance(problem, Quadratic)
    y = np.array([gap(problem, min(rule.at(int(n)), 0.4), RHO) for n in k])
    return PanelCurve(label=label, x=k, y=y, style="theory")


DIMINISHING = Demonstration(
    "diminishing",
    "diminishing steps and a constant radius: SAM converges",
    f"{PAPER}, Theorem 3.2; that the run follows the cycle for the current step is derived here",
    _run,
)
