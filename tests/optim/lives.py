"""What the state machine of `test_stateful.py` compares an optimizer with: formulas, and an untroubled twin."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import nn
from torch.nn import functional as F

import flatmin
from flatmin.methods import Always, Need
from tests.helpers import as_on_device, drive, recipe_of

TOLERANCE = 1e-12
THETA, ALPHA, RHO = 0.4, 0.3, 0.1
# Each branch of the net uses some of the tensors, so that the passes of a step can miss gradients of others.
BRANCHES = {
    "b0": ("a", "c", "scale", "b0"),
    "b1": ("a", "c", "scale", "b1"),
    "d": ("d",),
    "f": ("f",),
    "h": ("a", "c", "scale", "h"),
}
SHAPES = {"a": (3, 4), "c": (4,), "b0": (4, 2), "b1": (4, 2), "scale": (), "d": (3, 2), "f": (3, 2), "h": (4, 2)}
GROUPS = (("a", "c"), ("b0", "b1", "scale"), ("d",))
LATE = ("f", "h")  # parameters of the net that the optimizer is given later, if at all
FREEZABLE = ("a", "b0", "b1")  # something of every group is always trained
# Short periods, and names that are never frozen.
PARAMETERS = {
    "vasso": {"theta": THETA},
    "gsam": {"alpha": ALPHA},
    "only": {"names": "w.c, w.scale, w.d"},
    "sam-on": {"kinds": "ParameterDict"},
    "every-k": {"k": 2},
    "looksam": {"k": 2},
    "saner": {"warm_up": 2},
    "sgdhess": {"interval": 2},
    "ssam-d": {"interval": 2},
    "ssam-f": {"interval": 3},
    "rho-ramp": {"start": 0.3, "radius.total": 8},
}
WRITTEN = ("sam", "vasso", "gsam")  # methods whose formula stands here with missing gradients and all


def output(w, branch, x):
    if branch in ("d", "f"):
        return x @ w[branch]
    return w["scale"] * torch.tanh(x @ w["a"] + w["c"]) @ w[branch]


def batch(number):
    g = torch.Generator().manual_seed(number)
    return torch.randn(5, 3, generator=g, dtype=torch.float64), torch.randint(2, (5,), generator=g)


class Net(nn.Module):
    """The branches as a module."""

    def __init__(self, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.w = nn.ParameterDict({n: torch.randn(s, generator=g, dtype=torch.float64) / 2 for n, s in SHAPES.items()})

    def forward(self, x, branch):
        return output(self.w, branch, x)

    def weights(self):
        return {n: p.detach().clone() for n, p in self.w.items()}


@dataclasses.dataclass
class Setting:
    """How an optimizer is built: what a life begins with."""

    method: str
    momentum: float
    nesterov: bool
    weight_decay: float
    foreach: bool
    flat: bool
    device: bool
    with_model: bool

    def __post_init__(self):
        self.recipe = recipe_of(self.method, 30, **PARAMETERS.get(self.method, {}))
        self.with_model |= bool(self.recipe.needs & {Need.NAMES, Need.LAYERS})
        if Need.BASE_MOMENTUM in self.recipe.needs:
            self.momentum = 0.9
        if Need.BARE_SGD in self.recipe.needs:
            self.momentum = self.weight_decay = 0.0
        self.chunked = Need.MICRO_BATCHES in self.recipe.needs
        # Where a step may take one pass in one loop and two in another, both are given the same.
        self.alike = self.recipe.schedule != Always() or bool(self.recipe.needs & {Need.NAMES, Need.LAYERS})

    def base(self):
        return {
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
            "nesterov": self.nesterov and self.momentum > 0,
        }

    def entries(self):
        of_two = ("perturbed", "two calls") if self.recipe.two_pass else ()
        return ("closure", "closures", "passes", *of_two, *(("train and eval",) if self.recipe.one_pass else ()))

    def optimizer(self, net, groups):
        listed = [{**group, "params": [net.w[n] for n in group["names"]]} for group in groups]
        for group in listed:
            del group["names"]
        base = torch.optim.SGD(listed, lr=0.1, foreach=self.foreach, **self.base())
        criterion = flatmin.Criterion(nn.CrossEntropyLoss())
        model = net if self.with_model else None
        made = flatmin.wrap(base, self.recipe, rho=RHO, model=model, criterion=criterion, flat=self.flat)
        return as_on_device(made, self.device)


class Expected:
    """Groups and frozen tensors as the plan has them."""

    def __init__(self, rhos):
        self.groups = [{"names": names, "lr": 0.1, "rho": rho} for names, rho in zip(GROUPS, rhos, strict=True)]
        self.frozen = set()

    def touched(self, branch):
        """The tensors of a branch that the optimizer trains."""
        listed = {n for group in self.groups for n in group["names"]}
        return [n for n in BRANCHES[branch] if n in listed and n not in self.frozen]

    def moving(self):
        """The radius of every tensor that takes part in ascents."""
        return {n: g["rho"] for g in self.groups for n in g["names"] if g["rho"] > 0 and n not in self.frozen}

    def loss(self, optimizer, net, part):
        branch, number = part
        x, y = batch(number)
        return optimizer.criterion(net(x, branch), y)

    def backward(self, optimizer, net, part, poison=None, share=1.0):
        """Forward and backward of one part, with a bad entry in the gradient of one of its tensors."""
        branch, _ = part
        loss = self.loss(optimizer, net, part)
        optimizer.backward(loss * share)
        if poison is not None:
            index, value = poison
            names = self.touched(branch)
            net.w[names[index % len(names)]].grad.view(-1)[0] = value
        return loss


class Formula(Expected):
    """SAM, VaSSO or GSAM around SGD with momentum and weight decay, tensor by tensor from the formulas."""

    def __init__(self, setting, net, rhos):
        super().__init__(rhos)
        self.method, self.options = setting.method, setting.base()
        self.w = net.weights()
        self.buffers, self.memory = {}, {}
        self.updates = 0
        self.born()

    def born(self):
        """The engine's counters begin anew."""
        self.counts = {"updates": 0, "nonfinite_ascents": 0, "skipped_steps": 0}

    def changed(self):
        """Groups and frozen tensors are all that there is."""

    def gradient(self, w, parts, poison):
        """The mean gradient and loss of the parts, with a bad entry in the last of them."""
        total, losses = {}, []
        for branch, number in parts:
            x, y = batch(number)
            leaves = {n: t.clone().requires_grad_() for n, t in w.items()}
            loss = F.cross_entropy(output(leaves, branch, x), y)
            names = self.touched(branch)
            for n, g in zip(names, torch.autograd.grad(loss, [leaves[n] for n in names]), strict=True):
                total[n] = total.get(n, 0) + g / len(parts)
            losses.append(loss.detach())
        if poison is not None:
            index, value = poison
            total[names[index % len(names)]].view(-1)[0] = value
        return total, sum(losses) / len(losses)

    def step(self, entry, passes, poisons, *, count, scale):
        """One update of `count` passes; the loss at w and whether the base took its step."""
        moving = self.moving()
        assert count == (2 if entry in ("perturbed", "two calls") or moving else 1)
        g, loss = self.gradient(self.w, passes[0], poisons[0])
        u, size, staged = g, 0.0, {}
        if count == 2:
            d = {n: g[n] for n in moving if n in g}
            if self.method == "vasso":
                d = staged = {n: (1 - THETA) * self.memory.get(n, x) + THETA * x for n, x in d.items()}
            size = math.sqrt(sum(float((x * x).sum()) for x in d.values()))
            there = dict(self.w)
            if math.isfinite(size):
                there.update({n: self.w[n] + moving[n] * x / (size + 1e-12) for n, x in d.items()})
            u, _ = self.gradient(there, passes[1], poisons[1])
            if self.method == "gsam" and moving:
                u = {**u, **self.surrogate_gap(g, u)}
        good = all(bool(x.isfinite().all()) for x in u.values())
        if good:
            self.sgd({n: scale * x for n, x in u.items()})
            if math.isfinite(size):
                self.memory.update(staged)
        self.updates += 1
        self.counts["updates"] += 1
        self.counts["nonfinite_ascents"] += not math.isfinite(size)
        self.counts["skipped_steps"] += not good
        return loss, good

    @staticmethod
    def surrogate_gap(g, gs):
        """g_s - alpha (g - <g, g_s> / <g_s, g_s> g_s) over the tensors that have both."""
        both = [n for n in g if n in gs]
        square = sum((gs[n] * gs[n]).sum() for n in both)
        along = sum((g[n] * gs[n]).sum() for n in both)
        return {n: gs[n] - ALPHA * (g[n] - along / square * gs[n]) for n in both}

    def sgd(self, u):
        momentum, decay = self.options["momentum"], self.options["weight_decay"]
        for group in self.groups:
            for n in group["names"]:
                if n not in u:
                    continue
                d = u[n] + decay * self.w[n]
                if momentum:
                    buffer = self.buffers[n] = momentum * self.buffers[n] + d if n in self.buffers else d
                    d = d + momentum * buffer if self.options["nesterov"] else buffer
                self.w[n] = self.w[n] - group["lr"] * d

    def check(self, net, optimizer):
        """The engine has these weights, this momentum and this memory."""
        for n, p in net.w.items():
            assert torch.allclose(p, self.w[n], rtol=0, atol=TOLERANCE), n
            state = optimizer.state.get(p, {})
            close_or_absent(state.get("momentum_buffer"), self.buffers.get(n))
            filled = float(state.get("flatmin.direction.ema.filled", 0.0))
            close_or_absent(state["flatmin.direction.ema"] if filled else None, self.memory.get(n))
        for group, expected in zip(optimizer.param_groups, self.groups, strict=True):
            assert (group["lr"], group["rho"]) == (expected["lr"], expected["rho"])
        assert optimizer.param_groups[0]["flatmin.step"] == self.updates
        assert optimizer.counts() == self.counts


