"""Published protocols: measures with the data, eigenvalues and statistics chosen as in each source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from flatmin.measure.curvature import Hessian
from flatmin.measure.follow import edge
from flatmin.measure.groups import split
from flatmin.measure.krylov import spectrum
from flatmin.measure.problem import Conventions, Problem, first_tensor, only
from flatmin.measure.sharpness import Grouped, m_sharpness


@dataclass(frozen=True, kw_only=True)
class PublishedNumbers:
    """The numbers of a preset.

    Args:
        preset: name of the preset.
        numbers: the numbers by name.
        converged: whether all eigenvalues converged.
        conventions: conventions of the measured problem.
    """

    preset: str
    numbers: dict[str, float]
    converged: bool
    conventions: Conventions


def pyhessian_batch(problem: Problem, *, top: int = 1, tol: float = 1e-2, seed: int = 0) -> PublishedNumbers:
    """The eigenvalues of largest magnitude on a single batch, as in PyHessian's examples.

    PyHessian's example uses 200 un-augmented training images; its authors recommend the whole data set. Eigenvalues are
    ordered by magnitude, so a large negative eigenvalue can be the first. No weight decay, eval mode.

    Args:
        problem: the function. Only its first batch is used.
        top: number of eigenvalues. Default 1.
        tol: relative residual. Default 1e-2, which is far more accurate than PyHessian's default stopping rule.
        seed: seed of the start vector. Default 0.

    Returns:
        lambda_1, lambda_2, ... by decreasing magnitude.

    Raises:
        ValueError: `top` is larger than the number of weights.

    Source: Yao et al., PyHessian, 2020.
    """
    first = only(problem, problem.batches[:1])
    both = min(top, first.size - top)
    run = spectrum(Hessian(first), top=top, bottom=max(both, 0), tol=tol, seed=seed)
    values = sorted([*run.top.tolist(), *run.bottom.tolist()], key=abs, reverse=True)[:top]
    return _published("pyhessian_batch", values, run.converged, first)


def sam_paper(problem: Problem, *, tol: float = 1e-2, seed: int = 0) -> PublishedNumbers:
    """lambda_max and lambda_max / lambda_5 of the mean training loss, as in the SAM paper.

    The paper uses a network without BatchNorm. If yours has BatchNorm, say so when you report these numbers.

    Args:
        problem: the function, over the training data.
        tol: relative residual. Default 1e-2.
        seed: seed of the start vector. Default 0.

    Returns:
        lambda_1 to lambda_5 and "lambda_1 / lambda_5".

    Raises:
        ValueError: the problem has fewer than five weights.

    Source: Foret et al., SAM, ICLR 2021.
    """
    run = spectrum(Hessian(problem), top=5, tol=tol, seed=seed)
    values = run.top.tolist()
    result = _published("sam_paper", values, run.converged, problem)
    result.numbers["lambda_1 / lambda_5"] = values[0] / values[4] if values[4] else float("inf")
    return result


def empirical_sam(
    problem: Problem, *, top: int = 5, batches: int = 40, tol: float = 1e-2, seed: int = 0
) -> PublishedNumbers:
    """Statistics of the top eigenvalues of single mini-batches: mean of the positive ones, largest, share of negatives.

    The source uses 40 mini-batches of 128 from the augmented training loader, so pass a problem with such batches.
    These are not eigenvalues of the training loss: those of a mini-batch are much larger.

    Args:
        problem: the function. Each of its batches is measured separately.
        top: number of eigenvalues per batch. Default 5.
        batches: number of batches to use. Default 40.
        tol: relative residual. Default 1e-2.
        seed: seed of the start vectors. Default 0.

    Returns:
        "mean of positives", "largest" and "share negative".

    Raises:
        ValueError: the problem has fewer batches than `batches`.

    Source: Luong, empirical study of SAM (2024), and its code.
    """
    if len(problem.batches) < batches:
        raise ValueError(f"this measure uses {batches} batches, but the problem has {len(problem.batches)}.")
    values: list[float] = []
    converged = True
    for batch in problem.batches[:batches]:
        run = spectrum(Hessian(only(problem, [batch])), top=top, tol=tol, seed=seed)
        values += run.top.tolist()
        converged = converged and run.converged
    positive = [v for v in values if v > 0]
    return PublishedNumbers(
        preset="empirical_sam",
        numbers={
            "mean of positives": sum(positive) / len(positive) if positive else float("nan"),
            "largest": max(values),
            "share negative": sum(v < 0 for v in values) / len(values),
        },
        converged=converged,
        conventions=problem.conventions.with_seed(seed),
    )


def edge_of_stability(
    problem: Problem, lr: float, *, momentum: float = 0.0, tol: float = 1e-2, seed: int = 0
) -> PublishedNumbers:
    """lambda_max of the full training loss, compared with the curvature at which gradient descent becomes unstable.

    Args:
        problem: the function, over all training data.
        lr: learning rate, > 0.
        momentum: heavy-ball momentum. Default 0.
        tol: relative residual. Default 1e-2.
        seed: seed of the start vector. Default 0.

    Returns:
        lambda_1, "edge" (see `flatmin.measure.follow.edge`) and "lambda_1 / edge".

    Raises:
        ValueError: the learning rate is not positive, or the momentum is outside [0, 1).

    Source: Cohen et al., ICLR 2021.
    """
    limit = edge(lr, momentum)
    run = spectrum(Hessian(problem), tol=tol, seed=seed)
    result = _published("edge_of_stability", run.top.tolist(), run.converged, problem)
    result.numbers.update({"edge": limit, "lambda_1 / edge": run.largest / limit})
    return result


def andriushchenko_m128(
    problem: Problem,
    rho: float,
    *,
    norm: Literal["l2", "linf"] = "linf",
    adaptive: bool = True,
    examples: int = 1024,
    seed: int = 0,
) -> Grouped:
    """Worst-case m-sharpness with m = 128 over the first 1024 training examples, with 20 steps and no restarts.

    Wrap the loss in `LogitNormalised` for the normalised form of the source. In the source's code, the adaptive l2 step
    is not the steepest ascent of its norm, and weights that are exactly zero disable its projection. Both are corrected
    here, so values can be slightly larger.

    Args:
        problem: the function, over the un-augmented training data in their order.
        rho: radius.
        norm: "linf" or "l2". Default "linf".
        adaptive: scale displacements by |w|. Default True.
        examples: number of examples to use, from the first. Default 1024.
        seed: seed of random points. Default 0.

    Raises:
        ValueError: there are fewer than 128 examples; see also `m_sharpness`.

    Source: Andriushchenko et al., A Modern Look at the Relationship between Sharpness and Generalization, ICML 2023,
    and their code.
    """
    groups, _ = split(problem, 128)
    if examples < 128 or not groups:
        have = sum(len(first_tensor(batch.targets)) for batch in problem.batches)
        raise ValueError(
            f"this measure needs at least one group of 128 examples; the problem has {have}, and examples={examples}."
        )
    first = only(problem, [batch for group in groups[: examples // 128] for batch in group.batches])
    return m_sharpness(first, 128, rho, norm=norm, adaptive=adaptive, steps=20, seed=seed)


def _published(preset: str, values: Sequence[float], converged: bool, problem: Problem) -> PublishedNumbers:
    numbers = {f"lambda_{i}": value for i, value in enumerate(values, 1)}
    return PublishedNumbers(preset=preset, numbers=numbers, converged=converged, conventions=problem.conventions)


__all__ = [
    "PublishedNumbers",
    "andriushchenko_m128",
    "edge_of_stability",
    "empirical_sam",
    "pyhessian_batch",
    "sam_paper",
]
