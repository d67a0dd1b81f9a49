"""Training trajectories: checkpoints in the plane of their principal components."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flatmin.measure.directions import WeightDirection, layout
from flatmin.measure.evaluate import Checkpoint, buffers_unlike, weights_of
from flatmin.measure.landscape import Slice, grid_around, landscape
from flatmin.measure.problem import Problem


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectory:
    """Result of `pca`: checkpoints in the coordinates of their principal components.

    Args:
        directions: the k principal components as unit vectors, by decreasing variance.
        coordinates: coordinates of the n checkpoints, shape (n, k), in units of the weights. The origin is the model.
        explained: share of the variance along each direction, shape (k,).
        off: L2 distance of each checkpoint from the plane through the model, shape (n,). A figure of the plane shows
            the loss at the projection of the checkpoint, which is this far from the checkpoint itself.
    """

    directions: tuple[WeightDirection, ...]
    coordinates: Tensor
    explained: Tensor
    off: Tensor

    def slice(self, problem: Problem, *, points: int = 25, margin: float = 0.2, **options: Any) -> Slice:
        """Evaluate the loss on the plane of the first two components through the model, over the checkpoints' extent.

        Args:
            problem: the problem that was passed to `pca`.
            points: maximum number of points per axis. The model is one of them. Default 25.
            margin: distance by which the grid extends beyond the checkpoints, as a share of their extent. Default 0.2.
            **options: options of `landscape`: accuracy, statistics, path, every, progress.

        Raises:
            ValueError: there is only one component, the margin is negative, or as in `landscape`.
        """
        if len(self.directions) < 2:
            raise ValueError("a plane needs two components, but the trajectory has one; use pca(..., components=2).")
        if not margin >= 0:
            raise ValueError(f"margin must be >= 0, got {margin!r}.")
        grid = []
        for k in range(2):
            reached = self.coordinates[:, k]
            low, high = min(float(reached.min()), 0.0), max(float(reached.max()), 0.0)
            more = margin * (high - low)
            grid.append(grid_around(low - more, high + more, points))
        return landscape(problem, self.directions[:2], grid=grid, trajectory=self.coordinates[:, :2], **options)


def pca(problem: Problem, checkpoints: Sequence[Checkpoint], *, components: int = 2) -> Trajectory:
    """Compute the principal components of a list of checkpoints.

        X = [w_1 - mean(w); ...; w_n - mean(w)],   X X^T = U S^2 U^T,   d_k = X^T u_k / s_k

    The n x n matrix X X^T is decomposed in float64. Signs are chosen such that no coordinate of the last checkpoint is
    below that of the first. In many dimensions, even a random walk has much of its variance in two components and looks
    smooth there (Antognini & Sohl-Dickstein, NeurIPS 2018), so the plane says little about the shape of the path.

    Args:
        problem: the problem whose weights are used. Its model, usually the last checkpoint, is the origin.
        checkpoints: models, state dicts or vectors, in the order of training; more than `components`.
        components: number of components k, >= 1. Default 2.

    Raises:
        ValueError: there are too few checkpoints, or they lie in fewer dimensions than `components`.

    Source: Li et al., NeurIPS 2018.
    """
    if components < 1:
        raise ValueError(f"components must be at least 1, got {components!r}.")
    if isinstance(checkpoints, (Tensor, torch.nn.Module)) or len(checkpoints) <= components:
        count = 1 if isinstance(checkpoints, (Tensor, torch.nn.Module)) else len(checkpoints)
        raise ValueError(f"components={components} needs more than {components} checkpoints, got {count}.")
    rows = torch.stack([weights_of(problem, c) for c in checkpoints])
    unlike = tuple(dict.fromkeys(n for c in checkpoints for n in buffers_unlike(problem, c)))
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=problem.device)
    for _, x in _pieces(problem, rows):
        centred = x - x.mean(0)
        gram += centred @ centred.T
    variances, u = torch.linalg.eigh(gram)
    variances, u = variances.flip(0).clamp(min=0.0), u.flip(1)
    rank = int((variances > 1e-12 * variances[0]).sum()) if variances[0] > 0 else 0
    if rank < components:
        advice = f"use components={rank}" if rank else "pass checkpoints with different weights"
        raise ValueError(f"the checkpoints span {rank} dimension{'s' * (rank != 1)}; {advice}.")
    basis = torch.empty(components, problem.size, dtype=torch.float64, device=problem.device)
    for where, x in _pieces(problem, rows):
        basis[:, where] = u[:, :components].T @ (x - x.mean(0))
    for k in range(components):  # orthogonalise again, because X X^T squares the condition number
        for j in range(k):
            basis[k] -= (basis[k] @ basis[j]) * basis[j]
        basis[k] /= basis[k].norm()
        if (rows[-1].double() - rows[0].double()) @ basis[k] < 0:
            basis[k] *= -1.0
    coordinates = sum(x @ basis[:, where].T for where, x in _pieces(problem, rows))
    assert isinstance(coordinates, Tensor)
    off = sum((x - coordinates @ basis[:, where]).square().sum(1) for where, x in _pieces(problem, rows))
    assert isinstance(off, Tensor)
    explained = variances[:components] / variances.sum()
    directions = tuple(
        WeightDirection(
            vector=basis[k].to(problem.dtype),
            label=f"principal component {k + 1} ({float(explained[k]):.0%} of the variance)",
            recipe={"kind": "principal", "component": k, "checkpoints": len(rows), "explained": float(explained[k])},
            layout=layout(problem),
            unlike=unlike,
        )
        for k in range(components)
    )
    return Trajectory(
        directions=directions,
        coordinates=coordinates.cpu(),
        explained=explained.cpu(),
        off=off.sqrt().cpu(),
    )


_CHUNK = 1 << 20


def _pieces(problem: Problem, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Differences to the model in float64, for a chunk of columns at a time."""
    origin = problem.flat(problem.weights)
    for start in range(0, problem.size, _CHUNK):
        where = slice(start, min(start + _CHUNK, problem.size))
        yield where, rows[:, where].double() - origin[where].double()
