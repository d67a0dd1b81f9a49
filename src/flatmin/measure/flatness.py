"""Other measures of flatness: PAC-Bayes noise, relative flatness of a layer, and the Fisher-Rao norm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatmin.measure.average import Of, at_weights, mean_and_error, noise, statistic_of
from flatmin.measure.ball import check_dtype, dot
from flatmin.measure.curvature import EmpiricalFisher, GaussNewton, Hessian
from flatmin.measure.problem import Conventions, Problem
from flatmin.measure.trace import Estimate, finite, trace

_DOUBLINGS = 30


@dataclass(frozen=True, kw_only=True)
class PacBayes:
    """Result of `pac_bayes`: the noise under which the mean rise reaches the target.

    Args:
        sigma: the largest standard deviation found whose mean rise is at most the target; the lower end of `bracket`.
        sigma_error: its standard error due to the finite number of draws, from the slope of the rise; NaN if the slope
            is not positive. The width of the bracket is not included.
        bracket: sigma, and the next larger value that was tried, whose mean rise is above the target.
        rise: the mean rise at sigma.
        error: standard error of `rise` over the draws.
        target: the target rise.
        start: the error rate or loss at w.
        of: see `pac_bayes`.
        magnitude: see `pac_bayes`.
        eps: see `pac_bayes`; 0 without `magnitude`.
        draws: number of independent draws, each a pair u and -u.
        evaluations: number of evaluations of the loss or error rate.
        conventions: conventions of the problem, with the seed.
    """

    sigma: float
    sigma_error: float
    bracket: tuple[float, float]
    rise: float
    error: float
    target: float
    start: float
    of: Of
    magnitude: bool
    eps: float
    draws: int
    evaluations: int
    conventions: Conventions

    @property
    def flatness(self) -> float:
        """1 / sigma^2, the number that the literature compares between networks. Large values mean sharp minima."""
        return self.sigma**-2


def pac_bayes(
    problem: Problem,
    target: float = 0.1,
    *,
    of: Of = "error",
    magnitude: bool = False,
    eps: float | None = None,
    draws: int = 10,
    tol: float = 1e-2,
    bracket: tuple[float, float] | None = None,
    seed: int = 0,
) -> PacBayes:
    """Find the largest sigma at which normal noise of the weights raises the error rate by at most `target`.

        max sigma: E[L(w + s * u)] - L(w) <= t,   u ~ N(0, 1)
        s = sigma or sqrt(sigma^2 w^2 + eps^2)

    L is the error rate, or the loss with of="loss". s is a standard deviation, not a variance. Sigma is found by
    bisection with the same draws of u at every sigma, so the mean rise is a fixed function of sigma, and the error of
    the result comes from the draws. If this function crosses the target more than once, the result is one of the
    crossings.

    Args:
        problem: the function.
        target: target t of the mean rise, > 0. Default 0.1.
        of: "error" for the error rate (the target is then a drop of the accuracy), or "loss". Default "error".
        magnitude: make the noise proportional to the magnitude of each weight. Default False.
        eps: epsilon in the formula, used with `magnitude` only, >= 0. With 0, weights that are zero do not move.
            Default None: 1e-3, as in Jiang et al.
        draws: number of pairs u and -u, >= 2. Default 10.
        tol: relative width of the final bracket, in (0, 1). Default 1e-2.
        bracket: two values of sigma to start from, 0 < low < high. It is widened if the crossing lies outside. Default
            None: 0.05 and 0.1 times the root mean square of the weights (with `magnitude`: 0.05 and 0.1).
        seed: seed of the draws. Default 0.

    Returns:
        Sigma with its standard error, and the rise there.

    Raises:
        ValueError: a number or the bracket is invalid, the error rate cannot rise by the target, or no sigma reaches
            it.
        ArithmeticError: the loss at the weights is not finite, or the outputs overflow before the target is reached.

    Source: Jiang, Neyshabur, Mobahi, Krishnan & Bengio, ICLR 2020 (sigma, and sigma' with magnitude).
    """
    if not (target > 0 and math.isfinite(target)):
        raise ValueError(f"target must be a positive number, got {target!r}.")
    if draws < 2:
        raise ValueError(f"draws must be at least 2, got {draws!r}.")
    if not (0 < tol < 1):
        raise ValueError(f"tol must lie between 0 and 1, got {tol!r}.")
    if eps is not None and not (magnitude and eps >= 0 and math.isfinite(eps)):
        raise ValueError(f"eps must be a number >= 0 and needs magnitude=True, got {eps!r}.")
    check_dtype(problem)
    run = _Noisy(problem, of, magnitude, 1e-3 if eps is None else eps, draws, seed)
    if of == "error" and target >= 1.0 - run.start:
        raise ValueError(
            f"the error rate is {run.start:.3g} without noise, so it cannot rise by {target:g}; use a smaller target."
        )
    low, high = run.bracketed(target, *_bracket(problem, bracket, magnitude))
    while high > low * (1.0 + tol) and low < (middle := math.sqrt(low * high)) < high:
        low, high = (low, middle) if run.above(middle, target) else (middle, high)
    if not math.isfinite(run.mean(high)):
        raise ArithmeticError(
            f"the model overflows at sigma={high:.3g}, before its {of} rises by more than {run.mean(low):.3g}; use a "
            "smaller target, or dtype=torch.float64 in the Problem."
        )
    rise, error = mean_and_error(run.rises(low))
    slope = (run.mean(1.1 * low) - run.mean(0.9 * low)) / (0.2 * low)
    return PacBayes(
        sigma=low,
        sigma_error=error / slope if slope > 0 else math.nan,
        bracket=(low, high),
        rise=rise,
        error=error,
        target=target,
        start=run.start,
        of=of,
        magnitude=magnitude,
        eps=run.eps if magnitude else 0.0,
        draws=draws,
        evaluations=run.evaluations,
        conventions=problem.conventions.with_seed(seed),
    )


def _bracket(problem: Problem, bracket: tuple[float, float] | None, magnitude: bool) -> tuple[float, float]:
    if bracket is None:
        weights = problem.flat(problem.weights).double()
        size = 1.0 if magnitude else float(weights.square().mean().sqrt()) or 1.0
        return 0.05 * size, 0.1 * size
    low, high = bracket
    if not (0 < low < high and math.isfinite(high)):
        raise ValueError(f"bracket must be two values of sigma with 0 < low < high, got {bracket!r}.")
    return float(low), float(high)


class _Noisy:
    """The rise as a function of sigma, with the same draws at every sigma."""

    def __init__(self, problem: Problem, of: Of, magnitude: bool, eps: float, draws: int, seed: int) -> None:
        self.problem, self.eps, self.draws, self.seed = problem, eps, draws, seed
        self.of: Of = of
        self.statistic = statistic_of(problem, of)
        self.squares = problem.flat(problem.weights).square() if magnitude else None
        if magnitude and not eps and not problem.flat(problem.weights).any():
            raise ValueError("every selected weight is zero, so noise proportional to it is zero too; use eps > 0.")
        self.start, self.evaluations = at_weights(self.statistic, of), 1
        self._known: dict[float, list[float]] = {}

    def rises(self, sigma: float) -> list[float]:
        """The rise for each draw; not finite if the model overflows."""
        if sigma not in self._known:
            deviation = sigma if self.squares is None else (sigma**2 * self.squares + self.eps**2).sqrt()
            self._known[sigma] = [
                0.5 * (self._at(deviation * u) + self._at(-deviation * u)) - self.start
                for u in noise(self.problem, self.draws, self.seed)
            ]
        return self._known[sigma]

    def _at(self, displacement: Tensor) -> float:
        self.evaluations += 1
        return self.statistic(self.problem.moved(displacement))

    def mean(self, sigma: float) -> float:
        rises = self.rises(sigma)
        # math.fsum raises an error for infinities of both signs.
        return sum(rises) / len(rises)

    def above(self, sigma: float, target: float) -> bool:
        """Whether the mean rise exceeds the target. Overflow counts as exceeding."""
        return not self.mean(sigma) <= target

    def bracketed(self, target: float, low: float, high: float) -> tuple[float, float]:
        """Two values of sigma with the target between their rises."""
        for _ in range(_DOUBLINGS):
            if not self.above(low, target):
                break
            low, high = 0.5 * low, low
        else:
            floor = f", because of eps={self.eps:g}" if self.squares is not None and self.eps else ""
            raise ValueError(f"the {self.of} rises by more than {target:g} even at sigma={high:.3g}{floor}.")
        for _ in range(_DOUBLINGS):
            if self.above(high, target):
                return low, high
            low, high = high, 2.0 * high
        raise ValueError(
            f"the {self.of} does not rise by {target:g} at any sigma up to {low:.3g}, where it rises by "
            f"{self.mean(low):.3g}; use a smaller target."
        )


@dataclass(frozen=True, kw_only=True)
class RelativeFlatness(Estimate):
    """Result of `relative_flatness`.

    Args:
        layer: name of the layer's weight.
        neurons: number of rows of the weight matrix.
        inputs: number of columns of the weight matrix. Some authors divide the value by this.
    """

    layer: str
    neurons: int
    inputs: int


def relative_flatness(
    problem: Problem,
    layer: str,
    *,
    exact: int = 512,
    tol: float = 1e-2,
    max_probes: int = 2000,
    seed: int = 0,
) -> RelativeFlatness:
    """Measure the relative flatness of a layer with weight matrix W, whose rows w_s belong to the neurons.

        kappa = sum_{s,s'} <w_s, w_s'> tr H_ss',   (H_ss')_ij = d^2 L / (d w_si d w_s'j)

    This is the trace of A -> W^T H[W A] over matrices A, that is, the curvature of L when the inputs x of the layer
    change to x + A x. It does not change if layers of a ReLU network are rescaled. With W W^T = C C^T, where C has
    r = rank W columns, the exact value takes r products with the Hessian per input. If these are more than `exact`, it
    is estimated with random probes.

    Args:
        problem: the function. Its weight decay c, if any, adds c * inputs * ||W||^2. It is enough to select only this
            layer, which makes the products cheaper.
        layer: name of the weight. Its first dimension indexes the neurons, all others together the inputs. The rows of
            a convolution are its filters, a case that the paper does not define.
        exact: maximum number of products for the exact value, >= 0. Default 512.
        tol: relative standard error with probes, > 0. Default 1e-2.
        max_probes: maximum number of probes. Default 2000.
        seed: seed of the probes. Default 0.

    Returns:
        The relative flatness, with its standard error (0 if exact).

    Raises:
        ValueError: there is no such layer, or its weight is not a matrix.

    Source: Petzka, Kamp, Adilova, Sminchisescu & Boley, NeurIPS 2021. Their comparison of measures uses the last layer,
    after scaling each of its inputs to unit variance.
    """
    matrices = [n for n, w in zip(problem.names, problem.weights, strict=True) if w.dim() >= 2]
    if layer not in matrices:
        what = "is not a matrix" if layer in problem.names else "is not among the selected weights"
        raise ValueError(f"{layer!r} {what}; the selected matrices are {', '.join(matrices[:8]) or 'none'}.")
    if exact < 0:
        raise ValueError(f"exact must be >= 0, got {exact!r}.")
    features = _Features(problem, layer)
    estimate: Estimate
    if features.size <= exact:
        rows = torch.eye(features.size, dtype=features.dtype, device=features.device)
        value = math.fsum(dot(row, finite(features.matvec(row))) for row in rows)
        estimate = Estimate(
            value=value,
            error=0.0,
            probes=0,
            products=features.size,
            converged=True,
            conventions=problem.conventions,
        )
    else:
        estimate = trace(features, tol=tol, max_probes=max_probes, seed=seed)
    return RelativeFlatness(
        value=estimate.value,
        error=estimate.error,
        probes=estimate.probes,
        products=estimate.products,
        converged=estimate.converged,
        conventions=estimate.conventions,
        layer=layer,
        neurons=features.neurons,
        inputs=features.inputs,
    )


class _Features:
    """The operator A -> C^T H[C A] on matrices A of shape (rank, inputs), where W W^T = C C^T."""

    def __init__(self, problem: Problem, layer: str) -> None:
        self.problem, self.dtype, self.device = problem, problem.dtype, problem.device
        self.conventions = problem.conventions
        self._hessian = Hessian(problem)
        index = problem.names.index(layer)
        self._start = sum(w.numel() for w in problem.weights[:index])
        weight = problem.weights[index].detach().flatten(1).double()
        self.neurons, self.inputs = weight.shape
        u, s, _ = torch.linalg.svd(weight, full_matrices=False)
        nonzero = s > s[0] * max(weight.shape) * torch.finfo(torch.float64).eps
        self._factor = (u * s)[:, nonzero].to(self.dtype)
        self.size = self._factor.shape[1] * self.inputs

    def matvec(self, vector: Tensor) -> Tensor:
        moved = self._factor @ vector.to(self.dtype).view(-1, self.inputs)
        v = torch.zeros(self.problem.size, dtype=self.dtype, device=self.device)
        v[self._start : self._start + moved.numel()] = moved.flatten()
        product = self._hessian.matvec(v)[self._start : self._start + moved.numel()]
        pulled: Tensor = self._factor.T @ product.view(self.neurons, self.inputs)
        return pulled.flatten()


@dataclass(frozen=True, kw_only=True)
class FisherRao:
    """Result of `fisher_rao`: the Fisher-Rao norm of the selected weights.

    Args:
        value: sqrt <w, F w>.
        labels: "model" or "data".
        products: number of products with the Fisher matrix. One product gives the exact value.
        conventions: conventions of the problem. Weight decay is not included in the norm.
    """

    value: float
    labels: Literal["model", "data"]
    products: int
    conventions: Conventions

    @property
    def square(self) -> float:
        """<w, F w>."""
        return self.value**2


def fisher_rao(problem: Problem, *, labels: Literal["model", "data"] = "model") -> FisherRao:
    """Compute the Fisher-Rao norm of the weights exactly, with one product.

        ||w||_fr^2 = <w, F w>,   F = E[grad l grad l^T]

    In a ReLU network of K weight matrices without biases, the square is K^2 E <d l/d f, f>^2, and it does not change if
    layers are rescaled.

    Args:
        problem: the function. Weights that are not selected are constants.
        labels: "model": the expectation is over all labels with the softmax probabilities of the outputs, so F is the
            Fisher information. "data": the labels of the data are used; the norm then goes to zero for a network that
            fits them. The paper uses both. Default "model".

    Raises:
        ValueError: `labels` is unknown; "model" is used with a loss other than cross-entropy without label smoothing
            and class weights; or "data" is used with a loss that cannot return one value per term.
        ArithmeticError: a product is not finite.

    Source: Liang, Poggio, Rakhlin & Stokes, AISTATS 2019.
    """
    if labels not in ("model", "data"):
        raise ValueError(f"labels must be 'model' or 'data', got {labels!r}.")
    loss = problem.loss
    plain = loss is F.cross_entropy or (
        isinstance(loss, nn.CrossEntropyLoss) and loss.label_smoothing == 0 and loss.weight is None
    )
    if labels == "model" and not plain:
        raise ValueError(
            "labels='model' uses the softmax, so it needs nn.CrossEntropyLoss without label smoothing or class "
            f"weights, got {problem.conventions.loss}; for other losses use labels='data'."
        )
    operator = GaussNewton(problem, memory=0) if labels == "model" else EmpiricalFisher(problem, memory=0)
    w = problem.flat(problem.weights)
    square = dot(w, finite(operator.matvec(w)))
    return FisherRao(
        value=math.sqrt(max(square, 0.0)),
        labels=labels,
        products=1,
        conventions=problem.conventions,
    )
