"""Parts of one's own are served like built-in ones, by what they declare: each against its formula on one vector."""

import pickle
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import flatmin
from flatmin import methods as m
from flatmin.methods import Need
from flatmin.optim.support import capture_refusal

RHO, LR, MU, STEPS = 0.1, 0.05, 0.9, 6


@dataclass(frozen=True, kw_only=True)
class Decoupled(m.Combine):
    """The base takes g, then w -= lr a (g_s - g)."""

    needs: ClassVar = frozenset({Need.GRADIENT_AT_W})
    uses_gradient: ClassVar = True
    a: float = 0.5

    def __call__(self, g, gs, state, c):
        return list(g), {}

    def post(self, g, gs, c):
        return [-o["lr"] * self.a * (s - x) for x, s, o in zip(g, gs[0], c.options, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Reuse(m.Combine):
    """Steps without ascent add the last g_s - g again."""

    needs: ClassVar = frozenset({Need.GRADIENT_AT_W})
    slots: ClassVar = {"v": "param"}
    uses_gradient: ClassVar = True

    def __call__(self, g, gs, state, c):
        return list(gs[0]), {"v": [s - x for x, s in zip(g, gs[0], strict=True)]}

    def off(self, g, state, c):
        return [x if v is None else x + v for x, v in zip(g, state["v"], strict=True)], {}


@dataclass(frozen=True, kw_only=True)
class Mean(m.Combine):
    def __call__(self, g, gs, state, c):
        return [sum(points) / len(points) for points in zip(*gs, strict=True)], {}


@dataclass(frozen=True, kw_only=True)
class OnlyBeside(m.Combine):
    """A term beside the base, and nothing else."""

    def post(self, g, gs, c):
        return [-0.1 * x for x in gs[0]]


class SaysNo(OnlyBeside):
    """What a class declares itself holds for those derived from it."""

    post_step: ClassVar = False


class Derived(SaysNo):
    pass


class Again(Derived):
    def post(self, g, gs, c):
        return super().post(g, gs, c)


class NoPass(m.Direction):
    """A common base may leave the rest to others."""

    evaluates: ClassVar = False


def test_declarations_follow_from_the_nearest_class_that_says_or_does_something():
    assert (m.Combine.mixes, m.Combine.post_step, m.Descent.mixes) == (False, False, False)
    assert (OnlyBeside.mixes, OnlyBeside.post_step) == (True, True)
    assert [one.post_step for one in (SaysNo, Derived, Again)] == [False, False, True]
    w = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = flatmin.wrap(torch.optim.SGD([w], lr=0.0), flatmin.Recipe(combine=OnlyBeside()), rho=1e-9)

    def closure():
        optimizer.zero_grad()
        loss = 0.5 * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert w.tolist() == pytest.approx([0.9] * 3)
    with pytest.raises(ValueError, match="takes no pass 1, so it must define"):
        flatmin.wrap(torch.optim.SGD([w], lr=0.1), flatmin.Recipe(direction=NoPass()))


@dataclass(frozen=True, kw_only=True)
class LastDescent(m.Direction):
    """d = the last descent gradient; takes no pass 1."""

    evaluates: ClassVar = False
    slots: ClassVar = {"g": "param"}

    def __call__(self, g, state, c):
        return (None if any(s is None for s in state["g"]) else state["g"]), {}

    def observe(self, gs, state, c):
        return {"g": gs}


@dataclass(frozen=True, kw_only=True)
class First(m.Direction):
    """d = the very first gradient, kept for ever and returned as it is stored."""

    slots: ClassVar = {"g": "param"}

    def __call__(self, g, state, c):
        if state["g"][0] is None:
            return [x.clone() for x in g], {"g": [x.clone() for x in g]}
        return state["g"], {}


@dataclass(frozen=True, kw_only=True)
class Noisy(m.Direction):
    """Pass 1 at w + sigma n; counts its draws."""

    needs: ClassVar = frozenset({Need.RANDOM})
    moves_start: ClassVar = True
    slots: ClassVar = {"draws": "scalar"}
    sigma: float = 0.01

    def start(self, state, c):
        return [self.sigma * n for n in c.noise()]

    def __call__(self, g, state, c):
        before = state["draws"]
        return g, {"draws": torch.ones(()) if before is None else before + 1}


@dataclass(frozen=True, kw_only=True)
class Backwards(m.Direction):
    """Half a step against g."""

    def __call__(self, g, state, c):
        return g, {}

    def factor(self):
        return -0.5


@dataclass(frozen=True, kw_only=True)
class TwoSided(m.InnerLoop):
    """Descent gradients at w + eps and w - eps."""

    def evaluations(self, ascent):
        return ascent + 2

    def __call__(self, ascend, state, c):
        there = yield from ascend()
        eps = there.tensors()
        up = yield m.GradientRequest("descent", m.Perturbation.of(there.index, eps, c))
        down = yield m.GradientRequest("descent", m.Perturbation.of(there.index, [-e for e in eps], c))
        return [up, down], {}


@dataclass(frozen=True, kw_only=True)
class Swapped(m.InnerLoop):
    """Climbs on chunk 0, descends on chunk 1."""

    needs: ClassVar = frozenset({Need.MICRO_BATCHES})
    two_batches: ClassVar = True

    def plain(self, c):
        return (yield m.GradientRequest("descent", chunk=1))

    def __call__(self, ascend, state, c):
        return [(yield m.GradientRequest("descent", (yield from ascend(chunk=0)), 1))], {}


METHODS = {"swapped": m.Method(name="swapped", title="Swapped", parts=(Swapped(),), formula="u = g_s", paper="none")}


@dataclass(frozen=True, kw_only=True)
class Single(m.InnerLoop):
    """One ascent, as `perturbed()` serves it."""

    one_ascent: ClassVar = True

    def __call__(self, ascend, state, c):
        return [(yield m.GradientRequest("descent", (yield from ascend())))], {}


@dataclass(frozen=True, kw_only=True)
class Third(m.Schedule):
    """Every third step."""

    step_dependent: ClassVar = True

    def before(self, state, c):
        return c.step % 3 == 0


@dataclass(frozen=True, kw_only=True)
class Large(m.Schedule):
    """Ascend when the squared norm is above its running mean; defines `after` only."""

    needs: ClassVar = frozenset({Need.GRADIENT_AT_W, Need.DECIDES_BY_VALUE})
    slots: ClassVar = {"mean": "scalar"}

    def after(self, g, state, c):
        size = c.norm(g) ** 2
        mean = size if state["mean"] is None else 0.9 * state["mean"] + 0.1 * size
        return bool(size >= mean), {"mean": mean}


@dataclass(frozen=True, kw_only=True)
class Off(m.Schedule):
    ascends: ClassVar = False


@dataclass(frozen=True, kw_only=True)
class Falling(m.Radius):
    """rho times the updates of the group so far, which it counts in the group."""

    marks: ClassVar = {"flatmin.radius.seen": 0.0}

    def __call__(self, c):
        return [1.0 / (1.0 + o["flatmin.radius.seen"]) for o in c.options]

    def remember(self, group):
        return {"flatmin.radius.seen": group["flatmin.radius.seen"] + 1.0}


@dataclass(frozen=True, kw_only=True)
class PerTensor(m.Geometry):
    """rho d / ||d|| for each tensor by itself."""

    def __call__(self, d, c):
        return [x / c.norm([x]) for x in d], None


@dataclass(frozen=True, kw_only=True)
class Halves(m.Mask):
    """The first tensor stays, the others move by half; after the norm."""

    norm: ClassVar = "full"

    def select(self, c):
        return [i > 0 for i in range(len(c.w))]

    def __call__(self, d, state, c):
        return [0.5] * len(d), {}


def problem():
    torch.manual_seed(3)
    x, y = torch.randn(STEPS, 16, 5, dtype=torch.float64), torch.randn(STEPS, 16, 2, dtype=torch.float64)
    return torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2)).double(), x, y


