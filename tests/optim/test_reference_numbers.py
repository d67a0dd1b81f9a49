"""Trajectories of the papers' own code, to ten decimals, on one small problem without random numbers.

The numbers come from the official code of each method, or the implementation named in the row, run in double precision
at the commit named; "own" marks a form that no public code has, computed by a script that shares nothing with flatmin.
"""

import math
from functools import partial

import pytest
import torch
from torch import nn

import flatmin
from flatmin.methods import Need
from flatmin.optim.program import EngineContext

ROUNDING = 6e-11  # of ten decimals
RHO, TAIL = 0.1, 2  # the radius; the class that is the tail of methods with a head and a tail


def sgd(weights):
    return torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=0.01)


def plain_sgd(weights):
    return torch.optim.SGD(weights, lr=0.1)


def network():
    """Linear(3, 4), tanh, Linear(4, 3); entry k of tensor j is 0.6 sin(1.7 k + j + 1)."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    for j, w in enumerate(model.parameters()):
        w.data = (0.6 * (1.7 * torch.arange(w.numel(), dtype=torch.float64) + j + 1).sin()).view_as(w)
    return model


def batch(t):
    """Six samples of three features; the classes take turns."""
    i, c = torch.arange(6, dtype=torch.float64)[:, None], torch.arange(3, dtype=torch.float64)
    return (1.3 * i + 0.7 * c + 0.5 * t + 0.2 * i * c).sin(), (torch.arange(6) + t) % 3


def closures(model, optimizer, criterion, t, weight):
    """One closure on the batch; for methods on two of them the batch before and this one, or its head and its tail."""

    def closure(t, factors=None):
        optimizer.zero_grad()
        x, y = batch(t)
        each = nn.functional.cross_entropy(model(x), y, reduction="none")
        loss = criterion(model(x), y) if factors is None else (each * factors).sum() / len(y)
        optimizer.backward(loss)
        return loss

    loop = optimizer.recipe.inner_loop
    if Need.MICRO_BATCHES not in optimizer.recipe.needs:
        return partial(closure, t)
    if loop.two_batches:
        return [partial(closure, max(t - 1, 0)), partial(closure, t)]
    tail = (batch(t)[1] == TAIL).double()
    return [partial(closure, t, 1 - tail), partial(closure, t, weight * tail)]


# method, parameters -> the loss on batch 0 after steps 1, 2, 3 (and 4, 5); at the end the norm of w and its first
# entry. None: not printed. "rho": another one; "base": another base optimizer than `sgd`; "weight": what the closure of
# the tail is multiplied by; "noise": what all random numbers are.
BSAM = {"base": plain_sgd, "data_size": math.inf, "delta": 0.01}
ROWS = [
    ("sgd", {}, 1.2056648875, 1.1873252241, 1.1800087820, 2.3433841484, 0.4897746807),
    # the CR-SAM of 7f9fe3e with gamma = beta = 0
    ("sam", {}, 1.2039640199, 1.1842336543, 1.1763123078, 2.3372376091, 0.4868039759),
    # johnjaejunlee95/torch-unified-SAM-optimization db62e4c, no official code; the Euclidean norm: own
    ("fisher-sam", {"eta": 1.0}, 1.2039752018, 1.1842536965, 1.1763363404, 2.3372878070, 0.4868315517),
    ("fisher-sam", {"eta": 25.0}, 1.2041843732, 1.1846411667, 1.1768233604, 2.3381453100, 0.4873379461),
    (
        *("fisher-sam", {"eta": 25.0, "norm": "euclid"}),
        *(1.2039337628, 1.1841912769, 1.1762845320, 2.3372767819, 0.4869299930),
    ),
    # Wang-pengfei/SAGM 69d4d9d
    ("sagm", {"alpha": 0.05}, 1.2050155169, 1.1861382742, 1.1785955662, 2.3409977909, 0.4886397000),
    ("sagm", {"alpha": 0.001}, 1.2048168985, 1.1857794308, 1.1781539780, 2.3403100713, 0.4882995543),
    ("sagm", {"alpha": 0.0}, 1.2048128390, 1.1857721006, 1.1781449665, 2.3402959114, 0.4882925678),
    # TrustAIoT/CR-SAM 7f9fe3e
    (
        *("cr-sam", {"gamma": 0.1, "beta": 0.1}),
        *(1.2036253956, 1.1836223686, 1.1755879501, 2.3360227079, 0.4862067235),
    ),
    (
        *("cr-sam", {"gamma": 0.1, "beta": 0.01}),
        *(1.2039259463, 1.1841644615, 1.1762321135, 2.3370579782, 0.4867212304),
    ),
    ("cr-sam", {"gamma": 0.0, "beta": 0.0}, 1.2039640199, 1.1842336543, 1.1763123078, 2.3372376091, 0.4868039759),
    # cool-xuan/Imbalanced_SAM c65f41e
    ("imbsam", {"weight": 2.0}, 1.2019051102, 1.1834552992, 1.1825934587, 2.3532566465, 0.4889364107),
    ("imbsam", {"weight": 1.0}, 1.2054837802, 1.1871169642, 1.1800277359, 2.3416060138, 0.4897577444),
    # the author's repository of Z-Score-Gradient-Filtering 52764f8; one norm over all: own
    (
        *("zsharp", {"q": 0.5, "per_tensor": True}),
        *(1.2033070427, 1.1830402637, 1.1746604362, 2.3351527143, 0.4860437670),
    ),
    ("zsharp", {"q": 0.95, "per_tensor": True}, None, None, 1.1773257130, 2.3386074338, None),
    ("zsharp", {"q": 0.5}, 1.2039352113, 1.1840133466, 1.1757770094, 2.3373802500, 0.4866677622),
    ("zsharp", {"q": 0.95}, None, None, 1.1776645325, 2.3394485071, None),
    # team-approx-bayes/bayesian-sam 936eec1
    ("bsam", {**BSAM}, 1.2254333115, 1.2233480172, 1.2222549399, 2.3666215394, 0.5031867964),
    ("bsam", {**BSAM, "rho": 0.0}, 1.2255185085, 1.2235166524, 1.2224866814, 2.3669114830, 0.5033188999),
    # no official code: own
    ("functional-sam", {}, 1.2052155536, 1.1864256062, 1.1785605339, 2.3384950536, 0.4879065163),
    # xxgege/GAM 694133d; C-Flat without the state of its own code: own
    ("gam", {"rho": 0.02}, 1.1795583924, 1.1435631689, 1.1354101772, 2.3263320543, 0.4717251321),
    ("c-flat", {}, 1.2035943536, 1.1835710306, 1.1755371704, 2.3359337731, 0.4861820773),
    # RitianLuo/EigenSAM d541077
    ("eigen-sam", {"alpha": 0.0}, 1.2039640199, 1.1842336543, 1.1763123078, 2.3372376091, 0.4868039759),
    (
        *("eigen-sam", {"interval": 1, "noise": 1.0}),
        *(1.2039496791, 1.1842253292, 1.1763657199, 2.3372882466, 0.4862643133),
    ),
    # LIONS-EPFL/SAMPa 01093ef, run in two threads: it climbs on the batch before
    (
        *("sampa", {"batch": "previous", "lam": 0.2}),
        *(1.2056648875, 1.1698238923, 1.1428534167, 1.1269343795, 1.1095684391, None, None),
    ),
    (
        *("sampa", {"batch": "previous", "lam": 0.5}),
        *(1.2056648875, 1.1766988715, 1.1572562856, 1.1434520505, 1.1252730346, None, None),
    ),
    (
        *("sampa", {"batch": "previous", "base": plain_sgd}),
        *(1.2058486307, 1.1885241782, 1.1913686970, 1.1973625730, 1.1896656853, None, None),
    ),
    # the formula, where the code has no perturbation: own
    ("sampa", {"batch": "previous", "lam": 0.0}, 1.2056648875, 1.1653191588, None, None),
]


def name(row):
    return ", ".join([row[0], *(f"{key}={getattr(value, '__name__', value)}" for key, value in row[1].items())])


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_steps_give_the_published_code_s_numbers(row, monkeypatch):
    method, given, *want = row
    params = {"rho": RHO, "base": sgd, "weight": 1.0, "noise": None, **given}
    base, weight, noise = (params.pop(key) for key in ("base", "weight", "noise"))
    if noise is not None:
        monkeypatch.setattr(EngineContext, "noise", lambda c: [torch.full_like(w, noise) for w in c.w])
    model, criterion = network(), flatmin.Criterion(nn.CrossEntropyLoss())
    optimizer = flatmin.wrap(base(model.parameters()), method, model=model, criterion=criterion, **params)
    losses, first = [], batch(0)
    for t in range(len(want) - 2):
        optimizer.step(closures(model, optimizer, criterion, t, weight))
        losses.append(nn.functional.cross_entropy(model(first[0]), first[1]).item())
    w = nn.utils.parameters_to_vector(model.parameters())
    got = [*losses, w.norm().item(), w[0].item()]
    assert {
        i: g for i, (g, v) in enumerate(zip(got, want, strict=True)) if v is not None and abs(g - v) > ROUNDING
    } == {}
