"""Any mix of loops, faults, frozen tensors, options, checkpoints and copies leads where a plain loop does.

Three methods are compared with formulas, all others with an optimizer of the same method that only ever gets closures.
"""

import copy
import io
import math
import pickle
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from flatmin.methods import METHODS, Need
from tests.helpers import as_on_device, same_bits
from tests.optim.lives import BRANCHES, FREEZABLE, GROUPS, LATE, RHO, TOLERANCE, WRITTEN, Formula, Net, Setting, Twin


class Planned(Exception):
    """A fault of the user's code."""


BRANCH = st.integers(0, len(BRANCHES) - 1)
PASS = st.lists(BRANCH, min_size=1, max_size=3)
BAD = st.tuples(st.integers(0, 3), st.sampled_from([math.nan, math.inf, -math.inf]))
LR = st.sampled_from([0.0, 0.02, 0.1])
RADIUS = st.sampled_from([0.0, 0.05, 0.3])
ENTRY = st.integers(0, 59)  # which of the entry points that serve the method
PLAN = st.fixed_dictionaries(
    {
        "entry": ENTRY,
        "first": PASS,
        "second": st.none() | PASS,
        "zeroes": st.booleans(),
        "scale": st.sampled_from([1.0, 0.5]),
        "bad": BAD,
        "where": st.sampled_from(["nowhere", "nowhere", "nowhere", "first", "second", "both"]),
    }
)


