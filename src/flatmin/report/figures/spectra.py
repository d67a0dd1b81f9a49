"""Figures of spectra, of sharpness over a radius, and of curvature during training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from flatmin.measure.follow import Point
from flatmin.measure.krylov import Spectrum
from flatmin.measure.trace import Density
from flatmin.report.figures.chart import Axis, Chart, Series
from flatmin.report.figures.scales import count, is_wide, shifts
from flatmin.report.style import styles, tone

_WIDTHS = 100  # the range of a density, in default widths of the Gaussian
_ASIDE, _ROOM = 0.22, 0.66  # distance between marks of neighbouring groups and of all groups, in ranks


def density(shown: Density | Mapping[str, Density], *, width: float | None = None) -> Chart:
    """Smoothed spectral densities on a logarithmic axis, down to a tenth of the density of a single eigenvalue.

    Args:
        shown: a density, or several by name.
        width: standard deviation of the Gaussian, in the eigenvalues' unit. Default: a hundredth of the nodes' range.

    Raises:
        ValueError: there is nothing to draw, or the width is not positive.
    """
    named = dict(shown) if isinstance(shown, Mapping) else {"": shown}
    nodes = [float(n) for d in named.values() for n in d.nodes[d.weights > 0]]
    if not nodes:
        raise ValueError("the density has no nodes, so there is nothing to draw.")
    low, high = min(nodes), max(nodes)
    sigma = width if width is not None else ((high - low) / _WIDTHS or abs(high) / _WIDTHS or 1.0)
    grid = torch.linspace(low - 5 * sigma, high + 5 * sigma, 2000, dtype=torch.float64)
    style = styles(list(named))
    series = []
    for name, d in named.items():
        y = d.smoothed(grid, sigma).tolist()
        hover = [f"{name}\nλ {a:.4g}: {b:.3g}".strip() for a, b in zip(grid.tolist(), y, strict=True)]
        own = style[name]
        series.append(Series(label=name, x=grid.tolist(), y=y, tone=own.tone, dash=own.dash, hover=hover, group=name))
    peak = 1.0 / (sigma * math.sqrt(2 * math.pi))
    sizes = [d.conventions.size for d in named.values() if d.conventions is not None]
    floor = 0.1 * peak / max(sizes) if sizes else 1e-8 * peak
    return Chart(
        title="Spectral density",
        x=Axis(label="eigenvalue λ"),
        y=Axis(
            label=f"spectral density (Gaussian, σ = {sigma:.2g})",
            log=True,
            range=(floor, 2.0 * max(max(one.y) for one in series)),
        ),
        series=series,
        legend=len(series) > 1,
    )


def eigenvalues(shown: Spectrum | Mapping[str, Spectrum]) -> Chart:
    """The largest and smallest eigenvalues by rank, with the residuals ||H v - λ v|| as error bars.

    Filled marks are the largest eigenvalues, open marks the smallest. Marks of several spectra are placed side by side.

    Raises:
        ValueError: there is nothing to draw.
    """
    named = dict(shown) if isinstance(shown, Mapping) else {"": shown}
    style = styles(list(named))
    series, loose = [], []
    for (name, run), shift in zip(named.items(), shifts(len(named), _ASIDE, _ROOM), strict=True):
        for end, word in (("top", "largest"), ("bottom", "smallest")):
            values = getattr(run, end).numpy()
            if not len(values):
                continue
            label = f"{name}, {word}" if name else word
            error = getattr(run, f"{end}_residuals").numpy() * np.abs(values)
            series.append(
                Series(
                    label=label,
                    x=(np.arange(1.0, len(values) + 1) + shift).tolist(),
                    y=values.tolist(),
                    kind="marks",
                    tone=style[name].tone,
                    symbol=style[name].symbol,
                    filled=end == "top",
                    y_interval=((values - error).tolist(), (values + error).tolist()),
                    hover=[
                        f"{label}\n{rank}: {v:.6g} ± {e:.2g}"
                        for rank, (v, e) in enumerate(zip(values, error, strict=True), 1)
                    ],
                    group=name,
                )
            )
        loose += [] if run.converged else [f"{name or 'the run'} has not converged"]
    if not series:
        raise ValueError("the spectrum has no eigenvalues, so there is nothing to draw.")
    most = max(len(one.x) for one in series)
    step = math.ceil(most / 12)
    ranks = [1, *range(step, most + 1, step)] if step > 1 else range(1, most + 1)
    return Chart(
        title="Ends of the spectrum",
        x=Axis(
            label="rank from the end of the spectrum",
            ticks={float(rank): str(rank) for rank in ranks},
            range=(0.5, most + 0.5),
        ),
        y=Axis(label="eigenvalue λ (bars: residual ‖Hv − λv‖)"),
        series=series,
        note="; ".join(loose),
        legend=len(series) > 1,
    )


def curve(
    shown: Mapping[str, Sequence[Any]], *, xlabel: str, ylabel: str, log_x: bool = False, log_y: bool = False
) -> Chart:
    """Lines with error bars, such as a sharpness over rho.

    Args:
        shown: label -> (x, y) or (x, y, error), where error is half the length of the error bars.
        xlabel: label with the unit.
        ylabel: label with the unit.
        log_x: whether the x axis is logarithmic.
        log_y: whether the y axis is logarithmic.

    Raises:
        ValueError: there is nothing to draw, the lengths differ, or an error is negative.
    """
    style = styles(list(shown))
    series, lost = [], 0
    for label, parts in shown.items():
        if len(parts) not in (2, 3):
            raise ValueError(f"{label!r} must be (x, y) or (x, y, error), got {len(parts)} parts.")
        x, y = (np.asarray(part, dtype=np.float64) for part in parts[:2])
        error = np.asarray(parts[2], dtype=np.float64) if len(parts) == 3 and parts[2] is not None else None
        if x.ndim != 1 or x.shape != y.shape or (error is not None and error.shape != x.shape):
            shapes = [a.shape for a in (x, y, error) if a is not None]
            raise ValueError(f"x, y and error of {label!r} must be lists of the same length, got {shapes}.")
        if error is not None and (error < 0).any():
            raise ValueError(f"{label!r} has a negative error.")
        bad = ~np.isfinite(y)
        lost += int(bad.sum())
        heights = np.where(bad, np.nan, y).tolist()
        own = style[label]
        series.append(
            Series(
                label=label,
                x=x.tolist(),
                y=heights,
                kind="both",
                tone=own.tone,
                symbol=own.symbol,
                dash=own.dash,
                y_interval=None if error is None else ((y - error).tolist(), (y + error).tolist()),
                lost=x[bad].tolist(),
                hover=[f"{label}\n{a:.4g}: {b:.6g}" for a, b in zip(x.tolist(), heights, strict=True)],
                group=label,
            )
        )
    if not any(math.isfinite(y) for one in series for y in one.y):
        raise ValueError("there is no finite value, so there is nothing to draw.")
    return Chart(
        title=ylabel,
        x=Axis(label=xlabel, log=log_x),
        y=Axis(label=ylabel, log=log_y),
        series=series,
        note=count(lost, "not finite (×)"),
        legend=len(series) > 1,
    )


def followed(points: Sequence[Point]) -> Chart:
    """lambda_max during training, with the edge of stability 2 (1 + β) / η, and SAM's edge where it is known.

    Args:
        points: the points of `flatmin.measure.Follow`.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not points:
        raise ValueError("there are no points, so there is nothing to draw.")
    steps = [float(p.step) for p in points]
    plain = Series(x=steps, y=steps)
    series: list[Series] = []
    for name, label, dash in (
        ("largest", "λ max", "solid"),
        ("edge", "edge of stability, 2 (1 + β) / η", "dash"),
        ("sam_edge", "SAM's edge", "dot"),
    ):
        y = [math.nan if (value := getattr(p, name)) is None else float(value) for p in points]
        if any(map(math.isfinite, y)):
            hover = [f"{label}\nstep {a:g}: {b:.6g}" for a, b in zip(steps, y, strict=True)]
            series.append(replace(plain, label=label, y=y, tone=tone(len(series)), dash=dash, hover=hover, group=label))
    return Chart(
        title="Largest eigenvalue during training",
        x=Axis(label="step"),
        y=Axis(label="eigenvalue λ", log=is_wide([y for one in series for y in one.y], 10.0)),
        series=series,
        note=count(sum(not p.converged for p in points), "not converged"),
        legend=len(series) > 1,
    )
