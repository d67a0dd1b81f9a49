"""A loss or gradient that is not finite stops the run where it happened, or is skipped, as configured."""

import json

import pytest
import torch

from flatmin.cli.main import main
from flatmin.train import checkpoint
from flatmin.train.config import RunConfig
from flatmin.train.folder import RunFolder
from flatmin.train.loop import train
from tests.helpers import same_bits
from tests.train.runs import HERE, MARKED, At, Stop, go, left_alone, options, outcome, saved_steps


def config(**changes):
    """Three epochs of three updates, in one of which is the marked sample."""
    usual = {
        "method": "sam",
        "rho": 0.05,
        "epochs": 3,
        "batch_size": 16,
        "data": f"{HERE}:points",
        "model": f"{HERE}:poisoned_net",
    }
    return RunConfig(**{**usual, **changes})


def refuse(constant):
    raise ValueError(f"{constant} is no JSON")


def blamed(path):
    return json.loads((path / "nonfinite.json").read_text(), parse_constant=refuse)


def failure(path):
    return RunFolder(path).result().failure


def finite(state):
    return all(t.isfinite().all() for t in state.values() if t.is_floating_point())


@pytest.mark.parametrize("method", ["sgd", "sam", "vasso", "looksam", "sam-db", "micro-sam", "n-step"])
class TestStop:
    def test_says_where_it_was(self, tmp_path, method):
        run = config(method=method, rho=None if method == "sgd" else 0.05)
        go(tmp_path / "run", run)
        found = blamed(tmp_path / "run")
        assert found["epoch"] == 1 and found["step"] == found["batch"] <= 3
        assert [len(samples) for samples in found["samples"]] == [16] and MARKED in found["samples"][0]
        what = "gradient" if method == "sam-db" else "loss"  # its loss is that of the batch that it climbs on
        assert failure(tmp_path / "run").startswith(
            f"the training {what} was not finite in step {found['step']}, batch {found['batch']} of epoch 1 "
            "(nonfinite.json lists its samples)"
        )

    def test_keeps_a_checkpoint_after_which_the_run_goes_on(self, tmp_path, method):
        """To the same end as one that skips, bit for bit; the marked sample comes once an epoch."""
        run = config(method=method, rho=None if method == "sgd" else 0.05)
        stops = []
        for _ in range(3):
            go(tmp_path / "run", run)
            assert failure(tmp_path / "run") is not None
            stops.append(blamed(tmp_path / "run")["step"])
            assert saved_steps(tmp_path / "run")[0] == stops[-1]
        assert [(step - 1) // 3 for step in stops] == [0, 1, 2]
        go(tmp_path / "run", run)
        assert failure(tmp_path / "run") is None
        go(tmp_path / "skips", config(**{**vars(run), "nonfinite": "skip"}))
        assert same_bits(outcome(tmp_path / "run")["weights"], outcome(tmp_path / "skips")["weights"])
        assert outcome(tmp_path / "run")["lines"] == outcome(tmp_path / "skips")["lines"]


class TestStopped:
    def test_what_the_checkpoint_holds_is_finite(self, tmp_path):
        go(tmp_path / "run", config())
        state = checkpoint.newest(tmp_path / "run" / "checkpoints", print)["trainer"]
        assert finite(state["model"])

    def test_a_gradient_alone(self, tmp_path):
        go(tmp_path / "run", config(model=f"{HERE}:poisoned_gradient_net"))
        assert failure(tmp_path / "run").startswith("the training gradient was not finite in step ")
        assert MARKED in blamed(tmp_path / "run")["samples"][0]

    @pytest.mark.parametrize("changes", [{"accumulate": 4}, {"precision": "bf16"}, {"precision": "fp16"}, {"ema": 0.9}])
    def test_with_other_settings(self, tmp_path, changes):
        go(tmp_path / "run", config(**changes))
        assert MARKED in blamed(tmp_path / "run")["samples"][0]

    def test_without_a_folder_no_file_is_named(self):
        found = train(config())
        assert found.failure is not None and "nonfinite.json" not in found.failure
        assert not found.trained and found.chosen is None

    def test_through_the_command(self, tmp_path, capsys):
        words = ["data=tests.train.runs:points", "model=tests.train.runs:poisoned_net", "batch_size=16"]
        with pytest.raises(SystemExit) as end:
            main(["train", "smoke", *words, "--out", str(tmp_path), "--name", "run"])
        assert end.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("flatmin: the run stopped: the training loss was not finite in step ")
        assert said.count("\n") == 1 and "Traceback" not in said


class TestSkip:
    # With seed 1 it is the first batch of all.
    @pytest.mark.parametrize(
        "changes", [{}, {"ema": 0.5}, {"ema": 0.5, "seed": 1}, {"method": "vasso", "ema": 0.5}, {"selection": "last"}]
    )
    def test_nothing_of_it_stays(self, tmp_path, changes):
        go(tmp_path / "run", config(nonfinite="skip", **changes))
        folder = RunFolder(tmp_path / "run")
        assert folder.result().failure is None
        assert [line.skipped for line in folder.lines()] == [1, 1, 1]
        weights = torch.load(folder.weights, weights_only=True)
        assert finite(weights)
        # One batch of three each epoch: as if it had not been there.
        assert weights["2.num_batches_tracked"] % 2 == 0

    def test_the_statistics_are_those_before_the_batch(self, tmp_path):
        skips, without = config(nonfinite="skip", selection="last"), []

        def remember(model):
            without.append({name: b.clone() for name, b in model.named_buffers()})

        train(skips, on_end=remember)
        assert without[0]["2.num_batches_tracked"] == 6

    def test_every_recorded_number_is_one(self, tmp_path):
        go(tmp_path / "run", config(nonfinite="skip"), options(log_every=1))
        for name in ("steps.jsonl", "metrics.jsonl", "result.json"):
            for line in (tmp_path / "run" / name).read_text().splitlines() if name.endswith("l") else ():
                json.loads(line, parse_constant=refuse)

    def test_more_than_are_allowed_stop_the_run(self, tmp_path):
        go(tmp_path / "run", config(nonfinite="skip", max_skips=1))
        assert "after 1 skipped update;" in failure(tmp_path / "run")
        assert blamed(tmp_path / "run")["epoch"] == 2 and blamed(tmp_path / "run")["before"] == 1

    def test_skips_are_counted_over_an_interruption(self, tmp_path):
        run = config(nonfinite="skip", max_skips=1)
        with pytest.raises(Stop):
            go(tmp_path / "run", run, options(checkpoint_steps=1), At("epoch 1"))
        go(tmp_path / "run", run)
        assert blamed(tmp_path / "run")["epoch"] == 2 and blamed(tmp_path / "run")["before"] == 1

    @pytest.mark.parametrize(("method", "step"), [("vasso", 1), ("sam-db", 1), ("vasso", 3), ("sam-db", 5)])
    def test_a_run_that_skips_goes_on_as_one_that_was_left_alone(self, tmp_path, step, method):
        run, how = config(nonfinite="skip", method=method, ema=0.5), options(checkpoint_steps=1)
        with pytest.raises(Stop):
            go(tmp_path / "run", run, how, At(f"step {step}"))
        go(tmp_path / "run", run, how)
        assert same_bits(outcome(tmp_path / "run"), left_alone(tmp_path, run, how))

    def test_nothing_but_such_batches(self, tmp_path):
        go(tmp_path / "run", config(nonfinite="skip", batch_size=48, max_skips=99))
        assert failure(tmp_path / "run").startswith("no update of epoch 1 had a finite loss")