class Engine(RuleBasedStateMachine):
    """Drives an optimizer and what it is compared with side by side."""

    method = "sam"

    @initialize(
        momentum=st.sampled_from([0.0, 0.9]),
        nesterov=st.booleans(),
        weight_decay=st.sampled_from([0.0, 0.01]),
        foreach=st.booleans(),
        rhos=st.tuples(RADIUS, RADIUS, RADIUS),
        flat=st.booleans(),
        device=st.booleans(),
        with_model=st.booleans(),
    )
    def build(self, rhos, **options):
        self.setting, self.batches = Setting(self.method, **options), 0
        self.net = Net()
        self.plan = (Formula if self.method in WRITTEN else Twin)(self.setting, self.net, rhos)
        self.adopt(self.setting.optimizer(self.net, self.plan.groups))

    def adopt(self, optimizer):
        """Go on with an optimizer that has made no update in its life."""
        self.optimizer = as_on_device(optimizer, self.setting.device)
        self.fails_in_base = False
        if self.setting.flat:  # a hook would make the base step weight by weight
            step = optimizer.base.step
            optimizer.base.step = lambda *loss: (self.look_at_home(), step(*loss))[1]
        else:
            optimizer.register_step_pre_hook(self.look_at_home)
        self.plan.born()

    def look_at_home(self, *_):
        assert same_bits(self.net.weights(), self.before), "the base stepped away from w"
        if self.fails_in_base:
            raise Planned

    def memory(self):
        """What the base and the method remember, and the counters."""
        return copy.deepcopy([self.optimizer.state_dict(), self.optimizer.counts()])

    # -- steps -----------------------------------------------------------------------------------------------------

    def parts(self, entry, first, second):
        """The entry point, and both passes as lists of (branch, batch) on branches that the optimizer trains."""
        entry = self.setting.entries()[entry % len(self.setting.entries())]
        live = [b for b in BRANCHES if self.plan.touched(b)]
        count = 2 if self.setting.chunked else len(first) if entry == "closures" else 1
        numbers = range(self.batches, self.batches + count)
        self.batches += count
        second = first if self.setting.alike else second
        made = [
            [(live[p[i % len(p)] % len(live)], number) for i, number in enumerate(numbers)] for p in (first, second)
        ]
        return entry, made

    def backward(self, part, poison=None, fault=None, share=1.0):
        """Forward and backward of one part, with a fault of the user's in it."""
        if fault is not None:
            self.fired = True
        if fault == "before":
            raise Planned
        if fault == "silent":
            return self.plan.loss(self.optimizer, self.net, part)
        loss = self.plan.backward(self.optimizer, self.net, part, poison, share)
        if fault == "after":
            raise Planned
        return loss

    def drive(self, entry, passes, poisons, faults=(None, None), *, zeroes=True, scale=1.0):
        """One update of the engine; the number of passes it took, and the loss it returned."""
        if not any(group["rho"] for group in self.optimizer.param_groups) or self.method == "sgd":
            zeroes = True  # the base's own step goes on from what a closure leaves
        self.before, self.fired = self.net.weights(), False
        optimizer, last = self.optimizer, len(passes[0]) - 1

        def run(k, i=0, share=1.0):
            k, end = min(k, 1), i == last
            fault = faults[k] if end or faults[k] == "silent" else None
            return self.backward(passes[k][i], poisons[k] if end else None, fault, share)

        if entry in ("closure", "closures"):
            ran = [0] * len(passes[0])

            def closure(i):
                ran[i] += 1
                if zeroes:
                    optimizer.zero_grad()
                return run(ran[i] - 1, i)

            closures = [partial(closure, i) for i in range(len(ran))]
            loss = optimizer.step(closures if entry == "closures" or self.setting.chunked else closures[0])
            assert self.setting.chunked or len(set(ran)) == 1
            return ran[-1], loss
        if entry == "passes":
            ran = {}
            for evaluation in optimizer.passes(chunks=len(passes[0]) if self.setting.chunked else 1):
                with evaluation:
                    if evaluation.chunk is None and len(passes[0]) > 1:
                        [run(0, i, 1 / len(passes[0])) for i in range(len(passes[0]))]
                    else:
                        chunk = evaluation.chunk or 0
                        ran[chunk] = ran.get(chunk, -1) + 1
                        run(ran[chunk], chunk)
            count = max(ran.values(), default=0) + 1
        elif entry == "train and eval":
            optimizer.train()
            try:
                optimizer.zero_grad()
                run(0)
                optimizer.step()
            finally:
                optimizer.eval()
            return 1, None
        else:
            optimizer.zero_grad()
            run(0)
            count = 2
            if entry == "perturbed":
                with optimizer.perturbed():
                    run(1)
            else:
                optimizer.first_step()
                run(1)
                optimizer.second_step()
                return count, None
        assert same_bits(self.net.weights(), self.before)
        if scale != 1.0:
            for p in self.net.w.values():
                if p.grad is not None:
                    p.grad.mul_(scale)
        optimizer.step()
        return count, None

    @rule(plans=st.lists(PLAN, min_size=1, max_size=5))
    def steps(self, plans):
        for plan in plans:
            self.then(plan)

    def then(self, plan):
        """An update on top of what a rule did: left to itself, the search spends its rules on everything else."""
        self.everything_is_as_planned()
        self.update(**plan)
        self.everything_is_as_planned()

    def update(self, entry, first, second, zeroes, scale, bad, where):
        """One update of both, and what must hold between them."""
        entry, passes = self.parts(entry, first, second or first)
        if self.setting.alike and where != "nowhere":
            where = "both"
        poisons = [bad if where in (k, "both") else None for k in ("first", "second")]
        if entry not in ("perturbed", "passes") or self.method not in WRITTEN:
            scale = 1.0  # nobody can get at the gradients, or the twin does not
        kept = self.memory()[0]["state"] if any(poisons) else None
        count, loss = self.drive(entry, passes, poisons, zeroes=zeroes, scale=scale)
        expected, good = self.plan.step(entry, passes, poisons, count=count, scale=scale)
        if loss is not None:
            assert not loss.requires_grad and abs(float(loss - expected)) <= TOLERANCE
        if not good:
            assert same_bits(self.net.weights(), self.before)
            assert kept is None or same_bits(self.memory()[0]["state"], kept)

    @rule(
        entry=ENTRY,
        first=PASS,
        second=PASS,
        fault=st.sampled_from(["before", "after", "silent", "in the base"]),
        where=st.integers(0, 1),
        by_abort=st.booleans(),
        plan=PLAN,
    )
    def step_with_an_exception(self, entry, first, second, fault, where, by_abort, plan):
        entry, passes = self.parts(entry, first, second)
        kept = self.memory()
        if fault == "silent" and (self.method == "sgd" or not any(g["rho"] for g in self.optimizer.param_groups)):
            fault = "before"  # the base's own step, which takes the gradients at hand
        self.fails_in_base = fault == "in the base"
        faults = [fault if k == where and not self.fails_in_base else None for k in range(2)]
        try:
            count, _ = self.drive(entry, passes, (None, None), faults)
        except Planned:
            assert self.fails_in_base or (self.fired and fault != "silent")
        except RuntimeError as error:
            assert self.fired and fault == "silent", error
            assert any(text in str(error) for text in ("no weight received a gradient", "no gradients")), error
        else:  # the pass with the fault was not needed
            decided = fault == "silent" and Need.DECIDES_BY_VALUE in self.setting.recipe.needs
            assert (not self.fired or decided) and not self.fails_in_base
            self.plan.step(entry, passes, (None, None), count=count, scale=1.0)
            kept = self.memory()
            self.before = self.net.weights()
        self.fails_in_base = False
        # A manual loop owns what is outside of the contexts.
        if entry == "two calls" or by_abort:
            self.optimizer.abort()
        else:
            self.optimizer.zero_grad()
        assert same_bits(self.net.weights(), self.before)
        assert same_bits(self.memory(), kept)
        self.then(plan)

    @rule(first=PASS, inside=st.booleans(), plan=PLAN)
    def step_that_is_given_up(self, first, inside, plan):
        _, passes = self.parts(0, first, first)
        kept, before = self.memory(), self.net.weights()
        for evaluation in self.optimizer.passes(chunks=len(passes[0])):
            with evaluation:
                self.backward(passes[0][evaluation.chunk or 0])
                if inside:
                    self.optimizer.abort()
                    break
        self.optimizer.abort()
        assert same_bits(self.net.weights(), before)
        assert same_bits(self.memory(), kept)
        self.then(plan)

    # -- options -----------------------------------------------------------------------------------------------------

    @rule(group=st.integers(0, 4), key=st.sampled_from(["rho", "lr"]), rho=RADIUS, lr=LR, plan=PLAN)
    def change_an_option(self, group, key, rho, lr, plan):
        group %= len(self.plan.groups)
        value = {"rho": rho, "lr": lr}[key]
        self.plan.groups[group][key] = self.optimizer.param_groups[group][key] = value
        self.plan.changed()
        self.then(plan)

    @rule(name=st.sampled_from(FREEZABLE), plan=PLAN)
    def freeze_or_unfreeze(self, name, plan):
        self.plan.frozen ^= {name}
        self.net.w[name].requires_grad_(name not in self.plan.frozen)
        self.plan.changed()
        self.then(plan)

    @precondition(lambda self: len(self.plan.groups) < len(GROUPS) + len(LATE))
    @rule(lr=st.none() | LR, rho=st.none() | RADIUS, plan=PLAN)
    def add_param_group(self, lr, rho, plan):
        name = LATE[len(self.plan.groups) - len(GROUPS)]
        given = {k: v for k, v in {"lr": lr, "rho": rho}.items() if v is not None}
        self.optimizer.add_param_group({"params": [self.net.w[name]], **given})
        self.plan.groups.append({"names": (name,), "lr": 0.1, "rho": RHO, **given})
        self.plan.changed()
        self.then(plan)

    # -- checkpoints and copies --------------------------------------------------------------------------------------

    @rule(plan=PLAN)
    def save_and_load(self, plan):
        file = io.BytesIO()
        torch.save({"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        self.net = Net(seed=1)
        self.net.load_state_dict(saved["net"])
        for name in self.plan.frozen:
            self.net.w[name].requires_grad_(False)
        scrambled = [{**group, "lr": 0.7, "rho": 0.9} for group in self.plan.groups]
        self.adopt(self.setting.optimizer(self.net, scrambled))
        self.optimizer.load_state_dict(saved["optimizer"])
        self.then(plan)

    @rule(optimizer_first=st.booleans(), plan=PLAN)
    def deepcopy(self, optimizer_first, plan):
        if optimizer_first:
            optimizer, self.net = copy.deepcopy((self.optimizer, self.net))
        else:
            self.net, optimizer = copy.deepcopy((self.net, self.optimizer))
        self.adopt(optimizer)
        self.then(plan)

    @rule(plan=PLAN)
    def pickle(self, plan):
        known = self.optimizer.model is not None
        self.net, optimizer = pickle.loads(pickle.dumps((self.net, self.optimizer)))
        if known:
            optimizer.model = self.net
        self.adopt(optimizer)
        self.then(plan)

    # -- what always holds -------------------------------------------------------------------------------------------

    @invariant()
    def everything_is_as_planned(self):
        self.plan.check(self.net, self.optimizer)


COMMON = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.generate, Phase.shrink],
}
# By what poisons gradients, by rates that rise, by tensors that come late.
quiet = pytest.mark.filterwarnings(
    "ignore:gradients were added up or changed", "ignore:rho-lr", r"ignore:.* is not in this optimizer"
)


@quiet
@pytest.mark.timeout(600)  # to make a failure short takes hypothesis up to five minutes
@pytest.mark.parametrize("name", METHODS)
def test_short_lives(name):
    lives, steps = (4, 16) if name in WRITTEN else (1, 12)
    machine = type("Life", (Engine,), {"method": name})
    run_state_machine_as_test(machine, settings=settings(**COMMON, max_examples=lives, stateful_step_count=steps))


@quiet
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", METHODS)
def test_long_lives(name):
    lives, steps = (30, 60) if name in WRITTEN else (8, 60)
    machine = type("Life", (Engine,), {"method": name})
    run_state_machine_as_test(machine, settings=settings(**COMMON, max_examples=lives, stateful_step_count=steps))
