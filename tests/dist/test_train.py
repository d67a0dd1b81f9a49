"""Whole runs in two processes: as in one, and as if nobody had stopped them."""

import json
import os

import pytest
import torch

from flatmin.train import checkpoint, evaluate
from flatmin.train.config import RunConfig
from flatmin.train.folder import RunFolder
from flatmin.train.sources import build_model, load_data
from tests.dist import scenarios_train as scenarios
from tests.dist.kinds import slow
from tests.helpers import same_bits
from tests.train.runs import HERE, MARKED, config, content, go, options, outcome, saved_steps

pytestmark = pytest.mark.dist
LIMIT = 1e-6
PLAIN = {"method": "sam", "model": f"{HERE}:plain_net"}
DIGITS = {"method": "sam", "data": "digits", "model": "mlp", "batch_size": 64, "epochs": 2, "train_size": 320}


@pytest.fixture
def two(ranks, tmp_path):
    """`two(config, options, last)`: a run of two processes in `tmp_path / "two"`, up to an update."""

    def start(run, how=None, last=None, name="two"):
        return ranks.run(scenarios.run, tmp_path / name, run, options() if how is None else how, last)

    return start


def close(found, wanted, limit=LIMIT):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=limit)


class TestAsInOne:
    @pytest.mark.parametrize(
        ("parallel", "changes"),
        [
            ("ddp", PLAIN),
            ("fsdp", {**PLAIN, "channels_last": True}),
            slow("ddp", DIGITS),
            slow("fsdp", DIGITS),
            ("ddp", {**PLAIN, "accumulate": 2, "ema": 0.8}),
            slow("fsdp", {**PLAIN, "accumulate": 2}),
            slow("ddp", {**PLAIN, "ema": 0.8, "selection": "last"}),
            slow("ddp", {**PLAIN, "method": "vasso"}),
            slow("fsdp", {**PLAIN, "method": "vasso"}),
            slow("ddp", {**PLAIN, "method": "rsam", "noise": 0.3}),
            slow("fsdp", {**PLAIN, "method": "rsam", "noise": 0.3}),
            slow("ddp", {**PLAIN, "optimizer": "adamw", "lr": 1e-3}),
            slow("fsdp", {**PLAIN, "optimizer": "adamw", "lr": 1e-3}),
        ],
    )
    def test_the_same_weights_and_numbers(self, two, tmp_path, parallel, changes):
        run = config(parallel=parallel, **changes)
        (failure, mine), (_, others) = two(run)
        assert failure is None and same_bits(mine, others)
        go(tmp_path / "one", run)
        found, wanted = outcome(tmp_path / "two"), outcome(tmp_path / "one")
        close(found["weights"], wanted["weights"])
        close(found["weights"], mine)
        for here, there in zip(found["lines"], wanted["lines"], strict=True):
            assert here == pytest.approx(there, abs=1e-5)
        for here, there in zip(found["steps"], wanted["steps"], strict=True):
            assert {**here, "loss": 0} == {**there, "loss": 0}
            assert here["loss"] == pytest.approx(there["loss"], abs=1e-5), "over all processes"
        assert found["files"] == wanted["files"]
        env = json.loads((tmp_path / "two" / "env.json").read_text())
        assert env["processes"] == 2

    def test_an_ascent_on_ones_own_batches_is_another_one(self, two, tmp_path):
        (_, mine), (_, others) = two(config(**PLAIN, ascent_sync="none"))
        assert same_bits(mine, others)
        go(tmp_path / "one", config(**PLAIN))
        wanted = outcome(tmp_path / "one")["weights"]
        assert max((mine[name] - wanted[name]).abs().max() for name in wanted) > 1e-4

    @pytest.mark.parametrize(
        ("parallel", "changes"),
        [("ddp", {}), ("fsdp", {}), slow("ddp", {"ema": 0.8}), slow("ddp", {"ema": 0.8, "selection": "last"})],
    )
    def test_what_is_tested_is_what_is_kept(self, two, tmp_path, parallel, changes):
        """Each process has statistics of its own batches; those of the first one are kept."""
        run = config(method="sam", parallel=parallel, noise=0.4, seed=1, **changes)
        assert two(run)[0][0] is None
        data = load_data(run)
        model = build_model(run, data)
        model.load_state_dict(outcome(tmp_path / "two")["weights"])
        chosen = outcome(tmp_path / "two")["result"]["chosen"]
        assert changes or chosen["epoch"] == 1, "the best epoch has others after it"
        assert evaluate.score(model, data, data.test, run).loss == pytest.approx(chosen["test_loss"], abs=1e-6)
        val = evaluate.score(model, data, data.val, run).loss
        line = outcome(tmp_path / "two")["lines"][chosen["epoch"] - 1]
        assert val == pytest.approx(line["val_loss"], abs=1e-6)

    @pytest.mark.slow
    def test_diagnostics_of_sharded_weights(self, two, tmp_path):
        (failure, _), _ = two(config(**PLAIN, parallel="fsdp"), options(diagnostics=True))
        assert failure is None and outcome(tmp_path / "two")["steps"][0]["epsilon_norm"] == pytest.approx(0.05)


