"""What several test files of the engine share: nets, batches, closures, and one step in every entry point."""

import math

import torch
from torch import nn

import flatmin

LR, RHO = 0.1, 0.3


class OwnNorm(nn.Module):
    """A normalisation layer that torch does not know."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))

    def forward(self, x):
        if self.training:
            self.running_mean.mul_(0.9).add_(0.1 * x.detach().mean(tuple(i for i in range(x.ndim) if i != 1)))
        return x - self.running_mean.view(1, -1, *[1] * (x.ndim - 2))


def one_step(model, opt, x, entry, fail_in_second=False):
    def backward():
        loss = model(x).square().mean()
        loss.backward()
        return loss

    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        opt.zero_grad()
        loss = backward()
        if calls == 2 and fail_in_second:
            raise KeyError("planned")
        return loss

    if entry == "closure":
        opt.step(closure)
    elif entry == "perturbed":
        opt.zero_grad()
        backward()
        with opt.perturbed():
            backward()
            if fail_in_second:
                raise KeyError("planned")
        opt.step()
    elif entry == "two calls":
        backward()
        opt.first_step(zero_grad=True)
        backward()
        opt.second_step(zero_grad=True)
    else:
        for evaluation in opt.passes():
            with evaluation:
                backward()
                if fail_in_second and evaluation.index == 1:
                    raise KeyError("planned")
        opt.step()


def inputs(step=0, size=8, width=4):
    return torch.randn(size, width, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def buffers(model):
    return [b.clone() for b in model.buffers()]


def close(a, b, tolerance=1e-12):
    return all(torch.allclose(x, y, rtol=0, atol=tolerance) for x, y in zip(a, b, strict=True))


def sam(model, parameters=None, **kw):
    base = torch.optim.SGD(model.parameters() if parameters is None else parameters, lr=LR)
    return flatmin.SAM(base, rho=RHO, model=model, **kw)


def by_hand(model, parameters, backward):
    """A step of SAM on some parameters, in the open: both passes on one mask, statistics of the first only."""

    def gradients():
        for p in parameters:
            p.grad = None
        backward()
        return [p.grad.clone() for p in parameters]

    rng, home = torch.get_rng_state(), [p.detach().clone() for p in parameters]
    g = gradients()
    kept = buffers(model)
    norm = math.sqrt(sum(float(x.square().sum()) for x in g))
    with torch.no_grad():
        for p, x in zip(parameters, g, strict=True):
            p.add_(x, alpha=RHO / norm)
    torch.set_rng_state(rng)
    gs = gradients()
    with torch.no_grad():
        for p, w, x in zip(parameters, home, gs, strict=True):
            p.copy_(w - LR * x)
        for b, old in zip(model.buffers(), kept, strict=True):
            b.copy_(old)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(k=0):
    g = torch.Generator().manual_seed(100 + k)
    return torch.randn(8, 4, generator=g, dtype=torch.float64), torch.randint(3, (8,), generator=g)


def closure_for(model, opt, x, y, scale=1.0):
    def closure():
        opt.zero_grad()
        loss = scale * nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def vector(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def sgd(model, **kw):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **kw)


class Recorder(nn.Module):
    """Dropout that remembers its masks."""

    def __init__(self):
        super().__init__()
        self.lin, self.masks = nn.Linear(4, 4), []

    def forward(self, x):
        mask = (torch.rand_like(x) > 0.5).float()
        if torch.is_grad_enabled() and self.training:
            self.masks.append(mask)
        return self.lin(x * mask)


def train(net, optimizer, steps, seed=1):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def closure():
        optimizer.zero_grad()
        loss = (net(x.to(net[0].weight.dtype)) ** 2).mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
