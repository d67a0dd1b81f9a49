"""What every method in the table owes the engine's contract, plugins included.

`FLATMIN_TEST_PLUGINS=my_module pytest tests/optim/test_every_method.py` runs the same tests on your own methods.
"""

import copy
import itertools
import math
import os
import pickle
from functools import partial

import pytest
import torch
from torch import nn

import flatmin
from flatmin.methods import METHODS, Need
from tests.helpers import REPRESENTATIVES, as_on_device, drive, entry_points, recipe_of, same_bits, wrap_fitting

PLUGINS = [p for p in os.environ.get("FLATMIN_TEST_PLUGINS", "").split(",") if p]
TABLE = flatmin.method_table(PLUGINS)
# Resumed and copied are the representatives of the built-in methods, which `test_stateful.py` runs all, and all others.
RESUMED = [name for name in TABLE if name in REPRESENTATIVES or name not in METHODS]
BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}
every_method = pytest.mark.parametrize("name", TABLE)


def turn(name, options):
    """One of the options, another one for the next method."""
    return list(options)[list(TABLE).index(name) % len(options)]


class Loop:
    """One model, one optimizer and one stream of batches."""

    def __init__(self, name, base="sgd", *, device=False, lr=None, model=None, total=6, **kw):
        torch.manual_seed(0)
        self.model = model or nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)
        )
        self.criterion = flatmin.Criterion(nn.CrossEntropyLoss())
        inner = BASES[base](self.model.parameters())
        if lr is not None:
            inner.param_groups[0]["lr"] = lr
        recipe = recipe_of(name, total, TABLE)
        optimizer = wrap_fitting(inner, recipe, model=self.model, criterion=self.criterion, seed=3, **kw)
        self.optimizer = as_on_device(optimizer, device)
        self.calls = 0

    def backward(self, k, chunk=None, factor=1.0):
        g = torch.Generator().manual_seed(k)
        x, y = torch.randn(16, 6, generator=g), torch.randint(3, (16,), generator=g)
        if chunk is not None:
            x, y = x.chunk(2)[chunk], y.chunk(2)[chunk]
        loss = self.criterion(self.model(x), y)
        self.calls += 1
        self.optimizer.backward(factor * loss)
        return loss

    def steps(self, first, last, entry="closure"):
        for k in range(first, last):
            drive(self.optimizer, partial(self.backward, k), entry)
        return self

    def weights(self):
        return [p.detach().clone() for p in self.model.parameters()]

    def everything(self):
        """Weights, statistics, and what the optimizer remembers."""
        return copy.deepcopy([self.model.state_dict(), self.optimizer.state_dict()])


@every_method
def test_the_table_entry_is_complete_and_states_its_cost(name):
    """Calls of the closure; second-order work is stated apart, micro-batches count by their size."""
    method = TABLE[name]
    assert method.title and method.formula and method.paper
    assert all(part.__doc__ for part in method.parts)
    recipe = method.recipe()
    assert recipe.default_rho >= 0 and recipe.gradient_evaluations > 0 and recipe.name == name
    assert flatmin.compose(name, TABLE) == recipe

    recipe = recipe_of(name, 10, TABLE)
    by_chance = Need.RANDOM in recipe.schedule.demands() or Need.DECIDES_BY_VALUE in recipe.needs
    steps = 40 if by_chance or name == "warm-up" else 10
    loop = Loop(name, total=steps).steps(0, steps)
    calls = loop.calls / steps * (0.5 if name == "micro-sam" else 1.0)
    stated = recipe.gradient_evaluations - sum(part.surcharge for part in recipe.parts.values())
    assert abs(calls - stated) <= (0.3 if by_chance else 0.1) + 1e-9
    # The checkpoint holds what the parts remember, and no copy of the weights.
    slots = sum(k == "param" for part in recipe.parts.values() for k in part.slots.values())
    base = {k: len(v) for k, v in loop.optimizer.base.state_dict()["state"].items()}
    for i, entries in loop.optimizer.state_dict()["state"].items():
        assert len(entries) == base.get(i, 0) + 2 * slots