class TestResume:
    @pytest.mark.parametrize(
        ("parallel", "changes"),
        [
            slow("ddp", {}),
            ("fsdp", {}),
            slow("ddp", {"ema": 0.8}),
            ("ddp", {"ascent_sync": "none"}),
            slow("ddp", {"method": "sam-db"}),
            slow("ddp", {"method": "rsam"}),
            slow("fsdp", {"method": "rsam"}),
            slow("fsdp", {"method": "looksam", "optimizer": "adamw", "lr": 0.01}),
            slow("ddp", {"method": "looksam", "accumulate": 2, "precision": "fp16", "noise": 0.3}),
        ],
    )
    def test_as_a_run_that_was_left_alone(self, two, tmp_path, parallel, changes):
        run = config(parallel=parallel, **changes)
        for last in (2, 5, 8, 11):
            assert [found[0] for found in two(run, None, last)] == ["stopped"] * 2
        assert two(run)[0][0] is None
        assert two(run, name="alone")[0][0] is None
        found, wanted = outcome(tmp_path / "two"), outcome(tmp_path / "alone")
        for part in wanted:
            assert same_bits(found[part], wanted[part]), part

    def test_a_damaged_checkpoint_is_passed_over_by_all(self, two, tmp_path):
        two(config(), None, 11)
        newest = checkpoint.listed(tmp_path / "two" / "checkpoints")[0]
        os.truncate(newest, 1000)
        assert [failure for failure, _ in two(config())] == [None, None]
        two(config(), name="alone")
        assert same_bits(outcome(tmp_path / "two"), outcome(tmp_path / "alone"))

    def test_in_another_number_of_processes_it_is_refused(self, ranks, two, tmp_path):
        two(config(), None, 5)
        before = content(tmp_path / "two")
        with pytest.raises(
            ValueError, match=r"^the checkpoint was written by 2 process\(es\), but this run has 1; start"
        ):
            go(tmp_path / "two", config())
        assert content(tmp_path / "two") == before
        with pytest.raises(Exception, match="never"):
            go(tmp_path / "one", config(), None, _raise)
        before = content(tmp_path / "one")
        for sentence in ranks.run(scenarios.refusal, tmp_path / "one", config(), options()):
            assert sentence.startswith("the checkpoint was written by 1 process(es), but this run has 2; start")
        assert content(tmp_path / "one") == before

    def test_in_another_way_of_sharing_it_is_refused(self, ranks, two, tmp_path):
        two(config(), None, 5)
        for sentence in ranks.run(scenarios.refusal, tmp_path / "two", config(parallel="fsdp"), options()):
            assert "belongs to another run: parallel is 'ddp' there and 'fsdp' here" in sentence


def _raise(event):
    if getattr(event, "step", 0) == 5:
        raise RuntimeError("never mind")


class TestNonFinite:
    """A marked sample is in the share of one process; all stop, or all skip."""

    def config(self, seed, **changes):
        usual = {"method": "sam", "rho": 0.05, "epochs": 2, "batch_size": 16, "seed": seed}
        return RunConfig(**{**usual, "data": f"{HERE}:points", "model": f"{HERE}:poisoned_net", **changes})

    @pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
    @pytest.mark.parametrize("seed", [0, 7])
    def test_where_it_was(self, two, tmp_path, seed, parallel):
        run = self.config(seed, parallel=parallel)
        (failure, _), (other, _) = two(run)
        assert failure == other and failure.startswith("the training loss was not finite in step ")
        go(tmp_path / "one", run)
        found, wanted = (json.loads((tmp_path / name / "nonfinite.json").read_text()) for name in ("two", "one"))
        assert {**found, "samples": None} == {**wanted, "samples": None}
        assert [len(share) for share in found["samples"]] == [8, 8]
        assert [[*found["samples"][0], *found["samples"][1]]] == wanted["samples"]
        assert MARKED in wanted["samples"][0]

    def test_the_marked_sample_was_once_in_each_share(self, two, tmp_path):
        shares = set()
        for seed in (0, 7):
            two(self.config(seed), name=f"seed {seed}")
            samples = json.loads((tmp_path / f"seed {seed}" / "nonfinite.json").read_text())["samples"]
            shares.add(MARKED in samples[1])
        assert shares == {False, True}

    @pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
    def test_a_skipped_update_counts_once_and_leaves_nothing(self, two, tmp_path, parallel):
        (failure, weights), _ = two(self.config(0, nonfinite="skip", parallel=parallel))
        assert failure is None and all(t.isfinite().all() for t in weights.values())
        assert [line["skipped"] for line in outcome(tmp_path / "two")["lines"]] == [1, 1]

    def test_the_run_goes_on_after_it(self, two, tmp_path):
        run = self.config(0)
        for _ in range(2):
            assert two(run)[0][0] is not None
        assert two(run)[0][0] is None
        assert all(t.isfinite().all() for t in outcome(tmp_path / "two")["weights"].values())

    def test_a_checkpoint_does_not_hide_it(self, two, tmp_path):
        assert [found[0] for found in two(self.config(0), options(checkpoint_steps=1), 3)] != ["stopped"] * 2
        assert saved_steps(tmp_path / "two")[0] == json.loads((tmp_path / "two" / "nonfinite.json").read_text())["step"]

    def test_nothing_but_such_batches_in_one_process(self, two):
        """Its losses are never finite, those of the other one are."""
        found = two(self.config(0, nonfinite="skip", batch_size=48, max_skips=99))
        assert [failure for failure, _ in found] == [None, None]


def test_buffers_are_those_of_the_first(ranks):
    for found in ranks.run(scenarios.buffers):
        assert found["running_mean"].tolist() == [1, 1, 1] and found["num_batches_tracked"] == 5


def test_a_finished_run_is_read_as_any_other(two, tmp_path):
    two(config(**PLAIN))
    folder = RunFolder(tmp_path / "two")
    assert folder.finished and folder.config()[0] == config(**PLAIN)
