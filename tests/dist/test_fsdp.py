"""FSDP2 (`fully_shard`): sharded weights train as the whole ones do."""

import pytest
import torch

from flatmin.methods import METHODS, Need
from tests.dist import scenarios_fsdp as scenarios
from tests.dist.kinds import chosen, slow
from tests.dist.scenarios_fsdp import Net, Setup
from tests.helpers import recipe_of

pytestmark = pytest.mark.dist

REFUSED = [m for m in METHODS if recipe_of(m).needs & {Need.SECOND_ORDER, Need.GLOBAL_ORDER}]
SERVED = [m for m in METHODS if m not in REFUSED]
LIMIT = 1e-6


def agree(results):
    """The weights, after asserting that all ranks have the same, bit for bit."""
    first, *others = [weights for weights, *_ in results]
    for weights in others:
        assert all(map(torch.equal, first, weights))
    return first


def alone(**setup):
    return scenarios.train(0, 1, Setup(sharded=False, **setup))


def close(a, b, tolerance=LIMIT):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("base", "device_path"), [("sgd", False), slow("sgd", True), slow("adamw", False), slow("adamw", True)]
)
@pytest.mark.parametrize("method", chosen(SERVED))
def test_every_method_equals_its_unsharded_run(ranks, method, base, device_path):
    setup = {"method": method, "base": base, "device_path": device_path}
    close(agree(ranks.run(scenarios.train, Setup(**setup))), alone(**setup)[0])


@pytest.mark.parametrize("method", [slow("sam"), slow("vasso"), slow("rsam"), "gsam"])
def test_manual_passes(ranks, method):
    close(agree(ranks.run(scenarios.train, Setup(method=method, door="passes"))), alone(method=method)[0])


@pytest.mark.parametrize("method", [slow("sam"), "vasso", slow("rsam")])
@pytest.mark.parametrize(("world", "mesh"), [slow(4, (4,)), (4, (2, 2))])
def test_other_meshes(ranks_of, world, mesh, method):
    """More ranks than rows of some tensors, and shards that are replicated."""
    close(agree(ranks_of(world).run(scenarios.train, Setup(method=method, mesh=mesh))), alone(method=method)[0])


@pytest.mark.parametrize("world", [2, slow(4)])
def test_draws_do_not_depend_on_the_sharding(ranks_of, world):
    want = scenarios.draws(0, 1, False)
    for found in ranks_of(world).run(scenarios.draws, True):
        for got, expected in zip(found, want, strict=True):
            assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("method", REFUSED)
def test_what_shards_cannot_serve_is_refused(ranks, method):
    for sentence in ranks.run(scenarios.refusal, Setup(method=method)):
        assert sentence.startswith(f"{method} needs ")
        assert "run it in one process" in sentence or "not available for sharded weights" in sentence


def test_weights_that_are_sharded_in_part_are_refused(ranks):
    for sentences in ranks.run(scenarios.half_sharded):
        assert len(sentences) == 2
        assert all("shard the whole model over one mesh" in sentence for sentence in sentences)


@pytest.mark.parametrize(("door", "device_path"), [("closure", True), slow("passes", False)])
@pytest.mark.parametrize("scaler", [False, True])
@pytest.mark.parametrize("spoilt", [0, 1])
def test_an_infinite_entry_in_one_shard_is_known_to_all(ranks, spoilt, device_path, scaler, door):
    setup = {"method": "vasso", "bad": (2, spoilt), "device_path": device_path, "scaler": scaler, "door": door}
    results = ranks.run(scenarios.train, Setup(**setup))
    want = alone(**setup)
    close(agree(results), want[0])
    assert all(torch.isfinite(w).all() for w in want[0])
    assert [r[1:] for r in results] == [want[1:]] * 2
    assert want[1]["skipped_steps"] == int(scaler or spoilt == 1)
    if scaler:
        assert want[2] == 2.0**9


@pytest.mark.parametrize("device_path", [slow(False), True])
def test_clipping(ranks, device_path):
    setup = {"clip_norm": 0.05, "device_path": device_path}
    close(agree(ranks.run(scenarios.train, Setup(**setup))), alone(**setup)[0])


def test_diagnostics_are_those_of_the_whole(ranks):
    want = scenarios.numbers(0, 1, Setup(method="vasso", sharded=False))
    for found in ranks.run(scenarios.numbers, Setup(method="vasso")):
        assert found == pytest.approx(want, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("method", "whole"), [slow("sam", True), ("vasso", False)])
def test_diagnostics_go_on_from_a_checkpoint(ranks, method, whole):
    want = scenarios.numbers(0, 1, Setup(method=method, sharded=False))
    assert "ascent_cosine" in want
    for found in ranks.run(scenarios.numbers_of_one_that_goes_on, Setup(method=method), whole):
        assert found == pytest.approx(want, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("method", ["sam", slow("asam"), slow("vasso"), slow("rsam")])
def test_mixed_precision(ranks, method):
    """Weights and perturbation stay in float32, products are in bfloat16: near the float32 run, the same everywhere."""
    got = agree(ranks.run(scenarios.train, Setup(method=method, low=torch.bfloat16)))
    start = [p.detach() for p in Net().parameters()]
    far = [(w - s).norm() for w, s in zip(alone(method=method)[0], start, strict=True)]
    for w, full, size in zip(got, alone(method=method)[0], far, strict=True):
        assert (w - full).norm() < 0.2 * size


def test_weights_in_bf16(ranks):
    for before, after, projection in ranks.run(scenarios.bf16_weights):
        assert all(map(torch.equal, before, after))
        assert projection == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("base", ["sgd", slow("adamw")])
@pytest.mark.parametrize(
    ("method", "whole"),
    [
        *(("vasso", True), ("looksam", False), slow("vasso", False), slow("looksam", True)),
        *(slow(method, whole) for method in ("sam", "rsam") for whole in (True, False)),
    ],
)
def test_a_checkpoint_resumes_on_another_number_of_ranks(ranks, ranks_of, tmp_path, method, whole, base):
    setup = Setup(method=method, base=base)
    want = alone(method=method, base=base, steps=10)[0]
    ranks.run(scenarios.save, setup, str(tmp_path), whole)
    for world in (4, 2):
        for weights in ranks_of(world).run(scenarios.resume, setup, str(tmp_path), whole):
            close(weights, want)
    if whole:
        close(scenarios.resume(0, 1, Setup(method=method, base=base, sharded=False), str(tmp_path), whole), want)
