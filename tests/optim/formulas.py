"""The update of every method, written from its paper's formula on one flat vector.

A formula is a function of a `Step` and of the method's parameters, under the names and with the defaults that they
have in the library. It returns u, the gradient that the base optimizer takes. The decorator gives the method's name and
the parameters to compare under: `@formula("vasso", {}, {"theta": 0.2})`. `test_formulas.py` compares the library with
them, and fails for a method without a formula.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from flatmin.methods import LambdaRadius, Part
from tests.optim.reference import (
    SIZES,
    STEPS,
    TABLE,
    adaptive,
    bisam,
    centralised,
    decay,
    dense_hessian,
    each,
    fisher,
    gradient,
    logits,
    mean,
    sphere,
    split,
    spread,
    unnormalised,
)


class Case:
    """A name, its formula and parameters; `chunks`: how many closures are in the list, 0 for a single one."""

    def __init__(self, name, formula, params):
        self.name, self.formula = name, formula
        self.params = {k: v for k, v in params.items() if k != "chunks"}
        self.chunks = params.get("chunks", 0)

    def __str__(self):
        words = [f"{k}={type(v).__name__ if isinstance(v, Part) else v}" for k, v in self.params.items()]
        words += [f"{self.chunks} closures"] * (self.chunks > 0)
        return ", ".join([self.name, *words])


CASES: list[Case] = []


def formula(name, *cases):
    """Compare a method, or methods joined by "+", with the decorated function; `cases`: parameters, default none."""

    def put(function):
        CASES.extend(Case(name, function, params) for params in cases or ({},))
        return function

    return put


@formula("sgd")
def sgd(s):
    return s.grad(s.w)


def sam(s, *, loss=mean, direction=lambda s, g: g, geometry=sphere, factor=1.0, mask=1.0, on=True):
    """SAM with one or another part replaced; off: the gradient at w."""
    if not on:
        return s.grad(s.w)
    d = direction(s, s.grad(s.w, loss=loss))
    return s.grad(s.w + s.eps(d, geometry, factor, mask))


def rule(k):
    return 0.5 + (k % 4) / 2


formula("sam", {}, {"chunks": 3})(sam)
formula("sam", {"radius": LambdaRadius(rule=rule)})(lambda s, radius: sam(s, factor=rule(s.k)))


@formula("asam", {}, {"eta": 0.01, "weights_only": True})
def asam(s, **params):
    return sam(s, geometry=partial(adaptive, **params))


@formula("usam")
def usam(s):
    return sam(s, geometry=unnormalised)


def ema(s, g, theta=0.9):
    """d_t = (1 - theta) d_{t-1} + theta g_t; of several ascents only the first teaches."""
    d = g if s.k == 0 else (1 - theta) * s.memory[s.k - 1] + theta * g
    s.memory.setdefault(s.k, d)
    return d


@formula("vasso", {}, {"theta": 0.2})
def vasso(s, **params):
    return sam(s, direction=partial(ema, **params))


def friendly(s, g, sigma=1.0, lam=0.9, ema="current"):
    """d = g - sigma m; the first step is SAM's."""
    before = s.memory.get("m")
    s.memory["m"] = g if before is None else lam * before + (1 - lam) * g
    return g if before is None else g - sigma * (s.memory["m"] if ema == "current" else before)


@formula(
    "fsam",
    {},
    {"ema": "previous"},
    {"sigma": 0.5, "lam": 0.6},
    {"sigma": 0.5, "lam": 0.6, "ema": "previous"},
)
def fsam(s, **params):
    return sam(s, direction=partial(friendly, **params))


def bisam_log(mu=1.0):
    return partial(bisam, lambda f: 1 - torch.log(1 + torch.exp(math.log(math.e - 1) - f)), mu)


def bisam_tanh(mu=10.0, alpha=0.1):
    return partial(bisam, lambda f: torch.tanh(alpha * f), mu)


formula("bisam-log", {}, {"mu": 3.0})(lambda s, **params: sam(s, loss=bisam_log(**params)))
formula("bisam-tanh", {}, {"mu": 2.0, "alpha": 0.5})(lambda s, **params: sam(s, loss=bisam_tanh(**params)))


