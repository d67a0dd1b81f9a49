"""`ascent_cosine`: the angle of neighbouring ascents, by formulas, by what a loop sees, and across checkpoints."""

import copy
import dataclasses
import itertools
import math
import pickle

import pytest
import torch
from torch import nn

import flatmin
from flatmin.methods import Mask
from tests.helpers import Session, as_on_device, same_bits

METHODS = ["sam", "asam", "vasso", "looksam", "every-k", "n-step", "rsam", "micro-sam", "momentum-sam", "ssam-f"]


def angle(a, b):
    a, b = ([x for one in v for x in one] for v in (a, b))
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def noise(step):
    """The part of a batch in the gradient of the quadratic, two tensors of three entries and one."""
    drawn = torch.randn(4, generator=torch.Generator().manual_seed(step), dtype=torch.float64).tolist()
    return [drawn[:3], drawn[3:]]


class ByHand:
    """SAM and VaSSO on L_t(w) = sum_i a_i w_i^2 / 2 + s <n_t, w> in plain numbers.

    d_t = (1 - theta) d_{t-1} + theta g_t,  eps_t = rho d_t / ||d_t||,  w <- w - lr grad L_t(w + eps_t); theta = 1: SAM.
    """

    CURVATURE = ((3.0, 0.5, 1.0), (2.0,))

    def __init__(self, theta, scale, rho, lr):
        self.theta, self.scale, self.rho, self.lr = theta, scale, rho, lr
        self.w, self.d = [[1.0, -2.0, 0.5], [1.5]], None

    def gradient(self, w, n):
        return [
            [a * x + self.scale * y for a, x, y in zip(*rows, strict=True)]
            for rows in zip(self.CURVATURE, w, n, strict=True)
        ]

    def step(self, t):
        """The update of batch t; its eps."""
        n = noise(t)
        g = self.gradient(self.w, n)
        d = g if self.d is None else self.d
        self.d = [
            [(1 - self.theta) * x + self.theta * y for x, y in zip(*rows, strict=True)]
            for rows in zip(d, g, strict=True)
        ]
        size = math.hypot(*(x for row in self.d for x in row))
        eps = [[self.rho * x / size for x in row] for row in self.d]
        moved = [[x + e for x, e in zip(*rows, strict=True)] for rows in zip(self.w, eps, strict=True)]
        u = self.gradient(moved, n)
        self.w = [[x - self.lr * y for x, y in zip(*rows, strict=True)] for rows in zip(self.w, u, strict=True)]
        return eps


class Loop:
    """The same quadratic through the engine."""

    def __init__(self, method, scale=0.0, rho=0.3, lr=0.05, rhos=None, device=False, base="sgd", **params):
        start = ByHand(1.0, 0.0, 0.0, 0.0)
        self.weights = [nn.Parameter(torch.tensor(w, dtype=torch.float64)) for w in start.w]
        self.curvature = [torch.tensor(a, dtype=torch.float64) for a in start.CURVATURE]
        self.scale = scale
        groups = [{"params": [w], "rho": r} for w, r in zip(self.weights, rhos or [rho, rho], strict=True)]
        kinds = {
            "sgd": lambda: torch.optim.SGD(groups, lr=lr),
            "foreach": lambda: torch.optim.SGD(groups, lr=lr, momentum=0.9, foreach=True),
            "fused": lambda: torch.optim.AdamW(groups, lr=lr, fused=True),
        }
        recipe = flatmin.compose(method, **params) if isinstance(method, str) else method
        self.optimizer = flatmin.wrap(kinds[base](), recipe, diagnostics=True)
        as_on_device(self.optimizer, device)
        self.eps = []

    def step(self, t, seen=(0, 1), spoilt=False):
        """The update of batch t, whose loss sees these tensors; what `diagnostics()` has of the angle."""
        home = [w.detach().clone() for w in self.weights]

        def closure():
            self.optimizer.zero_grad()
            self.eps = [(w.detach() - h).tolist() for w, h in zip(self.weights, home, strict=True)]
            loss = sum(
                (0.5 * self.curvature[i] * self.weights[i] ** 2).sum()
                + self.scale * (torch.tensor(noise(t)[i], dtype=torch.float64) * self.weights[i]).sum()
                for i in seen
            )
            (loss * (math.nan if spoilt and not any(map(any, self.eps)) else 1.0)).backward()
            return loss

        self.optimizer.step(closure)
        return self.optimizer.diagnostics().get("ascent_cosine")


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("theta", [None, 0.1, 0.4, 0.9])
def test_it_is_the_angle_of_the_papers_formula(theta, device):
    hand = ByHand(theta or 1.0, 0.7, 0.3, 0.05)
    loop = Loop("vasso" if theta else "sam", 0.7, device=device, **({"theta": theta} if theta else {}))
    eps = [hand.step(t) for t in range(20)]
    found = [loop.step(t) for t in range(20)]
    assert found[0] is None
    assert found[1:] == pytest.approx([angle(a, b) for a, b in itertools.pairwise(eps)], rel=1e-9)
    assert len({round(c, 6) for c in found[1:]}) > 10, "it is no constant"
    assert torch.cat([w.detach() for w in loop.weights]).tolist() == pytest.approx([x for w in hand.w for x in w])


