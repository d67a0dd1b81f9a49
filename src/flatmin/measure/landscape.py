"""Loss landscapes on lines and planes through the weights of a model."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from flatmin.measure.directions import WeightDirection
from flatmin.measure.evaluate import Statistics, choose_statistics
from flatmin.measure.problem import Problem
from flatmin.measure.record import Landscape, Origin, Progress, blank

Span = float | tuple[float, float] | Sequence[tuple[float, float]]
_POINTS = {1: 51, 2: 25}


@dataclass(frozen=True, kw_only=True, eq=False)
class LandscapeAxis:
    """An axis of a landscape.

    Args:
        direction: direction of the axis.
        points: points on the axis as multiples of the direction's vector, float64, ascending.
    """

    direction: WeightDirection
    points: Tensor

    def distances(self) -> Tensor:
        """Signed L2 distances of the points from the model."""
        return self.points * self.direction.length

    @property
    def centre(self) -> int | None:
        """Index of the point at 0, which is the model itself; None if there is none."""
        zeros = (self.points == 0).nonzero().flatten().tolist()
        return zeros[0] if zeros else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Slice(Landscape):
    """The loss on a line, L(w + a d_1), or on a plane, L(w + a d_1 + b d_2). Result of `landscape`.

    Args:
        axes: one or two axes. loss[i, j] belongs to (axes[0].points[i], axes[1].points[j]).
        trajectory: coordinates of checkpoints in the plane, shape (n, 2), as multiples of the directions. Default
            None.
        loss: see `Landscape`.
        accuracy: see `Landscape`.
        done: see `Landscape`.
        origin: see `Landscape`.
        statistics: see `Landscape`.
    """

    axes: tuple[LandscapeAxis, ...]
    trajectory: Tensor | None = None

    kind: ClassVar[str] = "slice"

    def weights_at(self, problem: Problem, index: int) -> list[Tensor]:
        where = torch.unravel_index(torch.tensor(index), self.loss.shape)
        step = torch.zeros(problem.size, dtype=problem.dtype, device=problem.device)
        for axis, i in zip(self.axes, where, strict=True):
            step.add_(axis.direction.vector.to(step), alpha=float(axis.points[i]))
        return problem.moved(step)

    def relative(self, axis: int) -> Tensor:
        """Signed distances of the points of an axis from the model, in units of ||w||."""
        return self.axes[axis].distances() / self.origin.norm

    @property
    def centre(self) -> float | None:
        """The loss at the model itself; None if the grid does not contain it or it is not evaluated yet."""
        where = tuple(axis.centre for axis in self.axes)
        if any(i is None for i in where) or not self.done[where]:
            return None
        return float(self.loss[where])

    def check(self, problem: Problem) -> None:
        for axis in self.axes:
            axis.direction.check(problem)
        super().check(problem)

    def _packed(self) -> dict[str, Any]:
        axes = [
            {
                "points": axis.points,
                "vector": axis.direction.vector.cpu(),
                "label": axis.direction.label,
                "recipe": dict(axis.direction.recipe),
                "layout": axis.direction.layout,
                "unlike": list(axis.direction.unlike),
                "length": axis.direction.length,
            }
            for axis in self.axes
        ]
        return {"axes": axes, "trajectory": self.trajectory}

    @classmethod
    def _unpacked(cls, saved: dict[str, Any], shared: dict[str, Any]) -> Self:
        axes = tuple(
            LandscapeAxis(
                direction=WeightDirection(
                    vector=a["vector"],
                    label=a["label"],
                    recipe=a["recipe"],
                    layout=a["layout"],
                    unlike=tuple(a["unlike"]),
                ),
                points=a["points"],
            )
            for a in saved["axes"]
        )
        return cls(axes=axes, trajectory=saved["trajectory"], **shared)

    def _unlike(self, other: Self) -> str:
        if len(self.axes) != len(other.axes):
            return f"it has {len(other.axes)} direction{'s' * (len(other.axes) > 1)}"
        for k, (mine, its) in enumerate(zip(self.axes, other.axes, strict=True), 1):
            # A recomputed eigenvector is equal only up to round-off; the stored one is used.
            if mine.points.shape != its.points.shape or not torch.allclose(mine.points, its.points, rtol=1e-6):
                return f"the points of axis {k} differ"
            apart = torch.linalg.vector_norm(mine.direction.vector.to(its.direction.vector) - its.direction.vector)
            if mine.direction.vector.shape != its.direction.vector.shape or apart > 1e-3 * mine.direction.length:
                return f"the direction of axis {k} differs ({its.direction.label})"
        return ""


def landscape(
    problem: Problem,
    directions: WeightDirection | Sequence[WeightDirection],
    *,
    span: Span = 1.0,
    points: int | Sequence[int] | None = None,
    grid: Sequence[Tensor | Sequence[float]] | None = None,
    accuracy: bool = False,
    statistics: Statistics | None = None,
    trajectory: Tensor | None = None,
    path: str | os.PathLike[str] | None = None,
    every: float = 60.0,
    progress: Progress | None = None,
) -> Slice:
    """Evaluate the loss on a line or a plane through the model's weights.

        L(w + a d_1 + b d_2),   a, b on a grid

    Each point takes one pass over the data, or two with recomputed statistics. The model is not modified. The centre
    equals `problem.value()` bit for bit.

    Args:
        problem: the function.
        directions: one or two directions, from `flatmin.measure.directions`.
        span: ends of the grid as multiples of the directions: h for (-h, h), one pair for all axes, or a list with a
            pair for each axis. Default 1.
        points: number of points on each axis, such that 0 is one of them (odd if the span is symmetric). Default None:
            51 on a line, 25 by 25 on a plane.
        grid: for each axis, ascending multiples of the direction; replaces `span` and `points`. Default None.
        accuracy: also measure the accuracy. Default False.
        statistics: running statistics of BatchNorm: "as they are" in the model, or "recomputed" at every point, see
            `batch_statistics`. Default None: "as they are". It must be given if a direction leads to a checkpoint with
            other buffers.
        trajectory: coordinates of checkpoints in the plane, to be stored with it; see `trajectory.pca`. Default None.
        path: file in which the landscape is stored. An incomplete file of the same slice is continued. Default None:
            not stored.
        every: seconds between writes of the file. Default 60.
        progress: called with (points done, share done) after each point. Default None.

    Raises:
        ValueError: there is no direction, there are more than two, they are parallel or belong to another model; the
            span has no width; the points do not include 0; `statistics` must be given; or the file contains something
            else.
        TypeError: `directions` contains plain vectors.
    """
    chosen = [directions] if isinstance(directions, WeightDirection) else list(directions)
    if isinstance(directions, Tensor) or not all(isinstance(direction, WeightDirection) for direction in chosen):
        raise TypeError(
            "directions must be WeightDirection objects; make one of a vector with "
            "flatmin.measure.directions.given(problem, vector, label=...)."
        )
    if len(chosen) not in (1, 2):
        raise ValueError(f"a landscape needs one or two directions, got {len(chosen)}.")
    for direction in chosen:
        direction.check(problem)
    if len(chosen) == 2:
        _not_parallel(*chosen)
    axes = tuple(
        LandscapeAxis(direction=d, points=p)
        for d, p in zip(chosen, _grids(len(chosen), span, points, grid), strict=True)
    )
    statistics = choose_statistics(problem, statistics, list(dict.fromkeys(n for d in chosen for n in d.unlike)))
    if trajectory is not None and (len(chosen) != 2 or trajectory.dim() != 2 or trajectory.shape[1] != 2):
        raise ValueError("trajectory must have shape (n, 2) and needs two directions.")
    shape = tuple(len(axis.points) for axis in axes)
    request = Slice(
        axes=axes,
        trajectory=None if trajectory is None else trajectory.detach().to("cpu", torch.float64),
        origin=Origin.of(problem, statistics),
        statistics=statistics,
        **blank(shape, accuracy),
    )
    return request._resumed(path, problem)._fill(problem, path, every, progress)


def grid_around(low: float, high: float, points: int) -> Tensor:
    """Make an equidistant grid with at most `points` points that covers [low, high] and contains exactly 0.

    Args:
        low: the grid reaches at least down to this (values above 0 count as 0).
        high: the grid reaches at least up to this (values below 0 count as 0).
        points: maximum number of points, at least 3.

    Raises:
        ValueError: `points` is below 3, or the grid has no width.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if points < 3 or not high > low:
        raise ValueError(f"a grid needs at least 3 points and low < high, got {points!r} from {low!r} to {high!r}.")
    step = (high - low) / (points - 1)
    below, above = math.ceil(-low / step - 1e-9), math.ceil(high / step - 1e-9)
    if below + above + 1 > points:
        # One point too many: use the smallest step with which one side needs one point less.
        step = min(side / (n - 1) for side, n in ((-low, below), (high, above)) if n > 1)
        below, above = math.ceil(-low / step - 1e-9), math.ceil(high / step - 1e-9)
    return step * torch.arange(-below, above + 1, dtype=torch.float64)