@formula("rsam", {}, {"sigma": 0.05, "lam": 0.7}, {"sigma": 0.1, "scale": "none"})
def rsam(s, sigma=0.001, lam=2.0, scale="filter", on=True):
    if not on:
        return s.grad(s.w)
    delta = torch.zeros_like(s.w)
    delta[s.moved] = sigma * s.random(torch.randn)
    if scale == "filter":
        parts = [(p.norm(dim=1, keepdim=True) if p.ndim == 2 else p.norm()).expand_as(p) for p in split(s.w)]
        delta *= torch.cat([p.flatten() for p in parts])
    s.told = s.loss(s.w + delta)
    return s.grad(s.w + s.eps(delta + lam * s.grad(s.w + delta)))


@formula("gcsam")
def gcsam(s):
    return sam(s, geometry=centralised)


@formula("fisher-sam", {}, {"eta": 25.0}, {"eta": 25.0, "norm": "euclid"})
def fisher_sam(s, **params):
    return sam(s, geometry=partial(fisher, **params))


def halves(of_sam):
    """The direction of one gradient with the magnitude of the other; `of_sam`: whose direction."""

    def keep(s, granularity="element", legacy_names=False):
        g, gs = s.both()
        direction, magnitude = (gs, g) if of_sam != legacy_names else (g, gs)
        if granularity == "element":
            return direction.sign() * magnitude.abs()
        pairs = zip(
            *(v.split(SIZES if granularity == "tensor" else len(v)) for v in (direction, magnitude)), strict=True
        )
        return torch.cat([d * m.norm() / d.norm() for d, m in pairs])

    return keep


GRAINS = [{}, {"granularity": "tensor"}, {"granularity": "global"}]
GRAINS += [{"legacy_names": True}, {"granularity": "global", "legacy_names": True}]
formula("sam-direction", *GRAINS)(halves(of_sam=True))
formula("sam-magnitude", *GRAINS)(halves(of_sam=False))


def gauss_newton(s):
    ((x, y),) = s.pieces
    j = torch.func.jacrev(logits)(s.w, x).flatten(0, 1)
    return j.T @ dense_hessian(lambda z: mean(z.view(len(y), 3), y))(logits(s.w, x).flatten()) @ j


def signs(s):
    """+-1 with equal chances, over every tensor that is trained."""
    return torch.cat([2.0 * (torch.rand(n, generator=s.draw) < 0.5).double() - 1.0 for n in SIZES])


@formula(
    "sgdhess",
    {},
    {"draws": 2, "interval": 3},
    {"curvature": "hutchinson_diag", "draws": 2},
    {"curvature": "ggn", "interval": 3},
    {"curvature": "exact"},
    {"curvature": "exact", "interval": 3},
)
def sgdhess(s, curvature="hutchinson_abs", interval=1, draws=1):
    g = s.grad(s.w)
    if s.k % interval == 0:
        matrix = gauss_newton(s) if curvature == "ggn" else dense_hessian(s.loss)(s.w)
        if curvature == "exact":
            s.memory["h"] = matrix @ g
        else:
            zs = [signs(s) for _ in range(draws)]
            hz = [(matrix @ z).abs() if curvature == "hutchinson_abs" else z * (matrix @ z) for z in zs]
            s.memory["h"] = sum(hz) / draws
    return g + s.rho * (s.memory["h"] if curvature == "exact" else s.memory["h"] * g)


@formula("esam", {}, {"beta": 0.8, "gamma": 0.7}, {"gamma": 0.7, "chunks": 3})
def esam(s, beta=0.6, gamma=0.5, loss=mean, on=True):
    s.moved = s.moved & spread(torch.rand(len(TABLE), generator=s.draw, dtype=torch.float64) < beta).bool()
    if not (on and s.moved.any()):
        return s.grad(s.w)
    at, u = s.w + s.eps(s.grad(s.w, loss=loss), factor=1 / beta), 0.0
    for x, y in s.pieces:
        rise = each(logits(at, x), y) - each(logits(s.w, x), y)
        i = rise.sort(descending=True, stable=True).indices[: int(gamma * len(y))]
        u = u + gradient(lambda w, x=x[i], y=y[i]: mean(logits(w, x), y), at)
    return u / len(s.pieces)


