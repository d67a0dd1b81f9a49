"""An almost constant radius C / k^0.001 satisfies the theorem, and its runs match those with a constant radius."""

from __future__ import annotations

import math

import numpy as np

from flatmin.theory.checker import check
from flatmin.theory.demonstrations.demonstration import (
    PAPER,
    Claim,
    Demonstration,
    DemonstrationResult,
    Panel,
    PanelCurve,
    below,
    brief,
    near,
    same,
)
from flatmin.theory.functions import random_system
from flatmin.theory.landscapes import LogSum
from flatmin.theory.methods import run

SIZES, C, POWER, UPDATES = (2, 20, 50, 100), 0.1, 0.001, 1500
DRAWN = (2, 20, 100)
FLOORS = (0.1, 0.01, 0.001)


def _run() -> DemonstrationResult:
    rows: list[tuple[str | int | float, ...]] = []
    claims: list[Claim] = []
    panels = []
    almost = f"power:c={C!r},p={POWER!r}"
    for n in SIZES:
        problem = LogSum(*random_system(n, n, seed=n))
        steps = f"harmonic:1,shift={math.ceil(problem.function_class.L or 1)}"
        constant, falling = (
            run(problem, "sam", steps=steps, radius=r, updates=UPDATES, record=UPDATES + 1, driver="program")
            for r in (C, almost)
        )
        apart = float(np.abs(constant.f - falling.f).max())
        theorems = [brief(check(steps, r, problem).theorem) for r in (C, almost)]
        first = float(constant.f[0])
        rows.append((n, first, float(constant.f[-1]), float(falling.f[-1]), apart, *theorems))
        claims.append(below(f"n = {n}: largest difference of f over the run, in units of f(x^0)", apart / first, 1e-4))
        claims.append(same(f"n = {n}: theorem for the constant radius", theorems[0], "none"))
        claims.append(same(f"n = {n}: theorem for the almost constant radius", theorems[1], "Corollary 3.5"))
        if n in DRAWN:
            plain = run(problem, "sgd", steps=steps, updates=UPDATES, driver="program", record=400)
            k = constant.k[1:].astype(float)
            shown = (
                PanelCurve(label="gradient descent", x=plain.k[1:].astype(float), y=plain.f[1:], color=2),
                PanelCurve(label=f"SAM, ρ = {C:g}", x=k, y=constant.f[1:], color=0),
                PanelCurve(label=f"SAM, ρ = {C:g} / k^{POWER:g}", x=k, y=falling.f[1:], style="theory", color=1),
            )
            title = f"n = {n}: SAM runs differ by at most {apart:.0e}"
            panels.append(Panel(title=title, xlabel="update k", ylabel="f(xₖ)", curves=shown, log_x=True))
    panels.append(_floors(claims))
    return DemonstrationResult(
        title="An almost constant radius satisfies the theorem, and the runs hardly change",
        statement=(
            "The function is sum log(1 + (A x - b)_i^2), and t = 1/(k + 1 + L) with L rounded up. SAM takes almost "
            f"the same path with rho = {C:g} and with rho = {C:g}/k^{POWER:g}, but only the second radius satisfies "
            "sum t rho < inf. With the constant step 1/L, SAM ends at a gradient norm that is proportional to rho."
        ),
        columns=(
            "n",
            "f(x^0)",
            f"f, rho = {C:g}",
            f"f, {C:g}/k^{POWER:g}",
            "max difference",
            "theorem, constant",
            "theorem, almost constant",
        ),
        rows=tuple(rows),
        claims=tuple(claims),
        panels=tuple(panels),
    )


def _floors(claims: list[Claim]) -> Panel:
    problem = LogSum.random(20)
    curves, ends = [], []
    step = 1 / (problem.function_class.L or 1)
    for rho in FLOORS:
        trace = run(problem, "sam", steps=step, radius=rho, updates=1500, driver="program")
        ends.append(float(trace.gradient[-1]))
        curves.append(PanelCurve(label=f"ρ = {rho:g}", x=trace.k[1:].astype(float), y=trace.gradient[1:]))
    for wide, narrow, rho in zip(ends, ends[1:], FLOORS[1:], strict=False):
        text = f"constant step 1/L: ||grad f|| of rho = {10 * rho:g} over that of {rho:g}"
        claims.append(near(text, wide / narrow, 10, rel=0.3))
    return Panel(
        title="constant step 1/L, n = 20: floor proportional to ρ",
        xlabel="update k",
        ylabel="‖∇f(xₖ)‖",
        curves=tuple(curves),
        log_x=True,
        log_y=True,
    )


RADIUS = Demonstration(
    "radius",
    "an almost constant radius C/k^0.001: the theorem applies, and runs match those with a constant radius",
    f"{PAPER}, Remark 3.6 and the experiments of the appendix, on systems drawn here",
    _run,
)
