"""The seams hold what named methods do not use yet: tiny parts, each against its own formula on one flat vector."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import flatmin
from flatmin.methods import (
    Combine,
    Direction,
    Geometry,
    GradientRequest,
    Gradients,
    InnerLoop,
    Mask,
    Need,
    Perturbation,
    Radius,
    Schedule,
)

RHO, LR, MU, STEPS = 0.1, 0.05, 0.9, 12


@dataclass(frozen=True, kw_only=True)
class Orthogonal(Combine):
    """GSAM: u = g_s - alpha (g - proj_{g_s} g)."""

    needs: ClassVar = frozenset({Need.GRADIENT_AT_W})
    uses_gradient: ClassVar = True
    rho_zero_is_base: ClassVar = False
    alpha: float = 0.3

    def __call__(self, g, gs, state, c):
        (gs,) = gs
        k = c.dot(g, gs) / c.dot(gs, gs)
        return [s - self.alpha * (x - k * s) for x, s in zip(g, gs, strict=True)], {}


@dataclass(frozen=True, kw_only=True)
class Decoupled(Combine):
    """WSAM: the base takes g, then w -= lr a (g_s - g)."""

    needs: ClassVar = frozenset({Need.GRADIENT_AT_W})
    uses_gradient: ClassVar = True
    a: float = 0.5

    def __call__(self, g, gs, state, c):
        return list(g), {}

    def post(self, g, gs, c):
        return [-o["lr"] * self.a * (s - x) for x, s, o in zip(g, gs[0], c.options, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Reuse(Combine):
    """Off-steps add the last g_s - g again (the shape of LookSAM's memory)."""

    needs: ClassVar = frozenset({Need.GRADIENT_AT_W})
    slots: ClassVar = {"v": "param"}
    uses_gradient: ClassVar = True

    def __call__(self, g, gs, state, c):
        return list(gs[0]), {"v": [s - x for x, s in zip(g, gs[0], strict=True)]}

    def off(self, g, state, c):
        return [x if v is None else x + v for x, v in zip(g, state["v"], strict=True)], {}


@dataclass(frozen=True, kw_only=True)
class Stale(Direction):
    """d = the last descent gradient; takes no pass 1."""

    evaluates: ClassVar = False
    slots: ClassVar = {"g": "param"}

    def __call__(self, g, state, c):
        return (None if any(s is None for s in state["g"]) else state["g"]), {}

    def observe(self, gs, state, c):
        return {"g": gs}


@dataclass(frozen=True, kw_only=True)
class Noisy(Direction):
    """RSAM: pass 1 at w + sigma n, d = sigma n + lam g."""

    needs: ClassVar = frozenset({Need.RANDOM})
    moves_start: ClassVar = True
    slots: ClassVar = {"draws": "scalar"}
    sigma: float = 0.01
    lam: float = 0.5

    def start(self, state, c):
        return [self.sigma * n for n in c.noise()]

    def __call__(self, g, state, c):
        before = state["draws"]
        return [self.lam * x for x in g], {"draws": torch.ones(()) if before is None else before + 1}


@dataclass(frozen=True, kw_only=True)
class Drop(Mask):
    """Each element moves with probability beta, scaled by 1/beta."""

    needs: ClassVar = frozenset({Need.RANDOM})
    beta: float = 0.5

    def __call__(self, d, state, c):
        return [m / self.beta for m in c.bernoulli(self.beta)], {}


@dataclass(frozen=True, kw_only=True)
class NSteps(InnerLoop):
    """n ascents of rho/n each, the gradient of each taken at the previous point."""

    n: int = 3

    def evaluations(self, ascent):
        return self.n * ascent + 1

    def __call__(self, ascend, c) -> Generator[GradientRequest, Gradients, list[Gradients]]:
        total: dict[int, Tensor] = {}
        for _ in range(self.n):
            here = Perturbation.of(list(total), list(total.values()), c) if total else None
            offset = yield from ascend(here)
            for i, e in zip(offset.index, offset.tensors(), strict=True):
                total[i] = total[i] + e / self.n if i in total else e / self.n
        return [(yield GradientRequest("descent", Perturbation.of(list(total), list(total.values()), c)))]


@dataclass(frozen=True, kw_only=True)
class TwoSided(InnerLoop):
    """Descent gradients at w + eps and w - eps, averaged by the combination."""

    def evaluations(self, ascent):
        return ascent + 2

    def __call__(self, ascend, c):
        offset = yield from ascend()
        e = offset.tensors()
        up = yield GradientRequest("descent", Perturbation.of(offset.index, e, c))
        down = yield GradientRequest("descent", Perturbation.of(offset.index, [-x for x in e], c))
        return [up, down]


@dataclass(frozen=True, kw_only=True)
class Mean(Combine):
    def __call__(self, g, gs, state, c):
        return [(a + b) / 2 for a, b in zip(*gs, strict=True)], {}


@dataclass(frozen=True, kw_only=True)
class Every(Schedule):
    k: int = 3

    def before(self, state, c):
        return c.step % self.k == 0


@dataclass(frozen=True, kw_only=True)
class Trigger(Schedule):
    """Ascend when the squared gradient norm is above its running mean (the shape of AE-SAM)."""

    needs: ClassVar = frozenset({Need.GRADIENT_AT_W, Need.DECIDES_BY_VALUE})
    slots: ClassVar = {"mean": "scalar"}

    def before(self, state, c):
        return None

    def after(self, g, state, c):
        size = c.norm(g) ** 2
        mean = size if state["mean"] is None else 0.9 * state["mean"] + 0.1 * size
        return bool(size >= mean), {"mean": mean}


@dataclass(frozen=True, kw_only=True)
class Harmonic(Radius):
    def __call__(self, c):
        return 1.0 / (c.step + 1)


@dataclass(frozen=True, kw_only=True)
class PerTensor(Geometry):
    """rho d / ||d|| for each tensor by itself."""

    def __call__(self, d, c):
        return [x / c.norm([x]) for x in d], None


def problem():
    torch.manual_seed(3)
    x, y = torch.randn(STEPS, 16, 5, dtype=torch.float64), torch.randn(STEPS, 16, 2, dtype=torch.float64)
    net = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2)).double()
    return net, x, y


