"""Fifty steps of float64 training equal each paper's formula, written out here on one flat vector.

The reference shares nothing with the library but torch's autograd: its own net, losses, ascents and base updates.
"""

import functools
import math

import pytest
import torch
from torch import nn

import flatmin
from tests.helpers import DOORS, batch, cosine, drive, soft_targets

STEPS, TOLERANCE = 50, 1e-10
BEGINNING = 20  # of the same fifty: as many as every further door and base is compared over
SHAPES = {"0.weight": (5, 6), "0.bias": (5,), "2.weight": (3, 5), "2.bias": (3,)}
# Three groups: two radii, and one group that is not moved. Values stand for each tensor of SHAPES.
RHO = dict(zip(SHAPES, (0.1, 0.1, 0.3, 0.0), strict=True))
LR_FACTOR = dict(zip(SHAPES, (1.0, 1.0, 0.5, 1.0), strict=True))
SMOOTHING, EPS = 0.1, 1e-12


def per_element(values):
    """One number per tensor, spread over the flat vector."""
    return torch.cat([torch.full(SHAPES[n], float(v), dtype=torch.float64).flatten() for n, v in values.items()])


def is_weight(moved):
    return per_element({n: "weight" in n for n in SHAPES}).bool()[moved]


# -- losses on the flat vector -----------------------------------------------------------------------------------


def logits(w, x):
    parts = w.split([math.prod(s) for s in SHAPES.values()])
    w1, b1, w2, b2 = (p.view(s) for p, s in zip(parts, SHAPES.values(), strict=True))
    return torch.tanh(x @ w1.T + b1) @ w2.T + b2


def descent_loss(w, x, y):
    z = logits(w, x)
    return -(soft_targets(y, 3, SMOOTHING) * (z - z.logsumexp(1, keepdim=True))).sum(1).mean()


def bisam(phi, mu):
    def loss(w, x, y):
        z = logits(w, x)
        return ((mu * phi(z - z[torch.arange(len(y)), y][:, None])).exp().sum(1).log() / mu).mean()

    return loss


bisam_log = bisam(lambda f: 1 - torch.log(1 + torch.exp(math.log(math.e - 1) - f)), mu=1.0)
bisam_tanh = bisam(lambda f: torch.tanh(0.1 * f), mu=10.0)


# -- directions, made anew for each run because some remember; geometries -------------------------------------------


def gradient():
    return lambda g: g


def ema(theta):
    memory = []

    def direction(g):
        memory[:] = [(1 - theta) * memory[0] + theta * g if memory else g]
        return memory[0]

    return direction


def friendly(sigma, lam, ema):
    memory = []

    def direction(g):
        if not memory:
            memory.append(g)
            return g
        previous, memory[0] = memory[0], lam * memory[0] + (1 - lam) * g
        return g - sigma * (memory[0] if ema == "current" else previous)

    return direction


def sphere(d, w, rho):
    return rho * d / (d.norm() + EPS)


def unnormalised(d, w, rho):
    return rho * d


def adaptive(d, w, rho):
    return rho * w**2 * d / ((w.abs() * d).norm() + EPS)


def adaptive_weights_only(d, w, rho):
    t = torch.where(is_weight(per_element(RHO) > 0), w.abs() + 0.01, torch.ones_like(w))
    return rho * t**2 * d / ((t * d).norm() + EPS)


# case -> name and parameters in the library, then (ascent loss, direction, geometry) of the reference
CASES = {
    "sgd": ("sgd", {}, None),
    "sam": ("sam", {}, (descent_loss, gradient, sphere)),
    "asam": ("asam", {}, (descent_loss, gradient, adaptive)),
    "asam, weights only": (
        "asam",
        {"eta": 0.01, "weights_only": True},
        (descent_loss, gradient, adaptive_weights_only),
    ),
    "usam": ("usam", {}, (descent_loss, gradient, unnormalised)),
    "vasso": ("vasso", {}, (descent_loss, lambda: ema(0.9), sphere)),
    "vasso, theta 0.2": ("vasso", {"theta": 0.2}, (descent_loss, lambda: ema(0.2), sphere)),
    "fsam": ("fsam", {}, (descent_loss, lambda: friendly(1.0, 0.9, "current"), sphere)),
    "fsam, previous": (
        "fsam",
        {"ema": "previous"},
        (descent_loss, lambda: friendly(1.0, 0.9, "previous"), sphere),
    ),
    "fsam, sigma 0.5": (
        "fsam",
        {"sigma": 0.5, "lam": 0.6},
        (descent_loss, lambda: friendly(0.5, 0.6, "current"), sphere),
    ),
    "fsam, sigma 0.5, previous": (
        "fsam",
        {"sigma": 0.5, "lam": 0.6, "ema": "previous"},
        (descent_loss, lambda: friendly(0.5, 0.6, "previous"), sphere),
    ),
    "bisam-log": ("bisam-log", {}, (bisam_log, gradient, sphere)),
    "bisam-tanh": ("bisam-tanh", {}, (bisam_tanh, gradient, sphere)),
    "vasso+bisam-log+asam": ("vasso+bisam-log+asam", {}, (bisam_log, lambda: ema(0.9), adaptive)),
    "fsam+usam": ("fsam+usam", {}, (descent_loss, lambda: friendly(1.0, 0.9, "current"), unnormalised)),
}


