"""Lanczos iteration: extreme eigenvalues and eigenvectors, a sample of the density, and a basis for the trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from flatmin.measure.curvature import Operator
from flatmin.measure.problem import Conventions

Progress = Callable[[int, float], None]
_EPS = {torch.float64: 1e-13}  # a remainder below this share of the spectrum's size is round-off
_EPS32 = 1e-6
_MEMORY = 1 << 31  # bytes of the basis before a restart
_CHANCE = 1e-3  # accepted probability that a copy of an eigenvalue is missed
_TURNS = 3  # if that probability cannot be bounded: random vectors in a row without a new copy that end the search


@dataclass(frozen=True, kw_only=True, eq=False)
class Spectrum:
    """Result of `spectrum`: what a Lanczos run found of a symmetric operator H.

    Args:
        top: the algebraically largest eigenvalues, descending, shape (top,).
        bottom: the algebraically smallest eigenvalues, ascending, shape (bottom,).
        top_vectors: unit eigenvectors of `top`, shape (top, size).
        bottom_vectors: unit eigenvectors of `bottom`, shape (bottom, size).
        top_residuals: relative residuals ||H v - lambda v|| / |lambda| of `top`. The error of an eigenvalue is of the
            order residual^2 lambda^2 / gap, far below the residual.
        bottom_residuals: relative residuals of `bottom`.
        converged: whether every residual reached `tol` and stayed there, with unchanged eigenvalues, for the confirming
            steps, and no further copy was found of an eigenvalue that lies above the last of the top (or below the last
            of the bottom).
        chance_missed: upper bound on the probability, over start vectors, that an eigenvalue was missed which lies
            half-way between two of those found, or beyond them by `tol` times the width of the spectrum. If copies were
            searched for, it also covers a missed further copy. 1 if no bound is known.
        nodes: nodes of the spectral density as sampled by the start vector.
        weights: weights of the nodes. They sum to 1.
        random_start: whether the start vector was isotropic, so that nodes and weights are an unbiased sample.
        diagonal: q^T H q of each vector q of the basis.
        basis: orthonormal basis, shape (steps, size), used to deflate the trace.
        products: number of products with the operator.
        searched: number of these products that searched for copies of eigenvalues.
        restarts: number of times the basis was compressed because memory ran short.
        tol: the requested relative residual.
        conventions: conventions of the operator, if it has any.
    """

    top: Tensor
    bottom: Tensor
    top_vectors: Tensor
    bottom_vectors: Tensor
    top_residuals: Tensor
    bottom_residuals: Tensor
    converged: bool
    chance_missed: float
    nodes: Tensor
    weights: Tensor
    random_start: bool
    diagonal: Tensor
    basis: Tensor
    products: int
    searched: int = 0
    restarts: int
    tol: float
    conventions: Conventions | None

    @property
    def largest(self) -> float:
        """The algebraically largest eigenvalue."""
        return float(self.top[0]) if len(self.top) else float(self.nodes.max())

    @property
    def smallest(self) -> float:
        """The algebraically smallest eigenvalue."""
        return float(self.bottom[0]) if len(self.bottom) else float(self.nodes.min())


def spectrum(
    operator: Operator,
    *,
    top: int = 1,
    bottom: int = 0,
    tol: float = 1e-2,
    confirm: int = 2,
    min_steps: int = 0,
    max_products: int = 1000,
    seed: int = 0,
    start: Tensor | None = None,
    memory: int = _MEMORY,
    progress: Progress | None = None,
) -> Spectrum:
    """Compute the largest and smallest eigenvalues of a symmetric operator by Lanczos iteration.

    The basis is fully reorthogonalised, and compressed by a thick restart if it exceeds `memory`.

    The iteration stops when the relative residual of every requested eigenvalue is at most `tol`, and remains so for
    `confirm` further steps in which the eigenvalues change by at most `tol`. The further steps are needed because the
    residuals of the eigenvalues found say nothing about eigenvalues not found yet.

    A Krylov space contains only one vector of each eigenspace, so one start vector finds a multiple eigenvalue once. In
    a regression with several outputs, for example, each eigenvalue occurs as often as there are outputs. Unless all
    requested eigenvalues are equal, the run therefore continues from new random vectors, orthogonal to the basis. It
    ends when such a vector finds no further copy of any eigenvalue but the last, with a probability of at most 0.1 % of
    having missed one. This takes one vector of about five to ten products if there are no copies (more if the spectrum
    is dense), and one more vector per copy. If restarts leave no bound on that probability, the search ends after three
    vectors that find no copy, and the result is not `converged`; a larger `memory` helps. With top=1 (and bottom=1), no
    search is needed.

    Args:
        operator: any object with `size`, `dtype`, `device` and `matvec`.
        top: number of algebraically largest eigenvalues. Default 1.
        bottom: number of algebraically smallest eigenvalues. Default 0.
        tol: relative residual, > 0. Default 1e-2.
        confirm: number of further steps for which the residuals must hold. Default 2.
        min_steps: minimum number of products, for a longer basis or a finer density. Default 0.
        max_products: maximum number of products. Default 1000.
        seed: seed of the start vector. Default 0.
        start: vector to start from, shape (size,), such as the last eigenvector of a network in training. A tenth of
            the random vector of the seed is added, so no direction is excluded. The density of such a run is not an
            unbiased sample. Default None: the random vector.
        memory: size of the basis in bytes. Default 2 GiB.
        progress: called with (products, worst residual) after each step. Default None.

    Returns:
        The eigenvalues with vectors and residuals, and the basis of the run.

    Raises:
        ValueError: more eigenvalues than weights are requested, or another number is out of range.
        ArithmeticError: a product is not finite.

    Sources: Lanczos 1950; restarts: Wu & Simon, SIAM J. Matrix Anal. Appl. 22, 2000.
    """
    wanted = top + bottom
    if top < 0 or bottom < 0 or wanted < 1:
        raise ValueError(
            f"top and bottom must be >= 0 and request at least one eigenvalue, got top={top!r}, bottom={bottom!r}."
        )
    if wanted > operator.size:
        raise ValueError(
            f"{wanted} eigenvalues were requested, but the operator has size {operator.size}; lower top or bottom."
        )
    if not tol > 0 or max_products < 1 or confirm < 0:
        raise ValueError(
            f"tol and max_products must be positive and confirm >= 0, got {tol!r}, {max_products!r} and {confirm!r}."
        )
    run = _Run(operator, wanted, seed, start, memory)
    held, fruitless, previous = 0, 0, torch.full((wanted,), math.inf, dtype=torch.float64)
    converged = False
    search: _Search | None = None
    while True:
        run.step()
        values, vectors = run.ritz()
        picked = _ends(len(values), top, bottom)
        if picked is not None:
            values_picked = values[picked]
            residuals = run.residuals(vectors, picked) / run.scale_of(values_picked)
            if progress is not None:
                progress(run.products, float(residuals.max()))
            still = bool(((values_picked - previous).abs() <= tol * run.scale_of(values_picked)).all())
            held = held + 1 if bool((residuals <= tol).all()) and (held == 0 or still) else 0
            previous = values_picked
            settled = run.products >= min_steps and held > confirm
            if settled and search is not None and not search.found(values):
                settled = False
                converged = search.chance(run) <= _CHANCE
                if not converged and run.settled_beyond(values, vectors, top, bottom, tol):
                    fruitless += 1
                    if fruitless == _TURNS:
                        break
                    if run.products < max_products:
                        run.turn(values, vectors, picked)
                        continue
            if settled and not run.full:
                fruitless = 0
                search = _Search.of(values, residuals * run.scale_of(values_picked), top, bottom, tol)
                converged = search is None
                if search is not None and run.products < max_products:
                    run.turn(values, vectors, picked)
                    continue
            converged = converged or run.full
            if converged:
                break
        if run.products >= max_products or run.full:
            break
        run.advance(values, vectors, picked)
    chance = 0.0 if search is None else search.chance(run)
    return run.result(values, vectors, top, bottom, tol, converged, chance)


@dataclass(frozen=True)
class _Search:
    """A search for further copies of eigenvalues that would change the result.

    Args:
        points: at each end, the eigenvalue next to the last one. A further copy of it would displace the last one.
        cuts: half-way from that eigenvalue to the last one, with the sign of the end.
        counts: number of Ritz values beyond each cut when the search began.
    """

    points: tuple[float, ...]
    cuts: tuple[tuple[float, float], ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, values: Tensor, residuals: Tensor, top: int, bottom: int, tol: float) -> _Search | None:
        """The search for copies at the ends of these Ritz values; None if no copy can change the result."""
        points, cuts = [], []
        for count, sign, last in ((top, 1.0, top - 1), (bottom, -1.0, top + bottom - 1)):
            ordered = values.flip(0) if sign > 0 else -values
            nearest = ordered[:count]
            if count > 1:
                # The uncertainty of the last eigenvalue: values closer to it than this count as equal.
                gap, residual = float(nearest[-1] - ordered[count : count + 1].sum()), float(residuals[last])
                unsure = min(residual, residual**2 / gap) if gap > 0 else residual
                others = nearest[nearest > nearest[-1] + max(unsure, min(tol, 1e-2) ** 2 * float(nearest.abs().max()))]
                if len(others):
                    points.append(sign * float(others[-1]))
                    cuts.append((sign, sign * float(others[-1] + nearest[-1]) / 2))
        if not points:
            return None
        return cls(tuple(points), tuple(cuts), tuple(_beyond(values, cut) for cut in cuts))

    def found(self, values: Tensor) -> bool:
        """Whether there are more eigenvalues beyond a cut than when the search began."""
        return any(_beyond(values, cut) > count for cut, count in zip(self.cuts, self.counts, strict=True))

    def chance(self, run: _Run) -> float:
        """Bound on the probability that the current start vector missed a copy."""
        return run.chain.chance(self.points, run.size, run.eps * run.width)


def _beyond(values: Tensor, cut: tuple[float, float]) -> int:
    sign, at = cut
    return int((sign * values > sign * at).sum())


def sample(operator: Operator, steps: int, seed: int, across: Tensor | None = None) -> tuple[Tensor, Tensor, int]:
    """Sample the spectral density with one random vector.

    Args:
        operator: see `spectrum`.
        steps: maximum number of steps.
        seed: seed of the vector.
        across: orthonormal eigenvectors, shape (k, size), to which the vector is kept orthogonal. Default None.

    Returns:
        Nodes, weights, and the number of products.
    """
    run = _Run(operator, 1, seed, None, operator.size * operator.dtype.itemsize * (steps + 1))
    run.stay_across(across)
    while True:
        run.step()
        if run.products >= steps or run.broke:
            values, vectors = run.ritz()
            return values, vectors[0].square(), run.products
        run.advance(*run.ritz(), None)


class _Run:
    """The state of a Lanczos iteration: an orthonormal basis and the matrix of the operator in it."""

    def __init__(self, operator: Operator, wanted: int, seed: int, start: Tensor | None, memory: int) -> None:
        self.random_start = start is None
        self.operator, self.size = operator, operator.size
        self.eps = _EPS.get(operator.dtype, _EPS32)
        self._generator = torch.Generator().manual_seed(seed)
        room = memory // (self.size * operator.dtype.itemsize)
        self.capacity = int(min(self.size, max(room, 2 * wanted + 10)))
        self.basis = torch.empty(0, self.size, dtype=operator.dtype, device=operator.device)
        self.matrix = torch.zeros(0, 0, dtype=torch.float64)  # grows with the basis
        self.filled = self.products = self.restarts = 0
        self.beta = 0.0
        self._next = self._unit(self._random() if start is None else self._mixed(start))
        self._rest: Tensor | None = None
        self._across: Tensor | None = None
        self._broke = False
        self._linked = False
        # The coefficients of the first chain bound what it can have missed. Its Ritz values are the density's nodes.
        self.first = self.chain = _Chain()
        self._sweep: tuple[Tensor, Tensor] | None = None
        # The parts of earlier chains' products that lie outside the basis, with the share of each basis vector.
        self._open: list[tuple[Tensor, Tensor]] = []
        self._share = torch.zeros(0, dtype=torch.float64)  # shares of the basis vectors in the rest
        self._turned: int | None = None

    @property
    def broke(self) -> bool:
        """Whether the space spanned so far is invariant under the operator."""
        return self._broke

    def stay_across(self, vectors: Tensor | None) -> None:
        """Keep the start vector and every product orthogonal to these eigenvectors."""
        self._across = vectors
        if vectors is not None:
            self._next = self._unit(self._project(self._next))

    def _project(self, vector: Tensor) -> Tensor:
        if self._across is not None:
            for _ in range(2):
                vector = vector - self._across.T @ (self._across @ vector)
        return vector

    @property
    def width(self) -> float:
        """The largest absolute entry of the operator's matrix in the basis."""
        return float(self.matrix[: self.filled, : self.filled].abs().max())

    @property
    def full(self) -> bool:
        return self.filled >= self.size

    def _random(self) -> Tensor:
        drawn = torch.randn(self.size, generator=self._generator, dtype=torch.float64)
        return drawn.to(self.operator.device, self.operator.dtype)

    def _mixed(self, start: Tensor) -> Tensor:
        if start.shape != (self.size,):
            raise ValueError(f"start must have shape ({self.size},), got {tuple(start.shape)}.")
        return self._unit(start.to(self._random())) + 0.1 * self._unit(self._random())

    @staticmethod
    def _unit(vector: Tensor) -> Tensor:
        unit: Tensor = vector / vector.norm()
        return unit

    def step(self) -> None:
        """Add the next vector to the basis, with one product."""
        j = self.filled
        if j == len(self.basis):
            grown = min(self.capacity, max(16, 2 * j))
            more = torch.empty(grown - j, self.size, dtype=self.basis.dtype, device=self.basis.device)
            self.basis = torch.cat([self.basis, more])
            self.matrix = F.pad(self.matrix, (0, grown + 1 - len(self.matrix)) * 2)
        self.basis[j] = self._next
        product = self._project(self.operator.matvec(self._next))
        self.products += 1
        alpha = float(torch.dot(self._next.double(), product.double()))
        if not math.isfinite(alpha):
            raise ArithmeticError("a product with the operator is not finite, so no eigenvalues can be computed.")
        self.matrix[j, j] = alpha
        for i, (rest, share) in enumerate(self._open):
            along = torch.dot(self._next, rest)
            self.matrix[: len(share), j] += share * float(along)
            self.matrix[j, : len(share)] += share * float(along)
            self._open[i] = rest - along * self._next, share
        basis = self.basis[: j + 1]
        for _ in range(2):
            product = product - basis.T @ (basis @ product)
        self.filled = j + 1
        self.beta = float(product.double().norm())
        size = float(self.matrix[: j + 1, : j + 1].abs().max())
        self._broke = self.beta <= self.eps * max(size, 1e-300) or self.filled == self.size
        self._rest = None if self._broke else product
        self._share = F.one_hot(torch.tensor(j), j + 1).double()
        self.chain.add(alpha, self.beta, self._broke)

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues, ascending, and eigenvectors (columns) of the operator's matrix in the basis."""
        m = self.filled
        values, vectors = torch.linalg.eigh(self.matrix[:m, :m])
        return values, vectors

    def residuals(self, vectors: Tensor, picked: Tensor) -> Tensor:
        """||H v - theta v|| of the Ritz vectors `picked`."""
        own = (0.0 if self._broke else self.beta) * vectors[-1, picked].abs()
        if not self._open:
            return own
        rests = [*self._open, *([] if self._rest is None else [(self._rest, self._share)])]
        outside = torch.stack([rest for rest, _ in rests]).double()
        gram = (outside @ outside.T).cpu()
        shares = torch.stack([share @ vectors[: len(share), picked] for _, share in rests])
        return (shares * (gram @ shares)).sum(0).clamp(min=0.0).sqrt()

    def scale_of(self, values: Tensor) -> Tensor:
        """|values|, at least the size of round-off."""
        m = self.filled
        floor = self.eps * max(float(self.matrix[:m, :m].abs().max()), 1e-300)
        return values.abs().clamp(min=floor)

    def advance(self, values: Tensor, vectors: Tensor, picked: Tensor | None) -> None:
        """Prepare the next vector. If there is no room for it, compress the basis first."""
        if self.filled >= self.capacity:
            self._restart(values, vectors, picked)
        j = self.filled
        if self._rest is None:
            # The subspace is invariant: continue with a random vector orthogonal to it.
            fresh = self._random()
            basis = self.basis[:j]
            for _ in range(3):
                fresh = fresh - basis.T @ (basis @ fresh)
            self._next = self._unit(fresh)
            return
        self._next = self._rest / self.beta
        if not self._linked:
            self.matrix[j - 1, j] = self.matrix[j, j - 1] = self.beta
        self._linked = False

    def turn(self, values: Tensor, vectors: Tensor, picked: Tensor) -> None:
        """Continue from a new random vector orthogonal to the basis, to find further copies of eigenvalues."""
        if self._sweep is None:
            self._sweep = values.clone(), vectors[0].square().clone()
        if self.filled > self.capacity // 2 + len(picked) and self.capacity < self.size:
            self._restart(values, vectors, picked)
            self.matrix[:, self.filled] = self.matrix[self.filled] = 0.0
            self._linked = False
        if self._rest is not None:
            self._open.append((self._rest, self._share))
        self._rest = None
        self.chain = _Chain()
        self._turned = self.products if self._turned is None else self._turned
        self.advance(values, vectors, picked)

    def settled_beyond(self, values: Tensor, vectors: Tensor, top: int, bottom: int, tol: float) -> bool:
        """Whether, in a chain cut by a restart, the next eigenvalues beyond the requested ones have converged."""
        if not self.chain.closed or self._broke or len(values) <= top + bottom:
            return False
        ends = torch.tensor([*([len(values) - 1 - top] if top else []), *([bottom] if bottom else [])])
        return bool((self.residuals(vectors, ends) / self.scale_of(values[ends]) <= tol).all())

    def _restart(self, values: Tensor, vectors: Tensor, picked: Tensor | None) -> None:
        """Thick restart: keep the requested Ritz vectors and others next to them at the ends."""
        m = self.filled
        self.chain.closed = True
        if self._sweep is None:
            self._sweep = values.clone(), vectors[0].square().clone()
        half = max(1, (m - 5) // 2)
        ends = torch.zeros(m, dtype=torch.bool)
        if picked is not None:
            ends[picked] = True
        order = torch.arange(m)
        from_ends = torch.minimum(order, m - 1 - order)
        if picked is not None and bool((picked >= m - len(picked)).all()):
            from_ends = m - 1 - order
        keep = torch.unique(torch.cat([order[ends], from_ends.argsort()[:half]]))
        ritz = vectors[:, keep]
        rotated = ritz.T.to(self.basis) @ self.basis[:m]
        p = len(keep)
        self.basis[:p] = rotated
        coupling = self.beta * ritz[-1]
        self.matrix.zero_()
        self.matrix[:p, :p] = torch.diag(values[keep])
        self._share = ritz[-1].clone()
        self._open = [(rest, share @ ritz[: len(share)]) for rest, share in self._open]
        if self._rest is not None:
            self.matrix[:p, p] = self.matrix[p, :p] = coupling
            self._linked = True
        self.filled, self.restarts = p, self.restarts + 1

    def result(
        self, values: Tensor, vectors: Tensor, top: int, bottom: int, tol: float, converged: bool, copies: float
    ) -> Spectrum:
        """The result in the current state."""
        m = self.filled
        last, first = min(top, m), min(bottom, m - min(top, m))
        high, low = torch.arange(m - 1, m - 1 - last, -1), torch.arange(first)
        nodes, weights = self._sweep or (values, vectors[0].square())
        basis = self.basis[:m]
        return Spectrum(
            top=values[high],
            bottom=values[low],
            top_vectors=vectors[:, high].T.to(basis) @ basis,
            bottom_vectors=vectors[:, low].T.to(basis) @ basis,
            top_residuals=self.residuals(vectors, high) / self.scale_of(values[high]),
            bottom_residuals=self.residuals(vectors, low) / self.scale_of(values[low]),
            converged=converged,
            chance_missed=0.0 if m == self.size else max(copies, self._chance(values[high], values[low], values, tol)),
            nodes=nodes,
            weights=weights,
            random_start=self.random_start,
            diagonal=self.matrix.diagonal()[:m].clone(),
            basis=basis,
            products=self.products,
            searched=0 if self._turned is None else self.products - self._turned,
            restarts=self.restarts,
            tol=tol,
            conventions=getattr(self.operator, "conventions", None),
        )

    def _chance(self, high: Tensor, low: Tensor, values: Tensor, tol: float) -> float:
        """Bound on the probability that the start vector missed an eigenvalue at the relevant points."""
        width = float(values[-1] - values[0])
        least = tol * tol * width
        points = [float(high[0]) + tol * width] if len(high) else []
        points += [float(low[0]) - tol * width] if len(low) else []
        for ends in (high, low):
            # Nothing can lie between copies of the same eigenvalue.
            apart = (ends[1:] - ends[:-1]).abs() > least
            points += ((ends[1:] + ends[:-1]) / 2)[apart].tolist()
        return self.first.chance(points, self.size, self.eps * width)


class _Chain:
    """The Lanczos coefficients of one start vector, up to a restart."""

    def __init__(self) -> None:
        self.alphas: list[float] = []
        self.betas: list[float] = []
        self.closed = False

    def add(self, alpha: float, beta: float, broke: bool) -> None:
        """Add the coefficients of a step."""
        if not self.closed:
            self.alphas.append(alpha)
            self.betas.append(beta)
            self.closed = broke

    def chance(self, points: Sequence[float], size: int, nothing: float) -> float:
        """Bound on the probability that the start vector v missed an eigenvalue at one of these points.

        If q is a unit eigenvector of theta, then q . r = chi(theta) (q . v) / (beta_1 ... beta_{m-1}) for the remainder
        r of step m, where chi is the characteristic polynomial of the first m coefficients. So |q . v| is at most
        beta_1 ... beta_m / |chi(theta)|. The probability that a random unit vector has such a small component is at
        most this bound times sqrt(2 size / pi).
        """
        if not self.betas:
            return 1.0
        if self.betas[-1] <= nothing:
            return 0.0  # the start vector lies in an invariant subspace
        log_betas = sum(math.log(b) for b in self.betas)
        worst = max(log_betas - _log_chi(theta, self.alphas, self.betas) for theta in points)
        return min(1.0, math.exp(min(0.0, worst + 0.5 * math.log(2.0 * size / math.pi))))


def _log_chi(theta: float, alphas: list[float], betas: list[float]) -> float:
    """Log |det(theta - T)| of the tridiagonal matrix T with these coefficients, by the scaled recurrence."""
    last, now, log = 0.0, 1.0, 0.0
    for i, alpha in enumerate(alphas):
        last, now = now, (theta - alpha) * now - (betas[i - 1] ** 2 * last if i else 0.0)
        size = max(abs(now), abs(last))
        if size == 0.0:
            return -math.inf
        last, now, log = last / size, now / size, log + math.log(size)
    return log + math.log(abs(now)) if now else -math.inf


def _ends(count: int, top: int, bottom: int) -> Tensor | None:
    """Positions of the top and bottom values among `count` ascending values; None if there are too few."""
    if count < top + bottom:
        return None
    return torch.cat([torch.arange(count - 1, count - 1 - top, -1), torch.arange(bottom)])
