"""The loss on lines and planes through a model's weights: evaluated point by point, resumable, one file."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from flatmin.measure.directions import Direction
from flatmin.measure.evaluate import Statistics, choose_statistics, evaluate
from flatmin.measure.problem import Conventions, Problem

Progress = Callable[[int, float], None]
Span = float | tuple[float, float] | Sequence[tuple[float, float]]
_POINTS = {1: 51, 2: 25}
_FORMAT = "flatmin.landscape/1"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The model that a landscape was measured around, for a file to be recognised by.

    Args:
        weights: hash of each selected weight by name, with shape and dtype.
        rest: the same of the other weights and the buffers.
        norm: ||w|| of the selected weights.
        loss: L at the model.
        conventions: of the problem.
    """

    weights: dict[str, str]
    rest: dict[str, str]
    norm: float
    loss: float
    conventions: Conventions

    @classmethod
    def of(cls, problem: Problem, statistics: Statistics) -> Origin:
        """The record of a problem's model."""
        chosen = set(problem.names)
        others = {n: p for n, p in problem.model.named_parameters() if n not in chosen}
        return cls(
            weights={n: _hash(w) for n, w in zip(problem.names, problem.weights, strict=True)},
            rest={n: _hash(t) for n, t in {**others, **dict(problem.model.named_buffers())}.items()},
            norm=float(torch.linalg.vector_norm(problem.flat(problem.weights), dtype=torch.float64)),
            loss=evaluate(problem, list(problem.weights), statistics=statistics)[0],
            conventions=problem.conventions,
        )

    def differences(self, other: Origin, dtype: torch.dtype, *, weights: bool) -> list[str]:
        """What another model has different, in words; losses may differ by round-off.

        Args:
            other: its record.
            dtype: of its evaluations.
            weights: whether the selected weights must be the same as well, or only their names and shapes.
        """
        found = []
        for kind, mine, its in (("weights", self.weights, other.weights), ("other tensors", self.rest, other.rest)):
            if missing := [n for n in mine if n not in its]:
                found.append(f"it has no {_names(missing)}")
            if extra := [n for n in its if n not in mine]:
                found.append(f"it has {_names(extra)} as well")
            both = [n for n in mine if n in its]
            if shapes := [n for n in both if mine[n].rpartition(" ")[0] != its[n].rpartition(" ")[0]]:
                found.append(f"shape or dtype of {_names(shapes)} differ")
            if values := [n for n in both if mine[n] != its[n] and n not in shapes]:
                found += [f"the values of {_names(values)} differ"] * (weights or kind != "weights")
        for name, mine_is in dataclasses.asdict(self.conventions).items():
            its_is = getattr(other.conventions, name)
            # Batches may be of another size; where the loss depends on them, the loss below says so.
            if mine_is != its_is and name not in ("seed", "size", "batch"):
                found.append(f"{name} is {its_is!r} instead of {mine_is!r}")
        close = math.isclose(self.loss, other.loss, rel_tol=math.sqrt(torch.finfo(dtype).eps))
        close = close or (math.isnan(self.loss) and math.isnan(other.loss))
        if not found and self.weights == other.weights and not close:
            found.append(f"its loss is {other.loss:.6g} instead of {self.loss:.6g}, so data or loss are others")
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Landscape(ABC):
    """Losses at a grid of weights, of which some may not be evaluated yet.

    Args:
        loss: float64, on the CPU, as the problem gave it: a loss that is not finite stays as it is.
        accuracy: share of right answers, the same shape; None if not asked for.
        done: which points have been evaluated; where it is false, loss and accuracy hold NaN and mean nothing.
        origin: the model.
        statistics: what BatchNorm used at each point.
    """

    loss: Tensor
    accuracy: Tensor | None
    done: Tensor
    origin: Origin
    statistics: Statistics

    kind: ClassVar[str] = ""
    anchored: ClassVar[bool] = True  # whether its points are relative to the model's weights

    @property
    def conventions(self) -> Conventions:
        """What was measured."""
        return self.origin.conventions

    @property
    def complete(self) -> bool:
        """Whether every point has been evaluated."""
        return bool(self.done.all())

    @property
    def error(self) -> Tensor | None:
        """1 - accuracy."""
        return None if self.accuracy is None else 1.0 - self.accuracy

    @abstractmethod
    def weights_at(self, problem: Problem, index: int) -> list[Tensor]:
        """The weights of a point of the flattened grid."""

    @abstractmethod
    def _packed(self) -> dict[str, Any]:
        """The fields of the class itself as plain values and tensors."""

    @classmethod
    @abstractmethod
    def _unpacked(cls, saved: dict[str, Any], shared: dict[str, Any]) -> Self:
        """The inverse of `_packed`."""

    @abstractmethod
    def _unlike(self, other: Self) -> str:
        """What another request asks for otherwise, in words; empty if it is this one."""

    def check(self, problem: Problem) -> None:
        """Refuse a problem other than the one that this was measured on.

        Raises:
            ValueError: another model, weights, buffers, data or conventions; the sentence says which.
        """
        now = Origin.of(problem, self.statistics)
        if found := self.origin.differences(now, problem.dtype, weights=self.anchored):
            raise ValueError(f"this {self.kind} was measured on another model or other data: {'; '.join(found)}.")

    def fill(
        self,
        problem: Problem,
        *,
        path: str | os.PathLike[str] | None = None,
        every: float = 60.0,
        progress: Progress | None = None,
    ) -> Self:
        """Evaluate the points that are not done yet, in place.

        Args:
            problem: the one that it belongs to.
            path: file to keep it in, written about every `every` seconds, at the end, and on an exception.
            every: seconds between writes. Default 60.
            progress: called with (points done, share done) after each.

        Returns:
            Itself.

        Raises:
            ValueError: see `check`.
        """
        self.check(problem)
        return self._fill(problem, path, every, progress)

    def _fill(
        self, problem: Problem, path: str | os.PathLike[str] | None, every: float, progress: Progress | None
    ) -> Self:
        loss, done = self.loss.view(-1), self.done.view(-1)
        if problem.group is not None:
            counts = problem.reduced(torch.cat([done.double(), torch.ones(1)]).to(problem.device))
            if not ((counts[:-1] == 0) | (counts[:-1] == counts[-1])).all():
                raise ValueError(
                    "the processes of the group have other points done, since they see other files; give all of them "
                    "the same one."
                )
        accuracy = None if self.accuracy is None else self.accuracy.view(-1)
        # One process of a group writes for all.
        path = path if problem.group is None or torch.distributed.get_rank() == 0 else None
        written = time.monotonic()
        try:
            for i in (~done).nonzero().flatten().tolist():
                value, right = evaluate(
                    problem, self.weights_at(problem, i), accuracy=accuracy is not None, statistics=self.statistics
                )
                loss[i] = value
                if accuracy is not None:
                    accuracy[i] = right
                done[i] = True
                if progress is not None:
                    count = int(done.sum())
                    progress(count, count / len(done))
                if path is not None and time.monotonic() - written >= every:
                    self.save(path)
                    written = time.monotonic()
        finally:
            if path is not None:
                self.save(path)
        return self

    def save(self, path: str | os.PathLike[str]) -> FilePath:
        """Write all of it to one file, by a temporary file and a rename.

        The file holds plain tensors, strings and numbers (`torch.load(path, weights_only=True)`).

        Raises:
            OSError: the file cannot be written.
        """
        target = FilePath(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        origin = dataclasses.asdict(self.origin)
        torch.save(
            {
                "format": _FORMAT,
                "kind": self.kind,
                "loss": self.loss,
                "accuracy": self.accuracy,
                "done": self.done,
                "origin": origin,
                "statistics": self.statistics,
                **self._packed(),
            },
            partial,
        )
        partial.replace(target)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str], problem: Problem | None = None) -> Self:
        """Read a file.

        Args:
            path: written by `save`.
            problem: if given, the file must belong to it, see `check`.

        Raises:
            ValueError: not such a file, one of another kind, or one of another model.
            OSError: the file cannot be read.
        """
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:
            raise ValueError(f"{os.fspath(path)!r} is no file of a landscape: {type(error).__name__}.") from error
        if not isinstance(saved, dict) or saved.get("format") != _FORMAT:
            is_of = saved.get("format") if isinstance(saved, dict) else type(saved).__name__
            raise ValueError(f"{os.fspath(path)!r} is no file of a landscape (format {is_of!r}, not {_FORMAT!r}).")
        if saved["kind"] != cls.kind:
            raise ValueError(f"{os.fspath(path)!r} holds a {saved['kind']}, not a {cls.kind}.")
        origin = dict(saved["origin"])
        known = {f.name for f in dataclasses.fields(Conventions)}
        conventions = Conventions(**{k: v for k, v in origin.pop("conventions").items() if k in known})
        shared = {
            "loss": saved["loss"],
            "accuracy": saved["accuracy"],
            "done": saved["done"],
            "origin": Origin(**origin, conventions=conventions),
            "statistics": saved["statistics"],
        }
        found = cls._unpacked(saved, shared)
        if problem is not None:
            found.check(problem)
        return found

    def _resumed(self, path: str | os.PathLike[str] | None, problem: Problem) -> Self:
        """What the file holds of this request, or the request itself where there is no file yet.

        Raises:
            ValueError: the file holds something else.
        """
        if path is None or not FilePath(path).exists():
            return self
        old = type(self).load(path)
        what = self._unlike(old)
        if not what and (self.accuracy is None) != (old.accuracy is None):
            what = f"it was measured {'with' if old.accuracy is not None else 'without'} accuracy"
        if not what and self.statistics != old.statistics:
            what = f"its statistics are {old.statistics!r}"
        if what:
            raise ValueError(
                f"{os.fspath(path)!r} holds another {self.kind}: {what}; continue that one or move it away."
            )
        if found := old.origin.differences(self.origin, problem.dtype, weights=self.anchored):
            raise ValueError(f"{os.fspath(path)!r} was measured on another model or other data: {'; '.join(found)}.")
        return old


