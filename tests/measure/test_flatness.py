"""PAC-Bayes noise, relative flatness and the Fisher-Rao norm against closed forms, dense matrices and theorems."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flatmin.measure.curvature import GaussNewton, dense
from flatmin.measure.flatness import fisher_rao, pac_bayes, relative_flatness
from flatmin.measure.losses import error_rate
from flatmin.measure.problem import Problem
from flatmin.stats import t_quantile
from tests.measure.nets import batches, dense_hessian, function_of, make


class Parabola(nn.Module):
    """L(w) = sum_i a_i (w_i - at_i)^2 / 2 at w = at."""

    def __init__(self, a, at):
        super().__init__()
        self.w = nn.Parameter(at.clone())
        self.register_buffer("a", a)
        self.register_buffer("at", at.clone())

    def forward(self, x):
        return 0.5 * (self.a * (self.w - self.at).square()).sum() + x.sum()


def of_module(model, dtype=torch.float64):
    x = torch.zeros(1, dtype=dtype)
    return Problem(model, lambda value, _: value, (x, x))


def parabola(a, at=None):
    a = torch.as_tensor(a, dtype=torch.float64)
    return of_module(Parabola(a, torch.zeros_like(a) if at is None else torch.as_tensor(at, dtype=torch.float64)))


def classifier(name="mlp", **changes):
    """A net that gets all of its data right."""
    model, x, _, loss = make(name)
    return Problem(model, loss, batches(x, model(x).argmax(1), 7), **changes)


def deep(scales=(1.0, 1.0, 1.0), labels=None):
    """A ReLU net of three matrices without biases, its layers scaled."""
    torch.manual_seed(0)
    widths = (5, 6, 4, 3)
    layers = [nn.Linear(a, b, bias=False) for a, b in pairwise(widths)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]).double()
    with torch.no_grad():
        for layer, scale in zip(layers, scales, strict=True):
            layer.weight *= scale
    _, x, y, loss = make("mlp")
    return model, x, y, Problem(model, loss, batches(x, y, 7))


class TestPacBayes:
    A = torch.logspace(-1, 1, 20).double()

    @pytest.mark.slow
    def test_the_interval_covers_the_closed_form(self):
        """sigma = sqrt(2 t / sum a), as a standard deviation; of 40 seeds at 95 %, 34 or more in 99 % of the cases."""
        problem, want = parabola(self.A), math.sqrt(2 * 0.1 / float(self.A.sum()))
        reach = t_quantile(0.975, 5)
        found = [pac_bayes(problem, 0.1, of="loss", draws=6, tol=2e-3, seed=seed) for seed in range(40)]
        covered = sum(abs(f.sigma - want) <= reach * f.sigma_error for f in found)
        assert 34 <= covered < 40
        assert sum(f.sigma for f in found) / 40 == pytest.approx(want, rel=0.02)
        assert found[0].flatness == found[0].sigma ** -2

    def test_the_bracket_holds_the_crossing(self):
        found = pac_bayes(parabola(self.A), 0.1, of="loss", tol=1e-3)
        low, high = found.bracket
        assert low == found.sigma and low < high <= low * (1 + 1e-3)
        # The mean rise is c sigma^2 exactly under the same draws.
        c = found.rise / low**2
        assert found.rise <= 0.1 < c * high**2
        assert found.sigma_error == pytest.approx(found.error / (2 * c * low), rel=1e-6)

    @pytest.mark.parametrize("bracket", [(1e-6, 2e-6), (50.0, 100.0), (0.01, 3.0), (0.04999, 0.05)])
    def test_a_bracket_elsewhere_is_widened(self, bracket):
        problem = parabola(self.A)
        want = pac_bayes(problem, 0.1, of="loss", tol=1e-3).sigma
        assert pac_bayes(problem, 0.1, of="loss", tol=1e-3, bracket=bracket).sigma == pytest.approx(want, rel=2e-3)

    @pytest.mark.parametrize("eps", [None, 0.0, 0.05])
    def test_in_proportion_to_the_weights(self, eps):
        """The mean rise is sum a_i (sigma^2 w_i^2 + eps^2) / 2."""
        at = torch.linspace(-2, 2, 20).double()
        at[[4, 9]] = 0.0
        problem = parabola(self.A, at)
        found = pac_bayes(problem, 0.2, of="loss", magnitude=True, eps=eps, draws=100)
        floor = 1e-3 if eps is None else eps
        want = math.sqrt((0.4 - floor**2 * float(self.A.sum())) / float((self.A * at.square()).sum()))
        assert abs(found.sigma - want) <= 4 * found.sigma_error + 0.01 * want
        assert found.eps == floor and found.sigma_error < 0.1 * want

    def test_of_the_error_rate(self):
        """The same displacements, drawn again: the mean is below the target at sigma and above it just beyond."""
        problem = classifier()
        found = pac_bayes(problem, 0.1, draws=8, seed=3)
        assert (found.of, found.start, found.evaluations % 16) == ("error", 0.0, 1)
        generator = torch.Generator().manual_seed(3)
        draws = [torch.randn(problem.size, generator=generator, dtype=torch.float64) for _ in range(8)]

        def rises(sigma):
            return torch.tensor(
                [
                    sum(error_rate(problem, problem.moved(sign * sigma * u)) for sign in (1.0, -1.0)) / 2 - found.start
                    for u in draws
                ],
                dtype=torch.float64,
            )

        assert found.rise == pytest.approx(float(rises(found.sigma).mean())) and found.rise <= 0.1
        assert found.error == pytest.approx(float(rises(found.sigma).std()) / math.sqrt(8))
        assert float(rises(found.bracket[1]).mean()) > 0.1
        assert found.conventions == problem.conventions.with_seed(3)
        assert pac_bayes(problem, 0.1, draws=8, seed=3) == found

    def test_does_not_see_the_scale_of_layers(self):
        problems = [deep(scales)[3] for scales in ((1, 1, 1), (8, 0.25, 0.5))]
        first, other = (pac_bayes(p, 0.1, of="loss", magnitude=True, eps=0.0).sigma for p in problems)
        assert first == pytest.approx(other, rel=1e-9)

    @pytest.mark.parametrize("bracket", [(0.1, 0.1), (0.2, 0.1), (0.0, 1.0), (0.1, math.inf)])
    def test_a_bracket_without_width_is_refused(self, bracket):
        with pytest.raises(ValueError, match="bracket must be two values of sigma with 0 < low < high"):
            pac_bayes(classifier(), bracket=bracket)

    def test_bad_options(self):
        for options, sentence in [
            ({"target": 0.0}, "target must be a positive number, got 0.0"),
            ({"target": math.nan}, "target must be a positive number, got nan"),
            ({"draws": 1}, "draws must be at least 2, got 1"),
            ({"tol": 0.0}, "tol must lie between 0 and 1"),
            ({"eps": 1e-3}, "eps .* needs magnitude=True"),
            ({"eps": -1.0, "magnitude": True}, "eps must be a number >= 0"),
            ({"of": "accuracy"}, "of must be 'loss' or 'error'"),
            ({"target": 1.0}, "the error rate is 0 without noise, so it cannot rise by 1"),
        ]:
            with pytest.raises(ValueError, match=sentence):
                pac_bayes(classifier(), **options)

    def test_a_target_that_is_not_reached(self):
        class Bounded(Parabola):
            def forward(self, x):
                return torch.tanh(super().forward(x))

        with pytest.raises(
            ValueError, match=r"the loss does not rise by 1.5 at any sigma up to .*, where it rises by 1;"
        ):
            pac_bayes(of_module(Bounded(self.A, torch.zeros(20).double())), 1.5, of="loss")

    def test_a_floor_that_is_too_high(self):
        problem = parabola(self.A, torch.ones(20))
        with pytest.raises(ValueError, match=r"rises by more than 0.1 even at sigma=.*, because of eps=1"):
            pac_bayes(problem, 0.1, of="loss", magnitude=True, eps=1.0)

    def test_weights_that_are_all_zero(self):
        with pytest.raises(ValueError, match="every selected weight is zero"):
            pac_bayes(parabola(self.A), of="loss", magnitude=True, eps=0.0)

    @pytest.mark.parametrize("beyond", [math.inf, math.nan])
    def test_a_net_that_overflows(self, beyond):
        class Cliff(Parabola):
            def forward(self, x):
                return torch.where(self.w.abs().max() < 1.0, super().forward(x), beyond)

        with pytest.raises(ArithmeticError, match=r"the model overflows at sigma=.*, before its loss rises"):
            pac_bayes(of_module(Cliff(0.01 * self.A, torch.zeros(20).double())), 10.0, of="loss")

    def test_half_precision(self):
        with pytest.raises(ValueError, match="lost to rounding in bfloat16 weights"):
            pac_bayes(classifier(dtype=torch.bfloat16))


def definition(hessian, names, model, layer):
    """sum over s, s' of <w_s, w_s'> Tr H_ss', loop by loop."""
    sizes = [dict(model.named_parameters())[n].numel() for n in names]
    start = sum(sizes[: names.index(layer)])
    w = dict(model.named_parameters())[layer].detach().flatten(1)
    rows, columns = w.shape
    block = hessian[start : start + w.numel(), start : start + w.numel()].view(rows, columns, rows, columns)
    return sum(float(w[s] @ w[t]) * float(block[s, :, t].trace()) for s in range(rows) for t in range(rows))


