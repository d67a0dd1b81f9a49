"""Bad input that reaches every measure, or reaches them late: each stops with a sentence, none returns NaN."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import flatmin.measure as measures
from flatmin.measure import presets
from flatmin.measure.directions import gaussian
from flatmin.measure.problem import Problem, restricted
from tests.measure.nets import batches, make


def problem_of(name="mlp", size=7, **options):
    model, x, y, loss = make(name)
    return Problem(model, loss, batches(x, y, size), **options)


class TestEmptyLoaders:
    @pytest.mark.parametrize("options", [{"batch_size": 4}, {"batch_size": 40, "drop_last": True}])
    def test_loaders(self, options):
        model, x, y, loss = make("mlp")
        x, y = (x, y) if "drop_last" in options else (x[:0], y[:0])
        with pytest.raises(ValueError, match="the data contain no examples, so there is nothing to measure"):
            Problem(model, loss, DataLoader(TensorDataset(x, y), **options))

    def test_a_generator_that_is_used_up(self):
        model, x, y, loss = make("mlp")
        data = iter(batches(x, y, 7))
        assert Problem(model, loss, data).conventions.examples == 17
        with pytest.raises(ValueError, match="the data contain no examples"):
            Problem(model, loss, data)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (
            lambda x, y: [{"inputs": x, "labels": y}],
            r"got dict with keys 'inputs', 'labels'; make it a pair, such as \(ba",
        ),
        (lambda x, y: {"inputs": x, "labels": y}, "got dict with keys 'inputs', 'labels'; make it a pair"),
        (lambda x, y: [x, y], r"got Tensor; pass a single batch as a tuple \(inputs, targets\)"),
    ],
)
def test_data_that_are_no_pairs(data, sentence):
    model, x, y, loss = make("mlp")
    with pytest.raises(ValueError, match=rf"data must yield pairs \(inputs, targets\), {sentence}"):
        Problem(model, loss, data(x, y))


def test_a_model_without_values():
    _, x, y, loss = make("mlp")
    with pytest.raises(ValueError, match="the model's parameters are on the device 'meta' and have no values"):
        Problem(nn.Linear(5, 3, device="meta"), loss, (x, y))


# In a batch that is not the first, which the problem itself looks at.
LATE = {
    "spectrum": lambda p: measures.spectrum(measures.Hessian(p)),
    "gauss-newton": lambda p: measures.spectrum(measures.GaussNewton(p)),
    "empirical fisher": lambda p: measures.spectrum(measures.EmpiricalFisher(p)),
    "fisher": lambda p: measures.spectrum(measures.Fisher(p)),
    "trace": lambda p: measures.trace(measures.Hessian(p)),
    "frobenius": lambda p: measures.frobenius(measures.Hessian(p)),
    "diagonal": lambda p: measures.diagonal(measures.Hessian(p)),
    "density": lambda p: measures.density(measures.Hessian(p), runs=1, steps=3),
    "worst case": lambda p: measures.worst_case(p, 0.1),
    "average case": lambda p: measures.average_case(p, 0.1),
    "m-sharpness": lambda p: measures.m_sharpness(p, 5, 0.1),
    "curve": lambda p: measures.curve(p, [0.1, 0.2]),
    "pac-bayes": lambda p: measures.pac_bayes(p, of="loss"),
    "pac-bayes of the error": lambda p: measures.pac_bayes(p),
    "relative flatness": lambda p: measures.relative_flatness(p, "0.weight"),
    "by probes": lambda p: measures.relative_flatness(p, "0.weight", exact=0),
    "fisher-rao": lambda p: measures.fisher_rao(p),
    "fisher-rao of the data": lambda p: measures.fisher_rao(p, labels="data"),
    "follow": lambda p: measures.Follow(p)(0),
    "bezier": lambda p: measures.bezier(p, p.flat(p.weights), p.flat(p.weights) + 1.0, steps=50, points=3),
    "sam_paper": lambda p: presets.sam_paper(p),
    "empirical_sam": lambda p: presets.empirical_sam(p, batches=3),
    "edge_of_stability": lambda p: presets.edge_of_stability(p, 0.1),
}


def late(bad):
    """A problem whose tenth example has no finite loss since the problem was made."""
    model, x, y, loss = make("mlp")
    problem = Problem(model, loss, batches(x.clone(), y, 7))
    problem.batches[1].inputs[3] = bad
    return problem


class TestLossesThatAreNotFinite:
    @pytest.mark.parametrize("measure", LATE)
    def test_in_a_late_batch(self, measure):
        for bad in (math.nan, math.inf):
            with pytest.raises((ArithmeticError, ValueError), match=r"not finite|Bezier path's loss is"):
                LATE[measure](late(bad))

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_the_batch_is_named(self, bad):
        """Before anything is measured, and by the first product after that."""
        model, x, y, loss = make("mlp")
        x = x.clone()
        x[10] = bad
        with pytest.raises(
            ValueError, match=r"the loss of batch 2 of 3 is (nan|inf); it must be finite to be measured"
        ):
            Problem(model, loss, batches(x, y, 7))
        for operator in (measures.Hessian, measures.GaussNewton, measures.EmpiricalFisher):
            with pytest.raises(ArithmeticError, match=r"not finite.* The loss of batch 2 of 3 is (nan|inf)"):
                measures.trace(operator(late(bad)))

    def test_numbers_that_say_so_themselves(self):
        problem = late(math.nan)
        assert math.isnan(problem.value()) and math.isnan(measures.error_rate(problem))
        assert measures.landscape(problem, gaussian(problem), points=3).loss.isnan().all()
        path = measures.linear(problem, [problem.model, problem.flat(problem.weights) + 1.0], points=3)
        assert math.isnan(path.barrier)


class Idle(nn.Module):
    """Of which one layer has no part in the outputs."""

    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        return self.used(x)


class TestLossesWithoutAGraph:
    def test_of_weights_that_have_no_part_in_it(self):
        _, x, y, loss = make("mlp")
        with pytest.raises(ValueError, match="does not depend on the selected weights"):
            Problem(Idle().double(), loss, (x, y), params="idle.*")
        whole = Problem(Idle().double(), loss, (x, y))
        assert not whole.gradient()[1][18:].any() and not measures.Hessian(whole).matvec(torch.ones(36))[18:].any()

    def test_that_are_constant(self):
        model, x, y, _ = make("mlp")
        with pytest.raises(ValueError, match="does not depend on the selected weights"):
            Problem(model, lambda f, t: torch.ones(()), (x, y))
        with pytest.raises(ValueError, match="the loss of a batch must be a scalar tensor, got float"):
            Problem(model, lambda f, t: 1.0, (x, y))


class Dropping(nn.Module):
    """Dropout that is no module of its own, or is in one of torch's layers."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.out = layer, nn.Linear(4, 3)

    def forward(self, x):
        if isinstance(self.layer, nn.MultiheadAttention):
            x = self.layer(x, x, x, need_weights=False)[0]
        elif self.layer is not None:
            x = self.layer(x)[0]
        else:
            x = F.dropout(x, 0.5, self.training)
        return self.out(x[:, -1])


