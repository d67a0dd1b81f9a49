"""What every method in the table owes the engine's contract, plugins included.

`FLATMIN_TEST_PLUGINS=my_module pytest tests/optim/test_every_method.py` runs the same tests on your own methods.
"""

import copy
import math
import os
import pickle
from functools import partial

import pytest
import torch
from torch import nn

import flatmin
from flatmin.methods import Need
from tests.covering import pairs
from tests.helpers import recipe_of

PLUGINS = [p for p in os.environ.get("FLATMIN_TEST_PLUGINS", "").split(",") if p]
TABLE = flatmin.method_table(PLUGINS)
BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}
every_method = pytest.mark.parametrize("name", TABLE)
every_base = pytest.mark.parametrize("base", BASES)


class Loop:
    """One model, one optimizer and one stream of batches."""

    def __init__(self, name, base="sgd", *, device_path=False, lr=None, model=None, total=6, **kw):
        torch.manual_seed(0)
        self.model = model or nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)
        )
        self.criterion = flatmin.Criterion(nn.CrossEntropyLoss())
        inner = BASES[base](self.model.parameters())
        if lr is not None:
            inner.param_groups[0]["lr"] = lr
        self.opt = flatmin.wrap(
            inner, recipe_of(name, total, TABLE), model=self.model, criterion=self.criterion, seed=3, **kw
        )
        self.opt._tools.on_device = device_path
        self.calls = 0

    def backward(self, k, chunk=None):
        g = torch.Generator().manual_seed(k)
        x, y = torch.randn(16, 6, generator=g), torch.randint(3, (16,), generator=g)
        if chunk is not None:
            x, y = x.chunk(2)[chunk], y.chunk(2)[chunk]
        loss = self.criterion(self.model(x), y)
        self.opt.backward(loss)
        return loss

    def steps(self, first, last, door="closure", chunks=None):
        chunked = Need.MICRO_BATCHES in self.opt.recipe.needs
        parts = range(2) if chunks is None else chunks
        for k in range(first, last):

            def closure(k=k, chunk=None):
                self.calls += 1
                self.opt.zero_grad()
                return self.backward(k, chunk)

            if door == "closure":
                listed = chunked or chunks is not None
                self.opt.step([partial(closure, chunk=i) for i in parts] if listed else closure)
            elif door == "perturbed":
                closure()
                with self.opt.perturbed():
                    closure()
                self.opt.step()
            else:
                for evaluation in self.opt.passes(chunks=2 if chunked else 1):
                    with evaluation:
                        closure(chunk=evaluation.chunk)
                self.opt.step()
        return self

    def everything(self):
        return [p.detach().clone() for p in (*self.model.parameters(), *self.model.buffers())]


def same(a, b, tol=0.0):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y) if tol == 0 else torch.allclose(x, y, rtol=tol, atol=tol)


@every_method
def test_the_table_entry_is_complete(name):
    method = TABLE[name]
    assert method.title and method.formula and method.paper
    assert all(part.__doc__ for part in method.parts)
    recipe = method.recipe()
    assert recipe.default_rho >= 0 and recipe.gradient_evaluations > 0 and recipe.name == name
    assert flatmin.compose(name, TABLE) == recipe


@every_method
@every_base
def test_doors_agree_bit_for_bit(name, base):
    recipe = recipe_of(name, 6, TABLE)
    closure = Loop(name, base).steps(0, 6).everything()
    same(closure, Loop(name, base).steps(0, 6, "passes").everything())
    if recipe.two_pass and recipe.ascends:
        same(closure, Loop(name, base).steps(0, 6, "perturbed").everything())


@every_method
def test_the_device_path_agrees_to_rounding(name):
    host, device = Loop(name).steps(0, 4), Loop(name, device_path=True).steps(0, 4)
    same(host.everything(), device.everything(), 1e-5)


@pairs("name, base, device_path", list(TABLE), list(BASES), [False, True])
def test_rho_zero_is_the_base(name, base, device_path):
    recipe = recipe_of(name, 6, TABLE)
    if not recipe.combine.rho_zero_is_base:
        pytest.skip(f"{name} states a limit of its own")
    # Methods on micro-batches end at the base on micro-batches; the probe at the base on the second one.
    chunks = {"micro-sam": [0, 1], "sam-db": [1]}.get(name)
    plain = Loop("sgd", base, nonfinite="propagate").steps(0, 6, chunks=chunks)
    same(plain.everything(), Loop(name, base, rho=0.0, device_path=device_path).steps(0, 6).everything())
    if chunks is not None:
        return
    bare = Loop("sgd", base)
    for k in range(6):
        bare.opt.base.zero_grad()
        bare.backward(k)
        bare.opt.base.step()
    same(plain.everything(), bare.everything())


