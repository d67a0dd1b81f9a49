"""A run that was stopped and continues ends as one that was left alone, bit for bit."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatmin.train.events import Began
from flatmin.train.folder import RunFolder
from flatmin.train.interrupt import TrainingInterrupted
from flatmin.train.loop import train
from tests.helpers import same_bits
from tests.train.runs import HERE, At, Stop, config, go, go_in_pieces, left_alone, options, outcome, saved_steps

# Inside an epoch, at its last update, between two epochs and in the last one; four updates are an epoch.
PIECES = ("step 2", "step 7", "step 8", "epoch 2", "step 11")
FEW = ("step 5", "epoch 2")  # inside the second epoch, and after it

MEMORY = (
    *("vasso", "fsam", "looksam", "stale-sam", "momentum-sam", "rsam", "esam", "sam-db", "late", "ssam-d", "ae-sam"),
    *("micro-sam", "bisam-log", "n-step", "bernoulli", "sgdhess", "ssam-f", "rho-ramp", "vasso+bisam-log+asam"),
)
MEASURED = {"measure_every": 2, "measures": "sharpness", "measure_examples": 20, "measure_m": 8}
# What a run can be, and the options of some.
SETTINGS = {
    "accumulate": {"accumulate": 2},
    "adam": {"optimizer": "adam", "lr": 0.01, "method": "momentum-sam"},
    "adamw": {"optimizer": "adamw", "lr": 0.01, "method": "looksam"},
    "average": {"ema": 0.8},
    "average, the last": {"ema": 0.8, "selection": "last"},
    "fp16": {"precision": "fp16"},
    "fp16 with a scale that changes": {"precision": "fp16", "model": f"{HERE}:loud_net", "lr": 1e-3},
    "bf16": {"precision": "bf16"},
    "warm-up": {"warmup": 1.5, "schedule_unit": "step"},
    "steps": {"schedule": "multistep", "milestones": (1, 2)},
    "noise": {"noise": 0.3},
    "smoothing": {"label_smoothing": 0.1, "smoothing": "others"},
    "mirrored": {"flip_tta": True, "channels_last": True},
    "no small batch": {"drop_last": True},
    "small": {"train_size": 40, "crop": 0},
    "clipped": {"clip_norm": 0.1, "deterministic": True},
    "the last": {"selection": "last", "test_every": 0},
    "the maximum": {"selection": "max-test", "measure": True},
    "statistics of all passes": {"freeze_batchnorm": False},
    "nothing stops it": {"nonfinite": "skip"},
    "flat": {"flat": True, "method": "vasso"},
    "flat, Adam": {"flat": True, "optimizer": "adam", "lr": 0.01},
}


def check(folder, run, places, how=None):
    """Stop a run at these places and compare it with one that is left alone."""
    alone = left_alone(folder, run, how)
    go_in_pieces(folder / "pieces", run, places, how)
    pieces = outcome(folder / "pieces")
    for part in alone:
        assert same_bits(pieces[part], alone[part]), part


class TestEveryPlace:
    @pytest.mark.parametrize("place", ["begin", *(f"step {k}" for k in (1, 3, 4, 5, 12)), "epoch 1", "epoch 3"])
    def test_an_error_there_costs_what_came_after_the_last_checkpoint(self, tmp_path, place):
        check(tmp_path, config(), [place])

    def test_stopped_at_every_update(self, tmp_path):
        check(tmp_path, config(method="rsam"), [f"step {k}" for k in range(1, 13)], options(checkpoint_steps=1))

    def test_without_checkpoints_inside_an_epoch(self, tmp_path):
        check(tmp_path, config(), PIECES, options(checkpoint_steps=0))

    def test_with_a_checkpoint_every_other_epoch(self, tmp_path):
        check(tmp_path, config(epochs=4), [*PIECES, "step 15"], options(checkpoint_steps=0, checkpoint_every=2))

    def test_with_losses_that_are_means_of_several_updates(self, tmp_path):
        check(tmp_path, config(), ["step 2", "step 6", "epoch 2", "step 10"], options(log_every=2, checkpoint_steps=1))

    @pytest.mark.parametrize("method", ["sam", "vasso", "every-k"])
    def test_with_diagnostics(self, tmp_path, method):
        check(tmp_path, config(method=method), PIECES, options(diagnostics=True))
        lines = RunFolder(tmp_path / "pieces").steps()
        known = [one["step"] for one in lines if "ascent_cosine" in one]
        ascended = [one["step"] for one in lines if "epsilon_norm" in one]
        assert known == ascended[1:] and len(known) > 1, "all ascents but the first, whatever was stopped between"

    def test_with_measurements(self, tmp_path):
        how = options(**MEASURED, checkpoint_steps=2)
        check(tmp_path, config(epochs=4), ["step 7", "measured 2", "step 11", "measured 4"], how)


class TestSignals:
    """Ctrl-C and SIGTERM wait for the update in progress, and nothing is lost.

    Here they come while a listener is told of the update before.
    """

    @pytest.mark.parametrize(
        ("place", "name", "step", "epochs"),
        [
            ("step 1", "SIGINT", 2, 0),
            ("step 3", "SIGTERM", 4, 0),
            ("epoch 1", "SIGINT", 4, 1),
            ("epoch 1", "SIGTERM", 4, 1),
            ("step 8", "SIGTERM", 8, 2),
            ("step 11", "SIGINT", 12, 2),
        ],
    )
    def test_the_update_is_kept_and_the_run_goes_on(self, tmp_path, place, name, step, epochs):
        how = options(checkpoint_steps=0)
        with pytest.raises(TrainingInterrupted, match=rf"^Interrupted after {step} of 12 updates\. A check"):
            go(tmp_path / "run", config(), how, At(place, name))
        assert saved_steps(tmp_path / "run")[0] == step
        assert not RunFolder(tmp_path / "run").finished
        begun = go(tmp_path / "run", config(), how)[0]
        assert isinstance(begun, Began) and (begun.epoch, begun.step) == (epochs, step)
        assert same_bits(outcome(tmp_path / "run"), left_alone(tmp_path, config(), how))

    def test_a_run_that_has_only_its_end_before_it_ends(self, tmp_path):
        go(tmp_path / "run", config(), None, At("epoch 3", "SIGINT"))
        assert RunFolder(tmp_path / "run").finished

    def test_a_checkpoint_is_kept_also_where_none_was_asked_for(self, tmp_path):
        how = options(checkpoint_steps=0, checkpoint_every=0)
        with pytest.raises(TrainingInterrupted, match="A checkpoint was saved"):
            go(tmp_path / "run", config(), how, At("step 5", "SIGINT"))
        assert saved_steps(tmp_path / "run") == [6]

    def test_a_second_one_is_what_it_always_was(self, tmp_path):
        def twice(event):
            At("step 2", "SIGINT")(event)
            At("step 2", "SIGINT")(event)

        with pytest.raises(KeyboardInterrupt) as caught:
            go(tmp_path / "run", config(), None, twice)
        assert caught.type is KeyboardInterrupt

    def test_without_a_folder_they_are_left_alone(self):
        with pytest.raises(KeyboardInterrupt) as caught:
            train(config(), options=options(), on_event=At("step 2", "SIGINT"))
        assert caught.type is KeyboardInterrupt


@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adamw", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", MEMORY)
def test_every_kind_of_memory_goes_on(tmp_path, method, optimizer):
    rate = {"sgd": 0.1, "adamw": 0.01}[optimizer]
    check(tmp_path, config(method=method, optimizer=optimizer, lr=rate), FEW)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_goes_on(tmp_path, name):
    check(tmp_path, config(**SETTINGS[name]), FEW)


class TestAnyRun:
    @settings(max_examples=12, deadline=None)
    @given(data=st.data())
    def test_stopped_anywhere(self, tmp_path_factory, data):
        run = config(
            method=data.draw(st.sampled_from(MEMORY), label="method"),
            optimizer=data.draw(st.sampled_from(("sgd", "adam", "adamw")), label="optimizer"),
            lr=0.01,
            ema=data.draw(st.sampled_from((None, 0.9)), label="ema"),
            noise=data.draw(st.sampled_from((0.0, 0.3)), label="noise"),
            batch_size=data.draw(st.sampled_from((10, 16, 50)), label="batch_size"),
            selection=data.draw(st.sampled_from(("val", "last", "max-test")), label="selection"),
            schedule_unit=data.draw(st.sampled_from(("epoch", "step")), label="unit"),
            seed=data.draw(st.integers(0, 3), label="seed"),
        )
        how = options(
            checkpoint_steps=data.draw(st.integers(0, 4), label="checkpoint_steps"),
            checkpoint_every=data.draw(st.integers(0, 2), label="checkpoint_every"),
            log_every=data.draw(st.sampled_from((1, 3)), label="log_every"),
        )
        updates = 3 * -(-50 // run.batch_size)
        steps = data.draw(st.sets(st.integers(1, updates // how.log_every), max_size=4), label="stops")
        places = [f"step {how.log_every * k}" for k in sorted(steps)]
        check(tmp_path_factory.mktemp("run"), run, places, how)


class TestWhatIsThere:
    def test_a_finished_run_keeps_its_weights_and_no_checkpoints(self, tmp_path):
        go(tmp_path / "run", config())
        names = ["config.json", "data.json", "env.json", "metrics.jsonl", "result.json", "steps.jsonl", "weights.pt"]
        assert sorted(p.name for p in (tmp_path / "run").iterdir()) == names

    def test_the_last_two_checkpoints_stay(self, tmp_path):
        with pytest.raises(Stop):
            go(tmp_path / "run", config(), None, At("step 11"))
        assert saved_steps(tmp_path / "run") == [9, 8]

    def test_a_run_without_listeners_records_its_steps_too(self, tmp_path):
        train(config(), folder=RunFolder(tmp_path / "run"), options=options())
        assert [one["step"] for one in RunFolder(tmp_path / "run").steps()] == list(range(1, 13))

    def test_a_run_that_goes_on_says_from_where(self, tmp_path):
        with pytest.raises(Stop):
            go(tmp_path / "run", config(), None, At("step 8"))
        begun = go(tmp_path / "run", config())[0]
        assert (begun.epoch, begun.step) == (1, 6)
