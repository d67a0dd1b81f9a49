"""Where only the device knows whether an update was finite: the first ones, which make what later ones read."""

import math

import pytest
import torch
from torch import nn

import flatmin
from flatmin.optim.capture import Captured
from flatmin.optim.support import capture_refusal
from tests.helpers import as_on_device, recipe_of


def build(method="sam", base=torch.optim.SGD, **settings):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    settings = {"lr": 0.05, "momentum": 0.9, "fused": True, **settings} if base is torch.optim.SGD else settings
    optimizer = flatmin.wrap(base(net.parameters(), **settings), method, model=net, diagnostics=True)
    as_on_device(optimizer, True)
    return net, optimizer


def update(net, optimizer, k, factor=1.0):
    g = torch.Generator().manual_seed(k)
    x, y = torch.randn(16, 4, generator=g), torch.randint(3, (16,), generator=g)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y) * factor
        loss.backward()
        return loss

    optimizer.step(closure)


def state_of(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("method", ["sgd", "sam", "vasso", "stale-sam", "momentum-sam"])
def test_skipped_updates_leave_nothing_behind(method):
    """What follows is the training without them, bit for bit."""
    for bad, factor in (((0,), math.nan), ((0, 1), math.inf), ((2,), math.nan)):
        net, optimizer = build(method)
        other, without = build(method)
        for k in range(6):
            update(net, optimizer, k, factor if k in bad else 1.0)
            if k not in bad:
                update(other, without, k)
        assert torch.equal(state_of(net), state_of(other))
        assert state_of(net).isfinite().all()
        assert optimizer.counts()["skipped_steps"] == len(bad)


@pytest.mark.parametrize("base", [torch.optim.Adam, torch.optim.AdamW])
def test_bases_that_begin_with_zeros_need_no_look(base):
    net, optimizer = build(base=base, lr=0.01, fused=True)
    update(net, optimizer, 0, math.nan)
    other, without = build(base=base, lr=0.01, fused=True)
    update(net, optimizer, 1)
    update(other, without, 1)
    assert torch.equal(state_of(net), state_of(other))


class TestCaptured:
    """The host's part of a replay, here without a graph."""

    def test_counts_and_numbers_are_those_of_the_captured_update(self):
        net, optimizer = build()
        update(net, optimizer, 0)
        with Captured(optimizer) as captured:
            update(net, optimizer, 1)
        numbers = optimizer.diagnostics()
        update(net, optimizer, 2)
        assert optimizer.diagnostics() != numbers
        captured.repeat()
        assert optimizer.diagnostics() == numbers
        # One more ascent is counted, of which no kernel has said that it was finite: here nothing is replayed.
        assert optimizer.counts() == {"updates": 4, "nonfinite_ascents": 1, "skipped_steps": 0}

    def test_an_update_at_radius_zero_has_no_ascent_to_count(self):
        net, optimizer = build()
        optimizer.param_groups[0]["rho"] = 0.0
        with Captured(optimizer) as captured:
            update(net, optimizer, 0)
        captured.repeat()
        assert optimizer.counts() == {"updates": 2, "nonfinite_ascents": 0, "skipped_steps": 0}


def test_a_recipe_that_remembers_a_number_is_not_captured():
    assert capture_refusal(recipe_of("jitter")) == (
        "stores a number that each update replaces, and a graph reads the one that it captured"
    )
