"""`clip_norm`: what the base takes is scaled down to a norm, in every loop."""

import pytest
import torch
from torch import nn

import flatmin
from tests.helpers import BASES, ENTRY_POINTS, as_on_device, batch, bits, drive, noisy_net


def train(entry, by_hand, clip=0.3, method="sam", device=False, **options):
    model = noisy_net()
    optimizer = flatmin.wrap(
        BASES["sgd"](model.parameters()), method, rho=0.1, model=model, clip_norm=None if by_hand else clip, **options
    )
    as_on_device(optimizer, device)
    norms = []
    for k in range(5):
        torch.manual_seed(k)
        x, y = batch(k)

        def backward(x=x, y=y):
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        if by_hand:
            for evaluation in optimizer.passes():
                with evaluation:
                    backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
            optimizer.step()
        else:
            drive(optimizer, backward, entry)
    return bits(model.parameters()), norms


@pytest.mark.parametrize(("method", "device"), [("sam", False), ("gsam", True), ("looksam", False)])
def test_it_is_torchs_clipping_between_the_last_pass_and_the_step(method, device):
    for entry in ENTRY_POINTS:
        want, norms = train(entry, by_hand=True, method=method, device=device)
        assert min(norms) < 0.3 < max(norms) or min(norms) > 0.3
        got, _ = train(entry, by_hand=False, method=method, device=device)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.view(torch.float32), b.view(torch.float32), rtol=1e-6, atol=1e-8)


def test_a_small_gradient_is_left_bit_for_bit():
    assert all(map(torch.equal, train("closure", by_hand=False, clip=1e6)[0], train("passes", True, clip=1e6)[0]))


def test_the_ascent_is_not_clipped():
    """A clip far below the gradient's norm shortens the base's step, not the perturbation."""
    w, points = nn.Parameter(torch.tensor([3.0, 4.0])), []
    optimizer = flatmin.wrap(torch.optim.SGD([w], lr=1.0), "usam", rho=0.5, clip_norm=1e-3)

    def closure():
        points.append(w.detach().clone())
        optimizer.zero_grad()
        loss = 0.5 * (w**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(points[1] - points[0], 0.5 * points[0])
    torch.testing.assert_close((w.detach() - points[0]).norm(), torch.tensor(1e-3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("method", ["sgd", "sam"])
def test_the_plain_base_is_clipped_as_well(method):
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = flatmin.wrap(torch.optim.SGD([w], lr=1.0), method, rho=0.0, clip_norm=0.1)
    w.grad = w.detach().clone()
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.tensor([3.0, 4.0]) * (1 - 0.1 / 5.0))


def test_sparse_and_complex_gradients():
    table = nn.Embedding(5, 3, sparse=True)  # one row is looked up twice
    z = nn.Parameter(torch.tensor([3 + 4j, 0j]))
    before = [p.detach().clone() for p in (table.weight, z)]
    optimizer = flatmin.wrap(torch.optim.SGD([table.weight, z], lr=1.0), "sam", rho=1e-4, clip_norm=0.1)

    def closure():
        optimizer.zero_grad()
        loss = 5 * table(torch.tensor([1, 2, 2])).sum() + z.abs().square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    moved = sum(float((p.detach() - b).abs().square().sum()) for p, b in zip((table.weight, z), before, strict=True))
    assert moved**0.5 == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("bad", [0, -1.0, float("inf"), float("nan"), "1"])
def test_bad_values(bad):
    with pytest.raises(ValueError, match="clip_norm must be a positive number or None"):
        flatmin.wrap(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0), "sam", clip_norm=bad)
