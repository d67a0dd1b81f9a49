"""Fifty steps of float64 training equal the formulas of the methods that change where, when and how far a step climbs.

As in `test_trajectories`: the reference is written here on one flat vector and shares nothing with the library but
torch's autograd and generator. Random draws are repeated from the seed, in the order of the moved tensors.
"""

import functools
import itertools
import math
from functools import partial

import pytest
import torch
from torch import nn

import flatmin
from flatmin.methods import LambdaRadius, Recipe
from tests.helpers import batch, cosine, drive, same_bits, soft_targets

STEPS, TOLERANCE, EPS, SEED, SMOOTHING = 50, 1e-10, 1e-12, 3, 0.1
BEGINNING = 20  # of the same fifty: as many as every further door and base is compared over
# parameter -> shape, rho, learning rate relative to the first group's; equal neighbours share a param group
TABLES = {
    None: {
        "0.weight": ((5, 6), 0.1, 1.0),
        "0.bias": ((5,), 0.1, 1.0),
        "2.weight": ((3, 5), 0.3, 0.5),
        "2.bias": ((3,), 0.0, 1.0),
    },
    nn.LayerNorm: {
        "0.weight": ((5, 6), 0.1, 1.0),
        "0.bias": ((5,), 0.1, 1.0),
        "2.weight": ((5,), 0.1, 1.0),
        "2.bias": ((5,), 0.3, 0.5),
        "3.weight": ((3, 5), 0.3, 0.5),
        "3.bias": ((3,), 0.0, 1.0),
    },
}
TABLES[nn.BatchNorm1d] = TABLES[nn.LayerNorm]


def decay(k, rho):
    """The factor of a group's learning rate; the two radii have different ones, so that lr_t / lr_0 differs."""
    return 1.0 / (1.0 + k / 20) if rho == 0.3 else cosine(k, STEPS)


# -- the reference: net, losses, what it sees of a step, base updates ----------------------------------------------


def split(w, table):
    parts = w.split([math.prod(shape) for shape, _, _ in table.values()])
    return [p.view(shape) for p, (shape, _, _) in zip(parts, table.values(), strict=True)]


def spread(table, values):
    """One number per tensor, over the flat vector."""
    return torch.cat([torch.full(table[n][0], float(v), dtype=torch.float64).flatten() for n, v in values.items()])


def logits(norm, w, x):
    w1, b1, *scale, w2, b2 = split(w, TABLES[norm])
    h = torch.tanh(x @ w1.T + b1)
    if norm is not None:
        axis = 1 if norm is nn.LayerNorm else 0
        h = (h - h.mean(axis, keepdim=True)) / (h.var(axis, keepdim=True, correction=0) + 1e-5).sqrt()
        h = h * scale[0] + scale[1]
    return h @ w2.T + b2


def each(z, y):
    return -(soft_targets(y, 3, SMOOTHING) * (z - z.logsumexp(1, keepdim=True))).sum(1)


def mean(z, y):
    return each(z, y).mean()


def bisam(phi, mu, z, y):
    return ((mu * phi(z - z[torch.arange(len(y)), y][:, None])).exp().sum(1).log() / mu).mean()


bisam_log = partial(bisam, lambda f: 1 - torch.log(1 + torch.exp(math.log(math.e - 1) - f)), 1.0)
bisam_tanh = partial(bisam, lambda f: torch.tanh(0.1 * f), 10.0)


def gradient(loss, at):
    at = at.detach().requires_grad_()
    return torch.autograd.grad(loss(at), at)[0]


