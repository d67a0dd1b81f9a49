"""Every method follows its paper's formula: by closures, by the loop over passes and as a pure function."""

import dataclasses
import functools
import itertools
from functools import partial

import pytest
import torch
from torch import nn

import flatmin
from flatmin.methods import METHODS, Mask, Need
from flatmin.optim.support import Loop as Support
from flatmin.optim.support import refusal
from tests.helpers import as_on_device, drive, same_bits, takes_chunks
from tests.optim import reference
from tests.optim.formulas import CASES, Case, formula, momentum_sam, with_lr
from tests.optim.reference import SEED, SIZES, SMOOTHING, STEPS, TABLE, decay, logits, mean, pieces, split, spread

TOLERANCE = 1e-10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkered(Mask):
    """Every other entry of a tensor moves, and the norm is theirs. No built-in mask acts before the norm."""

    def __call__(self, d, state, c):
        return [(torch.arange(x.numel()) % 2).to(x).view_as(x) for x in d], {}


@formula("sam", {"mask": Checkered()})
def inside(s, mask):
    parts = s.grad(s.w).split(SIZES)
    return s.grad(s.w + s.eps(torch.cat([p * (torch.arange(len(p)) % 2) for p in parts])))


# base -> torch's class and its options beside the learning rate
BASES = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 1e-2}),
    "bare": (torch.optim.SGD, {}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
}


def build():
    """The model and the groups of its parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    nn.init.normal_(model[2].bias)
    named = dict(model.named_parameters())
    assert {n: tuple(p.shape) for n, p in named.items()} == {n: shape for n, (shape, _, _) in TABLE.items()}
    grouped = itertools.groupby(TABLE, key=lambda n: TABLE[n][1:])
    return model, [{"params": [named[n] for n in ns], "rho": rho, "lr": lr} for (rho, lr), ns in grouped]


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Loop:
    """A training loop of the library over the problem of the formulas."""

    def __init__(self, case, base="sgd", *, device=False, fused=None, **options):
        self.case, lr = case, reference.BASES[base][0]
        torch_class, usual = BASES[base]
        self.model, groups = build()
        rules = [partial(decay, rho=g["rho"]) for g in groups]
        made = torch_class([{**g, "lr": lr * g["lr"]} for g in groups], lr=lr, fused=fused, **usual)
        self.criterion = flatmin.Criterion(nn.CrossEntropyLoss(label_smoothing=SMOOTHING))
        options = {"model": self.model, "criterion": self.criterion, "seed": SEED, **case.params, **options}
        self.optimizer = as_on_device(flatmin.wrap(made, case.name, **options), device)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rules)

    def backward(self, k, chunk=None):
        parts = pieces(self.case, k)
        x, y = (torch.cat(c) for c in zip(*parts, strict=True)) if chunk is None else parts[chunk]
        loss = self.criterion(self.model(x), y)
        self.optimizer.backward(loss)
        return loss

    def update(self, k, entry="closure"):
        """One update; the loss that the loop is told."""
        chunks = self.case.chunks if entry == "closure" or takes_chunks(self.optimizer) else 0
        loss = drive(self.optimizer, partial(self.backward, k), entry, chunks)
        self.scheduler.step()
        return loss


def trajectory(case, entry="closure", base="sgd", steps=STEPS, **options):
    """The library's weights after each step, and the losses that a loop is told."""
    loop, weights, losses = Loop(case, base, **options), [], []
    for k in range(steps):
        losses.append(loop.update(k, entry))
        weights.append(flat(loop.model))
    assert loop.optimizer.counts() == {"updates": steps, "nonfinite_ascents": 0, "skipped_steps": 0}
    return torch.stack(weights), torch.stack(losses)


