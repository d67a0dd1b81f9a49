"""Stochastic gradients: with constant steps f - f* ends at a positive floor, with diminishing steps at 0."""

from __future__ import annotations

import itertools
import math

import numpy as np

from flatmin.theory.demonstrations.demonstration import (
    Claim,
    Demonstration,
    DemonstrationResult,
    Panel,
    PanelCurve,
    below,
    near,
    slope,
)
from flatmin.theory.functions import Quadratic
from flatmin.theory.methods import Trace, run
from flatmin.theory.parse import read_rule
from flatmin.theory.rules import Rule

DIM, SIGMA, RHO = 200, 0.3, 0.1
LENGTH = SIGMA * math.sqrt(DIM)
SPECTRUM = np.linspace(1.0, 4.0, DIM)
STEPS = ("0.1", "0.03", "0.01")
FALLING = "harmonic:1,shift=9"
METHODS = (("SGD", "sgd", 0.0), ("USAM", "usam", RHO), ("SAM", "sam", RHO / LENGTH))
"""Label, method, and the radius of USAM for which the same formula holds, approximately for SAM."""
UPDATES = 4000


def floor(t: float, rho: float) -> float:
    """The stationary mean of f - f* for USAM with constant steps and normal noise; rho = 0 for SGD.

    x+ = (1 - t lambda c) x - t c e with c = 1 + rho lambda has the stationary variance t c sigma^2 / (lambda
    (2 - t lambda c)) along each eigenvector, so f - f* = sum t c sigma^2 / (2 (2 - t lambda c)).
    """
    c = 1 + rho * SPECTRUM
    return float((t * c * SIGMA**2 / (2 * (2 - t * SPECTRUM * c))).sum())


def means(steps: Rule, rho: float, start: np.ndarray, updates: int) -> np.ndarray:
    """The mean of f - f* for k = 0, ..., updates: v+ = (1 - t lambda c)^2 v + (t c sigma)^2 for E x^2, from x^0."""
    c, v = 1 + rho * SPECTRUM, start**2
    values = [float(0.5 * (SPECTRUM * v).sum())]
    for n in range(1, updates + 1):
        t = steps.at(n)
        v = (1 - t * SPECTRUM * c) ** 2 * v + (t * c * SIGMA) ** 2
        values.append(float(0.5 * (SPECTRUM * v).sum()))
    return np.array(values)


def _run() -> DemonstrationResult:
    problem = Quadratic(SPECTRUM.tolist())
    rows: list[tuple[str | float, ...]] = []
    claims: list[Claim] = []
    plain: dict[str, float] = {}
    left: list[PanelCurve] = []
    right: list[PanelCurve] = []
    grid = np.geomspace(5e-3, 0.2, 60)
    for number, (label, method, rho) in enumerate(METHODS):
        floors: list[float] = []
        for words in (*STEPS, FALLING):
            trace = _noisy(problem, method, words)
            late = slice(UPDATES // 2, None)
            mean = float(trace.f[late].mean())
            if words == FALLING:
                predicted = means(read_rule(words), rho, trace.x[0], UPDATES)
                expected = float(predicted[late].mean())
                fitted = slope(np.log(trace.k[400:]), np.log(trace.f[400:]))
                claims.append(near(f"{label}, t = 1/(k+10): slope of ln f over ln k", fitted, -1.0, tol=0.05))
                claims.append(
                    below(f"{label}, t = 1/(k+10): f - f* is at most a fifth of the lowest floor", mean, floors[-1] / 5)
                )
            else:
                expected = floor(float(words), rho)
                floors.append(mean)
            name = "1/(k+10)" if words == FALLING else words
            rows.append((label, name, mean, expected))
            claims.append(near(f"{label}, t = {name}: mean f - f*, last half", mean, expected, rel=0.05))
            if method == "sgd":
                plain[name] = mean / expected
            else:  # the noise is the same, so that its randomness cancels
                text = f"{label}, t = {name}: ratio to SGD with the same noise, relative to the predicted ratio"
                claims.append(near(text, mean / expected / plain[name], 1.0, rel=0.01))
            if method == "sam":
                left.append(_smoothed(f"t = {name}", trace))
                if words == FALLING:
                    k = np.arange(1.0, UPDATES + 1)
                    left.append(PanelCurve(label="predicted", x=k, y=predicted[1:], style="theory"))
        steps = np.array([float(words) for words in STEPS])
        right.append(PanelCurve(label=label, x=steps, y=np.array(floors), style="points", color=number))
        y = np.array([floor(float(t), rho) for t in grid])
        right.append(PanelCurve(label="predicted" if number == 2 else "", x=grid, y=y, style="theory", color=number))
    return DemonstrationResult(
        title="With noise, constant steps end at a floor, diminishing steps at the minimiser",
        statement=(
            f"A quadratic of {DIM} variables with normal noise of standard deviation {SIGMA:g} on every coordinate of "
            "the gradient, the same in both passes of an update. With constant steps, f - f* ends at the mean "
            "sum t c sigma^2 / (2 (2 - t lambda c)), with c = 1 for SGD and c = 1 + rho lambda for USAM. For SAM, "
            "c = 1 + rho lambda / s is an approximation for many variables: the noise, of length about "
            "s = sigma sqrt(n), is much longer than the gradient, so normalising divides by about s. With "
            "t = 1/(k + 10), f - f* falls like 1/k."
        ),
        columns=("method", "t", "mean f - f*, last half", "predicted"),
        rows=tuple(rows),
        claims=tuple(claims),
        panels=(
            Panel(
                title=f"SAM, ρ = {RHO:g}",
                xlabel="update k",
                ylabel="f(xₖ) − f*, local mean",
                curves=tuple(left),
                levels=tuple((floor(float(words), METHODS[2][2]), "") for words in STEPS),
                log_x=True,
                log_y=True,
            ),
            Panel(
                title="the floor over the step size",
                xlabel="constant step t",
                ylabel="final mean of f − f*",
                curves=tuple(right),
                log_x=True,
                log_y=True,
            ),
        ),
    )


def _noisy(problem: Quadratic, method: str, words: str) -> Trace:
    return run(
        problem, method, steps=words, radius=RHO, updates=UPDATES, record=UPDATES + 1, driver="program", noise=SIGMA
    )


def _smoothed(label: str, trace: Trace) -> PanelCurve:
    """Means of f over intervals that are equally long in log k."""
    ends = np.unique(np.geomspace(1, len(trace.k), 70).round().astype(int))
    pairs = list(itertools.pairwise(ends.tolist()))
    x = np.array([math.sqrt(a * b) for a, b in pairs])
    return PanelCurve(label=label, x=x, y=np.array([float(trace.f[a:b].mean()) for a, b in pairs]))


NOISE = Demonstration(
    "noise",
    "stochastic gradients: constant steps end at a floor, diminishing steps converge",
    "Derived here; the convergence paper treats full gradients",
    _run,
)
