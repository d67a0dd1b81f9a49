"""Hessian, Gauss-Newton and Fisher products against dense matrices."""

import functools
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatmin.measure.curvature import EmpiricalFisher, Fisher, GaussNewton, Hessian, dense
from flatmin.measure.problem import Problem
from tests.helpers import same_bits
from tests.measure.nets import CASES, batches, dense_hessian, dense_jacobian, function_of, make


def equal(found, want):
    assert (found - want).abs().max() <= 1e-11 * max(1.0, float(want.abs().max()))


@functools.cache
def known_hessian(name):
    return dense_hessian(*make(name))


@pytest.mark.parametrize(
    ("name", "size", "memory"),  # one batch, an uneven last one, single samples; graphs are kept, or made again
    [
        *((name, 7, None if k % 2 else 0) for k, name in enumerate(CASES)),
        *(("mlp", 17, 0), ("class weights", 17, None), ("attention", 17, None)),
        *(("relu", 1, 0), ("sum", 1, 0), ("tied", 1, None), ("class weights", 1, None)),
    ],
)
def test_the_hessian_is_the_dense_one(name, size, memory):
    model, x, y, loss = make(name)
    operator = Hessian(Problem(model, loss, batches(x, y, size)), memory=memory)
    equal(dense(operator), known_hessian(name))
    assert operator.products == operator.size
    assert operator.stored_graphs == (0 if memory == 0 else -(-17 // size))


@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        "tied",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("groupnorm", "attention", "sum", "class weights")),
    ],
)
def test_the_forward_form_is_the_same(name):
    """Mean squared error has no forward derivative of its gradient in every release of torch."""
    model, x, y, loss = make(name)
    operator = Hessian(Problem(model, loss, batches(x, y, 7)), form="forward")
    equal(dense(operator), known_hessian(name))


def test_attention_whatever_the_kernels_of_the_caller():
    model, x, y, loss = make("attention")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        equal(dense(Hessian(Problem(model, loss, (x, y)))), known_hessian("attention"))


@pytest.mark.parametrize(("form", "memory"), [("reverse", None), ("reverse", 0), ("forward", None)])
def test_batchnorm_by_the_batch(form, memory):
    """Each batch by its own statistics, no buffer changed, and not eval mode in disguise."""
    model, x, y, loss = make("batchnorm")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = dense(Hessian(Problem(model, loss, batches(x, y, 7), mode="train"), form=form, memory=memory))
    assert same_bits(dict(model.state_dict()), before) and not model.training
    model.train()
    want = sum(len(t) / 17 * dense_hessian(model, i, t, loss) for i, t in batches(x, y, 7))
    equal(found, want)
    assert (known_hessian("batchnorm") - want).norm() > 0.1 * want.norm()


@pytest.mark.parametrize("name", ["mlp", "regression"])
def test_finite_differences_warn_and_serve_smooth_nets(name):
    model, x, y, loss = make(name)
    with pytest.warns(UserWarning, match="wrong by tens of percent on networks with kinks"):
        operator = Hessian(Problem(model, loss, batches(x, y, 7)), form="finite")
    want = dense_hessian(model, x, y, loss)
    assert (dense(operator) - want).abs().max() <= 1e-6 * want.abs().max()