class Step:
    """One step as a reference sees it: `pieces` are the micro-batches (one: the batch), `v` the base's momentum."""

    def __init__(self, norm, k, w, pieces, v, draw, memory):
        self.norm, self.k, self.w, self.pieces, self.v, self.draw, self.memory = norm, k, w, pieces, v, draw, memory
        self.table = TABLES[norm]
        self.rho = spread(self.table, {n: rho for n, (_, rho, _) in self.table.items()})
        self.moved = self.rho > 0
        self.shapes = [shape for shape, rho, _ in self.table.values() if rho > 0]

    def loss(self, at, piece=None, loss=mean):
        pieces = self.pieces if piece is None else [self.pieces[piece]]
        return sum(loss(logits(self.norm, at, x), y) for x, y in pieces) / len(pieces)

    def grad(self, at, piece=None, loss=mean):
        return gradient(lambda w: self.loss(w, piece, loss), at)

    def random(self, kind):
        """One tensor after the other over those that move, as one vector."""
        return torch.cat([kind(shape, generator=self.draw, dtype=torch.float64).flatten() for shape in self.shapes])

    def coin(self, p=0.5):
        return float(torch.rand(1, generator=self.draw, dtype=torch.float64)) < p

    def climb(self, d, geometry=None, factor=1.0, mask=1.0):
        """Eps, zero where nothing moves; the mask acts after the norm."""
        eps, m = torch.zeros_like(self.w), self.moved
        eps[m] = factor * mask * (geometry or sphere)(self, d[m], self.rho[m])
        return eps


def sphere(s, d, rho):
    return rho * d / (d.norm() + EPS)


def adaptive(s, d, rho):
    w = s.w[s.moved]
    return rho * w**2 * d / ((w.abs() * d).norm() + EPS)


def centralised(s, d, rho):
    parts = [p.view(h) for p, h in zip(d.split([math.prod(h) for h in s.shapes]), s.shapes, strict=True)]
    centred = [p - p.mean(1, keepdim=True) if p.ndim == 2 else p for p in parts]
    return rho * torch.cat([p.flatten() for p in centred]) / (d.norm() + EPS)


class SGD:
    v = None

    def __call__(self, w, g, lr):
        self.v = g + 1e-2 * w if self.v is None else 0.9 * self.v + g + 1e-2 * w
        return w - lr * self.v


class AdamW:
    v, square, t = None, 0.0, 0

    def __call__(self, w, g, lr):
        self.t += 1
        self.v = 0.1 * g if self.v is None else 0.9 * self.v + 0.1 * g
        self.square = 0.999 * self.square + 0.001 * g**2
        root = (self.square / (1 - 0.999**self.t)).sqrt() + 1e-8
        return w - lr * 0.1 * w - lr * self.v / (1 - 0.9**self.t) / root


# base -> (learning rate, reference, torch's class, its options)
BASES = {
    "sgd": (0.1, SGD, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 1e-2}),
    "adamw": (0.02, AdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
}


# -- the methods: step and parameters -> (u, the loss that a loop is told) -----------------------------------------


def sam(s, *, loss=mean, geometry=sphere, factor=1.0, on=True, mask=1.0):
    eps = s.climb(s.grad(s.w, loss=loss), geometry, factor, mask) if on else 0.0
    return s.grad(s.w + eps), s.loss(s.w)


def only(s, *names):
    s.moved = spread(s.table, {n: n in names for n in s.table}).bool()
    return sam(s)


def rsam(s, sigma=0.001, lam=2.0, scale="filter", on=True):
    if not on:
        return sam(s, on=False)
    delta = torch.zeros_like(s.w)
    delta[s.moved] = sigma * s.random(torch.randn)
    if scale == "filter":
        parts = [(p.norm(dim=1, keepdim=True) if p.ndim == 2 else p.norm()).expand_as(p) for p in split(s.w, s.table)]
        delta *= torch.cat([p.flatten() for p in parts])
    eps = s.climb(delta + lam * s.grad(s.w + delta))
    return s.grad(s.w + eps), s.loss(s.w + delta)


def esam(s, beta=0.6, gamma=0.5, loss=mean, on=True):
    if not on:
        return sam(s, on=False)
    lot = (torch.rand(len(s.shapes), generator=s.draw, dtype=torch.float64) < beta).double() / beta
    mask = torch.cat([m.expand(math.prod(h)) for h, m in zip(s.shapes, lot, strict=True)])
    at, u = s.w + s.climb(s.grad(s.w, loss=loss), mask=mask), 0.0
    for x, y in s.pieces:
        rise, count = each(logits(s.norm, at, x), y) - each(logits(s.norm, s.w, x), y), int(gamma * len(y))
        # Where no tensor moves, all rises are 0 and which samples are taken is torch's choice.
        i = rise.sort(descending=True, stable=True).indices[:count]
        u = u + gradient(lambda w, x=x[i], y=y[i]: mean(logits(s.norm, w, x), y), at)
    return u / len(s.pieces), s.loss(s.w)


