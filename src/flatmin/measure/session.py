"""What the sections of a report share: the problem, its settings, one Krylov run, and the form of their numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from flatmin.measure.curvature import Hessian
from flatmin.measure.krylov import Spectrum, spectrum
from flatmin.measure.problem import Conventions, Problem
from flatmin.measure.radius import Ascending, Closure
from flatmin.words import reason

Result = TypeVar("Result")
Flat = Literal["low", "high", ""]
Progress = Callable[[str, float], None]
Ascents = Callable[[], AbstractContextManager[tuple[Ascending, Sequence[Closure | Sequence[Closure]], float]]]


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """One number of a report.

    Args:
        name: key, such as "lambda_1".
        text: what it is, in words.
        value: the number.
        error: half width of what is known of it, in its own unit; 0 for a value exact to rounding, NaN if unknown.
        error_is: what the error is, such as "standard error", "residual", "a step could still add" or "rounding".
        flat: whether "low" or "high" values are called flat; "" for neither.
        note: what a reader must know besides, such as "not converged".
        conventions: what it was measured on.
    """

    name: str
    text: str
    value: float
    error: float = 0.0
    error_is: str = "rounding"
    flat: Flat = ""
    note: str = ""
    conventions: Conventions


@dataclass(frozen=True, kw_only=True, eq=False)
class ReportSection:
    """The part of a report that answers one question.

    Args:
        name: key in `flatmin.measure.sections.SECTIONS`.
        title: for a heading.
        quantities: the numbers.
        results: what the measures returned, by a name for a figure: Spectrum (without its vectors), Density, Curve or
            Slice.
        missing: what could not be measured -> why.
        seconds: it took, of wall time.
    """

    name: str
    title: str
    quantities: tuple[Quantity, ...]
    results: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """How a report is measured.

    Args:
        top: largest eigenvalues.
        bottom: smallest eigenvalues.
        tol: relative residual of the eigenvalues.
        trace_tol: relative standard error of trace, Frobenius norm and relative flatness.
        probes: most random probes for each.
        runs: start vectors of the density; 0: that of the Krylov run, which costs nothing.
        steps: of each.
        rho: l2 radius of worst and average cases.
        adaptive_rho: radius in multiples of |w|.
        linf_rho: l-infinity radius.
        rhos: radii of the curves, rising.
        ascent_steps: gradient steps of a worst case.
        m: examples in a group of m-sharpness; 0: no m-sharpness.
        draws: random displacements of average cases and PAC-Bayes noise.
        target: rise of the loss that PAC-Bayes noise may cause.
        points: of a line of the landscape, odd.
        plane: points of each side of the plane, odd; 0: no plane.
        span: half width of a random direction, in multiples of the filters' lengths.
        reach: half width along the top eigenvector, as a share of ||w||.
        seed: of everything that is drawn.

    Raises:
        ValueError: a value out of range.
    """

    top: int = 5
    bottom: int = 1
    tol: float = 1e-2
    trace_tol: float = 2e-2
    probes: int = 1000
    runs: int = 2
    steps: int = 80
    rho: float = 0.05
    adaptive_rho: float = 0.5
    linf_rho: float = 0.001
    rhos: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2)
    ascent_steps: int = 20
    m: int = 0
    draws: int = 10
    target: float = 0.1
    points: int = 41
    plane: int = 21
    span: float = 1.0
    reach: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tol", "trace_tol", "rho", "adaptive_rho", "linf_rho", "target", "span", "reach"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be above 0, got {value!r}.")
        ones = dict.fromkeys(("top", "steps", "ascent_steps"), 1)
        for name, least in {**ones, "runs": 0, "bottom": 0, "m": 0, "draws": 2, "probes": 2, "seed": 0}.items():
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name} must be a whole number, got {getattr(self, name)!r}.")
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)!r}.")
        for name in ("points", "plane"):
            value = getattr(self, name)
            if not (name == "plane" and value == 0) and (value < 3 or value % 2 == 0):
                raise ValueError(
                    f"{name} must be odd and at least 3, so that the model itself is a point; got {value!r}."
                )
        rising = all(a < b for a, b in itertools.pairwise((0.0, *self.rhos, math.inf)))
        if not self.rhos or not rising:
            raise ValueError(f"rhos must rise from above 0, got {self.rhos!r}.")


class Session:
    """A problem under measurement: what sections share, and what the present one has found.

    Args:
        problem: the function.
        settings: how it is measured.
        folder: where landscapes are kept, so that they continue where they were stopped; None: nowhere.
        progress: called with (what is measured, share of it done).
        ascents: gives the optimizer, closures of a few batches, and the share of the loss below which a rise is
            rounding, for what is measured of the method itself; None: no method is known.

    Attributes:
        quantities, results, missing: of the present section, see `ReportSection`.
    """

    def __init__(
        self,
        problem: Problem,
        settings: ReportSettings | None = None,
        *,
        folder: Path | None = None,
        progress: Progress | None = None,
        ascents: Ascents | None = None,
    ) -> None:
        self.problem, self.settings = problem, settings or ReportSettings()
        self.folder, self.ascents = folder, ascents
        self._progress = progress
        self._raised: Exception | None = None  # by progress
        self._krylov: Spectrum | str | None = None
        self.begin()

    def begin(self) -> None:
        """Begin a section, of which nothing is known yet."""
        self.quantities: list[Quantity] = []
        self.results: dict[str, Any] = {}
        self.missing: dict[str, str] = {}

    @cached_property
    def hessian(self) -> Hessian:
        """Of the problem."""
        return Hessian(self.problem)

    def tell(self, what: str, share: float) -> None:
        """Say what is being measured."""
        if self._progress is not None:
            try:
                self._progress(what, share)
            except Exception as error:
                self._raised = error
                raise

    @property
    def spectrum(self) -> Spectrum:
        """The Krylov run from which eigenvalues come, and which deflates the rest; tried once."""
        if self._krylov is None:
            try:
                self._krylov = self._run()
            except Exception as error:
                self._krylov = self._why(error)
                raise _KrylovError(self._krylov) from error
        if isinstance(self._krylov, str):
            raise _KrylovError(self._krylov)
        return self._krylov

    def _run(self) -> Spectrum:
        s, size = self.settings, self.problem.size
        top = min(s.top, size)
        return spectrum(
            self.hessian,
            top=top,
            bottom=min(s.bottom, size - top),
            tol=s.tol,
            seed=s.seed,
            progress=lambda products, residual: self.tell("eigenvalues", closeness(residual, s.tol)),
        )

    def landscape_file(self, name: str) -> Path | None:
        """The file of a landscape."""
        return None if self.folder is None else self.folder / f"{name}.pt"

    def add(self, name: str, text: str, value: float, **rest: Any) -> Quantity:
        """Add a number to the section, by the entries of `Quantity`; one that is not finite is noted as such."""
        if not math.isfinite(value):
            rest["note"] = "; ".join(filter(None, (f"the value is {value}", rest.get("note"))))
        quantity = Quantity(name=name, text=text, value=value, **{"conventions": self.problem.conventions} | rest)
        self.quantities.append(quantity)
        return quantity

    def attempt(self, what: str, measure: Callable[[], Result]) -> Result | None:
        """What a measure gives; where it fails it is missing under this name, with the reason, and None is given."""
        self.tell(what, 0.0)
        try:
            return measure()
        except Exception as error:
            self.missing[what] = str(error) if isinstance(error, _KrylovError) else self._why(error)
            return None

    def _why(self, error: Exception) -> str:
        """The reason for a number that is missing; what is no failure of a measure is raised again."""
        refused = isinstance(error, (ValueError, ArithmeticError, _KrylovError))
        # Processes of a group must continue alike, and what they refuse, all of them do.
        if error is self._raised or (self.problem.group is not None and not refused):
            raise error
        why = reason(error)
        # On the CPU torch raises a plain RuntimeError.
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in why:
            why += "; smaller batches or fewer examples need less memory"
            if "hessian" in vars(self):
                self.hessian.close()  # what it keeps is made again where it is needed
        return why


class _KrylovError(Exception):
    """The Krylov run has failed; the message is the reason."""


def closeness(error: float, tol: float) -> float:
    """How near an error is to what was asked, from 0 to 1, by orders of magnitude."""
    if not error > tol:
        return 1.0
    return 0.0 if not error < 1 or tol >= 1 else math.log(error) / math.log(tol)
