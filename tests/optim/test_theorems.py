"""Identities that hold exactly, and limits that theory gives in closed form."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import flatmin
from flatmin.methods import Need
from tests.helpers import (
    BASES,
    ENTRY_POINTS,
    NAMES,
    as_on_device,
    batch,
    bits,
    drive,
    noisy_net,
    recipe_of,
    same_bits,
    train,
    wrap_fitting,
)

# -- special cases of one method in another ----------------------------------------------------------------------


def weights_after(steps, name, signs=False, base="sgd", **params):
    """The weights of a float32 net after some steps; with signs, it starts at +-1."""
    model = noisy_net()
    if signs:
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.where(p < 0, -1.0, 1.0))
    criterion = flatmin.Criterion(nn.CrossEntropyLoss())
    optimizer = flatmin.wrap(BASES[base](model.parameters()), name, rho=0.1, model=model, criterion=criterion, **params)
    train(model, optimizer, criterion, range(steps))
    return [p.detach() for p in model.parameters()]


def test_asam_is_sam_where_every_weight_is_one_in_size():
    """T = |w| = 1 holds for the first step only."""
    assert same_bits(weights_after(1, "asam", signs=True), weights_after(1, "sam", signs=True))
    assert not same_bits(weights_after(2, "asam", signs=True), weights_after(2, "sam", signs=True))


def test_asam_does_not_notice_a_rescaling_that_keeps_the_function():
    """Halving one layer and doubling the next moves ASAM's perturbed loss by nothing, and SAM's by much."""
    x, y = batch(0, dtype=torch.float64)

    def perturbed_loss(name, scale):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)).double()
        with torch.no_grad():
            model[0].weight.mul_(scale)
            model[2].weight.div_(scale)
        optimizer = flatmin.wrap(torch.optim.SGD(model.parameters(), lr=0.0), name, rho=0.5)
        losses = []

        def backward():
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            losses.append(loss.item())
            return loss

        drive(optimizer, backward)
        return losses[1]

    assert perturbed_loss("asam", 0.5) == pytest.approx(perturbed_loss("asam", 1.0), rel=1e-12)
    assert abs(perturbed_loss("sam", 0.5) - perturbed_loss("sam", 1.0)) > 1e-3


class Context:
    """What a mask asks of a step."""

    @staticmethod
    def norm(tensors):
        return torch.cat([t.flatten() for t in tensors]).norm()


def displacement(gradient, name, rho=0.1, **params):
    """Where a method climbs to on a linear loss with this gradient, seen from w."""
    w = torch.zeros(len(gradient), dtype=torch.float64, requires_grad=True)
    g = torch.tensor(gradient, dtype=torch.float64)
    optimizer = flatmin.wrap(torch.optim.SGD([w], lr=0.1), name, rho=rho, **params)
    seen = []

    def closure():
        seen.append(w.detach().clone())
        w.grad = g.clone()
        return g @ w.detach()

    optimizer.step(closure)
    return g, seen[1]


def test_fisher_sam_climbs_to_the_edge_of_the_ellipsoid():
    """<eps, F eps> = rho^2, and no other point of the edge has a larger <g, eps>; by hand for one gradient."""
    g, eps = displacement([3.0, -0.5, 0.1], "fisher-sam")
    assert eps.tolist() == pytest.approx([0.028476010, -0.037968013, 0.009398023], abs=5e-10)
    fisher = 1 + g**2
    assert float(eps @ (fisher * eps)) == pytest.approx(0.01, rel=1e-12)
    others = torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    others *= 0.1 / (fisher * others**2).sum(1, keepdim=True).sqrt()
    assert float((others @ g).max()) < float(g @ eps)
    _, eps = displacement([3.0, -0.5, 0.1], "fisher-sam", norm="euclid")
    assert eps.tolist() == pytest.approx([0.058857147, -0.078476196, 0.019424801], abs=5e-10)
    assert float(eps.norm()) == pytest.approx(0.1, rel=1e-12)


def test_fisher_sam_in_half_precision_notices_what_its_square_would_lose():
    """g^2 = 1e-8 is 0 in half precision; eta g^2 = 1 is not."""
    w = torch.zeros(2, dtype=torch.float16, requires_grad=True)
    g = torch.tensor([3e-4, 1e-4], dtype=torch.float16)
    optimizer = flatmin.wrap(torch.optim.SGD([w], lr=0.0), "fisher-sam", rho=1.0, eta=1e8)
    seen = []

    def closure():
        seen.append(w.detach().clone())
        w.grad = g.clone()
        return w.sum()

    optimizer.step(closure)
    assert float(seen[1][0] / seen[1][1]) == pytest.approx(3 * (1 + 1) / (1 + 9), rel=0.02)


def test_sagm_without_alpha_is_gnp_and_stays_at_w_where_alpha_is_rho_over_the_gradient():
    assert same_bits(weights_after(3, "sagm", alpha=0.0), weights_after(3, "gnp", alpha=0.5))
    g, eps = displacement([3.0, -4.0], "sagm", alpha=0.1 / 5.0)
    assert float(eps.abs().max()) <= 1e-17
    _, eps = displacement([3.0, -4.0], "sagm", alpha=0.05)
    assert torch.allclose(eps, (0.1 / 5.0 - 0.05) * g, rtol=0, atol=1e-12)  # downhill


def test_zsharp_moves_vectors_as_sam_does_and_of_a_matrix_all_but_the_smallest_at_q_0():
    """One matrix has the same displacement in both forms: there is one norm to take."""
    _, eps = displacement([3.0, -0.5, 0.1], "zsharp")
    assert same_bits(eps, displacement([3.0, -0.5, 0.1], "sam")[1])
    g = torch.tensor([[1.0, 2.0, 4.0], [-3.0, 0.0, 8.0]], dtype=torch.float64)  # its mean is 2
    for q, kept in ((0.0, g != 2.0), (0.5, (g - 2).abs() > 2.0), (0.9, g == 8.0)):
        for per_tensor in (False, True):
            factors, _ = flatmin.methods.ZScore(q=q, per_tensor=per_tensor)([g], {}, Context())
            moved = factors[0] * g
            assert torch.allclose(moved / moved.norm(), g * kept / (g * kept).norm(), rtol=0, atol=1e-15)
            assert not per_tensor or float(moved.norm()) == pytest.approx(float(g.norm()), rel=1e-14)
    # Nothing lies above the quantile of equal entries: they all move.
    assert flatmin.methods.ZScore()([torch.ones(2, 3)], {}, Context())[0][0].tolist() == torch.ones(2, 3).tolist()


def test_cr_sam_on_a_quadratic_adds_the_curvature_along_eps():
    """u = g_s + 2 beta H eps, whatever gamma is: there is no third order."""
    half = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h, start = half @ half.T, torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    w = start.clone().requires_grad_()
    optimizer = flatmin.wrap(torch.optim.SGD([w], lr=1.0), "cr-sam", rho=0.1, gamma=3.0, beta=0.7)
    told = []

    def closure():
        w.grad = h @ w.detach()
        told.append(float(w.detach() @ h @ w.detach()) / 2)
        return torch.tensor(told[-1])

    optimizer.step(closure)
    g = h @ start
    eps = 0.1 * g / g.norm()
    assert torch.allclose(start - w.detach(), g + h @ eps + 2 * 0.7 * h @ eps, rtol=0, atol=1e-11)
    assert len(told) == 3 and told[1] < told[0] < told[2]  # w + eps comes last


def imbsam_after(steps, tail, weight=1.0, name="imbsam", rho=0.1):
    """The weights of a net without random parts; the classes in `tail` are ImbSAM's, for others there is one loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    optimizer = flatmin.wrap(BASES["sgd"](model.parameters()), name, rho=rho, model=model)
    for k in range(steps):
        x, y = batch(k, dtype=torch.float64)
        inside = sum(y == c for c in tail) if tail else torch.zeros(len(y))

        def closure(factors, x=x, y=y):
            optimizer.zero_grad()
            loss = (nn.functional.cross_entropy(model(x), y, reduction="none") * factors).mean()
            loss.backward()
            return loss

        parts = [lambda f=f: closure(f) for f in (1.0 - 1.0 * inside, weight * inside)]
        optimizer.step(parts if name == "imbsam" else lambda: closure(torch.ones(())))
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_imbsam_is_the_base_without_a_radius_or_a_tail_and_sam_without_a_head():
    """With the tail counted once; and otherwise something between."""
    base, sam = (imbsam_after(4, (), name=name) for name in ("sgd", "sam"))
    for found, known in (
        (imbsam_after(4, (2,), rho=0.0), base),
        (imbsam_after(4, ()), base),
        (imbsam_after(4, (0, 1, 2)), sam),
    ):
        assert torch.allclose(found, known, rtol=0, atol=1e-13)
    some = imbsam_after(4, (2,))
    assert min(float((some - known).abs().max()) for known in (base, sam)) > 1e-4