@formula("micro-sam", *({"chunks": n} for n in (1, 2, 3)))
def micro_sam(s, loss=mean, geometry=sphere, on=True):
    if not on:
        return s.grad(s.w)
    chunks = range(len(s.pieces))
    return sum(s.grad(s.w + s.eps(s.grad(s.w, i, loss), geometry), i) for i in chunks) / len(chunks)


@formula("ssam-f", {}, {"interval": 3, "sparsity": 0.3, "num_samples": 5}, {"interval": 3, "chunks": 3})
def ssam_f(s, sparsity=0.5, num_samples=16, interval=100, on=True):
    if not on:
        return s.grad(s.w)
    if s.k % interval == 0 or not s.memory:
        x, y = (torch.cat(c)[:num_samples] for c in zip(*s.pieces, strict=True))
        one = [gradient(lambda w, i=i: each(logits(w, x), y)[i], s.w)[s.moved] for i in range(len(y))]
        order = sum(g**2 for g in one).argsort(descending=True)
        s.memory["mask"] = torch.zeros(len(order), dtype=torch.float64)
        s.memory["mask"][order[: round((1 - sparsity) * len(order))]] = 1.0
    return sam(s, mask=s.memory["mask"])


@formula(
    "ssam-d",
    {},
    {"interval": 3},
    {"interval": 3, "drop": "weight", "growth": "gradient"},
    {"interval": 3, "drop": "random", "sparsity": 0.3, "rate": 0.9},
    {"interval": 3, "growth": "gradient", "total": STEPS},
)
def ssam_d(s, sparsity=0.5, rate=0.5, drop="gradient", growth="random", interval=100, total=0):
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


@formula("sam-db", {"chunks": 2})
def sam_db(s):
    s.told = s.loss(s.w, 0)
    return s.grad(s.w + s.eps(s.grad(s.w, 0)), 1)


@formula("imbsam", {"chunks": 2})
def imbsam(s, direction=lambda s, g: g, on=True):
    """The sum of the head's gradient, piece 0, and of SAM's on the tail, piece 1."""
    at = s.w + s.eps(direction(s, s.grad(s.w, 1))) if on else s.w
    return s.grad(s.w, 0) + s.grad(at, 1)


@formula("gsam", {}, {"alpha": 0.1})
def gsam(s, alpha=0.4, factor=1.0):
    g, gs = s.both(factor)
    unit = gs / gs.norm()
    return gs - alpha * (g - (g @ unit) * unit)


@formula("wsam", {}, {"coupled": True}, {"gamma": 0.3}, {"gamma": 0.3, "coupled": True})
def wsam(s, gamma=0.9, coupled=False, **part):
    g, gs, a = s.grad(s.w), sam(s, **part), gamma / (1 - gamma)
    if coupled:
        return (1 - a) * g + a * gs
    s.post = -s.lr * a * (gs - g)
    return g


@formula("gnp", {}, {"alpha": 0.3})
def gnp(s, alpha=0.8):
    g, gs = s.both()
    return (1 - alpha) * g + alpha * gs


@formula("sagm", {}, {"alpha": 0.3})
def sagm(s, alpha=0.001, factor=1.0):
    gs = sam(s, geometry=lambda s, d, rho: (rho / d.norm() - alpha) * d, factor=factor)
    return (s.grad(s.w) + gs) / 2


@formula("cr-sam", {}, {"gamma": 0.5, "beta": 0.3})
def cr_sam(s, gamma=0.1, beta=0.01, geometry=sphere):
    g = s.grad(s.w)
    eps = s.eps(g, geometry)
    above, below = s.grad(s.w + eps), s.grad(s.w - eps)
    return above + gamma * (above + below - 2 * g) + beta * (above - below)


@formula("looksam", {}, {"k": 3, "alpha": 0.4}, {"k": 3, "phase": 2})
def looksam(s, k=5, phase=0, alpha=0.7):
    if s.k % k == phase:
        g, gs = s.both()
        s.memory["gv"] = gs - (gs @ g) / (g @ g) * g
        return gs
    g, gv = s.grad(s.w), s.memory.get("gv")
    return g if gv is None else g + alpha * g.norm() / gv.norm() * gv


