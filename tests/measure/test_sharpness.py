"""Sharpness against closed forms, dense optima and theorems, and the defects of other implementations."""

import itertools
import math
from itertools import pairwise

import pytest
import torch
from scipy.optimize import brentq
from torch import nn
from torch.nn import functional as F

from flatmin.measure.average import average_case
from flatmin.measure.ball import ball
from flatmin.measure.curvature import EmpiricalFisher, dense
from flatmin.measure.flatness import fisher_rao, pac_bayes, relative_flatness
from flatmin.measure.groups import split
from flatmin.measure.losses import LogitNormalised, error_rate
from flatmin.measure.problem import Problem
from flatmin.measure.sharpness import curve, m_sharpness, worst_case
from tests.measure.nets import batches, dense_hessian, function_of, make, symmetric

SMALL = ["mlp", "relu", "tied", "regression", "sum", "class weights"]


class Quadratic(nn.Module):
    """L(w + d) - L(w) = b d + d A d / 2 at its present weights w."""

    def __init__(self, slope, matrix, at=None):
        super().__init__()
        at = torch.zeros_like(slope) if at is None else at
        self.w = nn.Parameter(at.clone())
        self.register_buffer("slope", slope)
        self.register_buffer("matrix", matrix)
        self.register_buffer("at", at.clone())

    def forward(self, x):
        d = self.w - self.at
        return self.slope @ d + 0.5 * d @ self.matrix @ d + x.sum()


def of_quadratic(slope, matrix, at=None):
    x = torch.zeros(1, dtype=torch.float64)
    return Problem(Quadratic(slope, matrix, at), lambda value, _: value, (x, x))


def optimum(slope, matrix, rho):
    """The largest b d + d A d / 2 with ||d|| <= rho, by the secular equation."""
    values, vectors = torch.linalg.eigh(matrix)
    c = vectors.T @ slope
    d_of = lambda shift: c / (shift - values)  # noqa: E731
    if values[-1] < 0 and d_of(0.0).norm() <= rho:
        d = d_of(0.0)
    else:
        low = max(float(values[-1]), 0.0)
        low += 1e-13 * max(1.0, low)
        if d_of(low).norm() < rho:  # the hard case
            d = d_of(low)
            d[-1] += math.copysign(math.sqrt(rho**2 - float(d.square().sum())), float(c[-1]) or 1.0)
        else:
            high = float(values[-1] + slope.norm() / rho + 1.0)
            d = d_of(brentq(lambda s: float(d_of(s).norm()) - rho, low, high, xtol=1e-15))
    return float(c @ d + 0.5 * values @ d.square())


def independent(name, **changes):
    """The problem of a net, its loss as a function of a flat vector, that vector and the gradient there."""
    model, x, y, loss = make(name)
    fn, w, _ = function_of(model, x, y, loss)
    return Problem(model, loss, batches(x, y, 7), **changes), fn, w, torch.func.grad(fn)(w)


