"""The cost gates hold, and they can fail: planted launches, reads, copies and calls are seen."""

import pytest
import torch

from benchmarks import calls
from benchmarks.counts import MODES, Count, count, extra_copies, measure, reads_nothing, sam_gates
from benchmarks.launches import Recorder, multi_tensor_launches
from benchmarks.loops import Loop, Setting, floor, ours
from benchmarks.nets import NETS

SMALL = Setting(NETS["mlp20"], base="foreach", device="meta")


def planted(extra):
    """SAM's step with `extra(loop)` run at the end of each pass."""

    def make() -> Loop:
        loop = ours(SMALL)
        loop.hooks.append(lambda where: extra(loop) if where == "end" else None)
        return loop

    return make


def failed(step: Count) -> list[str]:
    return [g.name for g in sam_gates("net", "skip", step, count(lambda: floor(SMALL))) if not g.passed]


@pytest.mark.slow  # CI runs the gate itself
@pytest.mark.parametrize("net", ["mlp200", "resnet18-w8"])
def test_the_gate_holds(net):
    result = measure((net,), methods=False)
    assert [g.name for g in result.gates if not g.passed] == []
    assert len(result.gates) == 4 * len(MODES) + 2


def test_nothing_fails_without_a_plant():
    assert failed(count(planted(lambda loop: None))) == []


def test_planted_launches_are_seen():
    def touch(loop):
        for w in list(loop.model.parameters())[:9]:
            w.grad.mul_(1.0)

    assert failed(count(planted(touch))) == ["net, skip: launches above the floor"]


@pytest.mark.parametrize(
    "read",
    [
        lambda w: float(w.sum()),
        lambda w: w.sum().item(),
        lambda w: w.sum().cpu(),
        lambda w: bool((w > 0).any()),
        lambda w: torch.equal(w, w.clone()),
    ],
)
def test_planted_reads_are_seen(read):
    step = count(planted(lambda loop: read(next(loop.model.parameters()).detach())))
    assert step.syncs == 3
    assert "net, skip: synchronisations" in failed(step)


def test_a_planted_copy_of_the_weights_is_seen():
    kept = []
    step = count(planted(lambda loop: kept.append([w.detach().clone() for w in loop.model.parameters()])))
    assert "net, skip: copies in pass 2" in failed(step)
    assert extra_copies(step, count(lambda: floor(SMALL))) > 1.9


def test_a_step_that_reads_does_not_run_without_values(monkeypatch):
    assert reads_nothing()
    monkeypatch.setattr("benchmarks.counts.ours", lambda setting, nonfinite: ours(setting, nonfinite="skip"))
    assert not reads_nothing()


def test_launches_of_lists_follow_the_limits():
    assert multi_tensor_launches([], 1) == 0
    assert multi_tensor_launches([0, 0], 1) == 0
    assert [multi_tensor_launches([5] * 110, depth) for depth in (1, 2, 3, 4, 5)] == [1, 2, 3, 4, 4]
    assert multi_tensor_launches([65536 * 320], 2) == 1
    assert multi_tensor_launches([65536 * 320 + 1, 5], 2) == 2


SAME = [torch.zeros(3) for _ in range(6)]
HALVES = [t.half() for t in SAME]
MIXED = [*SAME[:3], *HALVES[3:]]


def test_lists_that_one_kernel_cannot_serve_launch_once_per_tensor():
    for run, launches in [
        (lambda: torch._foreach_add_(SAME, 1.0), 1),
        (lambda: torch._foreach_add_(MIXED, 1.0), 6),
        (lambda: torch._foreach_mul_(SAME, torch.tensor(2.0)), 1),
        (lambda: torch._foreach_mul_(HALVES, torch.tensor(2.0)), 6),
        (lambda: torch._foreach_copy_(HALVES, SAME), 1),
        (lambda: torch._foreach_norm(SAME), 1),
    ]:
        with Recorder() as recorder:
            run()
            assert recorder.launches == launches


def test_views_and_allocations_are_free():
    x = torch.zeros(4, 4)
    with Recorder() as recorder:
        x.view(16)[3:].unsqueeze(0)
        torch.empty(3)
        torch.empty_like(x)
        x.detach()
        assert recorder.launches == 0
        x + 1
        assert recorder.launches == 1
        assert recorder.syncs == 0


PLANTED = """
def outer():
    inner([x for x in range(9)])
    return sum(x for x in range(3)) + sum(resumed())
def inner(xs):
    return {x: x for x in xs}
def resumed():
    yield 1
    yield 2
"""


def test_calls_are_functions_and_resumed_generators_of_the_package():
    package, elsewhere = {}, {}
    exec(compile(PLANTED, str(calls.PACKAGE / "optim" / "planted.py"), "exec"), package)
    exec(compile(PLANTED, "planted.py", "exec"), elsewhere)
    seen = calls.recorded(lambda: (package["outer"](), elsewhere["outer"]()))
    inside = ["outer.<locals>.<genexpr>"] * 4 + ["resumed"] * 3
    assert [(c.depth, c.function) for c in seen] == [(0, "outer"), (1, "inner"), *((1, name) for name in inside)]
    assert calls.files_of(seen) == {"optim/planted.py"}
    assert calls.changes_of(seen) == 0


def test_the_gate_on_calls_fails_above_its_limits():
    most, files = calls.LIMITS[calls.PLAIN]
    few = [calls.Call(f"{i % files}.py", "f", 0) for i in range(most)]
    assert all(g.passed for g in calls.gates(calls.PLAIN, few))
    assert [g.passed for g in calls.gates(calls.PLAIN, [*few, few[0]])] == [False, True]
    one_more = [*few[1:], calls.Call("one more.py", "f", 0)]
    assert [g.passed for g in calls.gates(calls.PLAIN, one_more)] == [True, False]


def test_every_step_is_counted_once_it_is_steady():
    result = calls.measure(verbose=True)
    assert [table.title for table in result.tables[1:]] == list(calls.STEPS)
    assert [len(table.rows) for table in result.tables[1:]] == [int(row[1]) for row in result.tables[0].rows]
    for build in (calls.STEPS[calls.PLAIN], calls.STEPS["sam, perturbed()"]):
        step = build()
        assert len(calls.steady(step)) == len(calls.recorded(step))
