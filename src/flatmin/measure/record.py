"""Base class of landscapes: evaluated points, the model they belong to, and a file from which to continue."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from flatmin.measure.checkpoints import listed
from flatmin.measure.evaluate import Statistics, evaluate
from flatmin.measure.problem import Conventions, Problem

Progress = Callable[[int, float], None]
_FORMAT = "flatmin.landscape/1"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A fingerprint of the model around which a landscape was measured.

    Args:
        weights: hash of each selected weight by name, with shape and dtype.
        rest: hashes of the other weights and the buffers.
        norm: ||w|| of the selected weights.
        loss: L at the model.
        conventions: conventions of the problem.
    """

    weights: dict[str, str]
    rest: dict[str, str]
    norm: float
    loss: float
    conventions: Conventions

    @classmethod
    def of(cls, problem: Problem, statistics: Statistics) -> Origin:
        """The fingerprint of a problem's model."""
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
        """Describe how another model differs. Losses may differ by round-off.

        Args:
            other: fingerprint of the other model.
            dtype: dtype of its evaluations.
            weights: whether the values of the selected weights must agree, or only their names and shapes.
        """
        differences = []
        for kind, mine, its in (("weights", self.weights, other.weights), ("other tensors", self.rest, other.rest)):
            if missing := [n for n in mine if n not in its]:
                differences.append(f"it has no {listed(missing)}")
            if extra := [n for n in its if n not in mine]:
                differences.append(f"it has {listed(extra)} in addition")
            both = [n for n in mine if n in its]
            if shapes := [n for n in both if mine[n].rpartition(" ")[0] != its[n].rpartition(" ")[0]]:
                differences.append(f"shape or dtype of {listed(shapes)} differs")
            if values := [n for n in both if mine[n] != its[n] and n not in shapes]:
                differences += [f"the values of {listed(values)} differ"] * (weights or kind != "weights")
        for name, mine_is in dataclasses.asdict(self.conventions).items():
            its_is = getattr(other.conventions, name)
            # The batch size may differ. If the loss depends on it, the comparison of losses below detects this.
            if mine_is != its_is and name not in ("seed", "size", "batch"):
                differences.append(f"{name} is {its_is!r} instead of {mine_is!r}")
        close = math.isclose(self.loss, other.loss, rel_tol=math.sqrt(torch.finfo(dtype).eps))
        close = close or (math.isnan(self.loss) and math.isnan(other.loss))
        if not differences and self.weights == other.weights and not close:
            differences.append(
                f"its loss is {other.loss:.6g} instead of {self.loss:.6g}, so data or loss function differ"
            )
        return differences


@dataclass(frozen=True, kw_only=True, eq=False)
class Landscape(ABC):
    """Base class of losses on a grid of weights, some of which may not be evaluated yet.

    Args:
        loss: loss at each point, float64, on the CPU. Values that are not finite are kept.
        accuracy: accuracy at each point, same shape; None if not requested.
        done: mask of the points that have been evaluated. At the others, loss and accuracy are NaN.
        origin: fingerprint of the model.
        statistics: running statistics that BatchNorm used at each point.
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
        """Conventions of the problem."""
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
        """The fields of the subclass as plain values and tensors."""

    @classmethod
    @abstractmethod
    def _unpacked(cls, saved: dict[str, Any], shared: dict[str, Any]) -> Self:
        """Inverse of `_packed`."""

    @abstractmethod
    def _unlike(self, other: Self) -> str:
        """Describe how another landscape differs from this request; empty if it does not."""

    def check(self, problem: Problem) -> None:
        """Check that the landscape was measured on this problem.

        Raises:
            ValueError: the model, its weights or buffers, the data or the conventions differ. The message says which.
        """
        now = Origin.of(problem, self.statistics)
        if differences := self.origin.differences(now, problem.dtype, weights=self.anchored):
            raise ValueError(f"this {self.kind} was measured on another model or other data: {'; '.join(differences)}.")

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
            problem: the problem on which the landscape was measured.
            path: file to store it in, written about every `every` seconds, at the end, and on an exception. Default
                None: not stored.
            every: seconds between writes. Default 60.
            progress: called with (points done, share done) after each point. Default None.

        Returns:
            The landscape itself.

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
                    "the processes of the group have different points done, because they read different files; give "
                    "all of them the same file."
                )
        accuracy = None if self.accuracy is None else self.accuracy.view(-1)
        # In a process group, only rank 0 writes.
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
        """Write the landscape to a file, atomically (by a temporary file and a rename).

        The file contains plain tensors, strings and numbers (`torch.load(path, weights_only=True)`).

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
        """Read a landscape from a file.

        Args:
            path: file written by `save`.
            problem: if given, check that the landscape was measured on it. Default None.

        Raises:
            ValueError: the file is not a landscape, is of another kind, or was measured on another problem.
            OSError: the file cannot be read.
        """
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:
            raise ValueError(f"{os.fspath(path)!r} is not a landscape file: {type(error).__name__}.") from error
        if not isinstance(saved, dict) or saved.get("format") != _FORMAT:
            is_of = saved.get("format") if isinstance(saved, dict) else type(saved).__name__
            raise ValueError(f"{os.fspath(path)!r} is not a landscape file (format {is_of!r}, expected {_FORMAT!r}).")
        if saved["kind"] != cls.kind:
            raise ValueError(f"{os.fspath(path)!r} contains a {saved['kind']}, expected a {cls.kind}.")
        origin = dict(saved["origin"])
        fields = {f.name for f in dataclasses.fields(Conventions)}
        conventions = Conventions(**{k: v for k, v in origin.pop("conventions").items() if k in fields})
        shared = {
            "loss": saved["loss"],
            "accuracy": saved["accuracy"],
            "done": saved["done"],
            "origin": Origin(**origin, conventions=conventions),
            "statistics": saved["statistics"],
        }
        landscape = cls._unpacked(saved, shared)
        if problem is not None:
            landscape.check(problem)
        return landscape

    def _resumed(self, path: str | os.PathLike[str] | None, problem: Problem) -> Self:
        """The stored state of this request, or the request itself if there is no file yet.

        Raises:
            ValueError: the file contains something else.
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
                f"{os.fspath(path)!r} contains another {self.kind}: {what}; use its settings to continue it, or move "
                "the file."
            )
        if differences := old.origin.differences(self.origin, problem.dtype, weights=self.anchored):
            raise ValueError(
                f"{os.fspath(path)!r} was measured on another model or other data: {'; '.join(differences)}."
            )
        return old


def blank(shape: tuple[int, ...], accuracy: bool) -> dict[str, Any]:
    """The fields of a landscape with no evaluated points."""
    empty = torch.full(shape, math.nan, dtype=torch.float64)
    return {
        "loss": empty,
        "accuracy": empty.clone() if accuracy else None,
        "done": torch.zeros(shape, dtype=torch.bool),
    }


def _hash(tensor: Tensor) -> str:
    """Shape, dtype and a hash of the content."""
    flat = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(flat.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} {digest}"