class TestRelativeFlatness:
    @pytest.mark.parametrize(
        ("name", "layer"),
        [
            ("mlp", "0.weight"),
            ("mlp", "2.weight"),
            ("relu", "0.weight"),
            ("groupnorm", "0.weight"),
            ("tied", "embed.weight"),
            ("regression", "2.weight"),
        ],
    )
    def test_is_the_definition(self, name, layer):
        model, x, y, loss = make(name)
        problem = Problem(model, loss, batches(x, y, 7))
        found = relative_flatness(problem, layer)
        want = definition(dense_hessian(model, x, y, loss), problem.names, model, layer)
        assert found.value == pytest.approx(want, rel=1e-9)
        w = dict(model.named_parameters())[layer].detach().flatten(1)
        assert (found.layer, found.neurons, found.inputs) == (layer, *w.shape)
        assert found.products == int(torch.linalg.matrix_rank(w)) * w.shape[1]
        assert (found.error, found.probes, found.converged) == (0.0, 0, True)
        alone = Problem(model, loss, batches(x, y, 7), params=layer)
        assert relative_flatness(alone, layer).value == pytest.approx(want, rel=1e-9)

    def test_by_probes(self):
        model, x, y, loss = make("mlp")
        problem = Problem(model, loss, (x, y), params="0.weight")
        want = relative_flatness(problem, "0.weight").value
        off = []
        for seed in range(15):
            found = relative_flatness(problem, "0.weight", exact=0, tol=0.1, seed=seed)
            assert found.converged and found.probes == found.products >= 20 and found.conventions.seed == seed
            off.append((found.value - want) / found.error)
        assert max(map(abs, off)) < 4.5 and 0.5 < torch.tensor(off).square().mean().sqrt() < 1.6

    def test_does_not_see_the_scale_of_layers(self):
        """Petzka et al. 2021; the plain trace of the layer's Hessian does."""
        for layer in ("0.weight", "2.weight", "4.weight"):
            values = [relative_flatness(deep(s)[3], layer).value for s in ((1, 1, 1), (8, 0.25, 0.5), (0.1, 10, 1))]
            assert values[1] == pytest.approx(values[0], rel=1e-9)
            assert values[2] == pytest.approx(values[0], rel=1e-9)

    def test_does_not_see_the_scale_of_its_neurons(self):
        model, _, _, problem = deep()
        before = relative_flatness(problem, "2.weight").value
        scale = torch.tensor([0.1, 3.0, 1.0, 7.0]).double()
        with torch.no_grad():
            model[2].weight *= scale[:, None]
            model[4].weight /= scale
        assert relative_flatness(problem, "2.weight").value == pytest.approx(before, rel=1e-9)

    def test_of_least_squares_is_the_ridge_penalty(self):
        """2 ||w||^2 E ||x||^2 for the squared error of a linear function."""
        _, x, _, _ = make("linear")
        model = nn.Linear(4, 1, bias=False).double()
        found = relative_flatness(Problem(model, nn.MSELoss(), (x, x[:, :1])), "weight")
        want = 2 * float(model.weight.detach().square().sum() * x.square().sum(1).mean())
        assert found.value == pytest.approx(want, rel=1e-12) and found.products == 4

    def test_of_the_last_layer_of_a_classifier(self):
        """E ||x||^2 (sum_c G_cc p_c - p G p) with G = W W^T."""
        model, x, _, problem = deep()
        features, w = model[:4](x).detach(), model[4].weight.detach()
        p, gram = (features @ w.T).softmax(1), w @ w.T
        spread = p @ gram.diagonal() - ((p @ gram) * p).sum(1)
        want = float((features.square().sum(1) * spread).mean())
        assert relative_flatness(problem, "4.weight").value == pytest.approx(want, rel=1e-9)

    def test_weight_decay_adds_its_own(self):
        model, x, y, loss = make("mlp")
        plain, decayed = (
            relative_flatness(Problem(model, loss, (x, y), weight_decay=c), "0.weight").value for c in (0.0, 0.3)
        )
        assert decayed - plain == pytest.approx(0.3 * 5 * float(model[0].weight.detach().square().sum()), rel=1e-9)

    def test_of_a_layer_of_low_rank(self):
        model, x, y, loss = make("mlp")
        with torch.no_grad():
            model[2].weight[1:] = model[2].weight[:1] * torch.tensor([[2.0], [-1.0]]).double()
        found = relative_flatness(Problem(model, loss, (x, y)), "2.weight")
        want = definition(dense_hessian(model, x, y, loss), [n for n, _ in model.named_parameters()], model, "2.weight")
        assert found.products == 6 and found.value == pytest.approx(want, rel=1e-9)
        nn.init.zeros_(model[2].weight)
        zero = relative_flatness(Problem(model, loss, (x, y)), "2.weight")
        assert (zero.value, zero.products) == (0.0, 0)

    def test_bad_layers(self):
        model, x, y, loss = make("mlp")
        problem = Problem(model, loss, (x, y))
        with pytest.raises(ValueError, match=r"'0.bias' is not a matrix; the selected matrices are 0.weight, 2.weight"):
            relative_flatness(problem, "0.bias")
        with pytest.raises(ValueError, match="'fc' is not among the selected weights"):
            relative_flatness(problem, "fc")
        with pytest.raises(ValueError, match="matrices are none"):
            relative_flatness(Problem(model, loss, (x, y), params="*.bias"), "0.weight")
        with pytest.raises(ValueError, match="exact must be >= 0"):
            relative_flatness(problem, "0.weight", exact=-1)


