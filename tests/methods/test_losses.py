"""BiSAM's bounds, label smoothing, and the criterion that climbs one loss and reports another."""

import copy
import itertools
import math
import pickle
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import flatmin
from flatmin.methods.losses import GAMMA, bisam_log, bisam_tanh, margins, smoothed_cross_entropy, trajectory
from flatmin.optim.criterion import PassView
from tests.helpers import soft_targets

LOSSES = {"log": bisam_log, "tanh": bisam_tanh}
# The formulas as the paper writes them, without care for overflow.
PHI = {
    "log": lambda x: 1 - torch.log(1 + torch.exp(math.log(math.e - 1) - x)),
    "tanh": lambda x: torch.tanh(0.1 * x),
}
DEFAULT_MU = {"log": 1.0, "tanh": 10.0}
every_loss = pytest.mark.parametrize("kind", LOSSES)


def naive(kind, logits, target, mu):
    f = logits - logits[torch.arange(len(target)), target][:, None]
    return ((mu * PHI[kind](f)).exp().sum(1).log() / mu).mean()


def sample(n=16, k=5, scale=1.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return scale * torch.randn(n, k, generator=g, dtype=dtype), torch.randint(k, (n,), generator=g)


# -- BiSAM --------------------------------------------------------------------------------------------------------


@every_loss
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    row=st.lists(st.floats(-20, 20), min_size=1, max_size=12),
    true=st.integers(0, 11),
    log_mu=st.floats(math.log(0.05), math.log(500.0)),
)
def test_the_soft_maximum_lies_within_log_k_over_mu_of_the_maximum(kind, row, true, log_mu):
    """max_j phi(F_j) <= Q_i <= max_j phi(F_j) + log K / mu, for one sample at a time."""
    logits, mu = torch.tensor([row], dtype=torch.float64), math.exp(log_mu)
    target = torch.tensor([true % len(row)])
    q = float(LOSSES[kind](logits, target, mu))
    top = float(PHI[kind](margins(logits, target)).max())
    slack = 1e-12 * (1 + 1 / mu)
    assert top - slack <= q <= top + math.log(len(row)) / mu + slack


@every_loss
def test_it_bounds_the_zero_one_loss_from_below(kind):
    """phi(x) <= 1 where x >= 0 and <= 0 elsewhere, so Q - log(K)/mu <= the share of errors."""
    x = torch.linspace(-50, 50, 10001, dtype=torch.float64)
    assert (PHI[kind](x) <= (x >= 0).double() + 1e-12).all()
    logits, target = sample(200, 5, 3.0)
    errors = float((logits.argmax(1) != target).double().mean())
    for mu in (1.0, 10.0, 1000.0):
        assert float(LOSSES[kind](logits, target, mu)) - math.log(5) / mu <= errors


@every_loss
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_value_and_gradient_equal_the_plain_formula(kind, scale):
    logits, target = sample(scale=scale)
    for mu in (0.1, 1.0, 7.3, 10.0, 59.9):
        a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        ours, plain = LOSSES[kind](a, target, mu), naive(kind, b, target, mu)
        ours.backward()
        plain.backward()
        torch.testing.assert_close(ours, plain, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-14)


@every_loss
@pytest.mark.parametrize("other", [math.nextafter(60.0, 61.0), 60.0])
def test_the_two_ways_of_evaluation_meet(kind, other):
    """Both sides of the change of formula at mu = 60 agree with logsumexp, in value and gradient."""
    logits, target = sample()
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    ours = LOSSES[kind](a, target, other)
    stable = torch.logsumexp(other * PHI[kind](margins(b, target)), 1).mean() / other
    ours.backward()
    stable.backward()
    torch.testing.assert_close(ours, stable, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-14)


@every_loss
def test_a_large_mu_is_the_maximum(kind):
    logits, target = sample()
    top = PHI[kind](margins(logits, target)).max(1).values.mean()
    q = LOSSES[kind](logits, target, 1e6)
    assert 0 <= float(q - top) <= math.log(5) / 1e6 + 1e-12


