"""The cost of every method beside what its recipe states: what runs, what is skipped, and that the gates can fail."""

from types import SimpleNamespace

import pytest
import torch

import flatmin
from benchmarks import cost
from benchmarks.counts import SHOWING, held_copies
from benchmarks.loops import Setting, ours, recipe_of
from benchmarks.nets import NETS

SMALL, NORMS = Setting(NETS["mlp20"]), Setting(NETS["resnet18-w8"], batch=2)


def test_a_step_of_every_method_runs_and_moves_the_weights():
    for method in flatmin.METHODS.keys() - {"sam-on"}:
        loop = ours(SMALL, method)
        before = [w.detach().clone() for w in loop.model.parameters()]
        for _ in range(2):
            loop.step()
        assert any(not torch.equal(a, b) for a, b in zip(before, loop.model.parameters(), strict=True))
        assert loop.optimizer.counts()["updates"] == 2


def test_norm_layers_move_where_there_are_any():
    ours(NORMS, "sam-on").step()
    costs, skipped = cost.measure(SMALL, ["sam-on"], rounds=2)
    assert list(costs) == [cost.CONTROL]
    assert "no layer matches" in skipped["sam-on"]


@pytest.mark.parametrize(("method", "copies"), [("sam", 1), ("vasso", 3), ("gsam", 2), ("looksam", 3)])
def test_copies_are_those_that_the_recipe_states(method, copies):
    measured, stated = held_copies(SMALL, method)
    assert stated == copies
    assert measured <= copies + 0.01


def test_methods_are_shown_with_the_copies_that_their_own_parameters_state():
    for method, params in SHOWING.items():
        assert recipe_of(method, **params).extra_copies == flatmin.compose(method).extra_copies


def test_closure_calls_over_a_period_are_the_stated_gradients(monkeypatch):
    monkeypatch.setattr(cost, "LONG", 20)  # of looksam's period of 5
    methods = ["looksam", "momentum-sam", "micro-sam"]
    costs, skipped = cost.measure(SMALL, methods, rounds=2)
    assert not skipped
    for method in methods:
        assert costs[method].passes == pytest.approx(costs[method].stated), method
    assert len(cost.row("looksam", costs["looksam"])) == len(cost.HEADERS)


def planted(**changes):
    costs = {m: cost.Cost(ratios=[1.0, 1.0], calls=[1.0]) for m in (cost.CONTROL, "sam", "looksam", "late")}
    costs["sam"].ratios = [2.0, 2.0]
    for method, (name, value) in changes.items():
        setattr(costs[method], name, value)
    return [g.name for g in cost.gates("mlp200", costs) if not g.passed]


def test_planted_costs_are_seen():
    assert planted() == []
    assert planted(sam=("copies", (2.0, 1))) == ["mlp200: copies above the stated ones"]
    assert planted(late=("ratios", [1.2, 1.2])) == ["mlp200: late over its gradients' plain steps"]


def test_a_noisy_control_says_nothing_about_times():
    costs = {cost.CONTROL: cost.Cost(ratios=[0.5, 1.5], calls=[1.0]), "late": cost.Cost(ratios=[9.0, 9.0], calls=[1.0])}
    assert [g.value for g in cost.gates("mlp200", costs)] == ["0.000", "inconclusive"]


@pytest.mark.parametrize(("look", "passed"), [(6.4, True), (6.6, False)])
def test_looksam_is_held_against_sam_on_some_bases(look, passed):
    slow = {"sam": [10.0] * 3, "looksam": [9.0] * 3, cost.CONTROL: [5.0] * 3}
    fast = {**slow, "looksam": [look] * 3}
    table, gates = cost.by_base("mlp200", {"default": slow} | dict.fromkeys(cost.LOOK_BASES, fast))
    assert [g.passed for g in gates] == [passed, passed]
    assert table.rows[1][:3] == (cost.LOOK_BASES[0], f"{look / 10:.3f} [{look / 10:.2f}-{look / 10:.2f}]", "0.600")


def test_loops_take_turns():
    ran = []
    loops = {n: SimpleNamespace(step=lambda n=n: ran.append(n)) for n in "ab"}
    assert {n: len(t) for n, t in cost.turns(loops, 2).items()} == {"a": 2, "b": 2}
    assert "".join(ran) == ("a" * cost.WINDOW + "b" * cost.WINDOW) * 3


def test_methods_of_one_gradient_are_held_against_a_plain_step():
    spent = {cost.CONTROL: [5.0] * 3, "momentum-sam": [5.5] * 3, "stale-sam": [6.0] * 3}
    faster = {**spent, "momentum-sam": [5.4] * 3, "stale-sam": [5.6] * 3}
    table, gates = cost.in_turns("mlp200", {"default": spent, cost.FLAT: faster})
    assert [row[0] for row in table.rows] == [*cost.IN_TURNS, *(f"{m}, flat=True" for m in cost.IN_TURNS)]
    assert [(g.value, g.passed) for g in gates] == [
        ("1.100", True),
        ("1.200", False),
        ("1.080", True),
        ("1.120", False),
    ]
