"""The report: its numbers are those of the measures themselves, from one Krylov run, and what is missing is named."""

import importlib
import json
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flatmin.measure.average import average_case
from flatmin.measure.curvature import Hessian
from flatmin.measure.directions import eigenvector, gaussian, gaussian_pair
from flatmin.measure.flatness import fisher_rao, pac_bayes, relative_flatness
from flatmin.measure.krylov import spectrum
from flatmin.measure.landscape import Slice, landscape
from flatmin.measure.losses import LogitNormalised, error_rate
from flatmin.measure.presets import pyhessian_batch, sam_paper
from flatmin.measure.problem import Problem, restricted, under
from flatmin.measure.report import OF_METHOD, REPORT, SECTIONS, ReportSettings, chosen, plain, report
from flatmin.measure.sharpness import curve, m_sharpness, worst_case
from flatmin.measure.trace import density, frobenius, trace
from tests.measure.nets import Tied, batches, dense_hessian, function_of, make

# As attributes of `flatmin.measure` some modules are functions.
MODULE = importlib.import_module("flatmin.measure.sections")
RECORD = importlib.import_module("flatmin.measure.record")

OF_PROBLEM = [name for name in SECTIONS if name not in OF_METHOD]
SMALL = ReportSettings(points=5, plane=3, steps=5, runs=1, ascent_steps=3, draws=2, probes=20, rhos=(0.05, 0.1))
ASCENT = {"steps": 3, "seed": 0}


def problem_of(name="mlp", **options):
    model, x, y, loss = make(name)
    return Problem(model, loss, batches(x, y, 7), split="train", **options)


def zeroed():
    """A classifier whose weights are all zero."""
    model = nn.Linear(5, 3).double()
    for p in model.parameters():
        nn.init.zeros_(p)
    _, x, y, loss = make("mlp")
    return Problem(model, loss, (x, y))


