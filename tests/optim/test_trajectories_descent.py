"""Methods that change what the base takes: fifty float64 steps equal each paper's formula on one flat vector.

As in `test_trajectories`, whose net, losses and base updates serve here, the reference shares only autograd with the
library; second derivatives come from the dense Hessian.
"""

import dataclasses
import functools
import math

import pytest
import torch
from torch import nn

import flatmin
from flatmin.methods import SANER
from tests.helpers import batch, bits, cosine, drive, noisy_net, soft_targets
from tests.optim.test_trajectories import (
    BASES,
    BEGINNING,
    LR_FACTOR,
    RHO,
    SHAPES,
    SMOOTHING,
    STEPS,
    adaptive,
    assert_close,
    descent_loss,
    ema,
    flat,
    gradient,
    logits,
    net,
    per_element,
    sphere,
)

SEED = 11
SIZES = [math.prod(s) for s in SHAPES.values()]
SPANS = [slice(sum(SIZES[:i]), sum(SIZES[: i + 1])) for i in range(len(SIZES))]


@dataclasses.dataclass
class Now:
    """One step of the reference: everything that a formula may use."""

    k: int
    w: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    rho: torch.Tensor
    lr: torch.Tensor
    draw: torch.Generator | None
    step: int = 0

    def grad(self, eps=0.0):
        return torch.func.grad(descent_loss)(self.w + eps, self.x, self.y)

    def climbed(self, direction=lambda g: g, geometry=sphere, factor=1.0):
        """(g, g_s)."""
        g, moved = self.grad(), self.rho > 0
        eps = torch.zeros_like(g)
        eps[moved] = geometry(direction(g[moved]), self.w[moved], factor * self.rho[moved])
        return g, self.grad(eps)


# -- each rule takes `Now` and returns u, and what is added to w after the base's step -------------------------------


def sam(direction=gradient, geometry=sphere):
    d = direction()
    return lambda s: (s.climbed(d, geometry)[1], 0.0)


def halves(of_sam, granularity):
    """Direction of one, magnitude of the other; `of_sam`: whose direction."""

    def rule(s):
        g, gs = s.climbed()
        direction, magnitude = (gs, g) if of_sam else (g, gs)
        if granularity == "element":
            return direction.sign() * magnitude.abs(), 0.0
        spans = SPANS if granularity == "tensor" else [slice(None)]
        return torch.cat([direction[p] * magnitude[p].norm() / direction[p].norm() for p in spans]), 0.0

    return lambda: rule


def gsam(alpha, rho_lr=False):
    def rule(s):
        g, gs = s.climbed(factor=cosine(s.k, STEPS) if rho_lr else 1.0)
        unit = gs / gs.norm()
        return gs - alpha * (g - (g @ unit) * unit), 0.0

    return lambda: rule


def wsam(gamma, coupled, direction=gradient, geometry=sphere):
    a = gamma / (1 - gamma)

    def make():
        d = direction()

        def rule(s):
            g, gs = s.climbed(d, geometry)
            return ((1 - a) * g + a * gs, 0.0) if coupled else (g, -s.lr * a * (gs - g))

        return rule

    return make


def gnp(alpha):
    def rule(s):
        g, gs = s.climbed()
        return (1 - alpha) * g + alpha * gs, 0.0

    return lambda: rule


def looksam(k, alpha=0.7):
    def make():
        memory = []

        def rule(s):
            if s.k % k:
                g = s.grad()
                return g + alpha * g.norm() / memory[0].norm() * memory[0], 0.0
            g, gs = s.climbed()
            memory[:] = [gs - (gs @ g) / (g @ g) * g]
            return gs, 0.0

        return rule

    return make


def saner(alpha, warm_up=0):
    def rule(s):
        g, gs = s.climbed()
        r = gs / g
        return (gs if s.k < warm_up else torch.where((r > 0) & (r < 1), (1 - alpha) * gs, gs)), 0.0

    return lambda: rule


def dense_hessian(loss):
    """Reverse over reverse: forward mode would import what torch itself calls deprecated."""
    return torch.func.jacrev(torch.func.grad(loss))


def hessian(s):
    return dense_hessian(descent_loss)(s.w, s.x, s.y)


def gauss_newton(s):
    j = torch.func.jacrev(logits)(s.w, s.x).flatten(0, 1)

    def loss(z):
        z = z.view(len(s.y), 3)
        return -(soft_targets(s.y, 3, SMOOTHING) * z.log_softmax(1)).sum(1).mean()

    return j.T @ dense_hessian(loss)(logits(s.w, s.x).flatten()) @ j


