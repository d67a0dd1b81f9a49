"""Optimizers of other packages as the base, against a SAM step written by hand around the same base."""

import inspect
import io
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flatmin

pytorch_optimizer = pytest.importorskip("pytorch_optimizer", reason="needs pytorch_optimizer: run make test-frameworks")
schedulefree = pytest.importorskip("schedulefree", reason="needs schedulefree: run make test-frameworks")

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 12


def net(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def data(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return torch.randn(16, 4, generator=g).to(dtype), torch.randint(3, (16,), generator=g)


def by_hand(model, base, rho, steps=STEPS):
    """g at w, g_s at w + rho g / |g|, back to w; the base steps with g_s."""
    weights = [w for group in base.param_groups for w in group["params"]]
    x, y = data(weights[0].dtype)
    for _ in range(steps):
        base.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if rho:
            norm = torch.sqrt(sum((w.grad**2).sum() for w in weights))
            before = [w.detach().clone() for w in weights]
            with torch.no_grad():
                for w in weights:
                    w.add_(w.grad, alpha=float(rho / (norm + 1e-12)))
            base.zero_grad()
            F.cross_entropy(model(x), y).backward()
            with torch.no_grad():
                for w, old in zip(weights, before, strict=True):
                    w.copy_(old)
        value = loss.detach()
        base.step(lambda value=value: value) if type(base).__name__ == "AliG" else base.step()


def train(model, optimizer, steps=STEPS):
    x, y = data(next(model.parameters()).dtype)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def seed():
    """Every global stream: some of these optimizers draw from NumPy's."""
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)


def apart(a, b):
    return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters(), strict=True))


def by_shape(model):
    """Groups for optimizers that orthogonalise matrices and treat vectors otherwise."""
    matrices, vectors = ([p for p in model.parameters() if (p.ndim == 2) == flat] for flat in (True, False))
    return [{"params": matrices, "use_muon": True}, {"params": vectors, "use_muon": False}]


def built(name, model):
    """An optimizer of pytorch_optimizer with its defaults."""
    kind = pytorch_optimizer.load_optimizer(name)
    if name in ("adago", "adamuon", "muon", "normuon", "muonclip"):
        return kind(by_shape(model))
    if name == "spectralsphere":
        return kind([p for p in model.parameters() if p.ndim == 2])
    wanted = inspect.signature(kind).parameters
    known = {"model": model, "num_data": 16, "num_iterations": 2 * STEPS}
    options = {k: v for k, v in known.items() if k in wanted and wanted[k].default is inspect.Parameter.empty}
    if "optimizer" in wanted:
        options["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    if "params" in wanted:
        options["params"] = model.parameters()
    return kind(**options)


ABSENT = {"demo": "needs einops", "distributedmuon": "needs a process group"}
SECOND_ORDER = ("adahessian", "sophiah")
REFUSED = {
    "adalomo": "updates the weights during the backward pass",
    "bsam": "is a sharpness-aware optimizer itself",
    "lbfgs": "evaluates the loss inside its own step",
    "lomo": "updates the weights during the backward pass",
    **dict.fromkeys(SECOND_ORDER, "differentiates the gradients again in its step"),
}
SERVED = sorted(set(pytorch_optimizer.get_supported_optimizers()) - set(ABSENT) - set(REFUSED))


@pytest.mark.parametrize("name", SERVED)
def test_steps_as_the_hand_written_sam(name):
    """Bit for bit as the base with rho = 0, to rounding with rho > 0."""
    dtype = torch.float32 if name == "fadam" else torch.float64
    for rho in (0.0, 0.05):
        right, model = net(dtype), net(dtype)
        base = built(name, right)
        optimizer = flatmin.SAM(built(name, model), rho=rho, model=model)
        for one in (base, optimizer):
            if callable(getattr(base, "train", None)):
                one.train()
        seed()
        by_hand(right, base, rho)
        seed()
        train(model, optimizer)
        assert apart(model, right) <= (0 if rho == 0 else 1e-9 if dtype is torch.float64 else 1e-5)
        if callable(getattr(base, "eval", None)):
            base.eval()
            optimizer.eval()
            assert apart(model, right) <= 1e-9
        if name != "sara":  # which has no weights in its mask
            assert apart(model, net(dtype)) > 0


@pytest.mark.parametrize("name", REFUSED)
def test_says_what_cannot_be_a_base(name):
    model = net()
    with pytest.raises((TypeError, ValueError, RuntimeError), match=REFUSED[name]):
        train(model, flatmin.SAM(built(name, model), rho=0.05, model=model), 1)
    assert apart(model, net()) == 0


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_bases_with_second_derivatives_step_where_nothing_ascends(name):
    right, model = net(), net()
    base, optimizer = built(name, right), flatmin.SAM(built(name, model), rho=0.0, model=model)
    x, y = data()
    torch.manual_seed(3)
    for _ in range(STEPS):
        base.zero_grad()
        F.cross_entropy(right(x), y).backward(create_graph=True)
        base.step()
    torch.manual_seed(3)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        optimizer.backward(loss)
        return loss

    for _ in range(STEPS):
        optimizer.step(closure)
    assert apart(model, right) == 0 and apart(model, net()) > 0


WRAPPERS = {
    "Lookahead": lambda p: pytorch_optimizer.Lookahead(torch.optim.AdamW(p, lr=0.01), k=2),
    "OrthoGrad": lambda p: pytorch_optimizer.OrthoGrad(torch.optim.AdamW(p, lr=0.01)),
    "PCGrad": lambda p: pytorch_optimizer.PCGrad(torch.optim.AdamW(p, lr=0.01)),
    "ScheduleFreeWrapper": lambda p: pytorch_optimizer.ScheduleFreeWrapper(torch.optim.AdamW(p, lr=0.01)),
    "TRAC": lambda p: pytorch_optimizer.TRAC(torch.optim.AdamW(p, lr=0.01)),
    "SGDScheduleFree": lambda p: schedulefree.SGDScheduleFree(p, lr=0.5),
    "AdamWScheduleFree": lambda p: schedulefree.AdamWScheduleFree(p, lr=0.05, warmup_steps=4),
    "RAdamScheduleFree": lambda p: schedulefree.RAdamScheduleFree(p, lr=0.05),
    "AdamWScheduleFreePaper": lambda p: schedulefree.AdamWScheduleFreePaper(p, lr=0.05),
}


def switch(optimizer, mode):
    getattr(optimizer, mode, lambda: None)()


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("rho", (0.0, 0.05))
def test_bases_with_modes_and_wrappers_of_bases(name, rho):
    """train() and eval() reach the base, so evaluation sees its averaged weights.

    huggingface/accelerate#2631 and #4161, kozistr/pytorch_optimizer#334.
    """
    right, model = net(), net()
    base, optimizer = WRAPPERS[name](right.parameters()), flatmin.SAM(WRAPPERS[name](model.parameters()), rho=rho)
    for _ in range(3):
        switch(base, "train")
        optimizer.train()
        by_hand(right, base, rho, 4)
        train(model, optimizer, 4)
        assert apart(model, right) <= (1e-12 if rho else 0)
        switch(base, "eval")
        optimizer.eval()
        assert apart(model, right) <= (1e-12 if rho else 0)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda p: schedulefree.SGDScheduleFreeClosure(p), "moves the weights before it calls the closure"),
        (lambda p: schedulefree.ScheduleFreeWrapper(torch.optim.SGD(p)), "expected a constructed base optimizer"),
        (lambda p: pytorch_optimizer.SafeFP16Optimizer(torch.optim.SGD(p)), "has no param_groups"),
        (lambda p: pytorch_optimizer.SAM(p, torch.optim.SGD), "is a sharpness-aware optimizer itself"),
    ],
)
def test_says_what_wrapper_cannot_be_a_base(build, words):
    model = net()
    with pytest.raises((TypeError, RuntimeError), match=words):
        train(model, flatmin.SAM(build(model.parameters()), rho=0.05), 1)


