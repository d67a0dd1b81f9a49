"""Weights in bf16 and fp16: the perturbation that is made has the asked one in it, and the way back is exact."""

import warnings

import pytest
import torch
from torch import nn

import flatmin
from flatmin.optim.tensors import add_rounded_
from tests.helpers import as_on_device, bits

LOW = [torch.bfloat16, torch.float16]
WARNING = r"weights in half precision: the perturbation has norm .* instead of .*, cosine"


def generator():
    return torch.Generator().manual_seed(0)


def spread(dtype):
    """Weights over the range of the dtype, zeros of both signs and subnormal numbers among them."""
    torch.manual_seed(0)
    sizes = [0.05 * torch.randn(4000), torch.randn(400), torch.zeros(100), -torch.zeros(100), torch.full((100,), 1e-7)]
    return torch.cat(sizes).to(dtype), torch.randn(4700).to(dtype)


@pytest.mark.parametrize("alpha", [1e-6, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("dtype", LOW)
def test_the_sum_is_one_of_the_two_neighbours_of_the_exact_sum(dtype, alpha):
    w, d = spread(dtype)
    exact = w.double() + d.float().mul(alpha).double()
    got = w.clone()
    add_rounded_([got], [d], alpha, generator())
    near = exact.float().to(dtype)
    assert torch.isfinite(got).all()
    # Nothing representable lies strictly between the result and the exact sum.
    middle = ((got.double() + exact) / 2).to(dtype).double()
    between = (middle - got.double()) * (exact - got.double()) > 0
    assert not (between & ((middle - got.double()).abs() < (exact - got.double()).abs() * 0.999)).any()
    # A sum that is representable is met.
    there = near.double() == exact
    assert torch.equal(got[there].double(), exact[there])


@pytest.mark.parametrize("dtype", LOW)
def test_the_mean_over_draws_is_the_exact_sum(dtype):
    w, d = spread(dtype)
    w, d, alpha, draws, source = w[:2000], d[:2000], 2e-5, 2000, generator()
    total = torch.zeros(2000, dtype=torch.float64)
    for _ in range(draws):
        moved = w.clone()
        add_rounded_([moved], [d], alpha, source)
        total += moved.double() - w.double()
    asked = d.double() * alpha
    projection = (total / draws) @ asked / (asked @ asked)
    assert projection == pytest.approx(1.0, abs=0.01)
    # Per entry: six standard errors of a draw between two neighbours, at the widest spacing near it.
    spacing = (w.float().abs() + asked.abs()).clamp(min=2.0**-14).log2().floor().exp2() * torch.finfo(dtype).eps
    assert ((total / draws - asked).abs() <= 6 * 0.5 * spacing / draws**0.5).all()


def test_many_tensors_are_rounded_as_one():
    w, d = spread(torch.bfloat16)
    whole, parts = w.clone(), list(w.clone().split(47))
    add_rounded_([whole], [d], 1e-3, generator())
    add_rounded_(parts, list(d.split(47)), 1e-3, generator())
    assert torch.equal(torch.cat(parts), whole)


class Net:
    """A net in low precision, large enough for averages, with its optimizer."""

    def __init__(self, dtype, rho=0.05, method="sam", device=False, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64), nn.Tanh(), nn.Linear(64, 4))
        self.model.to(dtype)
        base = torch.optim.SGD(self.model.parameters(), lr=options.pop("lr", 0.1), momentum=0.9)
        self.optimizer = flatmin.wrap(base, method, rho=rho, model=self.model, **options)
        as_on_device(self.optimizer, device)
        self.x, self.y = torch.randn(32, 64).to(dtype), torch.randint(4, (32,))

    def closure(self):
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(self.x).float(), self.y)
        loss.backward()
        return loss

    def weights(self):
        return [w.detach().clone() for w in self.model.parameters()]


def flat(tensors):
    return torch.cat([t.double().flatten() for t in tensors])