@formula("momentum-sam", {}, {"sign": 1})
def momentum_sam(s, sign=-1, factor=1.0):
    at = s.w if s.v is None else s.w + s.eps(sign * s.v, factor=factor)
    s.told = s.loss(at)
    return s.grad(at)


@formula("stale-sam")
def stale_sam(s):
    at = s.w + s.eps(s.memory["u"]) if s.memory else s.w
    s.told, s.memory["u"] = s.loss(at), s.grad(at)
    return s.memory["u"]


@formula("n-step", {}, {"n": 4, "step": "full"})
def n_step(s, n=3, step="split", geometry=sphere, loss=mean, direction=lambda s, g: g):
    eps, m = torch.zeros_like(s.w), s.moved
    for _ in range(n):
        eps = eps + s.eps(direction(s, s.grad(s.w + eps, loss=loss)), geometry) / (1 if step == "full" else n)
        if step == "full":
            eps[m] = eps[m] / (eps[m] / s.rho[m]).norm().clamp(min=1.0)
    return s.grad(s.w + eps)


def of(s, names):
    """SAM of these tensors only."""
    s.moved = spread([n in names for n in TABLE]).bool()
    return sam(s)


@formula("sam-on", {}, {"kinds": "Lin*, Conv*"})
def sam_on(s, kinds=None):
    return of(s, ("2.weight", "2.bias") if kinds is None else ("0.weight", "0.bias", "3.weight"))


@formula("only", {"only": "*.weight"}, {"only": "0.*, 3.w*", "but": "0.w*"})
def only(s, only, but=None):
    return of(s, ("0.weight", "2.weight", "3.weight") if but is None else ("0.bias", "3.weight"))


@formula("zsharp", {}, {"q": 0.5}, {"q": 0.5, "per_tensor": True})
def zsharp(s, q=0.95, per_tensor=False, geometry=sphere):
    """Of matrices the entries with |z| above its quantile; as coded every matrix has a norm of its own."""

    def kept(x):
        z = ((x - x.mean()) / (x.std() + 1e-12)).abs()
        return torch.where(z > z.quantile(q), x, 0.0)

    def filtered(s, d, rho):
        parts = list(zip(d.split([math.prod(h) for h in s.shapes]), s.shapes, strict=True))
        t = [kept(p) if len(h) > 1 else p for p, h in parts]
        if not per_tensor:
            return geometry(s, torch.cat(t), rho)
        return rho * torch.cat(
            [x / ((x if len(h) > 1 else d).norm() + 1e-12) for x, (_, h) in zip(t, parts, strict=True)]
        )

    return sam(s, geometry=filtered)


@formula("saner", {}, {"alpha": 0.8, "warm_up": 5})
def saner(s, alpha=0.5, warm_up=0):
    g, gs = s.both()
    r = gs / g
    return gs if s.k < warm_up else torch.where((r > 0) & (r < 1), (1 - alpha) * gs, gs)


formula("every-k", {}, {"k": 3, "phase": 2})(lambda s, k=5, phase=0: sam(s, on=s.k % k == phase))
formula("bernoulli", {}, {"p": 0.3})(lambda s, p=0.5: sam(s, on=s.coin(p)))
formula("late", {"total": STEPS, "fraction": 0.3})(lambda s, **_: sam(s, on=s.k >= 8))
formula("warm-up", {"steps": 5})(lambda s, steps: sam(s, on=s.k >= steps))


@formula("ae-sam", {}, {"delta": 0.8, "start": 0.5, "end": -2.0, "total": STEPS})
def ae_sam(s, delta=0.9, start=1.0, end=-1.0, total=0, step=sam):
    q = float(s.grad(s.w)[s.moved].norm() ** 2)
    mu = s.memory["mu"] = delta * s.memory.get("mu", q) + (1 - delta) * q
    var = s.memory["var"] = delta * s.memory.get("var", 0.0) + (1 - delta) * (q - mu) ** 2
    c = start + (end - start) * s.k / total if total else start
    return step(s, on=s.k == 0 or q >= mu + c * math.sqrt(var))