def test_imbsam_counts_the_head_once_where_closures_leave_the_gradients_of_the_pass_before():
    """A step at w has two passes, of which the second begins without gradients."""
    w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    optimizer = flatmin.wrap(torch.optim.SGD([w], lr=1.0), "imbsam", rho=0.0)

    def closure(slope):
        loss = slope * w.sum()
        loss.backward()
        return loss

    optimizer.step([lambda: closure(3.0), lambda: closure(10.0)])
    assert w.tolist() == [1.0 - 13.0, 2.0 - 13.0]


COMBINING = (
    "gsam",
    "wsam",
    "gnp",
    "sagm",
    "cr-sam",
    "looksam",
    "saner",
    "sam-direction",
    "sam-magnitude",
    "sgdhess",
    "n-step",
    "c-flat",
    "eigen-sam",
)


@pytest.mark.parametrize("name", COMBINING)
def test_a_loss_without_curvature_is_the_base(name):
    """Where the loss is linear g_s is g: nothing is orthogonal, nothing shrinks, and H is 0."""
    ends = []
    for method in (name, "sgd"):
        model = noisy_net()
        optimizer = flatmin.wrap(BASES["sgd"](model.parameters()), method, rho=0.3, model=model)

        def backward(model=model, optimizer=optimizer):
            loss = sum((p * torch.linspace(-1, 1, p.numel()).view_as(p)).sum() for p in model.parameters())
            optimizer.backward(loss)
            return loss

        for _ in range(8):
            drive(optimizer, backward)
        ends.append([p.detach() for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("name", ["functional-sam", "functional-sam+vasso"])
def test_functional_sam_is_the_base_where_the_outputs_are_linear_in_the_weights(name):
    """The Jacobian is the same everywhere, and the slope of the loss is that at w; SAM is another method there."""
    ends = {}
    for method in (name, "sgd", "sam"):
        torch.manual_seed(0)
        model, criterion = nn.Linear(4, 3).double(), flatmin.Criterion(nn.CrossEntropyLoss())
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = flatmin.wrap(base, method, rho=0.7, criterion=criterion)
        for k in range(6):
            x, y = batch(k, dtype=torch.float64)

            def backward(model=model, criterion=criterion, x=x, y=y):
                loss = criterion(model(x[:, :4]), y)
                loss.backward()
                return loss

            drive(optimizer, backward, "perturbed" if method == name else "closure")
        ends[method] = model.weight.detach()
    assert torch.allclose(ends[name], ends["sgd"], rtol=0, atol=1e-14)
    assert not torch.allclose(ends["sam"], ends["sgd"], rtol=0, atol=1e-3)


def test_bsam_without_noise_averages_and_scale_is_usam_on_plain_sgd():
    still = {"data_size": math.inf, "beta1": 0.0, "beta2": 1.0, "delta": 0.0}
    ends = []
    for method, params in (("bsam", still), ("usam", {})):
        model = noisy_net()
        optimizer = flatmin.wrap(torch.optim.SGD(model.parameters(), lr=0.1), method, rho=0.1, model=model, **params)
        train(model, optimizer, flatmin.Criterion(nn.CrossEntropyLoss()), range(6))
        ends.append([p.detach() for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*ends, strict=True))


# -- limits with constant step size and radius --------------------------------------------------------------------


def minimise(curvature, name, t, rho, steps, start, device=False, **params):
    """Full-gradient steps on f(x) = 1/2 sum_i a_i x_i^2; the last two iterates."""
    x = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    a = torch.tensor(curvature, dtype=torch.float64)
    optimizer = flatmin.wrap(torch.optim.SGD([x], lr=t), name, rho=rho, **params)
    as_on_device(optimizer, device)

    def closure():
        x.grad = a * x.detach()
        return 0.5 * (a * x.detach() ** 2).sum()

    for _ in range(steps - 1):
        optimizer.step(closure)
    last_but_one = x.detach().clone()
    optimizer.step(closure)
    return last_but_one, x.detach().clone()


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize(("t", "rho", "orbit"), [(0.1, 0.1, 1 / 90), (0.01, 0.1, 1e-3 / 0.99), (0.3, 0.5, 0.15 / 0.7)])
def test_sam_on_a_parabola_ends_on_an_orbit_of_two_points(t, rho, orbit, device):
    """f(x) = x^2: |x| = t rho / (1 - t), with alternating sign; never 0."""
    assert orbit == pytest.approx(t * rho / (1 - t), rel=1e-15)
    before, after = minimise([2.0], "sam", t, rho, round(15 / t), [1.0], device)
    assert abs(abs(float(after)) - orbit) <= 1e-10
    assert abs(float(before) + float(after)) <= 1e-10


@pytest.mark.parametrize(
    ("name", "params"), [("sam", {}), ("vasso", {"theta": 0.4}), ("fsam", {"sigma": 1.0, "lam": 0.6})]
)
def test_normalised_methods_stop_at_a_distance_from_the_minimum(name, params):
    """On a quadratic |x - x*| -> t rho L / (2 - t L), along the top eigenvector: 0.025 here."""
    t, rho, top = 0.1, 0.1, 4.0
    _, x = minimise([1.0, top], name, t, rho, 600, [1.0, 1.0], **params)
    assert abs(float(x.norm()) - t * rho * top / (2 - t * top)) <= 1e-10
    assert abs(float(x[0])) <= 1e-10


@pytest.mark.parametrize("name", ["sgd", "usam"])
def test_the_base_and_the_unnormalised_method_reach_the_minimum(name):
    _, x = minimise([1.0, 4.0], name, 0.1, 0.1, 600, [1.0, 1.0])
    assert float(x.norm()) <= 1e-14


# -- lr = 0 is the identity, whatever happens ---------------------------------------------------------------------


class Planned(Exception):
    """Raised on purpose."""


class Branches(nn.Module):
    """The sum of some of its branches; a branch that is off gets no gradient."""

    def __init__(self, count, dtype):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 3)) for _ in range(count)
        ).to(dtype)

    def forward(self, x, on):
        return sum(branch(x) for branch, used in zip(self.branches, on, strict=True) if used)