class Scaled(nn.Module):
    """A net that has vectors only."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64))

    def forward(self, x):
        return x[:, :3] * self.scale


def vectors():
    _, x, y, loss = make("mlp")
    return Problem(Scaled(), loss, (x, y))


def values(found):
    return {name: q.value for name, q in found.quantities.items()}


def section(problem, name, settings=SMALL):
    (only,) = report(problem, name, settings=settings).sections
    return only


@pytest.fixture(scope="module")
def problem():
    return problem_of()


@pytest.fixture(scope="module")
def whole(problem):
    return report(problem, "all", settings=replace(SMALL, m=5))


class TestNumbers:
    def test_model(self, problem, whole):
        loss, gradient = problem.gradient()
        norm = problem.flat(problem.weights).norm()
        assert values(whole) | {
            "loss": loss,
            "error_rate": error_rate(problem),
            "gradient_norm": pytest.approx(float(gradient.norm()), rel=1e-12),
            "weight_norm": pytest.approx(float(norm), rel=1e-12),
        } == values(whole)

    def test_eigenvalues_are_those_of_the_dense_hessian(self, problem):
        want = torch.linalg.eigvalsh(dense_hessian(*make("mlp")))
        found = report(problem, "hessian", settings=ReportSettings(top=6, bottom=2, tol=1e-6)).quantities
        order = ["lambda_1", "lambda_2", "lambda_3", "lambda_4", "lambda_5", "lambda_6", "lambda_-1", "lambda_-2"]
        assert list(found) == [*order, "lambda_1/lambda_5"]
        for name, value in zip(order, [*want.flip(0)[:6].tolist(), *want[:2].tolist()], strict=True):
            assert found[name].value == pytest.approx(value, abs=1e-9)
            assert 0 < found[name].error <= 1.1e-6 * abs(value) and found[name].error_is == "residual"
        assert [found[name].flat for name in order] == ["low"] * 6 + [""] * 2
        assert found["lambda_2"].text.startswith("2nd largest") and "number 2" in found["lambda_-2"].text

    def test_the_ratio_of_eigenvalues_has_the_error_of_both(self, whole):
        a, b, ratio = (whole.quantities[name] for name in ("lambda_1", "lambda_5", "lambda_1/lambda_5"))
        assert ratio.value == a.value / b.value
        relative = math.hypot(a.error / a.value, b.error / b.value)
        assert ratio.error == pytest.approx(relative * ratio.value, rel=1e-12)

    def test_an_error_is_never_below_rounding(self):
        """The residual of a quadratic loss of one weight is."""
        one = Problem(nn.Linear(1, 1, bias=False), nn.MSELoss(), [(torch.ones(4, 1), torch.zeros(4, 1))])
        found = report(one, "hessian", settings=ReportSettings(top=1, bottom=0))
        assert float(found.result("eigenvalues").top_residuals[0]) == 0.0
        q = found.quantities["lambda_1"]
        assert q.error >= torch.finfo(torch.float32).eps * q.value > 0

    def test_trace_and_norm(self, problem):
        """From a short run, so that the error that is asked for decides how many probes the norm takes."""
        settings = ReportSettings(top=1, bottom=0, tol=0.3, trace_tol=0.015, probes=300)
        operator = Hessian(problem)
        known = spectrum(operator, tol=0.3)
        traced = trace(operator, known, tol=0.015, max_probes=300)
        exact = frobenius(operator, known, tol=0.015, max_probes=300)
        assert 24 < exact.probes < 300
        found = report(problem, "trace", settings=settings).quantities
        assert (found["trace"].value, found["trace"].error) == (traced.value, traced.error)
        norm = found["frobenius"]
        assert (norm.value, norm.error) == (exact.value, exact.error)
        dense = dense_hessian(*make("mlp"))
        assert abs(found["trace"].value - float(dense.trace())) <= 5 * traced.error
        assert abs(norm.value - float(dense.norm())) <= 5 * norm.error
        assert found["trace"].conventions.seed == 0

    def test_an_estimate_that_missed_its_error_says_so(self, problem):
        settings = replace(SMALL, top=1, bottom=0, tol=0.5, trace_tol=1e-9)
        assert section(problem, "trace", settings).quantities[0].note == "error above the tolerance"

    def test_density(self, problem, whole):
        operator = Hessian(problem)
        want = density(operator, spectrum(operator, top=5, bottom=1, tol=SMALL.tol), runs=1, steps=5)
        found = whole.result("density")
        assert torch.equal(found.nodes, want.nodes) and torch.equal(found.weights, want.weights)

    def test_sharpness(self, problem, whole):
        worst, adaptive = worst_case(problem, 0.05, **ASCENT), worst_case(problem, 0.5, adaptive=True, **ASCENT)
        linf = worst_case(problem, 0.001, norm="linf", **ASCENT)
        normalised = worst_case(under(problem, LogitNormalised(problem.loss)), 0.05, **ASCENT)
        average = average_case(problem, 0.05, draws=2)
        groups = m_sharpness(problem, 5, 0.05, **ASCENT)
        want = {
            "sam_gap": (worst.one_step, 0.0),
            "worst_case": (worst.value, worst.left),
            "adaptive": (adaptive.value, adaptive.left),
            "linf": (linf.value, linf.left),
            "logit_normalised": (normalised.value, normalised.left),
            "average_case": (average.value, average.error),
            "m_sharpness": (groups.value, groups.error),
        }
        (found,) = (s for s in whole.sections if s.name == "sharpness")
        assert {q.name: (q.value, q.error) for q in found.quantities} == want
        assert whole.quantities["sam_gap"].value == worst_case(problem, 0.05, steps=1).one_step
        assert whole.quantities["logit_normalised"].conventions.loss == "logit-normalised CrossEntropyLoss"
        assert {q.flat for q in found.quantities} == {"low"}

    def test_groups_are_measured_only_where_asked_for(self, problem):
        assert "m_sharpness" not in report(problem, "sharpness", settings=SMALL).quantities

    def test_curves(self, problem, whole):
        worst, average = curve(problem, (0.05, 0.1), **ASCENT), curve(problem, (0.05, 0.1), measure="average", draws=2)
        assert whole.result("worst").values == worst.values and whole.result("worst").rhos == (0.05, 0.1)
        assert (whole.result("average").values, whole.result("average").errors) == (average.values, average.errors)

    def test_flatness(self, problem, whole):
        noise = [pac_bayes(problem, 0.1, of="loss", magnitude=magnitude, draws=2) for magnitude in (False, True)]
        relative = relative_flatness(problem, "2.weight", exact=20)
        want = {
            "pac_bayes": (noise[0].sigma, noise[0].sigma_error, "high"),
            "pac_bayes_magnitude": (noise[1].sigma, noise[1].sigma_error, "high"),
            "relative_flatness": (pytest.approx(relative.value, rel=1e-10), 0.0, "low"),
            "fisher_rao_model": (fisher_rao(problem).value, 0.0, "low"),
            "fisher_rao_data": (fisher_rao(problem, labels="data").value, 0.0, "low"),
        }
        assert relative.error == 0.0, "the last layer is small enough for the exact value"
        (found,) = (s for s in whole.sections if s.name == "flatness")
        assert {q.name: (q.value, q.error, q.flat) for q in found.quantities} == want

    @pytest.mark.parametrize("name", ["mlp", "groupnorm", "tied"])
    def test_layers_are_the_blocks_of_the_dense_hessian(self, name):
        model, x, y, loss = make(name)
        layers = [n for n, w in model.named_parameters() if w.dim() >= 2]
        settings = replace(SMALL, tol=1e-6)
        found = section(Problem(model, loss, (x, y)), "layers", settings).quantities
        assert [q.name for q in found] == [f"lambda_1[{layer}]" for layer in layers]
        for layer, q in zip(layers, found, strict=True):
            block = torch.linalg.eigvalsh(dense_hessian(model, x, y, loss, names=[layer]))
            assert q.value == pytest.approx(float(block[-1]), abs=1e-9 * float(block.abs().max()))
            assert q.conventions.params == layer

    def test_published(self, problem, whole):
        want = {}
        for measure in (pyhessian_batch, sam_paper):
            result = measure(problem, seed=0)
            want |= {f"{result.preset}: {name}": value for name, value in result.numbers.items()}
        (found,) = (s for s in whole.sections if s.name == "published")
        assert {q.name: q.value for q in found.quantities} == want
        assert found.missing == {"empirical_sam": "this measure uses 40 batches, but the problem has 3."}

    def test_landscapes(self, problem, whole):
        known = spectrum(Hessian(problem), top=5, bottom=1, tol=SMALL.tol)
        along = landscape(problem, eigenvector(problem, known, norm="weights"), span=0.1, points=5)
        random = landscape(problem, gaussian(problem), points=5)
        plane = landscape(problem, gaussian_pair(problem), points=3)
        for name, want in (("along_v1", along), ("along_random", random), ("plane", plane)):
            assert isinstance(whole.result(name), Slice) and torch.equal(whole.result(name).loss, want.loss)
        assert whole.result("plane").centre == problem.value()

    def test_no_plane_where_none_is_asked_for(self, problem):
        assert set(section(problem, "landscape", replace(SMALL, plane=0)).results) == {"along_v1", "along_random"}

    def test_a_net_with_fewer_weights_than_eigenvalues_asked_for(self):
        found = section(vectors(), "hessian")
        assert [q.name for q in found.quantities] == ["lambda_1", "lambda_2", "lambda_3"]


class TestOneRun:
    def test_sections_share_it(self, problem, monkeypatch):
        runs = []
        monkeypatch.setattr(
            "flatmin.measure.session.spectrum", lambda *a, **k: runs.append(spectrum(*a, **k)) or runs[-1]
        )
        report(problem, "hessian,trace,density,landscape", settings=SMALL)
        assert len(runs) == 1

    def test_its_products_are_made_once(self, problem, monkeypatch):
        products = []
        matvec = Hessian.matvec
        monkeypatch.setattr(Hessian, "matvec", lambda self, v: products.append(1) or matvec(self, v))
        found = report(problem, "hessian,density,landscape", settings=SMALL)
        assert len(products) == found.result("eigenvalues").products + found.result("density").products

    def test_a_section_alone_makes_it(self, problem, whole):
        assert values(report(problem, "trace", settings=SMALL))["trace"] == values(whole)["trace"]


class TestWhat:
    def test_words(self):
        assert chosen("report") == list(REPORT) and chosen("all") == OF_PROBLEM
        assert chosen(" trace , model,") == chosen(["trace", "model"]) == ["trace", "model"]
        assert chosen("model,model,report").count("model") == 1
        assert chosen("layers,report") == ["layers", *REPORT]
        assert set(SECTIONS) - set(REPORT) == {"flatness", "layers", "published", *OF_METHOD}

    def test_the_sections_come_in_the_order_asked_for(self, problem):
        found = report(problem, ["layers", "model"], settings=SMALL)
        assert [s.name for s in found.sections] == ["layers", "model"]
        assert found.result("plane") is None

    @pytest.mark.parametrize(
        ("what", "got"),
        [
            ("hesian", "hesian; did you mean 'hessian'?"),
            ("model,xyz,b", "xyz, b."),
            ("", "nothing."),
            (" , ", "nothing."),
            ([], "nothing."),
        ],
    )
    def test_unknown(self, what, got, problem):
        with pytest.raises(ValueError) as error:
            report(problem, what)
        assert str(error.value) == f"what must be of report, all, {', '.join(SECTIONS)}; got {got}"

    def test_what_is_under_way_is_told(self, problem):
        comparison = []
        report(problem, "all", settings=SMALL, progress=lambda what, share: comparison.append((what, share)))
        assert all(0.0 <= share <= 1.0 for _, share in comparison)
        done = [what for what, share in comparison if what in SECTIONS and share == 1.0]
        assert list(dict.fromkeys(done)) == OF_PROBLEM, "some measures are called as their section is"
        assert {"eigenvalues", "trace", "worst case", "plane"} <= {what for what, _ in comparison}


class TestMissing:
    def test_regression(self):
        model = section(problem_of("regression"), "model")
        assert [q.name for q in model.quantities] == ["loss", "gradient_norm", "weight_norm"]
        assert set(model.missing) == {"error rate"} and "class indices" in model.missing["error rate"]
        flatness = section(problem_of("regression"), "flatness")
        assert set(flatness.missing) == {"Fisher-Rao, model"} and "got MSELoss" in flatness.missing["Fisher-Rao, model"]
        assert "fisher_rao_data" in [q.name for q in flatness.quantities]

    def test_regression_has_no_logits(self):
        found = section(problem_of("regression"), "sharpness")
        assert "logit-normalised" in found.missing
        assert "logit_normalised" not in [q.name for q in found.quantities]

    def test_smoothed_labels_are_no_labels_of_the_model(self):
        assert set(section(problem_of("relu"), "flatness").missing) == {"Fisher-Rao, model"}

    def test_vectors_only(self):
        found = report(vectors(), "all", settings=SMALL)
        missing = {what: why for s in found.sections for what, why in s.missing.items() if s.name != "published"}
        assert missing == {
            "relative flatness": "no selected weight is a matrix.",
            "layers": "no selected weight is a matrix.",
            "random directions": "no selected weight is a non-zero matrix.",
        }
        assert found.result("along_v1") is not None and found.result("plane") is None

    def test_weights_that_are_all_zero(self):
        found = report(zeroed(), "sharpness,landscape", settings=SMALL)
        sharpness, slices = found.sections
        assert (
            set(sharpness.missing) == {"adaptive"} and "every selected weight is zero" in sharpness.missing["adaptive"]
        )
        assert slices.results == {} and "random directions" in slices.missing and len(slices.missing) == 2

    def test_a_section_names_its_own_only(self):
        found = report(problem_of("regression"), "model,hessian", settings=SMALL)
        assert [len(s.missing) for s in found.sections] == [1, 0]


class Returns(nn.Module):
    """Answers with what is made of the logits."""

    def __init__(self, net, make):
        super().__init__()
        self.inner, self.make = net, make

    def forward(self, x):
        return self.make(self.inner(x))


@dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor


class Pair(NamedTuple):
    logits: torch.Tensor
    features: torch.Tensor


MADE = {
    "object": (lambda z: SimpleNamespace(logits=z), lambda o: o.logits),
    "dataclass": (lambda z: Output(z, 2 * z), lambda o: o.logits),
    "dict": (lambda z: {"logits": z, "features": 2 * z}, lambda o: o["logits"]),
    "dict of one": (lambda z: {"out": z}, lambda o: o["out"]),
    "named tuple": (lambda z: Pair(z, 2 * z), lambda o: o.logits),
    "tuple of one": (lambda z: (z,), lambda o: o[0]),
    "list": (lambda z: [z, "more"], lambda o: o[0]),
}


@pytest.fixture(scope="module")
def of_logits():
    """The report of a net that returns its logits."""
    model, x, y, _ = make("mlp")
    return report(Problem(model, lambda o, t: F.cross_entropy(o, t), (x, y)), "all", settings=SMALL)


class TestOutputs:
    """Models whose output is no tensor, such as those of Hugging Face: huggingface/transformers#10459."""

    @pytest.mark.parametrize("kind", MADE)
    def test_everything_is_as_for_the_logits_alone(self, kind, of_logits):
        model, x, y, _ = make("mlp")
        put, take = MADE[kind]
        problem = Problem(Returns(model, put), lambda o, t: F.cross_entropy(take(o), t), (x, y))
        found = report(problem, "all", settings=SMALL)
        assert set(found.missing) == set(of_logits.missing)
        want = {name.replace("[", "[inner."): value for name, value in values(of_logits).items()}
        assert values(found) == pytest.approx(want, rel=1e-9, abs=1e-12)

    def test_logits_that_are_not_known_are_named(self, of_logits):
        model, x, y, _ = make("mlp")
        problem = Problem(Returns(model, lambda z: (z, 2 * z)), lambda o, t: F.cross_entropy(o[0], t), (x, y))
        found = report(problem, "model,sharpness", settings=SMALL)
        assert set(found.missing) == {"error rate", "logit-normalised"}
        assert all("a tuple with 2 tensors, none called 'logits'" in why for why in found.missing.values())
        assert found.quantities["worst_case"].value == pytest.approx(
            of_logits.quantities["worst_case"].value, rel=1e-12
        )

    def test_a_loss_that_the_model_has_computed_has_no_normalised_logits(self):
        """It would be the same as the plain one."""
        model, x, y, _ = make("mlp")
        problem = Problem(
            Returns(model, lambda z: {"logits": z, "loss": F.cross_entropy(z, y)}), lambda o, t: o["loss"], (x, y)
        )
        found = section(problem, "sharpness")
        assert "does not depend on the logits" in found.missing["logit-normalised"] and len(found.missing) == 1

    def test_classes_in_the_last_dimension_are_normalised_there(self):
        torch.manual_seed(0)
        z, y = torch.randn(4, 5, 3, dtype=torch.float64), torch.randint(3, (4, 5))
        loss = LogitNormalised(lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten()))
        centred = z - z.mean(2, keepdim=True)
        want = F.cross_entropy((centred / centred.norm(dim=2, keepdim=True)).flatten(0, 1), y.flatten())
        assert loss(z, y) == pytest.approx(float(want), rel=1e-12)


