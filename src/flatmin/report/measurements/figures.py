"""The figures of measured networks: of a single network, or of one network of each group."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flatmin.report.figures import contour, curve, density, eigenvalues, profile, rise
from flatmin.report.figures.chart import Drawable
from flatmin.report.figures.files import save_all
from flatmin.study.measured import NetReport, groups_of
from flatmin.words import reason

_RISES = {
    "worst": (
        "Worst case over the radius",
        "The largest rise of the loss that was found, a lower bound of the maximum.",
    ),
    "average": ("Average case over the radius", "Bars are standard errors."),
}


def figures(nets: Sequence[NetReport]) -> Iterator[tuple[str, Drawable | str]]:
    """Titles and figures; for a figure that cannot be drawn, a sentence with the reason.

    Args:
        nets: at least one network; of several, the figures show the first seed of each group.
    """
    several = len(nets) > 1
    shown = {name: min(members, key=lambda net: net.seed) for name, members in groups_of(nets).items()}
    whose = " The figure shows the network of the first seed of each group." if several else ""
    for title, caption, make in _makers(shown, several):
        try:
            yield title, replace(make(), title=title, caption=(caption + whose).strip())
        except Exception as error:
            yield title, f"{title} could not be drawn: {reason(error)}"


def save_figures(
    nets: Sequence[NetReport],
    folder: str | os.PathLike[str],
    endings: Sequence[str],
    *,
    on_missing: Callable[[str], None] = lambda text: None,
) -> list[Path]:
    """Write every figure to a file named after its title.

    Args:
        nets: see `figures`.
        folder: the folder; made if it does not exist.
        endings: suffixes among ".svg", ".pdf" and ".png"; see `flatmin.report.figures.files.endings`.
        on_missing: called with a sentence for each figure that could not be drawn.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (extra "plot").
        OSError: a file cannot be written.
    """
    shown = []
    for _, figure in figures(nets):
        if isinstance(figure, str):
            on_missing(figure)
        else:
            shown.append(figure)
    return [path for ending in endings for path in save_all(shown, folder, ending)]


def _makers(shown: Mapping[str, NetReport], several: bool) -> Iterator[tuple[str, str, Callable[[], Drawable]]]:
    def results(name: str) -> dict[str, Any]:
        found = {label: net.report.result(name) for label, net in shown.items()}
        return {label: result for label, result in found.items() if result is not None}

    def each(make: Callable[[Any], Drawable], name: str) -> Callable[[], Drawable]:
        """Make a figure of the result of a single network, or of the results of several by name."""
        return lambda: make(results(name) if several else next(iter(results(name).values())))

    if results("eigenvalues"):
        marks = "Filled marks are the largest eigenvalues, open marks the smallest. Bars are residuals."
        yield "Ends of the spectrum", marks, each(eigenvalues, "eigenvalues")
    if results("density"):
        yield "Spectral density", "The nodes of the quadrature, smoothed for the figure.", each(density, "density")
    if several:
        for name, (title, caption) in _RISES.items():
            if rises := results(name):
                yield title, caption, lambda rises=rises: _rises(rises)  # type: ignore[misc]
    elif rises := {f"{name} case": one for name in _RISES for one in results(name).values()}:
        captions = (
            "Worst case: the largest rise of the loss that was found, a lower bound of the maximum. Average case: bars "
            "are standard errors."
        )
        yield "Sharpness over the radius", captions, lambda: _rises(rises)
    if results("radius"):
        caption = (
            "Lines are means over the batches; bands reach from the smallest to the largest value. Dotted lines mark "
            "the radius beyond which the prediction fails."
        )
        yield "Rise of the loss along the method's ascent", caption, each(rise, "radius")
    if results("along_v1"):
        yield "Loss along the first eigenvector", "", each(profile, "along_v1")
    if results("along_random"):
        yield "Loss along a random direction", "The direction is filter-normalised.", each(profile, "along_random")
    for label, plane in results("plane").items():
        title = "Loss on a random plane" + (f": {label}" if several else "")
        yield title, "The directions are filter-normalised.", lambda plane=plane: contour(plane)  # type: ignore[misc]


def _rises(named: Mapping[str, Any]) -> Drawable:
    """Curves of the rise of the loss over rho, by name."""
    return curve(
        {k: (c.rhos, c.values, None if math.isnan(c.errors[0]) else c.errors) for k, c in named.items()},
        xlabel="rho",
        ylabel="rise of the loss",
        log_x=True,
        log_y=all(v > 0 for c in named.values() for v in c.values),
    )