FAILURES = (
    "none",
    "raise in 1",
    "raise in 2",
    "raise in base",
    "nan in 1",
    "nan in 2",
    "no backward in 1",
    "no backward in 2",
)


@st.composite
def plans(draw):
    count = draw(st.integers(1, 3))
    on = st.lists(st.booleans(), min_size=count, max_size=count).filter(any)
    step = st.tuples(st.sampled_from(ENTRY_POINTS), on, on, st.sampled_from(FAILURES))
    return {
        "count": count,
        "name": draw(st.sampled_from(NAMES)),
        "base": draw(st.sampled_from(sorted(BASES))),
        "rhos": draw(st.lists(st.sampled_from([0.0, 0.05, 3.0]), min_size=count, max_size=count)),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
        "device": draw(st.booleans()),
        "fused": draw(st.booleans()),
        "steps": draw(st.lists(step, min_size=1, max_size=4)),
    }


@settings(max_examples=120, deadline=None, derandomize=True)
@given(plans())
def test_lr_zero_is_the_identity_bit_for_bit(plan):
    """Over missing gradients, exceptions in either pass or in the base, bad gradients, every entry point and method.

    BatchNorm counts show that statistics were touched by each step's first forward only.
    """
    torch.manual_seed(0)
    model = Branches(plan["count"], plan["dtype"])
    groups = [{"params": list(b.parameters()), "rho": r} for b, r in zip(model.branches, plan["rhos"], strict=True)]
    criterion = flatmin.Criterion(nn.CrossEntropyLoss())
    base = BASES[plan["base"]](groups, lr=0.0, fused=plan["fused"])
    optimizer = wrap_fitting(base, recipe_of(plan["name"], names="branches.0.*"), model=model, criterion=criterion)
    chunked = Need.MICRO_BATCHES in optimizer.recipe.needs
    as_on_device(optimizer, plan["device"])
    start = bits(model.parameters())
    seen = [0] * plan["count"]

    for k, (entry, first, second, failure) in enumerate(plan["steps"]):
        x, y = batch(k, dtype=plan["dtype"])
        calls = []

        if entry in ("perturbed", "two calls") and not optimizer.recipe.two_pass:
            entry = "passes"

        def backward(chunk=None, first=first, second=second, failure=failure, x=x, y=y, calls=calls):
            calls.append(1)
            here = len(calls)
            if here == 1:
                seen[:] = [n + used for n, used in zip(seen, first, strict=True)]
            loss = criterion(model(x, first if here == 1 else second), y)
            if failure == f"nan in {here}":
                loss = loss * math.nan
            if failure != f"no backward in {here}":
                optimizer.backward(loss)
            if failure == f"raise in {here}":
                raise Planned
            return loss

        def fail(*_):
            raise Planned

        handle = base.register_step_pre_hook(fail) if failure == "raise in base" else None
        try:
            drive(optimizer, backward, entry)
        except Planned:
            assert failure.startswith("raise")
        except RuntimeError as error:
            assert failure.startswith("no backward"), error
            assert "gradient" in str(error) or "second derivatives" in str(error)
        if handle is not None:
            handle.remove()
        optimizer.zero_grad()
        assert all(map(torch.equal, bits(model.parameters()), start))
        # Micro-batches are each seen once at w.
        assert chunked or [int(b[1].num_batches_tracked) for b in model.branches] == seen
        assert all(b[1].track_running_stats for b in model.branches)


