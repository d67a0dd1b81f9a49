"""The report of one network as a single image, with matplotlib (extra "plot")."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatmin.report.figures import static
from flatmin.report.figures.files import check_ending, write_figure
from flatmin.report.figures.scales import broken
from flatmin.report.measurements.figures import figures
from flatmin.study.measured import NetReport, with_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 2  # columns of figures, beside the column of numbers
_MOST = 26  # the most numbers that fit in their column
_WIDTH = 56  # the most characters of a line of notes


def picture(net: NetReport, *, on_missing: Callable[[str], None] = lambda text: None) -> Figure:
    """The numbers with their errors and the figure of each result, as one image.

    Args:
        net: the report.
        on_missing: called with a sentence for each figure that could not be drawn; the sentence replaces the figure.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (extra "plot").
    """
    shown = list(figures([net]))
    rows = max(2, math.ceil(len(shown) / _COLUMNS))
    made = static.new_figure(12.0, 3.1 * rows)
    with static.defaults():
        grid = made.add_gridspec(rows, 1 + _COLUMNS, width_ratios=[1.1, *[1.0] * _COLUMNS])
        made.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)
        _numbers(made.add_subplot(grid[:, 0]), net)
        for i, (title, figure) in enumerate(shown):
            place = grid[i // _COLUMNS, 1 + i % _COLUMNS]
            if isinstance(figure, str):
                on_missing(figure)
                axes = made.add_subplot(place)
                axes.axis("off")
                axes.text(0.0, 0.9, static.plain(figure), transform=axes.transAxes, va="top", wrap=True)
                continue
            axes = made.add_subplot(place, projection=static.projection(figure))
            static.draw(axes, figure, legend=True)
            note = f"  ({figure.note})" if figure.note else ""
            axes.set_title(static.plain(title + note), loc="left", fontsize=9)
    return made


def save(
    net: NetReport,
    path: str | os.PathLike[str],
    *,
    dpi: int = 150,
    on_missing: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write the image as .png, .svg or .pdf; see `picture`.

    Raises:
        ValueError: a different suffix.
        ModuleNotFoundError: matplotlib is not installed (extra "plot").
    """
    return write_figure(picture(net, on_missing=on_missing), check_ending(Path(path)), dpi=dpi)


def _numbers(axes: Axes, net: NetReport) -> None:
    """Draw the name and the numbers as text, in two columns."""
    axes.axis("off")
    c = net.report.conventions
    about = [
        f"mean {c.loss}, {c.examples} examples",
        c.split,
        f"{c.mode} mode, weight decay {c.weight_decay:g}",
        f"{c.size} weights ({c.params}), {c.dtype}",
    ]
    style: dict[str, Any] = {"transform": axes.transAxes, "va": "top"}
    height = 1.0 / (_MOST + len(about) + 4)
    axes.set_title(static.plain(net.name), loc="left", fontsize=13, fontweight="bold")
    for i, text in enumerate(about):
        axes.text(0.0, 1.0 - i * height, static.plain(text), color="#5b6470", **style)
    listed = list(net.report.quantities.values())
    for i, q in enumerate(listed[:_MOST]):
        y = 1.0 - (i + len(about) + 1) * height
        axes.text(0.0, y, static.plain(q.name), **style)
        axes.text(0.98, y, with_error(q.value, q.error) + (" *" if q.note else ""), ha="right", **style)
    notes = sorted({q.note for q in listed if q.note})
    if len(listed) > _MOST:
        notes.append(f"{len(listed) - _MOST} more in the table")
    if net.report.missing:
        notes.append(f"missing: {', '.join(net.report.missing)}")
    if notes:
        below = 1.0 - (min(len(listed), _MOST) + len(about) + 2) * height
        axes.text(0.0, below, static.plain(broken("* " + "; ".join(notes), _WIDTH)), **style)
    for written in axes.texts:
        written.set_in_layout(False)