def run(recipe, *, perturbed=False, device_path=False):
    net, x, y = problem()
    opt = flatmin.SAM(torch.optim.SGD(net.parameters(), lr=LR, momentum=MU), recipe=recipe, rho=RHO, seed=5)
    opt._force_device_path = device_path
    for k in range(STEPS):

        def closure(rows=slice(None), k=k):
            opt.zero_grad()
            loss = (net(x[k, rows]) - y[k, rows]).square().mean()
            loss.backward()
            return loss

        if perturbed:
            closure()
            with opt.perturbed():
                closure()
            opt.step()
        elif recipe.inner_loop.two_batches:
            opt.step([lambda k=k: closure(slice(0, 6), k), lambda k=k: closure(slice(6, 16), k)])
        else:
            opt.step(closure)
    return torch.nn.utils.parameters_to_vector(net.parameters()).detach(), opt


class Reference:
    """Gradients of the same problem as a function of one flat vector."""

    def __init__(self):
        self.net, self.x, self.y = problem()
        self.w = torch.nn.utils.parameters_to_vector(self.net.parameters()).detach().clone()
        self.sizes, self.shapes = zip(*((p.numel(), p.shape) for p in self.net.parameters()), strict=True)
        self.generator = torch.Generator().manual_seed(5)
        self.buf = self.last = self.mean = None

    def grad(self, w, k, rows=slice(None)):
        torch.nn.utils.vector_to_parameters(w.clone(), self.net.parameters())
        loss = (self.net(self.x[k, rows]) - self.y[k, rows]).square().mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(self.net.parameters()))])

    def sam(self, k, g, rho=RHO, **rows):
        return self.grad(self.w + rho * g / (g.norm() + 1e-12), k, **rows)

    def sgd(self, u):
        self.buf = u.clone() if self.buf is None else MU * self.buf + u
        self.w = self.w - LR * self.buf