def signs(shapes, generator):
    return [2.0 * (torch.rand(shape, generator=generator) < 0.5).double() - 1.0 for shape in shapes]


def sgdhess(curvature, interval=1, draws=1):
    def make():
        kept = []

        def rule(s):
            g = s.grad()
            if s.k % interval == 0:
                matrix = gauss_newton(s) if curvature == "ggn" else hessian(s)
                if curvature == "exact":
                    kept[:] = [matrix @ g]
                else:
                    zs = [torch.cat([z.flatten() for z in signs(SHAPES.values(), s.draw)]) for _ in range(draws)]
                    hz = [(matrix @ z).abs() if curvature == "hutchinson_abs" else z * (matrix @ z) for z in zs]
                    kept[:] = [sum(hz) / draws]
            return g + s.rho * (kept[0] if curvature == "exact" else kept[0] * g), 0.0

        return rule

    return make


GRAINS = ("element", "tensor", "global")
KEEPS = {
    f"{name}, {grain}{', legacy' * legacy}": (
        name,
        {"granularity": grain, "legacy_names": legacy},
        halves((name == "sam-direction") != legacy, grain),
    )
    for name in ("sam-direction", "sam-magnitude")
    for grain, legacy in [*((g, False) for g in GRAINS), ("element", True), ("global", True)]
}
CURVED = {
    f"sgdhess, {curvature}, every {interval}, draws {draws}": (
        "sgdhess",
        {"curvature": curvature, "interval": interval, "draws": draws},
        sgdhess(curvature, interval, draws),
    )
    for curvature in ("hutchinson_abs", "hutchinson_diag", "ggn", "exact")
    for interval in (1, 3)
    for draws in ((1,) if curvature == "exact" else (1, 2))
}
# case -> name and parameters in the library, maker of the rule of the reference
CASES = {
    "sam": ("sam", {}, sam),
    "vasso": ("vasso", {}, functools.partial(sam, lambda: ema(0.9))),
    **KEEPS,
    "gsam": ("gsam", {}, gsam(0.4)),
    "gsam+rho-lr": ("gsam+rho-lr", {"alpha": 0.4}, gsam(0.4, rho_lr=True)),
    "wsam": ("wsam", {}, wsam(0.9, coupled=False)),
    "wsam, coupled": ("wsam", {"coupled": True}, wsam(0.9, coupled=True)),
    "wsam, gamma 0.3": ("wsam", {"gamma": 0.3}, wsam(0.3, coupled=False)),
    "wsam, gamma 0.3, coupled": ("wsam", {"gamma": 0.3, "coupled": True}, wsam(0.3, coupled=True)),
    "wsam+vasso+asam": ("wsam+vasso+asam", {"gamma": 0.3}, wsam(0.3, False, lambda: ema(0.9), adaptive)),
    "gnp": ("gnp", {}, gnp(0.8)),
    "gnp, alpha 0.3": ("gnp", {"alpha": 0.3}, gnp(0.3)),
    "looksam": ("looksam", {}, looksam(5)),
    "looksam, k 3": ("looksam", {"k": 3, "alpha": 0.4}, looksam(3, 0.4)),
    "saner": ("saner", {}, saner(0.5)),
    "saner, warm up": ("saner", {"alpha": 0.8, "warm_up": 20}, saner(0.8, 20)),
    **CURVED,
}
TWO_PASS = ["gsam+rho-lr", "wsam", "wsam, gamma 0.3, coupled", "looksam, k 3", "saner", "sam-direction, tensor"]
SOME = [*TWO_PASS, *list(CURVED)[1::4]]
# (case, base, door, options)
RUNS = [
    *((case, "sgd", door, {}) for case in CASES for door in ("closure", "passes")),
    *((case, "adamw", "closure", {}) for case in CASES if case not in KEEPS and "draws 1" not in case),
    ("sgdhess, exact, every 3, draws 1", "adamw", "closure", {}),
    *((case, "adamw", "passes", {}) for case in ["sam", "vasso", *SOME]),
    *((case, "adamw", door, {}) for case in TWO_PASS for door in ("perturbed", "two calls")),
    *((case, "nesterov", door, {}) for case in ("sam", "vasso", "wsam") for door in ("closure", "passes")),
    *((case, "sgd", "closure", {"device_path": True}) for case in SOME),
    *((case, "sgd", "passes", {"device_path": True, "fused": True}) for case in SOME),
]


