"""Hessian, Gauss-Newton and Fisher products against dense matrices."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flatmin.measure.curvature import EmpiricalFisher, Fisher, GaussNewton, Hessian, dense
from flatmin.measure.problem import Problem
from tests.covering import pairs
from tests.measure.nets import CASES, batches, dense_hessian, dense_jacobian, function_of, make

SIZES = [17, 7, 1]  # one batch, an uneven last one, single samples


def equal(found, want):
    assert (found - want).abs().max() <= 1e-11 * max(1.0, float(want.abs().max()))


@functools.cache
def known_hessian(name):
    return dense_hessian(*make(name))


@pairs("name, size, memory", list(CASES), SIZES, [None, 0])  # memory: graphs are kept, or made again
def test_the_hessian_is_the_dense_one(name, size, memory):
    model, x, y, loss = make(name)
    operator = Hessian(Problem(model, loss, batches(x, y, size)), memory=memory)
    equal(dense(operator), known_hessian(name))
    assert operator.products == operator.size
    assert operator.kept == (0 if memory == 0 else -(-17 // size))


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("regression", "linear")])
def test_the_forward_form_is_the_same(name):
    """Mean squared error has no forward derivative of its gradient in every release of torch."""
    model, x, y, loss = make(name)
    operator = Hessian(Problem(model, loss, batches(x, y, 7)), form="forward")
    equal(dense(operator), known_hessian(name))


@pytest.mark.parametrize("name", ["mlp", "regression"])
def test_finite_differences_warn_and_serve_smooth_nets(name):
    model, x, y, loss = make(name)
    with pytest.warns(UserWarning, match="wrong on nets with kinks"):
        operator = Hessian(Problem(model, loss, batches(x, y, 7)), form="finite")
    want = dense_hessian(model, x, y, loss)
    assert (dense(operator) - want).abs().max() <= 1e-6 * want.abs().max()


def test_a_backward_that_is_taken_for_a_constant_is_found():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x.square()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(inputs[0])
            ctx.save_for_forward(inputs[0])

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0] * grad

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 3)

        def forward(self, x):
            return Once.apply(self.linear(x))

    _, x, y, loss = make("mlp")
    with pytest.raises(ValueError, match=r"neither derivative .* form='finite' remains") as caught:
        Hessian(Problem(Net().double(), loss, (x, y)))
    assert "reverse: " in str(caught.value) and "forward: " in str(caught.value)


def test_a_budget_for_some_graphs_keeps_some():
    model, x, y, loss = make("mlp")
    problem = Problem(model, loss, batches(x, y, 4))
    whole = Hessian(problem)
    want = dense(whole)
    for memory in (1, 3000, 6000, 10**9):
        some = Hessian(problem, memory=memory)
        equal(dense(some), want)
        if memory in (3000, 6000):
            assert 0 < some.kept < whole.kept
    whole.close()
    equal(dense(whole), want)


@pytest.mark.parametrize(
    ("pattern", "names"), [("0.*", ["0.weight", "0.bias"]), ("*.weight", ["0.weight", "2.weight"])]
)
def test_a_part_of_the_weights(pattern, names):
    model, x, y, loss = make("mlp")
    problem = Problem(model, loss, batches(x, y, 7), params=pattern)
    assert problem.names == names
    equal(dense(Hessian(problem)), dense_hessian(model, x, y, loss, names))


def test_weight_decay_adds_to_the_diagonal():
    model, x, y, loss = make("mlp")
    problem = Problem(model, loss, batches(x, y, 7), weight_decay=0.3)
    want = dense_hessian(model, x, y, loss)
    equal(dense(Hessian(problem)), want + 0.3 * torch.eye(len(want), dtype=torch.float64))


def test_ignored_tokens_do_not_count():
    """An uneven share of ignored tokens in each batch, exactly as over all tokens at once."""
    torch.manual_seed(0)

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(7, 4), nn.Linear(4, 7)

        def forward(self, i):
            return self.out(torch.tanh(self.embed(i))).transpose(1, 2)

    model, i = Tokens().double(), torch.randint(7, (9, 5))
    y = torch.randint(7, (9, 5))
    y[torch.rand(9, 5) < 0.5] = -100
    y[0] = -100
    loss = nn.CrossEntropyLoss()
    problem = Problem(model, loss, batches(i, y, 2))
    assert problem.conventions.terms == int((y != -100).sum())
    equal(dense(Hessian(problem)), dense_hessian(model, i, y, loss))


def in_outputs(outputs, y, loss, i):
    """The Hessian of one sample's term in its outputs."""
    single = nn.CrossEntropyLoss(reduction="sum", label_smoothing=getattr(loss, "label_smoothing", 0.0))
    if isinstance(loss, nn.MSELoss):
        return 2.0 / y.shape[1] * torch.eye(y.shape[1], dtype=torch.float64)
    return torch.autograd.functional.hessian(lambda f: single(f[None], y[i : i + 1]), outputs[i])