def micro(s, loss=mean, geometry=sphere, on=True):
    if not on:
        return sam(s, on=False)
    chunks = range(len(s.pieces))
    u = sum(s.grad(s.w + s.climb(s.grad(s.w, i, loss), geometry), i) for i in chunks)
    return u / len(chunks), s.loss(s.w)


def fisher(s, sparsity=0.5, num_samples=16, interval=100, loss=mean):
    if s.k % interval == 0:
        x, y = (torch.cat(c)[:num_samples] for c in zip(*s.pieces, strict=True))
        one = [gradient(lambda w, i=i: each(logits(s.norm, w, x), y)[i], s.w)[s.moved] for i in range(len(y))]
        order = sum(g**2 for g in one).argsort(descending=True)
        s.memory["mask"] = torch.zeros(len(order), dtype=torch.float64)
        s.memory["mask"][order[: round((1 - sparsity) * len(order))]] = 1.0
    return sam(s, loss=loss, mask=s.memory["mask"])


def dynamic(s, sparsity=0.5, rate=0.5, drop="gradient", growth="random", interval=100, total=0):
    size = {"gradient": lambda: s.grad(s.w)[s.moved].abs(), "weight": lambda: s.w[s.moved].abs()}
    size["random"] = lambda: s.random(torch.rand)
    everything = set(range(int(s.moved.sum())))
    count, moving = round((1 - sparsity) * len(everything)), s.memory.get("moving")
    if moving is None:
        moving = set(s.random(torch.rand).argsort(descending=True)[:count].tolist())
    elif s.k % interval == 0:
        death = rate * (1 + math.cos(math.pi * s.k / total)) / 2 if total else rate
        resting = everything - moving
        if swaps := min(round(death * count), len(resting)):
            low, high = size[drop]().tolist(), size[growth]().tolist()
            dead = sorted(moving, key=lambda i: low[i])[:swaps]
            moving = (moving - set(dead)) | set(sorted(resting, key=lambda i: -high[i])[:swaps])
    s.memory["moving"] = moving
    return sam(s, mask=torch.tensor([float(i in moving) for i in sorted(everything)], dtype=torch.float64))


def other_batch(s):
    return s.grad(s.w + s.climb(s.grad(s.w, 0)), 1), s.loss(s.w, 0)


def n_step(s, n=3, step="split", geometry=sphere, loss=mean, direction=lambda s, g: g):
    eps, m = torch.zeros_like(s.w), s.moved
    for _ in range(n):
        eps = eps + s.climb(direction(s, s.grad(s.w + eps, loss=loss)), geometry) / (1 if step == "full" else n)
        if step == "full":
            eps[m] = eps[m] / (eps[m] / s.rho[m]).norm().clamp(min=1.0)
    return s.grad(s.w + eps), s.loss(s.w)


def vasso(s, g, theta=0.9):
    d = g if s.k == 0 else (1 - theta) * s.memory[s.k - 1] + theta * g
    s.memory.setdefault(s.k, d)  # only the first ascent teaches
    return d


def ahead(s, sign=-1, factor=1.0):
    at = s.w if s.v is None else s.w + s.climb(sign * s.v, factor=factor)
    return s.grad(at), s.loss(at)


def stale(s):
    at = s.w + s.climb(s.memory["u"]) if s.memory else s.w
    s.memory["u"] = s.grad(at)
    return s.memory["u"], s.loss(at)


def ae_sam(s, delta=0.9, start=1.0, end=-1.0, total=0):
    q = float(s.grad(s.w)[s.moved].norm() ** 2)
    mu = s.memory["mu"] = delta * s.memory.get("mu", q) + (1 - delta) * q
    var = s.memory["var"] = delta * s.memory.get("var", 0.0) + (1 - delta) * (q - mu) ** 2
    c = start + (end - start) * s.k / total if total else start
    return sam(s, on=s.k == 0 or q >= mu + c * math.sqrt(var))


def with_lr(s, floor=0.0, lag=0):
    return torch.tensor([max(decay(s.k - lag, float(r)), floor) for r in s.rho[s.moved]], dtype=torch.float64)