def pure(case, transform=lambda function: function):
    """The same by `value_and_grad`, whose u is handed to the reference's own SGD."""
    recipe = flatmin.compose(case.name, **case.params)
    climbed = recipe.objective.ascent if Need.CRITERION in recipe.needs else None
    update, w, state, weights, losses = reference.SGD(), flat(build()[0]), None, [], []

    def once(params, x, y, state):
        def at(loss):
            return lambda p: loss(logits(torch.cat([p[n].flatten() for n in TABLE]), x), y)

        return flatmin.value_and_grad(
            at(mean),
            params,
            recipe=recipe if case.params else case.name,
            rho={n: rho for n, (_, rho, _) in TABLE.items()},
            ascent_fn=at(climbed) if climbed else None,
            state=state,
        )

    once = transform(once)
    for k in range(STEPS):
        ((x, y),) = pieces(case, k)
        loss, u, state = once(dict(zip(TABLE, split(w), strict=True)), x, y, state)
        lr = spread([scale * 0.1 * decay(k, rho) for _, rho, scale in TABLE.values()])
        w = update(w, torch.cat([u[n].flatten() for n in TABLE]), lr)
        weights.append(w)
        losses.append(loss.detach())
    return torch.stack(weights), torch.stack(losses)


@functools.cache
def known(case, base="sgd"):
    return reference.run(case, base, flat(build()[0]))


FIRST = {case.name: case for case in reversed(CASES)}.values()


def runs(case):
    """(entry point, base, options) to compare.

    For a name's first case these are two entry points, two bases and both paths of the engine, to which a method's
    options make no difference. That all other entry points are the closure, bit for bit, is in `test_every_method.py`.
    """
    needs = flatmin.compose(case.name, **case.params).needs
    yield "closure", "sgd", {}
    if case in FIRST and (not case.chunks or Need.MICRO_BATCHES in needs):  # else a list of closures is not the method
        # Nesterov momentum writes to the gradients; Adam has its momentum elsewhere.
        base = "adamw" if Need.BASE_MOMENTUM in needs else "nesterov"
        yield "passes", base, {"device": True, "fused": True}


def served_base(case, base):
    """The base itself, or for a method that wants SGD, or SGD without momentum, that."""
    needs = flatmin.compose(case.name, **case.params).needs
    return "bare" if Need.BARE_SGD in needs else "sgd" if Need.SGD in needs and base == "adamw" else base