@pytest.mark.parametrize("method", ("stale-sam", "sam"))
def test_modes_of_the_base_and_the_swap_of_the_method(method):
    """train() enters the base's mode and then w + eps, eval() leaves them in the other order; both may be repeated."""
    right, model = net(), net()
    alone = flatmin.wrap(pytorch_optimizer.ScheduleFreeAdamW(right.parameters(), lr=0.05), method, rho=0.05)
    optimizer = flatmin.wrap(pytorch_optimizer.ScheduleFreeAdamW(model.parameters(), lr=0.05), method, rho=0.05)
    for _ in range(3):
        alone.base.train()
        train(right, alone, 2)
        alone.base.eval()
        for _ in range(2):
            optimizer.train()
            optimizer.train()
            train(model, optimizer, 1)
        optimizer.eval()
        optimizer.eval()
        assert apart(model, right) < 1e-12
    optimizer.train()
    with pytest.raises(RuntimeError, match="an update is under way"):
        for evaluation in optimizer.passes():
            with evaluation:
                optimizer.eval()


# -- Lion and 8-bit optimizers --------------------------------------------------------------------------------------


def wide():
    """With a weight of more than 4096 entries: smaller ones keep a state in 32 bits."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 1100), nn.Tanh(), nn.Linear(1100, 3))


EIGHT_BITS = {"AdamW8bit": {"lr": 1e-2}, "Lion8bit": {"lr": 1e-3}, "SGD8bit": {"lr": 1e-2, "momentum": 0.9}}


def of_package(name, params):
    if name in EIGHT_BITS:
        package = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: run make test-frameworks")
        return getattr(package.optim, name)(params, **EIGHT_BITS[name])
    package = pytest.importorskip("lion_pytorch", reason="needs lion-pytorch: run make test-frameworks")
    return package.Lion(params, lr=1e-3, weight_decay=0.1)


@pytest.mark.parametrize("name", ("Lion", *EIGHT_BITS))
@pytest.mark.parametrize("rho", (0.0, 0.05))
def test_lion_and_8_bit_optimizers_step_as_the_hand_written_sam_and_resume(name, rho):
    right, model = wide(), wide()
    by_hand(right, of_package(name, right.parameters()), rho, 6)
    optimizer = flatmin.SAM(of_package(name, model.parameters()), rho=rho, model=model)
    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    train(model, optimizer, 3)
    assert apart(model, right) <= (1e-5 if rho else 0) and apart(model, wide()) > 1e-4
    first = optimizer.base.state[next(model.parameters())]
    assert name == "Lion" or first["state1"].dtype == torch.uint8
    file.seek(0)
    states, other = torch.load(file), wide()
    resumed = flatmin.SAM(of_package(name, other.parameters()), rho=rho, model=other)
    for part, state in zip((other, resumed), states, strict=True):
        part.load_state_dict(state)
    train(other, resumed, 3)
    assert apart(other, model) == 0


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_a_quantised_momentum_is_none_to_climb_along(name):
    model = wide()
    optimizer = flatmin.wrap(of_package(name, model.parameters()), "momentum-sam", model=model)
    train(model, optimizer, 1)
    with pytest.raises(ValueError, match="8bit has no momentum under a known name"):
        train(model, optimizer, 1)