def decoupled(r, k):
    g = r.grad(r.w, k)
    gs = r.sam(k, g)
    r.sgd(g)
    r.w = r.w - LR * 0.5 * (gs - g)


def reuse(r, k):
    g = r.grad(r.w, k)
    gs = r.sam(k, g)
    r.last = gs - g if k % 3 == 0 else r.last
    r.sgd(gs if k % 3 == 0 else g + r.last)


def stale(r, k):
    r.last = r.grad(r.w, k) if k == 0 else r.sam(k, r.last)
    r.sgd(r.last)


def noisy(r, k):
    n = [torch.randn(s, generator=r.generator, dtype=torch.float64).flatten() for s in r.shapes]
    r.sgd(r.sam(k, r.grad(r.w + 0.01 * torch.cat(n), k)))


def two_sided(r, k):
    g = r.grad(r.w, k)
    r.sgd((r.sam(k, g) + r.sam(k, g, -RHO)) / 2)


def large(r, k):
    g = r.grad(r.w, k)
    r.mean = g @ g if k == 0 else 0.9 * r.mean + 0.1 * (g @ g)
    r.sgd(r.sam(k, g) if g @ g >= r.mean else g)


def per_tensor(r, k):
    units = [g / g.norm() for g in r.grad(r.w, k).split(r.sizes)]
    r.sgd(r.grad(r.w + RHO * torch.cat(units), k))


def halves(r, k):
    g = r.grad(r.w, k)
    g[: r.sizes[0]] = 0
    r.sgd(r.sam(k, g, RHO / 2))


CASES = {
    "post": ({"combine": Decoupled()}, decoupled),
    "off": ({"schedule": Third(), "combine": Reuse()}, reuse),
    "observe": ({"direction": LastDescent()}, stale),
    "start": ({"direction": Noisy()}, noisy),
    "factor": ({"direction": Backwards()}, lambda r, k: r.sgd(r.sam(k, r.grad(r.w, k), -RHO / 2))),
    "two points": ({"inner_loop": TwoSided(), "combine": Mean()}, two_sided),
    "two batches": (
        {"inner_loop": Swapped()},
        lambda r, k: r.sgd(r.sam(k, r.grad(r.w, k, slice(0, 6)), rows=slice(6, 16))),
    ),
    "one ascent": ({"inner_loop": Single()}, lambda r, k: r.sgd(r.sam(k, r.grad(r.w, k)))),
    "after": ({"schedule": Large()}, large),
    "never": ({"schedule": Off()}, lambda r, k: r.sgd(r.grad(r.w, k))),
    "remember": ({"radius": Falling()}, lambda r, k: r.sgd(r.sam(k, r.grad(r.w, k), RHO / (k + 1)))),
    "geometry": ({"geometry": PerTensor()}, per_tensor),
    "mask": ({"mask": Halves()}, halves),
}