class TestDropout:
    @pytest.mark.parametrize(
        "layer",
        [
            lambda: None,
            lambda: nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True),
            lambda: nn.LSTM(4, 4, num_layers=2, dropout=0.5, batch_first=True),
        ],
        ids=["function", "attention", "lstm"],
    )
    def test_that_is_active_is_refused(self, layer):
        _, x, y, loss = make("attention")
        model = Dropping(layer()).double()
        with pytest.raises(ValueError, match="two evaluations of the same batch give different losses"):
            Problem(model, loss, (x, y), mode="train")
        assert math.isfinite(Problem(model.train(), loss, (x, y)).value())

    def test_that_never_stops(self):
        _, x, y, loss = make("mlp")
        model = nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5)).double()
        model[1].forward = lambda f: F.dropout(f, 0.5, training=True)
        with pytest.raises(ValueError, match="two evaluations of the same batch give different losses"):
            Problem(model, loss, (x, y))


class TestMoreThanThereIs:
    @pytest.mark.parametrize("options", [{"top": 58}, {"top": 57, "bottom": 1}, {"top": 0, "bottom": 58}])
    def test_eigenvalues(self, options):
        with pytest.raises(ValueError, match="58 eigenvalues were requested, but the operator has size 57"):
            measures.spectrum(measures.Hessian(problem_of()), **options)

    def test_eigenvalues_of_presets(self):
        problem = problem_of()
        with pytest.raises(ValueError, match="58 eigenvalues were requested, but the operator has size 57"):
            presets.pyhessian_batch(problem, top=58)
        with pytest.raises(ValueError, match="58 eigenvalues were requested, but the operator has size 57"):
            presets.empirical_sam(problem, top=58, batches=2)
        with pytest.raises(ValueError, match="5 eigenvalues were requested, but the operator has size 3"):
            presets.sam_paper(problem_of(params="2.bias"))
        assert len(presets.pyhessian_batch(problem, top=57).numbers) == 57

    def test_groups_of_a_preset(self):
        with pytest.raises(ValueError, match=r"128|at least one batch"):
            presets.andriushchenko_m128(problem_of(), 0.1)

    def test_processes(self):
        problem = problem_of()
        problem.group = "world"
        with pytest.raises(ValueError, match="trained in a single process; use a problem without group="):
            measures.bezier(problem, problem.model, problem.flat(problem.weights) + 1.0)


class TestFilters:
    @pytest.mark.parametrize("params", ["head.*", "0.weights", "", "0", ["0.*", "3.*"]])
    def test_that_match_nothing(self, params):
        with pytest.raises(ValueError, match=r"no parameter matches .*; the parameters are 0\.weight, 0\.bias"):
            problem_of(params=params)
        with pytest.raises(ValueError, match=r"no parameter matches .*; the parameters are 0\.weight, 0\.bias"):
            restricted(problem_of(), params)

    def test_of_which_there_is_none(self):
        with pytest.raises(ValueError, match="param"):
            problem_of(params=[])

    def test_of_a_restricted_problem_know_its_weights_alone(self):
        with pytest.raises(ValueError, match=r"no parameter matches '2\.\*'; the parameters are 0\.weight, 0\.bias\."):
            restricted(problem_of(params="0.*"), "2.*")

    def test_that_match_frozen_weights_alone(self):
        model, x, y, loss = make("mlp")
        model[0].requires_grad_(False)
        with pytest.raises(ValueError, match=r"no parameter matches '0\.\*'; the parameters are 2\.weight, 2\.bias\."):
            Problem(model, loss, (x, y), params="0.*")
        assert Problem(model, loss, (x, y)).names == ["2.weight", "2.bias"]