def test_every_method_has_a_formula():
    """Another test of this file can say nothing of a method that has none."""
    missing = sorted(METHODS.keys() - {case.name for case in CASES})
    assert not missing, (
        f"{', '.join(missing)}: no formula. Add to tests/optim/formulas.py one function that returns the gradient for "
        f'the base, written from the paper: @formula("{missing[0]}") def ...(s): ...'
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_method_follows_its_formula(case):
    """Weights after every step; and the loss that a loop is told, where one pass sees the whole batch."""
    for entry, base, options in runs(case):
        base = served_base(case, base)
        got, want = trajectory(case, entry, base, **options), known(case, base)
        far = float((got[0] - want[0]).abs().max())
        assert far <= TOLERANCE, f"{entry} around {base}: {far:.1e} away from the formula"
        assert case.chunks or float((got[1] - want[1]).abs().max()) <= TOLERANCE, f"{entry} around {base}: the loss"
    recipe = flatmin.compose(case.name, **case.params)
    if case.chunks == 0 and not refusal(recipe, Support.FUNCTIONAL) and Need.RANDOM not in recipe.needs:
        for got, want in zip(pure(case), known(case, "sgd"), strict=True):
            assert float((got - want).abs().max()) <= TOLERANCE, "value_and_grad"


@pytest.mark.parametrize("name", ["asam", "vasso", "bisam-log", "gsam", "every-k", "n-step"])
def test_a_compiled_step_is_one_graph(name):
    """But for inner loops that ascend several times: torch.compile does not follow them."""
    torch._dynamo.reset()
    whole = name != "n-step"
    case = next(case for case in CASES if case.name == name)
    made = pure(case, lambda once: torch.compile(once, backend="eager", fullgraph=whole))
    for got, want in zip(made, known(case), strict=True):
        assert float((got - want).abs().max()) <= TOLERANCE


def test_a_compiled_step_of_several_dtypes_is_one_graph():
    torch._dynamo.reset()
    params = {"a": torch.ones(2), "b": torch.full((3,), 2.0, dtype=torch.float64)}

    def loss(p):
        return p["a"].double().square().sum() + p["b"].pow(3).sum()

    def once(p):
        return flatmin.value_and_grad(loss, p, rho=0.1)[1]

    want, got = once(params), torch.compile(once, backend="eager", fullgraph=True)(params)
    assert all(map(torch.equal, got.values(), want.values())) and got["b"].dtype == torch.float64


def test_the_formulas_differ():
    """Agreement means something only if the cases have trajectories of their own; equal are names for one thing."""
    one = {"fsam, ema=previous": "fsam", "micro-sam, 1 closures": "sam"}
    ends = {str(case): known(case)[0][-1] for case in CASES if not case.params.get("legacy_names")}
    for (a, x), (b, y) in itertools.combinations(ends.items(), 2):
        far = float((x - y).abs().max())
        assert far < TOLERANCE if one.get(a, a) == one.get(b, b) else far > 1e-6, (a, b, far)


# -- methods that know w + eps when a step ends --------------------------------------------------------------------


def staying(case, swap=(), **options):
    """A loop between train() and eval(): the weights after each step, seen from w, and the losses.

    The weights go home and back after the steps in `swap`.
    """
    loop, losses = Loop(case, **options), []
    loop.optimizer.train()
    for k in range(STEPS):
        loop.optimizer.zero_grad()
        losses.append(loop.backward(k).detach())
        loop.optimizer.step()
        loop.scheduler.step()
        if k in swap:
            loop.optimizer.eval()
            loop.optimizer.train()
    away = flat(loop.model)
    loop.optimizer.eval()
    assert not torch.equal(away, flat(loop.model))
    return flat(loop.model), torch.stack(losses)


ONE_PASS = [case for case in CASES if flatmin.compose(case.name, **case.params).one_pass]


@pytest.mark.parametrize(("swap", "device"), [((), True), ((0, 4, 5), False)], ids=["stays", "swaps"])
@pytest.mark.parametrize("case", [case for case in ONE_PASS if "rho-lr" not in case.name], ids=str)
def test_a_loop_that_stays_away_from_w_follows_the_formula(case, swap, device):
    weights, losses = staying(case, swap, device=device)
    assert float((weights - known(case)[0][-1]).abs().max()) <= TOLERANCE
    assert float((losses - known(case)[1]).abs().max()) <= TOLERANCE


def test_a_loop_that_stays_away_from_w_takes_its_radius_when_the_last_step_ends():
    """Before the scheduler's step, so that a radius that follows lr comes one step later than with a closure."""
    late = Case("momentum-sam+rho-lr", lambda s: momentum_sam(s, factor=with_lr(s, lag=1)), {})
    assert float((staying(late)[0] - known(late)[0][-1]).abs().max()) <= TOLERANCE


# -- limits --------------------------------------------------------------------------------------------------------

# Parameters at which a method is another one: to the bit, or where sums are taken in another order up to rounding.
LIMITS = [
    ("vasso", {"theta": 1.0}, "sam", True),
    ("fsam", {"sigma": 0.0}, "sam", True),
    ("esam", {"beta": 1.0, "gamma": 1.0}, "sam", True),
    ("fisher-sam", {"eta": 0.0}, "sam", True),
    ("micro-sam", {"chunks": 1}, "sam", True),
    ("sam", {"chunks": 1}, "sam", True),
    ("ssam-f", {"sparsity": 0.0}, "sam", True),
    ("ssam-d", {"sparsity": 0.0}, "sam", True),
    ("bernoulli", {"p": 1.0}, "sam", True),
    ("every-k", {"k": 1}, "sam", True),
    ("late", {"fraction": 1.0, "total": STEPS}, "sam", True),
    ("warm-up", {"steps": 0}, "sam", True),
    ("warm-up", {"steps": STEPS}, "sgd", True),
    ("only", {"only": "*"}, "sam", True),
    ("rho-power", {"p": 0.0}, "sam", True),
    ("rho-ramp", {"start": 1.0}, "sam", True),
    ("looksam", {"k": 1}, "sam", True),
    ("saner", {"warm_up": STEPS}, "sam", True),
    ("saner", {"alpha": 0.0}, "sam", False),
    ("n-step", {"n": 1}, "sam", False),
    ("n-step", {"n": 1, "step": "full"}, "sam", False),
    ("rsam", {"sigma": 0.0}, "sam", False),
    ("sam", {"chunks": 2}, "sam", False),
    ("gsam", {"alpha": 0.0}, "sam", False),
    ("wsam", {"gamma": 0.5, "coupled": True}, "sam", False),
    ("wsam", {"gamma": 0.0}, "sgd", False),
    ("wsam", {"gamma": 0.0, "coupled": True}, "sgd", False),
    ("gnp", {"alpha": 1.0}, "sam", False),
    ("gnp", {"alpha": 0.0}, "sgd", False),
    ("cr-sam", {"gamma": 0.0, "beta": 0.0}, "sam", False),
    ("looksam", {"k": 5, "alpha": 0.0}, "every-k", False),
    ("gam", {"beta3": 0.0, "gamma": 0.0}, "sam", True),
    ("c-flat", {"lam": 0.0}, "sam", True),
    ("eigen-sam", {"alpha": 0.0}, "sam", False),
]


@functools.cache
def limit(name):
    return trajectory(Case(name, None, {}), base="adamw")


@pytest.mark.parametrize(("name", "params", "other", "exact"), LIMITS)
def test_a_limit_is_the_method_that_it_names(name, params, other, exact):
    got = trajectory(Case(name, None, params), base="adamw")
    if exact:
        assert same_bits(got, limit(other))
    else:
        assert all(torch.allclose(a, b, rtol=0, atol=1e-11) for a, b in zip(got, limit(other), strict=True))


# -- convolution kernels: sgdhess averages |H z| over the spatial dimensions ---------------------------------------


@pytest.mark.parametrize("spatial_mean", [True, False])
def test_kernels_take_the_spatial_mean(spatial_mean):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 2, (2, 3)), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
    names, shapes = zip(*((n, p.shape) for n, p in model.named_parameters()), strict=True)
    sizes = [s.numel() for s in shapes]
    optimizer = flatmin.wrap(
        torch.optim.SGD(model.parameters(), lr=0.1), "sgdhess", rho=0.2, seed=SEED, spatial_mean=spatial_mean
    )
    w, draw = flat(model), torch.Generator().manual_seed(SEED)
    for k in range(4):
        g = torch.Generator().manual_seed(k)
        x, y = torch.randn(6, 1, 4, 4, generator=g, dtype=torch.float64), torch.randint(3, (6,), generator=g)

        def loss(v, x=x, y=y):
            tensors = {n: t.view(s) for n, t, s in zip(names, v.split(sizes), shapes, strict=True)}
            return nn.functional.cross_entropy(torch.func.functional_call(model, tensors, x), y)

        z = torch.cat([2.0 * (torch.rand(n, generator=draw) < 0.5).double() - 1.0 for n in sizes])
        h, g = (reference.dense_hessian(loss)(w) @ z).abs(), torch.func.grad(loss)(w)
        if spatial_mean:
            h[: sizes[0]] = h[: sizes[0]].view(2, 6).mean(1, keepdim=True).expand(2, 6).flatten()
        w = w - 0.1 * (g + 0.2 * h * g)

        def backward(x=x, y=y):
            found = nn.functional.cross_entropy(model(x), y)
            optimizer.backward(found)
            return found

        drive(optimizer, backward)
        assert float((flat(model) - w).abs().max()) <= TOLERANCE