@every_method
def test_entry_points_agree_bit_for_bit(name):
    base = turn(name, BASES)
    closure = Loop(name, base).steps(0, 6)
    for entry in entry_points(closure.optimizer.recipe)[1:]:
        assert same_bits(Loop(name, base).steps(0, 6, entry).weights(), closure.weights()), entry


@every_method
def test_the_path_of_accelerators_agrees_to_rounding(name):
    host, device = (Loop(name, device=on).steps(0, 4).weights() for on in (False, True))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(host, device, strict=True))


def base_alone(base, chunks, steps, factor, told):
    """A net that the base trains by itself: weights and statistics, its state, the losses, the random numbers.

    Each chunk's loss counts by the factor; a loop is told the mean of the first ones.
    """
    loop, losses = Loop("sgd", base), []
    for k in range(steps):
        loop.optimizer.base.zero_grad()
        found = [loop.backward(k, i, factor).detach() for i in chunks][:told]
        losses.append(sum(found) / len(found))
        loop.optimizer.base.step()
    state = flatmin.base_state_dict(loop.optimizer.state_dict())["state"]
    return loop.model.state_dict(), state, losses, torch.get_rng_state()


@every_method
def test_rho_zero_is_the_base_bit_for_bit(name):
    """In every entry point: weights, BatchNorm statistics, base state, losses, random stream, and number of passes."""
    recipe = recipe_of(name, 6, TABLE)
    if recipe.combine.always:
        pytest.skip(f"{name} states a limit of its own")
    served = ["sgd"] if Need.SGD in recipe.needs else list(BASES)
    bases = itertools.cycle(served if turn(name, (False, True)) else reversed(served))
    for entry, base in zip(entry_points(recipe), bases, strict=False):
        # The list of closures is the base on their mean, or on their sum; the probe's limit is the base on the second.
        listed = {"sam-db": (1,), "imbsam": (0, 1), "micro-sam": (0, 1) if entry == "closure" else (None,)}
        chunks = listed.get(name, (None,))
        loop = Loop(name, base, rho=0.0, device=entry == "passes")
        losses = [drive(loop.optimizer, partial(loop.backward, k), entry) for k in range(3)]
        state = flatmin.base_state_dict(loop.optimizer.state_dict())["state"]
        factor, told = 1.0 if name == "imbsam" else 1.0 / len(chunks), 1 if entry == "passes" else len(chunks)
        alone = base_alone(base, chunks, 3, factor, told)
        assert same_bits((loop.model.state_dict(), state, losses, torch.get_rng_state()), alone), entry
        assert loop.calls == 3 * len(chunks) * (2 if entry in ("perturbed", "two calls") else 1), entry


@every_method
def test_lr_zero_leaves_the_weights(name):
    loop = Loop(name, turn(name, BASES), lr=0.0, rho=0.5)
    before = loop.weights()
    loop.steps(0, 3)
    loop.steps(3, 6, "passes")
    assert same_bits(loop.weights(), before)


@every_method
def test_a_zero_gradient_moves_nothing_and_gives_numbers(name):
    """Step 1 alone has a gradient, so that memories hold zeros, and zeros are scaled."""
    for device in (False, True):
        loop = Loop(name, device=device)
        start, seen = loop.weights(), []

        def backward(*chunk, k, loop=loop, seen=seen):
            seen.append(loop.weights())
            return loop.backward(k, *chunk, factor=float(k == 1))

        loop.optimizer.param_groups[0]["weight_decay"] = 0.0
        drive(loop.optimizer, partial(backward, k=0))
        # RSAM and bSAM climb from a point of their own, and bSAM decays weights by itself.
        assert name in ("rsam", "bsam") or all(same_bits(at, start) for at in seen)
        assert name == "bsam" or same_bits(loop.weights(), start)
        for k in range(1, 6):
            drive(loop.optimizer, partial(backward, k=k))
        assert all(bool(w.isfinite().all()) for w in loop.weights())