def run(recipe, door="closure", *, device_path=False):
    net, x, y = problem()
    base = torch.optim.SGD(net.parameters(), lr=LR, momentum=MU)
    opt = flatmin.SAM(base, recipe=recipe, rho=RHO, seed=5)
    opt._tools.on_device = device_path
    for k in range(STEPS):

        def backward(k=k):
            loss = (net(x[k]) - y[k]).square().mean()
            loss.backward()
            return loss

        if door == "closure":

            def closure(backward=backward):
                opt.zero_grad()
                return backward()

            opt.step(closure)
        elif door == "passes":
            for evaluation in opt.passes():
                with evaluation:
                    backward()
            opt.step()
        else:
            opt.zero_grad()
            backward()
            with opt.perturbed():
                backward()
            opt.step()
    return torch.nn.utils.parameters_to_vector(net.parameters()).detach(), opt


class Reference:
    """Gradients of the same problem as a function of one flat vector."""

    def __init__(self):
        self.net, self.x, self.y = problem()
        self.w = torch.nn.utils.parameters_to_vector(self.net.parameters()).detach().clone()
        self.sizes = [p.numel() for p in self.net.parameters()]
        self.shapes = [p.shape for p in self.net.parameters()]
        self.buf = None

    def grad(self, w, k):
        torch.nn.utils.vector_to_parameters(w.clone(), self.net.parameters())
        loss = (self.net(self.x[k]) - self.y[k]).square().mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(self.net.parameters()))])

    def sgd(self, u):
        self.buf = u.clone() if self.buf is None else MU * self.buf + u
        self.w = self.w - LR * self.buf


def unit(v):
    return v / (v.norm() + 1e-12)


def ref_gsam(r, k):
    g = r.grad(r.w, k)
    gs = r.grad(r.w + RHO * unit(g), k)
    r.sgd(gs - 0.3 * (g - (g @ gs) / (gs @ gs) * gs))