formula("rho-power", {}, {"p": 0.4})(lambda s, p=0.001: sam(s, factor=(s.k + 1) ** -p))


def with_lr(s, floor=0.0, peak=0.0, lag=0):
    """Each moved entry's lr_t / lr_max; the rate falls from lr_max = lr_0 on."""
    share = torch.tensor([decay(s.k - lag, float(r)) for r in s.rho[s.moved]], dtype=torch.float64)
    return (share if not peak else (s.lr[s.moved] / peak).clamp(max=1.0)).clamp(min=floor)


formula("rho-lr", {}, {"floor": 0.6}, {"peak": 0.08})(lambda s, **params: sam(s, factor=with_lr(s, **params)))
formula("rho-ramp", {}, {"start": 0.2, "end": 1.5, "total": 8})(
    lambda s, start=0.0, end=1.0, total=1000: sam(s, factor=start + (end - start) * min(s.k / total, 1.0))
)


@formula("functional-sam", {}, {"chunks": 3})
def functional_sam(s, geometry=sphere, direction=lambda s, g: g):
    """J(w + eps)^T G(w)."""
    at, u = s.w + s.eps(direction(s, s.grad(s.w)), geometry), 0.0
    for x, y in s.pieces:
        slope = gradient(lambda z, y=y: mean(z, y), logits(s.w, x))
        u = u + gradient(lambda w, x=x, slope=slope: (slope * logits(w, x)).sum(), at)
    return u / len(s.pieces)


def flat_gradients(s, ratio, direction=lambda s, g: g):
    """g, g_1, g_2 and g_3 of GAM and C-Flat."""
    g = s.grad(s.w)
    eps = s.eps(direction(s, g))
    first = s.grad(s.w + eps)
    up = s.w + s.eps(first - g, factor=ratio)
    second = s.grad(up)
    return g, first, second, s.grad(up + s.eps(direction(s, second)))


@formula("gam", {}, {"ratio": 2.0, "beta1": 0.5, "beta2": 0.7, "beta3": 0.8, "gamma": 0.4})
def gam(s, ratio=10.0, beta1=1.0, beta2=-1.0, beta3=1.0, gamma=0.03, on=True):
    if not on:
        return (beta1 + beta3) * s.grad(s.w)
    g, first, second, third = flat_gradients(s, ratio)
    m, v = g + abs(beta2) * second, beta1 * first + beta3 * third
    return v - gamma * (m - (m @ v) / (v @ v) * v)


@formula("c-flat", {}, {"ratio": 3.0, "lam": 0.7})
def c_flat(s, ratio=1.0, lam=0.2, **part):
    _, first, second, third = flat_gradients(s, ratio, **part)
    return first + lam * (third - second)


BAYES = {"data_size": 200, "delta": 0.05}


@formula("bsam", BAYES, {**BAYES, "beta1": 0.5, "beta2": 0.8, "s_init": 2.0, "gamma": 0.3})
def bsam(s, data_size, delta=2e-4, beta1=0.9, beta2=0.999, s_init=1.0, gamma=0.1, on=True):
    old = s.memory.get("s", torch.full_like(s.w, s_init))
    noise = torch.zeros_like(s.w)
    if on:
        noise[s.moved] = s.random(torch.randn) / (data_size * old[s.moved]).sqrt()
        s.told = s.loss(s.w + noise)
    g = s.grad(s.w + noise)
    gs = s.grad(s.w + s.eps(g / old, unnormalised)) if on else g
    s.memory["m"] = beta1 * s.memory.get("m", 0.0) + (1 - beta1) * (gs + delta * s.w)
    s.memory["s"] = beta2 * old + (1 - beta2) * (old.sqrt() * g.abs() + gamma + delta)
    return s.memory["m"] / old


@formula("eigen-sam", {}, {"interval": 4, "iterations": 2, "alpha": 0.7})
def eigen_sam(s, alpha=0.2, iterations=5, interval=100):
    g, m = s.grad(s.w), s.moved
    n, v = g[m] / g[m].norm(), s.memory.get("v")
    if v is None:
        v = s.random(torch.randn)
    if s.k % interval == 0:
        for _ in range(iterations):
            v = dense_hessian(s.loss)(s.w)[m][:, m] @ v
            v = v / v.norm()
    s.memory["v"] = v
    d = torch.zeros_like(s.w)
    d[m] = n + alpha * torch.sign(g[m] @ v) * (v - (n @ v) * n)
    return s.grad(s.w + s.eps(d, unnormalised))


