"""Run recipes, and gradient methods with a prescribed error, on functions with known constants."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flatmin.methods import Need, Recipe
from flatmin.theory.drive import Driver, Gradient, OptimizerDriver, ProgramDriver
from flatmin.theory.families import Error, Family, family
from flatmin.theory.functions import Function
from flatmin.theory.parse import as_radius, as_step
from flatmin.theory.rules import Rule, Tied
from flatmin.train.config import derive_seed

StepLike = Rule | float | str | Callable[[int], float]
RadiusLike = StepLike | Tied


@dataclass(frozen=True)
class Trace:
    """The recorded iterates x^k of a run.

    Attributes:
        k: numbers of updates, ascending from 0, shape (m,).
        f: f(x^k), shape (m,).
        gradient: ||grad f(x^k)||, shape (m,).
        distance: distance of x^k from the minimisers, shape (m,); nan if they are not known.
        t, rho: step size and radius of the update that led to x^k, number n = k; at k = 0 those of the first update.
        x: the iterates, shape (m, dim).
        stopped: why the run ended early; "" if it did not.
    """

    k: np.ndarray
    f: np.ndarray
    gradient: np.ndarray
    distance: np.ndarray
    t: np.ndarray
    rho: np.ndarray
    x: np.ndarray
    stopped: str = ""

    def at(self, k: int) -> int:
        """The index of the last recorded iterate with at most k updates."""
        return int(np.searchsorted(self.k, k, side="right")) - 1


def run(
    problem: Function,
    method: str | Recipe | Family = "sam",
    *,
    steps: StepLike,
    radius: RadiusLike = 0.0,
    updates: int,
    start: Tensor | None = None,
    record: int = 1000,
    driver: Literal["optimizer", "program"] = "optimizer",
    error: Error = "against",
    noise: float = 0.0,
    seed: int = 0,
    eps: float = 1e-12,
    **how: Any,
) -> Trace:
    """Run x^{k+1} = x^k - t_{k+1} u^k from x^0 in float64, with u^k from a method.

        >>> from flatmin.theory.functions import Square
        >>> trace = run(Square(), "sam", steps=0.1, radius=0.1, updates=300)
        >>> round(float(trace.distance[-1]), 10)
        0.0111111111

    Args:
        problem: the function f.
        method: a recipe (see `flatmin methods`); or "igd": u = grad f + e with ||e|| = eps_k; "igdr": u = grad f + e
            with ||e|| = nu_k ||grad f||; "extragradient": u = grad f(x - rho grad f(x)), an instance of igdr with
            nu = L rho, as no recipe has a negative radius. Default: "sam".
        steps: t_n > 0, n = 1, 2, ...: a rule, a number, text as in `read_rule`, or a function of n.
        radius: rho_n >= 0, in the same forms, or tied to the step; eps_n for igd, nu_n for igdr. Default: 0.0.
        updates: number of updates, >= 1.
        start: x^0, shape (dim,). Default: the start of the problem.
        record: number of iterates to keep. All are kept if there are fewer; otherwise about this number, evenly spaced
            in log k. Default: 1000.
        driver: "optimizer" for `flatmin.SAM(torch.optim.SGD([x]))`, or "program" for the same recipe without the
            optimizer, about three times as fast. Default: "optimizer".
        error: direction of e: "against" grad f (the worst for descent; beyond ||grad f|| the update ascends), "along"
            it (as for SAM to first order), or "random", uniform on the sphere. Default: "against".
        noise: standard deviation of a normal error of every coordinate of the gradient. It is drawn once per update and
            is the same in all passes of the update, like the error of a mini-batch. Recorded values are exact.
            Default: 0.0.
        seed: seed of random errors, of the noise and of random recipes. Default: 0.
        eps: added to norms in denominators. Default: 1e-12, as in `flatmin.SAM`.
        how: parameters of the recipe's parts, e.g. theta=0.4.

    Raises:
        ValueError: a step size that is not positive, an invalid start, negative noise, noise for a recipe with second
            derivatives, or text that cannot be read.
    """
    if updates < 1:
        raise ValueError(f"updates must be at least 1, got {updates!r}.")
    chosen = family(method, error=error, **how)
    t_rule = as_step(steps)
    rho_rule = as_radius(radius, t_rule)
    x0 = problem.start() if start is None else torch.as_tensor(start, dtype=torch.float64).detach().clone()
    if x0.shape != (problem.dim,) or not bool(torch.isfinite(x0).all()):
        raise ValueError(f"start must be {problem.dim} finite numbers, got {x0.tolist()!r}.")
    gradient = taken = inexact(problem, chosen, seed)
    if noise:
        if not 0 < noise < math.inf or Need.SECOND_ORDER in chosen.recipe.needs:
            raise ValueError(
                f"noise must be >= 0 and finite, and 0 for recipes with second derivatives, got {noise!r}."
            )
        taken = Noisy(gradient, noise, problem.dim, seed)
    runner: Driver
    if driver == "optimizer":
        first = positive(t_rule, 1)
        runner = OptimizerDriver(chosen.recipe, problem, taken, x0, seed=seed, eps=eps, first_t=first)
    elif driver == "program":
        runner = ProgramDriver(chosen.recipe, taken, x0, seed=seed, eps=eps)
    else:
        raise ValueError(f"driver must be 'optimizer' or 'program', got {driver!r}.")
    wanted = set(recorded(updates, record))
    rows: list[tuple[float, ...]] = []
    points: list[Tensor] = []
    framework = isinstance(gradient, Inexact)

    def note(k: int, t: float, rho: float) -> None:
        x = runner.x.clone()
        points.append(x)
        rows.append((k, float(problem.value(x)), float(problem.gradient(x).norm()), problem.distance(x), t, rho))

    note(0, positive(t_rule, 1), rho_rule.at(1))
    stopped = ""
    for n in range(1, updates + 1):
        t, rho = positive(t_rule, n), rho_rule.at(n)
        if framework:
            gradient.size = rho  # type: ignore[attr-defined]
        if isinstance(taken, Noisy):
            taken.draw()
        if not runner.update(t, 0.0 if framework else rho):
            stopped = f"the gradient is not finite at update {n}"
            break
        if n in wanted:
            note(n, t, rho)
    table = np.array(rows, dtype=np.float64).T
    f, norm, distance, ts, rhos = table[1:]
    k = table[0].astype(np.int64)
    return Trace(k, f, norm, distance, ts, rhos, torch.stack(points).numpy(), stopped)


class Inexact:
    """grad f(x) with an error. Its `size`, set before each update, is eps_k, nu_k, or rho for the extragradient."""

    def __init__(self, problem: Function, chosen: Family, seed: int) -> None:
        self._problem, self._family, self.size = problem, chosen, 0.0
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, x: Tensor) -> Tensor:
        g = self._problem.gradient(x)
        if self.size == 0:
            return g
        if self._family.kind == "extragradient":
            return self._problem.gradient(x - self.size * g)
        norm = float(g.norm())
        length = self.size * norm if self._family.kind == "relative" else self.size
        if self._family.error == "random":
            e = torch.randn(x.shape, dtype=x.dtype, generator=self._generator)
            return g + e * (length / float(e.norm()))
        if norm == 0:
            return g
        return g * (1 + (length if self._family.error == "along" else -length) / norm)


class Noisy:
    """A gradient plus a normal error that is constant until the next call of `draw`."""

    def __init__(self, gradient: Gradient, size: float, dim: int, seed: int) -> None:
        self._gradient, self._size, self._dim = gradient, size, dim
        self._generator = torch.Generator().manual_seed(derive_seed(seed, "theory noise"))
        self.draw()

    def draw(self) -> None:
        """Draw a new error."""
        self._error = self._size * torch.randn(self._dim, dtype=torch.float64, generator=self._generator)

    def __call__(self, x: Tensor) -> Tensor:
        return self._gradient(x) + self._error


def inexact(problem: Function, chosen: Family, seed: int = 0) -> Gradient:
    """The gradient that a run uses, with the error of igd, igdr or extragradient if the method is one of these."""
    framework = chosen.kind in ("absolute", "relative", "extragradient")
    return Inexact(problem, chosen, seed) if framework else problem.gradient


def positive(rule: Rule, n: int) -> float:
    """The step size of update n.

    Raises:
        ValueError: it is not positive.
    """
    t = rule.at(n)
    if not t > 0:
        raise ValueError(f"step sizes must be positive, but {rule} is {t:g} at n = {n}.")
    return t


def recorded(updates: int, record: int) -> list[int]:
    """The iterates that a run keeps: all of 0..updates, or about `record` of them evenly in log k, with both ends."""
    if record < 2:
        raise ValueError(f"record must be at least 2, for the first and the last iterate, got {record!r}.")
    if updates < record:
        return list(range(updates + 1))
    spaced = np.geomspace(1, updates, record - 1).round().astype(int)
    return sorted({0, *(int(k) for k in spaced), updates})