@dataclass(frozen=True, kw_only=True, eq=False)
class Axis:
    """A direction and the points on it.

    Args:
        direction: along what.
        points: float64, rising, as multiples of the direction's vector.
    """

    direction: Direction
    points: Tensor

    def distances(self) -> Tensor:
        """Signed L2 distances of the points from the model."""
        return self.points * self.direction.length

    @property
    def centre(self) -> int | None:
        """Index of the point at 0, the model itself."""
        found = (self.points == 0).nonzero().flatten().tolist()
        return found[0] if found else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Slice(Landscape):
    r"""L(w + a d_1) or L(w + a d_1 + b d_2).

    Args:
        axes: one or two; loss[i, j] is at (axes[0].points[i], axes[1].points[j]).
        trajectory: coordinates of checkpoints in the plane, shape (n, 2), as multiples of the directions; None if
            there are none.
        loss, accuracy, done, origin, statistics: see `Landscape`.
    """

    axes: tuple[Axis, ...]
    trajectory: Tensor | None = None

    kind: ClassVar[str] = "slice"

    def weights_at(self, problem: Problem, index: int) -> list[Tensor]:
        where = torch.unravel_index(torch.tensor(index), self.loss.shape)
        step = torch.zeros(problem.size, dtype=problem.dtype, device=problem.device)
        for axis, i in zip(self.axes, where, strict=True):
            step.add_(axis.direction.vector.to(step), alpha=float(axis.points[i]))
        return problem.moved(step)

    def relative(self, axis: int) -> Tensor:
        """Distances of an axis's points in units of ||w||."""
        return self.axes[axis].distances() / self.origin.norm

    @property
    def centre(self) -> float | None:
        """The loss at the model itself, as the grid has it; None if the grid leaves it out or has not come there."""
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
            Axis(
                direction=Direction(
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
            # An eigenvector that was computed again is the same up to round-off; what is stored is used.
            if mine.points.shape != its.points.shape or not torch.allclose(mine.points, its.points, rtol=1e-6):
                return f"the points of axis {k} differ"
            apart = torch.linalg.vector_norm(mine.direction.vector.to(its.direction.vector) - its.direction.vector)
            if mine.direction.vector.shape != its.direction.vector.shape or apart > 1e-3 * mine.direction.length:
                return f"the direction of axis {k} differs ({its.direction.label})"
        return ""


def landscape(
    problem: Problem,
    directions: Direction | Sequence[Direction],
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
    r"""The loss on a line or a plane through the model's weights.

    .. math::
        L(w + a d_1 + b d_2),\quad a, b \in \text{grid}

    One evaluation of the data a point, two with recomputed statistics. The model is never written to. The centre is
    `problem.value()` to the bit.

    Args:
        problem: the function.
        directions: one or two.
        span: ends of the grid as multiples of the directions: h for (-h, h), a pair for every axis, or a list of a
            pair for each. Default 1.
        points: number of them on each axis, such that 0 is one of them: odd numbers where the span is symmetric.
            Default 51 on a line, 25 by 25 on a plane.
        grid: rising multiples of each direction, in place of span and points.
        accuracy: whether to measure the share of right answers too.
        statistics: running statistics of BatchNorm: "as they are" in the model (default), or "recomputed" at every
            point, see `batch_statistics`. Where a direction leads to a checkpoint with other buffers there is no
            default.
        trajectory: coordinates of checkpoints in the plane, to be kept with it; see `trajectory.pca`.
        path: file to keep it in; one that holds this same slice, in part, is continued.
        every: seconds between writes of the file. Default 60.
        progress: called with (points done, share done) after each point.

    Raises:
        ValueError: no direction or more than two, parallel ones, another model's, a span without width, a number of
            points that misses 0, statistics that must be chosen, or a file that holds something else.
    """
    chosen = [directions] if isinstance(directions, Direction) else list(directions)
    if len(chosen) not in (1, 2):
        raise ValueError(f"a slice has one direction or two, got {len(chosen)}.")
    for direction in chosen:
        direction.check(problem)
    if len(chosen) == 2:
        _not_parallel(*chosen)
    axes = tuple(
        Axis(direction=d, points=p) for d, p in zip(chosen, _grids(len(chosen), span, points, grid), strict=True)
    )
    statistics = choose_statistics(problem, statistics, list(dict.fromkeys(n for d in chosen for n in d.unlike)))
    if trajectory is not None and (len(chosen) != 2 or trajectory.dim() != 2 or trajectory.shape[1] != 2):
        raise ValueError("a trajectory of shape (n, 2) belongs to a slice of two directions.")
    shape = tuple(len(axis.points) for axis in axes)
    request = Slice(
        axes=axes,
        trajectory=None if trajectory is None else trajectory.detach().to("cpu", torch.float64),
        origin=Origin.of(problem, statistics),
        statistics=statistics,
        **blank(shape, accuracy),
    )
    return request._resumed(path, problem)._fill(problem, path, every, progress)


def blank(shape: tuple[int, ...], accuracy: bool) -> dict[str, Any]:
    """Fields of a landscape of which nothing is done."""
    empty = torch.full(shape, math.nan, dtype=torch.float64)
    return {
        "loss": empty,
        "accuracy": empty.clone() if accuracy else None,
        "done": torch.zeros(shape, dtype=torch.bool),
    }


def grid_around(low: float, high: float, points: int) -> Tensor:
    """At most so many equal steps that reach from `low` to `high`, of which one is 0 exactly.

    Args:
        low: at least this far down; at most 0.
        high: at least this far up; at least 0.
        points: at least 3.

    Raises:
        ValueError: fewer points, or no width.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if points < 3 or not high > low:
        raise ValueError(f"a grid needs three points and a width, got {points!r} from {low!r} to {high!r}.")
    step = (high - low) / (points - 1)
    below, above = math.ceil(-low / step - 1e-9), math.ceil(high / step - 1e-9)
    if below + above + 1 > points:
        # One point too many: the lesser of the two steps with which a side needs one fewer.
        step = min(side / (n - 1) for side, n in ((-low, below), (high, above)) if n > 1)
        below, above = math.ceil(-low / step - 1e-9), math.ceil(high / step - 1e-9)
    return step * torch.arange(-below, above + 1, dtype=torch.float64)


def _grids(
    count: int, span: Span, points: int | Sequence[int] | None, grid: Sequence[Tensor | Sequence[float]] | None
) -> list[Tensor]:
    if grid is not None:
        if len(grid) != count:
            raise ValueError(f"{len(grid)} grids for {count} direction{'s' * (count > 1)}.")
        return [_given(g) for g in grid]
    spans = _spans(count, span)
    numbers = (
        [_POINTS[count]] * count if points is None else [points] * count if isinstance(points, int) else list(points)
    )
    if len(numbers) != count:
        raise ValueError(f"{len(numbers)} numbers of points for {count} direction{'s' * (count > 1)}.")
    return [_grid(low, high, n) for (low, high), n in zip(spans, numbers, strict=True)]


def _spans(count: int, span: Span) -> list[tuple[float, float]]:
    if isinstance(span, (int, float)):
        return [(-float(span), float(span))] * count
    if len(span) == 2 and all(isinstance(end, (int, float)) for end in span):
        return [(float(span[0]), float(span[1]))] * count  # type: ignore[arg-type]
    found = [tuple(float(end) for end in pair) for pair in span]  # type: ignore[union-attr]
    if len(found) != count or any(len(pair) != 2 for pair in found):
        raise ValueError(f"span must be a number, a pair, or a pair for each of {count} directions, got {span!r}.")
    return [(pair[0], pair[1]) for pair in found]


def _grid(low: float, high: float, points: int) -> Tensor:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"the span from {low!r} to {high!r} has no width.")
    if points < 3:
        raise ValueError(f"a slice needs at least 3 points on an axis, got {points!r}.")
    if low > 0 or high < 0:
        return torch.linspace(low, high, points, dtype=torch.float64)
    step = (high - low) / (points - 1)
    centre = round(-low / step)
    if abs(-low / step - centre) > 1e-9 * points:
        better = next((n for n in range(points + 1, 8 * points) if _holds_zero(low, high, n)), None)
        advice = f"take {better}" if better else "give the points themselves as grid="
        raise ValueError(f"{points} points from {low:g} to {high:g} miss 0, which is the model itself; {advice}.")
    # Each side by itself, so that a symmetric grid is symmetric to the bit.
    below = [low * (centre - i) / centre for i in range(centre)]
    above = [high * i / (points - 1 - centre) for i in range(1, points - centre)]
    return torch.tensor([*below, 0.0, *above], dtype=torch.float64)


def _holds_zero(low: float, high: float, points: int) -> bool:
    at = -low / (high - low) * (points - 1)
    return abs(at - round(at)) < 1e-9 * points


def _given(values: Tensor | Sequence[float]) -> Tensor:
    found = torch.as_tensor(values).detach().to("cpu", torch.float64)
    if found.dim() != 1 or not len(found) or not found.isfinite().all() or not (found.diff() > 0).all():
        raise ValueError("a grid must be a rising list of finite numbers.")
    return found


def _not_parallel(first: Direction, second: Direction) -> None:
    cosine = float(torch.dot(first.vector.double(), second.vector.double())) / (first.length * second.length)
    if abs(cosine) > 1.0 - 1e-6:
        raise ValueError(f"the two directions are parallel (cosine {cosine:.6f}), so they span no plane.")


def _hash(tensor: Tensor) -> str:
    """Shape, dtype and a hash of the bits."""
    flat = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(flat.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} {digest}"


def _names(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
