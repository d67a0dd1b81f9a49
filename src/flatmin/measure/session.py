"""State shared by the sections of a report: the problem, the settings, one Lanczos run, and the measured numbers."""

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
        text: description.
        value: the number.
        error: uncertainty of the value, in the same unit; 0 for a value exact to rounding, NaN if unknown. Default 0.
        error_is: kind of error, such as "standard error", "residual", "possible further rise" or "rounding". Default
            "rounding".
        flat: whether "low" or "high" values mean flat; "" for neither. Default "".
        note: remark for the reader, such as "not converged". Default "".
        conventions: conditions of the measurement.
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
    """One section of a report.

    Args:
        name: key in `flatmin.measure.sections.SECTIONS`.
        title: heading.
        quantities: the numbers.
        results: full results for figures, by name: `Spectrum` (without its vectors), `Density`, `SharpnessCurve`,
            `Slice` or `FoundRadius`. Default: none.
        missing: name of each measure that failed, and the reason. Default: none.
        seconds: wall time of the section. Default 0.
    """

    name: str
    title: str
    quantities: tuple[Quantity, ...]
    results: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Settings of a report.

    Args:
        top: number of largest eigenvalues.
        bottom: number of smallest eigenvalues.
        tol: relative residual of the eigenvalues.
        trace_tol: relative standard error of trace, Frobenius norm and relative flatness.
        probes: maximum number of random probes for each of these.
        runs: number of start vectors of the density; 0: use that of the eigenvalues, at no further cost.
        steps: Lanczos steps per start vector of the density.
        rho: l2 radius of worst-case and average-case sharpness.
        adaptive_rho: radius of adaptive sharpness, in multiples of |w|.
        linf_rho: l-infinity radius.
        rhos: radii of the sharpness curves, ascending.
        ascent_steps: number of gradient steps for worst-case sharpness.
        m: number of examples per group for m-sharpness; 0: no m-sharpness.
        draws: number of random displacements for average-case sharpness and PAC-Bayes noise.
        target: rise of the loss at which PAC-Bayes noise is measured.
        points: number of points of a landscape line, odd.
        plane: number of points per side of the landscape plane, odd; 0: no plane.
        span: half width of random directions, in multiples of the filter norms.
        reach: half width along the top eigenvector, as a share of ||w||.
        seed: seed of all random numbers.

    Raises:
        ValueError: a value is out of range.
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
                    f"{name} must be odd and at least 3, so that the model itself is one of the points, got {value!r}."
                )
        rising = all(a < b for a, b in itertools.pairwise((0.0, *self.rhos, math.inf)))
        if not self.rhos or not rising:
            raise ValueError(f"rhos must be finite, ascending and above 0, got {self.rhos!r}.")


class Session:
    """A report in progress: what the sections share, and the results of the current section.

    Args:
        problem: the function.
        settings: settings of the report. Default None: `ReportSettings()`.
        folder: folder in which landscapes are stored, so an interrupted one is continued. Default None: not stored.
        progress: called with (name of the measure, share done). Default None.
        ascents: returns a context with the optimizer, closures of a few batches, and the share of the loss below which
            a rise is rounding error. It is used by measures of the method itself. Default None: no method is known.

    Attributes:
        quantities, results, missing: those of the current section, see `ReportSection`.
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
        self._raised: Exception | None = None  # exception raised by `progress`
        self._krylov: Spectrum | str | None = None
        self.begin()

    def begin(self) -> None:
        """Begin a section: clear the results of the previous one."""
        self.quantities: list[Quantity] = []
        self.results: dict[str, Any] = {}
        self.missing: dict[str, str] = {}

    @cached_property
    def hessian(self) -> Hessian:
        """The Hessian of the problem."""
        return Hessian(self.problem)

    def tell(self, what: str, share: float) -> None:
        """Report progress: the name of the measure and the share done."""
        if self._progress is not None:
            try:
                self._progress(what, share)
            except Exception as error:
                self._raised = error
                raise

    @property
    def spectrum(self) -> Spectrum:
        """The Lanczos run for eigenvalues and deflation, computed at first use. If it fails, it is not repeated."""
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
        """The file in which a landscape is stored; None without a folder."""
        return None if self.folder is None else self.folder / f"{name}.pt"

    def add(self, name: str, text: str, value: float, **rest: Any) -> Quantity:
        """Add a number to the section, with the fields of `Quantity`. A value that is not finite gets a note."""
        if not math.isfinite(value):
            rest["note"] = "; ".join(filter(None, (f"the value is {value}", rest.get("note"))))
        quantity = Quantity(name=name, text=text, value=value, **{"conventions": self.problem.conventions} | rest)
        self.quantities.append(quantity)
        return quantity

    def attempt(self, what: str, measure: Callable[[], Result]) -> Result | None:
        """Return the result of a measure. If it fails, record the reason under `missing` and return None."""
        self.tell(what, 0.0)
        try:
            return measure()
        except Exception as error:
            self.missing[what] = str(error) if isinstance(error, _KrylovError) else self._why(error)
            return None

    def _why(self, error: Exception) -> str:
        """The reason why a measure failed. Exceptions that are not failures of a measure are raised again."""
        refused = isinstance(error, (ValueError, ArithmeticError, _KrylovError))
        # All processes of a group must continue in the same way. Only these errors occur in all of them.
        if error is self._raised or (self.problem.group is not None and not refused):
            raise error
        why = reason(error)
        # On the CPU, torch raises a plain RuntimeError if memory runs out.
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in why:
            why += "; use smaller batches or fewer examples"
            if "hessian" in vars(self):
                self.hessian.close()  # free the stored graphs, which are recomputed when needed
        return why


class _KrylovError(Exception):
    """The Lanczos run has failed. The message is the reason."""


def closeness(error: float, tol: float) -> float:
    """Progress of an error towards its tolerance on a logarithmic scale, from 0 to 1."""
    if not error > tol:
        return 1.0
    return 0.0 if not error < 1 or tol >= 1 else math.log(error) / math.log(tol)