class Case:
    """A method and its reference, which get the same parameters; `chunks`: how many closures are in the list, if any.

    `norm`: the net's normalisation, if any.
    """

    def __init__(self, name, step=None, /, *, norm=None, chunks=0, **params):
        self.name, self.step, self.norm, self.chunks, self.params = name, step, norm, chunks, params

    def __str__(self):
        words = [f"{k}={v}" for k, v in self.params.items()] + [f"{self.chunks} closures"] * (self.chunks > 0)
        words += [self.norm.__name__] if self.norm else []
        return ", ".join([self.name if isinstance(self.name, str) else "recipe", *words])


def rule(k):
    return 0.5 + (k % 4) / 2


NORM, LAYERED = ("2.weight", "2.bias"), ("0.weight", "0.bias", "3.weight")
CASES = [
    Case("rsam", rsam),
    Case("rsam", rsam, sigma=0.05, lam=0.7),
    Case("rsam", rsam, sigma=0.1, scale="none"),
    Case("bernoulli+rsam", lambda s, sigma: rsam(s, on=s.coin(), sigma=sigma), sigma=0.05),
    Case("gcsam", lambda s: sam(s, geometry=centralised)),
    Case("bisam-tanh+asam", lambda s: sam(s, loss=bisam_tanh, geometry=adaptive)),
    Case("sam", sam, chunks=3),
    Case("esam", esam),
    Case("esam", esam, beta=0.8, gamma=0.7),
    Case("esam", esam, gamma=0.7, chunks=3),
    Case("bisam-log+esam", lambda s: esam(s, loss=bisam_log)),
    Case("every-k+esam", lambda s, k, phase: esam(s, on=s.k % k == phase), k=3, phase=2),
    Case("bernoulli+esam", lambda s: esam(s, on=s.coin())),
    Case("micro-sam", micro, chunks=1),
    Case("micro-sam", micro, chunks=2),
    Case("micro-sam", micro, chunks=3),
    Case("micro-sam+bisam-log", lambda s: micro(s, loss=bisam_log), chunks=2),
    Case("micro-sam+asam+bernoulli", lambda s: micro(s, geometry=adaptive, on=s.coin()), chunks=4),
    Case("ssam-f", fisher, interval=3),
    Case("ssam-f", fisher, interval=3, sparsity=0.3, num_samples=5),
    Case("ssam-f", fisher, interval=3, chunks=3),
    Case("bisam-log+ssam-f", lambda s, interval: fisher(s, interval=interval, loss=bisam_log), interval=3),
    Case("ssam-d", dynamic, interval=3),
    Case("ssam-d", dynamic, interval=3, drop="weight", growth="gradient"),
    Case("ssam-d", dynamic, interval=3, drop="random", sparsity=0.3, rate=0.9),
    Case("ssam-d", dynamic, interval=3, growth="gradient", total=STEPS),
    Case("sam-db", other_batch, chunks=2),
    Case("n-step", n_step),
    Case("n-step", n_step, n=4, step="full"),
    Case("n-step+bisam-log+asam", lambda s: n_step(s, loss=bisam_log, geometry=adaptive)),
    Case("n-step+vasso", lambda s: n_step(s, direction=vasso)),
    Case("sam-on", lambda s: only(s, *NORM), norm=nn.LayerNorm),
    Case("sam-on", lambda s: only(s, *NORM), norm=nn.BatchNorm1d),
    Case("sam-on", lambda s, kinds: only(s, *LAYERED), kinds="Lin*, Conv*", norm=nn.LayerNorm),
    Case("only", lambda s, **_: only(s, "0.weight", "2.weight"), only="*.weight"),
    Case("only", lambda s, **_: only(s, "0.bias", "2.weight"), only="0.*, 2.w*", but="0.w*"),
    Case("every-k", lambda s, k: sam(s, on=s.k % k == 0), k=3),
    Case("bernoulli", lambda s, p: sam(s, on=s.coin(p)), p=0.3),
    Case("ae-sam", ae_sam),
    Case("ae-sam", ae_sam, delta=0.8, start=0.5, end=-2.0, total=STEPS),
    Case("late", lambda s, **_: sam(s, on=s.k >= 35), total=STEPS, fraction=0.3),
    Case("warm-up", lambda s, steps: sam(s, on=s.k >= steps), steps=7),
    Case("rho-power", lambda s, p: sam(s, factor=(s.k + 1) ** -p), p=0.4),
    Case("rho-lr", lambda s: sam(s, factor=with_lr(s))),
    Case("rho-lr", lambda s, floor: sam(s, factor=with_lr(s, floor)), floor=0.4),
    Case("rho-ramp", lambda s, **_: sam(s, factor=0.2 + 1.3 * min(s.k / 30, 1)), start=0.2, end=1.5, total=30),
    Case(Recipe(radius=LambdaRadius(rule=rule)), lambda s: sam(s, factor=rule(s.k))),
    Case("momentum-sam+rho-lr", lambda s: ahead(s, factor=with_lr(s))),
]
# Methods that know w + eps when a step ends.
ONE_PASS = [
    Case("momentum-sam", ahead),
    Case("momentum-sam", ahead, sign=1),
    Case("momentum-sam+rho-power", lambda s, p: ahead(s, factor=(s.k + 1) ** -p), p=0.4),
    Case("stale-sam", stale),
]
CASES += ONE_PASS


