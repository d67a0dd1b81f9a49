"""What the engine remembers of the weights must not outlive its truth."""

import pytest
import torch

import flatmin
from flatmin.engine.tensors import Layout, all_finite, norm, reject


def make(dtype=torch.float32, sizes=((4, 3), (3,), (5, 3), (2,))):
    return [torch.nn.Parameter(torch.randn(s, dtype=dtype)) for s in sizes]


def quadratic(optimizer, weights):
    def closure():
        optimizer.zero_grad()
        loss = sum((w.double() ** 2).sum() for w in weights if w.requires_grad)
        loss.backward()
        return loss

    return closure


def test_joined_holds_every_entry_once():
    layout, weights = Layout([make()]), make()
    joined = layout.joined(weights)
    assert sorted(torch.cat([t.flatten() for t in joined]).tolist()) == sorted(
        torch.cat([w.flatten() for w in weights]).tolist()
    )


def test_norm_with_a_layout_is_the_norm_without():
    weights = make(torch.float64)
    torch.testing.assert_close(norm(weights, Layout([weights])), norm(weights), rtol=1e-14, atol=0)


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


def test_a_weight_frozen_between_steps_stays():
    weights = make()
    optimizer = flatmin.SAM(torch.optim.SGD(weights, lr=0.1), rho=0.5)
    optimizer.step(quadratic(optimizer, weights))
    weights[1].requires_grad_(False)
    before = weights[1].detach().clone()
    optimizer.step(quadratic(optimizer, weights))
    assert torch.equal(before, weights[1])


def test_parted_undoes_joined():
    weights = make()
    layout = Layout([weights])
    assert all(torch.equal(a, b) for a, b in zip(layout.parted(layout.joined(weights)), weights, strict=True))


def test_the_snapshot_is_never_written_over_while_weights_are_away():
    weights = make(torch.float64)
    optimizer = flatmin.SAM(torch.optim.SGD(weights, lr=0.0), rho=0.5)
    optimizer.step(quadratic(optimizer, weights))
    layout, before = optimizer._layout, [w.detach().clone() for w in weights]
    for w in weights:
        w.grad = torch.ones_like(w)
    with optimizer.perturbed():
        norm([torch.full_like(w, 7.0) for w in weights], layout)
        assert all_finite([torch.full_like(w, 7.0) for w in weights], layout)
        sum(w.sum() for w in weights).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes", [((4, 3), (3,), (5, 3), (2,)), ((200, 200), (3,))])
def test_reject_is_orthogonal_and_leaves_its_arguments(dtype, sizes):
    a, along = ([torch.randn(s, dtype=dtype) for s in sizes] for _ in range(2))
    kept = [t.clone() for t in (*a, *along)]
    rest, size = reject(a, along, Layout([[torch.nn.Parameter(t) for t in a]]))
    x, y, z = (torch.cat([t.flatten().double() for t in ts]) for ts in (a, along, rest))
    want = x - (x @ y) / (y @ y) * y
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(z, want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(size.double(), want.norm(), rtol=tolerance, atol=0)
    assert all(torch.equal(s, t) for s, t in zip(kept, (*a, *along), strict=True))