@functools.cache
def known_gauss_newton(name):
    model, x, y, loss = make(name)
    jacobian = dense_jacobian(model, x, y, loss)
    outputs = model(x).detach()
    return sum(jacobian[i].T @ in_outputs(outputs, y, loss, i) @ jacobian[i] for i in range(len(y))) / len(y)


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize("name", [n for n in CASES if n != "class weights"])
def test_the_gauss_newton_matrix_is_the_dense_one(name, memory):
    model, x, y, loss = make(name)
    found = dense(GaussNewton(Problem(model, loss, batches(x, y, 7)), memory=memory))
    equal(found, known_gauss_newton(name))
    assert torch.linalg.eigvalsh(found)[0] >= -1e-12


def test_of_a_linear_model_gauss_newton_is_the_hessian():
    model, x, y, loss = make("linear")
    problem = Problem(model, loss, batches(x, y, 7))
    equal(dense(GaussNewton(problem)), dense(Hessian(problem)))


@functools.cache
def per_sample_gradients(name):
    model, x, y, loss = make(name)
    fn = [function_of(model, x[i : i + 1], y[i : i + 1], loss)[:2] for i in range(len(y))]
    return torch.stack([torch.autograd.functional.jacobian(f, w) for f, w in fn])


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize("name", ["mlp", "relu", "groupnorm", "batchnorm", "attention", "lstm", "tied", "sum"])
def test_the_empirical_fisher_is_the_mean_of_outer_products(name, memory):
    model, x, y, loss = make(name)
    g = per_sample_gradients(name)
    found = dense(EmpiricalFisher(Problem(model, loss, batches(x, y, 7)), memory=memory))
    equal(found, g.T @ g / len(y))


def test_the_fisher_is_gauss_newton_in_the_mean_and_not_the_empirical_one():
    model, x, y, loss = make("mlp")
    problem = Problem(model, loss, batches(x, y, 7))
    mean = sum(dense(Fisher(problem, seed=seed, draws=200)) for seed in range(6)) / 6
    want, other = dense(GaussNewton(problem)), dense(EmpiricalFisher(problem))
    assert (mean - want).norm() < 0.05 * want.norm() < (other - want).norm()


def test_draws_are_the_seeds():
    model, x, y, loss = make("mlp")
    problem = Problem(model, loss, batches(x, y, 7))
    first, again, other = (dense(Fisher(problem, seed=s, memory=m)) for s, m in ((0, None), (0, 0), (1, None)))
    equal(first, again)
    assert (first - other).norm() > 1e-3
    assert Fisher(problem, seed=3).conventions.seed == 3


def test_autocast_is_a_rough_look():
    model, x, y, loss = make("mlp")
    exact = dense(Hessian(Problem(model.float(), loss, batches(x, y, 7))))
    rough = dense(Hessian(Problem(model, loss, batches(x, y, 7), autocast=torch.bfloat16)))
    assert 1e-5 < (rough - exact).norm() / exact.norm() < 0.1


def test_float64_for_a_float32_model():
    model, x, y, loss = make("mlp")
    x = x.float()
    want = dense_hessian(model.float().double(), x.double(), y, loss)
    found = dense(Hessian(Problem(model.float(), loss, batches(x, y, 7), dtype=torch.float64)))
    equal(found, want)
    assert model[0].weight.dtype == torch.float32


class TestBadInput:
    def test_forms(self):
        model, x, y, loss = make("mlp")
        with pytest.raises(ValueError, match=r"form must be 'auto', 'reverse'"):
            Hessian(Problem(model, loss, (x, y)), form="backward")

    def test_vectors(self):
        model, x, y, loss = make("mlp")
        with pytest.raises(ValueError, match=r"a vector of shape \(57,\), got \(3,\)"):
            Hessian(Problem(model, loss, (x, y))).matvec(torch.ones(3))

    def test_losses_without_terms(self):
        model, x, y, _ = make("mlp")
        with pytest.raises(ValueError, match="no value per sample"):
            EmpiricalFisher(Problem(model, lambda f, t: F.cross_entropy(f, t), (x, y)))

    @pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(label_smoothing=0.1), nn.MSELoss()])
    def test_losses_without_a_distribution(self, loss):
        model, x, _, _ = make("mlp")
        y = torch.softmax(torch.randn(17, 3, dtype=torch.float64), 1)
        with pytest.raises(ValueError, match=r"Fisher draws labels from a softmax.*GaussNewton serves every loss"):
            Fisher(Problem(model, loss, (x, y)))

    def test_draws(self):
        model, x, y, loss = make("mlp")
        with pytest.raises(ValueError, match="at least one draw"):
            Fisher(Problem(model, loss, (x, y)), draws=0)

    def test_outputs_that_are_not_one_tensor(self):
        class Two(nn.Linear):
            def forward(self, x):
                return super().forward(x), x

        _, x, y, _ = make("mlp")
        problem = Problem(Two(5, 3).double(), lambda f, t: F.cross_entropy(f[0], t), (x, y))
        with pytest.raises(ValueError, match="one tensor, got tuple"):
            GaussNewton(problem).matvec(torch.ones(18, dtype=torch.float64))
