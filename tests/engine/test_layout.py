"""What the engine remembers of the weights must not outlive its truth."""

import pytest
import torch

import flatmin
from flatmin.engine.tensors import Layout, all_finite, norm


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
