"""The problem on which formulas are written: a small net as a function of one flat vector, and reference optimizers.

Nothing of the library's engine is used here, only torch's autograd and generators.
"""

from __future__ import annotations

import math

import torch

from tests.helpers import batch, cosine, soft_targets

STEPS, SEED, SMOOTHING, EPS = 12, 3, 0.1, 1e-12
# Linear, tanh, LayerNorm, Linear: parameter -> shape, rho, learning rate relative to the first group's.
# Neighbours with equal numbers share a param group; the last one takes no part in ascents.
TABLE = {
    "0.weight": ((5, 6), 0.1, 1.0),
    "0.bias": ((5,), 0.1, 1.0),
    "2.weight": ((5,), 0.1, 1.0),
    "2.bias": ((5,), 0.3, 0.5),
    "3.weight": ((3, 5), 0.3, 0.5),
    "3.bias": ((3,), 0.0, 1.0),
}
SIZES = [math.prod(shape) for shape, _, _ in TABLE.values()]


def split(w):
    return [p.view(shape) for p, (shape, _, _) in zip(w.split(SIZES), TABLE.values(), strict=True)]


def spread(values):
    """One number per tensor, over the flat vector."""
    return torch.cat([torch.full((n,), float(v), dtype=torch.float64) for n, v in zip(SIZES, values, strict=True)])


RHO = spread([rho for _, rho, _ in TABLE.values()])


def decay(k, rho):
    """The factor of a group's learning rate; the two radii have different ones, so that lr_t / lr_0 differs."""
    return 1.0 / (1.0 + k / 20) if rho == 0.3 else cosine(k, STEPS)


# -- the problem ---------------------------------------------------------------------------------------------------


