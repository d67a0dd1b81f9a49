"""The contents of figures of landscapes and spectra as plain numbers; `draw` and `draw_interactive` draw them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from flatmin.measure.follow import Point
from flatmin.measure.krylov import Spectrum
from flatmin.measure.landscape import LandscapeAxis, Slice
from flatmin.measure.paths import Path
from flatmin.measure.record import Landscape
from flatmin.measure.trace import Density

Value = Literal["loss", "accuracy", "error"]
Unit = Literal["auto", "relative", "absolute", "steps"]
Array = npt.NDArray[np.float64]

_WIDTH = 56  # characters of an axis label before it is broken
_LEVELS = 24


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line or a row of points.

    Args:
        label: for the legend.
        x, y: NaN in y is a gap.
        error: half lengths of error bars; None for none.
        lost: x of the points whose value is not finite.
    """

    label: str
    x: Array
    y: Array
    error: Array | None = None
    lost: Array


@dataclass(frozen=True, kw_only=True)
class Lines:
    """A figure of lines.

    Args:
        lines: what is drawn.
        xlabel, ylabel: with units.
        note: what a reader must know besides; may be empty.
        log_x, log_y: whether an axis is logarithmic.
        ticks: places and names on the x axis; None for numbers.
        low: where the y axis ends below; None to follow the data.
        points: whether the points themselves are marked.
        joined: whether they are joined.
    """

    lines: tuple[Line, ...]
    xlabel: str
    ylabel: str
    note: str = ""
    log_x: bool = False
    log_y: bool = False
    ticks: tuple[list[float], list[str]] | None = None
    low: float | None = None
    points: bool = False
    joined: bool = True


@dataclass(frozen=True, kw_only=True)
class Field:
    """A figure of a plane.

    Args:
        x, y: of the grid.
        z: z[j, i] at (x[i], y[j]); NaN where nothing is known or finite.
        xlabel, ylabel, zlabel: with units.
        log: whether the levels are logarithmic.
        levels: rising.
        note: what a reader must know besides.
        lost: (x, y) of the points whose value is not finite, shape (m, 2).
        trajectory: (x, y) of checkpoints, shape (n, 2), or None.
        model: whether (0, 0) is in the figure.
    """

    x: Array
    y: Array
    z: Array
    xlabel: str
    ylabel: str
    zlabel: str
    log: bool
    levels: Array
    note: str
    lost: Array
    trajectory: Array | None
    model: bool


def profile(
    shown: Landscape | Mapping[str, Landscape], value: Value = "loss", unit: Unit = "auto", log: bool | None = None
) -> Lines:
    """Slices of one direction, or paths, on one axis.

    Args:
        shown: a slice or a path, or several by name.
        value: "loss", "accuracy" or "error", the latter two in percent.
        unit: of the distance along a slice: "relative" to ||w||, "absolute", "steps" (multiples of the direction), or
            "auto" (default): steps towards a checkpoint, else relative.
        log: whether the y axis is logarithmic. Default: if values are positive and span a factor of ten.

    Raises:
        ValueError: slices of two directions, slices and paths together, no accuracy, or nothing to draw.
    """
    named = dict(shown) if isinstance(shown, Mapping) else {"": shown}
    if not named:
        raise ValueError("there is nothing to draw.")
    if len({item.kind for item in named.values()}) > 1:
        raise ValueError("slices and paths have no axis in common; draw them apart.")
    lines, xlabels, notes = [], [], []
    ticks = None
    for name, item in named.items():
        if isinstance(item, Slice):
            if len(item.axes) != 1:
                raise ValueError("a profile is of one direction, and this slice has two; use contour or surface.")
            x, xlabel = _distances(item, 0, unit)
        elif isinstance(item, Path):
            x, xlabel = item.times.numpy(), _path_label(item)
            ticks = ([float(k) for k in range(item.segments + 1)], list(item.labels)) if item.segments > 1 else None
        else:
            raise ValueError(f"a profile is of a slice or a path, got {type(item).__name__}.")
        y, note, lost = _values(item, value)
        label = name or item.kind
        if isinstance(item, Path) and value == "loss" and item.complete:
            label = f"{name or item.shape} (barrier {item.barrier:.3g})"
        lines.append(Line(label=label, x=x, y=y, lost=x[lost]))
        xlabels.append(xlabel)
        note = note.replace("not finite", "not finite (×)")
        notes.append(f"{name}: {note}" if note and name else note)
    same = len(set(xlabels)) == 1
    kinds = {label.partition(" along ")[0] for label in xlabels}
    return Lines(
        lines=tuple(lines),
        xlabel=broken(xlabels[0] if same else f"{kinds.pop()} from the model" if len(kinds) == 1 else "position"),
        ylabel=_value_label(list(named.values()), value),
        note="; ".join(n for n in notes if n),
        log_y=_is_log(np.concatenate([line.y for line in lines]), log),
        ticks=ticks if same else None,
    )