class Planned(Exception):
    """Raised on purpose."""


@every_method
def test_an_exception_in_any_pass_or_in_the_base_leaves_no_trace(name):
    """And what follows is what would have followed: also the draws are taken back."""
    device = turn(name, (False, True))
    loop = Loop(name, device=device).steps(0, 2)
    twin = copy.deepcopy(loop)
    as_on_device(twin.optimizer, device)
    loop.calls = 0
    passes = copy.deepcopy(loop).steps(2, 3).calls
    assert passes >= 1
    weights, state = loop.weights(), copy.deepcopy(loop.optimizer.state_dict())

    def fail(*_):
        raise Planned

    for fail_in in range(1, passes + 2):
        loop.calls = 0

        def backward(*chunk, fail_in=fail_in):
            loss = loop.backward(2, *chunk)
            if loop.calls == fail_in:
                raise Planned
            return loss

        handle = loop.optimizer.register_step_pre_hook(fail) if fail_in > passes else None
        with pytest.raises(Planned):
            drive(loop.optimizer, backward)
        if handle is not None:
            handle.remove()
        assert same_bits(loop.weights(), weights) and same_bits(loop.optimizer.state_dict(), state), fail_in
    # BatchNorm has seen the first forwards of the steps that failed.
    loop.model.load_state_dict(twin.model.state_dict())
    for one in (loop, twin):
        torch.manual_seed(1)
        one.steps(2, 5)
    assert same_bits(loop.everything(), twin.everything())


@pytest.mark.parametrize("name", RESUMED)
def test_resume_is_bit_exact(name):
    for base in BASES:
        straight = Loop(name, base).steps(0, 8)
        half = Loop(name, base).steps(0, 4)
        rng = torch.get_rng_state()
        for carry in (copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))):
            saved = carry(half.optimizer.state_dict())
            rest = Loop(name, base, model=copy.deepcopy(half.model))
            rest.optimizer.load_state_dict(saved)
            torch.set_rng_state(rng)
            assert same_bits(straight.everything(), rest.steps(4, 8).everything())


@pytest.mark.parametrize("name", RESUMED)
def test_a_deepcopy_of_model_and_optimizer_trains_the_same(name):
    loop = Loop(name).steps(0, 3)
    twin = copy.deepcopy(loop)
    assert twin.optimizer.model is twin.model and twin.optimizer is not loop.optimizer
    rng = torch.get_rng_state()
    loop.steps(3, 6)
    torch.set_rng_state(rng)
    assert same_bits(loop.everything(), twin.steps(3, 6).everything())


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("name", ["n-step+vasso", "n-step+fsam", "n-step"])
def test_an_infinite_first_gradient_does_not_stay_in_the_memory_of_several_ascents(name, device):
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = as_on_device(flatmin.wrap(torch.optim.SGD([w], lr=0.1), name, rho=0.5), device)
    points = []

    def closure():
        points.append(w.detach().clone())
        optimizer.zero_grad()
        loss = (w**2).sum() * (torch.inf if len(points) == 5 else 1.0)
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
    passes = len(points) // 4
    last = [float((p - points[-passes]).norm()) for p in points[-passes:]]
    assert max(last) > 0.1 and all(map(math.isfinite, last))
    assert optimizer.counts()["nonfinite_ascents"] == 1


@pytest.mark.parametrize("foreach", [False, True])
def test_what_is_remembered_is_no_gradient_that_the_base_writes_to(foreach):
    """Nesterov momentum adds to the gradient in place."""
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    base = torch.optim.SGD([w], lr=0.1, momentum=0.9, nesterov=True, foreach=foreach)
    optimizer = flatmin.wrap(base, "stale-sam", rho=0.5)
    seen = []

    def closure():
        optimizer.zero_grad()
        loss = 0.5 * (w**2).sum()
        loss.backward()
        seen.append(w.grad.clone())
        return loss

    for _ in range(3):
        optimizer.step(closure)
        assert torch.equal(optimizer.state[w]["flatmin.direction.gradient"], seen[-1])
