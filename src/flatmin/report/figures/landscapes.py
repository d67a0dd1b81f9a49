"""Figures of loss landscapes: along a direction or a path, and over a plane as a map or in perspective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from flatmin.measure.landscape import LandscapeAxis, Slice
from flatmin.measure.paths import Path
from flatmin.measure.record import Landscape
from flatmin.report.figures.chart import Array, Axis, Chart, Field, Series
from flatmin.report.figures.scales import count, is_wide
from flatmin.report.style import styles

Value = Literal["loss", "accuracy", "error"]
Unit = Literal["auto", "relative", "absolute", "steps"]

_LEVELS = 24
_DECADE = 10.0  # values that span this factor have a logarithmic axis


def profile(
    shown: Landscape | Mapping[str, Landscape], *, value: Value = "loss", unit: Unit = "auto", log: bool | None = None
) -> Chart:
    """Values along slices of one direction, or along paths. Values that are not finite leave a gap with a cross.

    Args:
        shown: a slice or a path, or several by name.
        value: "loss", "accuracy" or "error", the latter two in percent.
        unit: unit of the distance along a slice: "relative" to ||w||, "absolute", "steps" (multiples of the
            direction), or "auto": "steps" for a direction to a checkpoint, otherwise "relative".
        log: whether the y axis is logarithmic. Default: yes if values are positive and span a factor of ten.

    Raises:
        ValueError: a slice with two directions, slices mixed with paths, no accuracy, or nothing to draw.
    """
    named = dict(shown) if isinstance(shown, Mapping) else {"": shown}
    if not named:
        raise ValueError("there is nothing to draw.")
    if len({item.kind for item in named.values()}) > 1:
        raise ValueError("slices and paths cannot be drawn in one figure; draw them separately.")
    style = styles(list(named))
    series, xlabels, notes, ticks = [], [], [], None
    for name, item in named.items():
        if isinstance(item, Slice):
            if len(item.axes) != 1:
                raise ValueError("a profile needs a slice of one direction, but this has two; use contour or surface.")
            x, xlabel = _distances(item, 0, unit)
        elif isinstance(item, Path):
            x, xlabel = item.times.numpy(), _path_label(item)
            ticks = dict(zip(map(float, range(item.segments + 1)), item.labels, strict=True))
        else:
            raise ValueError(f"a profile needs a slice or a path, got {type(item).__name__}.")
        y, note, lost = _values(item, value)
        label = name
        if isinstance(item, Path) and value == "loss" and item.complete:
            label = f"{name or item.shape} (barrier {item.barrier:.3g})"
        own = style[name]
        series.append(
            Series(
                label=label,
                x=x.tolist(),
                y=y.tolist(),
                tone=own.tone,
                dash=own.dash,
                lost=x[lost].tolist(),
                hover=[f"{label}\n{a:.4g}: {b:.6g}".strip() for a, b in zip(x.tolist(), y.tolist(), strict=True)],
                group=name,
            )
        )
        xlabels.append(xlabel)
        note = note.replace("not finite", "not finite (×)")
        notes.append(f"{name}: {note}" if note and name else note)
    same = len(set(xlabels)) == 1
    kinds = {label.partition(" along ")[0] for label in xlabels}
    ylabel = _value_label(list(named.values()), value)
    return Chart(
        title=f"{value.capitalize()} along a {'path' if ticks else 'direction'}",
        x=Axis(
            label=xlabels[0] if same else f"{kinds.pop()} from the model" if len(kinds) == 1 else "position",
            ticks=ticks if same and ticks and len(ticks) > 2 else None,
        ),
        y=Axis(label=ylabel, log=_is_log([y for one in series for y in one.y], log)),
        series=series,
        note="; ".join(n for n in notes if n),
        legend=any(one.label for one in series),
    )


def contour(
    shown: Slice,
    *,
    value: Value = "loss",
    unit: Unit = "auto",
    log: bool | None = None,
    levels: int | Sequence[float] = _LEVELS,
) -> Field:
    """A contour map of a slice of two directions, with its trajectory if it has one.

    Args:
        shown: the slice.
        value: see `profile`.
        unit: see `profile`.
        log: whether the levels are logarithmic; see `profile`.
        levels: the number of levels, equally spaced in the value or its logarithm; or the levels themselves. Pages
            always draw equally spaced levels, as many as given, between the first and the last.

    Raises:
        ValueError: a slice of one direction, no accuracy, levels that do not ascend, or nothing to draw.
    """
    if not isinstance(shown, Slice) or len(shown.axes) != 2:
        have = "one direction" if isinstance(shown, Slice) else f"a {type(shown).__name__}"
        raise ValueError(f"contour and surface need a slice of two directions, got {have}; use profile.")
    if min(shown.loss.shape) < 2:
        raise ValueError(f"a plane needs two points on each axis, got {' by '.join(map(str, shown.loss.shape))}.")
    (x, xlabel), (y, ylabel) = _distances(shown, 0, unit), _distances(shown, 1, unit)
    z, note, lost = _values(shown, value)
    logarithmic = _is_log(z.ravel().tolist(), log)
    return Field(
        title=f"{value.capitalize()} on a plane",
        xs=x,
        ys=y,
        z=z.T,
        x=Axis(label=xlabel, grid=False),
        y=Axis(label=ylabel, grid=False),
        z_axis=Axis(label=_value_label([shown], value), log=logarithmic),
        levels=_levels(z, logarithmic, levels),
        series=_marks(shown, x, y, lost, unit),
        note=note,
    )


def surface(
    shown: Slice,
    *,
    value: Value = "loss",
    unit: Unit = "auto",
    log: bool | None = None,
    elevation: float = 25.0,
    azimuth: float = -50.0,
) -> Field:
    """A slice of two directions as a surface in perspective, which can be turned in a page.

    Args:
        shown: the slice.
        value: see `profile`.
        unit: see `profile`.
        log: see `profile`.
        elevation: elevation of the eye above the plane, in degrees.
        azimuth: azimuth of the eye, in degrees.

    Raises:
        ValueError: see `contour`.
    """
    return replace(contour(shown, value=value, unit=unit, log=log), view=(elevation, azimuth), height=560)


def _marks(shown: Slice, x: Array, y: Array, lost: npt.NDArray[np.bool_], unit: Unit) -> list[Series]:
    """Marks on a map: points that are not finite, the trajectory, and the model."""
    made = []
    where = np.argwhere(lost)
    if len(where):
        made.append(
            Series(
                label="not finite",
                x=x[where[:, 0]].tolist(),
                y=y[where[:, 1]].tolist(),
                kind="marks",
                tone="bad",
                symbol="x",
                hover=["not finite"] * len(where),
            )
        )
    edged: dict[str, Any] = {"tone": "#ffffff", "edge": "#1b1f24"}
    if shown.trajectory is not None:
        path = shown.trajectory.numpy() * np.array([_scale(axis, shown, unit) for axis in shown.axes])
        across, up = path[:, 0].tolist(), path[:, 1].tolist()
        hover = [f"checkpoint {k} of {len(path)}" for k in range(1, len(path) + 1)]
        # A dark line below a white one is visible on any background.
        made.append(Series(x=across, y=up, tone="#1b1f24", width=4.0))
        made.append(Series(label="checkpoints, projected", x=across, y=up, kind="both", hover=hover, size=7.0, **edged))
        made.append(
            Series(
                label="first",
                x=across[:1],
                y=up[:1],
                kind="marks",
                symbol="square",
                size=11.0,
                hover=hover[:1],
                **edged,
            )
        )
    if x[0] <= 0 <= x[-1] and y[0] <= 0 <= y[-1]:
        star: dict[str, Any] = edged | {"tone": "#ff8c42", "symbol": "star", "size": 15.0}
        made.append(Series(label="the model", x=[0.0], y=[0.0], kind="marks", hover=["the model"], **star))
    return made


def _values(item: Landscape, value: Value) -> tuple[Array, str, npt.NDArray[np.bool_]]:
    """The values with NaN where there is nothing to draw, a note on missing points, and which are not finite."""
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
    notes = [count(int(lost.sum()), "not finite"), count(int((~done).sum()), "not evaluated yet")]
    return np.where(done & ~lost, values, np.nan), "; ".join(n for n in notes if n), lost


def _scale(axis: LandscapeAxis, shown: Slice, unit: Unit) -> float:
    """The factor from the axis's points to the unit."""
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


def _is_log(values: Sequence[float], log: bool | None) -> bool:
    if log and not is_wide(values, 0.0):
        raise ValueError("log=True needs positive values; leave log=None.")
    return is_wide(values, _DECADE) if log is None else log


def _levels(z: Array, log: bool, levels: int | Sequence[float]) -> Array:
    if not isinstance(levels, int):
        heights = np.asarray(levels, dtype=np.float64)
        if heights.ndim != 1 or len(heights) < 2 or not (np.diff(heights) > 0).all() or (log and heights[0] <= 0):
            raise ValueError("levels must be at least two numbers in ascending order, above 0 on a logarithmic scale.")
        return heights
    if levels < 2:
        raise ValueError(f"levels must be at least 2, got {levels!r}.")
    low, high = float(np.nanmin(z)), float(np.nanmax(z))
    if not high - low > 1e-12 * max(abs(low), abs(high)):
        # A constant surface is drawn in one colour.
        pad = 0.5 * abs(low) or 0.5
        low, high = low - pad, high + pad
    return np.geomspace(low, high, levels) if log else np.linspace(low, high, levels)