# -- restore after an exception, with a base that would move -------------------------------------------------------


def everything(model, optimizer):
    """Weights and all that the optimizer remembers."""
    return {"weights": [p.detach().clone() for p in model.parameters()], "optimizer": optimizer.state_dict()}


@pytest.mark.parametrize("where", ["pass 1", "pass 2", "base"])
@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_an_exception_leaves_no_trace_and_the_next_step_is_as_if_it_had_not_been(entry, where):
    """Weights, base state and recipe state stay bit for bit; the following step equals that of an untroubled twin.

    In every entry point; in closures every method does so in `test_every_method.py`.
    """
    error = KeyboardInterrupt if where == "pass 2" else Planned
    model, twin = noisy_net(), noisy_net()
    loss_fn = nn.CrossEntropyLoss()
    optimizers = []
    for m in (model, twin):
        optimizers.append(flatmin.wrap(BASES["sgd"](m.parameters()), "vasso", rho=0.2, model=m))
        as_on_device(optimizers[-1], entry in ("passes", "two calls"))
        torch.manual_seed(1)
        train(m, optimizers[-1], loss_fn, range(2))
    optimizer, other = optimizers
    before = everything(model, optimizer)
    calls = []

    def backward():
        calls.append(1)
        loss = loss_fn(model(batch(2)[0]), batch(2)[1])
        loss.backward()
        if where == f"pass {len(calls)}":
            raise error
        return loss

    def fail(*_):
        raise error

    handle = optimizer.register_step_pre_hook(fail) if where == "base" else None
    with pytest.raises(error):
        drive(optimizer, backward, entry)
    if handle is not None:
        handle.remove()
    assert same_bits(everything(model, optimizer), before)

    # The failed step's first forward has been seen by BatchNorm; weights and dropout masks go on as before.
    model.load_state_dict(twin.state_dict())
    optimizer.zero_grad()
    for m, o in ((model, optimizer), (twin, other)):
        torch.manual_seed(2)
        train(m, o, loss_fn, range(2, 4), entry=entry)
    assert same_bits(everything(model, optimizer), everything(twin, other))
    assert same_bits(model.state_dict(), twin.state_dict())
    assert optimizer.counts()["updates"] == 4