class Own(torch.autograd.Function):
    """tanh with a backward that is right, and differentiable."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 - ctx.saved_tensors[0].tanh() ** 2)


class Once(Own):
    backward = staticmethod(torch.autograd.function.once_differentiable(Own.backward))


class Constant(Own):
    @staticmethod
    def backward(ctx, grad):
        return grad * (1 - ctx.saved_tensors[0].detach().tanh() ** 2)


class Through(Own):
    """Rounds, and lets the gradient through."""

    @staticmethod
    def forward(ctx, x):
        return (8 * x).round() / 8

    @staticmethod
    def backward(ctx, grad):
        return grad


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Quantised(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight + ((16 * self.weight).round() / 16 - self.weight).detach(), self.bias)


def _normed(width, weight_norm=nn.utils.parametrizations.weight_norm):
    return nn.Sequential(weight_norm(nn.Linear(12, width)), nn.ReLU(), nn.Linear(width, width), nn.ReLU())


def _custom(function, width):
    return nn.Sequential(nn.Linear(12, width), Apply(function), nn.Linear(width, width), nn.ReLU())


# name -> (net of a width, where the fault is)
WRONG = {
    # torch.autograd.gradgradcheck fails on torch._weight_norm.
    "weight_norm": (_normed, r"check '0\.parametrizations\.weight\.0' \(weight_norm\)"),
    "once differentiable": (lambda w: _custom(Once.apply, w), r"check '1' \(Once\)"),
    "detached": (lambda w: _custom(Constant.apply, w), r"check '1' \(Constant\)"),
    "straight through": (lambda w: _custom(Through.apply, w), r"check '1' \(Through\)"),
    "quantised": (lambda w: nn.Sequential(Quantised(12, w), nn.Tanh()), "a part of the network or loss is detached"),
}


@pytest.mark.parametrize(("width", "dtype"), [(8, torch.float64), (256, torch.float32)])
@pytest.mark.parametrize("name", WRONG)
def test_a_derivative_that_is_wrong_is_found_whatever_the_size(name, width, dtype):
    net, where = WRONG[name]
    torch.manual_seed(0)
    model = nn.Sequential(*net(width), nn.Linear(width, 4)).to(dtype)
    x, y = torch.randn(16, 12).to(dtype), torch.randint(4, (16,))
    with pytest.raises(ValueError, match=rf"second derivatives .* are wrong .*{where}.* form='finite'"):
        Hessian(Problem(model, nn.CrossEntropyLoss(), (x, y)))
    assert Hessian(Problem(model, nn.CrossEntropyLoss(), (x, y)), form="reverse").form == "reverse"


def test_what_is_detached_in_the_loss_or_the_model_is_found():
    def focal(f, y):
        ce = F.cross_entropy(f, y, reduction="none")
        return ((1 - torch.exp(-ce)).detach() * ce).mean()

    model, x, y, loss = make("mlp")
    with pytest.raises(ValueError, match="the second derivatives of this network are wrong"):
        Hessian(Problem(model, focal, (x, y)))
    cut = nn.Sequential(model[0], Apply(torch.Tensor.detach), model[2])
    with pytest.raises(ValueError, match="the second derivatives of this network are wrong"):
        Hessian(Problem(cut, loss, (x, y)))
    assert Hessian(Problem(cut, loss, (x, y), params="2.*")).form == "reverse"


def test_a_branch_that_only_later_examples_take_is_tried_too():
    class Branch(nn.Linear):
        def forward(self, x):
            f = super().forward(x)
            return torch.where(x[:, :1] > 5, f.detach(), f)

    torch.manual_seed(0)
    x, y = torch.randn(40, 6).double(), torch.randint(3, (40,))
    x[20:, 0] += 10
    for kind in (Hessian, GaussNewton):
        with pytest.raises(ValueError, match=r"(is|are) wrong or unavailable"):
            kind(Problem(Branch(6, 3).double(), nn.CrossEntropyLoss(), batches(x, y, 17)))


@pytest.mark.parametrize("tied", [False, True])
def test_the_padding_row_of_an_embedding_is_a_constant(tied):
    """Against the dense Hessian in the other weights; with a tied head the row is constant in the look-up alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3, padding_idx=-5), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
    if tied:
        model.append(nn.Linear(3, 5, bias=False).double())
        model[4].weight = model[0].weight
    nn.init.normal_(model[0].weight)
    x, y = torch.randint(1, 5, (9, 4)), torch.randint(3, (9,))
    x[:, 2:] = 0
    problem = Problem(model, nn.CrossEntropyLoss(), batches(x, y, 7))
    own = dict(model.named_parameters())

    def value(flat):
        state = dict(zip(own, problem.shaped(flat), strict=True))
        table = torch.cat([own["0.weight"][:1].detach(), state["0.weight"][1:]])
        f = torch.tanh(table[x]).flatten(1) @ state["3.weight"].T + state["3.bias"]
        return F.cross_entropy(f @ state["0.weight"].T if tied else f, y)

    want = torch.func.hessian(value)(problem.flat(problem.weights))
    torch.testing.assert_close(dense(Hessian(problem)), want, rtol=0, atol=1e-11)
    GaussNewton(problem)
    if not tied:
        torch.testing.assert_close(dense(Hessian(problem, form="forward")), want, rtol=0, atol=1e-11)
        with pytest.warns(UserWarning, match="finite differences"):
            torch.testing.assert_close(dense(Hessian(problem, form="finite")), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [GaussNewton, EmpiricalFisher, Fisher])