@pytest.mark.slow
def test_a_slower_average_turns_less_in_the_noise():
    """Nearly all noise: SAM's ascents have nothing to do with each other, and VaSSO's as much as its average keeps.

    For independent g_t of mean 0, E<d_t, d_{t-1}> / E||d||^2 = 1 - theta.
    """
    means = {}
    for theta in (None, 0.5, 0.2):
        loop = Loop("vasso" if theta else "sam", 1e3, lr=1e-4, **({"theta": theta} if theta else {}))
        found = [loop.step(t) for t in range(200)][20:]
        means[theta] = math.fsum(found) / len(found)
    assert means[None] == pytest.approx(0.0, abs=0.08)
    assert means[0.5] == pytest.approx(0.5, abs=0.08) and means[0.2] == pytest.approx(0.8, abs=0.08)


def test_without_noise_and_without_steps_the_ascent_stays():
    loop = Loop("sam", lr=0.0)
    assert [loop.step(t) for t in range(3)] == [None, pytest.approx(1.0), pytest.approx(1.0)]


@pytest.mark.parametrize("method", ["sam", "asam", "n-step", "fsam", "gsam", "usam"])
def test_it_is_of_the_whole_way_from_w_with_any_base(method):
    for base in ("sgd", "foreach", "fused"):
        loop = Loop(method, 0.7, base=base)
        eps, found = [], []
        for t in range(6):
            found.append(loop.step(t))
            eps.append(loop.eps)
        assert found[1:] == pytest.approx([angle(a, b) for a, b in itertools.pairwise(eps)], rel=1e-8)


@pytest.mark.parametrize("device", [False, True])
def test_groups_with_radii_of_their_own_and_one_that_stays(device):
    for rhos in ([0.1, 0.4], [0.0, 0.4]):
        loop = Loop("sam", 0.7, rhos=rhos, device=device)
        eps, found = [], []
        for t in range(4):
            found.append(loop.step(t))
            eps.append(loop.eps)
        assert found[1:] == pytest.approx([angle(a, b) for a, b in itertools.pairwise(eps)], rel=1e-8)
    assert abs(found[-1]) == pytest.approx(1.0), "a single entry moves"


@pytest.mark.parametrize("device", [False, True])
def test_a_tensor_without_gradient_has_not_moved(device):
    """It counts as zero, and is not remembered from an update before."""
    loop, seen = Loop("sam", 0.7, device=device), [(0,), (1,), (0, 1), (0,), (0, 1), (1,)]
    eps, found = [], []
    for t, some in enumerate(seen):
        found.append(loop.step(t, some))
        eps.append(loop.eps)
    assert found[1] == 0.0, "nothing in common"
    assert found[2:] == pytest.approx([angle(a, b) for a, b in itertools.pairwise(eps[1:])], rel=1e-8)


@pytest.mark.parametrize("method", ["every-k", "looksam"])
def test_an_update_without_ascent_shows_none_and_the_next_one_looks_past_it(method):
    loop = Loop(method, 0.7, k=3)
    eps, found = [], []
    for t in range(9):
        found.append(loop.step(t))
        eps.append(loop.eps)
    assert [t for t, one in enumerate(found) if one is not None] == [3, 6]
    assert [found[3], found[6]] == pytest.approx([angle(eps[0], eps[3]), angle(eps[3], eps[6])], rel=1e-8)


@pytest.mark.parametrize("device", [False, True])
def test_an_ascent_that_is_not_finite_is_none(device):
    """Neither the first one, nor one later, before which the last good one is remembered."""
    loop = Loop("sam", 0.7, device=device)
    eps, found = [], []
    for t in range(5):
        found.append(loop.step(t, spoilt=t in (0, 2)))
        eps.append(loop.eps)
    assert [one is None for one in found] == [True, True, True, False, False]
    assert found[3:] == pytest.approx([angle(eps[1], eps[3]), angle(eps[3], eps[4])], rel=1e-8)


