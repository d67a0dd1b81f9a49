"""The suite can fail: a small sound optimizer with one thing broken fails what that breaks, and nothing else."""

from typing import ClassVar

import pytest
import torch

from conformance.adapter import Adapter, Subject, one_radius
from conformance.behaviours import ALL
from conformance.verdict import ABSENT, FAIL, PASS


class Small:
    """SAM around a base, in the fewest lines; its methods are what the broken ones replace."""

    def __init__(self, base, rho):
        self.base, self.rho, self.kept = base, rho, {}

    @property
    def params(self):
        return [p for g in self.base.param_groups for p in g["params"]]

    param_groups = property(lambda self: self.base.param_groups)

    def zero_grad(self):
        self.base.zero_grad()

    def norm(self, p):
        """The norm that divides the gradient of a tensor."""
        return torch.stack([q.grad.norm() for q in self.params if q.grad is not None]).norm()

    def climb(self):
        norms = {p: self.norm(p) for p in self.params if p.grad is not None}
        for p, norm in norms.items():
            self.kept[p] = p.clone()
            p.add_(self.rho * p.grad / (norm + 1e-12).to(p.dtype))

    def go_back(self):
        for p, w in self.kept.items():
            p.copy_(w)
        self.kept = {}

    def step(self, closure):
        loss = closure()
        with torch.no_grad():
            self.climb()
        try:
            closure()
        finally:
            with torch.no_grad():
                self.go_back()
        self.base.step()
        return loss

    def state_dict(self):
        return self.base.state_dict()

    def load_state_dict(self, state):
        self.base.load_state_dict(state)


class Subtracts(Small):
    def climb(self):
        norms = {p: self.norm(p) for p in self.params if p.grad is not None}
        for p, norm in norms.items():
            self.kept[p] = self.rho * p.grad / (norm + 1e-12).to(p.dtype)
            p.add_(self.kept[p])

    def go_back(self):
        for p, e in self.kept.items():
            p.sub_(e)
        self.kept = {}


class NormOfATensor(Small):
    def norm(self, p):
        return p.grad.norm()


class ForgetsTheBase(Small):
    def state_dict(self):
        return {**super().state_dict(), "state": {}}


class RestoresByGradient(Small):
    def go_back(self):
        for p in self.params:
            if p.grad is not None:
                p.copy_(self.kept[p])
        self.kept = {}


class LeavesAnException(Small):
    def step(self, closure):
        loss = closure()
        with torch.no_grad():
            self.climb()
        closure()
        with torch.no_grad():
            self.go_back()
        self.base.step()
        return loss


class SwapsPointers(Small):
    def go_back(self):
        for p, w in self.kept.items():
            p.data = w
        self.kept = {}


class LossAbove(Small):
    def step(self, closure):
        losses = []

        def watched():
            losses.append(closure())
            return losses[-1]

        super().step(watched)
        return losses[-1]


class OneEvaluation(Small):
    """Climbs along the gradient that the last step left behind."""

    def step(self, closure):
        with torch.no_grad():
            if any(p.grad is not None for p in self.params):
                self.climb()
        loss = closure()
        with torch.no_grad():
            self.go_back()
        self.base.step()
        return loss


class SavesTheWeights(Small):
    def state_dict(self):
        return {**super().state_dict(), "copy": [p.detach().clone() for p in self.params]}

    def load_state_dict(self, state):
        super().load_state_dict({k: state[k] for k in ("state", "param_groups")})


class TrainsTheCheckpoint(Small):
    def state_dict(self):
        return {**super().state_dict(), "params": self.params}

    def load_state_dict(self, state):
        super().load_state_dict({k: state[k] for k in ("state", "param_groups")})
        if "params" in state:
            given = iter(state["params"])
            for g in self.base.param_groups:
                old, g["params"] = g["params"], [next(given) for _ in g["params"]]
                for p, q in zip(old, g["params"], strict=True):
                    self.base.state[q] = self.base.state.pop(p, {})


class OnBase(Subject):
    @property
    def schedulable(self):
        return self.optimizer.base


class Of(Adapter):
    title: ClassVar[str] = "of the tests"

    def __init__(self, kind):
        self.kind = kind

    def build(self, params, base, *, rho, form=None, model=None, **options):
        self.claims(form, options)
        one_radius(params)
        return OnBase(self.kind(base.make(params), rho))


# Two processes and the compiler are left to the implementations themselves.
QUICK = [b for b in ALL if b.ranks == 1 and b.name != "compiled model"]


def results(kind):
    return {b.name: b.run(Of(kind)).status for b in QUICK}


@pytest.fixture(scope="module")
def sound():
    return results(Small)


def test_what_a_small_sound_one_cannot_do(sound):
    """Which also says that all other behaviours can be had in sixty lines."""
    assert {name for name, status in sound.items() if status == FAIL} == {
        "rho zero is the base",
        "is an optimizer",
        "zero gradient",
        "not finite in pass 1",
        "not finite in pass 2",
        "fp16 norm",
        "distributed checkpoint",
        "batchnorm statistics",
        "batchnorm count",
        "instancenorm statistics",
        "dropout masks",
        "bf16 distance",
        "scaler not given",
    }


def slow(*row):
    return pytest.param(*row, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("kind", "broken"),
    [
        slow(Subtracts, {"lr zero changes nothing", "restore is exact", "bf16 restore", "exception in pass 2"}),
        slow(NormOfATensor, {"sam with sgd", "sam with adamw", "double precision", "one global norm"}),
        (ForgetsTheBase, {"resume with sgd", "resume with adamw"}),
        slow(RestoresByGradient, {"lr zero changes nothing", "gradient in pass 1 only", "gradient in pass 2 only"}),
        (LeavesAnException, {"exception in pass 2"}),
        slow(SwapsPointers, {"addresses do not change"}),
        slow(LossAbove, {"step returns the loss"}),
        slow(SavesTheWeights, {"no copy of the weights"}),
        (
            TrainsTheCheckpoint,
            {"resume with sgd", "resume with adamw", "loading keeps the model", "no copy of the weights"},
        ),
    ],
)
def test_a_broken_one_fails_what_it_breaks_and_nothing_else(sound, kind, broken):
    found = results(kind)
    assert {name for name in found if found[name] != sound[name]} == broken
    assert all(sound[name] == PASS and found[name] == FAIL for name in broken)


def test_a_gradient_left_behind_is_noticed(sound):
    found = results(OneEvaluation)
    fails = {name for name in found if found[name] == FAIL and sound[name] == PASS}
    assert {"sam with sgd", "sam with adamw", "two evaluations a step", "one global norm"} <= fails


def test_a_missing_capability_is_no_failure(sound):
    absent = {name for name, status in sound.items() if status == ABSENT}
    assert {"asam", "rho of a group", "loop without closure", "scaler changes nothing", "hooks fire once"} <= absent


def test_behaviours_leave_nothing_behind(sound):
    assert results(Small) == sound
