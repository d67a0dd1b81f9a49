"""Rates: set by the KL exponent for unnormalised methods, and by the step size for SAM."""

from __future__ import annotations

import numpy as np

from flatmin.theory.closed import factor
from flatmin.theory.demonstrations.demonstration import (
    PAPER,
    Claim,
    Demonstration,
    DemonstrationResult,
    Panel,
    PanelCurve,
    near,
    slope,
)
from flatmin.theory.functions import Function, Quadratic
from flatmin.theory.landscapes import Quartic
from flatmin.theory.methods import Trace, run
from flatmin.theory.parse import read_rule

Row = tuple[str | float, ...]
COLUMNS = ("f", "KL q", "method", "step", "y", "x", "predicted slope", "fitted slope")


def _run() -> DemonstrationResult:
    rows: list[Row] = []
    claims: list[Claim] = []
    panels = (_linear(rows, claims), _sublinear(rows, claims), _sam(rows, claims))
    return DemonstrationResult(
        title="Rates: set by the KL exponent for USAM, by the step size for SAM",
        statement=(
            "With KL exponent q = 1/2 and constant steps, gradient descent and USAM converge linearly: each update "
            "multiplies f - f* by (1 - t mu (1 + rho mu))^2, with rho = 0 for gradient descent. With q = 1/4, "
            "f - f* = O(k^-2) and |x| = O(k^-1/2). With vanishing steps, S_k = t_1 + ... + t_k replaces k. SAM is not "
            "faster than its cycle: ||grad f|| ~ t_k rho L^2 / 2 for steps with n t_n -> c, c L > 1, or n t_n -> inf. "
            "The table compares predicted and fitted slopes of y over x."
        ),
        columns=COLUMNS,
        rows=tuple(rows),
        claims=tuple(claims),
        panels=panels,
    )


def _note(rows: list[Row], claims: list[Claim], *cells: str | float, fitted: float, rel: float) -> None:
    rows.append((*cells, fitted))
    name, _, method, step, falls, against, predicted = cells
    text = f"{name}, {method}, t = {step}: slope of {falls} over {against}"
    claims.append(near(text, fitted, float(predicted), rel=rel))


def _sums(words: str | float, k: np.ndarray) -> np.ndarray:
    rule = read_rule(str(words))
    total = np.cumsum([rule.at(n) for n in range(1, int(k[-1]) + 1)])
    sums: np.ndarray = total[k - 1]
    return sums


def _linear(rows: list[Row], claims: list[Claim]) -> Panel:
    problem, rho = Quadratic([1.0, 4.0]), 0.1
    curves = []
    for number, (label, method, kind) in enumerate((("gradient", "sgd", "gradient"), ("USAM", "usam", "unnormalised"))):
        trace = run(problem, method, steps=0.1, radius=rho, updates=140, driver="program")
        predicted = 2 * float(np.log(abs(factor(kind, 0.1, rho, 1.0))))
        fitted = slope(trace.k[40:], np.log(trace.f[40:]))
        _note(rows, claims, "quadratic", 0.5, label, "0.1", "ln f", "k", predicted, fitted=fitted, rel=1e-3)
        k = trace.k.astype(float)
        curves.append(PanelCurve(label=f"{label}, slope {fitted:.4f}", x=k, y=trace.f, color=number))
        line = trace.f[40] * np.exp(predicted * (k - 40))
        curves.append(PanelCurve(label="predicted" if number else "", x=k, y=line, style="theory"))
    words = "harmonic:1,shift=4"
    trace = run(problem, "sgd", steps=words, updates=4000, driver="program")
    part = trace.k >= 100
    fitted = slope(_sums(words, trace.k[part]), np.log(trace.f[part]))
    _note(rows, claims, "quadratic", 0.5, "gradient", "1/(k+5)", "ln f", "S_k", -2.0, fitted=fitted, rel=0.01)
    return Panel(
        title="q = ½: eigenvalues 1 and 4, t = 0.1",
        xlabel="update k",
        ylabel="f(xₖ) − f*",
        curves=tuple(curves),
        log_y=True,
    )


