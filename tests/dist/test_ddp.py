"""DistributedDataParallel: replicas stay one, and pass 1 sees the batches that `ascent_sync` says."""

import pytest
import torch
from torch import nn

from flatmin.methods import METHODS, Need
from tests.dist import scenarios_ddp as scenarios
from tests.dist.kinds import KINDS, chosen, slow
from tests.dist.pool import RankError
from tests.dist.scenarios_ddp import Net, Setup, batch
from tests.helpers import BASES, recipe_of

pytestmark = pytest.mark.dist

SECOND_ORDER = [m for m in METHODS if Need.SECOND_ORDER in recipe_of(m).needs]
SERVED = [m for m in METHODS if m not in SECOND_ORDER]
# A rank sees its own samples and micro-batches only, so these are other methods on several replicas.
OF_THE_BATCH = [m for m in SERVED if not recipe_of(m).needs & {Need.PER_SAMPLE, Need.MICRO_BATCHES} and m != "sam-on"]
SERVED.remove("sam-on")  # the net has no normalisation layer
LOCAL = [
    m
    for m in SERVED
    if not (recipe_of(m).combine.uses_gradient or recipe_of(m).inner_loop.uses_gradient)
    and Need.DECIDES_BY_VALUE not in recipe_of(m).needs
]
SIZE = sum(p.numel() for p in Net(torch.float64).parameters()) * 8  # bytes of one gradient


def agree(results):
    """The weights, after asserting that all ranks have the same, bit for bit."""
    first, *others = [weights for weights, *_ in results]
    for weights in others:
        assert all(map(torch.equal, first, weights))
    assert all(torch.isfinite(w).all() for w in first)
    return first


def close(a, b, tolerance):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


