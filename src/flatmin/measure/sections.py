"""The sections of a card: each answers one question about a problem."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from flatmin.measure.average import Average, average_case
from flatmin.measure.curvature import Hessian
from flatmin.measure.directions import eigenvector, gaussian, gaussian_pair
from flatmin.measure.flatness import fisher_rao, pac_bayes, relative_flatness
from flatmin.measure.krylov import spectrum
from flatmin.measure.landscape import landscape
from flatmin.measure.losses import LogitNormalised, error_rate
from flatmin.measure.presets import Published, empirical_sam, pyhessian_batch, sam_paper
from flatmin.measure.problem import Problem, first_tensor, restricted, under
from flatmin.measure.session import Quantity, Session, closeness
from flatmin.measure.sharpness import Grouped, Sharpness, curve, m_sharpness, worst_case
from flatmin.measure.trace import density, frobenius, trace

Found = tuple[str, list[Quantity], dict[str, Any]]


def _model(session: Session) -> Found:
    problem = session.problem
    loss, gradient = problem.gradient()
    number = session.quantity
    found = [number("loss", f"mean {problem.conventions.loss}", loss)]
    found += session.attempt(
        "error rate", lambda: [number("error_rate", "share of wrong answers", error_rate(problem))]
    )
    found += [
        number("gradient_norm", "length of the gradient", _length(gradient)),
        number("weight_norm", "length of the weights", _length(problem.flat(problem.weights))),
    ]
    return "The model", found, {}


def _hessian(session: Session) -> Found:
    known = session.known
    # What the arithmetic of the products leaves open, where the iteration has gone further.
    rounding = torch.finfo(session.problem.dtype).eps * max(abs(known.largest), abs(known.smallest))
    note = "" if known.converged else "not converged"
    found = []
    for end, values, residuals in (
        ("", known.top, known.top_residuals),
        ("-", known.bottom, known.bottom_residuals),
    ):
        for rank, (value, residual) in enumerate(zip(values.tolist(), residuals.tolist(), strict=True), 1):
            word = ("largest" if rank == 1 else f"{_ordinal(rank)} largest") if not end else "smallest"
            found.append(
                session.quantity(
                    f"lambda_{end}{rank}",
                    f"{word} eigenvalue of the Hessian" + (f", number {rank}" if end and rank > 1 else ""),
                    value,
                    error=max(residual * abs(value), rounding),
                    error_is="residual",
                    flat="" if end else "low",
                    note=note,
                    conventions=known.conventions,
                )
            )
    if len(known.top) >= 5:
        first, fifth = (found[i] for i in (0, 4))
        found.append(
            session.quantity(
                "lambda_1/lambda_5",
                "ratio of the first to the fifth eigenvalue",
                first.value / fifth.value if fifth.value else math.inf,
                error=_relative(first, fifth) * abs(first.value / fifth.value) if fifth.value else math.nan,
                error_is="residual",
                note=note,
                conventions=known.conventions,
            )
        )
    none = known.basis[:0].clone()  # as many vectors of weights would not fit, for several nets
    return "Curvature", found, {"eigenvalues": replace(known, basis=none, top_vectors=none, bottom_vectors=none)}


def _trace(session: Session) -> Found:
    s = session.settings

    def running(probes: int, error: float) -> None:
        session.tell("trace", closeness(error, s.trace_tol))

    within: dict[str, Any] = {"max_probes": s.probes, "seed": s.seed}
    traced = trace(session.hessian, session.known, tol=s.trace_tol, progress=running, **within)
    session.tell("Frobenius norm", 0.0)
    norm = frobenius(session.hessian, session.known, tol=s.trace_tol, **within)

    def number(name: str, text: str, value: float, error: float, done: bool) -> Quantity:
        return session.quantity(
            name,
            text,
            value,
            error=error,
            error_is="standard error",
            flat="low",
            note="" if done else "error above what was asked",
            conventions=traced.conventions,
        )

    found = [
        number("trace", "trace of the Hessian", traced.value, traced.error, traced.converged),
        number("frobenius", "Frobenius norm of the Hessian", norm.value, norm.error, norm.converged),
    ]
    return "Trace", found, {}


def _density(session: Session) -> Found:
    s = session.settings
    shape = density(
        session.hessian,
        session.known,
        runs=s.runs,
        steps=s.steps,
        seed=s.seed,
        progress=lambda products, share: session.tell("density", share),
    )
    return "Spectral density", [], {"density": shape}


def _sharpness(session: Session) -> Found:
    s, problem = session.settings, session.problem
    ascent: dict[str, Any] = {"steps": s.ascent_steps, "seed": s.seed}
    number = session.quantity
    found: list[Quantity] = []

    def gap(name: str, text: str, at: Problem, rho: float, **options: Any) -> list[Quantity]:
        return told(name, text, worst_case(at, rho, **ascent, **options))

    def told(name: str, text: str, result: Sharpness) -> list[Quantity]:
        return [
            number(
                name,
                text,
                result.value,
                error=result.left,
                error_is="a step could still add",
                flat="low",
                note="" if result.converged else "a lower bound, not stationary",
                conventions=result.conventions,
            )
        ]

    session.tell("worst case", 0.0)
    worst = worst_case(problem, s.rho, **ascent)
    found.append(number("sam_gap", f"rise of the loss at SAM's own point, rho = {s.rho:g}", worst.one_step, flat="low"))
    found += told("worst_case", f"largest rise found within rho = {s.rho:g}", worst)
    found += session.attempt(
        "adaptive",
        lambda: gap("adaptive", f"the same within {s.adaptive_rho:g} |w|", problem, s.adaptive_rho, adaptive=True),
    )
    found += session.attempt(
        "l-infinity",
        lambda: gap("linf", f"the same, each weight by at most {s.linf_rho:g}", problem, s.linf_rho, norm="linf"),
    )
    found += session.attempt(
        "logit-normalised",
        lambda: gap(
            "logit_normalised",
            f"within rho = {s.rho:g}, loss of normalised logits",
            _normalised(problem),
            s.rho,
        ),
    )

    def average() -> list[Quantity]:
        result = average_case(problem, s.rho, draws=s.draws, seed=s.seed)
        return [estimate("average_case", f"mean rise over random steps of length {s.rho:g}", result)]

    def groups() -> list[Quantity]:
        result = m_sharpness(problem, s.m, s.rho, **ascent)
        return [estimate("m_sharpness", f"mean worst case over groups of {s.m}, rho = {s.rho:g}", result)]

    def estimate(name: str, text: str, result: Average | Grouped) -> Quantity:
        return number(
            name,
            text,
            result.value,
            error=result.error,
            error_is="standard error",
            flat="low",
            conventions=result.conventions,
        )

    found += session.attempt("average case", average)
    if s.m:
        found += session.attempt("m-sharpness", groups)
    curves: dict[str, Any] = {}

    def rising() -> list[Quantity]:
        worst_curve = curve(problem, s.rhos, **ascent)
        slim: Any = [replace(r, displacement=torch.empty(0)) for r in worst_curve.results if isinstance(r, Sharpness)]
        curves["worst"] = replace(worst_curve, results=tuple(slim))
        curves["average"] = curve(problem, s.rhos, measure="average", draws=s.draws, seed=s.seed)
        return []

    session.attempt("curves", rising)
    return "Sharpness", found, curves


def _flatness(session: Session) -> Found:
    s, problem = session.settings, session.problem
    number = session.quantity

    def noise(name: str, text: str, *, magnitude: bool) -> list[Quantity]:
        result = pac_bayes(problem, s.target, of="loss", magnitude=magnitude, draws=s.draws, seed=s.seed)
        return [
            number(
                name,
                f"{text} that raises the loss by {s.target:g}",
                result.sigma,
                error=result.sigma_error,
                error_is="standard error",
                flat="high",
                conventions=result.conventions,
            )
        ]

    def norm(labels: Literal["model", "data"]) -> list[Quantity]:
        result = fisher_rao(problem, labels=labels)
        whose = "the model's" if labels == "model" else "the data's"
        return [
            number(
                f"fisher_rao_{labels}",
                f"Fisher-Rao norm, {whose} labels",
                result.value,
                flat="low",
                conventions=result.conventions,
            )
        ]

    def relative() -> list[Quantity]:
        if not (layers := _matrices(problem)):
            raise ValueError("no selected weight is a matrix.")
        layer = layers[-1]
        result = relative_flatness(
            restricted(problem, layer), layer, exact=s.probes, tol=s.trace_tol, max_probes=s.probes, seed=s.seed
        )
        return [
            number(
                "relative_flatness",
                f"relative flatness of {layer}",
                result.value,
                error=result.error,
                error_is="standard error",
                flat="low",
                note="" if result.converged else "error above what was asked",
                conventions=result.conventions,
            )
        ]

    found = session.attempt("PAC-Bayes", lambda: noise("pac_bayes", "deviation of noise", magnitude=False))
    found += session.attempt(
        "PAC-Bayes, magnitude",
        lambda: noise("pac_bayes_magnitude", "deviation of noise in multiples of |w|", magnitude=True),
    )
    found += session.attempt("relative flatness", relative)
    found += session.attempt("Fisher-Rao, model", lambda: norm("model"))
    found += session.attempt("Fisher-Rao, data", lambda: norm("data"))
    return "Flatness", found, {}


def _layers(session: Session) -> Found:
    s, found = session.settings, []
    layers = _matrices(session.problem)
    for i, layer in enumerate(layers):
        session.tell("layers", i / len(layers))
        one = spectrum(Hessian(restricted(session.problem, layer)), tol=s.tol, seed=s.seed)
        found.append(
            session.quantity(
                f"lambda_1[{layer}]",
                f"largest eigenvalue of the block of {layer}",
                one.largest,
                error=float(one.top_residuals[0]) * abs(one.largest),
                error_is="residual",
                flat="low",
                note="" if one.converged else "not converged",
                conventions=one.conventions,
            )
        )
    if not layers:
        session.missing["layers"] = "no selected weight is a matrix."
    return "Layer by layer", found, {}


def _published(session: Session) -> Found:
    problem, seed = session.problem, session.settings.seed
    found = []
    for measure in (pyhessian_batch, sam_paper, empirical_sam):

        def numbers(measure: Callable[..., Published] = measure) -> list[Quantity]:
            result = measure(problem, seed=seed)
            return [
                session.quantity(
                    f"{result.preset}: {name}",
                    f"as in {measure.__name__}",
                    value,
                    error=math.nan,
                    error_is="by convention not stated",
                    note="" if result.converged else "not converged",
                    conventions=result.conventions,
                )
                for name, value in result.numbers.items()
            ]

        found += session.attempt(measure.__name__, numbers)
    return "As others publish them", found, {}


def _landscape(session: Session) -> Found:
    s, problem = session.settings, session.problem
    slices: dict[str, Any] = {}

    def keep(name: str, directions: Any, span: float, points: int) -> None:
        slices[name] = landscape(
            problem,
            directions,
            span=span,
            points=points,
            path=session.kept(name),
            progress=lambda done, share: session.tell(name, share),
        )

    # In units of ||w||, which a net of zeros does not have.
    if any(bool(w.any()) for w in problem.weights):
        keep("along_v1", eigenvector(problem, session.known, norm="weights"), s.reach, s.points)
    else:
        session.missing["first eigenvector"] = "every selected weight is zero, so that ||w|| is no unit of length."
    if any(w.dim() >= 2 and bool(w.any()) for w in problem.weights):
        keep("along_random", gaussian(problem, seed=s.seed), s.span, s.points)
        if s.plane:
            pair = gaussian_pair(problem, seeds=(s.seed, s.seed + 1))
            keep("plane", pair, s.span, s.plane)
    else:
        session.missing["random directions"] = "no selected weight is a matrix that is not zero."
    return "Landscape", [], slices


SECTIONS: dict[str, Callable[[Session], Found]] = {
    "model": _model,
    "hessian": _hessian,
    "trace": _trace,
    "density": _density,
    "sharpness": _sharpness,
    "flatness": _flatness,
    "layers": _layers,
    "published": _published,
    "landscape": _landscape,
}


def _normalised(problem: Problem) -> Problem:
    """The problem under the loss of normalised logits.

    Raises:
        ValueError: targets that are no classes, whose outputs are no logits.
    """
    if any(first_tensor(batch.targets).is_floating_point() for batch in problem.batches):
        raise ValueError("normalised logits are those of a classifier: this takes class indices as targets.")
    return under(problem, LogitNormalised(problem.loss))


def _matrices(problem: Problem) -> list[str]:
    return [name for name, w in zip(problem.names, problem.weights, strict=True) if w.dim() >= 2]


def _length(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))


def _relative(a: Quantity, b: Quantity) -> float:
    return math.hypot(*(q.error / abs(q.value) if q.value else math.nan for q in (a, b)))


def _ordinal(rank: int) -> str:
    return f"{rank}{ {2: 'nd', 3: 'rd'}.get(rank if rank < 20 else rank % 10, 'th') }"