@functools.cache
def reference(case, base, steps=STEPS):
    """The weights after each step, and the loss at w of each."""
    lr0, make_update, _, _ = BASES[base]
    update, rule = make_update(), CASES[case][2]()
    rho, lr = per_element(RHO), per_element(LR_FACTOR) * lr0
    draw = torch.Generator().manual_seed(SEED)
    w, weights, losses = flat(net()), [], []
    for k in range(steps):
        x, y = batch(k, dtype=torch.float64)
        losses.append(descent_loss(w, x, y))
        now = lr * cosine(k, STEPS)
        u, post = rule(Now(k, w, x, y, rho, now, draw))
        w = update(w, u, now) + post
        weights.append(w)
    return torch.stack(weights), torch.stack(losses)


def trajectory(case, base, door="closure", steps=STEPS, device_path=False, fused=None, **more):
    """The library's weights after each step, with three groups, and the loss that a loop sees."""
    name, params, _ = CASES[case] if isinstance(case, str) else case
    lr, _, torch_class, options = BASES[base]
    model = net()
    first, _, last = model
    groups = [
        {"params": [first.weight, first.bias], "rho": 0.1},
        {"params": [last.weight], "rho": 0.3, "lr": 0.5 * lr},
        {"params": [last.bias], "rho": 0.0},
    ]
    criterion = flatmin.Criterion(nn.CrossEntropyLoss(label_smoothing=SMOOTHING))
    made = torch_class(groups, lr=lr, fused=fused, **options)
    optimizer = flatmin.wrap(made, name, model=model, criterion=criterion, seed=SEED, **params, **more)
    optimizer._tools.on_device = device_path
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    weights, losses = [], []
    for k in range(steps):
        x, y = batch(k, dtype=torch.float64)

        def backward(x=x, y=y):
            loss = criterion(model(x), y)
            optimizer.backward(loss)
            return loss

        losses.append(drive(optimizer, backward, door))
        scheduler.step()
        weights.append(flat(model))
    assert optimizer.counts() == {"updates": steps, "nonfinite_ascents": 0, "skipped_steps": 0}
    return torch.stack(weights), torch.stack(losses)


@pytest.mark.parametrize(
    ("case", "base", "door", "options"),
    RUNS,
    ids=["-".join([*r[:3], *r[3]]).replace("device_path", "device") for r in RUNS],
)
def test_every_loop_follows_the_formula(case, base, door, options):
    """Weights after every step, and the loss at w: of all fifty with SGD and a closure, else of the first."""
    if (base, door, options) == ("sgd", "closure", {}):
        assert_close(trajectory(case, base, door), reference(case, base))
    elif base == "sgd":  # known to the end
        known = [each[:BEGINNING] for each in reference(case, base)]
        assert_close(trajectory(case, base, door, BEGINNING, **options), known)
    else:
        assert_close(trajectory(case, base, door, BEGINNING, **options), reference(case, base, BEGINNING))


def test_the_cases_differ():
    """Agreement means something only if the cases have trajectories of their own; legacy names swap the two methods."""
    groups = {}
    for case in CASES:
        name, params, _ = CASES[case]
        kind, other = ("sam-direction", "sam-magnitude"), params.get("legacy_names")
        key = (name if not other else kind[1 - kind.index(name)], params["granularity"]) if name in kind else case
        groups.setdefault(key, []).append(reference(case, "sgd")[0][-1])
    ends = list(groups.values())
    for i, same in enumerate(ends):
        assert all(torch.equal(same[0], e) for e in same)
        assert all(float((same[0] - other[0]).abs().max()) > 1e-6 for other in ends[:i])


# -- convolution kernels: |H z| is averaged over the spatial dimensions ----------------------------------------------


@pytest.mark.parametrize("spatial_mean", [True, False])
@pytest.mark.parametrize("curvature", ["hutchinson_abs", "hutchinson_diag"])
def test_kernels_take_the_spatial_mean(curvature, spatial_mean):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 2, (2, 3)), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
    names, shapes = zip(*((n, p.shape) for n, p in model.named_parameters()), strict=True)
    sizes = [math.prod(s) for s in shapes]
    options = {"curvature": curvature, "spatial_mean": spatial_mean, "draws": 2}
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = flatmin.wrap(base, "sgdhess", rho=0.2, seed=SEED, **options)
    w, draw, buffer = flat(model), torch.Generator().manual_seed(SEED), 0.0
    for k in range(10):
        g = torch.Generator().manual_seed(k)
        x, y = torch.randn(6, 1, 4, 4, generator=g, dtype=torch.float64), torch.randint(3, (6,), generator=g)

        def loss(v, x=x, y=y):
            tensors = {n: t.view(s) for n, t, s in zip(names, v.split(sizes), shapes, strict=True)}
            return nn.functional.cross_entropy(torch.func.functional_call(model, tensors, x), y)

        matrix, g = dense_hessian(loss)(w), torch.func.grad(loss)(w)
        h = torch.zeros_like(w)
        for _ in range(2):
            z = torch.cat([s.flatten() for s in signs(shapes, draw)])
            one = (matrix @ z).abs() if curvature == "hutchinson_abs" else z * (matrix @ z)
            kernel = one[: sizes[0]].view(2, 1, 6)
            if spatial_mean and curvature == "hutchinson_abs":
                one[: sizes[0]] = kernel.mean(2, keepdim=True).expand_as(kernel).flatten()
            h += one / 2
        buffer = 0.9 * buffer + g + 0.2 * h * g
        w = w - 0.1 * buffer

        def backward(x=x, y=y):
            found = nn.functional.cross_entropy(model(x), y)
            optimizer.backward(found)
            return found

        drive(optimizer, backward, "closure" if k % 2 else "passes")
        assert float((flat(model) - w).abs().max()) <= 1e-10