def pieces(case, k):
    """The micro-batches of a step; SAM-db's first is another batch."""
    x, y = batch(k, dtype=torch.float64)
    if case.name == "sam-db":
        return [batch(500 + k, dtype=torch.float64), (x, y)]
    return list(zip(x.chunk(case.chunks or 1), y.chunk(case.chunks or 1), strict=True))


@functools.cache
def reference(case, base, steps=STEPS):
    """The weights after each step, and the loss that each step returns."""
    lr0, update = BASES[base][0], BASES[base][1]()
    table, draw, memory = TABLES[case.norm], torch.Generator().manual_seed(SEED), {}
    w, weights, losses = flat(build(case.norm)[0]), [], []
    for k in range(steps):
        u, loss = case.step(Step(case.norm, k, w, pieces(case, k), update.v, draw, memory), **case.params)
        w = update(w, u, spread(table, {n: lr * lr0 * decay(k, rho) for n, (_, rho, lr) in table.items()}))
        weights.append(w)
        losses.append(loss)
    return torch.stack(weights), torch.stack(losses)


# -- the library ---------------------------------------------------------------------------------------------------


def build(norm):
    """The model and the groups of its parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), *([norm(5)] if norm else []), nn.Linear(5, 3)).double()
    if norm:
        nn.init.normal_(model[2].bias)
    named, table = dict(model.named_parameters()), TABLES[norm]
    assert list(named) == list(table)
    grouped = itertools.groupby(table, key=lambda n: table[n][1:])
    return model, [{"params": [named[n] for n in ns], "rho": rho, "lr": lr} for (rho, lr), ns in grouped]


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Loop:
    """A training loop of the library."""

    def __init__(self, case, base="sgd", *, device_path=False, fused=None, loss=None, made_with=None, **options):
        self.case = case
        lr, _, torch_class, usual = BASES[base]
        self.model, groups = build(case.norm)
        rules = [partial(decay, rho=g["rho"]) for g in groups]
        made = torch_class([{**g, "lr": lr * g["lr"]} for g in groups], lr=lr, fused=fused, **(made_with or usual))
        self.criterion = flatmin.Criterion(loss or nn.CrossEntropyLoss(label_smoothing=SMOOTHING))
        options = {"model": self.model, "criterion": self.criterion, "seed": SEED, **case.params, **options}
        self.optimizer = flatmin.wrap(made, case.name, **options)
        self.optimizer._tools.on_device = device_path
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rules)

    def backward(self, k, chunk=None):
        parts = pieces(self.case, k)
        x, y = (torch.cat(c) for c in zip(*parts, strict=True)) if chunk is None else parts[chunk]
        loss = self.criterion(self.model(x), y)
        self.optimizer.backward(loss)
        return loss

    def closure(self, k, chunk=None):
        self.optimizer.zero_grad()
        return self.backward(k, chunk)

    def update(self, k, door="closure"):
        """One update; the loss that the loop is told."""
        optimizer, chunks = self.optimizer, self.case.chunks
        if door == "closure":
            one = partial(self.closure, k)
            loss = optimizer.step([partial(one, i) for i in range(chunks)] if chunks else one)
        elif door == "passes":
            seen = {}
            for evaluation in optimizer.passes(chunks=chunks or 1):
                with evaluation:
                    seen.setdefault(evaluation.chunk, self.backward(k, evaluation.chunk).detach())
            optimizer.step()
            told = [seen[0]] if self.case.name == "sam-db" else [*seen.values()]
            loss = sum(told) / len(told)
        elif door == "resident":
            loss = self.closure(k).detach()
            optimizer.step()
        else:
            loss = drive(optimizer, partial(self.backward, k), door)
        self.scheduler.step()
        return loss


def trajectory(case, base="sgd", door="closure", steps=STEPS, **options):
    loop, weights, losses = Loop(case, base, **options), [], []
    for k in range(steps):
        losses.append(loop.update(k, door))
        weights.append(flat(loop.model))
    assert loop.optimizer.counts() == {"updates": steps, "nonfinite_ascents": 0, "skipped_steps": 0}
    return torch.stack(weights), torch.stack(losses)


def resident(case, base, swap=(), **options):
    """The weights at the end, and all losses; the weights go home and back after the steps in `swap`."""
    loop, losses = Loop(case, base, **options), []
    loop.optimizer.train()
    for k in range(STEPS):
        losses.append(loop.update(k, "resident"))
        if k in swap:
            loop.optimizer.eval()
            loop.optimizer.train()
    away = flat(loop.model)
    loop.optimizer.eval()
    assert not torch.equal(away, flat(loop.model))
    return flat(loop.model)[None], torch.stack(losses)


def assert_close(got, want, tolerance=TOLERANCE):
    """Weights and losses; of the weights only the last are compared where there are no others."""
    weights, losses = want
    assert float((got[0] - weights[-len(got[0]) :]).abs().max()) <= tolerance
    assert float((got[1] - losses).abs().max()) <= tolerance


# -- every method follows its formula ------------------------------------------------------------------------------


def assert_begins(case, base, door="closure", **options):
    """The same on the first steps of the fifty, but for what comes late."""
    steps = STEPS if case.name == "late" else BEGINNING
    known = [each[:steps] for each in reference(case, base)] if base == "sgd" else reference(case, base, steps)
    assert_close(trajectory(case, base, door, steps, **options), known)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_closure_follows_the_formula(case):
    """Weights after every step, and the returned loss."""
    assert_close(trajectory(case, "sgd"), reference(case, "sgd"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_closure_follows_the_formula_with_adamw(case):
    assert_begins(case, "adamw")


# `passes` hands out the whole batch where the list of closures is no part of the method.
@pytest.mark.parametrize("case", [c for c in CASES if c.chunks != 3 or "micro" in c.name], ids=str)
def test_passes_follow_the_formula(case):
    assert_begins(case, "sgd", "passes")


TWO_PASS = ("gcsam", "bisam-log+esam", "every-k+esam", "ae-sam", "only")


@pytest.mark.parametrize(("door", "base"), [("perturbed", "adamw"), ("two calls", "sgd")])
@pytest.mark.parametrize("case", [c for c in CASES if c.name in TWO_PASS], ids=str)
def test_loops_of_two_passes_follow_the_formula(case, door, base):
    assert_begins(case, base, door)


ON_DEVICE = ("rsam", "esam", "micro-sam", "ssam-f", "ssam-d", "sam-db", "n-step", "n-step+vasso", "sam-on", "ae-sam")


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ON_DEVICE] + ONE_PASS, ids=str)
def test_the_path_of_accelerators_follows_the_formula(case):
    """Fused, so that the verdict on the gradient stays on the device as well."""
    assert_begins(case, "adamw", device_path=True, fused=True)


def test_the_cases_differ():
    """Agreement means something only if each case has its own trajectory."""
    for a, b in itertools.combinations([c for c in CASES if c.norm is None], 2):
        assert float((reference(a, "sgd")[0][-1] - reference(b, "sgd")[0][-1]).abs().max()) > 1e-5, (str(a), str(b))


@pytest.mark.parametrize("swap", [(), (0, 9, 10, 37)], ids=["stays", "swaps"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("case", ONE_PASS, ids=str)
def test_a_loop_without_passes_equals_the_closure(case, base, swap):
    assert_close(resident(case, base, swap, device_path=base == "adamw"), reference(case, base))


def test_a_loop_without_passes_takes_its_radius_when_the_last_step_ends():
    """Before the scheduler's step, so that a radius that follows lr comes one step later than with a closure."""
    late = Case("momentum-sam+rho-lr", lambda s: ahead(s, factor=with_lr(s, lag=1)))
    assert_close(resident(late, "sgd"), reference(late, "sgd"))