@every_loss
def test_phi_is_zero_at_zero(kind):
    """One class only has the margin 0, and there Q = phi(0) = 0."""
    target = torch.zeros(4, dtype=torch.long)
    for mu in (0.5, 1.0, 10.0, 200.0):
        q = LOSSES[kind](torch.randn(4, 1, dtype=torch.float64), target, mu)
        assert abs(float(q)) <= 1e-14
    assert math.log(math.e - 1) == GAMMA


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_finite_for_any_finite_logits(kind, dtype):
    """Value and gradient, with the true class on top, at the bottom, and tied."""
    for mu, size, true in itertools.product(
        (DEFAULT_MU[kind], 1.0, 10.0, 60.0, 61.0, 1000.0), (0.0, 30.0, 1e4, 1e30), range(3)
    ):
        rows = [[size, -size, 0.0], [-size, size, 0.0], [size, size, -size], [0.0, 0.0, 0.0]]
        logits = torch.tensor(rows, dtype=dtype, requires_grad=True)
        q = LOSSES[kind](logits, torch.full((4,), true), mu)
        (grad,) = torch.autograd.grad(q, logits)
        assert q.dtype == dtype and torch.isfinite(q) and torch.isfinite(grad).all(), (mu, size, true)
        assert -0.05 <= float(q.detach()) <= 1 + math.log(3) / mu + 0.05, (mu, size, true)


@every_loss
def test_first_and_second_derivatives(kind):
    logits, target = sample(4, 3)
    logits.requires_grad_()
    for mu in (1.0, 10.0, 80.0):
        assert torch.autograd.gradcheck(lambda z, mu=mu: LOSSES[kind](z, target, mu), logits)
        assert torch.autograd.gradgradcheck(lambda z, mu=mu: LOSSES[kind](z, target, mu), logits)


@every_loss
def test_it_runs_under_function_transforms(kind):
    """torch.func takes it, as the functional door does."""
    logits, target = sample(4, 3)
    grad = torch.func.grad(lambda z: LOSSES[kind](z, target))(logits)
    leaf = logits.clone().requires_grad_()
    LOSSES[kind](leaf, target).backward()
    assert torch.equal(grad, leaf.grad)


@every_loss
def test_bad_shapes_and_dtypes_are_refused(kind):
    logits, target = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)
    for z, y, error, text in (
        (torch.zeros(4), target, ValueError, r"shape \(N, K\), got \(4,\)"),
        (torch.zeros(4, 3, 2), target, ValueError, r"\(N, K\), got \(4, 3, 2\); flatten"),
        (logits, torch.zeros(5, dtype=torch.long), ValueError, r"shape \(4,\), got \(5,\)"),
        (logits, torch.zeros(4, 3), ValueError, "soft targets are not supported"),
        (logits, target.float(), TypeError, "expected integer class indices, got torch.float32"),
        (logits, target.bool(), TypeError, "got torch.bool"),
    ):
        with pytest.raises(error, match=text):
            LOSSES[kind](z, y)


@every_loss
def test_any_integer_dtype_of_targets(kind):
    logits, target = sample()
    for dtype in (torch.uint8, torch.int32, torch.int64):
        assert torch.equal(LOSSES[kind](logits, target.to(dtype)), LOSSES[kind](logits, target))


@pytest.mark.slow
@every_loss
def test_cost_is_that_of_cross_entropy(kind):
    """Forward and backward on 4096 x 1000 logits, interleaved; the fastest of each, since machines are shared."""
    logits, target = sample(4096, 1000, dtype=torch.float32)
    leaf = logits.requires_grad_()

    def seconds(loss):
        start = time.perf_counter()
        torch.autograd.grad(loss(leaf, target), leaf)
        return time.perf_counter() - start

    ours = theirs = math.inf
    for _ in range(100):
        ours, theirs = min(ours, seconds(LOSSES[kind])), min(theirs, seconds(F.cross_entropy))
    print(f"bisam-{kind}: {ours / theirs:.2f} x cross-entropy ({1e3 * ours:.1f} ms, {1e3 * theirs:.1f} ms)")
    assert ours <= 3.0 * theirs


