"""Unnormalised SAM converges with constant steps for rho < 1/L, and examples with longer steps and larger radii."""

from __future__ import annotations

import math

import numpy as np

from flatmin.theory.checker import check
from flatmin.theory.closed import factor, largest_step
from flatmin.theory.demonstrations.demonstration import (
    PAPER,
    Claim,
    Demonstration,
    DemonstrationResult,
    Panel,
    PanelCurve,
    above,
    below,
    brief,
    near,
    seen,
)
from flatmin.theory.functions import Quadratic
from flatmin.theory.landscapes import LogSum, Wave
from flatmin.theory.methods import Trace, run

NUS = (0.0, 0.3, 0.6, 0.9)
STEPS = (0.1, 0.2, 0.3, 0.4)
RADII = (0.5, 2.0, 6.0)
Row = tuple[str | float, ...]


def landing(rho: float, target: float, low: float, high: float) -> float:
    """The x in [low, high] with x + rho sin x = target, by bisection; the left side must rise there."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if middle + rho * math.sin(middle) < target else (low, middle)
    return (low + high) / 2


def _run() -> DemonstrationResult:
    rows: list[Row] = []
    claims: list[Claim] = []
    below_bound = _below_the_bound(rows, claims)
    long_steps = _long_steps(rows, claims)
    wide_radii = _wide_radii(rows, claims)
    return DemonstrationResult(
        title="USAM converges with constant steps below a bound",
        statement=(
            "For nu = L rho < 1 and t < 2 (1 - nu) / (L (1 + nu)^2), f falls at every update of USAM. The functions "
            "are a log-sum of 5 variables, a quadratic and 1 - cos x. With a longer step, USAM overshoots where f "
            "curves upwards. With a radius beyond 1/L, x + eps can be beyond a maximum of f; USAM then ascends, or "
            "stops at a point that is not stationary."
        ),
        columns=("f", "rho L", "t", "f always falls", "largest rise", "final ||grad f||", "theorem"),
        rows=tuple(rows),
        claims=tuple(claims),
        panels=(below_bound, long_steps, wide_radii),
    )


def _row(name: str, nu: float, t: float, trace: Trace, theorem: str | None) -> Row:
    rise = max(float(np.diff(trace.f).max()), 0.0)
    falls = "yes" if rise <= 1e-12 else "no"
    return (name, nu, t, falls, rise, float(trace.gradient[-1]), brief(theorem))


def _below_the_bound(rows: list[Row], claims: list[Claim]) -> Panel:
    problem = LogSum.random(5)
    L = problem.function_class.L or math.nan
    curves = []
    for nu in NUS:
        t = 0.99 * largest_step(L, nu)
        trace = run(problem, "usam", steps=t, radius=nu / L, updates=500, driver="program")
        row = _row("log-sum", nu, t, trace, check(t, nu / L, problem, "usam").theorem)
        rows.append(row)
        claims.append(below(f"log-sum, rho L = {nu:g}, t = {t:.4g}: largest rise of f", float(row[4]), 1e-12))
        y = seen(trace.f)
        curves.append(PanelCurve(label=f"ρL = {nu:g}, t = {t:.3g}", x=trace.k.astype(float), y=y))
    return Panel(
        title="below both bounds: f always falls",
        xlabel="update k",
        ylabel="f(xₖ) − f*",
        curves=tuple(curves),
        log_y=True,
    )


def _long_steps(rows: list[Row], claims: list[Claim]) -> Panel:
    problem, rho = Quadratic([1.0, 4.0]), 0.1
    bound = largest_step(4.0, 0.4)
    curves = []
    for t in STEPS:
        trace = run(problem, "usam", steps=t, radius=rho, updates=60, driver="program")
        by = factor("unnormalised", t, rho, 4.0)
        rows.append(_row("quadratic 1, 4", 4 * rho, t, trace, check(t, rho, problem, "usam").theorem))
        measured = abs(float(trace.x[10, 1] / trace.x[9, 1]))
        claims.append(
            near(f"quadratic, t = {t:g}: factor |1 - t L (1 + rho L)| per update", measured, abs(by), rel=1e-9)
        )
        if t == 0.2:
            text = f"quadratic, t = 0.2, longer than the bound {bound:.3f}: final ||grad f||"
            claims.append(below(text, float(trace.gradient[-1]), 1e-5))
        if t == 0.4:
            claims.append(
                above("quadratic, t = 0.4: smallest rise of f after 10 updates", _least_rise(trace, 10), 1e-3)
            )
        y = trace.distance
        curves.append(PanelCurve(label=f"t = {t:g}, factor {by:.2g}", x=trace.k.astype(float), y=y))
    return Panel(
        title=f"longer steps, ρL = 0.4; the bound is {bound:.3f}",
        xlabel="update k",
        ylabel="distance to the minimiser",
        curves=tuple(curves),
        log_y=True,
    )


def _least_rise(trace: Trace, begin: int) -> float:
    return float(np.diff(trace.f[begin:]).min())


def _wide_radii(rows: list[Row], claims: list[Claim]) -> Panel:
    problem, t = Wave(), 0.1
    stop = landing(6.0, 2 * math.pi, 0.5, 1.3)
    ends = (0.0, math.pi, stop)
    says = ("the minimiser", "a maximiser", "a point with x + rho f'(x) = 2 pi")
    curves = []
    for rho, end, word in zip(RADII, ends, says, strict=True):
        trace = run(problem, "usam", steps=t, radius=rho, updates=400, driver="program")
        rows.append(_row("1 - cos x", rho, t, trace, check(t, rho, problem, "usam").theorem))
        claims.append(near(f"1 - cos x, rho = {rho:g}: ends at {word}", float(trace.x[-1, 0]), end, tol=1e-8))
        part = slice(0, 101)
        curves.append(PanelCurve(label=f"ρ = {rho:g}", x=trace.k[part].astype(float), y=trace.x[part, 0]))
    text = "1 - cos x, rho = 6: |f'| where it stops"
    claims.append(near(text, float(rows[-1][5]), math.sin(stop), tol=1e-8))
    return Panel(
        title="larger radii: f(x) = 1 − cos x, L = 1, t = 0.1",
        xlabel="update k",
        ylabel="xₖ",
        curves=tuple(curves),
        levels=((math.pi, "the maximum"), (stop, f"not stationary, |f'| = {math.sin(stop):.2f}"), (0.0, "the minimum")),
        low=-0.25,
        high=3.6,
    )


USAM = Demonstration(
    "usam",
    "constant steps: USAM converges for rho < 1/L; examples beyond the bounds",
    f"{PAPER}, Section 4; the bound on t and the examples beyond it are derived here",
    _run,
)
