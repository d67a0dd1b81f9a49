"""The card: many measures of one problem in sections that share one Krylov run, each number with its error."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from flatmin.measure.average import Average, average_case
from flatmin.measure.curvature import Hessian
from flatmin.measure.directions import eigenvector, gaussian, gaussian_pair
from flatmin.measure.flatness import fisher_rao, pac_bayes, relative_flatness
from flatmin.measure.krylov import Spectrum, spectrum
from flatmin.measure.landscape import landscape
from flatmin.measure.losses import LogitNormalised, error_rate
from flatmin.measure.presets import Published, empirical_sam, pyhessian_batch, sam_paper
from flatmin.measure.problem import Conventions, Problem, first_tensor, restricted, under
from flatmin.measure.sharpness import Grouped, Sharpness, curve, m_sharpness, worst_case
from flatmin.measure.trace import density, frobenius, trace

Flat = Literal["low", "high", ""]
Progress = Callable[[str, float], None]

CARD = ("model", "hessian", "trace", "density", "sharpness", "landscape")


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """One number of a card.

    Args:
        name: key, such as "lambda_1".
        text: what it is, in words.
        value: the number.
        error: half width of what is known of it, in its own unit; 0 for a value exact to rounding, NaN if unknown.
        error_is: what the error is, such as "standard error", "residual", "a step could still add" or "rounding".
        flat: whether "low" or "high" values are called flat; "" for neither.
        note: what a reader must know besides, such as "not converged".
        conventions: what it was measured on.
    """

    name: str
    text: str
    value: float
    error: float = 0.0
    error_is: str = "rounding"
    flat: Flat = ""
    note: str = ""
    conventions: Conventions


@dataclass(frozen=True, kw_only=True, eq=False)
class Section:
    """The part of a card that answers one question.

    Args:
        name: key in `SECTIONS`.
        title: for a heading.
        quantities: the numbers.
        results: what the measures returned, by a name for a figure: Spectrum (without its vectors), Density, Curve or
            Slice.
        missing: measure -> why this problem does not have it.
        seconds: it took, of wall time.
    """

    name: str
    title: str
    quantities: tuple[Quantity, ...]
    results: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class CardSettings:
    """How a card is measured.

    Args:
        top: largest eigenvalues.
        bottom: smallest eigenvalues.
        tol: relative residual of the eigenvalues.
        trace_tol: relative standard error of trace, Frobenius norm and relative flatness.
        probes: most random probes for each.
        runs: start vectors of the density; 0: that of the Krylov run, which costs nothing.
        steps: of each.
        rho: l2 radius of worst and average cases.
        adaptive_rho: radius in multiples of |w|.
        linf_rho: l-infinity radius.
        rhos: radii of the curves, rising.
        ascent_steps: gradient steps of a worst case.
        m: examples in a group of m-sharpness; 0: no m-sharpness.
        draws: random displacements of average cases and PAC-Bayes noise.
        target: rise of the loss that PAC-Bayes noise may cause.
        points: of a line of the landscape, odd.
        plane: points of each side of the plane, odd; 0: no plane.
        span: half width of a random direction, in multiples of the filters' lengths.
        reach: half width along the top eigenvector, as a share of ||w||.
        seed: of everything that is drawn.

    Raises:
        ValueError: a value out of range.
    """

    top: int = 5
    bottom: int = 1
    tol: float = 1e-2
    trace_tol: float = 2e-2
    probes: int = 1000
    runs: int = 2
    steps: int = 80
    rho: float = 0.05
    adaptive_rho: float = 0.5
    linf_rho: float = 0.001
    rhos: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2)
    ascent_steps: int = 20
    m: int = 0
    draws: int = 10
    target: float = 0.1
    points: int = 41
    plane: int = 21
    span: float = 1.0
    reach: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tol", "trace_tol", "rho", "adaptive_rho", "linf_rho", "target", "span", "reach"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be above 0, got {value!r}.")
        ones = dict.fromkeys(("top", "steps", "ascent_steps"), 1)
        for name, least in {**ones, "runs": 0, "bottom": 0, "m": 0, "draws": 2, "probes": 2, "seed": 0}.items():
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name} must be a whole number, got {getattr(self, name)!r}.")
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)!r}.")
        for name in ("points", "plane"):
            value = getattr(self, name)
            if not (name == "plane" and value == 0) and (value < 3 or value % 2 == 0):
                raise ValueError(
                    f"{name} must be odd and at least 3, so that the model itself is a point; got {value!r}."
                )
        rising = all(a < b for a, b in itertools.pairwise((0.0, *self.rhos, math.inf)))
        if not self.rhos or not rising:
            raise ValueError(f"rhos must rise from above 0, got {self.rhos!r}.")


class Session:
    """A problem under measurement: what sections share.

    Args:
        problem: the function.
        settings: how it is measured.
        folder: where landscapes are kept, so that they go on where they were stopped; None: nowhere.
        progress: called with (what is measured, share of it done).
    """

    def __init__(
        self,
        problem: Problem,
        settings: CardSettings | None = None,
        *,
        folder: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.problem, self.settings = problem, settings or CardSettings()
        self.folder = folder
        self.tell: Progress = progress or (lambda what, share: None)
        self.missing: dict[str, str] = {}

    @cached_property
    def hessian(self) -> Hessian:
        """Of the problem."""
        return Hessian(self.problem)

    @cached_property
    def known(self) -> Spectrum:
        """The Krylov run from which eigenvalues come, and which deflates the rest."""
        s, size = self.settings, self.problem.size
        top = min(s.top, size)
        return spectrum(
            self.hessian,
            top=top,
            bottom=min(s.bottom, size - top),
            tol=s.tol,
            seed=s.seed,
            progress=lambda products, residual: self.tell("eigenvalues", _closeness(residual, s.tol)),
        )

    def kept(self, name: str) -> Path | None:
        """The file of a landscape."""
        return None if self.folder is None else self.folder / f"{name}.pt"

    def quantity(self, name: str, text: str, value: float, **rest: Any) -> Quantity:
        """A number of this problem."""
        return Quantity(name=name, text=text, value=value, **{"conventions": self.problem.conventions} | rest)

    def attempt(self, what: str, measure: Callable[[], Iterable[Quantity]]) -> list[Quantity]:
        """The numbers of a measure that not every problem has; the reason is kept where this one does not."""
        self.tell(what, 0.0)
        try:
            return list(measure())
        except (ValueError, ArithmeticError) as error:
            self.missing[what] = str(error)
            return []


@dataclass(frozen=True, kw_only=True, eq=False)
class Card:
    """What was measured of one problem.

    Args:
        sections: in the order asked for.
        settings: how.
        conventions: of the problem.
    """

    sections: tuple[Section, ...]
    settings: CardSettings
    conventions: Conventions

    @property
    def quantities(self) -> dict[str, Quantity]:
        """All numbers by name."""
        return {q.name: q for section in self.sections for q in section.quantities}

    def result(self, name: str) -> Any:
        """What a measure returned, or None if it was not asked for."""
        return next((s.results[name] for s in self.sections if name in s.results), None)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and words, for JSON: numbers with conventions, and the nodes of every figure."""
        return {
            "conventions": plain(self.conventions),
            "settings": plain(self.settings),
            "sections": {
                s.name: {
                    "title": s.title,
                    "quantities": {q.name: plain(q) for q in s.quantities},
                    "missing": s.missing,
                    "seconds": round(s.seconds, 3),
                    "results": {name: plain(result) for name, result in s.results.items()},
                }
                for s in self.sections
            },
        }


