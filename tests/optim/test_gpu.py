"""The contract on a CUDA device; skipped without one."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import flatmin
from flatmin.methods import METHODS as TABLE
from tests.helpers import CHUNKS, drive, recipe_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]
ALL = list(TABLE)
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
    try:
        torch.cuda.set_sync_debug_mode("warn")
        for x, y in data[4:]:
            with pytest.warns(UserWarning) if syncs else contextlib.nullcontext() as caught:
                step(net, criterion, opt, x, y)
            seen += len([w for w in caught or [] if "called a synchronizing" in str(w.message)])
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
    ema = [opt.state[p]["flatmin.direction.ema"].clone() for p in net.parameters()]
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
    after = [opt.state[p]["flatmin.direction.ema"] for p in net.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(ema, after, strict=True))
    counts = opt.counts()
    assert (counts["nonfinite_ascents"], counts["skipped_steps"]) == ((1, 0) if bad_pass == 1 else (0, 1))


def test_rho_zero_and_the_plain_base_run_without_an_ascent():
    for name, rho in (("sgd", None), ("sam", 0.0)):
        net, criterion, opt = build(name, "cuda", rho=rho)
        assert step(net, criterion, opt, *batch(0, "cuda")).isfinite()


@pytest.mark.parametrize("name", ALL)
def test_every_method_trains_like_the_cpu(name):
    """Float64, all entries' machinery: micro-batches, graphs, draws from the CPU."""
    ends = []
    for device in ("cpu", "cuda"):
        net, criterion, opt = build(recipe_of(name), device)
        for k in range(8):
            x, y = batch(k, device)

            def backward(chunk=None, x=x, y=y, net=net, criterion=criterion, opt=opt):
                part = (x, y) if chunk is None else (x.chunk(CHUNKS)[chunk], y.chunk(CHUNKS)[chunk])
                loss = criterion(net(part[0]), part[1])
                opt.backward(loss)
                return loss

            drive(opt, backward)
        ends.append(nn.utils.parameters_to_vector(net.parameters()).detach().cpu())
    assert (ends[0] - ends[1]).abs().max() <= 1e-8


class Scaled:
    """fp16 autocast with a GradScaler."""

    def __init__(self, name, *, fused, bad=None):
        self.net, self.criterion, self.opt = build(name, "cuda", torch.float32, fused=fused)
        self.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
        self.opt.scaler = self.scaler
        self.bad = bad

    def step(self, k, entry):
        x, y = batch(k, "cuda", torch.float32)
        calls = 0

        def backward():
            nonlocal calls
            with torch.autocast("cuda", torch.float16):
                loss = self.criterion(self.net(x).float(), y)
            if self.bad == (k, calls):
                loss = loss * torch.inf
            calls += 1
            self.scaler.scale(loss).backward()
            return loss

        def closure():
            self.opt.zero_grad()
            return backward()

        if entry == "closure":
            self.scaler.step(self.opt, closure)
        else:
            for evaluation in self.opt.passes():
                with evaluation:
                    backward()
            self.scaler.step(self.opt)
        self.scaler.update()


@pytest.mark.parametrize("entry", ["closure", "passes"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad_pass", [0, 1])
def test_a_scaler_hears_of_an_inf_in_any_pass(bad_pass, fused, entry):
    run = Scaled("vasso", fused=fused, bad=(2, bad_pass))
    for k in range(5):
        before = [p.detach().clone() for p in run.net.parameters()]
        run.step(k, entry)
        same = all(torch.equal(a, b) for a, b in zip(before, run.net.parameters(), strict=True))
        assert same == (k == 2)
    assert run.scaler.get_scale() == 2.0**9
    counts = run.opt.counts()
    assert (counts["nonfinite_ascents"], counts["skipped_steps"]) == (1 - bad_pass, 1)


@pytest.mark.parametrize("fused", [False, True])
def test_scaled_training_follows_the_unscaled_one(fused):
    run = Scaled("sam", fused=fused)
    net, criterion, opt = build("sam", "cuda", torch.float32, fused=fused)
    start = nn.utils.parameters_to_vector(net.parameters()).detach()
    for k in range(10):
        run.step(k, "closure")
        step(net, criterion, opt, *batch(k, "cuda", torch.float32))
    want, got = (nn.utils.parameters_to_vector(n.parameters()).detach() for n in (net, run.net))
    assert (got - want).norm() <= 0.05 * (want - start).norm()


def test_a_fused_base_under_a_scaler_does_not_synchronise():
    run = Scaled("sam", fused=True)
    for k in range(4):
        run.step(k, "closure")
    x, y = batch(5, "cuda", torch.float32)

    def closure():
        run.opt.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = run.criterion(run.net(x).float(), y)
        run.scaler.scale(loss).backward()
        return loss

    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        run.scaler.step(run.opt, closure)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    run.scaler.update()


@pytest.mark.filterwarnings("ignore:weights in half precision")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64), nn.Tanh(), nn.Linear(64, 4)).to(
        "cuda", dtype
    )
    base = torch.optim.SGD(net.parameters(), lr=0.0)
    opt = flatmin.wrap(base, "sam", rho=0.05, model=net, diagnostics=True)
    before = [p.detach().clone() for p in net.parameters()]
    x, y = torch.randn(32, 64, device="cuda", dtype=dtype), torch.randint(4, (32,), device="cuda")
    found = []
    for _ in range(8):
        step(net, lambda out, target: nn.functional.cross_entropy(out.float(), target), opt, x, y)
        found.append(opt.diagnostics()["epsilon_projection"])
        assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert sum(found) / len(found) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("name", ["sam", "asam", "vasso", "gsam", "rsam"])
def test_weights_on_two_devices_are_one_vector(name):
    """A net half on the CPU and half on the device equals the one on the CPU."""

    class Halves(nn.Module):
        def __init__(self, second):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.device = nn.Linear(6, 8).double(), nn.Linear(8, 3).double(), second
            self.second.to(second)

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)).to(self.device)).cpu()

    ends = []
    for device in ("cpu", "cuda"):
        net = Halves(device)
        opt = flatmin.wrap(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), name, model=net, clip_norm=1.0)
        for k in range(5):
            step(net, nn.CrossEntropyLoss(), opt, *batch(k, "cpu"))
        ends.append(torch.cat([p.detach().cpu().flatten() for p in net.parameters()]))
    assert (ends[0] - ends[1]).abs().max() <= 1e-9