def _sublinear(rows: list[Row], claims: list[Claim]) -> Panel:
    problem: Function = Quartic()
    curves: list[PanelCurve] = []
    trace: Trace
    for number, (label, method) in enumerate((("gradient", "sgd"), ("USAM", "usam"))):
        trace = run(problem, method, steps=0.1, radius=0.05, updates=20_000, driver="program")
        late = trace.k >= 2000
        k = np.log(trace.k[late])
        for what, values, predicted in (("ln f", trace.f, -2.0), ("ln |x|", trace.distance, -0.5)):
            fitted = slope(k, np.log(values[late]))
            _note(rows, claims, "x^4 / 4", 0.25, label, "0.1", what, "ln k", predicted, fitted=fitted, rel=0.02)
        if not number:
            seen = trace.k >= 1
            x = trace.k[seen].astype(float)
            curves.append(PanelCurve(label="f − f*", x=x, y=trace.f[seen], color=0))
            curves.append(PanelCurve(label="|x|", x=x, y=trace.distance[seen], color=1))
            ends = (trace.f[-1], trace.distance[-1])
            for end, power, name in zip(ends, (2.0, 0.5), ("k^−2 and k^−½", ""), strict=True):
                curves.append(PanelCurve(label=name, x=x[x > 9], y=end * (x[-1] / x[x > 9]) ** power, style="theory"))
    words = "power:c=0.5,p=0.5"
    trace = run(problem, "sgd", steps=words, updates=20_000, driver="program")
    late = trace.k >= 2000
    fitted = slope(np.log(_sums(words, trace.k[late])), np.log(trace.f[late]))
    _note(rows, claims, "x^4 / 4", 0.25, "gradient", "0.5/k^0.5", "ln f", "ln S_k", -2.0, fitted=fitted, rel=0.05)
    return Panel(
        title="q = ¼: x⁴/4, gradient descent, t = 0.1",
        xlabel="update k",
        ylabel="f(xₖ) − f* and |xₖ|",
        curves=tuple(curves),
        log_x=True,
        log_y=True,
    )


def _sam(rows: list[Row], claims: list[Claim]) -> Panel:
    problem, rho, top = Quadratic([1.0, 4.0]), 0.1, 4.0
    curves = []
    rules = (("1/(k+5)", "harmonic:1,shift=4", -1.0), ("0.5/k^0.5001", "power:c=0.5,p=0.5001", -0.5001))
    for number, (label, words, predicted) in enumerate(rules):
        trace = run(problem, "sam", steps=words, radius=rho, updates=20_000, driver="program")
        late = trace.k >= 2000
        fitted = slope(np.log(trace.k[late]), np.log(trace.gradient[late]))
        _note(rows, claims, "quadratic", 0.5, "SAM", label, "ln ||grad f||", "ln k", predicted, fitted=fitted, rel=0.02)
        seen = trace.k >= 1
        k = trace.k[seen].astype(float)
        curves.append(PanelCurve(label=f"t = {label}, slope {fitted:.3f}", x=k, y=trace.gradient[seen], color=number))
        line = np.array([read_rule(words).at(int(n)) for n in k[k > 9]]) * rho * top**2 / 2
        curves.append(PanelCurve(label="tₖρL²/2" if number else "", x=k[k > 9], y=line, style="theory"))
    return Panel(
        title="SAM, ρ = 0.1: like its steps if lim n·tₙ > 1/L",
        xlabel="update k",
        ylabel="‖∇f(xₖ)‖",
        curves=tuple(curves),
        log_x=True,
        log_y=True,
    )


RATES = Demonstration(
    "rates",
    "rates under the Kurdyka-Lojasiewicz property, predicted and fitted",
    f"{PAPER}, Section 4 for constant steps; the rates for vanishing steps and for SAM are derived here",
    _run,
)