class TestFailures:
    """What fails takes nothing else with it."""

    @pytest.mark.parametrize(
        ("kind", "what", "measure", "missing", "kept"),
        [
            (TypeError, "model", "error_rate", {"error rate"}, {"loss", "gradient_norm", "weight_norm"}),
            (RuntimeError, "trace", "frobenius", {"Frobenius norm"}, {"trace"}),
            (
                *(MemoryError, "flatness", "fisher_rao"),
                *({"Fisher-Rao, model", "Fisher-Rao, data"}, {"pac_bayes", "relative_flatness"}),
            ),
            (RuntimeError, "landscape", "eigenvector", {"first eigenvector"}, set()),
            (TypeError, "published", "sam_paper", {"sam_paper", "empirical_sam"}, {"pyhessian_batch: lambda_1"}),
            (MemoryError, "density,model", "density", {"Spectral density"}, {"loss", "error_rate"}),
        ],
    )
    def test_a_failure_is_a_reason(self, kind, what, measure, missing, kept, problem, monkeypatch):
        def broken(*_, **__):
            raise kind("broken,\nindeed")

        broken.__name__ = measure
        monkeypatch.setattr(MODULE, measure, broken)
        found = report(problem, what, settings=SMALL)
        assert set(found.missing) == missing and kept <= set(found.quantities)
        reasons = [why for what, why in found.missing.items() if what != "empirical_sam"]
        assert all(why.startswith(f"{kind.__name__}: broken, indeed (test_report.py, line ") for why in reasons)
        assert ("smaller batches" in reasons[0]) == (kind is MemoryError)

    def test_eigenvalues_that_fail_are_tried_once(self, problem, monkeypatch):
        tried = []

        def broken(*_, **__):
            tried.append(1)
            raise torch.OutOfMemoryError("no room")

        monkeypatch.setattr("flatmin.measure.session.spectrum", broken)
        found = report(problem, "report", settings=SMALL)
        assert len(tried) == 1
        assert set(found.missing) == {"Curvature", "Trace", "Spectral density", "first eigenvector"}
        assert {why.partition(" (")[0] for why in found.missing.values()} == {"OutOfMemoryError: no room"}
        assert {"loss", "worst_case", "average_case"} <= set(found.quantities)
        assert set(found.sections[-1].results) == {"along_random", "plane"}

    def test_a_model_that_fails_at_other_weights(self):
        """The first step of the ascent is kept where a later one fails."""
        model, x, y, loss = make("mlp")
        calls = []

        class Fragile(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = model

            def forward(self, x):
                calls.append(1)
                if len(calls) == 4:
                    raise IndexError("out of range")
                return self.inner(x)

        problem = Problem(Fragile(), loss, (x, y))
        calls.clear()
        found = section(problem, "sharpness")
        want = section(problem_of(), "sharpness", SMALL)
        assert set(found.missing) == {"worst case"}
        assert found.missing["worst case"].startswith("IndexError: out of range (test_report.py, line ")
        assert "worst_case" not in [q.name for q in found.quantities]
        first = {q.name: q.value for q in want.quantities}["sam_gap"]
        assert {q.name: q.value for q in found.quantities}["sam_gap"] == pytest.approx(first, rel=1e-9)
        assert len(found.quantities) == len(want.quantities) - 1

    def test_a_radius_at_which_the_net_overflows(self):
        relu = problem_of("relu", dtype=torch.float32)
        found = section(relu, "sharpness", replace(SMALL, rho=1e30))
        assert "use a smaller rho" in found.missing["worst case"] and "adaptive" in [q.name for q in found.quantities]

    def test_a_number_that_is_not_finite_says_so(self, problem, monkeypatch):
        monkeypatch.setattr(MODULE, "error_rate", lambda problem: math.nan)
        found = {q.name: q.note for q in section(problem, "model").quantities}
        assert found == {"loss": "", "error_rate": "the value is nan", "gradient_norm": "", "weight_norm": ""}

    def test_what_is_interrupted_is_told_as_far_as_it_came(self, problem, monkeypatch):
        def stop(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(MODULE, "average_case", stop)
        comparison = []
        with pytest.raises(KeyboardInterrupt):
            report(problem, "model,sharpness,flatness", settings=SMALL, on_section=comparison.append)
        assert len(comparison) == 2 and [s.name for s in comparison[0].sections] == ["model", "sharpness", "flatness"]
        assert {"loss", "sam_gap", "worst_case", "adaptive"} <= set(comparison[1].quantities)
        assert comparison[0].missing == {"Sharpness": "it was not reached.", "Flatness": "it was not reached."}
        assert comparison[1].missing["Sharpness"] == "it was interrupted (KeyboardInterrupt)."
        json.dumps(comparison[1].to_dict(), allow_nan=False)

    def test_what_the_caller_raises_is_no_failure_of_a_measure(self, problem):
        def stop(what, share):
            if what == "eigenvalues":
                raise LookupError("enough")

        with pytest.raises(LookupError, match="enough"):
            report(problem, "model,hessian", settings=SMALL, progress=stop)


def numbers_in(value):
    """Every list inside plain data."""
    if isinstance(value, dict):
        for v in value.values():
            yield from numbers_in(v)
    elif isinstance(value, list):
        yield value
        for v in value:
            yield from numbers_in(v)


class TestPlain:
    def test_it_is_json_with_the_conventions_of_every_number(self, whole):
        found = json.loads(json.dumps(whole.to_dict(), allow_nan=False))
        assert list(found["sections"]) == OF_PROBLEM
        assert found["conventions"]["loss"] == "CrossEntropyLoss" and found["conventions"]["examples"] == 17
        assert found["settings"]["rhos"] == [0.05, 0.1]
        for s in whole.sections:
            comparison = found["sections"][s.name]
            assert comparison["title"] == s.title and comparison["missing"] == s.missing
            for q in s.quantities:
                assert comparison["quantities"][q.name]["value"] == q.value
                assert comparison["quantities"][q.name]["conventions"] == plain(q.conventions)
        assert found["sections"]["hessian"]["results"]["eigenvalues"]["top"] == whole.result("eigenvalues").top.tolist()
        assert found["sections"]["density"]["results"]["density"]["nodes"]
        assert found["sections"]["landscape"]["results"]["plane"]["loss"] == whole.result("plane").loss.tolist()

    def test_it_holds_no_vector_of_weights(self, problem, whole):
        assert not [v for v in numbers_in(whole.to_dict()) if len(v) >= problem.size]

    def test_the_report_holds_no_basis_and_no_displacement(self, whole):
        ends = whole.result("eigenvalues")
        vectors = [ends.basis, ends.top_vectors, ends.bottom_vectors]
        vectors += [result.displacement for result in whole.result("worst").results]
        # Not a view into a large tensor either.
        assert [v.numel() for v in vectors] == [v.untyped_storage().nbytes() for v in vectors] == [0] * 5

    def test_numbers_that_json_does_not_know(self):
        found = plain({"a": math.nan, "b": (math.inf, 1), 3: torch.tensor([1.0, -math.inf]), "d": torch.tensor(2)})
        assert found == {"a": None, "b": [None, 1], "3": [1.0, None], "d": 2}
        assert plain(torch.zeros(100_001)) is None and plain(torch.float32) == "torch.float32"


class TestKept:
    @pytest.fixture
    def evaluations(self, monkeypatch):
        calls, evaluate = [], RECORD.evaluate
        monkeypatch.setattr(RECORD, "evaluate", lambda *a, **k: calls.append(1) or evaluate(*a, **k))
        return calls

    def test_a_second_report_evaluates_nothing_again(self, problem, tmp_path, evaluations):
        first = report(problem, "landscape", settings=SMALL, folder=tmp_path / "new")
        assert sorted(p.name for p in tmp_path.glob("new/*")) == ["along_random.pt", "along_v1.pt", "plane.pt"]
        assert len(evaluations) == 5 + 5 + 9 + 3  # and the model itself once a landscape, to know it again
        evaluations.clear()
        again = report(problem, "landscape", settings=SMALL, folder=tmp_path / "new")
        assert len(evaluations) == 3
        for name in ("along_v1", "along_random", "plane"):
            assert torch.equal(first.result(name).loss, again.result(name).loss)

    def test_it_goes_on_where_it_was_stopped(self, problem, tmp_path, evaluations):
        def stop(what, share):
            if what == "plane" and share > 0.4:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            report(problem, "landscape", settings=SMALL, folder=tmp_path, progress=stop)
        evaluations.clear()
        found = report(problem, "landscape", settings=SMALL, folder=tmp_path)
        assert len(evaluations) == 5 + 3, "four of nine points were done"
        assert found.result("plane").complete

    def test_nothing_is_written_without_a_folder(self, problem, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        report(problem, "landscape", settings=SMALL)
        assert not list(tmp_path.iterdir())


class TestSettings:
    def test_bad_numbers_are_refused(self):
        for bad, sentence in [
            ({"tol": 0.0}, "tol must be above 0, got 0.0."),
            ({"trace_tol": math.nan}, "trace_tol must be above 0, got nan."),
            ({"rho": -0.1}, "rho must be above 0, got -0.1."),
            ({"span": math.inf}, "span must be above 0, got inf."),
            ({"top": 0}, "top must be at least 1, got 0."),
            ({"bottom": -1}, "bottom must be at least 0, got -1."),
            ({"draws": 1}, "draws must be at least 2, got 1."),
            ({"m": -1}, "m must be at least 0, got -1."),
            ({"seed": -1}, "seed must be at least 0, got -1."),
            ({"points": 4}, "points must be odd and at least 3, so that the model itself is one of the points, got 4."),
            ({"points": 0}, "points must be odd and at least 3, so that the model itself is one of the points, got 0."),
            ({"plane": 2}, "plane must be odd and at least 3, so that the model itself is one of the points, got 2."),
            ({"plane": -1}, "plane must be odd and at least 3, so that the model itself is one of the points, got -1."),
            ({"rhos": ()}, "rhos must be finite, ascending and above 0, got ()."),
            ({"rhos": (0.0, 0.1)}, "rhos must be finite, ascending and above 0, got (0.0, 0.1)."),
            ({"rhos": (0.1, 0.1)}, "rhos must be finite, ascending and above 0, got (0.1, 0.1)."),
        ]:
            with pytest.raises(ValueError) as error:
                ReportSettings(**bad)
            assert str(error.value) == sentence

    @pytest.mark.parametrize("rhos", [(0.1, math.nan), (math.nan,), (0.1, math.inf)])
    def test_radii_are_finite(self, rhos):
        with pytest.raises(ValueError, match="rhos must"):
            ReportSettings(rhos=rhos)

    def test_one_probe_has_no_error(self):
        """The trace refuses it, after the eigenvalues have been found."""
        with pytest.raises(ValueError, match="probes must be at least 2, got 1"):
            ReportSettings(probes=1)


def same_function(one, other):
    """Values, gradients and conventions of two problems, here and elsewhere."""
    assert one.conventions == other.conventions and one.names == other.names and one.size == other.size
    shift = torch.randn(one.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for weights in (None, shift):
        at = [p.weights if weights is None else p.moved(weights) for p in (one, other)]
        (a, ga), (b, gb) = (p.gradient(w) for p, w in zip((one, other), at, strict=True))
        assert a == b and torch.equal(ga, gb)
        assert one.value(at[0]) == other.value(at[1])


class TestUnder:
    @pytest.mark.parametrize("name", ["mlp", "sum", "class weights"])
    def test_it_is_the_problem_built_anew(self, name):
        model, x, y, loss = make(name)
        kept = Problem(model, loss, batches(x, y, 7), weight_decay=0.1, split="val")
        before = kept.conventions
        other = LogitNormalised(loss)
        same_function(under(kept, other), Problem(model, other, batches(x, y, 7), weight_decay=0.1, split="val"))
        assert kept.loss is loss and kept.conventions == before

    @pytest.mark.parametrize(
        "other",
        [
            nn.CrossEntropyLoss(reduction="sum"),
            nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)),
            nn.CrossEntropyLoss(ignore_index=0),
        ],
    )
    def test_a_loss_with_other_terms_is_refused(self, other, problem):
        with pytest.raises(
            ValueError, match="CrossEntropyLoss has other terms than CrossEntropyLoss; make a separate Problem"
        ):
            under(problem, other)


class TiedWithBias(Tied):
    """Of its three tensors two are one."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.linspace(-1, 1, 6))

    def forward(self, i):
        return super().forward(i) + self.bias


class TestRestricted:
    @pytest.mark.parametrize(
        ("name", "params"), [("mlp", "0.weight"), ("mlp", "*"), ("sum", ["2.*"]), ("relu", "0.*,2.bias")]
    )
    def test_it_is_the_problem_built_anew(self, name, params):
        model, x, y, loss = make(name)
        kept = Problem(model, loss, batches(x, y, 7), weight_decay=0.1, split="val")
        small = restricted(kept, params)
        same_function(small, Problem(model, loss, batches(x, y, 7), params=params, weight_decay=0.1, split="val"))
        assert kept.names == [n for n, _ in model.named_parameters()] and kept.size == 57
        assert list(kept.gradient()[1].shape) == [57], "the problem itself stays as it was"

    @pytest.mark.parametrize("params", ["embed.weight", "bias"])
    def test_tied_weights_move_together(self, params):
        torch.manual_seed(0)
        model, (_, x, y, loss) = TiedWithBias().double(), make("tied")
        small = restricted(Problem(model, loss, batches(x, y, 7)), params)
        fn, flat, _ = function_of(model, x, y, loss, [params])
        torch.testing.assert_close(small.gradient()[1], torch.func.grad(fn)(flat), rtol=0, atol=1e-12)
        shift = 0.1 * torch.arange(small.size, dtype=torch.float64)
        assert small.value(small.moved(shift)) == pytest.approx(float(fn(flat + shift)), rel=1e-12)

    def test_what_was_frozen_or_left_out_stays_so(self):
        model, x, y, loss = make("mlp")
        model[0].bias.requires_grad_(False)
        few = Problem(model, loss, (x, y), params="0.*,2.weight")
        assert restricted(few, "*").names == ["0.weight", "2.weight"]
        # The bias of the last layer was not selected, so that the pattern means its weight alone.
        small, want = restricted(few, "2.*"), Problem(model, loss, (x, y), params="2.weight")
        assert small.names == ["2.weight"] and torch.equal(small.gradient()[1], want.gradient()[1])

    def test_all_weights_are_in_the_dtype_of_the_problem(self):
        model, x, y, loss = make("mlp")
        model.float()
        kept = Problem(model, loss, batches(x, y, 7), dtype=torch.float64)
        same_function(
            restricted(kept, "2.*"), Problem(model, loss, batches(x, y, 7), params="2.*", dtype=torch.float64)
        )

    def test_batch_norm_keeps_its_buffers(self):
        model, x, y, loss = make("batchnorm")
        for mode in ("eval", "train"):
            kept = Problem(model, loss, batches(x, y, 7), mode=mode)
            same_function(restricted(kept, "4.*"), Problem(model, loss, batches(x, y, 7), mode=mode, params="4.*"))

    @pytest.mark.parametrize("params", ["3.*", "0.weight,nothing", "2.weight"])
    def test_a_pattern_without_a_weight_is_refused(self, params):
        few = problem_of(params="0.*")
        with pytest.raises(ValueError, match=r"no parameter matches '.*'; the parameters are 0\.weight, 0\.bias"):
            restricted(few, params)