@functools.cache
def limit_of(name):
    return trajectory((name, {"k": 3} if name == "every-k" else {}, None), "adamw", steps=BEGINNING)


# -- limits that are other methods, and methods at limits of the loss ------------------------------------------------


@pytest.mark.parametrize(
    ("name", "params", "limit"),
    [
        ("looksam", {"k": 1}, "sam"),
        ("gsam", {"alpha": 0.0}, "sam"),
        ("wsam", {"gamma": 0.5, "coupled": True}, "sam"),
        ("gnp", {"alpha": 1.0}, "sam"),
        ("gnp", {"alpha": 0.0}, "sgd"),
        ("wsam", {"gamma": 0.0}, "sgd"),
        ("wsam", {"gamma": 0.0, "coupled": True}, "sgd"),
        ("saner", {"alpha": 0.0}, "sam"),
        ("saner", {"warm_up": STEPS}, "sam"),
        ("looksam", {"k": 3, "alpha": 0.0}, "every-k"),
    ],
)
def test_limits_are_the_methods_they_name(name, params, limit):
    got = trajectory((name, params, None), "adamw", steps=BEGINNING)
    assert_close(got, limit_of(limit))


COMBINING = {
    "gsam": ("gsam", {}),
    "wsam": ("wsam", {}),
    "wsam, coupled": ("wsam", {"coupled": True}),
    "gnp": ("gnp", {}),
    "looksam": ("looksam", {"k": 3}),
    "saner": ("saner", {}),
    "sam-magnitude": ("sam-magnitude", {}),
    **{f"sam-direction, {g}": ("sam-direction", {"granularity": g}) for g in GRAINS},
    **{f"sgdhess, {c}": ("sgdhess", {"curvature": c}) for c in ("hutchinson_abs", "hutchinson_diag", "ggn", "exact")},
}


def run(name, params, loss_of, *, door="closure", rho=None, base="sgd"):
    """The model's tensors after some float32 steps on `loss_of(criterion, model, k)`; no name: the base by itself."""
    model, criterion = noisy_net(), flatmin.Criterion(nn.CrossEntropyLoss())
    made = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[base](model.parameters(), lr=0.05, weight_decay=0.01)
    optimizer = flatmin.wrap(made, name or "sgd", rho=rho, model=model, criterion=criterion, **params)
    for k in range(8):
        if name is None:
            made.zero_grad()
            loss_of(criterion, model, k).backward()
            made.step()
            continue

        def backward(k=k):
            loss = loss_of(criterion, model, k)
            optimizer.backward(loss)
            return loss

        drive(optimizer, backward, door)
    return [p.detach() for p in (*model.parameters(), *model.buffers())]


def entropy(criterion, model, k):
    x, y = batch(k)
    return criterion(model(x), y)


@pytest.mark.parametrize("door", ["closure", "passes"])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("case", COMBINING)
def test_rho_zero_is_the_base_bit_for_bit(case, base, door):
    name, params = COMBINING[case]
    got = run(name, params, entropy, door=door, rho=0.0, base=base)
    want = run(None, {}, entropy, base=base)
    assert all(map(torch.equal, bits(got), bits(want)))


@pytest.mark.parametrize("case", COMBINING)
def test_zero_gradients_give_numbers(case):
    """First only step 1 has a gradient, so that LookSAM keeps zeros and scales zeros; then none has one."""
    for alive in (1, None):
        found = [
            run(*pair, lambda c, m, k, alive=alive: entropy(c, m, k) * float(k == alive))
            for pair in (COMBINING[case], (None, {}))
        ]
        assert all(bool(t.isfinite().all()) for t in found[0])
        assert alive == 1 or all(map(torch.equal, *found))