# -- label smoothing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_the_torch_form_is_torch_cross_entropy(smoothing):
    logits, target = sample()
    ours = smoothed_cross_entropy(logits, target, smoothing, form="torch")
    by_hand = -(soft_targets(target, 5, smoothing) * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(ours, F.cross_entropy(logits, target, label_smoothing=smoothing), rtol=0, atol=0)
    torch.testing.assert_close(ours, by_hand)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_the_other_form_is_a_divergence_from_the_smoothed_labels(smoothing):
    """1 - s on the true class, s/(K-1) on each other one; value and gradient of F.kl_div."""
    logits, target = sample()
    labels = torch.full((16, 5), smoothing / 4, dtype=torch.float64).scatter_(1, target[:, None], 1 - smoothing)
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    ours = smoothed_cross_entropy(a, target, smoothing)
    theirs = F.kl_div(b.log_softmax(1), labels, reduction="batchmean")
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(a.grad, b.grad)
    if smoothing:
        at_minimum = smoothed_cross_entropy(labels.log(), target, smoothing)
        assert abs(float(at_minimum)) <= 1e-14


def test_the_forms_differ():
    logits, target = sample()
    assert smoothed_cross_entropy(logits, target) != smoothed_cross_entropy(logits, target, form="torch")


def test_bad_smoothing_is_refused():
    z, y = sample()
    for logits, target, options, text in (
        (z, y, {"smoothing": 1.0}, r"smoothing must be in \[0, 1\), got 1.0"),
        (z, y, {"smoothing": -0.1}, "smoothing must be in"),
        (z, y, {"smoothing": math.nan}, "smoothing must be in"),
        (z, y, {"form": "kl"}, "unknown form 'kl'; choose 'torch'"),
        (z[:, :1], y * 0, {}, "at least two classes"),
        (z, y[:3], {}, r"class indices of shape \(16,\), got \(3,\)"),
    ):
        with pytest.raises(ValueError, match=text):
            smoothed_cross_entropy(logits, target, **options)


# -- the trajectory loss ------------------------------------------------------------------------------------------


Z = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, -1.0]], dtype=torch.float64)
R = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, -2.0]], dtype=torch.float64)


def test_the_trajectory_loss_and_its_gradient_are_the_closed_forms():
    z, r = Z.clone().requires_grad_(), R.clone().requires_grad_()
    loss = trajectory(z, r)
    loss.backward()
    assert abs(loss.item() - 0.2640898739) < 1e-10
    torch.testing.assert_close(z.grad, 5 / 2 * (F.softmax(Z / 5, 1) - F.softmax(R / 5, 1)))
    assert [round(x, 4) for x in z.grad[0].tolist()] == [0.1440, -0.1768, 0.0328]
    assert r.grad is None
    assert float(trajectory(Z, Z)) == 0.0
    each = trajectory(Z[:, None], R[:, None], tau=2.0, reduction="none")
    p, q = F.softmax(R / 2, 1), F.softmax(Z / 2, 1)
    torch.testing.assert_close(each, 4 * (p * (p / q).log()).sum(1)[:, None])


def test_samples_without_a_reference_add_nothing():
    z = Z.clone().requires_grad_()
    loss = trajectory(z, R * torch.tensor([[1.0], [math.inf]]), known=torch.tensor([True, False]))
    loss.backward()
    assert torch.equal(loss, trajectory(Z, R, reduction="none")[0] / 2)
    assert z.grad[1].tolist() == [0, 0, 0] and z.grad[0].abs().min() > 0


def test_the_trajectory_loss_does_not_underflow_and_is_full_precision_under_autocast():
    assert float(trajectory(torch.tensor([[2000.0, 0.0]]), torch.tensor([[0.0, 2000.0]]), 1.0)) == 2000.0
    with torch.autocast("cpu", torch.bfloat16):
        low = trajectory(Z.bfloat16(), R.bfloat16())
    assert low.dtype == torch.float32 and abs(float(low) - 0.2640898739) < 1e-5


def test_the_trajectory_loss_says_what_it_takes():
    for words, call in {
        "tau must be a finite number above 0, got 0": lambda: trajectory(Z, R, 0),
        "tau must be a finite number above 0, got inf": lambda: trajectory(Z, R, math.inf),
        r"same shape, got \(2, 3\) and \(1, 3\)": lambda: trajectory(Z, R[:1]),
        r"known of shape \(2,\), got \(3,\)": lambda: trajectory(Z, R, known=torch.ones(3, dtype=torch.bool)),
        "'mean' or 'none', got 'sum'": lambda: trajectory(Z, R, reduction="sum"),
    }.items():
        with pytest.raises(ValueError, match=words):
            call()
    for words, call in {
        "a tensor of logits, got dict": lambda: trajectory({"logits": Z}, R),
        "a tensor of reference logits, got dict": lambda: trajectory(Z, {"logits": R}),
        r"known as a tensor of booleans, got torch\.int64": lambda: trajectory(Z, R, known=torch.tensor([1, 0])),
    }.items():
        with pytest.raises(TypeError, match=words):
            call()


# -- Criterion ----------------------------------------------------------------------------------------------------


class Callback:
    """Stands for the optimizer."""

    role = "ascent"
    losses = 0

    def current_pass(self):
        return PassView(self.role)

    def on_loss(self, outputs, target, loss, *, perturbed):
        self.losses += 1