def ref_decoupled(r, k):
    g = r.grad(r.w, k)
    gs = r.grad(r.w + RHO * unit(g), k)
    r.sgd(g)
    r.w = r.w - LR * 0.5 * (gs - g)


def ref_stale(r, k):
    e = 0 if k == 0 else RHO * unit(r.last)
    r.last = r.grad(r.w + e, k)
    r.sgd(r.last)


def noise(r, k):
    if k == 0:
        r.gen = torch.Generator().manual_seed(5)
    return torch.cat([torch.randn(s, generator=r.gen, dtype=torch.float64).flatten() for s in r.shapes])


def ref_noisy(r, k):
    g = 0.5 * r.grad(r.w + 0.01 * noise(r, k), k)
    r.sgd(r.grad(r.w + RHO * unit(g), k))


def ref_drop(r, k):
    if k == 0:
        r.gen = torch.Generator().manual_seed(5)
    m = torch.cat([(torch.rand(s, generator=r.gen) < 0.5).double().flatten() for s in r.shapes]) / 0.5
    r.sgd(r.grad(r.w + RHO * unit(m * r.grad(r.w, k)), k))


def ref_nsteps(r, k):
    e = torch.zeros_like(r.w)
    for _ in range(3):
        e = e + RHO / 3 * unit(r.grad(r.w + e, k))
    r.sgd(r.grad(r.w + e, k))


def ref_two_sided(r, k):
    e = RHO * unit(r.grad(r.w, k))
    r.sgd((r.grad(r.w + e, k) + r.grad(r.w - e, k)) / 2)


def ref_every(r, k):
    g = r.grad(r.w, k)
    r.sgd(r.grad(r.w + RHO * unit(g), k) if k % 3 == 0 else g)


def ref_reuse(r, k):
    g = r.grad(r.w, k)
    if k % 3 == 0:
        gs = r.grad(r.w + RHO * unit(g), k)
        r.v = gs - g
        r.sgd(gs)
    else:
        r.sgd(g + r.v)


def ref_trigger(r, k):
    g = r.grad(r.w, k)
    r.mean = g @ g if k == 0 else 0.9 * r.mean + 0.1 * (g @ g)
    r.sgd(r.grad(r.w + RHO * unit(g), k) if g @ g >= r.mean else g)


def ref_harmonic(r, k):
    r.sgd(r.grad(r.w + RHO / (k + 1) * unit(r.grad(r.w, k)), k))


def ref_per_tensor(r, k):
    parts = r.grad(r.w, k).split(r.sizes)
    r.sgd(r.grad(r.w + RHO * torch.cat([p / p.norm() for p in parts]), k))