def test_a_jacobian_that_is_wrong_is_found(kind):
    for function, wrong in ((Once.apply, True), (Through.apply, True), (Own.apply, False)):
        torch.manual_seed(0)
        model = nn.Sequential(*_custom(function, 64), nn.Linear(64, 4)).double()
        problem = Problem(model, nn.CrossEntropyLoss(), (torch.randn(16, 12).double(), torch.randint(4, (16,))))
        if wrong:
            with pytest.raises(
                ValueError, match=r"the derivative of this network's outputs is wrong or unavailable; check '1'"
            ):
                kind(problem)
        else:
            kind(problem)


KINKED = {
    "wide": (lambda: nn.Sequential(nn.Linear(36, 400), nn.ReLU(), nn.Linear(400, 4)), (36,)),
    "deep": (lambda: nn.Sequential(*(m for _ in range(8) for m in (nn.Linear(36, 36), nn.LeakyReLU()))), (36,)),
    # Zero biases and black borders: preactivations are zero, on the kink itself.
    "borders": (
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(8, 4)),
        ),
        (1, 6, 6),
    ),
    "zero head": (lambda: nn.Sequential(nn.Linear(36, 36), nn.ReLU(), nn.Linear(36, 4)), (36,)),
    "saturated": (lambda: nn.Sequential(nn.Linear(36, 36), nn.ReLU6(), nn.Linear(36, 4)), (36,)),
}


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), lambda f, y: (f - y[:, None].to(f)).abs().mean()])
@pytest.mark.parametrize("name", KINKED)
def test_kinks_are_not_taken_for_wrong_derivatives(name, loss):
    build, shape = KINKED[name]
    for seed, dtype in itertools.product(range(2), (torch.float64, torch.float32, torch.bfloat16)):
        torch.manual_seed(seed)
        model = build()
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.mul_(0.0 if "bias" in n or (name == "zero head" and n.startswith("2")) else 1.0)
                p.mul_(30.0 if name == "saturated" else 1.0)
        x, y = torch.randn(12, *shape), torch.randint(4, (12,))
        if name == "borders":
            x[..., :2] = 0.0
        assert Hessian(Problem(model.to(dtype), loss, (x.to(dtype), y))).form == "reverse"


def test_a_budget_for_some_graphs_keeps_some():
    model, x, y, loss = make("mlp")
    problem = Problem(model, loss, batches(x, y, 4))
    whole = Hessian(problem)
    want = dense(whole)
    for memory in (1, 3000, 6000, 10**9):
        some = Hessian(problem, memory=memory)
        equal(dense(some), want)
        if memory in (3000, 6000):
            assert 0 < some.stored_graphs < whole.stored_graphs
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


@pytest.mark.parametrize("name", [n for n in CASES if n != "class weights"])
def test_the_gauss_newton_matrix_is_the_dense_one(name):
    model, x, y, loss = make(name)
    memory = 0 if name in ("relu", "attention", "tied", "sum") else None
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


@pytest.mark.parametrize("name", ["mlp", "relu", "groupnorm", "batchnorm", "attention", "lstm", "tied", "sum"])
def test_the_empirical_fisher_is_the_mean_of_outer_products(name):
    model, x, y, loss = make(name)
    memory = 0 if name in ("relu", "attention", "tied", "sum") else None
    g = per_sample_gradients(name)
    found = dense(EmpiricalFisher(Problem(model, loss, batches(x, y, 7)), memory=memory))
    equal(found, g.T @ g / len(y))


def test_the_fisher_is_gauss_newton_in_the_mean_and_not_the_empirical_one():
    model, x, y, loss = make("mlp")
    problem = Problem(model, loss, batches(x, y, 7))
    mean = sum(dense(Fisher(problem, seed=seed, draws=100)) for seed in range(2)) / 2
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