@formula("sampa", {}, {"lam": 0.6}, {"batch": "previous", "chunks": 2})
def sampa(s, lam=0.2, batch="same"):
    before, now = (0, 1) if batch == "previous" else (None, None)
    v, m = s.memory.get("v"), s.moved
    if v is None:
        s.memory["v"] = s.grad(s.w, now)
        s.told = s.loss(s.w, now)
        return s.memory["v"]
    ahead = torch.zeros_like(s.w)
    # The base's next step, were v its gradient: weight decay 0.01, momentum 0.9.
    ahead[m] = -(s.lr * (v + 0.01 * s.w + 0.9 * s.v))[m]
    s.told = s.loss(s.w + s.eps(v), before)
    s.memory["v"] = s.grad(s.w + ahead, now)
    return (1 - lam) * s.grad(s.w + s.eps(v), before) + lam * s.memory["v"]


# -- compositions that cross a stateful part, another loss, another norm, another rule -----------------------------

formula("vasso+bisam-log+asam")(lambda s: sam(s, direction=ema, loss=bisam_log(), geometry=adaptive))
formula("vasso+fisher-sam", {"eta": 25.0})(lambda s, eta: sam(s, direction=ema, geometry=partial(fisher, eta=eta)))
formula("zsharp+asam", {"q": 0.5})(lambda s, q: zsharp(s, q, geometry=adaptive))
formula("sagm+rho-lr", {"alpha": 0.3})(lambda s, alpha: sagm(s, alpha, factor=with_lr(s)))
formula("cr-sam+asam", {"beta": 0.3})(lambda s, beta: cr_sam(s, beta=beta, geometry=adaptive))
formula("vasso+imbsam", {"chunks": 2})(lambda s: imbsam(s, direction=ema))
formula("imbsam+bernoulli", {"chunks": 2})(lambda s: imbsam(s, on=s.coin()))
formula("fsam+usam")(lambda s: sam(s, direction=friendly, geometry=unnormalised))
formula("gsam+rho-lr")(lambda s: gsam(s, factor=with_lr(s)))
formula("wsam+vasso+asam")(lambda s: wsam(s, direction=ema, geometry=adaptive))
formula("bernoulli+rsam")(lambda s: rsam(s, on=s.coin()))
formula("every-k+esam", {"k": 3, "phase": 2})(lambda s, k, phase: esam(s, on=s.k % k == phase))
formula("ae-sam+esam")(lambda s: ae_sam(s, step=esam))  # the draw has no say in the decision
formula("bisam-log+esam")(lambda s: esam(s, loss=bisam_log()))
formula("micro-sam+asam+bernoulli", {"chunks": 4})(lambda s: micro_sam(s, geometry=adaptive, on=s.coin()))
formula("warm-up+ssam-f", {"steps": 5})(lambda s, steps: ssam_f(s, on=s.k >= steps))  # no refresh is due at step 5
formula("micro-sam+bisam-log", {"chunks": 2})(lambda s: micro_sam(s, loss=bisam_log()))
formula("n-step+bisam-log+asam")(lambda s: n_step(s, loss=bisam_log(), geometry=adaptive))
formula("n-step+vasso")(lambda s: n_step(s, direction=ema))
formula("momentum-sam+rho-lr")(lambda s: momentum_sam(s, factor=with_lr(s)))
formula("functional-sam+vasso+asam")(lambda s: functional_sam(s, geometry=adaptive, direction=ema))
formula("every-k+gam", {"k": 3, "phase": 2})(lambda s, k, phase: gam(s, on=s.k % k == phase))
formula("every-k+bsam", {"k": 3, "phase": 2, **BAYES})(lambda s, k, phase, **p: bsam(s, on=s.k % k == phase, **p))
formula("c-flat+vasso")(lambda s: c_flat(s, direction=ema))
