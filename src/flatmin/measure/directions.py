"""Directions in weight space: random (filter-normalised), along eigenvectors, towards checkpoints."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from flatmin.measure.checkpoints import listed
from flatmin.measure.evaluate import Checkpoint, buffers_unlike, weights_of
from flatmin.measure.krylov import Spectrum
from flatmin.measure.problem import Problem

Normalise = Literal["filter", "layer", "model", "none"]
Vectors = Literal["ignore", "tensor"]
Recipe = Mapping[str, str | int | float | bool]


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightDirection:
    """A direction in weight space, and how it was made.

    Args:
        vector: shape (size,), in the problem's dtype.
        label: label of the axis in figures.
        recipe: "kind" and the arguments from which the direction can be made again.
        layout: hash of the names and shapes of the weights that it belongs to.
        unlike: names of the buffers in which the target checkpoint differs from the model.
    """

    vector: Tensor
    label: str
    recipe: Recipe
    layout: str
    unlike: tuple[str, ...] = field(default=())

    @property
    def kind(self) -> str:
        """The kind of direction: "gaussian", "eigenvector", "difference", "principal" or "given"."""
        return str(self.recipe["kind"])

    @property
    def length(self) -> float:
        """The L2 norm of the vector."""
        return float(torch.linalg.vector_norm(self.vector, dtype=torch.float64))

    def check(self, problem: Problem) -> None:
        """Check that the direction belongs to the problem, is finite and is not zero.

        Raises:
            ValueError: one of these does not hold.
        """
        if self.vector.shape != (problem.size,):
            raise ValueError(
                f"the direction {self.label!r} has {self.vector.numel()} entries, but the problem has {problem.size} "
                "weights; use a direction of the same model and the same params."
            )
        if self.layout != layout(problem):
            raise ValueError(
                f"the direction {self.label!r} belongs to weights with other names or shapes than this problem's."
            )
        if not math.isfinite(self.length) or not self.length:
            raise ValueError(f"the direction {self.label!r} has length {self.length}; it must be finite and above 0.")


def layout(problem: Problem) -> str:
    """Hash of the names and shapes of the selected weights."""
    text = ";".join(f"{n}:{tuple(w.shape)}" for n, w in zip(problem.names, problem.weights, strict=True))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def gaussian(
    problem: Problem, *, seed: int = 0, normalise: Normalise = "filter", vectors: Vectors = "ignore"
) -> WeightDirection:
    """Make a random direction in which each block has the norm of the corresponding weights.

        d_f = z_f ||w_f|| / ||z_f||,   z ~ N(0, 1)

    for each block f. With filter normalisation, a block is one filter: an entry of the first dimension of a tensor with
    at least two dimensions, that is, the weights of one output channel of a convolution or of one output of a linear
    layer. In a block whose weights are all zero, the direction is zero.

    Args:
        problem: the problem whose weights are used.
        seed: seed of the draw, which is the same on every device. Default 0.
        normalise: the blocks: "filter", "layer" (each tensor), "model" (all weights, ||d|| = ||w||), or "none"
            (d = z). Default "filter".
        vectors: treatment of tensors with fewer than two dimensions (biases, normalisation layers): "ignore" sets the
            direction to zero there, "tensor" makes each tensor one block. Default "ignore".

    Raises:
        ValueError: an option is unknown, or all entries of the direction are zero.

    Source: Li, Xu, Taylor, Studer & Goldstein, NeurIPS 2018; vectors="ignore" as in their experiments.
    """
    _check(normalise, vectors)
    return _direction(problem, _normalised(problem, seed, normalise, vectors), _recipe(seed, normalise, vectors))


def gaussian_pair(
    problem: Problem,
    *,
    seeds: tuple[int, int] = (0, 1),
    normalise: Normalise = "filter",
    vectors: Vectors = "ignore",
    orthogonal: bool = False,
) -> tuple[WeightDirection, WeightDirection]:
    """Make two random directions for a plane, each as in `gaussian`.

    Their cosine is of the order 1/sqrt(size). With `orthogonal` it is zero: the second direction is made orthogonal to
    the first within each block and then rescaled to the block's norm. A projection of the whole vector would change
    these norms. In a block with a single entry, both conditions cannot hold, and the second direction is zero there.

    Args:
        problem: the problem whose weights are used.
        seeds: two different seeds. Default (0, 1).
        normalise: see `gaussian`. Default "filter".
        vectors: see `gaussian`. Default "ignore".
        orthogonal: make the second direction orthogonal to the first. Default False, as in the paper.

    Raises:
        ValueError: the seeds are equal, or as in `gaussian`.
    """
    _check(normalise, vectors)
    if seeds[0] == seeds[1]:
        raise ValueError(f"both seeds are {seeds[0]!r}, which gives the same direction twice; use different seeds.")
    first, second = (_normalised(problem, seed, normalise, vectors) for seed in seeds)
    recipe = _recipe(seeds[1], normalise, vectors)
    if orthogonal:
        for a, b in zip(_blocks(problem, first, normalise), _blocks(problem, second, normalise), strict=True):
            length = torch.linalg.vector_norm(b, dim=1, keepdim=True)
            for _ in range(2):
                b -= a * ((a * b).sum(1, keepdim=True) * _inverse(a.square().sum(1, keepdim=True)))
            if b.shape[1] > 1:
                b *= length * _inverse(torch.linalg.vector_norm(b, dim=1, keepdim=True))
            else:
                b.zero_()
        recipe = {**recipe, "orthogonal_to": seeds[0]}
    return (
        _direction(problem, first, _recipe(seeds[0], normalise, vectors)),
        _direction(problem, second, recipe),
    )


def eigenvector(
    problem: Problem,
    spectrum: Spectrum,
    index: int = 0,
    *,
    end: Literal["top", "bottom"] = "top",
    norm: float | Literal["weights"] = 1.0,
) -> WeightDirection:
    """Use an eigenvector as a direction. Its sign is such that the entry with the largest magnitude is positive.

    Args:
        problem: the problem whose weights are used.
        spectrum: result of `flatmin.measure.spectrum` for an operator of the same problem.
        index: index of the eigenvector, 0 for the outermost. Default 0.
        end: "top" for the largest eigenvalues, "bottom" for the smallest. Default "top".
        norm: length of the direction, > 0, or "weights" for ||w||. Default 1: the second derivative of L(w + t d) in t
            is then the eigenvalue.

    Raises:
        ValueError: the spectrum has no such eigenvector or another size, or the norm is not positive.
    """
    if end not in ("top", "bottom"):
        raise ValueError(f"end must be 'top' or 'bottom', got {end!r}.")
    vectors, values = getattr(spectrum, f"{end}_vectors"), getattr(spectrum, end)
    if not 0 <= index < len(values):
        raise ValueError(f"the spectrum has {len(values)} {end} eigenvectors, so index={index!r} is out of range.")
    if vectors.shape[1] != problem.size:
        raise ValueError(
            f"the spectrum has size {vectors.shape[1]}, but the problem has size {problem.size}; pass a spectrum of "
            "the same problem."
        )
    length = _weight_norm(problem) if norm == "weights" else float(norm)
    if not (length > 0 and math.isfinite(length)):
        raise ValueError(f"norm must be positive, got {length!r}.")
    v = vectors[index].to(problem.device, torch.float64)
    v = v * (length / float(v.norm() * v[v.abs().argmax()].sign()))
    value, residual = float(values[index]), float(getattr(spectrum, f"{end}_residuals")[index])
    recipe = {"kind": "eigenvector", "end": end, "index": index, "norm": length, "eigenvalue": value}
    label = f"eigenvector {index + 1}{'' if end == 'top' else ' from below'} (λ = {value:.3g})"
    return _direction(problem, v, {**recipe, "residual": residual}, label)


def difference(problem: Problem, checkpoint: Checkpoint, *, label: str = "checkpoint") -> WeightDirection:
    """Make the direction from the model's weights to those of a checkpoint: 0 is the model, 1 the checkpoint.

    Args:
        problem: the problem whose weights are used.
        checkpoint: a model, a state dict, or a vector of shape (size,).
        label: label of the axis in figures. Default "checkpoint".

    Raises:
        ValueError: the checkpoint belongs to another model, or its weights equal those of the model.
    """
    d = weights_of(problem, checkpoint).double() - problem.flat(problem.weights).double()
    if not d.any():
        raise ValueError(f"{label!r} has the same weights as the model, so there is no direction to it.")
    return _direction(
        problem, d, {"kind": "difference", "to": label}, label, tuple(buffers_unlike(problem, checkpoint))
    )


def given(problem: Problem, vector: Tensor | Mapping[str, Tensor] | Sequence[Tensor], *, label: str) -> WeightDirection:
    """Use any vector in weight space, such as a gradient, as a direction.

    Args:
        problem: the problem whose weights are used.
        vector: a vector of shape (size,); or tensors shaped like the selected weights, either by name (weights without
            a tensor do not move) or one for each in the order of `problem.names`.
        label: label of the axis in figures.

    Raises:
        ValueError: a shape or name does not match the weights, or the vector is zero.

    Examples:
        >>> import torch
        >>> from flatmin.measure import Problem, landscape
        >>> net, x, y = torch.nn.Linear(4, 3), torch.randn(20, 4), torch.randint(3, (20,))
        >>> problem = Problem(net, torch.nn.functional.cross_entropy, (x, y))
        >>> along = given(problem, {"bias": torch.ones(3)}, label="all biases")
        >>> landscape(problem, along, points=5).loss.shape
        torch.Size([5])
    """
    vector = vector if isinstance(vector, Tensor) else _joined(problem, vector)
    problem.shaped(vector)
    return _direction(problem, vector.detach().double().clone(), {"kind": "given", "label": label}, label)


def _joined(problem: Problem, tensors: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
    """Concatenate the tensors of a direction into one vector."""
    own = dict(zip(problem.names, problem.weights, strict=True))
    if not isinstance(tensors, Mapping):
        if len(tensors) != len(own):
            raise ValueError(
                f"got {len(tensors)} tensors for {len(own)} selected weights; pass one for each, or a mapping by name."
            )
        tensors = dict(zip(own, tensors, strict=True))
    for name, tensor in tensors.items():
        if name not in own:
            raise ValueError(f"no selected weight is called {name!r}; the names are {listed(problem.names)}.")
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{name!r} has shape {tuple(tensor.shape)} in the direction, but {tuple(own[name].shape)} in the model."
            )
    return problem.flat([tensors[n].to(w) if n in tensors else torch.zeros_like(w) for n, w in own.items()])


def _direction(
    problem: Problem, vector: Tensor, recipe: Recipe, label: str = "", unlike: tuple[str, ...] = ()
) -> WeightDirection:
    made = WeightDirection(
        vector=vector.to(problem.device, problem.dtype),
        label=label or _gaussian_label(recipe),
        recipe=recipe,
        layout=layout(problem),
        unlike=unlike,
    )
    if recipe["kind"] == "gaussian" and not made.vector.any():
        raise ValueError(
            "the direction is zero, because every block of the weights is zero or ignored (vectors='ignore' ignores "
            "biases and normalisation layers); use vectors='tensor' or normalise='none'."
        )
    made.check(problem)
    return made


def _check(normalise: str, vectors: str) -> None:
    if normalise not in ("filter", "layer", "model", "none"):
        raise ValueError(f"normalise must be 'filter', 'layer', 'model' or 'none', got {normalise!r}.")
    if vectors not in ("ignore", "tensor"):
        raise ValueError(f"vectors must be 'ignore' or 'tensor', got {vectors!r}.")


def _recipe(seed: int, normalise: str, vectors: str) -> dict[str, str | int | float | bool]:
    return {"kind": "gaussian", "seed": seed, "normalise": normalise, "vectors": vectors}


_NAMES = {
    "filter": "filter-normalised",
    "layer": "layer-normalised",
    "model": "of the weights' length",
    "none": "not normalised",
}


def _gaussian_label(recipe: Recipe) -> str:
    return f"random direction, {_NAMES[str(recipe['normalise'])]}, seed {recipe['seed']}"


def _normalised(problem: Problem, seed: int, normalise: Normalise, vectors: Vectors) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(problem.size, generator=generator, dtype=torch.float64)
    w = problem.flat(problem.weights).to("cpu", torch.float64, copy=True)
    if vectors == "ignore":
        for flat in (z, w):
            for piece, own in zip(_pieces(problem, flat), problem.weights, strict=True):
                if own.dim() < 2:
                    piece.zero_()
    if normalise != "none":
        for d, own in zip(_blocks(problem, z, normalise), _blocks(problem, w, normalise), strict=True):
            lengths = torch.linalg.vector_norm(own, dim=1, keepdim=True)
            d *= lengths * _inverse(torch.linalg.vector_norm(d, dim=1, keepdim=True))
    return z


def _pieces(problem: Problem, flat: Tensor) -> tuple[Tensor, ...]:
    return tuple(flat.split([w.numel() for w in problem.weights]))


def _blocks(problem: Problem, flat: Tensor, normalise: Normalise) -> list[Tensor]:
    """Views of a vector as matrices whose rows are the blocks."""
    if normalise in ("model", "none"):
        return [flat.view(1, -1)]
    return [
        piece.view(own.shape[0] if normalise == "filter" and own.dim() >= 2 else 1, -1)
        for piece, own in zip(_pieces(problem, flat), problem.weights, strict=True)
        if own.numel()
    ]


def _inverse(x: Tensor) -> Tensor:
    """1/x, and 0 where x is 0."""
    return torch.where(x == 0, 0.0, 1.0 / x)


def _weight_norm(problem: Problem) -> float:
    return float(torch.linalg.vector_norm(problem.flat(problem.weights), dtype=torch.float64))