def test_values_of_a_function_are_counted():
    """One for each token, or for each sequence: the mean of the outer products of their gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5)).double()
    ids = torch.randint(5, (11, 4))

    def tokens(f, y):
        return F.cross_entropy(f.flatten(0, 1), y.flatten(), reduction="none")

    problem = Problem(model, lambda f, y: tokens(f, y).mean(), batches(ids, ids, 4))
    for f in (tokens, lambda f, y: tokens(f, y).view(len(y), -1).sum(1)):
        values = f(model(ids), ids)
        rows = [torch.autograd.grad(v, list(model.parameters()), retain_graph=True) for v in values]
        g = torch.stack([torch.cat([t.reshape(-1) for t in row]) for row in rows])
        equal(dense(EmpiricalFisher(problem, per_sample=f)), g.T @ g / len(values))


def test_terms_of_soft_targets_and_ignored_labels():
    model, x, y, _ = make("mlp")
    soft = torch.softmax(torch.randn(17, 3, generator=torch.Generator().manual_seed(0)), 1).double()
    y = torch.where(torch.arange(17) % 3 == 0, -100, y)
    for targets in (soft, y):
        loss, kept = nn.CrossEntropyLoss(), [i for i in range(17) if targets is soft or int(targets[i]) >= 0]
        fn = [function_of(model, x[i : i + 1], targets[i : i + 1], loss)[:2] for i in kept]
        g = torch.stack([torch.autograd.functional.jacobian(f, w) for f, w in fn])
        problem = Problem(model, loss, batches(x, targets, 7))
        equal(dense(EmpiricalFisher(problem)), g.T @ g / len(kept))
    many, want = dense(Fisher(problem, draws=300)), dense(GaussNewton(problem))  # of the labels, some of them ignored
    assert (many - want).norm() < 0.15 * want.norm()


class TestBadInput:
    def test_values_that_are_no_terms(self):
        model, x, y, _ = make("mlp")

        class Mean(nn.Module):
            reduction = "mean"

            def forward(self, f, t):
                return F.cross_entropy(f, t)

        class Doubled(Mean):
            def forward(self, f, t):
                return (
                    F.cross_entropy(f, t) if self.reduction == "mean" else 2 * F.cross_entropy(f, t, reduction="none")
                )

        with pytest.raises(ValueError, match=r"reduction=none must return a value for each of the 7 examples .* got 1"):
            EmpiricalFisher(Problem(model, Mean(), batches(x, y, 7)))
        with pytest.raises(ValueError, match=r"the mean of the values .* on a batch, but the loss is .* per_sample="):
            EmpiricalFisher(Problem(model, Doubled(), batches(x, y, 7)))
        with pytest.raises(ValueError, match=r"per_sample= must return a value for each of the 17 examples"):
            EmpiricalFisher(Problem(model, Mean(), (x, y)), per_sample=lambda f, t: F.cross_entropy(f, t))

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
        with pytest.raises(ValueError, match="cannot return one value per sample"):
            EmpiricalFisher(Problem(model, lambda f, t: F.cross_entropy(f, t), (x, y)))

    @pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(label_smoothing=0.1), nn.MSELoss()])
    def test_losses_without_a_distribution(self, loss):
        model, x, _, _ = make("mlp")
        y = torch.softmax(torch.randn(17, 3, dtype=torch.float64), 1)
        with pytest.raises(ValueError, match=r"Fisher draws labels from the softmax.*for other losses use GaussNewton"):
            Fisher(Problem(model, loss, (x, y)))

    def test_draws(self):
        model, x, y, loss = make("mlp")
        with pytest.raises(ValueError, match="draws must be at least 1"):
            Fisher(Problem(model, loss, (x, y)), draws=0)

    def test_outputs_that_are_not_one_tensor(self):
        class Two(nn.Linear):
            def forward(self, x):
                return super().forward(x), x

        _, x, y, _ = make("mlp")
        problem = Problem(Two(5, 3).double(), lambda f, t: F.cross_entropy(f[0], t), (x, y))
        with pytest.raises(ValueError, match="one tensor, got tuple"):
            GaussNewton(problem).matvec(torch.ones(18, dtype=torch.float64))
