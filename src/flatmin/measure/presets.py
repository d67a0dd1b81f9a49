"""Numbers as others publish them: the same measures, with each source's own choice of data, spectrum and statistic."""

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
    """A preset's numbers.

    Args:
        preset: its name.
        numbers: by name.
        converged: whether every eigenvalue did.
        conventions: of what was measured.
    """

    preset: str
    numbers: dict[str, float]
    converged: bool
    conventions: Conventions


def pyhessian_batch(problem: Problem, *, top: int = 1, tol: float = 1e-2, seed: int = 0) -> PublishedNumbers:
    """The eigenvalues of largest magnitude on a single batch, the problem's first, as in PyHessian's examples.

    Its example takes 200 un-augmented training images; its authors advise the whole data set. Magnitude decides, so a
    large negative eigenvalue comes first. No weight decay; eval mode.

    Args:
        problem: the function; only its first batch is used.
        top: how many. Default 1.
        tol: relative residual. Default 1e-2, whose eigenvalues are far better than PyHessian's default stop gives.
        seed: of the start vector.

    Returns:
        lambda_1, lambda_2, ... by falling magnitude.

    Raises:
        ValueError: more eigenvalues than weights.

    Source: Yao et al., PyHessian, 2020.
    """
    first = only(problem, problem.batches[:1])
    both = min(top, first.size - top)
    run = spectrum(Hessian(first), top=top, bottom=max(both, 0), tol=tol, seed=seed)
    values = sorted([*run.top.tolist(), *run.bottom.tolist()], key=abs, reverse=True)[:top]
    return _published("pyhessian_batch", values, run.converged, first)


def sam_paper(problem: Problem, *, tol: float = 1e-2, seed: int = 0) -> PublishedNumbers:
    """lambda_max and lambda_max / lambda_5 of the mean training loss.

    Take a net without BatchNorm, as they did, or say that yours has it.

    Args:
        problem: the function, over the training data.
        tol: relative residual. Default 1e-2.
        seed: of the start vector.

    Returns:
        lambda_1 ... lambda_5 and "lambda_1 / lambda_5".

    Raises:
        ValueError: fewer than five weights.

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
    """The top eigenvalues of single mini-batches, pooled: mean of the positive ones, largest, share of negative ones.

    The source takes 40 mini-batches of 128 from the augmented training loader, so give a problem over such batches.
    These are not eigenvalues of the training loss: a mini-batch's are much larger.

    Args:
        problem: the function; each of its batches is measured by itself.
        top: eigenvalues of each. Default 5.
        batches: how many of the problem's. Default 40.
        tol: relative residual. Default 1e-2.
        seed: of the start vectors.

    Returns:
        "mean of positives", "largest", "share negative".

    Raises:
        ValueError: fewer batches than asked for.

    Source: Luong, empirical study of SAM (2024), and its code.
    """
    if len(problem.batches) < batches:
        raise ValueError(f"the problem has {len(problem.batches)} batches, {batches} were asked for.")
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
    """lambda_max of the full training loss beside the curvature at which gradient descent becomes unstable.

    Args:
        problem: the function, over all training data.
        lr: learning rate.
        momentum: of heavy ball. Default 0.
        tol: relative residual. Default 1e-2.
        seed: of the start vector.

    Returns:
        lambda_1, "edge" and "lambda_1 / edge".

    Raises:
        ValueError: a learning rate that is not positive.

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
    """Worst-case m-sharpness with m = 128 over the first 1024 training examples, 20 steps, no restarts.

    Wrap the loss in `LogitNormalised` for their normalised form. Their l2 step is not the steepest ascent of its norm
    and their zero weights spoil it; here both are right, so that values can be a little larger.

    Args:
        problem: the function, over the training data in their order, un-augmented.
        rho: radius.
        norm: "linf" (default) or "l2".
        adaptive: whether in multiples of |w|. Default True.
        examples: how many of the first. Default 1024.
        seed: of random points.

    Raises:
        ValueError: fewer examples than 128, or see `m_sharpness`.

    Source: Andriushchenko et al., A Modern Look at the Relationship between Sharpness and Generalization, ICML 2023,
    and their code.
    """
    groups, _ = split(problem, 128)
    if examples < 128 or not groups:
        have = sum(len(first_tensor(batch.targets)) for batch in problem.batches)
        raise ValueError(f"this takes groups of 128 examples; there are {have}, of which {examples} were asked for.")
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