class TestFisherRao:
    @pytest.mark.parametrize("labels", ["model", "data"])
    def test_of_a_relu_net(self, labels):
        """K^2 E <d l / d f, f>^2 with K matrices and no biases; Liang et al. 2019."""
        model, x, y, problem = deep()
        f = model(x).detach()
        slope = f.softmax(1)[:, None] - torch.eye(3).double()  # (N, label, K)
        inner = (slope * f[:, None]).sum(2).square()
        chance = f.softmax(1) if labels == "model" else F.one_hot(y, 3).double()
        found = fisher_rao(problem, labels=labels)
        assert found.square == pytest.approx(9 * float((chance * inner).sum(1).mean()), rel=1e-9)
        assert found.value == pytest.approx(math.sqrt(found.square))
        assert (found.labels, found.products, found.conventions) == (labels, 1, problem.conventions)

    @pytest.mark.parametrize("name", ["mlp", "groupnorm", "tied"])
    def test_is_the_quadratic_form(self, name):
        model, x, y, loss = make(name)
        problem = Problem(model, loss, batches(x, y, 7), weight_decay=0.5)
        _, w, outputs = function_of(model, x, y, loss)
        assert fisher_rao(problem).square == pytest.approx(float(w @ dense(GaussNewton(problem)) @ w), rel=1e-9)
        rows = torch.autograd.functional.jacobian(lambda v: F.cross_entropy(outputs(v), y, reduction="none"), w)
        assert fisher_rao(problem, labels="data").square == pytest.approx(float((rows @ w).square().mean()), rel=1e-9)

    @pytest.mark.parametrize("labels", ["model", "data"])
    def test_does_not_see_the_scale_of_neurons(self, labels):
        model, _, _, problem = deep()
        before = fisher_rao(problem, labels=labels).value
        scale = torch.tensor([0.1, 3.0, 1.0, 7.0]).double()
        with torch.no_grad():
            model[2].weight *= scale[:, None]
            model[4].weight /= scale
        assert fisher_rao(problem, labels=labels).value == pytest.approx(before, rel=1e-9)

    def test_bad_labels_and_losses(self):
        model, x, y, _ = make("mlp")
        with pytest.raises(ValueError, match="labels must be 'model' or 'data', got 'empirical'"):
            fisher_rao(classifier(), labels="empirical")
        with pytest.raises(ValueError, match=r"nn.CrossEntropyLoss without label smoothing .* labels='data'"):
            fisher_rao(Problem(model, nn.CrossEntropyLoss(label_smoothing=0.1), (x, y)))
        problem = Problem(model, lambda f, y: F.cross_entropy(f, y), (x, y))
        with pytest.raises(ValueError, match="the loss cannot return one value per sample"):
            fisher_rao(problem, labels="data")