@pytest.mark.parametrize("name", CASES)
def test_a_part_of_ones_own_does_what_its_formula_says(name):
    for device_path in (False, True):
        parts, formula = CASES[name]
        recipe = flatmin.Recipe(**parts)
        reference = Reference()
        for k in range(STEPS):
            formula(reference, k)
        got, _ = run(recipe, device_path=device_path)
        assert (got - reference.w).abs().max() <= 1e-12
        if recipe.two_pass:
            assert torch.equal(got, run(recipe, perturbed=True, device_path=device_path)[0])
        else:
            with pytest.raises(RuntimeError, match=r"perturbed\(\) works with recipes of one pass at w"):
                run(recipe, perturbed=True)


def test_declarations_follow_from_the_methods_that_a_class_defines():
    assert Decoupled.post_step and not Decoupled.off_step and Reuse.off_step and not Reuse.post_step
    assert LastDescent.observes and not Noisy.observes
    assert Third.conditional and not Third.by_gradient and Large.conditional and Large.by_gradient
    assert Falling.scales and Falling.remembers and Halves.selects and Halves.weighs and not Halves.keeps_graph

    class Mixin:
        def post(self, g, gs, c):
            return None

    class Mixed(Mixin, Mean):
        pass

    class Quiet(Decoupled):
        post_step: ClassVar = False

    assert Mixed.post_step and not Quiet.post_step  # also inherited, and one's own word counts
    plain = flatmin.Recipe()
    assert not (plain.mask.selects or plain.mask.weighs or plain.radius.scales or plain.samples.selects)
    assert type("Some", (m.Samples,), {"__call__": lambda self, first, second: None}).selects


def test_recipes_of_ones_own_parts_have_the_facts_of_built_in_ones():
    """What entry points, graphs, trainers and compositions ask is answered by declarations."""
    never, built_in = flatmin.Recipe(schedule=Off()), flatmin.compose("sgd")
    facts = ("ascends", "moves", "two_pass", "one_pass", "gradient_evaluations", "extra_copies", "needs", "remembers")
    assert all(getattr(never, fact) == getattr(built_in, fact) for fact in facts)
    with pytest.raises(ValueError, match=r"needs an ascent in every step, but schedule Off\(\).*it never ascends"):
        flatmin.Recipe(schedule=Off(), direction=Noisy())
    two, probe = flatmin.Recipe(inner_loop=Swapped()), flatmin.compose("sam-db")
    assert capture_refusal(two) == capture_refusal(probe) != capture_refusal(flatmin.Recipe()) is None
    assert flatmin.Recipe(direction=LastDescent(), inner_loop=Single()).one_pass
    assert flatmin.Recipe(inner_loop=TwoSided()).gradient_evaluations == 3.0
    with pytest.raises(
        ValueError, match=r"combine Decoupled.* needs the gradient of the training loss at w.*maximises"
    ):
        flatmin.Recipe(objective=m.BiSAMLog(), combine=Decoupled())
    with pytest.raises(ValueError, match="pass 1 is not taken at w"):
        flatmin.Recipe(direction=Noisy(), combine=Decoupled())
    recipe = flatmin.Recipe(radius=Falling(), combine=Decoupled())
    assert pickle.loads(pickle.dumps(recipe)) == recipe and hash(pickle.loads(pickle.dumps(recipe))) == hash(recipe)


def test_scalars_and_marks_of_ones_own_parts_travel_in_checkpoints():
    _, opt = run(flatmin.Recipe(direction=Noisy(), radius=Falling()))
    group = opt.state_dict()["param_groups"][0]
    assert group["flatmin.direction.draws"] == STEPS and group["flatmin.radius.seen"] == STEPS
    assert group["flatmin.parts"] == "direction=Noisy, radius=Falling"


def test_stored_tensors_are_not_overwritten_on_the_device_path():
    runs = [run(flatmin.Recipe(direction=First()), device_path=d) for d in (False, True)]
    host, device = (
        [w, *(opt.state[p]["flatmin.direction.g"] for group in opt.param_groups for p in group["params"])]
        for w, opt in runs
    )
    assert all(torch.allclose(a, b, rtol=0, atol=1e-13) for a, b in zip(host, device, strict=True))
