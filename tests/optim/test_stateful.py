"""Any mix of loops, faults, frozen tensors, options, checkpoints and copies gives the weights of the formula."""

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
from torch import nn

import flatmin
from tests.helpers import as_on_device, same_bits

TOLERANCE = 1e-12
THETA, ALPHA, RHO = 0.4, 0.3, 0.1
# Each branch of the net uses some of the tensors, so that the passes of a step can miss gradients of others.
BRANCHES = {
    "b0": ("a", "c", "scale", "b0"),
    "b1": ("a", "c", "scale", "b1"),
    "d": ("d",),
    "f": ("f",),
    "h": ("a", "c", "scale", "h"),
}
SHAPES = {"a": (3, 4), "c": (4,), "b0": (4, 2), "b1": (4, 2), "scale": (), "d": (3, 2), "f": (3, 2), "h": (4, 2)}
GROUPS = (("a", "c"), ("b0", "b1", "scale"), ("d",))
LATE = ("f", "h")  # parameters of the net that the optimizer is given later, if at all
FREEZABLE = ("a", "b0", "b1")  # something of every group is always trained


def output(w, branch, x):
    if branch in ("d", "f"):
        return x @ w[branch]
    return w["scale"] * torch.tanh(x @ w["a"] + w["c"]) @ w[branch]


def batch(number):
    g = torch.Generator().manual_seed(number)
    return torch.randn(5, 3, generator=g, dtype=torch.float64), torch.randn(5, 2, generator=g, dtype=torch.float64)


