"""What the engine remembers of the weights must not outlive its truth."""

import copy
import dataclasses
import math
from typing import ClassVar

import pytest
import torch
from torch import nn

import flatmin
from flatmin.methods import Direction
from flatmin.optim.tensors import Layout, add_scaled, all_finite, norm, share
from tests.helpers import as_on_device, same_bits
from tests.optim.loops import train


def make(dtype=torch.float32, sizes=((4, 3), (3,), (5, 3), (2,))):
    return [torch.nn.Parameter(torch.randn(s, dtype=dtype)) for s in sizes]


def quadratic(optimizer, weights):
    def closure():
        optimizer.zero_grad()
        loss = sum((w.double() ** 2).sum() for w in weights if w.requires_grad)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_entry_is_found(bad):
    weights = [w.detach() for w in make()]
    layout = Layout([[torch.nn.Parameter(w) for w in weights]])
    assert all_finite(weights, layout)
    weights[2][1, 1] = bad
    assert not all_finite(weights, layout)


def test_a_sum_that_overflows_is_not_a_bad_entry():
    weights = [torch.full((4, 3), 3e38), torch.full((5, 3), 3e38)]
    assert all_finite(weights, Layout([[torch.nn.Parameter(w) for w in weights]]))


def test_the_norm_of_a_large_weight_is_right_to_float32():
    w = torch.randn(1 << 23, generator=torch.Generator().manual_seed(0))
    assert abs(float(norm([w, w[:5]])) / float(torch.cat([w, w[:5]]).double().norm()) - 1.0) < 1e-6


def come_back(dtype, sizes):
    weights, away = make(dtype, sizes), []
    optimizer = flatmin.SAM(torch.optim.SGD(weights, lr=0.0), rho=0.5)
    before = [w.detach().clone() for w in weights]

    def closure():
        away.append(weights[0].detach().clone())
        optimizer.zero_grad()
        loss = sum(w.abs().double().square().sum() for w in weights)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert all(map(torch.equal, before, weights)) and not torch.equal(away[0], away[1])


@pytest.mark.filterwarnings("ignore:weights in half precision")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex128])
def test_weights_come_back_bit_for_bit(dtype):
    for sizes in (((4, 3), (3,)), ((200, 100), (3,)), ((), (3,))):
        come_back(dtype, sizes)


@pytest.mark.filterwarnings("ignore:weights in half precision")
@pytest.mark.parametrize("one", [0, 3])
def test_a_weight_widened_between_steps_is_restored_bit_for_bit(one):
    weights = make(torch.bfloat16)
    optimizer = flatmin.SAM(torch.optim.SGD(weights, lr=0.0), rho=0.5)
    optimizer.step(quadratic(optimizer, weights))
    weights[one].data = torch.randn_like(weights[one], dtype=torch.float32)
    before = [w.detach().clone() for w in weights]
    optimizer.step(quadratic(optimizer, weights))
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))


def test_a_weight_unfrozen_between_steps_is_trained():
    weights = make()
    weights[1].requires_grad_(False)
    optimizer = flatmin.SAM(torch.optim.SGD(weights, lr=0.1), rho=0.5)
    before = weights[1].detach().clone()
    optimizer.step(quadratic(optimizer, weights))
    assert torch.equal(before, weights[1])
    weights[1].requires_grad_(True)
    optimizer.step(quadratic(optimizer, weights))
    assert not torch.equal(before, weights[1])


@pytest.mark.parametrize("method", ["sam", "rsam", "sgdhess"])
def test_a_weight_frozen_between_steps_stays(method):
    """In every pass: no draw moves it, and no second derivative is asked of it."""
    weights, seen = make(), []
    optimizer = flatmin.wrap(torch.optim.SGD(weights, lr=0.1), method, rho=0.5)

    def closure():
        seen.append(weights[1].detach().clone())
        optimizer.zero_grad()
        loss = sum((w.double() ** 2).sum() for w in weights)
        optimizer.backward(loss)
        return loss

    optimizer.step(closure)
    weights[1].requires_grad_(False)
    before = weights[1].detach().clone()
    seen.clear()
    optimizer.step(closure)
    assert all(torch.equal(before, at) for at in (*seen, weights[1]))


def test_a_weight_that_joins_the_optimizer_takes_part_in_ascents():
    """Before, its gradient was taken for that of another optimizer's weight; no model tells of it."""
    a, b, seen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2)), []
    optimizer = flatmin.SAM(torch.optim.SGD([a], lr=0.1), rho=0.5)

    def closure():
        seen.append(b.detach().clone())
        optimizer.zero_grad()
        loss = a.square().sum() + b.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.add_param_group({"params": [b]})
    seen.clear()
    optimizer.step(closure)
    assert not torch.equal(seen[1], seen[0]) and not torch.equal(b, seen[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes", [((4, 3), (3,), (5, 3), (2,)), ((200, 200), (3,))])
def test_what_is_left_of_a_projection_is_orthogonal(dtype, sizes):
    a, along = ([torch.randn(s, dtype=dtype) for s in sizes] for _ in range(2))
    kept = [t.clone() for t in (*a, *along)]
    rest = add_scaled(a, along, -share(a, along), Layout([[nn.Parameter(t) for t in a]]), spent=False)
    x, y, z = (torch.cat([t.flatten().double() for t in ts]) for ts in (a, along, rest))
    want = x - (x @ y) / (y @ y) * y
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(z, want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(norm(rest).double(), want.norm(), rtol=tolerance, atol=0)
    assert all(torch.equal(s, t) for s, t in zip(kept, (*a, *along), strict=True))


def small_looksam():
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6))).double()
    return net, flatmin.wrap(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), "looksam", k=2)