@every_method
@every_base
def test_lr_zero_leaves_the_weights(name, base):
    loop = Loop(name, base, lr=0.0, rho=0.5)
    before = [p.detach().clone() for p in loop.model.parameters()]
    loop.steps(0, 3)
    loop.steps(3, 6, "passes")
    same(before, [p.detach() for p in loop.model.parameters()])


@every_method
@pytest.mark.parametrize("device_path", [False, True])
def test_an_exception_in_any_pass_restores_everything(name, device_path):
    recipe = recipe_of(name, 6, TABLE)
    loop = Loop(name, device_path=device_path).steps(0, 2)
    passes = loop.calls
    loop.steps(2, 3)
    passes = loop.calls - passes
    assert passes >= 1
    weights = [p.detach().clone() for p in loop.model.parameters()]
    state = copy.deepcopy(loop.opt.state_dict())
    for fail_in in range(1, passes + 1):
        calls = 0

        def closure(fail_in=fail_in, chunk=None):
            nonlocal calls
            calls += 1
            loop.opt.zero_grad()
            loss = loop.backward(9, chunk)
            if calls == fail_in:
                raise KeyError("planned")
            return loss

        with pytest.raises(KeyError, match="planned"):
            chunked = Need.MICRO_BATCHES in recipe.needs
            loop.opt.step([partial(closure, chunk=i) for i in range(2)] if chunked else closure)
        same(weights, [p.detach() for p in loop.model.parameters()])
        after = loop.opt.state_dict()
        for i, entries in state["state"].items():
            for key, value in entries.items():
                assert value is None or torch.equal(value, after["state"][i][key]), key
    assert recipe.gradient_evaluations > 0


@every_method
@every_base
def test_resume_is_bit_exact(name, base):
    straight = Loop(name, base).steps(0, 8)
    half = Loop(name, base).steps(0, 4)
    rng = torch.get_rng_state()
    for carry in (copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))):
        saved = carry(half.opt.state_dict())
        rest = Loop(name, base, model=copy.deepcopy(half.model))
        rest.opt.load_state_dict(saved)
        torch.set_rng_state(rng)
        same(straight.everything(), rest.steps(4, 8).everything())


@every_method
def test_a_deepcopy_of_model_and_optimizer_trains_the_same(name):
    loop = Loop(name).steps(0, 3)
    twin = copy.deepcopy(loop)
    assert twin.opt.model is twin.model and twin.opt is not loop.opt
    rng = torch.get_rng_state()
    loop.steps(3, 6)
    torch.set_rng_state(rng)
    same(loop.everything(), twin.steps(3, 6).everything())


@every_method
def test_the_stated_cost_is_the_measured_one(name):
    """Calls of the closure; second-order work is stated apart, micro-batches count by their size."""
    loop = Loop(name, total=60)
    recipe = loop.opt.recipe
    loop.steps(0, 60)
    calls = loop.calls / 60 * (0.5 if name == "micro-sam" else 1.0)
    stated = recipe.gradient_evaluations - sum(part.surcharge for part in recipe.parts.values())
    by_chance = Need.RANDOM in recipe.schedule.demands() or Need.DECIDES_BY_VALUE in recipe.needs
    assert abs(calls - stated) <= (0.3 if by_chance else 0.1)


@every_method
def test_a_checkpoint_holds_no_copy_of_the_weights(name):
    recipe = recipe_of(name, 6, TABLE)
    loop = Loop(name).steps(0, 3)
    slots = sum(k == "param" for part in recipe.parts.values() for k in part.slots.values())
    base = {k: len(v) for k, v in loop.opt.base.state_dict()["state"].items()}
    for i, entries in loop.opt.state_dict()["state"].items():
        assert len(entries) == base.get(i, 0) + 2 * slots


@pytest.mark.parametrize("device_path", [False, True])
@pytest.mark.parametrize("name", ["n-step+vasso", "n-step+fsam", "n-step"])
def test_an_infinite_first_gradient_does_not_stay_in_the_memory_of_several_ascents(name, device_path):
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = flatmin.wrap(torch.optim.SGD([w], lr=0.1), name, rho=0.5)
    optimizer._tools.on_device = device_path
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
        assert torch.equal(optimizer._tools.state.per_weight["direction.gradient"][w], seen[-1])