@pytest.mark.parametrize("entry", ["closure", "passes"])
def test_the_random_stream_goes_on_after_a_step_as_after_one_forward(entry):
    """Both passes draw the same numbers, so a step consumes what one forward does."""
    model = noisy_net()
    optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model)
    torch.manual_seed(3)
    model(batch(0)[0])
    expected = torch.get_rng_state()
    torch.manual_seed(3)
    train(model, optimizer, nn.CrossEntropyLoss(), range(1), entry=entry)
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("name", ["sam", "vasso", "asam"])
def test_a_gradient_that_is_not_finite_in_pass_1_gives_no_ascent_and_no_memory(name, device):
    """The step is then the base's own; the direction's memory does not learn from it."""
    model, plain_model = noisy_net(), noisy_net()
    optimizer = flatmin.wrap(BASES["sgd"](model.parameters()), name, rho=0.2, model=model)
    as_on_device(optimizer, device)
    plain = BASES["sgd"](plain_model.parameters())
    loss_fn, (x, y) = nn.CrossEntropyLoss(), batch(0)
    calls = []

    def backward():
        calls.append(1)
        loss = loss_fn(model(x), y)
        (loss * (math.inf if len(calls) == 1 else 1.0)).backward()
        return loss

    torch.manual_seed(1)
    drive(optimizer, backward)
    torch.manual_seed(1)
    loss_fn(plain_model(x), y).backward()
    plain.step()
    assert same_bits(model.state_dict(), plain_model.state_dict())
    assert optimizer.counts() == {"updates": 1, "nonfinite_ascents": 1, "skipped_steps": 0}
    own = [v for entries in optimizer.state_dict()["state"].values() for k, v in entries.items() if "filled" in str(k)]
    assert not any(map(bool, own))


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["plain", "fused"])
@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("name", ["sam", "vasso"])
def test_a_gradient_that_is_not_finite_in_pass_2_skips_the_step(name, device, options):
    model = noisy_net()
    optimizer = flatmin.wrap(BASES["sgd"](model.parameters(), **options), name, rho=0.2, model=model)
    as_on_device(optimizer, device)
    loss_fn = nn.CrossEntropyLoss()
    train(model, optimizer, loss_fn, range(2))
    before = everything(model, optimizer)
    calls = []

    def backward():
        calls.append(1)
        loss = loss_fn(model(batch(2)[0]), batch(2)[1])
        (loss * (math.inf if len(calls) == 2 else 1.0)).backward()
        return loss

    drive(optimizer, backward)
    after = everything(model, optimizer)
    assert after["optimizer"]["param_groups"][0].pop("flatmin.step") == 3
    before["optimizer"]["param_groups"][0].pop("flatmin.step")
    assert same_bits(after, before)
    assert optimizer.counts() == {"updates": 3, "nonfinite_ascents": 0, "skipped_steps": 1}