# -- limits that are SAM -------------------------------------------------------------------------------------------

EXACT = [
    Case("esam", beta=1.0, gamma=1.0),
    Case("micro-sam", chunks=1),
    Case("sam", chunks=1),
    Case("ssam-f", sparsity=0.0),
    Case("ssam-d", sparsity=0.0),
    Case("bernoulli", p=1.0),
    Case("every-k", k=1),
    Case("late", fraction=1.0, total=STEPS),
    Case("warm-up", steps=0),
    Case("only", only="*"),
    Case("rho-power", p=0.0),
    Case("rho-ramp", start=1.0),
]
# SAM on micro-batches of one size is SAM on the batch: gradients and losses are averaged.
ROUNDED = [
    Case("n-step", n=1),
    Case("n-step", n=1, step="full"),
    Case("rsam", sigma=0.0),
    Case("sam", chunks=2),
    Case("sam", chunks=8),
]


@functools.cache
def plain_sam(base):
    return trajectory(Case("sam"), base, steps=BEGINNING)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("case", EXACT, ids=str)
def test_limits_are_sam_bit_for_bit(case, base):
    assert same_bits(trajectory(case, base, steps=BEGINNING), plain_sam(base))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("case", ROUNDED, ids=str)
def test_limits_are_sam_up_to_rounding(case, base):
    assert_close(trajectory(case, base, steps=BEGINNING), plain_sam(base), 1e-12)


