"""Reports: measure a problem by sections that share one Lanczos run. Each number has an error."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from flatmin.measure.problem import Conventions, Problem
from flatmin.measure.sections import SECTIONS
from flatmin.measure.session import Ascents, Progress, Quantity, ReportSection, ReportSettings, Session
from flatmin.words import suggest

__all__ = ["REPORT", "SECTIONS", "Quantity", "Report", "ReportSection", "ReportSettings", "chosen", "plain", "report"]

OF_METHOD = ("radius",)
"""Sections about a training method. The other sections need only a problem."""
REPORT = ("model", "hessian", "trace", "density", "sharpness", "landscape")
_LARGEST = 100_000
_VECTORS = {"basis", "top_vectors", "bottom_vectors", "displacement", "vector", "diagonal", "origin"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """The results of `report`.

    Args:
        sections: the sections, in the requested order.
        settings: settings of the measures.
        conventions: conventions of the problem.
    """

    sections: tuple[ReportSection, ...]
    settings: ReportSettings
    conventions: Conventions

    @property
    def quantities(self) -> dict[str, Quantity]:
        """All numbers by name."""
        return {q.name: q for section in self.sections for q in section.quantities}

    @property
    def missing(self) -> dict[str, str]:
        """Name of each measure that failed, and the reason."""
        return {what: why for section in self.sections for what, why in section.missing.items()}

    def result(self, name: str) -> Any:
        """The full result of a measure by name, such as "density"; None if there is none."""
        return next((s.results[name] for s in self.sections if name in s.results), None)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain numbers, strings, lists and dicts, for JSON."""
        return {
            "conventions": plain(self.conventions),
            "settings": plain(self.settings),
            "sections": {
                s.name: {
                    "title": s.title,
                    "quantities": {q.name: plain(q) for q in s.quantities},
                    "missing": s.missing,
                    "seconds": round(s.seconds, 3),
                    "results": {name: plain(result) for name, result in s.results.items()},
                }
                for s in self.sections
            },
        }


def report(
    problem: Problem,
    what: str | Sequence[str] = "report",
    *,
    settings: ReportSettings | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
    on_section: Callable[[Report], None] | None = None,
    ascents: Ascents | None = None,
) -> Report:
    """Measure a problem by sections, which share one Lanczos run.

    A measure that fails does not stop the others: its name and the reason are stored in `missing` of its section.

    Args:
        problem: the function.
        what: names of sections, as a list or separated by commas: "model", "hessian", "trace", "density", "sharpness",
            "flatness", "layers", "published", "landscape", "radius". "report" means all but flatness, layers,
            published and radius; "all" means all but radius. Default "report".
        settings: settings of the measures. Default None: `ReportSettings()`.
        folder: folder in which landscapes are stored and from which they are continued. Default None: not stored.
        progress: called with (name of the measure, share done). Default None.
        on_section: called after each section, and on an interrupt, with the report so far; sections that have not been
            measured are in `missing`. Default None.
        ascents: returns a context with the optimizer, closures of a few batches and the resolution, for "radius".
            Default None: no method is known.

    Returns:
        The report.

    Raises:
        ValueError: a section is unknown.
        KeyboardInterrupt: raised again after the call of `on_section`.

    Examples:
        >>> import torch
        >>> from flatmin.measure import Problem, report
        >>> net, x, y = torch.nn.Linear(4, 3), torch.randn(20, 4), torch.randint(3, (20,))
        >>> found = report(Problem(net, torch.nn.functional.cross_entropy, (x, y)), "model,hessian")
        >>> [q.name for q in found.sections[0].quantities]
        ['loss', 'error_rate', 'gradient_norm', 'weight_norm']
    """
    names = chosen(what)
    session = Session(problem, settings, folder=folder, progress=progress, ascents=ascents)
    sections = {name: _section(name, missing={SECTIONS[name][0]: "it was not reached."}) for name in names}

    def so_far() -> Report:
        return Report(sections=tuple(sections.values()), settings=session.settings, conventions=problem.conventions)

    for name in names:
        title, measure = SECTIONS[name]
        begun = time.perf_counter()
        session.begin()
        try:
            session.attempt(title, partial(measure, session))
        except BaseException as stop:
            session.missing[title] = f"it was interrupted ({type(stop).__name__})."
            raise
        finally:
            sections[name] = _section(
                name, session.quantities, session.results, session.missing, time.perf_counter() - begun
            )
            if on_section is not None:
                on_section(so_far())
        session.tell(name, 1.0)
    return so_far()


def _section(
    name: str,
    quantities: Sequence[Quantity] = (),
    results: dict[str, Any] | None = None,
    missing: dict[str, str] | None = None,
    seconds: float = 0.0,
) -> ReportSection:
    return ReportSection(
        name=name,
        title=SECTIONS[name][0],
        quantities=tuple(quantities),
        results=results or {},
        missing=missing or {},
        seconds=seconds,
    )


def chosen(what: str | Sequence[str]) -> list[str]:
    """Return the names of the requested sections, each once. Groups such as "report" and "all" are expanded.

    Raises:
        ValueError: a section is unknown, or there is none.
    """
    words = [word.strip() for word in (what.split(",") if isinstance(what, str) else what) if word.strip()]
    groups = {
        "report": REPORT,
        "card": REPORT,
        "all": tuple(name for name in SECTIONS if name not in OF_METHOD),
    }  # "card": an alias for compatibility
    unknown = [word for word in words if word not in groups and word not in SECTIONS]
    if unknown or not words:
        choices = ["report", "all", *SECTIONS]
        near = suggest(unknown[0], choices) if unknown else ""
        raise ValueError(f"what must be of {', '.join(choices)}; got {', '.join(unknown) or 'nothing'}{near or '.'}")
    return list(dict.fromkeys(name for word in words for name in groups.get(word, (word,))))


def plain(value: Any) -> Any:
    """Convert a result for JSON: numbers, strings, lists and dicts. Vectors of weights are omitted."""
    if isinstance(value, (str, bool, int, type(None))):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Tensor):
        return plain(value.tolist()) if value.dim() == 0 or value.numel() <= _LARGEST else None
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value) if f.name not in _VECTORS}
    return str(value)