@pytest.mark.parametrize("base", ["sgd", pytest.param("adamw", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", chosen(OF_THE_BATCH))
def test_two_replicas_are_one_process_with_the_whole_batch(ranks, method, base):
    setup = Setup(method=method, base=base, steps=8)
    alone = scenarios.train(0, 1, Setup(method=method, base=base, steps=8, wrapped=False))[0]
    close(agree(ranks.run(scenarios.train, setup)), alone, 1e-10)


@pytest.mark.parametrize(
    ("method", "ascent_sync"),
    [slow("sam", "all"), ("vasso", "none"), slow("micro-sam", "none"), slow("esam", "all"), slow("rsam", "none")],
)
def test_replicas_stay_bit_identical(ranks, method, ascent_sync):
    setup = Setup(method=method, steps=100, ascent_sync=ascent_sync, dtype=torch.float32)
    start = [p.detach() for p in Net(torch.float32).parameters()]
    end = agree(ranks.run(scenarios.train, setup))
    assert not any(map(torch.equal, start, end))


@pytest.mark.parametrize("door", ["closure", pytest.param("passes", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", chosen(LOCAL))
def test_every_method_that_can_have_local_ascents_has_them(ranks, method, door):
    agree(ranks.run(scenarios.train, Setup(method=method, steps=6, ascent_sync="none", door=door)))


def reference(groups, steps, rho=0.1, *, normalised=True):
    """SAM, or USAM, whose replicas climb by the mean gradient of their group; `groups`: ranks per group."""
    world = sum(map(len, groups))
    net = Net(torch.float64)
    weights = list(net.parameters())
    base = BASES["sgd"](weights)

    def gradient(k, rank):
        x, y = (t.chunk(world)[rank] for t in batch(k, torch.float64))
        return torch.autograd.grad(nn.functional.cross_entropy(net(x), y), weights)

    for k in range(steps):
        total = [torch.zeros_like(w) for w in weights]
        for group in groups:
            shares = [gradient(k, rank) for rank in group]
            g = [sum(column) / len(group) for column in zip(*shares, strict=True)]
            norm = torch.sqrt(sum((t**2).sum() for t in g)) if normalised else 1.0
            start = [w.detach().clone() for w in weights]
            with torch.no_grad():
                for w, t in zip(weights, g, strict=True):
                    w += rho * t / (norm + 1e-12)
            for rank in group:
                for s, t in zip(total, gradient(k, rank), strict=True):
                    s += t / world
            with torch.no_grad():
                for w, t in zip(weights, start, strict=True):
                    w.copy_(t)
        for w, s in zip(weights, total, strict=True):
            w.grad = s
        base.step()
    return [w.detach() for w in weights]


@pytest.mark.parametrize("door", ["closure", "passes"])
def test_each_replica_climbs_by_its_own_gradient(ranks, door):
    got = agree(ranks.run(scenarios.train, Setup(ascent_sync="none", steps=20, door=door)))
    close(got, reference([[0], [1]], 20), 1e-12)
    assert (got[0] - reference([[0, 1]], 20)[0]).abs().max() > 1e-5


@pytest.mark.parametrize(
    ("size", "groups"), [(2, [[0, 1], [2, 3]]), slow(4, [[0, 1, 2, 3]]), slow(1, [[0], [1], [2], [3]])]
)
def test_groups_of_replicas_climb_together(ranks_of, size, groups):
    """By their mean: without a norm its size counts."""
    for method in ("sam", "usam"):
        got = agree(ranks_of(4).run(scenarios.train, Setup(method=method, ascent_sync=size, steps=10)))
        close(got, reference(groups, 10, normalised=method == "sam"), 1e-12)


def test_a_group_averages_what_its_members_have(ranks_of):
    """Tensors without a gradient on some rank count as zero there, and stay out where no member has one."""
    setup = Setup(ascent_sync=2, steps=10, branches=True, ddp={"find_unused_parameters": True})
    agree(ranks_of(4).run(scenarios.train, setup))


@pytest.mark.parametrize(("ascent_sync", "gradients"), [("all", 2), ("none", 1)])
@pytest.mark.parametrize("door", ["closure", "passes"])
def test_a_local_pass_sends_nothing(ranks, ascent_sync, gradients, door):
    for _, sent, *_ in ranks.run(scenarios.train, Setup(steps=4, ascent_sync=ascent_sync, door=door)):
        assert sent == gradients * SIZE


@pytest.mark.parametrize(("ascent_sync", "groups", "gradients"), [("all", [[0, 1]], 2), ("none", [[0], [1]], 1)])
def test_accumulation_sends_once_a_pass(ranks, ascent_sync, groups, gradients):
    results = ranks.run(scenarios.accumulate, ascent_sync)
    close(agree(results), reference(groups, 10), 1e-12)
    assert [sent for _, sent in results] == [gradients * SIZE] * 2


@pytest.mark.parametrize("ascent_sync", ["all", "none"])
@pytest.mark.parametrize("method", ["sam", "vasso", slow("fsam"), slow("asam")])
def test_tensors_that_take_part_on_some_ranks_only(ranks, method, ascent_sync):
    options = {"find_unused_parameters": True}
    agree(ranks.run(scenarios.train, Setup(method=method, branches=True, ascent_sync=ascent_sync, ddp=options)))


@pytest.mark.parametrize(
    ("method", "ascent_sync"),
    [
        *(
            (m, "all") if m in KINDS else slow(m, "all")
            for m in SERVED
            if recipe_of(m).remembers or m in ("sam", "micro-sam", "n-step")
        ),
        *((m, "none") for m in ("sam", "vasso", "stale-sam", "n-step")),
    ],
)
def test_gradients_that_are_views_of_a_bucket(ranks, method, ascent_sync):
    """A gradient that a method keeps must not change with the next pass."""
    runs = [
        agree(ranks.run(scenarios.train, Setup(method=method, steps=6, ascent_sync=ascent_sync, ddp=options)))
        for options in ({}, {"gradient_as_bucket_view": True})
    ]
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize(("method", "ascent_sync"), [("gsam", "all"), ("stale-sam", "all"), ("sam", "none")])
def test_flat_weights_beside_the_buckets(ranks, method, ascent_sync, view):
    options = {"method": method, "steps": 6, "ascent_sync": ascent_sync, "ddp": {"gradient_as_bucket_view": view}}
    runs = [agree(ranks.run(scenarios.train, Setup(flat=flat, **options))) for flat in (True, False)]
    close(*runs, 1e-10)


@pytest.mark.parametrize("method", ["gsam", "wsam", "gnp", "vasso"])
def test_views_of_a_bucket_are_seen_without_the_module(ranks, method):
    options = {"gradient_as_bucket_view": True}
    runs = [
        agree(ranks.run(scenarios.train, Setup(method=method, steps=6, told=told, ddp=ddp)))
        for told, ddp in ((True, {}), (False, options))
    ]
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("method", ["gnp", "gam", "sampa"])
def test_a_view_that_is_the_whole_bucket(ranks, method):
    """One weight fills its bucket; a single process has buckets too."""
    results = ranks.run(scenarios.single_weight, method)
    assert all(float(apart) == 0 for apart in results)


def test_a_static_graph(ranks):
    options = {"static_graph": True}
    got = agree(ranks.run(scenarios.train, Setup(ddp=options)))
    close(got, agree(ranks.run(scenarios.train, Setup())), 1e-12)
    for sentence in ranks.run(scenarios.refusal, Setup(ascent_sync="none", ddp=options)):
        assert "needs a DistributedDataParallel without static_graph=True" in sentence


@pytest.mark.parametrize(("door", "scaler"), [("closure", True), ("passes", True), ("passes", False)])
@pytest.mark.parametrize("ascent_sync", ["all", "none"])
@pytest.mark.parametrize("spoilt", [0, 1])
def test_an_infinite_gradient_on_one_rank_hangs_nobody(ranks, spoilt, ascent_sync, scaler, door):
    setup = Setup(method="vasso", bad=(1, 3, spoilt), ascent_sync=ascent_sync, scaler=scaler, steps=6, door=door)
    results = ranks.run(scenarios.train, setup)
    agree(results)
    counts, scales = [r[2] for r in results], [r[3] for r in results]
    skipped = int(scaler or spoilt == 1)
    assert [c["skipped_steps"] for c in counts] == [skipped] * 2
    ascents = [int(spoilt == 0)] * 2 if ascent_sync == "all" else [0, int(spoilt == 0)]
    assert [c["nonfinite_ascents"] for c in counts] == ascents
    assert scales == [2.0**9 if scaler else None] * 2


def test_raising_is_done_by_all(ranks):
    with pytest.raises(RankError) as caught:
        ranks.run(scenarios.train, Setup(bad=(0, 1, 1), nonfinite="raise"))
    assert str(caught.value).count("FloatingPointError: the descent gradient has nan or inf") == 2


@pytest.mark.parametrize("method", SECOND_ORDER)
def test_second_derivatives_are_refused(ranks, method):
    for sentence in ranks.run(scenarios.refusal, Setup(method=method)):
        assert sentence.startswith(f"{method} needs second derivatives") and "run it in one process" in sentence


@pytest.mark.parametrize(
    ("setup", "sentence"),
    [
        (Setup(ascent_sync="none", wrapped=False), "ascent_sync needs a DistributedDataParallel module"),
        (Setup(ascent_sync="none", method="gsam"), "gsam uses the gradient of pass 1 in the update"),
        (Setup(ascent_sync="none", method="ae-sam"), "ae-sam decides by the gradient of pass 1"),
        (Setup(ascent_sync="some"), "ascent_sync must be 'all', 'none' or a number of ranks, got 'some'"),
        (Setup(ascent_sync=0), "got 0"),
        (Setup(ascent_sync=True), "got True"),
    ],
)
def test_refusals(ranks, setup, sentence):
    for found in ranks.run(scenarios.refusal, setup):
        assert sentence in found


def test_a_group_size_that_does_not_divide(ranks_of):
    for found in ranks_of(4).run(scenarios.refusal, Setup(ascent_sync=3)):
        assert "ascent_sync=3 must divide the number of processes, 4" in found


def test_doors_that_find_an_averaged_gradient_are_refused(ranks):
    for sentence in ranks.run(scenarios.manual_door):
        assert (
            "perturbed() uses gradients that are averaged over all replicas already; use passes() with ascent_sync"
            in sentence
        )


def test_names_are_those_of_the_module_inside(ranks):
    for found in ranks.run(scenarios.names):
        assert found == [n for n, _ in Net(torch.float64).named_parameters()]


def test_local_ascents_are_not_pickled(ranks):
    for sentence in ranks.run(scenarios.copied):
        assert "with ascent_sync cannot be copied or pickled" in sentence