def slots_of(net, optimizer):
    return [optimizer.state[w]["flatmin.combine.sharp"] for w in net.parameters()]


def test_memory_survives_a_checkpoint_and_a_change_of_the_weights():
    net, optimizer = small_looksam()
    train(net, optimizer, 3)
    other, resumed = small_looksam()
    other.load_state_dict(net.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch would share the momentum
    copied = copy.deepcopy((net, optimizer))
    for pair in ((net, optimizer), (other, resumed), copied):
        train(*pair, 5)
    for pair in ((other, resumed), copied):
        for a, b in zip(
            [*net.parameters(), *slots_of(net, optimizer)], [*pair[0].parameters(), *slots_of(*pair)], strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    # A frozen weight keeps its memory, the others go on.
    net[0].weight.requires_grad_(False)
    kept = slots_of(net, optimizer)[0].clone()
    train(net, optimizer, 3)
    assert torch.equal(slots_of(net, optimizer)[0], kept)
    assert not torch.equal(slots_of(net, optimizer)[2], slots_of(other, resumed)[2])


@pytest.mark.parametrize("spoiled", [float("nan"), float("inf"), 1e308])
def test_a_gradient_that_is_not_finite_is_refused_without_an_ascent_too(spoiled):
    net, optimizer = small_looksam()
    train(net, optimizer, 1)
    before = [w.detach().clone() for w in net.parameters()]

    def closure():
        optimizer.zero_grad()
        loss = (net(torch.ones(2, 4, dtype=torch.float64)) ** 2).sum()
        loss.backward()
        net[3].bias.grad.fill_(spoiled)
        return loss

    optimizer.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))


def test_memory_that_is_not_finite_does_not_reach_the_weights():
    """Finite gradients whose inner product overflows leave an infinity in what LookSAM keeps; 0 times it is nan."""
    weights = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(3, 4))]
    optimizer = flatmin.wrap(torch.optim.SGD(weights, lr=0.1), "looksam", k=3)
    scale = [1e15, 1e25]

    def closure():
        optimizer.zero_grad()
        for w in weights:
            w.grad = torch.full_like(w, scale[0])
        scale[:] = scale[1:] or [1.0]
        return torch.tensor(0.0)

    for _ in range(3):
        optimizer.step(closure)
    assert all(w.isfinite().all() for w in weights)


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize(("name", "options"), [("looksam", {"k": 1}), ("bsam", {"data_size": 100})])
def test_a_gradient_at_w_that_is_not_finite_beside_the_ascent_leaves_no_memory(name, options, device):
    """Of weights that do not move the ascent's norm says nothing, and pass 2 may be finite: the step is taken."""
    moved, still = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    base = torch.optim.SGD([{"params": [moved]}, {"params": [still], "rho": 0.0}], lr=0.1)
    optimizer = as_on_device(flatmin.wrap(base, name, rho=0.1, **options), device)

    def update(spoiled):
        passes = iter((spoiled, 1.0))

        def closure():
            moved.grad, still.grad = moved.detach() * 2, still.detach() * next(passes)
            return torch.tensor(0.0)

        optimizer.step(closure)
        return copy.deepcopy(optimizer.state_dict()["state"])

    kept, before = update(1.0), still.detach().clone()
    assert same_bits(update(math.nan), kept)
    assert not torch.equal(still, before) and optimizer.counts()["skipped_steps"] == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lazy(Direction):
    """Keeps what it was given first, and gives back the very state that it is shown; one number beside each tensor."""

    slots: ClassVar = {"first": "param", "size": "param"}

    def __call__(self, g, state, c):
        seen = all(s is not None for s in state["first"])
        first = state["first"] if seen else [x.clone() for x in g]
        return g, {"first": first, "size": [x.norm().reshape(1) for x in g]}


def test_memory_that_is_given_back_or_of_another_shape():
    net, _ = small_looksam()
    recipe = dataclasses.replace(flatmin.compose("sam"), direction=Lazy())
    optimizer = flatmin.wrap(torch.optim.SGD(net.parameters(), lr=0.1), recipe)
    train(net, optimizer, 1)
    first = [optimizer.state[w]["flatmin.direction.first"].clone() for w in net.parameters()]
    train(net, optimizer, 3)
    for w, kept in zip(net.parameters(), first, strict=True):
        assert torch.equal(optimizer.state[w]["flatmin.direction.first"], kept)
        assert optimizer.state[w]["flatmin.direction.size"].shape == (1,)