def bound(name):
    callback, criterion = Callback(), flatmin.Criterion(nn.CrossEntropyLoss(label_smoothing=0.1))
    criterion.bind(callback, flatmin.compose(name))
    return callback, criterion


@pytest.mark.parametrize("name", ["bisam-log", "bisam-tanh"])
def test_in_an_ascent_pass_the_value_is_the_descent_loss_and_the_gradient_the_ascent_loss(name):
    callback, criterion = bound(name)
    logits, target = sample()
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = criterion(a, target)
    loss.backward()
    LOSSES[name.removeprefix("bisam-")](b, target).backward()
    assert torch.equal(loss.detach(), criterion.loss(logits, target))
    assert torch.equal(a.grad, b.grad)
    assert criterion.calls == callback.losses == 1


@pytest.mark.parametrize("scale", [1.0, 1024.0, 0.25])
def test_a_scaled_loss_scales_the_ascent_gradient(scale):
    """As gradient scaling or accumulation does."""
    _callback, criterion = bound("bisam-log")
    logits, target = sample()
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    (scale * criterion(a, target)).backward()
    (scale * bisam_log(b, target)).backward()
    assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize(
    "case", ["descent pass", "no grad", "unbound", "optimizer gone", "same loss", "copied", "pickled"]
)
def test_everywhere_else_it_is_the_plain_loss(case):
    callback, criterion = bound("sam" if case == "same loss" else "bisam-log")
    logits, target = sample()
    if case == "descent pass":
        callback.role = "descent"
    elif case == "unbound":
        criterion = flatmin.Criterion(nn.CrossEntropyLoss(label_smoothing=0.1))
    elif case == "optimizer gone":
        del callback
    elif case == "copied":
        criterion = copy.deepcopy(criterion)
    elif case == "pickled":
        criterion = pickle.loads(pickle.dumps(criterion))
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    plain = F.cross_entropy(b, target, label_smoothing=0.1)
    if case == "no grad":
        with torch.no_grad():
            loss = criterion(a, target)
        assert not loss.requires_grad
    else:
        loss = criterion(a, target)
        loss.backward()
        plain.backward()
        assert torch.equal(a.grad, b.grad)
    assert torch.equal(loss.detach(), plain.detach())


def test_evaluation_between_the_passes_of_a_real_optimizer_is_plain():
    torch.manual_seed(0)
    model, criterion = nn.Linear(6, 3), flatmin.Criterion(nn.CrossEntropyLoss())
    optimizer = flatmin.wrap(torch.optim.SGD(model.parameters(), lr=0.1), "bisam-log", criterion=criterion)
    x, y = torch.randn(8, 6), torch.randint(3, (8,))
    criterion(model(x), y).backward()
    with torch.no_grad():
        assert torch.equal(criterion(model(x), y), F.cross_entropy(model(x), y))
    with optimizer.perturbed():
        loss = criterion(model(x), y)
        assert torch.equal(loss, F.cross_entropy(model(x), y))
        loss.backward()
    optimizer.step()


def test_a_manual_loop_that_forgets_the_criterion_later_on_is_caught():
    """The check is of each update, not of the run so far."""
    torch.manual_seed(0)
    model, criterion = nn.Linear(6, 3), flatmin.Criterion(nn.CrossEntropyLoss())
    optimizer = flatmin.wrap(torch.optim.SGD(model.parameters(), lr=0.1), "bisam-log", criterion=criterion)
    x, y = torch.randn(8, 6), torch.randint(3, (8,))
    criterion(model(x), y).backward()
    with optimizer.perturbed():
        criterion(model(x), y).backward()
    optimizer.step()
    before = model.weight.detach().clone()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="this pass did not call it"), optimizer.perturbed():
        pytest.fail("the weights moved")
    assert torch.equal(model.weight, before)


def test_a_loss_that_is_not_finite_keeps_its_value_and_a_finite_ascent_gradient():
    """The value comes through as it is; no inf - inf on the way."""
    callback, criterion = Callback(), flatmin.Criterion(lambda z, y: F.cross_entropy(z, y) * math.inf)
    criterion.bind(callback, flatmin.compose("bisam-log"))
    logits, target = sample()
    logits.requires_grad_()
    loss = criterion(logits, target)
    loss.backward()
    assert math.isinf(float(loss.detach())) and torch.isfinite(logits.grad).all()


def test_it_wraps_a_callable():
    with pytest.raises(TypeError, match=r"needs a callable .*got float"):
        flatmin.Criterion(0.1)
    assert not list(flatmin.Criterion(F.cross_entropy).parameters())