@pytest.mark.parametrize(
    "case", [Case("late+ssam-f", total=STEPS, fraction=0.3), Case("warm-up+ssam-f", steps=7)], ids=str
)
def test_the_first_fisher_mask_is_made_at_the_first_ascent(case):
    """Also where that is between two refreshes: a mask that was never made must not keep the weights at w."""
    assert not same_bits(trajectory(case), trajectory(Case("sgd")))


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "match", "name", "options"),
    [
        (ValueError, r"no parameter matches '1\.\*' \(there are 0\.weight, ", "only", {"only": "0.*, 1.*"}),
        (
            ValueError,
            r"matches '0.wieght'; did you mean 0\.weight, 2\.weight\?",
            "only",
            {"only": "0.wieght"},
        ),
        (ValueError, r"matches 'head\.bias'; did you mean 0\.bias, 2\.bias\?", "only", {"only": "head.bias"}),
        (ValueError, r"no parameter matches 'x'", "only", {"but": "x"}),
        (ValueError, r"leaves no parameter to move", "only", {"but": "*"}),
        (ValueError, r"needs parameter names \(pass model=", "only", {"model": None}),
        (ValueError, r"no layer matches .*the trained ones are Linear", "sam-on", {}),
        (ValueError, r"needs the kinds of layers \(pass model=", "sam-on", {"model": None}),
        (ValueError, r"late needs .*whole training: total=.*for_length\(", "late", {}),
        (ValueError, r"momentum.*SGD is set up without", "momentum-sam", {"made_with": {"momentum": 0.0}}),
        (ValueError, r"'msam' is the name of two methods: .*'micro-sam'.*'momentum-sam'", "msam", {}),
        (ValueError, r"'ssam' is the name of two methods: .*'ssam-f'.*'bernoulli'", "ssam", {}),
        (ValueError, r"esam needs per-sample losses \(pass criterion=", "esam", {"criterion": None}),
        (TypeError, r"<lambda> gives no per-sample losses.*per_sample=", "ssam-f", {"loss": lambda z, y: z.sum()}),
        (TypeError, r"CTCLoss takes log_probs, targets, .*per_sample=", "esam", {"loss": nn.CTCLoss()}),
        (TypeError, r"bisam-log climbs .*BCEWithLogitsLoss has none", "bisam-log", {"loss": nn.BCEWithLogitsLoss()}),
        (ValueError, r"EveryK: k must be a whole number >= 1, got 0", "every-k", {"k": 0}),
        (ValueError, r"Bernoulli: p must be in \[0, 1\], got 2", "bernoulli", {"p": 2}),
        (ValueError, r"FisherMask: sparsity must be below 1", "ssam-f", {"sparsity": 1}),
        (ValueError, r"DynamicMask: sparsity must be below 1", "ssam-d", {"sparsity": 1.0}),
        (ValueError, r"SharpnessSensitiveDataSelection: gamma must be in \(0, 1\], got 0", "esam", {"gamma": 0}),
        (ValueError, r"StochasticWeightPerturbation: beta must be in \(0, 1\], got 0", "esam", {"beta": 0.0}),
        (ValueError, r"NStep: n must be a whole number >= 1, got 0", "n-step", {"n": 0}),
        (ValueError, r"Momentum: sign must be -1 .* or 1", "momentum-sam", {"sign": 0}),
    ],
)
def test_a_bad_optimizer_is_refused(error, match, name, options):
    with pytest.raises(error, match=match):
        Loop(Case(name), **options)


