"""The function that is measured: exact over batches, and the model is left as it was, bit for bit."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flatmin.measure.curvature import EmpiricalFisher, Fisher, GaussNewton, Hessian
from flatmin.measure.krylov import spectrum
from flatmin.measure.problem import Problem, count_terms
from flatmin.measure.trace import density, diagonal, trace
from tests.measure.left import left_as_it_was
from tests.measure.nets import CASES, batches, function_of, make


@pytest.mark.parametrize("size", [17, 7, 5, 1])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_all_data_at_once(name, size):
    model, x, y, loss = make(name)
    problem = Problem(model, loss, batches(x, y, size))
    fn, flat, _ = function_of(model, x, y, loss)
    want = torch.func.grad(fn)(flat) if name not in ("attention", "lstm") else None
    value, gradient = problem.gradient()
    assert value == pytest.approx(float(fn(flat)), rel=1e-12)
    assert problem.value() == pytest.approx(float(fn(flat)), rel=1e-12)
    if want is not None:
        torch.testing.assert_close(gradient, want, rtol=0, atol=1e-12)


def test_values_elsewhere_and_weight_decay():
    model, x, y, loss = make("mlp")
    problem = Problem(model, loss, batches(x, y, 7), weight_decay=0.2)
    fn, flat, _ = function_of(model, x, y, loss)
    shift = torch.randn(problem.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = float(fn(flat + shift) + 0.1 * (flat + shift).square().sum())
    assert problem.value(problem.moved(shift)) == pytest.approx(want, rel=1e-12)
    value, gradient = problem.gradient(problem.moved(shift))
    assert value == pytest.approx(want, rel=1e-12)
    torch.testing.assert_close(gradient, torch.func.grad(fn)(flat + shift) + 0.2 * (flat + shift), rtol=0, atol=1e-12)


MEASURES = {
    "value": lambda p: p.value(),
    "gradient": lambda p: p.gradient(),
    "spectrum": lambda p: spectrum(Hessian(p), top=2),
    "recomputed": lambda p: spectrum(Hessian(p, memory=0), top=2),
    "forward": lambda p: spectrum(Hessian(p, form="forward")),
    "gauss-newton": lambda p: spectrum(GaussNewton(p)),
    "empirical fisher": lambda p: spectrum(EmpiricalFisher(p)),
    "fisher": lambda p: spectrum(Fisher(p)),
    "trace": lambda p: trace(Hessian(p), max_probes=3),
    "diagonal": lambda p: diagonal(Hessian(p), probes=2),
    "density": lambda p: density(Hessian(p), runs=1, steps=3),
}


@pytest.mark.parametrize("fail", [-1, 0, 3, 7])
@pytest.mark.parametrize("measure", MEASURES)
def test_the_model_is_left_bit_for_bit(measure, fail):
    left_as_it_was(MEASURES[measure], fail)


def test_batch_statistics_in_train_mode():
    model, x, y, loss = make("batchnorm")
    in_eval, in_train = (Problem(model, loss, (x, y), mode=mode).value() for mode in ("eval", "train"))
    model.train()
    assert in_train == pytest.approx(float(loss(model(x), y).detach()), rel=1e-12)
    assert abs(in_eval - in_train) > 1e-3


def test_tuples_and_mappings_are_passed_on():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 3)

        def forward(self, x, scale):
            return self.linear(x) * scale

    _, x, y, loss = make("mlp")
    model = Two().double()
    first = Problem(model, loss, [((x, torch.tensor(2.0)), y)]).value()
    second = Problem(model, loss, [({"x": x, "scale": torch.tensor(2.0)}, y)]).value()
    assert first == second == pytest.approx(float(loss(model(x, 2.0), y).detach()), rel=1e-12)


def test_the_record_says_what_was_measured():
    model, x, y, loss = make("mlp")
    record = Problem(
        model, loss, batches(x, y, 7), params="0.*, 2.bias", weight_decay=0.1, split="train", augmentation="flip"
    ).conventions
    assert (record.loss, record.reduction, record.weight_decay) == ("CrossEntropyLoss", "mean", 0.1)
    assert (record.examples, record.terms, record.batch, record.size) == (17, 17.0, 7, 39)
    assert (record.mode, record.params, record.dtype) == ("eval", "0.*, 2.bias", "float64")
    assert (record.split, record.augmentation, record.seed) == ("train", "flip", None)


def test_terms_of_losses():
    y = torch.tensor([0, 1, -100, 2])
    assert count_terms(nn.CrossEntropyLoss(), y) == 3.0
    assert count_terms(nn.CrossEntropyLoss(ignore_index=1), torch.tensor([0, 1, 2])) == 2.0
    assert count_terms(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])), y) == 6.0
    assert count_terms(nn.MSELoss(), torch.zeros(4, 2)) == 8.0


class TestBadInput:
    def problem(self, **changes):
        model, x, y, loss = make("mlp")
        given = {"model": model, "loss": loss, "data": (x, y), **changes}
        return Problem(given.pop("model"), given.pop("loss"), given.pop("data"), **given)

    @pytest.mark.parametrize("data", [[], [(torch.zeros(0, 5, dtype=torch.float64), torch.zeros(0, dtype=torch.long))]])
    def test_no_data(self, data):
        with pytest.raises(ValueError, match="the data hold no example"):
            self.problem(data=data)

    def test_only_ignored_terms(self):
        _, x, _, _ = make("mlp")
        with pytest.raises(ValueError, match="every term of the loss is ignored"):
            self.problem(data=(x, torch.full((17,), -100)))

    def test_data_that_are_no_pairs(self):
        with pytest.raises(ValueError, match=r"pairs \(inputs, targets\), got Tensor"):
            self.problem(data=[torch.zeros(3)])

    def test_a_frozen_model(self):
        model = make("mlp")[0].requires_grad_(False)
        with pytest.raises(ValueError, match="no parameter that requires a gradient"):
            self.problem(model=model)

    def test_a_pattern_that_matches_nothing(self):
        with pytest.raises(ValueError, match=r"no parameter matches 'head\.\*'; there are 0\.weight, 0\.bias"):
            self.problem(params="0.*, head.*")

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_a_loss_that_is_not_finite(self, bad):
        with pytest.raises(ValueError, match=r"the loss of the first batch is (nan|inf)"):
            self.problem(loss=lambda f, y: F.cross_entropy(f, y) + bad)

    def test_a_loss_without_a_graph(self):
        with pytest.raises(ValueError, match="does not depend on the selected weights"):
            self.problem(loss=lambda f, y: F.cross_entropy(f.detach(), y))

    def test_a_loss_that_is_no_scalar(self):
        with pytest.raises(ValueError, match=r"must be a scalar over a batch, got \(17,\)"):
            self.problem(loss=lambda f, y: F.cross_entropy(f, y, reduction="none"))
        with pytest.raises(ValueError, match="must be a mean or a sum, got reduction='none'"):
            self.problem(loss=nn.CrossEntropyLoss(reduction="none"))

    def test_dropout(self):
        model = nn.Sequential(make("mlp")[0], nn.Dropout(0.5))
        with pytest.raises(ValueError, match="mode='train' with dropout in '1' measures a random function"):
            self.problem(model=model, mode="train")
        self.problem(model=model)

    def test_a_random_loss(self):
        with pytest.raises(ValueError, match="two evaluations of the same batch differ"):
            self.problem(loss=lambda f, y: F.cross_entropy(f * torch.rand(()), y))

    @pytest.mark.parametrize(
        ("changes", "sentence"), [({"mode": "test"}, "mode must be"), ({"weight_decay": -1}, "weight_decay")]
    )
    def test_options(self, changes, sentence):
        with pytest.raises(ValueError, match=sentence):
            self.problem(**changes)

    def test_vectors(self):
        with pytest.raises(ValueError, match=r"a vector of shape \(57,\), got \(5,\)"):
            self.problem().moved(torch.zeros(5))