def field(
    shown: Slice,
    value: Value = "loss",
    unit: Unit = "auto",
    log: bool | None = None,
    levels: int | Sequence[float] = _LEVELS,
) -> Field:
    """A slice of two directions.

    Args:
        shown: the slice.
        value: see `profile`.
        unit: see `profile`.
        log: whether the levels are logarithmic; see `profile`.
        levels: their number, equal steps of the value or of its logarithm, or the levels themselves.

    Raises:
        ValueError: a slice of one direction, no accuracy, levels that do not rise, or nothing to draw.
    """
    if not isinstance(shown, Slice) or len(shown.axes) != 2:
        have = "one direction" if isinstance(shown, Slice) else f"a {type(shown).__name__}"
        raise ValueError(f"this needs a slice of two directions, got {have}; use profile.")
    if min(shown.loss.shape) < 2:
        raise ValueError(f"a plane needs two points on each axis, got {' by '.join(map(str, shown.loss.shape))}.")
    (x, xlabel), (y, ylabel) = _distances(shown, 0, unit), _distances(shown, 1, unit)
    z, note, lost = _values(shown, value)
    logarithmic = _is_log(z, log)
    where = np.argwhere(lost)
    path = None
    if shown.trajectory is not None:
        scale = [_scale(axis, shown, unit) for axis in shown.axes]
        path = shown.trajectory.numpy() * np.array(scale)
    return Field(
        x=x,
        y=y,
        z=z.T,
        xlabel=broken(xlabel),
        ylabel=broken(ylabel, 44),
        zlabel=_value_label([shown], value),
        log=logarithmic,
        levels=_levels(z, logarithmic, levels),
        note=note,
        lost=np.stack([x[where[:, 0]], y[where[:, 1]]], axis=1),
        trajectory=path,
        model=bool(x[0] <= 0 <= x[-1] and y[0] <= 0 <= y[-1]),
    )


def density(shown: Density | Mapping[str, Density], width: float | None = None) -> Lines:
    """Smoothed spectral densities, down to a tenth of what a single eigenvalue gives.

    Args:
        shown: one, or several by name.
        width: standard deviation of the Gaussian, in the eigenvalues' unit. Default: a hundredth of the nodes' range.

    Raises:
        ValueError: nothing to draw, or a width that is not positive.
    """
    named = dict(shown) if isinstance(shown, Mapping) else {"density": shown}
    nodes = [float(n) for d in named.values() for n in d.nodes[d.weights > 0]]
    if not nodes:
        raise ValueError("the density has no node, so there is nothing to draw.")
    low, high = min(nodes), max(nodes)
    sigma = width if width is not None else ((high - low) / 100 or abs(high) / 100 or 1.0)
    grid = torch.linspace(low - 5 * sigma, high + 5 * sigma, 2000, dtype=torch.float64)
    lines = [
        Line(label=name, x=grid.numpy(), y=d.smoothed(grid, sigma).cpu().numpy(), lost=np.empty(0))
        for name, d in named.items()
    ]
    sizes = [d.conventions.size for d in named.values() if d.conventions is not None]
    peak = 1.0 / (sigma * math.sqrt(2 * math.pi))
    floor = 0.1 * peak / max(sizes) if sizes else 1e-8 * peak
    return Lines(
        lines=tuple(lines),
        xlabel="eigenvalue λ",
        ylabel=f"spectral density (Gaussian, σ = {sigma:.2g})",
        log_y=True,
        low=floor,
    )


def eigenvalues(shown: Spectrum | Mapping[str, Spectrum]) -> Lines:
    """The ends of spectra by rank, with the residuals ||H v - λ v|| as error bars.

    Raises:
        ValueError: nothing to draw.
    """
    named = dict(shown) if isinstance(shown, Mapping) else {"": shown}
    lines, loose = [], []
    for name, run in named.items():
        for end, word in (("top", "largest"), ("bottom", "smallest")):
            values = getattr(run, end).numpy()
            if len(values):
                lines.append(
                    Line(
                        label=f"{name}, {word}" if name else word,
                        x=np.arange(1.0, len(values) + 1),
                        y=values,
                        error=getattr(run, f"{end}_residuals").numpy() * np.abs(values),
                        lost=np.empty(0),
                    )
                )
        loose += [] if run.converged else [f"{name or 'the run'} has not converged"]
    if not lines:
        raise ValueError("the spectrum holds no eigenvalue, so there is nothing to draw.")
    return Lines(
        lines=tuple(lines),
        xlabel="rank from the end of the spectrum",
        ylabel="eigenvalue λ (bars: residual ‖Hv − λv‖)",
        note="; ".join(loose),
        ticks=_ranks(max(len(line.x) for line in lines)),
        points=True,
        joined=False,
    )


