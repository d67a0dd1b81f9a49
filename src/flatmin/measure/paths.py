"""Loss along paths between checkpoints: straight lines and trained Bezier curves (mode connectivity)."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from flatmin.measure.evaluate import (
    Checkpoint,
    Statistics,
    batch_outputs,
    buffers_unlike,
    choose_statistics,
    weights_of,
)
from flatmin.measure.problem import Problem
from flatmin.measure.record import Landscape, Origin, Progress, blank

Training = Callable[[int, float], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Path(Landscape):
    """The loss along a curve in weight space. Result of `linear` and `bezier`.

    Args:
        times: positions of the points, float64, ascending. "linear": from 0 to the number of segments, with checkpoints
            at whole numbers. "bezier": from 0 to 1.
        knots: points that define the curve, shape (m, size): the checkpoints, or first checkpoint, control point and
            last checkpoint.
        labels: labels of the checkpoints.
        shape: "linear" or "bezier".
        recipe: settings of the training of the control point; empty for a linear path.
        training: loss of the batch at each training step; empty for a linear path.
        loss: see `Landscape`.
        accuracy: see `Landscape`.
        done: see `Landscape`.
        origin: see `Landscape`.
        statistics: see `Landscape`.
    """

    times: Tensor
    knots: Tensor
    labels: tuple[str, ...]
    shape: str
    recipe: dict[str, int | float]
    training: Tensor

    kind: ClassVar[str] = "path"
    anchored: ClassVar[bool] = False

    @property
    def segments(self) -> int:
        """Number of segments, one between each two consecutive checkpoints."""
        return len(self.labels) - 1

    def point(self, time: float) -> Tensor:
        """The weights at a time, shape (size,), in the dtype of the knots. At a checkpoint they are exact."""
        if self.shape == "bezier":
            return bezier_point(self.knots, time)
        k = min(int(time), self.segments - 1)
        s = time - k
        # Return the ends without arithmetic: 0 times an infinite weight is not 0.
        if s in (0.0, 1.0):
            return self.knots[k + int(s)].clone()
        return (1.0 - s) * self.knots[k] + s * self.knots[k + 1]

    def weights_at(self, problem: Problem, index: int) -> list[Tensor]:
        return problem.shaped(self.point(float(self.times[index])).to(problem.device, problem.dtype))

    @property
    def barriers(self) -> list[float]:
        """The loss barrier of each segment: the largest excess over the linear interpolation of its ends' losses.

            max_s L(w(s)) - [(1 - s) L(w(0)) + s L(w(1))]

        The maximum is taken over the points of the grid, so it is a lower bound. It is at least 0, because the ends are
        included, and NaN if a loss is NaN or not evaluated.

        Source: Entezari et al., ICLR 2022. If both ends have the same loss, it equals the barrier of Frankle et al.,
        ICML 2020.
        """
        heights = []
        for k in range(self.segments):
            inside = (self.times >= k) & (self.times <= k + 1)
            s, loss = self.times[inside] - k, self.loss[inside]
            line = torch.where(s == 0, loss[0], torch.where(s == 1, loss[-1], (1.0 - s) * loss[0] + s * loss[-1]))
            heights.append(float((loss - line).max()))
        return heights

    @property
    def barrier(self) -> float:
        """The largest of `barriers`."""
        return float(torch.tensor(self.barriers, dtype=torch.float64).max())

    @property
    def rise(self) -> float:
        """The highest loss on the grid minus the highest loss of a checkpoint, in [0, inf).

        Source: the height of a saddle point, Draxler et al., ICML 2018.
        """
        at = self.loss[(self.times == self.times.round()).nonzero().flatten()]
        return float(self.loss.max() - at.max())

    def lengths(self) -> Tensor:
        """L2 length of the path up to each point of the grid, with straight lines between the points."""
        points = [self.point(float(t)).double() for t in self.times]
        steps = [float((b - a).norm()) for a, b in itertools.pairwise(points)]
        return torch.tensor([0.0, *steps], dtype=torch.float64).cumsum(0)

    def _packed(self) -> dict[str, Any]:
        return {
            "times": self.times,
            "knots": self.knots.cpu(),
            "labels": list(self.labels),
            "shape": self.shape,
            "recipe": dict(self.recipe),
            "training": self.training,
        }

    @classmethod
    def _unpacked(cls, saved: dict[str, Any], shared: dict[str, Any]) -> Self:
        return cls(
            times=saved["times"],
            knots=saved["knots"],
            labels=tuple(saved["labels"]),
            shape=saved["shape"],
            recipe=saved["recipe"],
            training=saved["training"],
            **shared,
        )

    def _unlike(self, other: Self) -> str:
        if self.shape != other.shape or self.recipe != other.recipe:
            return f"a {other.shape} path{f' trained with {other.recipe}' if other.recipe else ''}"
        if not torch.equal(self.times, other.times):
            return "its points differ"
        mine, its = (p.knots[:: p.knots.shape[0] - 1] if p.shape == "bezier" else p.knots for p in (self, other))
        if mine.shape != its.shape or not torch.equal(mine.to(its), its):
            return "its checkpoints differ"
        return ""


def linear(
    problem: Problem,
    checkpoints: Sequence[Checkpoint],
    *,
    points: int = 25,
    labels: Sequence[str] | None = None,
    accuracy: bool = False,
    statistics: Statistics | None = None,
    path: str | os.PathLike[str] | None = None,
    every: float = 60.0,
    progress: Progress | None = None,
) -> Path:
    """Evaluate the loss on straight lines between consecutive checkpoints.

        w(s) = (1 - s) w_k + s w_{k+1},   s in [0, 1]

    At the ends, the weights equal those of the checkpoints exactly. At all points, buffers and weights outside the
    problem's `params` are those of the model.

    Args:
        problem: the function, with a model of the same architecture as the checkpoints.
        checkpoints: at least two models, state dicts or vectors.
        points: number of points per segment, including both ends, >= 3. Default 25.
        labels: labels of the checkpoints. Default None: "0", "1", ...
        accuracy: also measure the accuracy. Default False.
        statistics: running statistics of BatchNorm: "as they are" in the model, or "recomputed" at every point.
            Recomputing takes one more pass per point and is needed for BatchNorm to be meaningful between checkpoints.
            Default None: "as they are". It must be given if a checkpoint's buffers differ from the model's.
        path: see `landscape`. Default None.
        every: see `landscape`. Default 60.
        progress: see `landscape`. Default None.

    Raises:
        ValueError: there are fewer than two checkpoints or three points; keys or shapes do not match the model; two
            consecutive checkpoints are equal; `statistics` must be given; or the file contains something else.

    Source: Goodfellow, Vinyals & Saxe, ICLR 2015; statistics: Jordan et al., REPAIR, ICLR 2023.
    """
    knots, names, statistics = _knots(problem, checkpoints, labels, points, statistics)
    segments = len(knots) - 1
    times = [k + i / (points - 1) for k in range(segments) for i in range(points - 1)]
    request = Path(
        times=torch.tensor([*times, float(segments)], dtype=torch.float64),
        knots=knots,
        labels=names,
        shape="linear",
        recipe={},
        training=torch.empty(0, dtype=torch.float64),
        origin=Origin.of(problem, statistics),
        statistics=statistics,
        **blank((segments * (points - 1) + 1,), accuracy),
    )
    return request._resumed(path, problem)._fill(problem, path, every, progress)


def bezier(
    problem: Problem,
    first: Checkpoint,
    last: Checkpoint,
    *,
    steps: int = 1000,
    lr: float = 0.02,
    momentum: float = 0.9,
    seed: int = 0,
    points: int = 25,
    labels: Sequence[str] | None = None,
    accuracy: bool = False,
    statistics: Statistics | None = None,
    path: str | os.PathLike[str] | None = None,
    every: float = 60.0,
    progress: Progress | None = None,
    training: Training | None = None,
) -> Path:
    """Train a quadratic Bezier curve of low loss between two checkpoints, and evaluate the loss along it.

        w(t) = (1 - t)^2 w_0 + 2 t (1 - t) c + t^2 w_1
        c minimises E[L(w(t))],   t ~ U(0, 1)

    The control point c starts half-way between the checkpoints. It is trained by SGD, with one random batch of the
    problem and one random t per step. The learning rate is constant for half of the steps, decreases linearly to a
    hundredth until nine tenths of the steps, and is constant again. With statistics="recomputed", BatchNorm uses the
    statistics of each batch in this training. The checkpoints are not changed.

    Args:
        problem: see `linear`.
        first: the checkpoint at t = 0.
        last: the checkpoint at t = 1.
        steps: number of training steps, >= 0. Default 1000.
        lr: learning rate, > 0. Default 0.02. Try others if the training losses increase.
        momentum: momentum of SGD, in [0, 1). Default 0.9.
        seed: seed of the batches and of t. Default 0.
        points: number of points, including both ends, >= 3. Default 25.
        labels: labels of the two checkpoints. Default None: "0" and "1".
        accuracy: see `linear`. Default False.
        statistics: see `linear`. Default None.
        path: see `linear`. The trained control point is stored before the curve is evaluated. Default None.
        every: see `linear`. Default 60.
        progress: see `linear`. Default None.
        training: called with (steps done, loss of the batch) after each training step. Default None.

    Raises:
        ValueError: as in `linear`, a number is out of range, or the problem has a process group.
        ArithmeticError: the training diverged.

    Source: Garipov, Izmailov, Podoprikhin, Vetrov & Wilson, NeurIPS 2018. The learning rate schedule is from their
    code.
    """
    if steps < 0 or not (lr > 0 and math.isfinite(lr)) or not 0 <= momentum < 1:
        raise ValueError(
            f"steps must be >= 0, lr positive and momentum in [0, 1), got {steps!r}, {lr!r} and {momentum!r}."
        )
    if problem.group is not None:
        raise ValueError("a Bezier path is trained in a single process; use a problem without group=.")
    ends, names, statistics = _knots(problem, [first, last], labels, points, statistics)
    request = Path(
        times=torch.tensor([i / (points - 1) for i in range(points)], dtype=torch.float64),
        knots=torch.stack([ends[0], (ends[0] + ends[1]) / 2, ends[1]]),
        labels=names,
        shape="bezier",
        recipe={"steps": steps, "lr": lr, "momentum": momentum, "seed": seed},
        training=torch.full((steps,), math.nan, dtype=torch.float64),
        origin=Origin.of(problem, statistics),
        statistics=statistics,
        **blank((points,), accuracy),
    )
    curve = request._resumed(path, problem)
    if curve is request:
        _train(problem, curve, training)
        if path is not None:
            curve.save(path)
    return curve._fill(problem, path, every, progress)


def bezier_point(knots: Tensor, time: float) -> Tensor:
    """Return w(t) of a quadratic Bezier curve with knots of shape (3, size). At t = 0 and t = 1 it is exact."""
    if time in (0.0, 1.0):
        return knots[2 * int(time)].clone()
    return (1.0 - time) ** 2 * knots[0] + 2.0 * time * (1.0 - time) * knots[1] + time**2 * knots[2]


def _train(problem: Problem, curve: Path, progress: Training | None) -> None:
    """Train the control point by SGD, in place."""
    recipe, knots = curve.recipe, curve.knots
    generator = torch.Generator().manual_seed(int(recipe["seed"]))
    control = knots[1]
    velocity = torch.zeros_like(control)
    for step in range(int(recipe["steps"])):
        t = float(torch.rand((), generator=generator, dtype=torch.float64))
        batch = problem.batches[int(torch.randint(len(problem.batches), (), generator=generator))]
        at = [w.requires_grad_() for w in problem.shaped(bezier_point(knots, t).to(problem.dtype))]
        with problem.guard():
            outputs = (
                batch_outputs(problem, batch, at) if curve.statistics == "recomputed" else problem.outputs(batch, at)
            )
            # An unbiased estimate of L from one random batch.
            value = problem.value_of(batch, outputs, at) * len(problem.batches)
            slope = problem.flat(torch.autograd.grad(value, at, materialize_grads=True))
        loss = float(value.detach())
        if not (math.isfinite(loss) and slope.isfinite().all()):
            raise ArithmeticError(
                f"the Bezier path's loss is {loss} or its gradient is not finite in training step {step + 1}; use an "
                f"lr below {recipe['lr']:g}."
            )
        slope = slope.to(control) + problem.weight_decay * problem.flat(at).to(control)
        velocity.mul_(recipe["momentum"]).add_(slope, alpha=2.0 * t * (1.0 - t))
        control.sub_(velocity, alpha=recipe["lr"] * _schedule(step / recipe["steps"]))
        curve.training[step] = loss
        if progress is not None:
            progress(step + 1, loss)


def _schedule(done: float) -> float:
    return 1.0 if done <= 0.5 else max(0.01, 1.0 - 0.99 * (done - 0.5) / 0.4)


def _knots(
    problem: Problem,
    checkpoints: Sequence[Checkpoint],
    labels: Sequence[str] | None,
    points: int,
    statistics: Statistics | None,
) -> tuple[Tensor, tuple[str, ...], Statistics]:
    """The checkpoints as rows, their labels, and the statistics to use."""
    if isinstance(checkpoints, (Tensor, torch.nn.Module)) or len(checkpoints) < 2:
        raise ValueError("a path needs a list of at least two checkpoints.")
    if points < 3:
        raise ValueError(f"a path needs at least 3 points per segment, got {points!r}.")
    names = tuple(map(str, range(len(checkpoints)))) if labels is None else tuple(labels)
    if len(names) != len(checkpoints):
        raise ValueError(f"got {len(names)} labels for {len(checkpoints)} checkpoints; pass one for each.")
    unlike = list(dict.fromkeys(n for c in checkpoints for n in buffers_unlike(problem, c)))
    statistics = choose_statistics(problem, statistics, unlike)
    dtype = torch.promote_types(problem.dtype, torch.float32)
    rows = torch.stack([weights_of(problem, c).to(dtype) for c in checkpoints])
    for k in range(len(rows) - 1):
        if torch.equal(rows[k], rows[k + 1]):
            raise ValueError(
                f"checkpoints {names[k]!r} and {names[k + 1]!r} have the same weights; remove one of them."
            )
    return rows, names, statistics