def _grids(
    count: int, span: Span, points: int | Sequence[int] | None, grid: Sequence[Tensor | Sequence[float]] | None
) -> list[Tensor]:
    if grid is not None:
        if len(grid) != count:
            raise ValueError(f"grid needs one list per direction ({count}), got {len(grid)}.")
        return [_given(g) for g in grid]
    spans = _spans(count, span)
    numbers = (
        [_POINTS[count]] * count if points is None else [points] * count if isinstance(points, int) else list(points)
    )
    if len(numbers) != count:
        raise ValueError(f"points needs one number per direction ({count}), got {len(numbers)}.")
    return [_grid(low, high, n) for (low, high), n in zip(spans, numbers, strict=True)]


def _spans(count: int, span: Span) -> list[tuple[float, float]]:
    if isinstance(span, (int, float)):
        return [(-float(span), float(span))] * count
    if len(span) == 2 and all(isinstance(end, (int, float)) for end in span):
        return [(float(span[0]), float(span[1]))] * count  # type: ignore[arg-type]
    pairs = [tuple(float(end) for end in pair) for pair in span]  # type: ignore[union-attr]
    if len(pairs) != count or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"span must be a number, a pair, or one pair per direction ({count}), got {span!r}.")
    return [(pair[0], pair[1]) for pair in pairs]


