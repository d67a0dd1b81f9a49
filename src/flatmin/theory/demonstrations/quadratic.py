"""On a quadratic with a constant step size and radius, SAM does not converge; gradient descent and USAM do."""

from __future__ import annotations

from typing import Any

import numpy as np

from flatmin.theory.closed import limit_distance
from flatmin.theory.demonstrations.demonstration import (
    PAPER,
    Claim,
    Demonstration,
    DemonstrationResult,
    Panel,
    PanelCurve,
    below,
    near,
    seen,
)
from flatmin.theory.functions import Quadratic
from flatmin.theory.methods import run

T, RHO, SPECTRUM = 0.1, 0.1, (1.0, 4.0)
METHODS: tuple[tuple[str, str, dict[str, Any], bool], ...] = (
    ("gradient descent", "sgd", {}, False),
    ("USAM", "usam", {}, False),
    ("SAM", "sam", {}, True),
    ("VaSSO, theta = 0.4", "vasso", {"theta": 0.4}, True),
    ("F-SAM, sigma = 1, lambda = 0.6", "fsam", {"sigma": 1.0, "lam": 0.6}, True),
)
OTHERS = ((0.05, 0.1), (0.1, 0.3), (0.2, 0.1), (0.3, 0.05), (0.4, 0.1), (0.45, 0.02))
"""Further pairs (t, rho) for SAM on the rotated quadratic."""


def _run() -> DemonstrationResult:
    rows: list[tuple[str | float, ...]] = []
    claims: list[Claim] = []
    curves = []
    problem = Quadratic(SPECTRUM)
    end = limit_distance(T, RHO, SPECTRUM)
    for number, (label, method, how, stays) in enumerate(METHODS):
        trace = run(problem, method, steps=T, radius=RHO, updates=800, driver="program", **how)
        measured = float(trace.distance[-1])
        rows.append((label, T, RHO, measured, end if stays else 0.0, abs(float(trace.x[-1, 1]))))
        claims.append(
            near(f"{label} ends at t rho lambda / (2 - t lambda)", measured, end, tol=1e-10)
            if stays
            else below(f"{label} reaches the minimiser", measured, 1e-15)
        )
        part = slice(0, 251)
        y = seen(trace.distance[part])
        greek = label.replace("theta", "θ").replace("sigma", "σ").replace("lambda", "λ")
        curves.append(PanelCurve(label=greek, x=trace.k[part].astype(float), y=y, color=number))
    rotated = Quadratic(SPECTRUM, centre=[3.0, -1.0], seed=7)
    ends = []
    for t, rho in OTHERS:
        trace = run(rotated, "sam", steps=t, radius=rho, updates=2000, driver="program")
        measured, expected = float(trace.distance[-1]), limit_distance(t, rho, SPECTRUM)
        along = abs(float(rotated.rotation[:, 1].numpy() @ (trace.x[-1] - rotated.centre.numpy())))
        rows.append(("SAM, axes rotated", t, rho, measured, expected, along))
        claims.append(near(f"SAM, t = {t:g}, rho = {rho:g}, rotated quadratic", measured, expected, tol=1e-10))
        ends.append((t * max(SPECTRUM), measured / rho))
    grid = np.linspace(0.0, 1.9, 200)
    return DemonstrationResult(
        title="SAM with constant steps does not converge on a quadratic",
        statement=(
            "On f(x) = x^T A x / 2 with constant t and rho, SAM ends at the distance t rho lambda / (2 - t lambda) "
            "from the minimiser, along the eigenvector of the largest eigenvalue lambda of A. VaSSO and F-SAM end at "
            "the same distance with these parameters; with others they may end on other cycles. Gradient descent and "
            "USAM reach the minimiser. Here A has the eigenvalues 1 and 4."
        ),
        columns=("method", "t", "rho", "distance", "predicted", "along top eigenvector"),
        rows=tuple(rows),
        claims=tuple(claims),
        panels=(
            Panel(
                title="eigenvalues 1 and 4, t = ρ = 0.1",
                xlabel="update k",
                ylabel="distance to the minimiser",
                curves=tuple(curves),
                levels=((end, "tρλ/(2−tλ) = 0.025"),),
                log_y=True,
                low=1e-17,
            ),
            Panel(
                title="final distance of SAM",
                xlabel="tλ, λ the largest eigenvalue",
                ylabel="final distance, in units of ρ",
                curves=(
                    PanelCurve(label="tλ/(2−tλ)", x=grid, y=grid / (2 - grid), style="theory"),
                    PanelCurve(
                        label="SAM, measured",
                        x=np.array([x for x, _ in [*ends, (T * max(SPECTRUM), end / RHO)]]),
                        y=np.array([y for _, y in [*ends, (T * max(SPECTRUM), float(str(rows[2][3])) / RHO)]]),
                        style="points",
                        color=2,
                    ),
                ),
                low=0.0,
            ),
        ),
    )


QUADRATIC = Demonstration(
    "quadratic",
    "constant steps on a quadratic: SAM, VaSSO and F-SAM do not converge, gradient descent and USAM do",
    f"{PAPER}, Example 3.1; the distance is derived here",
    _run,
)
