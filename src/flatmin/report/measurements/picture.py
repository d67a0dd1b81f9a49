"""The report of one net as one picture, with matplotlib (extra "plot")."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatmin.report.figures import content as plots
from flatmin.report.figures import static as draw
from flatmin.study.measured import NetReport, with_error
from flatmin.words import reason

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 3
_ENDS = "Ends of the spectrum"
_MOST = 26  # numbers that fit beside the pictures


def require() -> None:
    """Check that pictures can be drawn, before a long job starts.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (extra "plot").
    """
    draw.new_figure(1.0, 1.0)


def report(net: NetReport, *, on_missing: Callable[[str], None] = lambda text: None) -> Figure:
    """Numbers with their errors, and a picture of each result: one page.

    Args:
        net: what was measured.
        on_missing: called with a sentence for each picture that could not be drawn; the sentence replaces the picture.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (extra "plot").
    """
    panels = [(title, onto) for title, onto in _panels(net) if onto is not None]
    rows = max(2, math.ceil(len(panels) / (_COLUMNS - 1)))
    figure = draw.new_figure(15.0, 3.9 * rows)
    grid = figure.add_gridspec(rows, _COLUMNS, width_ratios=[1.15, 1.0, 1.0])
    figure.suptitle(net.name, x=0.01, ha="left", fontsize=15, fontweight="bold")
    _numbers(figure.add_subplot(grid[:, 0]), net)
    for i, (title, onto) in enumerate(panels):
        axes = figure.add_subplot(grid[i // (_COLUMNS - 1), 1 + i % (_COLUMNS - 1)])
        try:
            onto(axes)
        except Exception as error:
            axes.clear()
            axes.axis("off")
            text = f"{title} could not be drawn: {reason(error)}"
            on_missing(text)
            axes.text(0.0, 0.9, text.replace("$", r"\$"), transform=axes.transAxes, va="top", wrap=True)
            continue
        if axes.get_xscale() == "linear" and title != _ENDS:
            axes.locator_params(axis="x", nbins=6)
        note = axes.get_title(loc="left")
        axes.set_title(title + (f"  ({note})" if note else ""), loc="left", fontsize=10.5)
    return figure


def save(
    net: NetReport,
    path: str | os.PathLike[str],
    *,
    dpi: int = 120,
    on_missing: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write the report as .png, .svg or .pdf; see `report`.

    Raises:
        ValueError: another ending.
        ModuleNotFoundError: matplotlib is not installed (extra "plot").
    """
    return draw.save(report(net, on_missing=on_missing), path, dpi=dpi)


def _panels(net: NetReport) -> list[tuple[str, Callable[[Axes], None] | None]]:
    result = net.report.result

    def lines(result: Any, make: Callable[[Any], plots.Lines]) -> Callable[[Axes], None] | None:
        return None if result is None else lambda axes: draw.lines_onto(axes, make(result))

    def curves(named: dict[str, Any]) -> plots.Lines:
        return plots.curve(
            {k: (c.rhos, c.values, None if math.isnan(c.errors[0]) else c.errors) for k, c in named.items()},
            xlabel="rho",
            ylabel="rise of the loss",
            log_x=True,
            log_y=all(v > 0 for c in named.values() for v in c.values),
        )

    both = {k: c for k, c in (("worst case", result("worst")), ("average case", result("average"))) if c is not None}
    plane = result("plane")
    return [
        (_ENDS, lines(result("eigenvalues"), plots.eigenvalues)),
        ("Spectral density", lines(result("density"), plots.density)),
        ("Sharpness", lines(both or None, curves)),
        ("Along the first eigenvector", lines(result("along_v1"), plots.profile)),
        ("Along a random direction", lines(result("along_random"), plots.profile)),
        ("Random plane", None if plane is None else lambda axes: draw.plane_onto(axes, plots.field(plane))),
    ]


def _numbers(axes: Axes, net: NetReport) -> None:
    """The numbers as text, in two columns."""
    axes.axis("off")
    c = net.report.conventions
    about = [
        f"mean {c.loss}, {c.examples} examples",
        c.split,
        f"{c.mode} mode, weight decay {c.weight_decay:g}",
        f"{c.size} weights ({c.params}), {c.dtype}",
    ]
    style: dict[str, Any] = {"transform": axes.transAxes, "va": "top", "fontsize": 9.5}
    height = 1.0 / (_MOST + len(about) + 2)
    for i, text in enumerate(about):
        axes.text(0.0, 1.0 - i * height, text, color="#5b6470", **style)
    listed = list(net.report.quantities.values())
    for i, q in enumerate(listed[:_MOST]):
        y = 1.0 - (i + len(about) + 1) * height
        axes.text(0.0, y, q.name.replace("$", r"\$"), **style)
        axes.text(0.98, y, with_error(q.value, q.error) + (" *" if q.note else ""), ha="right", **style)
    notes = sorted({q.note for q in listed if q.note})
    if len(listed) > _MOST:
        notes.append(f"{len(listed) - _MOST} more in the table")
    if net.report.missing:
        notes.append(f"not there: {', '.join(net.report.missing)}")
    if notes:
        axes.text(0.0, 1.0 - (min(len(listed), _MOST) + len(about) + 2) * height, "* " + "; ".join(notes), **style)
