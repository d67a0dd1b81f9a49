"""Directions in the space of the weights: random and normalised, along eigenvectors, towards checkpoints."""

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
    """A vector in the space of a problem's weights and how it was made.

    Args:
        vector: shape (size,), in the problem's dtype.
        label: for an axis.
        recipe: "kind" and the arguments that remake it.
        layout: hash of the names and shapes of the weights that it belongs to.
        unlike: buffers in which the checkpoint that it leads to differs from the model.
    """

    vector: Tensor
    label: str
    recipe: Recipe
    layout: str
    unlike: tuple[str, ...] = field(default=())

    @property
    def kind(self) -> str:
        """The kind: "gaussian", "eigenvector", "difference", "principal" or "given"."""
        return str(self.recipe["kind"])

    @property
    def length(self) -> float:
        """The L2 norm of the vector."""
        return float(torch.linalg.vector_norm(self.vector, dtype=torch.float64))

    def check(self, problem: Problem) -> None:
        """Refuse another model's direction, one without a length, and one that is not finite.

        Raises:
            ValueError: one of these.
        """
        if self.vector.shape != (problem.size,):
            raise ValueError(
                f"the direction {self.label!r} has {self.vector.numel()} entries, the problem {problem.size} weights; "
                "it belongs to another model or another choice of params."
            )
        if self.layout != layout(problem):
            raise ValueError(
                f"the direction {self.label!r} belongs to weights of other names or shapes than this problem's."
            )
        if not math.isfinite(self.length) or not self.length:
            raise ValueError(f"the direction {self.label!r} has length {self.length}; there is nowhere to go along it.")


def layout(problem: Problem) -> str:
    """Hash of the names and shapes of the selected weights."""
    text = ";".join(f"{n}:{tuple(w.shape)}" for n, w in zip(problem.names, problem.weights, strict=True))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def gaussian(
    problem: Problem, *, seed: int = 0, normalise: Normalise = "filter", vectors: Vectors = "ignore"
) -> WeightDirection:
    r"""A random direction whose blocks are as long as the weights' own.

    .. math::
        d_f = \frac{z_f}{\|z_f\|} \|w_f\|,\quad z \sim N(0, 1)

    over blocks f. A filter is an entry of the first dimension of a tensor with at least two: what gives one output
    channel of a convolution or one output of a linear layer. A block of weights that are all zero stays where it is.

    Args:
        problem: the weights.
        seed: of the draw, which is the same on every device.
        normalise: the blocks: "filter" (default), "layer" (every tensor), "model" (all of it, ||d|| = ||w||), or
            "none" (d = z).
        vectors: tensors with fewer than two dimensions (biases, normalisation layers): "ignore" (default) sets their
            part to zero, "tensor" makes each one block.

    Raises:
        ValueError: another word, or a direction that is zero in every entry.

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
    """Two random directions for a plane, each as by `gaussian`.

    Their cosine is of the order 1/sqrt(size). With `orthogonal` it is zero: the second is made orthogonal to the first
    within each block and then brought back to the block's length, so that its norms stay those of the weights, which a
    projection of the whole vector would change. A block of one entry cannot be both; there the second is zero.

    Args:
        problem: the weights.
        seeds: of the two draws, different ones.
        normalise: see `gaussian`.
        vectors: see `gaussian`.
        orthogonal: see above. Default False, as in the paper.

    Raises:
        ValueError: equal seeds, or as `gaussian`.
    """
    _check(normalise, vectors)
    if seeds[0] == seeds[1]:
        raise ValueError(f"both seeds are {seeds[0]!r}, which gives the same direction twice.")
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
    """An eigenvector of a Krylov run; its sign is such that the entry of largest size is positive.

    Args:
        problem: the weights.
        spectrum: a run on an operator of the same problem.
        index: which, 0 for the outermost.
        end: "top" (default), the largest eigenvalues, or "bottom", the smallest.
        norm: length, > 0, or "weights" for ||w||. Default 1: with steps t along it, the second derivative of L in t is
            the eigenvalue.

    Raises:
        ValueError: an eigenvector that the run has not, another size, or a norm that is not positive.
    """
    if end not in ("top", "bottom"):
        raise ValueError(f"end must be 'top' or 'bottom', got {end!r}.")
    vectors, values = getattr(spectrum, f"{end}_vectors"), getattr(spectrum, end)
    if not 0 <= index < len(values):
        raise ValueError(f"the spectrum has {len(values)} {end} eigenvectors, so there is none of index {index!r}.")
    if vectors.shape[1] != problem.size:
        raise ValueError(f"the spectrum is of size {vectors.shape[1]}, the problem of size {problem.size}.")
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
    """From the model's weights to a checkpoint's: 0 is the model, 1 the checkpoint.

    Args:
        problem: the weights.
        checkpoint: a model, a state dict, or a vector of shape (size,).
        label: what the axis calls it.

    Raises:
        ValueError: a checkpoint of another model, or equal to the model.
    """
    d = weights_of(problem, checkpoint).double() - problem.flat(problem.weights).double()
    if not d.any():
        raise ValueError(f"{label!r} has the model's own weights, so there is no direction to it.")
    return _direction(
        problem, d, {"kind": "difference", "to": label}, label, tuple(buffers_unlike(problem, checkpoint))
    )


def given(problem: Problem, vector: Tensor | Mapping[str, Tensor] | Sequence[Tensor], *, label: str) -> WeightDirection:
    """Any vector in the space of the weights, such as a gradient, under a label.

    Args:
        problem: the weights.
        vector: shape (size,); or tensors shaped like the selected weights, by their names (the others do not move) or
            one for each in the order of `problem.names`.
        label: what the axis calls it.

    Raises:
        ValueError: another shape or name, or zero.

    Example:
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
    """One vector of the tensors of a direction."""
    own = dict(zip(problem.names, problem.weights, strict=True))
    if not isinstance(tensors, Mapping):
        if len(tensors) != len(own):
            raise ValueError(f"{len(tensors)} tensors for {len(own)} selected weights; give one for each, or by name.")
        tensors = dict(zip(own, tensors, strict=True))
    for name, tensor in tensors.items():
        if name not in own:
            raise ValueError(f"no selected weight is called {name!r}; there are {listed(problem.names)}.")
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{name!r} has shape {tuple(tensor.shape)} in the direction, {tuple(own[name].shape)} in the model."
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
            "every block of the weights has length zero or is left out (vectors='ignore' leaves out biases and "
            "normalisation layers), so the direction is zero; use vectors='tensor' or normalise='none'."
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