def _grid(low: float, high: float, points: int) -> Tensor:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"span must be finite with low < high, got {low!r} to {high!r}.")
    if points < 3:
        raise ValueError(f"a landscape needs at least 3 points per axis, got {points!r}.")
    if low > 0 or high < 0:
        return torch.linspace(low, high, points, dtype=torch.float64)
    step = (high - low) / (points - 1)
    centre = round(-low / step)
    if abs(-low / step - centre) > 1e-9 * points:
        better = next((n for n in range(points + 1, 8 * points) if _holds_zero(low, high, n)), None)
        advice = f"use {better} points" if better else "pass the points as grid="
        raise ValueError(f"{points} points from {low:g} to {high:g} do not include 0, the model itself; {advice}.")
    # Compute each side separately, so a symmetric grid is exactly symmetric.
    below = [low * (centre - i) / centre for i in range(centre)]
    above = [high * i / (points - 1 - centre) for i in range(1, points - centre)]
    return torch.tensor([*below, 0.0, *above], dtype=torch.float64)


def _holds_zero(low: float, high: float, points: int) -> bool:
    at = -low / (high - low) * (points - 1)
    return abs(at - round(at)) < 1e-9 * points


def _given(values: Tensor | Sequence[float]) -> Tensor:
    grid = torch.as_tensor(values).detach().to("cpu", torch.float64)
    if grid.dim() != 1 or not len(grid) or not grid.isfinite().all() or not (grid.diff() > 0).all():
        raise ValueError("each grid must be an ascending list of finite numbers.")
    return grid


def _not_parallel(first: WeightDirection, second: WeightDirection) -> None:
    cosine = float(torch.dot(first.vector.double(), second.vector.double())) / (first.length * second.length)
    if abs(cosine) > 1.0 - 1e-6:
        raise ValueError(f"the two directions are parallel (cosine {cosine:.6f}); a plane needs different directions.")