def logits(w, x):
    w1, b1, scale, shift, w2, b2 = split(w)
    h = torch.tanh(x @ w1.T + b1)
    h = (h - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    return (h * scale + shift) @ w2.T + b2


def each(z, y):
    """Each sample's cross-entropy with smoothed labels."""
    return -(soft_targets(y, 3, SMOOTHING) * (z - z.logsumexp(1, keepdim=True))).sum(1)


def mean(z, y):
    return each(z, y).mean()


def bisam(phi, mu, z, y):
    """Q = (1/mu) log sum_j exp(mu phi(F_j)), F_j = z_j - z_y, in the mean over the batch."""
    return ((mu * phi(z - z[torch.arange(len(y)), y][:, None])).exp().sum(1).log() / mu).mean()


def gradient(loss, at):
    at = at.detach().requires_grad_()
    return torch.autograd.grad(loss(at), at)[0]


def dense_hessian(loss):
    """Reverse over reverse: forward mode would import what torch itself calls deprecated."""
    return torch.func.jacrev(torch.func.grad(loss))


class Step:
    """What a formula sees of one step.

    Attributes:
        k: the number of the step, from 0. w: the weights. lr: each entry's learning rate. rho: each entry's radius.
        v: the base's momentum, None before the first step.
        pieces: the micro-batches (one: the batch). memory: a dict that lives as long as the run.
        moved: which entries take part in ascents. shapes: of the tensors that do.
        told: the loss that a loop is told, if it is not the one at w.
        post: what is added to the weights after the base's step.
    """

    def __init__(self, k, w, lr, pieces, v, draw, memory):
        self.k, self.w, self.lr, self.pieces, self.v, self.draw, self.memory = k, w, lr, pieces, v, draw, memory
        self.rho, self.moved = RHO, RHO > 0
        self.shapes = [shape for shape, rho, _ in TABLE.values() if rho > 0]
        self.told, self.post = None, 0.0

    def loss(self, at, piece=None, loss=mean):
        pieces = self.pieces if piece is None else [self.pieces[piece]]
        return sum(loss(logits(at, x), y) for x, y in pieces) / len(pieces)

    def grad(self, at, piece=None, loss=mean):
        return gradient(lambda w: self.loss(w, piece, loss), at)

    def random(self, kind):
        """One tensor after the other over those that move, as one vector over the moved entries."""
        return torch.cat([kind(shape, generator=self.draw, dtype=torch.float64).flatten() for shape in self.shapes])

    def coin(self, p=0.5):
        return float(torch.rand(1, generator=self.draw, dtype=torch.float64)) < p

    def eps(self, d, geometry=None, factor=1.0, mask=1.0):
        """The displacement along d, zero where nothing moves; the mask acts after the norm."""
        eps, m = torch.zeros_like(self.w), self.moved
        eps[m] = factor * mask * (geometry or sphere)(self, d[m], self.rho[m])
        return eps

    def both(self, factor=1.0):
        """(g, g_s) of SAM."""
        g = self.grad(self.w)
        return g, self.grad(self.w + self.eps(g, factor=factor))


# -- geometries: of the moved entries ------------------------------------------------------------------------------


def sphere(s, d, rho):
    return rho * d / (d.norm() + EPS)


def adaptive(s, d, rho, eta=0.0, weights_only=False):
    t = s.w[s.moved].abs() + eta
    if weights_only:
        t = torch.where(spread(["weight" in n for n in TABLE]).bool()[s.moved], t, 1.0)
    return rho * t**2 * d / ((t * d).norm() + EPS)


def unnormalised(s, d, rho):
    return rho * d


def centralised(s, d, rho):
    parts = [p.view(h) for p, h in zip(d.split([math.prod(h) for h in s.shapes]), s.shapes, strict=True)]
    centred = [p - p.mean(1, keepdim=True) if p.ndim == 2 else p for p in parts]
    return rho * torch.cat([p.flatten() for p in centred]) / (d.norm() + EPS)


def fisher(s, d, rho, eta=1.0, norm="metric"):
    """The largest <d, eps> with <eps, F eps> <= rho^2, F = 1 + eta d^2; or F^-1 d at length rho."""
    natural = d / (1 + eta * d**2)
    return rho * natural / ((natural.norm() if norm == "euclid" else (d @ natural).sqrt()) + EPS)


# -- runs ----------------------------------------------------------------------------------------------------------


class SGD:
    """v <- 0.9 v + u + 0.01 w."""

    v = None
    nesterov = False

    def __call__(self, w, u, lr):
        d = u + 1e-2 * w
        self.v = d if self.v is None else 0.9 * self.v + d
        return w - lr * (d + 0.9 * self.v if self.nesterov else self.v)


class BareSGD:
    """No momentum, no decay."""

    v = None

    def __call__(self, w, u, lr):
        return w - lr * u


class Nesterov(SGD):
    nesterov = True


class AdamW:
    v, square, t = None, 0.0, 0

    def __call__(self, w, u, lr):
        self.t += 1
        self.v = 0.1 * u if self.v is None else 0.9 * self.v + 0.1 * u
        self.square = 0.999 * self.square + 0.001 * u**2
        root = (self.square / (1 - 0.999**self.t)).sqrt() + 1e-8
        return w - lr * 0.1 * w - lr * self.v / (1 - 0.9**self.t) / root


# base -> (learning rate, reference)
BASES = {"sgd": (0.1, SGD), "bare": (0.1, BareSGD), "nesterov": (0.1, Nesterov), "adamw": (0.02, AdamW)}


def pieces(case, k):
    """The micro-batches of a step; SAM-db's first is another batch."""
    x, y = batch(k, dtype=torch.float64)
    if case.name == "sam-db" or case.params.get("batch") == "previous":
        return [batch(500 + k, dtype=torch.float64), (x, y)]
    return list(zip(x.chunk(case.chunks or 1), y.chunk(case.chunks or 1), strict=True))


def run(case, base, w, steps=STEPS):
    """The weights after each step from w on, and the loss that each step returns."""
    lr0, update = BASES[base][0], BASES[base][1]()
    draw, memory, weights, losses = torch.Generator().manual_seed(SEED), {}, [], []
    for k in range(steps):
        lr = spread([scale * lr0 * decay(k, rho) for _, rho, scale in TABLE.values()])
        step = Step(k, w, lr, pieces(case, k), update.v, draw, memory)
        u = case.formula(step, **case.params)
        losses.append(step.loss(w) if step.told is None else step.told)
        w = update(w, u, lr) + step.post
        weights.append(w)
    return torch.stack(weights), torch.stack(losses)