class Twin(Expected):
    """The same method on a net of its own, in closures only, without faults, checkpoints or copies."""

    def __init__(self, setting, net, rhos):
        super().__init__(rhos)
        self.setting, self.net = dataclasses.replace(setting, flat=False), Net()
        self.optimizer = setting.optimizer(self.net, self.groups)
        self.born()

    def born(self):
        """The engine's counters begin anew."""
        self.before = self.optimizer.counts()

    def changed(self):
        """Follow the plan's groups and frozen tensors."""
        for name, p in self.net.w.items():
            p.requires_grad_(name not in self.frozen)
        for group in self.groups[len(self.optimizer.param_groups) :]:
            self.optimizer.add_param_group({"params": [self.net.w[n] for n in group["names"]]})
        for group, planned in zip(self.optimizer.param_groups, self.groups, strict=True):
            group.update(lr=planned["lr"], rho=planned["rho"])

    def step(self, entry, passes, poisons, *, count, scale):
        """One update; the loss that a closure returns and whether the base took its step."""
        if entry in ("perturbed", "two calls") and (self.setting.method == "sgd" or not self.moving()):
            passes, poisons = passes[1:] * 2, poisons[1:] * 2  # the loop has run both, and the last one counts
        ran, last, skipped = [0] * len(passes[0]), len(passes[0]) - 1, self.optimizer.counts()["skipped_steps"]

        def backward(i=0):
            k = min(ran[i], 1)
            ran[i] += 1
            return self.backward(self.optimizer, self.net, passes[k][i], poisons[k] if i == last else None)

        listed = self.setting.chunked or entry == "closures"
        loss = drive(self.optimizer, backward, "closure", len(ran) if listed else 0)
        return loss, self.optimizer.counts()["skipped_steps"] == skipped

    def check(self, net, optimizer):
        """The engine is as this one, in weights, in all state, in options and in what it has counted since."""
        close(net.weights(), self.net.weights())
        close(optimizer.state_dict(), self.optimizer.state_dict())
        assert optimizer.counts() == {k: v - self.before[k] for k, v in self.optimizer.counts().items()}


def close_or_absent(got, expected):
    assert (got is None) == (expected is None)
    if expected is not None:
        assert torch.allclose(got, expected, rtol=0, atol=TOLERANCE)


def close(a, b, where=""):
    """Two structures are equal, tensors of numbers up to rounding."""
    if isinstance(a, torch.Tensor):
        alike = torch.equal(a, b) if not a.is_floating_point() else torch.allclose(a, b, 0, 1e-10, equal_nan=True)
        assert a.shape == b.shape and a.dtype == b.dtype and alike, where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            close(a[key], b[key], f"{where} {key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            close(*pair, f"{where} {i}")
    else:
        assert a == b, where
