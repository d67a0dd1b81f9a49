"""Trace, diagonal, Frobenius norm and spectral density of an operator, estimated with random probes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flatmin.measure.curvature import Operator
from flatmin.measure.krylov import Spectrum, sample
from flatmin.measure.problem import Conventions
from flatmin.stats import t_quantile

Progress = Callable[[int, float], None]
_WHOLE, _LARGEST = 5, 2000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """An estimate from independent random probes.

    Args:
        value: the estimate.
        error: its standard error; NaN with fewer than two probes, 0 if the value is exact.
        probes: number of independent probes.
        products: number of products with the operator, without those of a given `spectrum`.
        converged: whether the error reached the requested tolerance.
        conventions: conventions of the operator, with the seed.
    """

    value: float
    error: float
    probes: int
    products: int
    converged: bool
    conventions: Conventions | None

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Confidence interval of the value, by Student's t distribution."""
        if not self.error:
            return self.value, self.value
        half = t_quantile((1 + confidence) / 2, self.probes - 1) * self.error
        return self.value - half, self.value + half


def trace(
    operator: Operator,
    spectrum: Spectrum | None = None,
    *,
    tol: float = 1e-2,
    max_probes: int = 2000,
    seed: int = 0,
    progress: Progress | None = None,
) -> Estimate:
    """Estimate the trace of an operator, by Hutchinson's method with deflation.

        tr H = sum_{q in Q} q^T H q + E[z^T H z]
        z: uniform on the sphere of radius sqrt(n - |Q|), orthogonal to Q

    The basis Q of a `spectrum` run contains the eigenvectors of large eigenvalues, so these no longer contribute to the
    variance. The estimate stops when the standard error is at most `tol` times the value, after at least 20 probes, and
    then draws a fifth more, because an error that first falls below a threshold is partly small by chance. With plain
    probes and a large `tol`, the 95 % interval covers about 90 %, because few probes represent a skewed distribution
    poorly.

    Args:
        operator: see `flatmin.measure.spectrum`.
        spectrum: result of `flatmin.measure.spectrum` for the same operator. Default None: no deflation.
        tol: relative standard error, > 0. Default 1e-2.
        max_probes: maximum number of probes, >= 2. Default 2000.
        seed: seed of the probes. Default 0.
        progress: called with (probes, relative error) after each probe. Default None.

    Returns:
        The trace with its standard error.

    Raises:
        ValueError: a number is out of range, or `spectrum` has another size or no basis.
        ArithmeticError: a product is not finite.

    Source: Hutchinson 1989; deflation: Gambhir, Stathopoulos & Orginos, SIAM J. Sci. Comput. 39, 2017; probes on the
    sphere: Epperly, Tropp & Webber, XTrace, 2024.
    """
    _check(operator, spectrum, tol, max_probes)
    basis = _basis(spectrum)
    exact = 0.0 if spectrum is None else float(spectrum.diagonal.sum())
    if spectrum is not None and len(spectrum.basis) == operator.size:
        return Estimate(value=exact, error=0.0, probes=0, products=0, converged=True, conventions=_of(operator, seed))
    running = _Running()
    for z in _probes(operator, basis, seed, max_probes):
        running.add(_dot(z, finite(operator.matvec(z))))
        size = abs(exact + running.mean)
        relative = running.error / size if size else math.inf
        if progress is not None:
            progress(running.count, relative)
        if running.enough(relative <= tol or running.error == 0.0):
            break
    value, error = exact + running.mean, running.error
    return Estimate(
        value=value,
        error=error,
        probes=running.count,
        products=running.count,
        converged=running.done,
        conventions=_of(operator, seed),
    )