def card(
    problem: Problem,
    what: str | Sequence[str] = "card",
    *,
    settings: CardSettings | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Card:
    """Measure a problem by sections, which share one Krylov run.

    Args:
        problem: the function.
        what: sections by name, with commas or as a list: "model", "hessian", "trace", "density", "sharpness",
            "flatness", "layers", "published", "landscape"; "card" for all but flatness, layers and published, "all"
            for all. Default "card".
        settings: how. Default: `CardSettings()`.
        folder: where landscapes are kept and continued. Default: nowhere.
        progress: called with (what is measured, share of it done).

    Raises:
        ValueError: an unknown section, or a problem of which nothing can be measured.
        ArithmeticError: a Hessian or a loss that is not finite at the weights.

    Example:
        >>> import torch
        >>> from flatmin.measure import Problem, card
        >>> net, x, y = torch.nn.Linear(4, 3), torch.randn(20, 4), torch.randint(3, (20,))
        >>> found = card(Problem(net, torch.nn.functional.cross_entropy, (x, y)), "model,hessian")
        >>> [q.name for q in found.sections[0].quantities]
        ['loss', 'error_rate', 'gradient_norm', 'weight_norm']
    """
    names = chosen(what)
    session = Session(problem, settings, folder=folder, progress=progress)
    sections = []
    for name in names:
        begun = time.perf_counter()
        session.missing = {}
        title, quantities, results = SECTIONS[name](session)
        sections.append(
            Section(
                name=name,
                title=title,
                quantities=tuple(quantities),
                results=results,
                missing=session.missing,
                seconds=time.perf_counter() - begun,
            )
        )
        session.tell(name, 1.0)
    return Card(sections=tuple(sections), settings=session.settings, conventions=problem.conventions)


def chosen(what: str | Sequence[str]) -> list[str]:
    """The sections that words stand for, each once.

    Raises:
        ValueError: an unknown one, or none.
    """
    words = [word.strip() for word in (what.split(",") if isinstance(what, str) else what) if word.strip()]
    groups = {"card": CARD, "all": tuple(SECTIONS)}
    unknown = [word for word in words if word not in groups and word not in SECTIONS]
    if unknown or not words:
        raise ValueError(f"what must be of {', '.join([*groups, *SECTIONS])}; got {', '.join(unknown) or 'nothing'}.")
    return list(dict.fromkeys(name for word in words for name in groups.get(word, (word,))))


# -- sections ------------------------------------------------------------------------------------------------------

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
        session.tell("trace", _closeness(error, s.trace_tol))

    within: dict[str, Any] = {"max_probes": s.probes, "seed": s.seed}
    traced = trace(session.hessian, session.known, tol=s.trace_tol, progress=running, **within)
    session.tell("Frobenius norm", 0.0)
    # The error of a root is half that of the square.
    squared = frobenius(session.hessian, session.known, tol=2 * s.trace_tol, **within)
    norm = math.sqrt(max(squared.value, 0.0))

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
        number(
            "frobenius",
            "Frobenius norm of the Hessian",
            norm,
            squared.error / (2 * norm) if norm else math.nan,
            squared.converged,
        ),
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


# -- words and numbers ---------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """A result as JSON can hold it: numbers, words, lists and tables; vectors of weights are left out."""
    if isinstance(value, (str, bool, int, type(None))):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Tensor):
        return plain(value.tolist()) if value.dim() == 0 or value.numel() <= _LARGEST else None
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value) if f.name not in _VECTORS}
    return str(value)


_LARGEST = 100_000
_VECTORS = {"basis", "top_vectors", "bottom_vectors", "displacement", "vector", "diagonal", "origin"}


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


def _closeness(error: float, tol: float) -> float:
    """How near an error is to what was asked, from 0 to 1, by orders of magnitude."""
    if not error > tol:
        return 1.0
    return 0.0 if not error < 1 or tol >= 1 else math.log(error) / math.log(tol)


def _length(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))


def _relative(a: Quantity, b: Quantity) -> float:
    return math.hypot(*(q.error / abs(q.value) if q.value else math.nan for q in (a, b)))


def _ordinal(rank: int) -> str:
    return f"{rank}{ {2: 'nd', 3: 'rd'}.get(rank if rank < 20 else rank % 10, 'th') }"