class Net(nn.Module):
    """The branches as a module. A scale of one dimension lets the engine join small tensors, one of none does not."""

    def __init__(self, joined, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        shapes = {**SHAPES, "scale": (1,) if joined else ()}
        self.w = nn.ParameterDict({n: torch.randn(s, generator=g, dtype=torch.float64) / 2 for n, s in shapes.items()})

    def forward(self, x, branch):
        return output(self.w, branch, x)


class Reference:
    """SAM, VaSSO or GSAM around SGD with momentum and weight decay, tensor by tensor from the formulas."""

    def __init__(self, net, method, options, rhos):
        self.method, self.options = method, options
        self.w = {n: p.detach().clone() for n, p in net.w.items()}
        self.groups = [{"names": names, "lr": 0.1, "rho": rho} for names, rho in zip(GROUPS, rhos, strict=True)]
        self.frozen = set()
        self.buffers, self.memory = {}, {}
        self.updates = 0
        self.counts = {"updates": 0, "nonfinite_ascents": 0, "skipped_steps": 0}

    def touched(self, branch):
        """The tensors of a branch that the optimizer trains."""
        listed = {n for group in self.groups for n in group["names"]}
        return [n for n in BRANCHES[branch] if n in listed and n not in self.frozen]

    def moving(self):
        """The radius of every tensor that takes part in ascents."""
        return {n: g["rho"] for g in self.groups for n in g["names"] if g["rho"] > 0 and n not in self.frozen}

    def gradient(self, w, parts, poison):
        """The mean gradient and loss of the parts, with a bad entry in the last of them."""
        total, losses = {}, []
        for branch, number in parts:
            x, y = batch(number)
            leaves = {n: t.clone().requires_grad_() for n, t in w.items()}
            loss = (output(leaves, branch, x) - y).square().mean()
            names = self.touched(branch)
            for n, g in zip(names, torch.autograd.grad(loss, [leaves[n] for n in names]), strict=True):
                total[n] = total.get(n, 0) + g / len(parts)
            losses.append(loss.detach())
        if poison is not None:
            index, value = poison
            total[names[index % len(names)]].view(-1)[0] = value
        return total, sum(losses) / len(losses)

    def step(self, first, second, poisons, *, passes, scale):
        """One update; the loss at w and whether the base took its step."""
        moving = self.moving()
        g, loss = self.gradient(self.w, first, poisons[0])
        u, size, staged = g, 0.0, {}
        if passes == 2:
            d = {n: g[n] for n in moving if n in g}
            if self.method == "vasso":
                d = staged = {n: (1 - THETA) * self.memory.get(n, x) + THETA * x for n, x in d.items()}
            size = math.sqrt(sum(float((x * x).sum()) for x in d.values()))
            there = dict(self.w)
            if math.isfinite(size):
                there.update({n: self.w[n] + moving[n] * x / (size + 1e-12) for n, x in d.items()})
            u, _ = self.gradient(there, second, poisons[1])
            if self.method == "gsam" and moving:
                u = {**u, **self.surrogate_gap(g, u)}
        good = all(bool(x.isfinite().all()) for x in u.values())
        if good:
            self.sgd({n: scale * x for n, x in u.items()})
            if math.isfinite(size):
                self.memory.update(staged)
        self.updates += 1
        self.counts["updates"] += 1
        self.counts["nonfinite_ascents"] += not math.isfinite(size)
        self.counts["skipped_steps"] += not good
        return loss, good

    @staticmethod
    def surrogate_gap(g, gs):
        """g_s - alpha (g - <g, g_s> / <g_s, g_s> g_s) over the tensors that have both."""
        both = [n for n in g if n in gs]
        square = sum((gs[n] * gs[n]).sum() for n in both)
        along = sum((g[n] * gs[n]).sum() for n in both)
        return {n: gs[n] - ALPHA * (g[n] - along / square * gs[n]) for n in both}

    def sgd(self, u):
        momentum, decay = self.options["momentum"], self.options["weight_decay"]
        for group in self.groups:
            for n in group["names"]:
                if n not in u:
                    continue
                d = u[n] + decay * self.w[n]
                if momentum:
                    buffer = self.buffers[n] = momentum * self.buffers[n] + d if n in self.buffers else d
                    d = d + momentum * buffer if self.options["nesterov"] else buffer
                self.w[n] = self.w[n] - group["lr"] * d


class Planned(Exception):
    """A fault of the user's code."""


BRANCH = st.integers(0, len(BRANCHES) - 1)
PASS = st.lists(BRANCH, min_size=1, max_size=3)
BAD = st.tuples(st.integers(0, 3), st.sampled_from([math.nan, math.inf, -math.inf]))
LR = st.sampled_from([0.0, 0.02, 0.1])
RADIUS = st.sampled_from([0.0, 0.05, 0.3])
MANUAL = ("perturbed", "two calls", "passes")
DOOR = st.sampled_from(["closure", "closures", *MANUAL])
PLAN = st.fixed_dictionaries(
    {
        "entry": DOOR,
        "first": PASS,
        "second": st.none() | PASS,
        "zeroes": st.booleans(),
        "scale": st.sampled_from([1.0, 0.5]),
        "bad": BAD,
        "where": st.sampled_from(["nowhere", "nowhere", "nowhere", "first", "second", "both"]),
    }
)


class Engine(RuleBasedStateMachine):
    """Drives the engine and the reference side by side."""

    @initialize(
        method=st.sampled_from(["sam", "vasso", "gsam"]),
        momentum=st.sampled_from([0.0, 0.9]),
        nesterov=st.booleans(),
        weight_decay=st.sampled_from([0.0, 0.01]),
        foreach=st.booleans(),
        rhos=st.tuples(RADIUS, RADIUS, RADIUS),
        joined=st.booleans(),
        device=st.booleans(),
        with_model=st.booleans(),
    )
    def build(self, method, momentum, nesterov, weight_decay, foreach, rhos, joined, device, with_model):
        self.joined, self.device, self.with_model = joined, device, with_model
        self.options = {"momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov and momentum > 0}
        self.foreach, self.batches = foreach, 0
        self.net = Net(joined)
        self.reference = Reference(self.net, method, self.options, rhos)
        self.wrap()

    def wrap(self, scrambled=False):
        """A new optimizer over the net, with the reference's options or with others."""
        groups = [
            {
                "params": [self.net.w[n] for n in group["names"]],
                "lr": 0.7 if scrambled else group["lr"],
                "rho": 0.9 if scrambled else group["rho"],
            }
            for group in self.reference.groups
        ]
        params = {"vasso": {"theta": THETA}, "gsam": {"alpha": ALPHA}}.get(self.reference.method, {})
        base = torch.optim.SGD(groups, lr=0.1, foreach=self.foreach, **self.options)
        model = self.net if self.with_model else None
        self.adopt(flatmin.wrap(base, self.reference.method, rho=RHO, model=model, **params))

    def adopt(self, optimizer):
        """Go on with an optimizer that has made no update in its life."""
        self.optimizer = optimizer
        as_on_device(optimizer, self.device)
        optimizer.register_step_pre_hook(self.look_at_home)
        self.reference.counts = dict.fromkeys(self.reference.counts, 0)

    def look_at_home(self, *_):
        assert same_bits(self.weights(), self.before), "the base stepped away from w"

    def weights(self):
        return {n: p.detach().clone() for n, p in self.net.w.items()}

    def memory(self):
        """What the base and the method remember, and the counters."""
        state = {
            n: {k: v.clone() for k, v in self.optimizer.state.get(p, {}).items() if v is not None}
            for n, p in self.net.w.items()
        }
        return {"state": state, "step": self.optimizer.param_groups[0]["flatmin.step"], **self.optimizer.counts()}

    # -- steps -----------------------------------------------------------------------------------------------------

    def parts(self, entry, first, second):
        """Both passes as lists of (branch, batch), on branches that the optimizer trains."""
        live = [b for b in BRANCHES if self.reference.touched(b)]
        count = len(first) if entry == "closures" else 1
        numbers = range(self.batches, self.batches + count)
        self.batches += count
        return [
            [(live[p[i % len(p)] % len(live)], number) for i, number in enumerate(numbers)] for p in (first, second)
        ]

    def backward(self, part, poison=None, fault=None):
        """Forward and backward of one part, with a fault of the user's in it."""
        if fault == "before":
            raise Planned
        branch, number = part
        x, y = batch(number)
        loss = (self.net(x, branch) - y).square().mean()
        if fault == "silent":
            return loss
        loss.backward()
        if poison is not None:
            index, value = poison
            names = self.reference.touched(branch)
            self.net.w[names[index % len(names)]].grad.view(-1)[0] = value
        if fault == "after":
            raise Planned
        return loss

    def drive(self, entry, passes, poisons, faults, *, zeroes=True, scale=1.0):
        """One update of the engine; the number of passes it took, and the loss it returned."""
        if not any(group["rho"] for group in self.optimizer.param_groups):
            zeroes = True  # the base's own step goes on from what a closure leaves
        self.before = self.weights()
        optimizer, last = self.optimizer, len(passes[0]) - 1

        def run(k, i=0):
            end = i == last
            fault = faults[k] if end or faults[k] == "silent" else None
            return self.backward(passes[k][i], poisons[k] if end else None, fault)

        if entry in ("closure", "closures"):
            ran = [0] * len(passes[0])

            def closure(i):
                ran[i] += 1
                if zeroes:
                    optimizer.zero_grad()
                return run(ran[i] - 1, i)

            closures = [partial(closure, i) for i in range(len(ran))]
            loss = optimizer.step(closures if entry == "closures" else closures[0])
            assert len(set(ran)) == 1
            return ran[0], loss
        if entry == "passes":
            count = 0
            for evaluation in optimizer.passes():
                with evaluation:
                    assert evaluation.index == count
                    count += 1
                    run(count - 1)
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
        assert same_bits(self.weights(), self.before)
        if scale != 1.0:
            for p in self.net.w.values():
                if p.grad is not None:
                    p.grad.mul_(scale)
        optimizer.step()
        return count, None

    def expected_passes(self, entry):
        return 2 if entry in ("perturbed", "two calls") or self.reference.moving() else 1

    @rule(plans=st.lists(PLAN, min_size=1, max_size=5))
    def steps(self, plans):
        for plan in plans:
            self.then(plan)

    def then(self, plan):
        """An update on top of what a rule did: left to itself, the search spends its rules on everything else."""
        self.everything_is_as_the_formula_says()
        self.update(**plan)
        self.everything_is_as_the_formula_says()

    def update(self, entry, first, second, zeroes, scale, bad, where):
        """One update of both, and what must hold between them."""
        passes = self.parts(entry, first, second or first)
        poisons = [bad if where in (k, "both") else None for k in ("first", "second")]
        if entry not in ("perturbed", "passes"):
            scale = 1.0  # nobody can get at the gradients
        kept = self.memory()
        count, loss = self.drive(entry, passes, poisons, (None, None), zeroes=zeroes, scale=scale)
        assert count == self.expected_passes(entry)
        expected, good = self.reference.step(*passes, poisons, passes=count, scale=scale)
        if entry in ("closure", "closures"):
            assert not loss.requires_grad and abs(float(loss - expected)) <= TOLERANCE
        if not good:
            assert same_bits(self.weights(), self.before)
            assert same_bits(self.memory()["state"], kept["state"])

    @rule(
        entry=DOOR,
        first=PASS,
        second=PASS,
        fault=st.sampled_from(["before", "after", "silent"]),
        where=st.integers(0, 1),
        by_abort=st.booleans(),
        plan=PLAN,
    )
    def step_with_an_exception(self, entry, first, second, fault, where, by_abort, plan):
        passes = self.parts(entry, first, second)
        where = min(where, self.expected_passes(entry) - 1)
        kept = self.memory()
        if fault == "silent" and not any(group["rho"] for group in self.optimizer.param_groups):
            fault = "before"  # the base's own step, which takes the gradients at hand
        if fault == "silent":
            expectation = pytest.raises(RuntimeError, match=r"no weight received a gradient|no gradients")
        else:
            expectation = pytest.raises(Planned)
        with expectation:
            self.drive(entry, passes, (None, None), [fault if k == where else None for k in range(2)])
        # A manual loop owns what is outside of the contexts.
        if entry == "two calls" or by_abort:
            self.optimizer.abort()
        else:
            self.optimizer.zero_grad()
        assert same_bits(self.weights(), self.before)
        assert same_bits(self.memory(), kept)
        self.then(plan)

    @rule(entry=st.sampled_from(["perturbed", "two calls"]), first=PASS, second=PASS, inside=st.booleans(), plan=PLAN)
    def step_that_is_given_up(self, entry, first, second, inside, plan):
        passes = self.parts(entry, first, second)
        kept, before = self.memory(), self.weights()
        self.optimizer.zero_grad()
        self.backward(passes[0][0])
        if inside:
            self.optimizer.first_step()
            self.backward(passes[1][0])
        else:
            with self.optimizer.perturbed():
                self.backward(passes[1][0])
        self.optimizer.abort()
        assert same_bits(self.weights(), before)
        assert same_bits(self.memory(), kept)
        self.then(plan)

    # -- options -----------------------------------------------------------------------------------------------------

    @rule(group=st.integers(0, 4), rho=RADIUS, plan=PLAN)
    def change_rho(self, group, rho, plan):
        group %= len(self.reference.groups)
        self.reference.groups[group]["rho"] = self.optimizer.param_groups[group]["rho"] = rho
        self.then(plan)

    @rule(group=st.integers(0, 4), lr=LR, plan=PLAN)
    def change_lr(self, group, lr, plan):
        group %= len(self.reference.groups)
        self.reference.groups[group]["lr"] = self.optimizer.param_groups[group]["lr"] = lr
        self.then(plan)

    @rule(name=st.sampled_from(FREEZABLE), plan=PLAN)
    def freeze_or_unfreeze(self, name, plan):
        self.reference.frozen ^= {name}
        self.net.w[name].requires_grad_(name not in self.reference.frozen)
        self.then(plan)

    @precondition(lambda self: len(self.reference.groups) < len(GROUPS) + len(LATE))
    @rule(lr=st.none() | LR, rho=st.none() | RADIUS, plan=PLAN)
    def add_param_group(self, lr, rho, plan):
        name = LATE[len(self.reference.groups) - len(GROUPS)]
        given = {k: v for k, v in {"lr": lr, "rho": rho}.items() if v is not None}
        self.optimizer.add_param_group({"params": [self.net.w[name]], **given})
        self.reference.groups.append({"names": (name,), "lr": 0.1, "rho": RHO, **given})
        self.then(plan)

    # -- checkpoints and copies --------------------------------------------------------------------------------------

    @rule(plan=PLAN)
    def save_and_load(self, plan):
        file = io.BytesIO()
        torch.save({"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        self.net = Net(self.joined, seed=1)
        self.net.load_state_dict(saved["net"])
        for name in self.reference.frozen:
            self.net.w[name].requires_grad_(False)
        self.wrap(scrambled=True)
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
    def everything_is_as_the_formula_says(self):
        for n, p in self.net.w.items():
            assert torch.allclose(p, self.reference.w[n], rtol=0, atol=TOLERANCE), n
            state = self.optimizer.state.get(p, {})
            close_or_absent(state.get("momentum_buffer"), self.reference.buffers.get(n))
            filled = float(state.get("flatmin.direction.ema.filled", 0.0))
            close_or_absent(state["flatmin.direction.ema"] if filled else None, self.reference.memory.get(n))
        for group, expected in zip(self.optimizer.param_groups, self.reference.groups, strict=True):
            assert (group["lr"], group["rho"]) == (expected["lr"], expected["rho"])
        assert self.optimizer.param_groups[0]["flatmin.step"] == self.reference.updates
        assert self.optimizer.counts() == self.reference.counts


def close_or_absent(got, expected):
    assert (got is None) == (expected is None)
    if expected is not None:
        assert torch.allclose(got, expected, rtol=0, atol=TOLERANCE)


COMMON = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.generate, Phase.shrink],
}


@pytest.mark.filterwarnings("ignore:gradients were added up or changed")  # by what poisons them
@pytest.mark.timeout(600)  # to make a failure short takes hypothesis up to five minutes
def test_sixty_short_lives():
    run_state_machine_as_test(Engine, settings=settings(**COMMON, max_examples=60, stateful_step_count=30))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:gradients were added up or changed")
@pytest.mark.timeout(900)
def test_ten_thousand_steps():
    steps = 0

    class Counted(Engine):
        def teardown(self):
            nonlocal steps
            steps += self.reference.updates if hasattr(self, "reference") else 0

    run_state_machine_as_test(Counted, settings=settings(**COMMON, max_examples=125, stateful_step_count=100))
    assert steps >= 10_000
