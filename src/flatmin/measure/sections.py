"""The sections of a report: functions that measure a problem and add the results to a session."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flatmin.measure.average import Average, average_case
from flatmin.measure.curvature import Hessian
from flatmin.measure.directions import eigenvector, gaussian, gaussian_pair
from flatmin.measure.flatness import FisherRao, PacBayes, RelativeFlatness, fisher_rao, pac_bayes, relative_flatness
from flatmin.measure.krylov import Spectrum, spectrum
from flatmin.measure.landscape import landscape
from flatmin.measure.losses import LogitNormalised, error_rate, logits_of, with_logits
from flatmin.measure.presets import PublishedNumbers, empirical_sam, pyhessian_batch, sam_paper
from flatmin.measure.problem import Problem, first_tensor, restricted, under
from flatmin.measure.radius import radius
from flatmin.measure.session import Quantity, Session, closeness
from flatmin.measure.sharpness import Grouped, Sharpness, curve, m_sharpness, worst_case
from flatmin.measure.trace import Estimate, density, frobenius, trace


def _model(session: Session) -> None:
    problem, add = session.problem, session.add
    measured = session.attempt("gradient_norm", problem.gradient)
    loss = session.attempt("loss", problem.value) if measured is None else measured[0]
    if loss is not None:
        add("loss", f"mean {problem.conventions.loss}", loss)
    errors = session.attempt("error rate", lambda: error_rate(problem))
    if errors is not None:
        add("error_rate", "share of wrong predictions", errors)
    if measured is not None:
        add("gradient_norm", "norm of the gradient", _length(measured[1]))
    add("weight_norm", "norm of the weights", _length(problem.flat(problem.weights)))


def _hessian(session: Session) -> None:
    spectrum = session.spectrum
    # The rounding error of the products, which limits the accuracy once the residual is smaller.
    rounding = torch.finfo(session.problem.dtype).eps * max(abs(spectrum.largest), abs(spectrum.smallest))
    note = "" if spectrum.converged else "not converged"
    # What the residual does not show: an eigenvalue that the iteration has not met.
    chance = spectrum.chance_missed
    first_note = note or (f"one may have been missed: probability up to {chance:.0%}" if chance > 0.05 else "")
    eigenvalues = []
    for end, values, residuals in (
        ("", spectrum.top, spectrum.top_residuals),
        ("-", spectrum.bottom, spectrum.bottom_residuals),
    ):
        for rank, (value, residual) in enumerate(zip(values.tolist(), residuals.tolist(), strict=True), 1):
            word = ("largest" if rank == 1 else f"{_ordinal(rank)} largest") if not end else "smallest"
            eigenvalues.append(
                session.add(
                    f"lambda_{end}{rank}",
                    f"{word} eigenvalue of the Hessian" + (f", number {rank}" if end and rank > 1 else ""),
                    value,
                    error=max(residual * abs(value), rounding),
                    error_is="residual",
                    flat="" if end else "low",
                    note=first_note if rank == 1 else note,
                    conventions=spectrum.conventions,
                )
            )
    if len(spectrum.top) >= 5:
        first, fifth = (eigenvalues[i] for i in (0, 4))
        session.add(
            "lambda_1/lambda_5",
            "ratio of the first to the fifth eigenvalue",
            first.value / fifth.value if fifth.value else math.inf,
            error=_relative(first, fifth) * abs(first.value / fifth.value) if fifth.value else math.nan,
            error_is="residual",
            note=note,
            conventions=spectrum.conventions,
        )
    none = spectrum.basis[:0].clone()  # drop the vectors: for several networks they would take too much memory
    session.results["eigenvalues"] = replace(spectrum, basis=none, top_vectors=none, bottom_vectors=none)


def _trace(session: Session) -> None:
    s, spectrum = session.settings, session.spectrum

    def running(probes: int, error: float) -> None:
        session.tell("trace", closeness(error, s.trace_tol))

    within: dict[str, Any] = {"max_probes": s.probes, "seed": s.seed}

    def add(name: str, text: str, value: float, error: float, estimate: Estimate) -> None:
        session.add(
            name,
            text,
            value,
            error=error,
            error_is="standard error",
            flat="low",
            note="" if estimate.converged else "error above the tolerance",
            conventions=estimate.conventions,
        )

    traced = session.attempt(
        "trace", lambda: trace(session.hessian, spectrum, tol=s.trace_tol, progress=running, **within)
    )
    if traced is not None:
        add("trace", "trace of the Hessian", traced.value, traced.error, traced)
    norm = session.attempt("Frobenius norm", lambda: frobenius(session.hessian, spectrum, tol=s.trace_tol, **within))
    if norm is not None:
        add("frobenius", "Frobenius norm of the Hessian", norm.value, norm.error, norm)


def _density(session: Session) -> None:
    s = session.settings
    session.results["density"] = density(
        session.hessian,
        session.spectrum,
        runs=s.runs,
        steps=s.steps,
        seed=s.seed,
        progress=lambda products, share: session.tell("density", share),
    )


def _sharpness(session: Session) -> None:
    s, problem = session.settings, session.problem
    ascent: dict[str, Any] = {"steps": s.ascent_steps, "seed": s.seed}

    def rise(name: str, text: str, result: Sharpness | None) -> None:
        if result is not None:
            session.add(
                name,
                text,
                result.value,
                error=result.left,
                error_is="possible further rise",
                flat="low",
                note="" if result.converged else "a lower bound: the ascent has not converged",
                conventions=result.conventions,
            )

    def mean(name: str, text: str, result: Average | Grouped | None) -> None:
        if result is not None:
            session.add(
                name,
                text,
                result.value,
                error=result.error,
                error_is="standard error",
                flat="low",
                conventions=result.conventions,
            )

    worst = session.attempt("worst case", lambda: worst_case(problem, s.rho, **ascent))
    # If a later step fails, the first step may still succeed.
    first = worst or session.attempt("SAM's gap", lambda: worst_case(problem, s.rho, steps=1, seed=s.seed))
    if first is not None:
        session.add("sam_gap", f"rise of the loss after SAM's ascent step, rho = {s.rho:g}", first.one_step, flat="low")
    rise("worst_case", f"largest rise found within rho = {s.rho:g}", worst)
    rise(
        "adaptive",
        f"largest rise found within {s.adaptive_rho:g} |w| (adaptive)",
        session.attempt("adaptive", lambda: worst_case(problem, s.adaptive_rho, **ascent, adaptive=True)),
    )
    rise(
        "linf",
        f"largest rise found, each weight moved by at most {s.linf_rho:g}",
        session.attempt("l-infinity", lambda: worst_case(problem, s.linf_rho, **ascent, norm="linf")),
    )
    rise(
        "logit_normalised",
        f"largest rise found within rho = {s.rho:g}, loss of normalised logits",
        session.attempt("logit-normalised", lambda: worst_case(_normalised(problem), s.rho, **ascent)),
    )
    mean(
        "average_case",
        f"mean rise under random displacements of length {s.rho:g}",
        session.attempt("average case", lambda: average_case(problem, s.rho, draws=s.draws, seed=s.seed)),
    )
    if s.m:
        mean(
            "m_sharpness",
            f"mean worst case over groups of {s.m}, rho = {s.rho:g}",
            session.attempt("m-sharpness", lambda: m_sharpness(problem, s.m, s.rho, **ascent)),
        )
    rising = session.attempt("curve of worst cases", lambda: curve(problem, s.rhos, **ascent))
    if rising is not None:
        slim: Any = [replace(r, displacement=torch.empty(0)) for r in rising.results if isinstance(r, Sharpness)]
        session.results["worst"] = replace(rising, results=tuple(slim))
    over = session.attempt(
        "curve of average cases", lambda: curve(problem, s.rhos, measure="average", draws=s.draws, seed=s.seed)
    )
    if over is not None:
        session.results["average"] = over


def _flatness(session: Session) -> None:
    s, problem = session.settings, session.problem

    for name, what, text, magnitude in (
        ("pac_bayes", "PAC-Bayes", "standard deviation of the noise", False),
        ("pac_bayes_magnitude", "PAC-Bayes, magnitude", "standard deviation of the noise in multiples of |w|", True),
    ):

        def noise(magnitude: bool = magnitude) -> PacBayes:
            return pac_bayes(problem, s.target, of="loss", magnitude=magnitude, draws=s.draws, seed=s.seed)

        borne = session.attempt(what, noise)
        if borne is not None:
            session.add(
                name,
                f"{text} that raises the loss by {s.target:g}",
                borne.sigma,
                error=borne.sigma_error,
                error_is="standard error",
                flat="high",
                conventions=borne.conventions,
            )

    def relative() -> RelativeFlatness:
        if not (layers := _matrices(problem)):
            raise ValueError("no selected weight is a matrix.")
        layer = layers[-1]
        return relative_flatness(
            restricted(problem, layer), layer, exact=s.probes, tol=s.trace_tol, max_probes=s.probes, seed=s.seed
        )

    last = session.attempt("relative flatness", relative)
    if last is not None:
        session.add(
            "relative_flatness",
            f"relative flatness of {last.layer}",
            last.value,
            error=last.error,
            error_is="standard error",
            flat="low",
            note="" if last.converged else "error above the tolerance",
            conventions=last.conventions,
        )
    for labels, whose in (("model", "the model's"), ("data", "the data's")):

        def norm(labels: Any = labels) -> FisherRao:
            return fisher_rao(problem, labels=labels)

        length = session.attempt(f"Fisher-Rao, {labels}", norm)
        if length is not None:
            session.add(
                f"fisher_rao_{labels}",
                f"Fisher-Rao norm, {whose} labels",
                length.value,
                flat="low",
                conventions=length.conventions,
            )


def _layers(session: Session) -> None:
    s, layers = session.settings, _matrices(session.problem)
    for i, layer in enumerate(layers):
        session.tell("layers", i / len(layers))

        def block(layer: str = layer) -> Spectrum:
            return spectrum(Hessian(restricted(session.problem, layer)), tol=s.tol, seed=s.seed)

        one = session.attempt(f"lambda_1[{layer}]", block)
        if one is not None:
            session.add(
                f"lambda_1[{layer}]",
                f"largest eigenvalue of the block of {layer}",
                one.largest,
                error=float(one.top_residuals[0]) * abs(one.largest),
                error_is="residual",
                flat="low",
                note="" if one.converged else "not converged",
                conventions=one.conventions,
            )
    if not layers:
        session.missing["layers"] = "no selected weight is a matrix."


def _published(session: Session) -> None:
    for measure in (pyhessian_batch, sam_paper, empirical_sam):

        def numbers(measure: Callable[..., PublishedNumbers] = measure) -> PublishedNumbers:
            return measure(session.problem, seed=session.settings.seed)

        result = session.attempt(measure.__name__, numbers)
        if result is None:
            continue
        for name, value in result.numbers.items():
            session.add(
                f"{result.preset}: {name}",
                f"by the protocol of {measure.__name__}",
                value,
                error=math.nan,
                error_is="not given by the protocol",
                note="" if result.converged else "not converged",
                conventions=result.conventions,
            )


def _landscape(session: Session) -> None:
    s, problem = session.settings, session.problem

    def keep(what: str, name: str, directions: Callable[[], Any], span: float, points: int) -> None:
        surface = session.attempt(
            what,
            lambda: landscape(
                problem,
                directions(),
                span=span,
                points=points,
                path=session.landscape_file(name),
                progress=lambda done, share: session.tell(name, share),
            ),
        )
        if surface is not None:
            session.results[name] = surface

    # The axis is in units of ||w||, which must not be zero.
    if any(bool(w.any()) for w in problem.weights):
        keep(
            "first eigenvector",
            "along_v1",
            lambda: eigenvector(problem, session.spectrum, norm="weights"),
            s.reach,
            s.points,
        )
    else:
        session.missing["first eigenvector"] = "every selected weight is zero, so ||w|| cannot be the unit of length."
    if any(w.dim() >= 2 and bool(w.any()) for w in problem.weights):
        keep("random direction", "along_random", lambda: gaussian(problem, seed=s.seed), s.span, s.points)
        if s.plane:
            pair = (s.seed, s.seed + 1)
            keep("random plane", "plane", lambda: gaussian_pair(problem, seeds=pair), s.span, s.plane)
    else:
        session.missing["random directions"] = "no selected weight is a non-zero matrix."


def _radius(session: Session) -> None:
    if session.ascents is None:
        raise ValueError(
            "this section needs a method and its training batches; measure the folder of a run on the train part."
        )
    with session.ascents() as (optimizer, closures, resolution):
        found = radius(optimizer, closures, resolution=resolution)
    uphill = found.uphill
    several = len(uphill) > 1 and all(map(math.isfinite, uphill))
    session.add(
        "linear_radius",
        f"radius at which the linear prediction along {found.method}'s ascent is off by {found.off:.0%}",
        found.limit,
        error=(uphill[-1] - uphill[0]) / 2 if several else math.nan,
        error_is="half the range over batches",
        flat="high",
        note="" if math.isfinite(found.limit) else found.sentence(),
    )
    session.results["radius"] = found


SECTIONS: dict[str, tuple[str, Callable[[Session], None]]] = {
    "model": ("The model", _model),
    "hessian": ("Curvature", _hessian),
    "trace": ("Trace", _trace),
    "density": ("Spectral density", _density),
    "sharpness": ("Sharpness", _sharpness),
    "flatness": ("Flatness", _flatness),
    "layers": ("Layer by layer", _layers),
    "published": ("Published protocols", _published),
    "landscape": ("Landscape", _landscape),
    "radius": ("Radius of the method", _radius),
}
"""Title of each section, and the function that measures it and adds the results to the session."""


def _normalised(problem: Problem) -> Problem:
    """The problem with the loss of normalised logits.

    Raises:
        ValueError: the targets are not class indices, or the loss does not depend on the logits (such as a loss
            computed by the model itself).
    """
    if any(first_tensor(batch.targets).is_floating_point() for batch in problem.batches):
        raise ValueError("normalised logits need a classifier with class indices as targets.")
    if problem.batches:
        batch = problem.batches[0]
        with problem.guard(), torch.no_grad():
            outputs = problem.outputs(batch)
        logits = logits_of(outputs).detach().requires_grad_()
        with torch.enable_grad():
            value = problem.value_of(batch, with_logits(outputs, logits))
            seen = value.requires_grad and torch.autograd.grad(value, logits, allow_unused=True)[0] is not None
        if not seen:
            raise ValueError(
                "the loss does not depend on the logits that the model returns, so normalising them has no effect."
            )
    return under(problem, LogitNormalised(problem.loss))


def _matrices(problem: Problem) -> list[str]:
    return [name for name, w in zip(problem.names, problem.weights, strict=True) if w.dim() >= 2]


def _length(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))


def _relative(a: Quantity, b: Quantity) -> float:
    return math.hypot(*(q.error / abs(q.value) if q.value else math.nan for q in (a, b)))


def _ordinal(rank: int) -> str:
    return f"{rank}{ {2: 'nd', 3: 'rd'}.get(rank if rank < 20 else rank % 10, 'th') }"