def frobenius(
    operator: Operator,
    spectrum: Spectrum | None = None,
    *,
    tol: float = 1e-2,
    max_probes: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Estimate the Frobenius norm of an operator by the mean of ||H z||^2 over random probes z.

        ||H||_F = sqrt(tr H^2),   tr H^2 = ||H Q||_F^2 + E ||H z||^2

    Q is the basis of the given `spectrum`, and the probes are orthogonal to it.

    Args:
        operator: see `flatmin.measure.spectrum`.
        spectrum: result of `flatmin.measure.spectrum` for the same operator, without restarts. Its part takes one
            product per vector of the basis. Default None: no basis.
        tol: relative standard error of the norm, > 0. Default 1e-2.
        max_probes: maximum number of probes, >= 2. Default 2000.
        seed: seed of the probes. Default 0.

    Returns:
        The norm. Its standard error is that of the square divided by twice the norm.

    Raises:
        ValueError, ArithmeticError: see `trace`.
    """
    _check(operator, spectrum, tol, max_probes)
    basis = _basis(spectrum)
    inside = 0.0
    spent = 0
    if basis is not None:
        for q in basis:
            inside += _dot(product := finite(operator.matvec(q)), product)
            spent += 1
        if len(basis) == operator.size:
            exact = math.sqrt(inside)
            return Estimate(
                value=exact, error=0.0, probes=0, products=spent, converged=True, conventions=_of(operator, seed)
            )
    running = _Running()
    for z in _probes(operator, basis, seed, max_probes):
        running.add(_dot(product := finite(operator.matvec(z)), product))
        # The relative error of a square root is half that of its argument.
        if running.enough(running.error <= 2 * tol * (inside + running.mean)):
            break
    norm = math.sqrt(inside + running.mean)
    return Estimate(
        value=norm,
        error=running.error / (2 * norm) if norm else running.error,
        probes=running.count,
        products=spent + running.count,
        converged=running.done,
        conventions=_of(operator, seed),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Diagonal:
    """Result of `diagonal`.

    Args:
        value: estimate of the diagonal, shape (size,).
        error: standard error of each entry, shape (size,).
        probes: number of probes.
        conventions: conventions of the operator, with the seed.
    """

    value: Tensor
    error: Tensor
    probes: int
    conventions: Conventions | None


def diagonal(operator: Operator, spectrum: Spectrum | None = None, *, probes: int = 100, seed: int = 0) -> Diagonal:
    """Estimate the diagonal of an operator by the mean of z * H z over random signs z, with deflation.

        H = P H + (H Q^T) Q,   P = 1 - Q^T Q
        diag(H) = diag((H Q^T) Q) + E[z * P H z]

    The rows of Q are the top and bottom eigenvectors of the given `spectrum`, for which H Q^T = Q^T Lambda.

    Args:
        operator: see `flatmin.measure.spectrum`.
        spectrum: converged result of `flatmin.measure.spectrum` for the same operator. Default None: no deflation.
        probes: number of probes, one product each, >= 2. Default 100.
        seed: seed of the signs. Default 0.

    Returns:
        The diagonal with the standard error of each entry.

    Raises:
        ValueError: `probes` is below 2.
        ArithmeticError: a product is not finite.

    Source: Bekas, Kokiopoulou & Saad, Appl. Numer. Math. 57, 2007.
    """
    if probes < 2:
        raise ValueError(f"probes must be at least 2, got {probes!r}.")
    generator = torch.Generator().manual_seed(_stream(seed))
    vectors = values = None
    fixed = torch.zeros(operator.size, dtype=torch.float64, device=operator.device)
    if spectrum is not None:
        vectors = torch.cat([spectrum.top_vectors, spectrum.bottom_vectors]).double()
        values = torch.cat([spectrum.top, spectrum.bottom]).to(vectors)
        fixed = (values[:, None] * vectors.square()).sum(0)
    total, squares = torch.zeros_like(fixed), torch.zeros_like(fixed)
    for _ in range(probes):
        z = torch.randint(2, (operator.size,), generator=generator).mul_(2).sub_(1).to(operator.device, operator.dtype)
        product = finite(operator.matvec(z)).double()
        if vectors is not None and values is not None:
            product = product - vectors.T @ (values * (vectors @ z.double()))
        sampled = z.double() * product
        total += sampled
        squares += sampled.square()
    mean = total / probes
    variance = ((squares / probes - mean.square()) * probes / (probes - 1)).clamp(min=0.0)
    return Diagonal(
        value=fixed + mean, error=(variance / probes).sqrt(), probes=probes, conventions=_of(operator, seed)
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Density:
    """A spectral density as weighted nodes; result of `density`.

        phi(t) = (1 / n) sum_i delta(t - lambda_i)

    Args:
        nodes: nodes, ascending, shape (m,).
        weights: weights of the nodes, shape (m,). They sum to 1.
        runs: number of start vectors that were averaged.
        steps: number of steps per start vector.
        products: number of products with the operator.
        conventions: conventions of the operator, with the seed.
    """

    nodes: Tensor
    weights: Tensor
    runs: int
    steps: int
    products: int
    conventions: Conventions | None

    def smoothed(self, grid: Tensor, width: float) -> Tensor:
        """Convolve the density with a Gaussian of standard deviation `width`, and evaluate it at the points of a grid.

        Raises:
            ValueError: `width` is not positive.
        """
        if not width > 0:
            raise ValueError(f"width must be positive, got {width!r}.")
        z = (grid.double()[:, None] - self.nodes[None]) / width
        kernel = torch.exp(-0.5 * z.square()) / (width * math.sqrt(2 * math.pi))
        return kernel @ self.weights


def density(
    operator: Operator,
    spectrum: Spectrum | None = None,
    *,
    runs: int = 4,
    steps: int = 100,
    seed: int = 0,
    progress: Progress | None = None,
) -> Density:
    """Estimate the spectral density by stochastic Lanczos quadrature with full reorthogonalisation.

    The result is raw nodes and weights; use `Density.smoothed` for a plot. If the operator has at most 5 * runs * steps
    rows and at most 2000, the density is computed exactly from the whole matrix, because the noise of a random vector
    is largest for small matrices.

    Args:
        operator: see `flatmin.measure.spectrum`.
        spectrum: result of `flatmin.measure.spectrum` for the same operator. Its eigenvalues enter the density directly
            with weight 1/size each, and the start vectors are orthogonal to their eigenvectors, so only the rest of the
            spectrum has noise. Default None.
        runs: number of start vectors, >= 0. With 0, the start vector of `spectrum` is the sample, without further
            products. Default 4.
        steps: number of steps per start vector, >= 1. Default 100.
        seed: seed of the start vectors. Default 0.
        progress: called with (products, share done). Default None.

    Returns:
        The density as weighted nodes.

    Raises:
        ValueError: `runs` or `steps` is out of range, or runs=0 and `spectrum` is missing or had no random start.
        ArithmeticError: a product is not finite.

    Source: Ubaru, Chen & Saad, SIAM J. Matrix Anal. Appl. 38, 2017; Ghorbani, Krishnan & Xiao, ICML 2019.
    """
    if runs < 0 or steps < 1:
        raise ValueError(f"runs must be at least 0 and steps at least 1, got {runs!r} and {steps!r}.")
    if runs == 0:
        return _first_sample(spectrum)
    if operator.size <= min(_WHOLE * runs * steps, _LARGEST):
        matrix = torch.empty(operator.size, operator.size, dtype=torch.float64)
        for i, row in enumerate(torch.eye(operator.size, dtype=operator.dtype)):
            matrix[i] = finite(operator.matvec(row.to(operator.device))).double().cpu()
            if progress is not None:
                progress(i + 1, (i + 1) / operator.size)
        nodes = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
        return Density(
            nodes=nodes,
            weights=torch.full_like(nodes, 1.0 / operator.size),
            runs=1,
            steps=operator.size,
            products=operator.size,
            conventions=_of(operator, seed),
        )
    values, vectors = _trusted(spectrum)
    steps = min(steps, max(1, operator.size - len(values)))
    rest = operator.size - len(values)
    found_nodes, weights = [values], [torch.ones_like(values) / operator.size]
    products = 0
    for run in range(runs if rest else 0):
        drawn = sample(operator, steps, seed * 1_000_003 + run + 1, vectors)
        found_nodes.append(drawn[0])
        weights.append(drawn[1] * (rest / operator.size / runs))
        products += drawn[2]
        if progress is not None:
            progress(products, (run + 1) / runs)
    all_nodes = torch.cat(found_nodes)
    order = all_nodes.argsort()
    return Density(
        nodes=all_nodes[order],
        weights=torch.cat(weights)[order],
        runs=runs,
        steps=steps,
        products=products,
        conventions=_of(operator, seed),
    )


def _first_sample(spectrum: Spectrum | None) -> Density:
    """The density as sampled by the start vector of a `spectrum` run."""
    if spectrum is None or not spectrum.random_start:
        raise ValueError("runs=0 takes the density from `spectrum`; pass a spectrum that was computed without start=.")
    return Density(
        nodes=spectrum.nodes,
        weights=spectrum.weights,
        runs=1,
        steps=len(spectrum.nodes),
        products=0,
        conventions=spectrum.conventions,
    )


def _trusted(spectrum: Spectrum | None) -> tuple[Tensor, Tensor | None]:
    """The eigenvalues of a run whose residual is at most its `tol`, and their vectors."""
    if spectrum is None:
        return torch.empty(0, dtype=torch.float64), None
    _check_vectors(spectrum)
    good = torch.cat([spectrum.top_residuals, spectrum.bottom_residuals]) <= spectrum.tol
    vectors = torch.cat([spectrum.top_vectors, spectrum.bottom_vectors])
    return torch.cat([spectrum.top, spectrum.bottom])[good], vectors[good.to(vectors.device)]


_LEAST = 20
_MORE = 0.2


class _Running:
    """Running mean and standard error (Welford's algorithm)."""

    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0, 0.0, 0.0
        self._end: int | None = None

    def add(self, value: float) -> None:
        self.count += 1
        change = value - self.mean
        self.mean += change / self.count
        self._squares += change * (value - self.mean)

    def enough(self, small: bool) -> bool:
        """Whether to stop, given whether the error is small now.

        When the error first is small, it is partly small by chance, so a fifth more probes are drawn.
        """
        if self._end is None and small and self.count >= _LEAST:
            self._end = self.count + math.ceil(_MORE * self.count)
        return self.done

    @property
    def done(self) -> bool:
        """Whether the stopping rule was met."""
        return self._end is not None and self.count >= self._end

    @property
    def error(self) -> float:
        return math.sqrt(self._squares / (self.count - 1) / self.count) if self.count > 1 else math.nan


def _check(operator: Operator, spectrum: Spectrum | None, tol: float, max_probes: int) -> None:
    if not tol > 0 or max_probes < 2:
        raise ValueError(f"tol must be positive and max_probes at least 2, got {tol!r} and {max_probes!r}.")
    if spectrum is not None and spectrum.basis.shape[1] != operator.size:
        raise ValueError(
            f"the spectrum has size {spectrum.basis.shape[1]}, but the operator has size {operator.size}; pass a "
            "spectrum of the same operator."
        )
    if spectrum is not None:
        _check_vectors(spectrum)


def _check_vectors(spectrum: Spectrum) -> None:
    if len(spectrum.basis) != len(spectrum.diagonal):
        raise ValueError("the spectrum has no vectors, like those in a report; call spectrum() on the operator.")


def _basis(spectrum: Spectrum | None) -> Tensor | None:
    return None if spectrum is None else spectrum.basis


def _probes(operator: Operator, basis: Tensor | None, seed: int, count: int) -> Iterator[Tensor]:
    """Yield vectors that are uniform on the sphere of radius sqrt(n - m), orthogonal to the m vectors of the basis."""
    generator = torch.Generator().manual_seed(_stream(seed))
    rest = operator.size - (0 if basis is None else len(basis))
    for _ in range(count):
        z = torch.randn(operator.size, generator=generator, dtype=torch.float64).to(operator.device, operator.dtype)
        if basis is not None:
            for _ in range(2):
                z = z - basis.T @ (basis @ z)
        yield z * (math.sqrt(rest) / float(z.double().norm()))


def _stream(seed: int) -> int:
    """A seed derived from `seed`, so probes differ from the start vector of a Lanczos run with the same seed."""
    return seed * 1_000_003 + 500_009


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.double(), b.double()))


def finite(product: Tensor) -> Tensor:
    """Return the product if it is finite; otherwise raise ArithmeticError."""
    if not torch.isfinite(product).all():
        raise ArithmeticError("a product with the operator is not finite, so this cannot be measured.")
    return product


def _of(operator: Operator, seed: int) -> Conventions | None:
    conventions: Conventions | None = getattr(operator, "conventions", None)
    return None if conventions is None else conventions.with_seed(seed)