def two_layers(scale=1.0):
    """A ReLU net without biases, of which the layers are scaled by `scale` and its inverse."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)).double()
    with torch.no_grad():
        model[0].weight *= scale
        model[2].weight /= scale
    return Problem(model, nn.CrossEntropyLoss(), make("mlp")[1:3])


class TestTheFirstStep:
    @pytest.mark.parametrize("name", SMALL)
    def test_sam(self, name):
        problem, fn, w, g = independent(name)
        want = float(fn(w + 0.05 * g / g.norm()) - fn(w))
        found = worst_case(problem, 0.05, steps=1)
        assert found.one_step == found.value == pytest.approx(want, rel=1e-9)
        assert (found.gradients, len(found.history)) == (2, 1)
        torch.testing.assert_close(found.displacement, 0.05 * g / g.norm(), rtol=0, atol=1e-12)
        assert found.loss == pytest.approx(float(fn(w)), rel=1e-12)

    @pytest.mark.parametrize("eta", [0.0, 0.1])
    @pytest.mark.parametrize("name", SMALL)
    def test_asam(self, name, eta):
        problem, fn, w, g = independent(name)
        t = w.abs() + eta
        d = 0.2 * t**2 * g / (t * g).norm()
        found = worst_case(problem, 0.2, adaptive=True, eta=eta, steps=1)
        assert found.one_step == found.value == pytest.approx(float(fn(w + d) - fn(w)), rel=1e-9)
        torch.testing.assert_close(found.displacement, d, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("adaptive", [False, True])
    def test_in_a_box(self, adaptive):
        problem, fn, w, g = independent("mlp")
        d = 0.01 * g.sign() * (w.abs() if adaptive else 1.0)
        found = worst_case(problem, 0.01, norm="linf", adaptive=adaptive, steps=1)
        assert found.one_step == pytest.approx(float(fn(w + d) - fn(w)), rel=1e-9)

    def test_weight_decay_is_part_of_it(self):
        problem, fn, w, _ = independent("mlp", weight_decay=0.3)
        whole = lambda v: fn(v) + 0.15 * v.square().sum()  # noqa: E731
        g = torch.func.grad(whole)(w)
        want = float(whole(w + 0.1 * g / g.norm()) - whole(w))
        assert worst_case(problem, 0.1, steps=1).one_step == pytest.approx(want, rel=1e-9)

    def test_it_may_fall_and_the_value_does_not(self):
        """A narrow valley below a hill: the closed form overshoots."""
        problem = of_quadratic(torch.tensor([1.0, 0.0]).double(), torch.diag(torch.tensor([-10.0, -1.0])).double())
        one = worst_case(problem, 1.0, steps=1)
        assert one.one_step == pytest.approx(1.0 - 5.0) and one.value == 0.0 and not one.displacement.any()
        more = worst_case(problem, 1.0, steps=20)
        assert more.one_step == one.one_step and more.value == pytest.approx(0.05, rel=1e-9)

    def test_of_a_zero_gradient_is_none(self):
        problem = of_quadratic(torch.zeros(3).double(), torch.diag(torch.tensor([3.0, 2.0, -1.0])).double())
        one = worst_case(problem, 0.5, steps=1)
        assert (one.value, one.one_step, one.conventions.seed) == (0.0, 0.0, None)


SPECTRA = {
    "a few large": torch.cat([torch.tensor([10.0, 7.0, 5.0, -3.0]), torch.logspace(-4, 0, 56)]),
    "close": torch.cat([torch.tensor([10.0, 9.8, 9.5]), torch.linspace(-1, 5, 57)]),
    "indefinite": torch.cat([torch.tensor([5.0, 4.0]), torch.linspace(-6, 2, 58)]),
    "negative": -torch.linspace(0.1, 6, 60),
}


class TestTheAscent:
    @pytest.mark.parametrize("spectrum", SPECTRA)
    @pytest.mark.parametrize("size", [1e-3, 1.0])
    def test_finds_the_optimum_of_a_quadratic(self, spectrum, size):
        """The steps of the default come within 1 % of it, of one in the inside within 5 %; 200 within 0.1 %."""
        matrix = symmetric(SPECTRA[spectrum]).matrix
        slope = torch.randn(60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        slope *= size / slope.norm()
        problem = of_quadratic(slope, matrix)
        want = optimum(slope, matrix, 0.5)
        short, long = worst_case(problem, 0.5), worst_case(problem, 0.5, steps=200)
        assert (0.95 if spectrum == "negative" else 0.99) * want <= short.value <= want * (1 + 1e-9)
        assert 0.999 * want <= long.value <= want * (1 + 1e-9)
        assert max(0.0, long.one_step) <= short.value and short.gradients <= 21
        assert float(long.displacement.norm()) <= 0.5 * (1 + 1e-12)
        assert long.converged == (long.left <= 1e-5 * long.value)
        assert long.converged or spectrum == "negative"

    def test_finds_the_optimum_of_an_adaptive_quadratic(self):
        matrix = symmetric(SPECTRA["a few large"]).matrix
        g = torch.Generator().manual_seed(1)
        slope, at = (torch.randn(60, generator=g, dtype=torch.float64) for _ in range(2))
        want = optimum(at.abs() * slope, at.abs()[:, None] * matrix * at.abs(), 0.5)
        found = worst_case(of_quadratic(slope, matrix, at), 0.5, adaptive=True, steps=50)
        assert 0.999 * want <= found.value <= want * (1 + 1e-9)
        assert float((found.displacement / at.abs()).norm()) <= 0.5 * (1 + 1e-12)

    def test_leaves_a_saddle(self):
        """The gradient is an eigenvector of a small eigenvalue, so the first step is stationary at once."""
        matrix = torch.diag(torch.tensor([5.0, 1.0, 0.5, 0.0]).double())
        slope = torch.tensor([0.0, 0.1, 0.0, 0.0]).double()
        found = worst_case(of_quadratic(slope, matrix), 1.0)
        assert found.one_step == pytest.approx(0.6)
        assert found.value == pytest.approx(optimum(slope, matrix, 1.0), rel=1e-3)
        assert found.conventions.seed == 0

    def test_leaves_a_kink(self):
        """Every step along the gradient at w falls, however short; the loss rises elsewhere."""

        class Kink(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.zeros(2).double())

            def forward(self, x):
                return -torch.maximum(self.w[0], -2.0 * self.w[0]) + 3.0 * self.w[1].square() + x.sum()

        x = torch.zeros(1, dtype=torch.float64)
        found = worst_case(Problem(Kink(), lambda value, _: value, (x, x)), 1.0)
        assert found.one_step < 0 < 2.9 < found.value <= 3.0

    def test_at_a_minimum_finds_the_top_of_the_hessian(self):
        matrix = symmetric(SPECTRA["a few large"]).matrix
        found = worst_case(of_quadratic(torch.zeros(60).double(), matrix), 0.3, steps=40)
        assert found.one_step == 0.0 and found.value == pytest.approx(0.5 * 0.09 * 10.0, rel=1e-5)

    @pytest.mark.parametrize("adaptive", [False, True])
    @pytest.mark.parametrize("norm", ["l2", "linf"])
    def test_never_falls_and_is_the_same_for_more_steps(self, norm, adaptive):
        problem = independent("relu")[0]
        rho = {"l2": 1.0, "linf": 0.2}[norm]
        short, long = (worst_case(problem, rho, norm=norm, adaptive=adaptive, steps=n) for n in (7, 25))
        assert long.history[:7] == short.history and len(long.history) == 25
        assert all(a <= b for a, b in pairwise((0.0, long.one_step, *long.history[1:], long.value)))
        assert long.value > 1.01 * long.one_step
        at = problem.value(problem.moved(long.displacement))
        assert at - problem.value() == pytest.approx(long.value, rel=1e-9)

    def test_restarts_find_at_least_as_much(self):
        problem = independent("relu")[0]
        plain = worst_case(problem, 2.0, steps=8)
        more = worst_case(problem, 2.0, steps=8, restarts=3)
        assert more.value >= plain.value and more.history == plain.history
        assert more.gradients == plain.gradients + 3 * 8
        assert (more.conventions.seed, plain.conventions.seed) == (0, None)
        assert worst_case(problem, 2.0, steps=8, restarts=3).value == more.value

    def test_linear_functions_in_closed_form(self):
        slope = torch.tensor([1.0, -2.0, 0.5, 0.0]).double()
        at = torch.tensor([2.0, -0.5, 0.0, 1.0]).double()
        problem = of_quadratic(slope, torch.zeros(4, 4).double(), at)
        scaled = slope * at.abs()
        for options, want in (
            ({"norm": "l2"}, slope.norm()),
            ({"norm": "linf"}, slope.abs().sum()),
            ({"norm": "l2", "adaptive": True}, scaled.norm()),
            ({"norm": "linf", "adaptive": True}, scaled.abs().sum()),
        ):
            found = worst_case(problem, 0.3, **options)
            assert found.value == found.one_step == pytest.approx(0.3 * float(want), rel=1e-12)
            assert found.converged

    def test_a_box_of_separate_parabolas_in_closed_form(self):
        g = torch.Generator().manual_seed(0)
        a, b = (torch.randn(20, generator=g, dtype=torch.float64) for _ in range(2))
        rho = 0.8
        best = torch.where(a < 0, (-b / a).clamp(-rho, rho), rho * b.sign())
        want = float((b * best + 0.5 * a * best.square()).sum())
        found = worst_case(of_quadratic(b, torch.diag(a)), rho, norm="linf", steps=60)
        assert 0.999 * want <= found.value <= want * (1 + 1e-12)
        assert float(found.displacement.abs().max()) <= rho


class TestAdaptive:
    @pytest.mark.parametrize("norm", ["l2", "linf"])
    def test_does_not_see_the_scale_of_layers(self, norm):
        """w1 -> a w1, w2 -> w2 / a leaves a ReLU net as it is; Kwon et al. 2021."""
        rho = {"l2": 0.5, "linf": 0.1}[norm]
        first, other = (worst_case(two_layers(a), rho, norm=norm, adaptive=True) for a in (1.0, 7.0))
        assert other.value == pytest.approx(first.value, rel=1e-9)
        assert other.one_step == pytest.approx(first.one_step, rel=1e-9)
        plain, scaled = (worst_case(two_layers(a), rho, norm=norm).value for a in (1.0, 7.0))
        assert abs(scaled / plain - 1.0) > 0.1
        means = [average_case(two_layers(a), rho, adaptive=True, draws=5).value for a in (1.0, 7.0)]
        assert means[0] == pytest.approx(means[1], rel=1e-9)

    @pytest.mark.parametrize("norm", ["l2", "linf"])
    def test_weights_that_are_zero_stay_and_change_nothing(self, norm):
        """Others divide by them: NaN norms, projections that are left out, boxes without width."""
        g = torch.Generator().manual_seed(3)
        slope, at = (torch.randn(12, generator=g, dtype=torch.float64) for _ in range(2))
        matrix = symmetric(torch.randn(12, generator=g)).matrix
        at[[2, 5, 6]] = 0.0
        kept = at != 0
        options = {"norm": norm, "adaptive": True, "steps": 30, "tol": 0.0}
        whole = worst_case(of_quadratic(slope, matrix, at), 0.4, **options)
        part = worst_case(of_quadratic(slope[kept], matrix[kept][:, kept], at[kept]), 0.4, **options)
        assert not whole.displacement[~kept].any() and torch.isfinite(whole.displacement).all()
        assert whole.value == pytest.approx(part.value, rel=1e-9)
        u = whole.displacement[kept] / at[kept].abs()
        assert float(u.norm() if norm == "l2" else u.abs().max()) <= 0.4 * (1 + 1e-12)
        again = worst_case(of_quadratic(slope, matrix, at), 0.4, **options, restarts=2)
        assert not again.displacement[~kept].any() and again.value >= whole.value

    @pytest.mark.parametrize("norm", ["l2", "linf"])
    def test_random_starts_leave_them_out(self, norm):
        at = torch.tensor([2.0, 0.0, -1.0, 0.0, 0.5]).double()
        within = ball(of_quadratic(torch.ones(5).double(), torch.eye(5).double(), at), 0.3, norm, True, 0.0)
        u = within.draw(torch.Generator().manual_seed(0), at)
        assert not u[at == 0].any() and (u[at != 0] != 0).all()
        if norm == "l2":
            assert float(u.norm()) == pytest.approx(0.3)
        assert float(u.abs().max()) <= 0.3

    def test_average_without_the_weights_that_are_zero(self):
        """Near w it is rho^2 sum w_i^2 H_ii / 2n over the n weights that are not zero."""
        at = torch.tensor([2.0, 0.0, -1.0, 0.0, 0.5]).double()
        matrix = torch.diag(torch.tensor([1.0, 100.0, 3.0, 100.0, 8.0]).double())
        found = average_case(of_quadratic(torch.ones(5).double(), matrix, at), 0.2, adaptive=True, draws=400)
        want = 0.04 * (4.0 + 3.0 + 2.0) / (2 * 3)
        assert abs(found.value - want) <= 4 * found.error and found.error < 0.1 * want

    def test_all_weights_zero(self):
        problem = of_quadratic(torch.ones(3).double(), torch.eye(3).double())
        for measure in (worst_case, average_case):
            with pytest.raises(ValueError, match="every selected weight is zero"):
                measure(problem, 0.1, adaptive=True)
        # With eta = 1 it is the plain ball.
        assert worst_case(problem, 0.1, adaptive=True, eta=1.0).value == worst_case(problem, 0.1).value

    def test_ascends_above_the_closed_form(self):
        """An ascent that steps along |w| g in place of |w|^2 g ends below a single step of ASAM."""
        problem = independent("mlp")[0]
        for rho in (0.05, 0.5, 2.0):
            found = worst_case(problem, rho, adaptive=True)
            assert found.value >= found.one_step > 0
        assert found.value > 1.02 * found.one_step


class TestAverage:
    def quadratic(self):
        matrix = symmetric(torch.logspace(-2, 1, 30)).matrix
        return of_quadratic(torch.full((30,), 0.3).double(), matrix), float(matrix.trace())

    @pytest.mark.parametrize("antithetic", [True, False])
    @pytest.mark.slow
    def test_the_interval_covers_as_often_as_it_says(self, antithetic):
        """200 seeds; 90.5 to 98.5 % is the 99 % range of a binomial with 95 %."""
        problem, trace = self.quadratic()
        want = 0.25 * trace / 60
        found = [average_case(problem, 0.5, draws=12, antithetic=antithetic, seed=seed) for seed in range(200)]
        covered = sum(low <= want <= high for low, high in (f.interval() for f in found)) / 200
        assert 0.905 <= covered <= 0.985
        mean = sum(f.value for f in found) / 200
        assert abs(mean - want) <= 4 * math.sqrt(sum(f.error**2 for f in found)) / 200
        assert found[0].evaluations == (25 if antithetic else 13)

    def test_pairs_take_out_the_gradient(self):
        problem, _ = self.quadratic()
        assert average_case(problem, 0.05).error < 0.1 * average_case(problem, 0.05, antithetic=False).error
        linear = of_quadratic(torch.ones(4).double(), torch.zeros(4, 4).double())
        found = average_case(linear, 0.5)
        assert found.value == pytest.approx(0.0, abs=1e-15) and found.error == pytest.approx(0.0, abs=1e-15)

    def test_both_conventions_of_rho(self):
        problem, _ = self.quadratic()
        entry = average_case(problem, 0.1, per="entry", seed=4)
        vector = average_case(problem, 0.1 * math.sqrt(30), seed=4)
        assert entry.value == pytest.approx(vector.value, rel=1e-9)

    def test_of_a_net(self):
        """To second order rho^2 tr H / 2n, and below the worst case."""
        model, x, y, loss = make("mlp")
        problem = Problem(model, loss, batches(x, y, 7))
        trace = float(dense_hessian(model, x, y, loss).trace())
        found = average_case(problem, 0.05, draws=300)
        assert abs(found.value - 0.05**2 * trace / (2 * problem.size)) <= 4 * found.error
        assert found.value < worst_case(problem, 0.05).value
        low, high = average_case(problem, 0.05, draws=3).interval()
        assert high - low == pytest.approx(2 * 4.302652729749 * average_case(problem, 0.05, draws=3).error)
        assert found.conventions == problem.conventions.with_seed(0)

    def test_of_the_error_rate(self):
        problem = independent("mlp")[0]
        found = average_case(problem, 3.0, of="error", draws=20)
        assert 0.0 < found.value < 1.0 and found.error > 0 and found.of == "error"

    def test_one_draw_has_no_error(self):
        found = average_case(independent("mlp")[0], 0.1, draws=1)
        assert math.isnan(found.error) and found.interval() == (-math.inf, math.inf)


class TestGroups:
    @pytest.mark.parametrize("name", SMALL)
    @pytest.mark.parametrize("size", [17, 5])
    def test_of_all_examples_is_the_worst_case(self, name, size):
        model, x, y, loss = make(name)
        problem = Problem(model, loss, batches(x, y, size), weight_decay=0.1)
        found, want = m_sharpness(problem, 17, 0.3), worst_case(problem, 0.3)
        assert found.value == pytest.approx(want.value, rel=1e-12)
        assert found.one_step == pytest.approx(want.one_step, rel=1e-12)
        assert (found.groups, found.left_out, found.gradients) == (1, 0, want.gradients)
        assert math.isnan(found.error)

    def test_in_train_mode_too(self):
        model, x, y, loss = make("batchnorm")
        problem = Problem(model, loss, batches(x, y, 6), mode="train")
        assert m_sharpness(problem, 17, 0.1, steps=3).value == pytest.approx(worst_case(problem, 0.1, steps=3).value)

    @pytest.mark.parametrize("size", [17, 7, 5, 1])
    def test_do_not_depend_on_the_batches(self, size):
        """Each is the SAM gap of its own examples."""
        model, x, y, loss = make("mlp")
        found = m_sharpness(Problem(model, loss, batches(x, y, size)), 4, 0.2, steps=1)
        gaps = []
        for k in range(4):
            fn, w, _ = function_of(model, x[4 * k : 4 * k + 4], y[4 * k : 4 * k + 4], loss)
            g = torch.func.grad(fn)(w)
            gaps.append(float(fn(w + 0.2 * g / g.norm()) - fn(w)))
        assert found.gaps == pytest.approx(gaps, rel=1e-9)
        values = torch.tensor(gaps, dtype=torch.float64)
        assert found.value == pytest.approx(float(values.mean()))
        assert found.error == pytest.approx(float(values.std()) / 2)
        assert (found.groups, found.left_out) == (4, 1)
        record = found.conventions
        assert (record.examples, record.terms, record.batch, record.seed) == (16, 16.0, 4, None)

    @pytest.mark.parametrize("rho", [0.05, 0.5])
    def test_fewer_examples_are_sharper(self, rho):
        """The mean of the maxima is at least the maximum of the mean."""
        model, x, y, loss = make("mlp")
        problem = Problem(model, loss, (x[:16], y[:16]))
        values = [m_sharpness(problem, m, rho, steps=40).value for m in (1, 2, 4, 8, 16)]
        assert all(a >= b for a, b in pairwise(values))

    def test_weigh_terms_and_share_the_data(self):
        model, x, y, loss = make("class weights")
        loss.ignore_index = 1
        problem = Problem(model, loss, batches(x, y, 7))
        groups, left = split(problem, 5)
        assert left == 17 - 5 * len(groups)
        for k, group in enumerate(groups):
            part = slice(5 * k, 5 * k + 5)
            fn, w, _ = function_of(model, x[part], y[part], loss)
            assert group.value() == pytest.approx(float(fn(w)), rel=1e-12)
            assert group.weights is problem.weights
        first = problem.batches[0].inputs
        assert groups[0].batches[0].inputs.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()

    def test_without_a_term_are_left_out(self):
        model, x, y, loss = make("mlp")
        y = y.clone()
        y[3:6] = -100
        groups, left = split(Problem(model, loss, (x, y)), 3)
        assert (len(groups), left) == (4, 5)
        # A piece without a term in a group with some.
        y[:] = 0
        y[4] = -100
        groups, left = split(Problem(model, loss, batches(x, y, 5)), 4)
        assert [g.conventions.terms for g in groups] == [4.0, 3.0, 4.0, 4.0]
        fn, w, _ = function_of(model, x[5:8], y[5:8], loss)
        assert groups[1].value() == pytest.approx(float(fn(w)), rel=1e-12)

    def test_of_tuples_and_mappings(self):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(5, 3, bias=False)

            def forward(self, x, scale):
                return self.linear(x) * scale

        _, x, y, loss = make("mlp")
        model, scale = Two().double(), torch.full((3,), 2.0).double()
        rows = torch.rand(17, 1, generator=torch.Generator().manual_seed(0)).double()
        found = [
            m_sharpness(Problem(model, loss, [(inputs, y)]), 5, 0.1, steps=2).value
            for inputs in ((x, scale), {"x": x, "scale": scale}, (x * rows, 2.0 / rows), (x, torch.tensor(2.0)))
        ]
        assert found[0] == found[1] == found[3] == pytest.approx(found[2], rel=1e-9)

    def test_restarts_and_errors(self):
        found = m_sharpness(independent("mlp")[0], 4, 1.0, steps=4, restarts=1, errors=True, seed=5)
        assert 0.0 <= found.error_gap <= 1.0 and found.conventions.seed == 5
        assert found.gradients == 4 * 9


class TestCurve:
    def test_of_worst_cases_rises(self):
        problem = independent("relu")[0]
        rhos = [0.01, 0.1, 0.5, 1.0, 1.1, 2.0]
        found = curve(problem, rhos, steps=5)
        assert found.rhos == tuple(rhos) and all(a < b for a, b in pairwise(found.values))
        alone = [worst_case(problem, rho, steps=5) for rho in rhos]
        assert found.values[0] == alone[0].value
        assert all(a.value >= b.one_step == a.one_step for a, b in zip(found.results, alone, strict=True))
        # The gradient at w is taken once.
        assert [r.gradients for r in found.results] == [6, 5, 5, 5, 5, 5]
        assert all(math.isnan(e) for e in found.errors)

    def test_goes_on_from_what_was_found(self):
        """Also where the closed form finds less in the larger ball."""
        valley = of_quadratic(torch.ones(1).double(), torch.full((1, 1), -10.0).double())
        found = curve(valley, [0.1, 1.0], steps=1)
        assert worst_case(valley, 1.0, steps=1).value == 0.0
        assert found.values == pytest.approx((0.05, 0.05))
        # The second step of the first ascent is a random point; the second ascent climbs from there.
        slope, matrix = torch.zeros(9).double(), torch.diag(torch.tensor([50.0, *[1.0] * 8])).double()
        slope[1] = 0.1
        for b in (slope, 0.0 * slope):
            found = curve(of_quadratic(b, matrix), [1.0, 1.1], steps=2)
            assert found.values[0] < 20.0 < 29.0 < found.values[1] <= optimum(b, matrix, 1.1) * (1 + 1e-9)

    def test_of_averages_has_the_same_draws(self):
        problem = independent("mlp")[0]
        found = curve(problem, [0.1, 0.3], measure="average", draws=4, seed=2)
        assert found.results[1] == average_case(problem, 0.3, draws=4, seed=2)
        assert found.errors == tuple(r.error for r in found.results)

    def test_of_groups(self):
        problem = independent("mlp")[0]
        found = curve(problem, [0.1, 0.3], measure="groups", m=4, steps=2)
        assert found.values[0] == m_sharpness(problem, 4, 0.1, steps=2).value
        assert found.values[1] > found.values[0] and found.results[1].rho == 0.3


class TestLosses:
    def test_error_rate(self):
        model, x, y, loss = make("class weights")
        loss.ignore_index = 2
        problem = Problem(model, loss, batches(x, y, 7))
        wrong = (model(x).argmax(1) != y)[y != 2]
        assert error_rate(problem) == pytest.approx(float(wrong.double().mean()))
        found = worst_case(problem, 3.0, errors=True)
        there = error_rate(problem, problem.moved(found.displacement))
        assert found.error_gap == pytest.approx(there - error_rate(problem)) and found.error_gap > 0
        assert worst_case(problem, 3.0).error_gap is None

    def test_classes_may_come_second_or_last(self):
        x = torch.randn(6, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        y = torch.randint(3, (6, 4), generator=torch.Generator().manual_seed(1))
        torch.manual_seed(0)
        last = nn.Linear(3, 3).double()
        second = nn.Sequential(last, nn.Flatten(1, 1), Transpose())
        rates = [
            error_rate(Problem(last, lambda f, y: F.cross_entropy(f.transpose(1, 2), y), (x, y))),
            error_rate(Problem(second, nn.CrossEntropyLoss(), (x, y))),
        ]
        assert rates[0] == rates[1] == float((last(x).argmax(-1) != y).double().mean())
        # Where both fit it is the second, as in nn.CrossEntropyLoss.
        rate = error_rate(Problem(last, nn.CrossEntropyLoss(), (x[:, :3], y[:, :3])))
        assert rate == float((last(x[:, :3]).argmax(1) != y[:, :3]).double().mean())

    def test_outputs_that_are_not_finite(self):
        problem = independent("mlp")[0]
        weights = problem.moved(torch.full((problem.size,), math.nan).double())
        assert math.isnan(error_rate(problem, weights))

    def test_no_classes(self):
        with pytest.raises(ValueError, match=r"class indices .* got torch.float64 \(7, 2\) and torch.float64 \(7, 2\)"):
            error_rate(independent("regression")[0])

    def test_logit_normalised(self):
        """(z - mean z) / ||z - mean z|| in cross-entropy, so that the scale of the outputs does not matter."""
        model, x, y, _ = make("mlp")
        z = model(x)
        z = z - z.mean(1, keepdim=True)
        want = float(F.cross_entropy(z / z.norm(dim=1, keepdim=True), y).detach())
        for loss in (nn.CrossEntropyLoss(), F.cross_entropy, lambda f, y: F.cross_entropy(f, y)):
            problem = Problem(model, LogitNormalised(loss), (x, y))
            assert problem.value() == pytest.approx(want, rel=1e-12)
        value = worst_case(problem, 0.1).value
        with torch.no_grad():
            model[2].weight *= 5.0
            model[2].bias *= 5.0
        last = Problem(model, LogitNormalised(nn.CrossEntropyLoss()), (x, y), params="0.*")
        assert last.value() == pytest.approx(want, rel=1e-12)
        assert value > 0 and last.conventions.loss == "logit-normalised CrossEntropyLoss"

    def test_logit_normalised_keeps_terms(self):
        model, x, y, _ = make("mlp")
        weight = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
        loss = LogitNormalised(nn.CrossEntropyLoss(weight=weight, ignore_index=1))
        parts, whole = (Problem(model, loss, batches(x, y, n)) for n in (5, 17))
        assert parts.value() == pytest.approx(whole.value(), rel=1e-12)
        assert parts.conventions.terms == float(weight[y[y != 1]].sum())
        # One value a term, and the loss as it was.
        loss = LogitNormalised(nn.CrossEntropyLoss())
        matrix = dense(EmpiricalFisher(Problem(model, loss, (x, y))))
        assert float(matrix.trace()) > 0 and loss.inner.reduction == "mean"

    def test_logits_that_are_all_the_same(self):
        model, x, y, _ = make("mlp")
        nn.init.zeros_(model[2].weight)
        nn.init.zeros_(model[2].bias)
        value, gradient = Problem(model, LogitNormalised(nn.CrossEntropyLoss()), (x, y)).gradient()
        assert value == pytest.approx(math.log(3.0)) and torch.isfinite(gradient).all()


class Transpose(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_is_the_same_on_a_gpu():
    """Random vectors are drawn on the CPU."""
    found = []
    for device in ("cpu", "cuda"):
        model, x, y, loss = make("mlp")
        problem = Problem(model.to(device), loss, batches(x, y, 7))
        found.append(
            [
                worst_case(problem, 0.5, adaptive=True, steps=6, restarts=1, errors=True).value,
                worst_case(problem, 0.1, norm="linf", steps=6, restarts=1).value,
                average_case(problem, 0.5, draws=3).value,
                m_sharpness(problem, 5, 0.5, steps=3).value,
                pac_bayes(problem, 0.2, of="loss", draws=2, tol=0.1).sigma,
                relative_flatness(problem, "0.weight").value,
                fisher_rao(problem).value,
            ]
        )
    assert found[0] == pytest.approx(found[1], rel=1e-6)


class TestBadInput:
    problem = staticmethod(lambda **changes: independent("mlp", **changes)[0])

    def test_rho(self):
        for measure, rho in itertools.product((worst_case, average_case), (0.0, -1.0, math.nan, math.inf)):
            with pytest.raises(ValueError, match="rho must be a positive number"):
                measure(self.problem(), rho)

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"steps": 0}, "steps must be >= 1 and restarts >= 0, got 0 and 0"),
            ({"restarts": -1}, "got 20 and -1"),
            ({"norm": "l1"}, "norm must be 'l2' or 'linf', got 'l1'"),
            ({"tol": -1.0}, "tol must be >= 0"),
            ({"eta": 0.1}, "has an effect only with adaptive=True"),
            ({"eta": -0.1, "adaptive": True}, "eta must be a number >= 0"),
        ],
    )
    def test_options(self, options, sentence):
        with pytest.raises(ValueError, match=sentence):
            worst_case(self.problem(), 0.1, **options)

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"draws": 0}, "draws must be at least 1"),
            ({"per": "weight"}, "per must be 'vector' or 'entry', got 'weight'"),
            ({"of": "accuracy"}, "of must be 'loss' or 'error', got 'accuracy'"),
        ],
    )
    def test_averages(self, options, sentence):
        with pytest.raises(ValueError, match=sentence):
            average_case(self.problem(), 0.1, **options)

    def test_groups(self):
        with pytest.raises(ValueError, match="the data have 17 examples, which make no group of m=18"):
            m_sharpness(self.problem(), 18, 0.1)
        with pytest.raises(ValueError, match="m must be at least 1, got 0"):
            m_sharpness(self.problem(), 0, 0.1)

    def test_curves(self):
        for rhos in ([], [0.2, 0.1], [0.1, 0.1]):
            with pytest.raises(ValueError, match="ascending radii"):
                curve(self.problem(), rhos)
        with pytest.raises(ValueError, match="measure must be"):
            curve(self.problem(), [0.1], measure="best")
        for options in ({"measure": "groups"}, {"m": 4}):
            with pytest.raises(ValueError, match="m is required for measure='groups'"):
                curve(self.problem(), [0.1], **options)

    def test_half_precision(self):
        with pytest.raises(ValueError, match="lost to rounding in bfloat16 weights"):
            worst_case(self.problem(dtype=torch.bfloat16), 0.1)

    def test_a_loss_that_overflows(self):
        model, x, y, _ = make("mlp")
        problem = Problem(model.float(), lambda f, y: f.square().mean().exp(), (x.float(), y))
        with pytest.raises(ArithmeticError, match="within rho=1000 the loss is inf, or its gradient is not finite"):
            worst_case(problem, 1e3)
        with pytest.raises(ArithmeticError, match="the loss is not finite under displacements of size rho=1000"):
            average_case(problem, 1e3)