@pytest.mark.parametrize(("method", "device"), [("sam", False), ("asam", True), ("usam", True), ("vasso", False)])
@pytest.mark.parametrize("dtype", LOW)
def test_the_realised_perturbation_has_the_asked_one_in_it(dtype, method, device):
    """<made, asked> / ||asked||^2 within 5 % of one in the mean of some steps, the way back exact in each."""
    rho = {"asam": 0.5, "usam": 0.05, "sam": 0.05, "vasso": 0.05}[method]
    net = Net(dtype, rho, method, device, lr=0.0, diagnostics=True)
    before, found = bits(net.weights()), []
    for _ in range(8):
        net.optimizer.step(net.closure)
        found.append(net.optimizer.diagnostics())
        assert all(torch.equal(a, b) for a, b in zip(bits(net.weights()), before, strict=True))
    assert sum(f["epsilon_projection"] for f in found) / len(found) == pytest.approx(1.0, abs=0.05)
    assert all(0.0 < f["epsilon_unmoved"] < 1.0 for f in found)


@pytest.mark.filterwarnings("ignore:weights in half precision")
@pytest.mark.parametrize("dtype", LOW)
def test_what_is_reported_is_what_was_made(dtype):
    net, points = Net(dtype, lr=0.0, diagnostics=True), []

    def closure():
        points.append(net.weights())
        return net.closure()

    net.optimizer.step(closure)
    found = net.optimizer.diagnostics()
    reference = Net(dtype, lr=0.0)
    reference.closure()
    g = flat([w.grad for w in reference.model.parameters()])
    asked, made = 0.05 * g / g.norm(), flat(points[1]) - flat(points[0])
    want = {
        "epsilon_norm": made.norm(),
        "epsilon_asked": asked.norm(),
        "epsilon_projection": made @ asked / (asked @ asked),
        "epsilon_cosine": made @ asked / (made.norm() * asked.norm()),
        "epsilon_unmoved": ((made == 0) & (asked != 0)).double().mean(),
    }
    for name, value in want.items():
        assert found[name] == pytest.approx(float(value), rel=1e-3), name


@pytest.mark.filterwarnings("ignore:weights in half precision")
def test_draws_depend_on_seed_and_step_only():
    def points(seed, resume=False):
        net, seen = Net(torch.bfloat16, seed=seed), []

        def closure():
            seen.append(flat(net.weights()))
            return net.closure()

        for k in range(4):
            if resume and k == 2:
                saved = net.optimizer.state_dict(), net.model.state_dict()
                net = Net(torch.bfloat16, seed=seed)
                net.optimizer.load_state_dict(saved[0])
                net.model.load_state_dict(saved[1])
            net.optimizer.step(closure)
        return torch.stack(seen)

    assert torch.equal(points(1), points(1))
    assert torch.equal(points(1, resume=True), points(1))
    assert not torch.equal(points(2), points(1))


def test_the_loops_random_numbers_are_left_alone():
    net = Net(torch.bfloat16, rho=5.0)
    torch.manual_seed(3)
    net.optimizer.step(net.closure)
    drawn = torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4), drawn)


@pytest.mark.parametrize("dtype", LOW)
def test_a_norm_far_from_the_asked_one_is_warned_about_once(dtype):
    net = Net(dtype, rho={torch.bfloat16: 5e-3, torch.float16: 5e-4}[dtype])
    with pytest.warns(UserWarning, match=WARNING):
        net.optimizer.step(net.closure)
    net.optimizer.step(net.closure)


@pytest.mark.parametrize("dtype", [*LOW, torch.float32])
def test_a_norm_that_is_right_is_not(dtype):
    net = Net(dtype, rho=5.0)
    net.optimizer.step(net.closure)


@pytest.mark.parametrize("dtype", LOW)
def test_autocast_over_float32_weights_needs_no_rounding_of_its_own(dtype):
    """The weights' own digits below the spacing do what random rounding does."""
    net = Net(torch.float32)
    before, seen = net.weights(), []
    hook = net.model.register_forward_pre_hook(lambda *_: seen.append(net.weights()))

    def closure():
        net.optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = nn.functional.cross_entropy(net.model(net.x).float(), net.y)
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.optimizer.step(closure)
    hook.remove()
    asked = flat(seen[1]) - flat(before)
    # What the matrix products see are the rounded weights.
    made = flat([w.to(dtype) for w in seen[1]]) - flat([w.to(dtype) for w in before])
    assert asked.norm() == pytest.approx(0.05, rel=1e-3)
    assert made @ asked / (asked @ asked) == pytest.approx(1.0, abs=0.05)
    assert (made - asked).norm() > 1e-3 * asked.norm()


