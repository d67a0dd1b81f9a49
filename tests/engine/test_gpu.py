"""The contract on a CUDA device; skipped without one."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import flatmin

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
METHODS = ["sgd", "sam", "asam", "usam", "vasso", "fsam", "bisam-log", "bisam-tanh", "vasso+bisam-log+asam"]


def build(name, device, dtype=torch.float64, *, fused=False, dropout=0.0, **kw):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 3)).to(
        device, dtype
    )
    criterion = flatmin.Criterion(nn.CrossEntropyLoss())
    base = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2, fused=fused)
    return net, criterion, flatmin.wrap(base, name, model=net, criterion=criterion, **kw)


def batch(k, device, dtype=torch.float64):
    g = torch.Generator().manual_seed(k)
    return torch.randn(32, 6, generator=g, dtype=dtype).to(device), torch.randint(3, (32,), generator=g).to(device)


def step(net, criterion, opt, x, y):
    def closure():
        opt.zero_grad()
        loss = criterion(net(x), y)
        loss.backward()
        return loss

    return opt.step(closure)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("fused", [False, True])
def test_the_device_trains_like_the_cpu(name, fused):
    ends = []
    for device in ("cpu", "cuda"):
        net, criterion, opt = build(name, device, fused=fused and device == "cuda")
        for k in range(20):
            step(net, criterion, opt, *batch(k, device))
        ends.append(nn.utils.parameters_to_vector(net.parameters()).detach().cpu())
    assert (ends[0] - ends[1]).abs().max() <= 1e-9


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("nonfinite", "fused", "syncs"), [("propagate", False, 0), ("skip", True, 0), ("skip", False, 1)]
)
def test_host_synchronisations(name, nonfinite, fused, syncs):
    net, criterion, opt = build(name, "cuda", torch.float32, fused=fused, nonfinite=nonfinite)
    data = [batch(k, "cuda", torch.float32) for k in range(8)]
    for x, y in data[:4]:
        step(net, criterion, opt, x, y)
    torch.cuda.synchronize()
    seen = 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        for x, y in data[4:]:
            with pytest.warns(UserWarning) if syncs else contextlib.nullcontext() as caught:
                step(net, criterion, opt, x, y)
            seen += len([w for w in caught or [] if "synchroniz" in str(w.message)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert seen == 4 * syncs


def test_dropout_masks_are_equal_in_both_passes():
    net, criterion, opt = build("sam", "cuda", torch.float32, dropout=0.5)
    masks = []
    net[3].register_forward_hook(lambda m, i, o: masks.append((o != 0).detach().clone()))
    for k in range(3):
        step(net, criterion, opt, *batch(k, "cuda", torch.float32))
        x, y = batch(k, "cuda", torch.float32)
        opt.zero_grad()
        criterion(net(x), y).backward()
        with opt.perturbed():
            criterion(net(x), y).backward()
        opt.step()
    assert len(masks) == 12
    assert all(torch.equal(a, b) for a, b in zip(masks[::2], masks[1::2], strict=True))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad_pass", [1, 2])
def test_gradients_that_are_not_finite(fused, bad_pass):
    net, criterion, opt = build("vasso", "cuda", fused=fused)
    step(net, criterion, opt, *batch(0, "cuda"))
    before = copy.deepcopy([p.detach().clone() for p in net.parameters()])
    ema = [v.clone() for v in opt._store.per_weight["direction.ema"].values()]
    x, y = batch(1, "cuda")
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        opt.zero_grad()
        loss = criterion(net(x), y)
        loss.backward()
        if calls == bad_pass:
            net[0].weight.grad[0, 0] = float("inf")
        return loss

    opt.step(closure)
    moved = not all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert moved == (bad_pass == 1)
    after = opt._store.per_weight["direction.ema"].values()
    assert all(torch.equal(a, b) for a, b in zip(ema, after, strict=True))
    counts = opt.counts()
    assert (counts["nonfinite_ascents"], counts["skipped_steps"]) == ((1, 0) if bad_pass == 1 else (0, 1))


def test_rho_zero_and_the_plain_base_run_without_an_ascent():
    for name, rho in (("sgd", None), ("sam", 0.0)):
        net, criterion, opt = build(name, "cuda", rho=rho)
        assert step(net, criterion, opt, *batch(0, "cuda")).isfinite()