# -- base updates ------------------------------------------------------------------------------------------------


def sgd(nesterov=False, momentum=0.9, decay=1e-2):
    buffer = []

    def update(w, g, lr):
        d = g + decay * w
        buffer[:] = [momentum * buffer[0] + d if buffer else d]
        return w - lr * (d + momentum * buffer[0] if nesterov else buffer[0])

    return update


def adamw(decay=0.1, beta1=0.9, beta2=0.999, eps=1e-8):
    m = v = 0.0
    t = 0

    def update(w, g, lr):
        nonlocal m, v, t
        t += 1
        w = w - lr * decay * w
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        return w - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)

    return update


# base -> (learning rate, reference update, torch's class, its options)
BASES = {
    "sgd": (0.1, sgd, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 1e-2}),
    "nesterov": (
        0.1,
        lambda: sgd(nesterov=True),
        torch.optim.SGD,
        {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": True},
    ),
    "adamw": (0.02, adamw, torch.optim.AdamW, {"weight_decay": 0.1}),
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@functools.cache
def reference(case, base, steps=STEPS):
    """The weights after each step, and the descent loss at w of each step."""
    lr0, make_update, _, _ = BASES[base]
    update, parts = make_update(), CASES[case][2]
    rho, lr_factor = per_element(RHO), per_element(LR_FACTOR)
    moved = rho > 0
    if parts is not None:
        ascent_loss, make_direction, geometry = parts
        direction = make_direction()
    w, weights, losses = flat(net()), [], []
    for k in range(steps):
        x, y = batch(k, dtype=torch.float64)
        losses.append(descent_loss(w, x, y))
        eps = torch.zeros_like(w)
        if parts is not None:
            q = torch.func.grad(ascent_loss)(w, x, y)
            eps[moved] = geometry(direction(q[moved]), w[moved], rho[moved])
        g = torch.func.grad(descent_loss)(w + eps, x, y)
        w = update(w, g, lr_factor * lr0 * cosine(k, STEPS))
        weights.append(w)
    return torch.stack(weights), torch.stack(losses)


def build(model, case, base, fused=None, **options):
    """The library's optimizer with three groups, its criterion and a cosine schedule."""
    lr, _, torch_class, base_options = BASES[base]
    first, _, last = model
    groups = [
        {"params": [first.weight, first.bias], "rho": 0.1},
        {"params": [last.weight], "rho": 0.3, "lr": 0.5 * lr},
        {"params": [last.bias], "rho": 0.0},
    ]
    name, params, _ = CASES[case]
    criterion = flatmin.Criterion(nn.CrossEntropyLoss(label_smoothing=SMOOTHING))
    made = torch_class(groups, lr=lr, fused=fused, **base_options)
    optimizer = flatmin.wrap(made, name, model=model, criterion=criterion, **options, **params)
    return optimizer, criterion, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


def trajectory(case, base, door="closure", device_path=False, steps=STEPS, **options):
    model = net()
    optimizer, criterion, scheduler = build(model, case, base, **options)
    optimizer._tools.on_device = device_path
    weights, losses = [], []
    for k in range(steps):
        x, y = batch(k, dtype=torch.float64)

        def backward(x=x, y=y):
            loss = criterion(model(x), y)
            loss.backward()
            return loss

        losses.append(drive(optimizer, backward, door))
        scheduler.step()
        weights.append(flat(model))
    assert optimizer.counts() == {"updates": steps, "nonfinite_ascents": 0, "skipped_steps": 0}
    return torch.stack(weights), torch.stack(losses)


def assert_close(got, want):
    for g, w in zip(got, want, strict=True):
        assert float((g - w).abs().max()) <= TOLERANCE


def assert_begins(case, base, door="closure", **options):
    """The same on the first steps of the fifty."""
    got = trajectory(case, base, door, steps=BEGINNING, **options)
    if base == "sgd":  # known to the end
        assert_close(got, [known[:BEGINNING] for known in reference(case, base)])
    else:
        assert_close(got, reference(case, base, BEGINNING))


@pytest.mark.parametrize("case", CASES)
def test_a_closure_follows_the_formula(case):
    """Weights after every step, and the returned loss, which is the descent loss at w for each method."""
    assert_close(trajectory(case, "sgd"), reference(case, "sgd"))


@pytest.mark.parametrize("case", CASES)
def test_a_closure_follows_the_formula_with_adamw(case):
    assert_begins(case, "adamw")


@pytest.mark.parametrize("case", ["sam", "vasso+bisam-log+asam"])
def test_nesterov_momentum(case):
    assert_begins(case, "nesterov")


@pytest.mark.parametrize("door", [d for d in DOORS if d != "closure"])
@pytest.mark.parametrize("case", CASES)
def test_every_door_follows_the_formula(case, door):
    assert_begins(case, "sgd", door)


@pytest.mark.parametrize(
    "options", [{}, {"nonfinite": "propagate"}, {"fused": True}], ids=["skip", "propagate", "fused"]
)
@pytest.mark.parametrize("case", CASES)
def test_the_path_of_accelerators_follows_the_formula(case, options):
    """Scales and verdicts stay tensors; with a fused base the verdict on the gradient does as well."""
    assert_begins(case, "sgd", device_path=True, **options)


@pytest.mark.parametrize("case", ["sam", "vasso+bisam-log+asam"])
@pytest.mark.parametrize("door", DOORS)
def test_the_path_of_accelerators_with_adamw_in_every_door(case, door):
    assert_begins(case, "adamw", door, device_path=True, fused=True)


@pytest.mark.parametrize("nonfinite", ["propagate", "raise"])
@pytest.mark.parametrize("case", ["sgd", "sam", "fsam+usam"])
def test_the_rule_for_bad_gradients_does_not_touch_good_ones(case, nonfinite):
    assert_begins(case, "adamw", nonfinite=nonfinite)


@pytest.mark.parametrize("case", CASES)
def test_the_functional_door_follows_the_formula(case):
    """The gradient u of `value_and_grad`, handed to the reference's own SGD."""
    name, params, parts = CASES[case]
    recipe = flatmin.compose(name, **params)
    ascent_loss = parts[0] if parts is not None and parts[0] is not descent_loss else None
    update, lr = sgd(), per_element(LR_FACTOR) * BASES["sgd"][0]
    tensors = {n: p.detach().clone() for n, p in net().named_parameters()}
    state, weights, losses = None, [], []
    for k in range(STEPS):
        x, y = batch(k, dtype=torch.float64)

        def on_dict(loss, x=x, y=y):
            return lambda p: loss(torch.cat([p[n].flatten() for n in SHAPES]), x, y)

        loss, u, state = flatmin.value_and_grad(
            on_dict(descent_loss),
            tensors,
            recipe=recipe,
            rho=RHO,
            ascent_fn=None if ascent_loss is None else on_dict(ascent_loss),
            state=state,
        )
        w = torch.cat([tensors[n].flatten() for n in SHAPES])
        w = update(w, torch.cat([u[n].flatten() for n in SHAPES]), lr * cosine(k, STEPS))
        sizes = [math.prod(s) for s in SHAPES.values()]
        tensors = {n: v.view(SHAPES[n]) for n, v in zip(SHAPES, w.split(sizes), strict=True)}
        weights.append(w)
        losses.append(loss.detach())
    assert_close((torch.stack(weights), torch.stack(losses)), reference(case, "sgd"))


def test_the_cases_differ():
    """Agreement means something only if each case has its own trajectory; equal by theory: F-SAM at sigma = 1."""
    ends = {case: reference(case, "sgd")[0][-1] for case in CASES}
    twins = {"fsam", "fsam, previous"}
    for a in CASES:
        for b in CASES:
            far = float((ends[a] - ends[b]).abs().max())
            assert far < TOLERANCE if a == b or {a, b} == twins else far > 1e-5, (a, b)


def test_the_pure_function_names_vmap_where_it_cannot_run():
    """And runs where the loss itself is mapped."""
    w, x = torch.randn(4, 3), torch.randn(4, 3)

    def one(w, x):
        return flatmin.value_and_grad(lambda p: (p["w"] @ x).square(), {"w": w})[1]["w"]

    with pytest.raises(RuntimeError, match=r"inside torch.vmap.*Python loop over the members"):
        torch.vmap(one)(w, x)
    inner = lambda p: torch.vmap(lambda w, x: (w @ x).square())(p["w"], x).sum()  # noqa: E731
    _, grads, _ = flatmin.value_and_grad(inner, {"w": w}, rho=0.0)
    torch.testing.assert_close(grads["w"], 2 * (w * x).sum(1, keepdim=True) * x)