@pytest.mark.parametrize(
    ("error", "match", "case", "door"),
    [
        (RuntimeError, r"micro-sam needs micro-batches .*got one closure", Case("micro-sam"), "closure"),
        (RuntimeError, r"micro-sam needs passes\(\) or step\(closure\)", Case("micro-sam", chunks=2), "perturbed"),
        (RuntimeError, r"rsam needs passes\(\) or step\(closure\)", Case("rsam"), "two calls"),
        (RuntimeError, r"sam-db needs micro-batches .*got one closure", Case("sam-db"), "closure"),
        (ValueError, r"wants two closures.*got 3", Case("sam-db", chunks=3), "closure"),
        (ValueError, r"wants two closures.*got 1", Case("sam-db", chunks=1), "passes"),
        (ValueError, r"finite factor >= 0, got -1.0", Case(Recipe(radius=LambdaRadius(rule=lambda k: -1))), "closure"),
        (RuntimeError, r"step\(\) needs a closure", Case("sam"), "resident"),
    ],
)
def test_a_bad_step_is_refused_and_changes_nothing(error, match, case, door):
    loop = Loop(case)
    before = flat(loop.model)
    with pytest.raises(error, match=match):
        loop.update(0, door)
    assert torch.equal(flat(loop.model), before)
    loop.optimizer.state_dict()  # so no update is under way
    assert loop.optimizer.counts()["updates"] == 0


def test_a_pass_that_must_keep_its_graph_says_so():
    loop = Loop(Case("ssam-f"))
    loop.optimizer.backward = torch.Tensor.backward
    with pytest.raises(RuntimeError, match=r"call optimizer\.backward\(loss\) instead of loss\.backward\(\)"):
        loop.update(0)


def test_nothing_is_saved_or_begun_while_the_weights_are_away():
    loop = Loop(Case("momentum-sam"))
    optimizer = loop.optimizer
    optimizer.train()
    begin = partial(loop.update, 0, "passes")
    for refused in (optimizer.state_dict, partial(optimizer.load_state_dict, {}), begin):
        with pytest.raises(RuntimeError, match=r"under way.*call eval\(\)"):
            refused()
    optimizer.eval()
    optimizer.state_dict()
    loop.update(0)


def test_train_and_eval_do_nothing_to_methods_with_a_pass_1():
    def run(switch):
        loop = Loop(Case("sam"))
        switch(loop.optimizer)
        return loop.update(0), flat(loop.model)

    assert same_bits(run(lambda optimizer: optimizer.train()), run(lambda optimizer: optimizer.eval()))


def test_a_forward_that_was_given_up_is_forgotten():
    """Its losses are not those that the samples' rise is counted from."""
    ends = []
    for gives_up in (False, True):
        torch.manual_seed(0)
        model, criterion = nn.Linear(6, 3).double(), flatmin.Criterion(nn.CrossEntropyLoss())
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = flatmin.wrap(base, "esam", beta=1.0, rho=0.5, model=model, criterion=criterion)
        if gives_up:
            x, y = batch(7, dtype=torch.float64)
            criterion(model(x), y)
            optimizer.zero_grad()
        x, y = batch(0, dtype=torch.float64)
        criterion(model(x), y).backward()
        with optimizer.perturbed():
            criterion(model(x), y).backward()
        optimizer.step()
        ends.append(model.weight.detach().clone())
    assert torch.equal(*ends)