@pytest.mark.parametrize("case", [c for c in COMBINING if "ggn" not in c])
def test_a_loss_without_curvature_is_the_base(case):
    """Where the loss is linear g_s is g: its halves are those of g, nothing is orthogonal, nothing shrinks, H is 0."""
    name, params = COMBINING[case]

    def linear(criterion, model, k):
        return sum((p * torch.linspace(-1, 1, p.numel()).view_as(p)).sum() for p in model.parameters()) + 0.0 * k

    got, want = run(name, params, linear), run(None, {}, linear)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16],
)
def test_saner_damps_small_entries(dtype):
    """r = 1/2 everywhere, at sizes whose product float16 cannot hold."""
    g = torch.linspace(5e-5, 2e-4, 16).to(dtype)
    u, _ = SANER(alpha=0.5)([g], [[g / 2]], {}, Now(0, g, g, g, g, g, None))
    assert torch.equal(u[0], g / 2 * 0.5)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "params", "match"),
    [
        ("wsam", {"gamma": 1.0}, "gamma must be below 1"),
        ("wsam", {"gamma": -0.1}, "gamma must be in"),
        ("gsam", {"alpha": -1.0}, "alpha must be in"),
        ("gnp", {"alpha": math.nan}, "alpha must be in"),
        ("saner", {"alpha": 1.5}, "alpha must be in"),
        ("saner", {"warm_up": -1}, "warm_up must be a whole number"),
        ("looksam", {"k": 0}, "k must be a whole number"),
        ("sam-direction", {"granularity": "layer"}, "granularity must be 'element', 'tensor' or 'global'"),
        ("sam-magnitude", {"keep": "both"}, "keep must be 'direction' or 'magnitude'"),
        ("sgdhess", {"curvature": "fisher"}, "curvature must be 'hutchinson_abs'"),
        ("sgdhess", {"draws": 0}, "draws must be a whole number"),
        ("gsam+wsam", {}, "'gsam' and 'wsam' both set the combine"),
        ("looksam+every-k", {}, "'looksam' and 'every-k' both set the schedule"),
        ("gsam+bisam-log", {}, "do not go together.*own gradient at w"),
        ("gsam+momentum-sam", {}, "do not go together.*takes no pass 1"),
        ("micro-sam+gsam", {}, "do not go together.*gradient of its own"),
        ("micro-sam+vasso", {}, "do not go together.*gradient of its own"),
        ("sgdhess+asam", {}, "do not go together.*never leaves w"),
        ("esam+momentum-sam", {}, "do not go together.*takes no pass 1"),
        ("ae-sam+bisam-log", {}, "do not go together.*own gradient at w"),
    ],
)
def test_bad_parameters_and_compositions_are_refused(name, params, match):
    with pytest.raises(ValueError, match=match):
        flatmin.compose(name, **params)


@pytest.mark.parametrize("door", ["closure", "passes"])
def test_second_order_asks_for_its_own_backward(door):
    model = net()
    optimizer = flatmin.wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), "sgdhess", seed=SEED)
    x, y = batch(0, dtype=torch.float64)
    before = bits(model.parameters())

    def backward(call):
        loss = nn.functional.cross_entropy(model(x), y)
        call(loss)
        return loss

    with pytest.raises(RuntimeError, match=r"optimizer\.backward\(loss\)"):
        drive(optimizer, lambda: backward(torch.Tensor.backward), door)
    assert all(map(torch.equal, before, bits(model.parameters()))) and optimizer.counts()["updates"] == 0
    drive(optimizer, lambda: backward(optimizer.backward), door)
    assert not all(map(torch.equal, before, bits(model.parameters()))) and optimizer.counts()["updates"] == 1


def test_gauss_newton_needs_the_loss_object():
    base = torch.optim.SGD(net().parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"needs the loss object \(pass criterion="):
        flatmin.wrap(base, "sgdhess", curvature="ggn")
    for curvature in ("hutchinson_abs", "hutchinson_diag", "exact"):
        flatmin.wrap(base, "sgdhess", curvature=curvature)


def test_gauss_newton_needs_a_loss_of_the_loss_object():
    model, criterion = net(), flatmin.Criterion(nn.CrossEntropyLoss())
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = flatmin.wrap(base, "sgdhess", curvature="ggn", criterion=criterion)
    x, y = batch(0, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="never called the criterion"):
        drive(optimizer, lambda: optimizer.backward(nn.functional.cross_entropy(model(x), y)))
