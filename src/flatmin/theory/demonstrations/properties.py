"""The five convergence properties for SAM, VaSSO, F-SAM and RSAM: the checker's verdict, and runs."""

from __future__ import annotations

from typing import Any

from flatmin.theory.checker import check
from flatmin.theory.demonstrations.demonstration import (
    LETTERS,
    PAPER,
    Claim,
    Demonstration,
    DemonstrationResult,
    Panel,
    PanelCurve,
    above,
    below,
    same,
)
from flatmin.theory.landscapes import LogSum
from flatmin.theory.methods import run
from flatmin.theory.verdict import Verdict

METHODS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("SAM", "sam", {}),
    ("VaSSO", "vasso", {"theta": 0.4}),
    ("F-SAM", "fsam", {"sigma": 1.0, "lam": 0.6}),
    ("RSAM", "rsam", {}),
)
DIMINISHING, ALMOST = "harmonic:1,shift=8", "power:c=0.1,p=0.001"
CONSTANT, FIXED = 0.05, 0.1
UPDATES = 4000


def letters(verdict: Verdict) -> str:
    """The five statuses as letters."""
    return "".join(LETTERS[s] for s in verdict.statuses)


def _run() -> DemonstrationResult:
    problem = LogSum.random(5)
    rows: list[tuple[str | float, ...]] = []
    claims: list[Claim] = []
    traced: dict[str, list[PanelCurve]] = {"gradient": [], "f": [], "distance": []}
    for number, (label, method, how) in enumerate(METHODS):
        for rules, step, radius in (("1/(k+9)", DIMINISHING, ALMOST), ("constant", CONSTANT, FIXED)):
            verdict = check(step, radius, problem, method, **how)
            trace = run(problem, method, steps=step, radius=radius, updates=UPDATES, driver="program", **how)
            late = trace.gradient[trace.k >= UPDATES // 2]
            ends = (float(late.max()), float(trace.f[-1]), float(trace.distance[-1]))
            rows.append((label, rules, letters(verdict), float(late.min()), *ends))
            name = f"{label}, {rules}"
            if rules == "constant":
                claims.append(above(f"{name}: smallest ||grad f|| of the last half", float(late.min()), 1e-2))
                expected = "XXXXX" if method == "sam" else "nnXXX"
            else:
                claims.append(below(f"{name}: largest ||grad f|| of the last half", ends[0], 0.03))
                claims.append(below(f"{name}: final f - f*", ends[1], 1e-5))
                claims.append(below(f"{name}: final distance from the minimiser", ends[2], 1e-3))
                expected = "FFFFF"
            claims.append(same(f"{name}: verdict on properties 1 to 5", letters(verdict), expected))
            part = trace.k >= 1
            for what, curves in traced.items():
                curve = PanelCurve(
                    label=_legend(label, rules, number) if what == "gradient" else "",
                    x=trace.k[part].astype(float),
                    y=getattr(trace, what)[part],
                    style="theory" if rules == "constant" else "run",
                    color=number,
                )
                curves.append(curve)
    titles = {
        "gradient": ("(1), (3)  the gradient", "‖∇f(xₖ)‖"),
        "f": ("(4)  the value", "f(xₖ) − f*"),
        "distance": ("(2), (5)  the iterates", "‖xₖ − x*‖"),
    }
    return DemonstrationResult(
        title="Five properties, four methods: the direction of the perturbation does not matter",
        statement=(
            "The function is not convex (log-sum, 5 variables, one stationary point). With t = 1/(k + 9) and "
            "rho = 0.1/k^0.001, every normalised method has all five properties. With constant t = 0.05 and rho = 0.1, "
            "none of the runs converges. F: the property follows from a theorem. n: not shown. X: it fails for a "
            "member of the class."
        ),
        columns=("method", "rules", "verdict", "min ||grad f||", "max ||grad f||", "f - f*", "||x - x*||"),
        rows=tuple(rows),
        claims=tuple(claims),
        panels=tuple(
            Panel(
                title=title,
                xlabel="update k",
                ylabel=ylabel,
                curves=tuple(traced[what]),
                log_x=True,
                log_y=True,
            )
            for what, (title, ylabel) in titles.items()
        ),
    )


def _legend(label: str, rules: str, number: int) -> str:
    if rules != "constant":
        return label
    return "t, ρ constant" if not number else ""


PROPERTIES = Demonstration(
    "properties",
    "the five convergence properties for SAM, VaSSO, F-SAM and RSAM",
    f"{PAPER}, Table 1 and Corollary 3.5",
    _run,
)