def curve(
    shown: Mapping[str, Sequence[Any]], *, xlabel: str, ylabel: str, log_x: bool = False, log_y: bool = False
) -> Lines:
    """Lines with error bars, such as a sharpness over rho.

    Args:
        shown: label -> (x, y) or (x, y, error), with half lengths of error bars.
        xlabel: with its unit.
        ylabel: with its unit.
        log_x: whether the x axis is logarithmic.
        log_y: whether the y axis is logarithmic.

    Raises:
        ValueError: nothing to draw, lengths that differ, or negative errors.
    """
    lines, lost = [], 0
    for label, parts in shown.items():
        if len(parts) not in (2, 3):
            raise ValueError(f"{label!r} must be (x, y) or (x, y, error), got {len(parts)} parts.")
        x, y = (np.asarray(part, dtype=np.float64) for part in parts[:2])
        error = np.asarray(parts[2], dtype=np.float64) if len(parts) == 3 and parts[2] is not None else None
        if x.ndim != 1 or x.shape != y.shape or (error is not None and error.shape != x.shape):
            shapes = [a.shape for a in (x, y, error) if a is not None]
            raise ValueError(f"x, y and error of {label!r} must be lists of one length, got {shapes}.")
        if error is not None and (error < 0).any():
            raise ValueError(f"{label!r} has a negative error.")
        bad = ~np.isfinite(y)
        lost += int(bad.sum())
        lines.append(Line(label=label, x=x, y=np.where(bad, np.nan, y), error=error, lost=x[bad]))
    if not any(np.isfinite(line.y).any() for line in lines):
        raise ValueError("there is no finite value, so there is nothing to draw.")
    return Lines(
        lines=tuple(lines),
        xlabel=xlabel,
        ylabel=ylabel,
        note=_count(lost, "not finite (×)"),
        log_x=log_x,
        log_y=log_y,
        points=True,
    )


def followed(points: Sequence[Point]) -> Lines:
    """lambda_max through training beside the edges of stability: 2 / eta, and SAM's where it is known.

    Args:
        points: of `flatmin.measure.Follow`.

    Raises:
        ValueError: nothing to draw.
    """
    if not points:
        raise ValueError("there is no point, so there is nothing to draw.")
    steps = np.array([float(p.step) for p in points])
    named = {"λ max": "largest", "edge of stability, 2 (1 + β) / η": "edge", "SAM's edge": "sam_edge"}
    lines = []
    for label, name in named.items():
        values = np.array([getattr(p, name) for p in points], dtype=np.float64)
        if np.isfinite(values).any():
            lines.append(Line(label=label, x=steps, y=values, lost=np.empty(0)))
    loose = sum(not p.converged for p in points)
    return Lines(
        lines=tuple(lines),
        xlabel="step",
        ylabel="eigenvalue λ",
        note=_count(loose, "not converged"),
        log_y=_is_log(np.concatenate([line.y for line in lines]), None),
    )


def number(value: float) -> str:
    """A number for a tick."""
    return f"{value:.3g}"


def ticks(levels: Array, log: bool) -> list[float]:
    """Round numbers between the ends of a scale; of a logarithmic one powers of ten where there are three or more."""
    if not log:
        width = float(levels[-1] - levels[0])
        step = 10.0 ** math.floor(math.log10(width / 4))
        step *= max(m for m in (1, 2, 5) if m * step <= width / 4)
        first, last = math.ceil(levels[0] / step - 1e-9), math.floor(levels[-1] / step + 1e-9)
        return [k * step for k in range(first, last + 1)]
    low, high = math.floor(math.log10(levels[0])), math.ceil(math.log10(levels[-1]))
    for multiples in ([1], [1, 3], [1, 2, 5]):
        places = [m * 10.0**k for k in range(low, high + 1) for m in multiples]
        places = [t for t in places if levels[0] * (1 - 1e-9) <= t <= levels[-1] * (1 + 1e-9)]
        if len(places) >= 3:
            step = math.ceil(len(places) / 8)
            return places[::step]
    return [float(t) for t in np.geomspace(levels[0], levels[-1], 5)]