def test_a_direction_that_is_not_finite_moves_nothing():
    for device in (False, True):
        net, points = Net(torch.bfloat16, device=device), []

        def closure(net=net, points=points):
            points.append(flat(net.weights()))
            loss = net.closure()
            if len(points) == 1:
                for w in net.model.parameters():
                    w.grad.fill_(torch.inf)
            return loss

        net.optimizer.step(closure)
        assert torch.equal(points[0], points[1])


@pytest.mark.parametrize("device", [False, True])
def test_a_gradient_norm_beyond_the_range_of_fp16(device):
    """The quotient by it must not be taken in fp16, where it is infinite."""
    w = nn.Parameter(torch.ones(10000, dtype=torch.float16))
    optimizer = flatmin.wrap(torch.optim.SGD([w], lr=0.0), "sam", rho=50.0, diagnostics=True)
    as_on_device(optimizer, device)

    def closure():
        optimizer.zero_grad()
        loss = (w.float() * 1000).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.diagnostics()["epsilon_norm"] == pytest.approx(50.0, rel=1e-2)


@pytest.mark.filterwarnings("ignore:weights in half precision")
def test_draws_after_an_abort_are_those_of_the_step():
    def point(aborted):
        net, seen = Net(torch.bfloat16), []
        if aborted:
            net.closure()
            with net.optimizer.perturbed():
                net.closure()
            net.optimizer.abort()

        def closure():
            seen.append(flat(net.weights()))
            return net.closure()

        net.optimizer.step(closure)
        return seen[1]

    assert torch.equal(point(True), point(False))


@pytest.mark.filterwarnings("ignore:weights in half precision")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_saner_damps_small_entries(dtype):
    """r = 1/2 everywhere, at sizes whose product float16 cannot hold."""
    w, g = nn.Parameter(torch.zeros(16, dtype=dtype)), torch.linspace(5e-5, 2e-4, 16).to(dtype)
    optimizer, passes = flatmin.wrap(torch.optim.SGD([w], lr=1.0), "saner"), iter((g, g / 2))

    def closure():
        w.grad = next(passes).clone()
        return torch.zeros(())

    optimizer.step(closure)
    assert torch.equal(w.detach(), -(g / 2 * 0.5))


def test_bsam_keeps_its_scale_in_single_precision():
    """It changes by a thousandth a step, which bf16 would round away; in fp16 s N would be infinite, the noise 0."""
    ends = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        w = nn.Parameter(torch.linspace(-1, 1, 1000).to(dtype))
        optimizer = flatmin.wrap(torch.optim.SGD([w], lr=0.0), "bsam", rho=0.01, data_size=200_000, seed=0)
        points = []

        def closure(w=w, optimizer=optimizer, points=points):
            optimizer.zero_grad()
            points.append(w.detach().float().clone())
            loss = 0.1 * w.float().square().sum()
            loss.backward()
            return loss

        for _ in range(20):
            optimizer.step(closure)
        ends[dtype] = optimizer.state[w]["flatmin.combine.s"].float(), (points[0] - w.detach().float()).std()
    for dtype, (scale, noise) in ends.items():
        assert torch.allclose(scale, ends[torch.float32][0], rtol=1e-3)
        # Random rounding to bf16 is larger than this noise.
        assert dtype is torch.bfloat16 or float(noise) == pytest.approx(200_000**-0.5, rel=0.2)
    assert float(ends[torch.float32][0].max()) < 0.999


@pytest.mark.parametrize("size", [1e-4, 300.0])
def test_fisher_sam_in_fp16_where_the_square_of_the_gradient_leaves_its_range(size):
    moved = {}
    for dtype in (torch.float32, torch.float16):
        w = nn.Parameter(torch.zeros(2, dtype=dtype))
        optimizer = flatmin.wrap(torch.optim.SGD([w], lr=0.1), "fisher-sam", rho=1.0, eta=1.0)

        moved[dtype] = []

        def closure(w=w, dtype=dtype, seen=moved[dtype]):
            seen.append(w.detach().float().clone())
            w.grad = torch.tensor([size, size / 2], dtype=dtype)
            return w.sum()

        optimizer.step(closure)
    assert torch.allclose(moved[torch.float16][1], moved[torch.float32][1], rtol=0.01)
