"""Every public measure leaves model and program as they were, bit for bit, also where the net fails half-way."""

from inspect import isclass

import pytest
import torch
from torch import nn

import flatmin.measure as measures
from flatmin.measure import presets
from flatmin.measure.directions import gaussian, gaussian_pair
from flatmin.measure.problem import Problem
from tests.helpers import same_bits
from tests.measure.left import left_as_it_was
from tests.measure.nets import batches, make


def ends(problem, count=2):
    """The weights of some checkpoints."""
    w = problem.flat(problem.weights)
    g = torch.Generator().manual_seed(0)
    return [w + 0.1 * k * torch.randn(w.shape, generator=g, dtype=torch.float64) for k in range(count)]


def many(problem):
    """The same problem with enough data for groups of 128."""
    pairs = [(b.inputs.repeat(20, 1), b.targets.repeat(20)) for b in problem.batches]
    return Problem(problem.model, problem.loss, pairs)


def spectra(problem, kind, **options):
    return measures.spectrum(kind(problem, **options), top=2, bottom=1)


SHORT = measures.ReportSettings(
    **{"top": 2, "probes": 3, "runs": 1, "steps": 3, "rhos": (0.1, 0.2), "ascent_steps": 2},
    **{"m": 5, "draws": 2, "target": 0.01, "points": 3, "plane": 3},
)
# name in flatmin.measure or its presets -> a use of it
MEASURES = {
    "report": lambda p: measures.report(p, "all", settings=SHORT),
    "restricted": lambda p: measures.restricted(p, "linear.*").gradient(),
    "under": lambda p: measures.under(p, measures.LogitNormalised(p.loss)).gradient(),
    "Problem": lambda p: (p.value(), p.gradient(), p.conventions),
    "Hessian": lambda p: spectra(p, measures.Hessian, form="forward"),
    "GaussNewton": lambda p: spectra(p, measures.GaussNewton),
    "EmpiricalFisher": lambda p: spectra(p, measures.EmpiricalFisher, memory=0),
    "Fisher": lambda p: spectra(p, measures.Fisher, draws=2),
    "spectrum": lambda p: spectra(p, measures.Hessian),
    "trace": lambda p: measures.trace(measures.Hessian(p), max_probes=3),
    "frobenius": lambda p: measures.frobenius(measures.Hessian(p), spectra(p, measures.Hessian), max_probes=3),
    "diagonal": lambda p: measures.diagonal(measures.Hessian(p), probes=2),
    "density": lambda p: measures.density(measures.Hessian(p), runs=1, steps=3),
    "worst_case": lambda p: measures.worst_case(p, 0.1, adaptive=True, steps=3, restarts=1, errors=True),
    "average_case": lambda p: measures.average_case(p, 0.1, draws=2, of="error"),
    "m_sharpness": lambda p: measures.m_sharpness(p, 5, 0.1, steps=2, errors=True),
    "curve": lambda p: measures.curve(p, [0.1, 0.2], steps=2),
    "pac_bayes": lambda p: measures.pac_bayes(p, 0.1, of="loss", draws=2, tol=0.5),
    "relative_flatness": lambda p: measures.relative_flatness(p, "linear.weight"),
    "fisher_rao": lambda p: [measures.fisher_rao(p, labels=labels) for labels in ("model", "data")],
    "error_rate": lambda p: [measures.error_rate(p) for _ in range(3)],
    "LogitNormalised": lambda p: Problem(
        p.model, measures.LogitNormalised(p.loss), [(b.inputs, b.targets) for b in p.batches]
    ).gradient(),
    "Follow": lambda p: [measures.Follow(p)(0, lr=0.1, epsilon=p.weights)],
    "landscape": lambda p: measures.landscape(p, gaussian_pair(p), points=3, accuracy=True, statistics="recomputed"),
    "linear": lambda p: measures.linear(p, ends(p, 3), points=3, accuracy=True, statistics="recomputed"),
    "bezier": lambda p: measures.bezier(p, *ends(p), steps=6, points=3, statistics="recomputed"),
    "pca": lambda p: measures.pca(p, ends(p, 4)).slice(p, points=3),
    "pyhessian_batch": lambda p: presets.pyhessian_batch(p, top=2),
    "sam_paper": lambda p: presets.sam_paper(p),
    "empirical_sam": lambda p: presets.empirical_sam(p, top=2, batches=3),
    "edge_of_stability": lambda p: presets.edge_of_stability(p, 0.1),
    "andriushchenko_m128": lambda p: presets.andriushchenko_m128(many(p), 0.1, examples=128),
}
# The same by other options, which take other ways.
USES = {
    **MEASURES,
    "Hessian, recomputed": lambda p: spectra(p, measures.Hessian, memory=0),
    "worst_case, box": lambda p: measures.worst_case(p, 0.1, norm="linf", adaptive=True, steps=3),
    "landscape, as it is": lambda p: measures.landscape(p, gaussian_pair(p), points=3, accuracy=True),
    "pac_bayes, magnitude": lambda p: measures.pac_bayes(p, 0.1, of="loss", draws=2, tol=0.5, magnitude=True),
    "relative_flatness, probes": lambda p: measures.relative_flatness(p, "linear.weight", exact=0, max_probes=2),
}
# Records, numbers without a model, and what looks at an optimizer (tests/optim/test_rise.py).
APART = {
    "Average",
    "Report",
    "ReportSettings",
    "Conventions",
    "FoundRadius",
    "Sharpness",
    "Spectrum",
    "PublishedNumbers",
    "edge",
    "sam_edge",
    "radius",
}