CASES = {
    "gsam": (flatmin.Recipe(combine=Orthogonal()), ref_gsam),
    "wsam-decoupled": (flatmin.Recipe(combine=Decoupled()), ref_decoupled),
    "stale": (flatmin.Recipe(direction=Stale()), ref_stale),
    "rsam": (flatmin.Recipe(direction=Noisy()), ref_noisy),
    "bernoulli-mask": (flatmin.Recipe(mask=Drop()), ref_drop),
    "n-steps": (flatmin.Recipe(inner_loop=NSteps()), ref_nsteps),
    "two-sided": (flatmin.Recipe(inner_loop=TwoSided(), combine=Mean()), ref_two_sided),
    "every-k": (flatmin.Recipe(schedule=Every()), ref_every),
    "reuse": (flatmin.Recipe(schedule=Every(), combine=Reuse()), ref_reuse),
    "trigger": (flatmin.Recipe(schedule=Trigger()), ref_trigger),
    "radius": (flatmin.Recipe(radius=Harmonic()), ref_harmonic),
    "per-tensor": (flatmin.Recipe(geometry=PerTensor()), ref_per_tensor),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("door", ["closure", "passes", "perturbed"])
@pytest.mark.parametrize("device_path", [False, True])
def test_part_matches_its_formula(name, door, device_path):
    recipe, reference = CASES[name]
    if door == "perturbed" and not recipe.two_pass:
        with pytest.raises(RuntimeError, match=r"perturbed\(\) serves recipes of one pass at w"):
            run(recipe, door)
        return
    got, _ = run(recipe, door, device_path=device_path)
    r = Reference()
    for k in range(STEPS):
        reference(r, k)
    assert (got - r.w).abs().max() <= 1e-12


def test_a_part_written_to_the_same_point_differs_from_sam():
    """The references above are not all the same trajectory."""
    ends = []
    for _, reference in CASES.values():
        r = Reference()
        for k in range(STEPS):
            reference(r, k)
        ends.append(r.w)
    distances = [(a - b).norm() for i, a in enumerate(ends) for b in ends[:i]]
    assert min(distances) > 1e-6


@dataclass(frozen=True, kw_only=True)
class First(Direction):
    """d = the very first gradient, kept for ever and returned as it is stored."""

    slots: ClassVar = {"g": "param"}

    def __call__(self, g, state, c):
        if state["g"][0] is None:
            return [x.clone() for x in g], {"g": [x.clone() for x in g]}
        return state["g"], {}


def test_stored_tensors_are_not_overwritten_on_the_device_path():
    runs = [run(flatmin.Recipe(direction=First()), device_path=d) for d in (False, True)]
    host, device = ([w, *opt._tools.state.per_weight["direction.g"].values()] for w, opt in runs)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-13) for a, b in zip(host, device, strict=True))


def test_scalar_slots_and_counters_travel_in_the_checkpoint():
    _, opt = run(CASES["rsam"][0])
    saved = opt.state_dict()
    assert saved["param_groups"][0]["flatmin.direction.draws"] == STEPS
    assert saved["param_groups"][0]["flatmin.step"] == STEPS
    net, _, _ = problem()
    other = flatmin.SAM(torch.optim.SGD(net.parameters(), lr=LR), recipe=CASES["rsam"][0], seed=99)
    other.load_state_dict(saved)
    assert torch.equal(other._tools.state.generator.cpu.get_state(), opt._tools.state.generator.cpu.get_state())


def test_contradicting_parts_are_refused():
    with pytest.raises(ValueError, match=r"combine Orthogonal.* needs the descent loss's own gradient at w.*climbs"):
        flatmin.Recipe(objective=flatmin.methods.BiSAMLog(), combine=Orthogonal())
    with pytest.raises(ValueError, match="pass 1 is not taken at w"):
        flatmin.Recipe(direction=Noisy(), combine=Orthogonal())
    with pytest.raises(ValueError, match="takes no pass 1"):
        flatmin.Recipe(direction=Stale(), combine=Orthogonal())
    with pytest.raises(ValueError, match="climbs another loss"):
        flatmin.Recipe(objective=flatmin.methods.BiSAMTanh(), schedule=Trigger())
    with pytest.raises(TypeError, match="must be a part of kind 'direction'"):
        flatmin.Recipe(direction=Orthogonal())
    with pytest.raises(TypeError, match="must not be named 'rho'"):

        @dataclass(frozen=True, kw_only=True)
        class Bad(Direction):
            rho: float = 0.1


def test_memory_of_a_part_survives_a_bad_step():
    """State is committed after a good step only."""
    net, x, y = problem()
    opt = flatmin.wrap(torch.optim.SGD(net.parameters(), lr=LR), "vasso")

    def closure(scale=1.0):
        opt.zero_grad()
        loss = scale * (net(x[0]) - y[0]).square().mean()
        loss.backward()
        return loss

    opt.step(closure)
    before = {k: v.clone() for k, v in opt._tools.state.per_weight["direction.ema"].items()}
    weights = [p.detach().clone() for p in net.parameters()]
    opt.step(lambda: closure(float("nan")))
    assert all(torch.equal(before[k], v) for k, v in opt._tools.state.per_weight["direction.ema"].items())
    assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))
    assert opt.counts() == {"updates": 2, "nonfinite_ascents": 1, "skipped_steps": 1}