def _values(item: Landscape, value: Value) -> tuple[Array, str, npt.NDArray[np.bool_]]:
    """The values with NaN where there is nothing to draw, a note on that, and which points are not finite."""
    if value not in ("loss", "accuracy", "error"):
        raise ValueError(f"value must be 'loss', 'accuracy' or 'error', got {value!r}.")
    values_shown = item.loss if value == "loss" else item.accuracy if value == "accuracy" else item.error
    if values_shown is None:
        raise ValueError(f"the {item.kind} was measured without accuracy, so there is no {value} to draw.")
    values = values_shown.numpy() * (1.0 if value == "loss" else 100.0)
    done = item.done.numpy()
    lost = done & ~np.isfinite(values)
    if not (done & ~lost).any():
        raise ValueError(
            f"none of the {values.size} points has a finite {value} ({int(done.sum())} are evaluated), so there is "
            "nothing to draw."
        )
    notes = [_count(int(lost.sum()), "not finite"), _count(int((~done).sum()), "not evaluated yet")]
    return np.where(done & ~lost, values, np.nan), "; ".join(n for n in notes if n), lost


def _count(count: int, what: str) -> str:
    return f"{count} point{'s' * (count != 1)} {what}" if count else ""


def _scale(axis: LandscapeAxis, shown: Slice, unit: Unit) -> float:
    """Of the axis's points in the unit."""
    kind = _unit(axis, shown, unit)
    return 1.0 if kind == "steps" else axis.direction.length / (shown.origin.norm if kind == "relative" else 1.0)


def _unit(axis: LandscapeAxis, shown: Slice, unit: Unit) -> str:
    if unit not in ("auto", "relative", "absolute", "steps"):
        raise ValueError(f"unit must be 'auto', 'relative', 'absolute' or 'steps', got {unit!r}.")
    if unit == "auto":
        unit = "steps" if axis.direction.kind == "difference" else "relative"
    return "absolute" if unit == "relative" and not shown.origin.norm else unit


def _distances(shown: Slice, k: int, unit: Unit) -> tuple[Array, str]:
    axis = shown.axes[k]
    label, kind = axis.direction.label, _unit(axis, shown, unit)
    if kind == "steps" and axis.direction.kind == "difference":
        words = f"from the model (0) to {label} (1)"
    elif kind == "steps":
        words = f"multiples of d along {label}"
    else:
        words = f"distance ‖Δw‖{' / ‖w‖' if kind == 'relative' else ''} along {label}"
    return axis.points.numpy() * _scale(axis, shown, unit), words


def _path_label(path: Path) -> str:
    if path.segments == 1:
        return f"t, from {path.labels[0]} (0) to {path.labels[1]} (1)"
    return "checkpoint"


def _value_label(items: Sequence[Landscape], value: Value) -> str:
    splits = {item.conventions.split.partition(",")[0] for item in items}
    split = f"{splits.pop()} " if len(splits) == 1 and splits != {""} else ""
    if value != "loss":
        return f"{split}{value}, %"
    losses = {item.conventions.loss for item in items}
    return f"{split}loss" + (f" ({losses.pop()})" if len(losses) == 1 else "")


def _is_log(values: Array, log: bool | None) -> bool:
    finite = values[np.isfinite(values)]
    positive = bool((finite > 0).all())
    if log and not positive:
        raise ValueError("a logarithmic scale needs positive values; leave log=None.")
    return bool(positive and finite.max() >= 10 * finite.min()) if log is None else log


def _levels(z: Array, log: bool, levels: int | Sequence[float]) -> Array:
    if not isinstance(levels, int):
        heights = np.asarray(levels, dtype=np.float64)
        if heights.ndim != 1 or len(heights) < 2 or not (np.diff(heights) > 0).all() or (log and heights[0] <= 0):
            raise ValueError("levels must rise, at least two of them, above 0 where they are logarithmic.")
        return heights
    if levels < 2:
        raise ValueError(f"levels must be at least 2, got {levels!r}.")
    low, high = float(np.nanmin(z)), float(np.nanmax(z))
    if not high - low > 1e-12 * max(abs(low), abs(high)):
        # A constant surface is drawn as one colour.
        pad = 0.5 * abs(low) or 0.5
        low, high = low - pad, high + pad
    return np.geomspace(low, high, levels) if log else np.linspace(low, high, levels)


def _ranks(most: int) -> tuple[list[float], list[str]]:
    step = math.ceil(most / 12)
    ranks = [1, *range(step, most + 1, step)] if step > 1 else list(range(1, most + 1))
    return [float(r) for r in ranks], [str(r) for r in ranks]


def broken(label: str, width: int = _WIDTH) -> str:
    """The label in lines of at most so many characters, about equally long."""
    label = label.replace(" = ", "\u00a0=\u00a0")
    shortest = math.ceil(len(label) / max(math.ceil(len(label) / width), 1)) or 1
    pieces = [textwrap.wrap(label, w, break_on_hyphens=False) for w in range(shortest, width + 1)]
    fewest = min(len(lines) for lines in pieces)
    return "\n".join(next(lines for lines in pieces if len(lines) == fewest))
