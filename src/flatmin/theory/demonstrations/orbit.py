"""SAM on x^2 with constant steps: the cycle of period 2."""

from __future__ import annotations

import numpy as np

from flatmin.theory.closed import orbit_square
from flatmin.theory.demonstrations.demonstration import (
    PAPER,
    Demonstration,
    DemonstrationResult,
    Panel,
    PanelCurve,
    near,
)
from flatmin.theory.functions import Square
from flatmin.theory.methods import run

PAIRS = ((0.1, 0.1), (0.01, 0.1), (0.3, 0.5))


def _run() -> DemonstrationResult:
    rows, claims, fall = [], [], []
    for number, (t, rho) in enumerate(PAIRS):
        trace = run(Square(), "sam", steps=t, radius=rho, updates=2000, record=2001, driver="program")
        measured, expected = float(trace.distance[-1]), orbit_square(t, rho)
        jump = float(trace.x[-1, 0] + trace.x[-2, 0])
        rows.append((t, rho, measured, expected, float(trace.x[-2, 0]), float(trace.x[-1, 0])))
        claims.append(near(f"t = {t:g}, rho = {rho:g}: |x| = t rho / (1 - t)", measured, expected, tol=1e-10))
        claims.append(near(f"t = {t:g}, rho = {rho:g}: x+ = -x, so x+ + x", jump, 0.0, tol=1e-10))
        part = slice(0, 401)
        label = f"t = {t:g}, ρ = {rho:g}"
        fall.append(PanelCurve(label=label, x=trace.k[part].astype(float), y=trace.distance[part], color=number))
    t, rho = PAIRS[-1]
    end = orbit_square(t, rho)
    first = run(Square(), "sam", steps=t, radius=rho, updates=20, driver="program")
    grid = np.linspace(-0.55, 0.55, 401)
    x = np.where(np.abs(grid) < 2e-3, np.nan, grid)
    return DemonstrationResult(
        title="The cycle of SAM on f(x) = x²",
        statement=(
            "For f(x) = x^2 SAM's update is x+ = (1 - 2t) x - 2 t rho sign(x). With constant t < 1 and rho, SAM ends "
            "on the cycle between t rho / (1 - t) and its negative, and does not converge to 0."
        ),
        columns=("t", "rho", "|x|", "t rho / (1 - t)", "x before", "x after"),
        rows=tuple(rows),
        claims=tuple(claims),
        panels=(
            Panel(
                title=f"the update as a map, t = {t:g}, ρ = {rho:g}",
                xlabel="x",
                ylabel="x after the update",
                curves=(
                    PanelCurve(label="x⁺ = (1−2t)x − 2tρ sign x", x=grid, y=(1 - 2 * t) * x - 2 * t * rho * np.sign(x)),
                    PanelCurve(label="x⁺ = −x", x=grid, y=-grid, style="theory"),
                    PanelCurve(
                        label="the cycle, ± tρ/(1−t)",
                        x=np.array([-end, end]),
                        y=np.array([end, -end]),
                        style="points",
                        color=1,
                    ),
                ),
            ),
            Panel(
                title=f"first updates from x = 1, t = {t:g}, ρ = {rho:g}",
                xlabel="update k",
                ylabel="xₖ",
                curves=(PanelCurve(label="", x=first.k.astype(float), y=first.x[:, 0], color=2),),
                levels=((end, f"tρ/(1−t) = {end:.4f}"), (-end, "")),
            ),
            Panel(
                title="each pair (t, ρ) ends on its own cycle",
                xlabel="update k",
                ylabel="|xₖ|",
                curves=tuple(fall),
                levels=tuple((orbit_square(*pair), "") for pair in PAIRS),
                log_y=True,
            ),
        ),
    )


ORBIT = Demonstration(
    "orbit",
    "constant steps on x^2: SAM cycles between t rho / (1 - t) and its negative",
    f"{PAPER}, Example 3.1; the cycle is derived here",
    _run,
)