def test_an_update_that_is_given_up_is_not_remembered():
    loop, other = Loop("sam", 0.7), Loop("sam", 0.7)
    for one in (loop, other):
        one.step(0)
    home = [w.detach().clone() for w in loop.weights]
    for evaluation in loop.optimizer.passes():
        with evaluation:
            (loop.weights[0].sum() - 3 * loop.weights[1].sum()).backward()
        if evaluation.index:
            loop.optimizer.abort()
    assert all(map(torch.equal, home, loop.weights))
    assert loop.step(1) == other.step(1)


@pytest.mark.filterwarnings("ignore:weights in half precision")
def test_weights_in_half_precision_show_the_ascent_that_was_asked_for():
    """Rounding at random would turn a small displacement of large weights into noise."""
    w = nn.Parameter(torch.linspace(50.0, 100.0, 200).bfloat16())
    optimizer = flatmin.wrap(torch.optim.SGD([w], lr=0.0), "sam", rho=0.5, diagnostics=True)

    def closure():
        optimizer.zero_grad()
        loss = (w.float() ** 2).sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    found = optimizer.diagnostics()
    assert found["epsilon_cosine"] < 0.5 and found["ascent_cosine"] == pytest.approx(1.0, abs=1e-3)


class TestCheckpoints:
    @pytest.mark.parametrize("method", METHODS)
    def test_a_run_that_goes_on_shows_the_same_numbers(self, method):
        base = "adamw" if len(method) % 2 else "sgd"
        alone = Session(method, base, diagnostics=True).run(range(9))
        saved = copy.deepcopy(alone.save())
        alone.run(range(9, 11))
        again = Session(method, base, seed=9, diagnostics=True).load(saved).run(range(9, 11))
        assert again.optimizer.diagnostics() == alone.optimizer.diagnostics()
        assert "ascent_cosine" in again.optimizer.diagnostics()
        assert same_bits(again.save(), alone.save())

    @pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
    def test_copies_remember_it(self, copied):
        loop = Loop("sam", 0.7)
        loop.step(0)
        twin = copy.deepcopy(loop) if copied == "deepcopy" else pickle.loads(pickle.dumps(loop))
        assert twin.step(1) == loop.step(1) is not None

    def test_one_that_was_written_without_diagnostics_begins_anew(self):
        saved = Session("sam", "sgd").run(range(3)).save()
        assert not [key for one in saved["optimizer"]["state"].values() for key in one if "flatmin" in key]
        session = Session("sam", "sgd", diagnostics=True).load(saved).run(range(3, 4))
        assert "ascent_cosine" not in session.optimizer.diagnostics()
        assert "ascent_cosine" in session.run(range(4, 5)).optimizer.diagnostics()

    @pytest.mark.parametrize("method", ["sam", "vasso"])
    def test_one_that_was_written_with_diagnostics_serves_without(self, method):
        saved = Session(method, "sgd", diagnostics=True).run(range(3)).save()
        plain = Session(method, "sgd").load(copy.deepcopy(saved)).run(range(3, 6))
        want = Session(method, "sgd").run(range(6))
        assert same_bits(plain.save(), want.save())
        bare = flatmin.base_state_dict(saved["optimizer"])
        assert not [key for one in bare["state"].values() for key in one if key.startswith("flatmin")]

    def test_that_of_another_recipe_is_refused(self):
        saved = Session("asam", "sgd", diagnostics=True).run(range(3)).save()
        for other in ("sam", "vasso"):
            with pytest.raises(ValueError, match=f"recipe asam.*this optimizer runs {other}"):
                Session(other, "sgd", diagnostics=True).load(saved)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turns(Mask):
    """The first tensor moves, then the second, then both."""

    def select(self, c):
        return [c.step != 1, c.step != 0][: len(c.w)]


def test_a_mask_moves_other_tensors_each_time():
    """The angle is over all weights, not those that two ascents share."""
    loop = Loop("sam", 0.7, mask=Turns())
    found, eps = [], []
    for t in range(3):
        found.append(loop.step(t))
        eps.append(loop.eps)
    assert found[1] == 0.0 and found[2] == pytest.approx(angle(*eps[1:]), rel=1e-8) and abs(found[2]) < 1
