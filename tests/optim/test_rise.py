"""The rise of the loss along a method's own ascent: its numbers by formula, and that nothing is changed by it."""

import math
import random
import re
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import flatmin
from flatmin.methods import Need
from flatmin.optim.rise import ascent_of
from tests.helpers import BASES, CHUNKS, NAMES, REPRESENTATIVES, Session, batch, recipe_of, same_bits, takes_chunks

# "sam-on" moves the one layer to which the sessions give rho = 0.
STAYS = {
    "sgd": "never perturbs the weights",
    "sgdhess": "never perturbs the weights",
    "sam-on": "did not perturb any weight",
}


def closures(session, step):
    """The closures of a batch as the session's method takes them."""
    x, y = batch(step)

    def closure(x, y):
        session.optimizer.zero_grad()
        loss = session.criterion(session.model(x), y)
        scaler = session.optimizer.scaler
        session.optimizer.backward(loss if scaler is None else scaler.scale(loss))
        return loss

    if not takes_chunks(session.optimizer):
        return partial(closure, x, y)
    return [partial(closure, *part) for part in zip(x.chunk(CHUNKS), y.chunk(CHUNKS), strict=True)]


def everything(session):
    """All that a loop can see of a session."""
    optimizer = session.optimizer
    return [
        session.save(),
        [(None, 0) if p.grad is None else (p.grad, id(p.grad)) for p in session.model.parameters()],
        [m.training for m in session.model.modules()],
        optimizer.counts(),
        optimizer.diagnostics() if optimizer._diagnoses else None,
        [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
        random.getstate(),
        list(map(str, np.random.get_state())),
    ]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", [*NAMES, "jitter"])
def test_it_changes_nothing(method, monkeypatch):
    if Need.BARE_SGD in recipe_of(method).needs:
        monkeypatch.setitem(BASES, "sgd", lambda groups: torch.optim.SGD(groups, lr=0.1))
    session, twin = (Session(method, diagnostics=True).run(range(4)) for _ in range(2))
    session.optimizer.zero_grad()
    twin.optimizer.zero_grad()
    session.model[0].weight.grad = torch.ones_like(session.model[0].weight)
    before = everything(session)
    if method in STAYS:
        with pytest.raises(ValueError, match=STAYS[method]):
            session.optimizer.rise(closures(session, 7))
    else:
        found = session.optimizer.rise(closures(session, 7), (0.5, 2.0))
        assert found.lengths[1] > found.lengths[0] > 0
    assert same_bits(before, everything(session))
    session.model[0].weight.grad = None
    after = []
    for each in (session, twin):
        torch.manual_seed(5)
        after.append(each.run(range(4, 8)).save())
    assert same_bits(*after), "nor what comes after"


@pytest.mark.parametrize("where", ["at w", "on the way", "at w + eps"])
def test_an_error_in_the_closure_changes_nothing(where):
    session = Session("vasso", diagnostics=True).run(range(3))
    calls = []

    def closure():
        calls.append(0)
        session.model(batch(9)[0]).sum().backward()
        if len(calls) == 1 + ["at w", "on the way", "at w + eps"].index(where):
            torch.rand(3)
            raise KeyError(where)
        return closures(session, 9)()

    before = everything(session)
    with pytest.raises(KeyError, match=re.escape(where)):
        session.optimizer.rise(closure)
    assert same_bits(before, everything(session))


def quadratic(method="sam", **options):
    """L = w' A w / 2 in float64 with its optimizer and closure."""
    torch.manual_seed(0)
    a = torch.randn(5, 5, dtype=torch.float64)
    a = a @ a.T
    w = nn.Parameter(torch.randn(5, dtype=torch.float64))
    optimizer = flatmin.wrap(torch.optim.SGD([w], lr=0.1, momentum=0.9), method, **options)

    def closure():
        optimizer.zero_grad()
        loss = 0.5 * w @ a @ w
        loss.backward()
        return loss

    return optimizer, closure, w.detach(), a


MULTIPLES = (0.1, 1.0, 7.0)


def assert_along(found, w, a, eps):
    """The numbers of displacements eps from the formula of the quadratic."""
    g = a @ w
    assert found.loss == pytest.approx(float(0.5 * w @ g), rel=1e-12)
    assert found.predicted == pytest.approx([float(g @ e) for e in eps], rel=1e-9)
    assert found.measured == pytest.approx([float(g @ e + 0.5 * e @ a @ e) for e in eps], rel=1e-9)
    assert found.lengths == pytest.approx([float(e.norm()) for e in eps], rel=1e-9)


@pytest.mark.parametrize("rule", ["", "+every-k", "+rho-power", "+rho-ramp", "+gsam"])
def test_sam_on_a_quadratic(rule):
    """Rules of when and how far, and what is made of the gradients, are left out."""
    optimizer, closure, w, a = quadratic(f"sam{rule}".removeprefix("sam+"), rho=0.3)
    g = a @ w
    assert_along(optimizer.rise(closure, MULTIPLES), w, a, [m * 0.3 * g / g.norm() for m in MULTIPLES])


def test_asam_on_a_quadratic():
    optimizer, closure, w, a = quadratic("asam", rho=0.3)
    g, t = a @ w, w.abs()
    assert_along(optimizer.rise(closure, MULTIPLES), w, a, [m * 0.3 * t * t * g / (t * g).norm() for m in MULTIPLES])


def test_several_steps_are_the_method_s_own_at_each_radius():
    optimizer, closure, w, a = quadratic("n-step", n=2, rho=0.3)

    def way(rho):
        eps = torch.zeros_like(w)
        for _ in range(2):
            g = a @ (w + eps)
            eps = eps + rho / 2 * g / g.norm()
        return eps

    assert_along(optimizer.rise(closure, MULTIPLES), w, a, [way(0.3 * m) for m in MULTIPLES])


def test_the_memory_of_training_is_part_of_the_way():
    """VaSSO's average after two steps, F-SAM's likewise."""
    for method, d_of in (
        ("vasso", lambda d, g: 0.1 * d + 0.9 * g),
        ("fsam", lambda d, g: g - (0.9 * d + 0.1 * g)),
    ):
        optimizer, closure, _, a = quadratic(method, rho=0.3)
        w = optimizer.param_groups[0]["params"][0].detach()
        memory = None
        for _ in range(2):
            g = a @ w
            memory = (
                g.clone()
                if memory is None
                else (0.1 * memory + 0.9 * g if method == "vasso" else 0.9 * memory + 0.1 * g)
            )
            optimizer.step(closure)
        d = d_of(memory, a @ w)
        assert_along(optimizer.rise(closure, MULTIPLES), w, a, [m * 0.3 * d / d.norm() for m in MULTIPLES])


def test_groups_move_in_proportion():
    torch.manual_seed(0)
    u, v = (nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(2))
    optimizer = flatmin.wrap(torch.optim.SGD([{"params": [u], "rho": 0.1}, {"params": [v], "rho": 0.4}], lr=0.1))

    def closure():
        optimizer.zero_grad()
        loss = u.square().sum() + v.square().sum()
        loss.backward()
        return loss

    of_u, of_v = (float(w.detach().square().sum()) for w in (u, v))
    slope = 2 * (0.1 * of_u + 0.4 * of_v) / math.sqrt(of_u + of_v)
    assert optimizer.rise(closure, MULTIPLES).predicted == pytest.approx([m * slope for m in MULTIPLES])
    assert [group["rho"] for group in optimizer.param_groups] == [0.1, 0.4]


def test_micro_batches_are_averaged():
    """mSAM: the mean of what each micro-batch gives by itself."""
    session = Session("micro-sam")
    session.model.eval()
    both = session.optimizer.rise(closures(session, 3), MULTIPLES)
    alone = Session("sam")
    alone.model.eval()
    x, y = batch(3)
    parts = []
    for part in zip(x.chunk(CHUNKS), y.chunk(CHUNKS), strict=True):

        def closure(part=part):
            alone.optimizer.zero_grad()
            loss = alone.criterion(alone.model(part[0]), part[1])
            loss.backward()
            return loss

        parts.append(alone.optimizer.rise(closure, MULTIPLES))
    for what in ("predicted", "measured", "lengths"):
        mean = np.mean([getattr(part, what) for part in parts], axis=0)
        assert getattr(both, what) == pytest.approx(mean, rel=1e-4, abs=1e-7)


def test_the_loss_that_rises_is_the_one_that_is_descended():
    """BiSAM climbs a bound of the 0-1 loss; the rise is that of the cross-entropy along this way."""
    session = Session("bisam-tanh")
    session.model.eval()
    found = session.optimizer.rise(closures(session, 3), (1e-3,))
    assert found.measured == pytest.approx(found.predicted, rel=0.02)
    x, y = batch(3)
    with torch.no_grad():
        assert found.loss == pytest.approx(float(session.criterion(session.model(x), y)))


@pytest.mark.parametrize("method", ["sam", "micro-sam", "momentum-sam"])
def test_a_scaler_changes_no_number(method):
    scaled, plain = (Session(method) for _ in range(2))
    for k, session in enumerate((scaled.scaled(), plain)):
        torch.manual_seed(3)
        session.run(range(2), "closure" if k else "scaler")
        session.model.eval()
    before = scaled.save()
    found = scaled.optimizer.rise(closures(scaled, 3), MULTIPLES)
    assert same_bits(before, scaled.save())
    for what in ("predicted", "measured", "lengths"):
        expected = getattr(plain.optimizer.rise(closures(plain, 3), MULTIPLES), what)
        assert getattr(found, what) == pytest.approx(expected, rel=1e-4)


def test_state_of_a_model_that_the_optimizer_does_not_know():
    session = Session("sam")
    session.optimizer.model = None
    before = [b.clone() for b in session.model.buffers()]
    session.optimizer.rise(closures(session, 0), MULTIPLES, model=session.model)
    assert same_bits(before, list(session.model.buffers()))


class Keeper(nn.Module):
    """A net that keeps about everything that a forward can keep."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.teacher, self.averaged = (nn.Linear(6, 3).requires_grad_(False) for _ in range(2))
        self.register_buffer("wide", torch.ones(3).expand(2, 3))
        with torch.inference_mode():
            self.register_buffer("inferred", torch.ones(3))
        self.register_buffer("hidden", torch.zeros(3))
        self.lazy = nn.UninitializedParameter(requires_grad=False)
        self.output, self.outputs, self.by_name = None, [], {}
        self.view = self.layer.weight.detach()

    def forward(self, x):
        h = self.layer(x)
        self.teacher.weight.data = 0.9 * self.teacher.weight.data + 0.1 * self.layer.weight.data
        with torch.no_grad():
            self.averaged.weight.lerp_(self.layer.weight, 0.1)
        self.hidden.data.add_(1)
        self.output = h
        self.outputs.append(h)
        self.by_name["h"] = h
        return h + self.wide[0] + self.inferred + self.teacher(x) + self.averaged(x)


class TestWhatAModelHolds:
    def test_all_of_it_is_put_back(self):
        model = Keeper()
        optimizer = flatmin.wrap(torch.optim.SGD(model.layer.parameters(), lr=0.1), model=model)
        x, _ = batch(0)

        def closure():
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)

        def values():
            return [*model.buffers(), *(p.detach() for name, p in model.named_parameters() if name != "lazy")]

        before = [v.clone() for v in values()]
        output, kept = model.output, list(model.outputs)
        gradient = model.layer.weight.grad
        found = optimizer.rise(closure, (0.1, 1.0))
        assert found.measured == pytest.approx(found.predicted, rel=0.2), "at w and at w + eps from one state"
        assert same_bits(before, values())
        assert model.output is output and list(map(id, model.outputs)) == list(map(id, kept))
        assert model.by_name == {"h": output} and model.layer.weight.grad is gradient

    @pytest.mark.parametrize("writes", [False, True])
    def test_large_frozen_parameters_are_not_copied(self, writes, monkeypatch):
        model = nn.Sequential(nn.Linear(6, 100).requires_grad_(False), nn.Linear(100, 3))
        optimizer = flatmin.wrap(torch.optim.SGD(model[1].parameters(), lr=0.1), model=model)
        frozen = model[0].weight
        version, clone = frozen._version, torch.Tensor.clone
        copied = []
        monkeypatch.setattr(torch.Tensor, "clone", lambda t, **kw: copied.append(t.shape) or clone(t, **kw))

        def closure():
            optimizer.zero_grad()
            if writes:
                frozen.mul_(1.0)
            loss = model(batch(0)[0]).square().mean()
            loss.backward()
            return loss

        if writes:
            with pytest.raises(RuntimeError, match=r"the forward writes to the parameter 0.weight.* Make it a buffer"):
                optimizer.rise(closure)
        else:
            optimizer.rise(closure)
            assert frozen._version == version and frozen.shape not in copied
        assert all(p.grad is None for p in model.parameters())

    def test_gradients_of_a_network_that_the_loss_passes_through(self):
        generator, critic = nn.Linear(6, 6), nn.Linear(6, 1)
        optimizer = flatmin.wrap(torch.optim.SGD(generator.parameters(), lr=0.1), model=generator)

        def closure():
            optimizer.zero_grad()
            loss = critic(generator(batch(0)[0])).mean()
            loss.backward()
            return loss

        optimizer.rise(closure)
        assert critic.weight.grad is None
        critic.weight.grad = torch.ones(1, 6)
        optimizer.rise(closure, model=nn.ModuleList([generator, critic]))
        assert torch.equal(critic.weight.grad, torch.ones(1, 6))
        with pytest.warns(UserWarning, match=r"Pass every network of the loss as model="):
            optimizer.rise(closure)
        optimizer.step(closure)  # finds the critic, whose gradients are then known
        before = critic.weight.grad.clone()
        optimizer.rise(closure)
        assert torch.equal(critic.weight.grad, before)


def test_every_method_s_way_is_a_recipe():
    for name in NAMES:
        recipe = recipe_of(name, **REPRESENTATIVES.get(name, {}))
        if recipe.moves:
            way = ascent_of(recipe)
            assert [getattr(way, kind) for kind in ("direction", "geometry", "mask", "inner_loop", "objective")] == [
                getattr(recipe, kind) for kind in ("direction", "geometry", "mask", "inner_loop", "objective")
            ]


class TestRefusals:
    def test_a_way_that_is_not_known_yet(self):
        for method in ("momentum-sam", "stale-sam"):
            optimizer, closure, *_ = quadratic(method)
            with pytest.raises(ValueError, match=f"{method} did not perturb any weight: it has no memory"):
                optimizer.rise(closure)
            optimizer.step(closure)
            optimizer.rise(closure)

    def test_without_a_radius(self):
        optimizer, closure, *_ = quadratic(rho=0.0)
        with pytest.raises(ValueError, match="every param group has rho = 0"):
            optimizer.rise(closure)

    def test_one_closure_for_micro_batches(self):
        optimizer, closure, *_ = quadratic("micro-sam")
        with pytest.raises(ValueError, match=r"needs micro-batches .*; got one closure"):
            optimizer.rise(closure)

    def test_closures_without_a_loss_and_with_a_bad_one(self):
        optimizer, closure, w, _ = quadratic()
        with pytest.raises(TypeError, match="each closure must return the loss"):
            optimizer.rise(lambda: closure() and None)
        w.fill_(torch.inf)
        with pytest.raises(ArithmeticError, match="the loss at w is"):
            optimizer.rise(closure)

    def test_arguments(self):
        optimizer, closure, *_ = quadratic()
        for bad in ([0.0], [1.0, -1.0], [float("nan")], "x", None, [[1.0]]):
            with pytest.raises(ValueError, match="multiples must be numbers above 0"):
                optimizer.rise(closure, bad)
        for good in (2, 2.0, np.float32(2), [np.float32(2)]):
            assert optimizer.rise(closure, good) == optimizer.rise(closure, (2.0,))
        with pytest.raises(ValueError, match=r"rise\(\) got an empty list of closures"):
            optimizer.rise([])
        with pytest.raises(RuntimeError, match=r"no weight received a gradient; .* call loss.backward"):
            optimizer.rise(lambda: torch.zeros(()))

    def test_during_an_update(self):
        optimizer, closure, *_ = quadratic()
        closure()
        with optimizer.perturbed():
            with pytest.raises(RuntimeError, match="an update is under way"):
                optimizer.rise(closure)
            closure()
        optimizer.step()

    @pytest.mark.parametrize(("method", "params"), [("sam", {}), ("esam", {"beta": 1.0})])
    def test_between_the_first_loss_and_the_perturbation(self, method, params):
        """The loop goes on with the masks, and the samples, of its first pass."""

        def run(asks):
            session = Session(method, **params)
            optimizer, (x, y) = session.optimizer, batch(0)
            for _ in range(2):
                optimizer.rise(closures(session, 1))
                optimizer.zero_grad()
                session.criterion(session.model(x), y).backward()
                if asks:
                    with pytest.raises(RuntimeError, match=r"first loss of an update .* after optimizer.step\(\)"):
                        optimizer.rise(closures(session, 1))
                with optimizer.perturbed():
                    session.criterion(session.model(x), y).backward()
                optimizer.step()
            return session

        session = run(asks=True)
        assert same_bits(session.save(), run(asks=False).save())
        session.criterion(session.model(batch(0)[0]), batch(0)[1]).backward()
        session.optimizer.zero_grad()  # gives that loss up
        session.optimizer.rise(closures(session, 1))