def test_every_public_name_is_here():
    former = {"Card", "CardSettings", "card"}
    assert [getattr(measures, name) for name in sorted(former)] == [
        measures.Report,
        measures.ReportSettings,
        measures.report,
    ]
    assert set(MEASURES) | APART | former == {*measures.__all__, *presets.__all__}
    assert all(isclass(getattr(measures, name, type)) or name in ("edge", "sam_edge", "radius") for name in APART)


@pytest.mark.parametrize("measure", USES)
def test_the_model_is_left_bit_for_bit(measure):
    """Where no forward pass fails, and where the n-th does, of which making the problem takes the first two."""
    for fail in (-1, 0, 2, 5, 9, 12):
        left_as_it_was(USES[measure], fail)


class Interrupted(nn.CrossEntropyLoss):
    """Interrupted from the keyboard in its third call with a graph, or in the backward pass of that."""

    def __init__(self, where):
        super().__init__()
        self.where, self.calls = where, 0

    def forward(self, outputs, targets):
        def interrupt(*_):
            raise KeyboardInterrupt

        value = super().forward(outputs, targets)
        self.calls += value.requires_grad
        if self.calls == 3 and self.where == "loss":
            interrupt()
        if self.calls == 3:
            value.register_hook(interrupt)
        return value


@pytest.mark.parametrize("measure", ["Problem", "spectrum", "GaussNewton", "worst_case", "m_sharpness", "bezier"])
def test_the_model_is_left_bit_for_bit_where_it_is_interrupted(measure):
    for where in ("loss", "backward"):

        def interrupted(problem, where=where):
            problem.loss = Interrupted(where)
            with pytest.raises(KeyboardInterrupt):
                (problem.gradient if measure == "Problem" else lambda: MEASURES[measure](problem))()

        left_as_it_was(interrupted, -1)


OTHERS = ("restricted", "landscape", "linear", "bezier", "relative_flatness", "andriushchenko_m128")


def test_batchnorm_by_the_batch_leaves_its_buffers():
    for name in MEASURES.keys() - set(OTHERS):
        by_the_batch(MEASURES[name])
    by_the_batch(lambda p: measures.landscape(p, gaussian(p), points=3))
    by_the_batch(lambda p: measures.linear(p, ends(p), points=3))
    by_the_batch(lambda p: measures.bezier(p, *ends(p), steps=2, points=3))


def by_the_batch(measure):
    """Run a measure in train mode on a net in eval mode, whose running statistics a forward pass would move."""
    model, x, y, loss = make("batchnorm")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    measure(Problem(model, loss, batches(x, y, 7), mode="train"))
    assert same_bits(dict(model.state_dict()), before) and not any(m.training for m in model.modules())
