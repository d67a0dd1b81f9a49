"""A whole run: what is chosen and tested, what is told, and what is left as it was."""

import dataclasses
import json
import math
import os
import signal

import pytest
import torch
from torch import nn

from flatmin.data.dataset import Data, Split
from flatmin.measure.problem import Problem
from flatmin.measure.sharpness import m_sharpness, worst_case
from flatmin.train import evaluate, events, fingerprint, trackers
from flatmin.train.config import RunConfig
from flatmin.train.folder import RunFolder
from flatmin.train.loop import train
from flatmin.train.options import Options
from flatmin.train.sources import load_data
from flatmin.train.trainer import Trainer
from tests.helpers import same_bits

HERE = "tests.train.test_run"
TIMES = ("seconds", "images_per_second", "peak_memory")


def clouds():
    """Three clouds that overlap, so that one epoch is better than another: 50 to train, 40 and 60."""
    g = torch.Generator().manual_seed(3)
    centres = torch.randn(3, 6, generator=g)
    parts = []
    for n in (50, 40, 60):
        y = torch.arange(n) % 3
        parts.append((centres[y] + torch.randn(n, 6, generator=g), y))
    return tuple(parts)


def net():
    """No dropout, so that its training can be done again without the run's random state."""
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def dropping():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))


class Blank(nn.Linear):
    """Answers nothing in the given forward passes of a training."""

    def __init__(self, passes):
        super().__init__(6, 3)
        self.passes, self.count = passes, 0

    def forward(self, x):
        out = super().forward(x)
        if self.training:
            self.count += 1
        return out * math.nan if self.training and self.count in self.passes else out


def blank_in_the_second():
    return Blank({2})


def config(**changes):
    """Five epochs of four updates, at a rate that makes them go up and down."""
    usual = {"method": "sam", "rho": 0.1, "epochs": 5, "batch_size": 16, "lr": 0.5, "momentum": 0.5}
    return RunConfig(**{**usual, "data": f"{HERE}:clouds", "model": f"{HERE}:net", "schedule": "constant", **changes})


def run(settings, path=None, *, data=None, labels=None, on_event=None, on_end=None, resume=False, **options):
    """The result and the events."""
    told = []

    def listen(event):
        if not isinstance(event, events.Ticked):
            told.append(event)
            if on_event is not None:
                on_event(event)

    folder = None if path is None else RunFolder(path)
    result = train(
        settings,
        folder=folder,
        options=Options(**{"log_every": 2, **options}),
        data=data,
        labels=labels,
        resume=resume,
        on_event=listen,
        on_end=on_end,
    )
    return result, told


def lines(told):
    return [event.line for event in told if isinstance(event, events.EpochEnded)]


def timeless(value):
    """Without what was the time."""
    if isinstance(value, dict):
        return {key: timeless(one) for key, one in value.items() if key not in TIMES}
    if dataclasses.is_dataclass(value):
        return timeless(vars(value))
    return [timeless(one) for one in value] if isinstance(value, list) else value


def epochs_by_hand(settings):
    """The weights after each epoch, by the trainer's own steps; and the data."""
    trainer = Trainer(settings)
    found = []
    for _ in range(settings.epochs):
        for batch in trainer.batches():
            trainer.net.train()
            trainer.step(batch)
        with trainer.average.applied() if trainer.average else torch.no_grad():
            found.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
    return found, trainer.data


def accuracy(state, split):
    model = net()
    model.load_state_dict(state)
    with torch.no_grad():
        return 100 * (model.eval()(split.x).argmax(1) == split.y).double().mean().item()


@pytest.fixture
def looks(monkeypatch):
    """Which part each evaluation was of."""
    seen, score = [], evaluate.score

    def watched(model, data, split, *rest, **more):
        seen.append(next((name for name in ("val", "test", "train") if split is getattr(data, name)), "other"))
        return score(model, data, split, *rest, **more)

    monkeypatch.setattr(evaluate, "score", watched)
    return seen


class TestWhichWeights:
    def check(self, settings, path, epoch):
        """The weights of one epoch are kept, tested, and handed over."""
        states, data = epochs_by_hand(settings)
        ends = []
        result, told = run(settings, path, on_end=lambda model: ends.append(model.state_dict()))
        kept = torch.load(path / "weights.pt", weights_only=True)
        assert same_bits(kept, states[epoch - 1])
        assert same_bits(dict(ends[0]), states[epoch - 1])
        chosen = result.chosen
        assert (chosen["selection"], chosen["epoch"]) == (settings.selection, epoch)
        assert chosen["test_acc"] == pytest.approx(accuracy(kept, data.test))
        assert chosen["val_acc"] == pytest.approx(accuracy(kept, data.val)) == lines(told)[epoch - 1].val_acc
        trained = {name: tensor.double() for name, tensor in kept.items()}
        model = net().double()
        model.load_state_dict(trained)
        with torch.no_grad():
            output = model.eval()(data.train.x.double())
        assert result.train_ce == pytest.approx(nn.functional.cross_entropy(output, data.train.y).item(), rel=1e-5)
        return result, told

    def best(self, settings, part="val"):
        states, data = epochs_by_hand(settings)
        found = [accuracy(state, getattr(data, part)) for state in states]
        assert len(set(found)) > 1, "nothing to choose"
        return found

    @pytest.mark.parametrize("seed", range(3))
    def test_the_best_on_validation(self, tmp_path, seed):
        settings = config(seed=seed)
        found = self.best(settings)
        _, told = run(settings)
        best = max(lines(told), key=lambda line: (line.val_acc, -line.val_loss, -line.epoch))
        assert found[best.epoch - 1] == pytest.approx(max(found))
        result, _ = self.check(settings, tmp_path, best.epoch)
        assert result.best == {"epoch": best.epoch, "test_acc": result.chosen["test_acc"], "val_acc": best.val_acc}

    def test_the_last(self, tmp_path):
        seed = next(s for s in range(20) if max(found := self.best(config(seed=s))) > found[-1])
        result, _ = self.check(config(seed=seed, selection="last"), tmp_path, 5)
        assert result.last["epoch"] == 5 and result.last["test_acc"] == result.chosen["test_acc"]
        assert result.best["epoch"] < 5 and result.best["test_acc"] is None, "it was never looked at"

    @pytest.mark.parametrize("seed", range(3))
    def test_the_maximum_over_the_test_part(self, tmp_path, seed):
        settings = config(seed=seed, selection="max-test")
        found = self.best(settings, "test")
        result, told = self.check(settings, tmp_path, 1 + found.index(max(found)))
        assert result.chosen["test_acc"] == pytest.approx(max(found))
        assert [line.test_acc for line in lines(told)] == pytest.approx(found)

    @pytest.mark.parametrize("selection", ["val", "last"])
    def test_of_an_average(self, tmp_path, selection):
        settings = config(ema=0.9, selection=selection)
        _, told = run(settings)
        best = max(lines(told), key=lambda line: (line.val_acc, -line.val_loss, -line.epoch))
        self.check(settings, tmp_path, best.epoch if selection == "val" else 5)

    def test_none_are_kept(self, tmp_path):
        run(config(epochs=1), tmp_path, weights=False)
        assert not (tmp_path / "weights.pt").exists()


class TestLookingAtTheTestPart:
    def test_once_at_the_end(self, looks):
        _, told = run(config())
        assert looks == ["val"] * 5 + ["train", "test"]
        assert all(line.test_acc is None and line.test_top5 is None for line in lines(told))

    def test_once_with_the_last(self, looks):
        run(config(selection="last"))
        assert looks.count("test") == 1 and looks[-1] == "test"

    @pytest.mark.parametrize(("every", "seen"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4]), (3, [3]), (9, [])])
    def test_every_so_many_epochs(self, looks, every, seen):
        _, told = run(config(test_every=every))
        assert [line.epoch for line in lines(told) if line.test_acc is not None] == seen
        assert looks.count("test") == len(seen) + 1

    def test_looking_changes_nothing(self):
        one, _ = run(config(model=f"{HERE}:dropping"))
        two, _ = run(config(model=f"{HERE}:dropping", test_every=1))
        assert timeless(two) | {"last": None, "best": None} == timeless(one) | {"last": None, "best": None}
        assert two.last["val_acc"] == one.last["val_acc"]

    def test_the_maximum_looks_every_epoch(self, looks):
        run(config(selection="max-test"))
        assert looks.count("test") == 6

    def test_of_a_failed_run_never(self, looks):
        result, _ = run(config(lr=1e30))
        assert result.failure is not None and "test" not in looks
        assert result.chosen is result.last is result.best is result.train_ce is None


class TestTrainOnVal:
    """The protocol of VaSSO: all of the official training part, validated on the test part."""

    def data(self):
        train_part, _, test = (Split(*pair) for pair in clouds())
        return Data(train_part, test, test, num_classes=3)

    def test_each_epoch_is_looked_at_once(self, looks):
        settings = config(train_on_val=True, selection="max-test")
        _, told = run(settings, data=self.data())
        assert looks == ["val"] * 5 + ["train", "val"]
        assert all(line.test_acc == line.val_acc for line in lines(told))

    def test_the_two_parts_stay_one_on_a_device(self):
        moved = self.data().to("cpu")
        assert moved.test is moved.val

    def test_data_of_ones_own_have_their_own_parts(self):
        with pytest.raises(ValueError, match=r"^train_on_val=true is for the built-in data sets; data=.* its own"):
            load_data(config(train_on_val=True, selection="last"))
        with pytest.raises(ValueError, match=r"^the digits data set has its own validation part"):
            load_data(config(data="digits", train_on_val=True, selection="last"))


class TestResult:
    def test_the_file_is_what_was_returned(self, tmp_path):
        result, told = run(config(measure=True, test_every=1), tmp_path, labels={"label": "mine", "key": "abc"})
        found = json.loads((tmp_path / "result.json").read_text())
        content = fingerprint.content_of(config()).digest
        labels = {"label": "mine", "key": "abc", "content": content}
        assert found == {"version": 1, **labels, **dataclasses.asdict(result)}
        assert told[-1] == events.Ended(result=result)
        written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert written == [dataclasses.asdict(line) for line in lines(told)]

    def test_its_numbers(self):
        result, told = run(config(noise=0.3, measure=True))
        known = lines(told)
        assert (result.method, result.rho, result.gradient_evaluations, result.seed) == ("sam", 0.1, 2.0, 0)
        assert (result.epochs, result.noise, result.trained, result.failure) == (5, 0.3, True, None)
        assert result.seconds == pytest.approx(sum(line.seconds for line in known))
        last = known[-1]
        assert result.last | {"test_acc": None} == {
            **{"epoch": 5, "test_acc": None, "val_acc": last.val_acc, "memorised": last.memorised},
            "train_loss": last.train_loss,
        }
        assert set(result.chosen) == {"selection", "epoch", "val_acc", "test_acc", "test_top5", "test_loss"}
        assert result.lambda_max["converged"] and result.lambda_max["value"] > 0

    def test_without_a_radius_and_without_a_measurement(self):
        result, told = run(config(method="sgd", rho=None, epochs=1))
        assert result.rho is None and result.lambda_max is None and lines(told)[0].rho is None

    def test_configuration_and_labels(self, tmp_path):
        settings = config(epochs=1)
        run(settings, tmp_path, labels={"label": "mine"})
        content = fingerprint.content_of(settings).digest
        assert RunFolder(tmp_path).config() == (settings, {"label": "mine", "content": content})
        assert json.loads((tmp_path / "env.json").read_text())["processes"] == 1


class TestEvents:
    def test_in_order_with_their_numbers(self, tmp_path):
        _, told = run(config(epochs=2), tmp_path / "mine", measure_every=2, measures="sharpness", measure_examples=20)
        names = [type(event).__name__ for event in told]
        assert names == ["Began", *["Stepped", "Stepped", "EpochEnded"] * 2, "Measured", "Ended"]
        begun = told[0]
        assert (begun.name, begun.config, begun.samples, begun.steps) == ("mine", config(epochs=2), 50, 4)
        assert (begun.epoch, begun.step, begun.gradient_evaluations) == (0, 0, 2.0)
        assert begun.parameters == sum(p.numel() for p in net().parameters())
        assert begun.environment["device"] == "cpu"
        stepped = [event for event in told if isinstance(event, events.Stepped)]
        assert [(e.step, e.epoch, e.images, e.lr, e.rho) for e in stepped] == [
            *((2, 1, 32, 0.5, 0.1), (4, 1, 18, 0.5, 0.1), (6, 2, 32, 0.5, 0.1), (8, 2, 18, 0.5, 0.1))
        ]
        assert [(e.step, e.line.epoch) for e in told if isinstance(e, events.EpochEnded)] == [(4, 1), (8, 2)]
        measured = told[-2]
        assert (measured.epoch, measured.step) == (2, 8) and measured.values
        assert told[-1].result.chosen is not None

    def test_without_a_folder_a_run_has_the_name_of_its_method(self):
        assert run(config(epochs=1))[1][0].name == "sam"

    def test_losses_are_means_since_the_event_before(self):
        _, each = run(config(epochs=2), log_every=1)
        _, some = run(config(epochs=2), log_every=3)
        single = [event.loss for event in each if isinstance(event, events.Stepped)]
        several = [event.loss for event in some if isinstance(event, events.Stepped)]
        assert len(single) == 8 and len(several) == 2
        assert several[0] == pytest.approx(sum(single[:3]) / 3)
        known = [line.train_loss for line in lines(each)]
        assert known == pytest.approx([sum(single[:4]) / 4, sum(single[4:]) / 4])

    def test_learning_rates_are_those_of_the_last_update(self):
        settings = config(epochs=2, schedule="cosine", schedule_unit="step")
        _, told = run(settings, log_every=1)
        schedule = Trainer(settings).schedule
        assert [e.lr for e in told if isinstance(e, events.Stepped)] == [schedule.at(k) for k in range(8)]
        assert [line.lr for line in lines(told)] == [schedule.at(0), schedule.at(4)]

    def test_no_steps(self, tmp_path):
        _, told = run(config(epochs=1), tmp_path, log_every=0)
        assert not any(isinstance(event, events.Stepped) for event in told)
        assert not (tmp_path / "steps.jsonl").exists()

    def test_steps_and_measurements_are_written(self, tmp_path):
        _, told = run(config(epochs=2), tmp_path, diagnostics=True, measure_every=1, measures="sharpness")
        stepped = [event for event in told if isinstance(event, events.Stepped)]
        own = [{k: v for k, v in vars(e).items() if k != "diagnostics"} for e in stepped]
        # A diagnostic by the name of a mean is that of the last update.
        expected = [
            one | {f"last_{k}" if k in one else k: v for k, v in e.diagnostics.items()}
            for one, e in zip(own, stepped, strict=True)
        ]
        assert RunFolder(tmp_path).steps() == expected and all("last_loss" in one for one in expected)
        assert all("gradient_norm" in one and "cosine" in one for one in expected)
        measured = [event for event in told if isinstance(event, events.Measured)]
        assert RunFolder(tmp_path).measures() == [{"epoch": e.epoch, "step": e.step, **e.values} for e in measured]
        assert [e.epoch for e in measured] == [1, 2]

    def test_what_cannot_be_measured_is_told_and_ends_nothing(self, tmp_path, monkeypatch):
        def broken(*_, **__):
            raise MemoryError("no room")

        monkeypatch.setattr("flatmin.measure.sections.average_case", broken)
        result, told = run(config(epochs=2), tmp_path, measure_every=1, measures="model,sharpness")
        assert result.failure is None and [line["epoch"] for line in RunFolder(tmp_path).measures()] == [1, 2]
        assert all("worst_case" in line and "average_case" not in line for line in RunFolder(tmp_path).measures())
        texts = [event.text for event in told if isinstance(event, events.Warned)]
        assert sum(t.startswith("average case could not be measured: MemoryError: no room") for t in texts) == 2
        monkeypatch.setattr("flatmin.train.measuring.Problem", broken)
        result, told = run(config(epochs=1), tmp_path / "other", measure_every=1)
        texts = [event.text for event in told if isinstance(event, events.Warned)]
        assert result.failure is None
        assert any(text.startswith("nothing could be measured: MemoryError: no room") for text in texts)

    def test_m_sharpness_is_that_of_the_report(self, tmp_path):
        """Of all training samples, after the last epoch, in the groups and within the radius that were asked for."""
        nets, how = [], {"measure_every": 2, "measures": "sharpness", "measure_m": 7, "measure_rho": 0.3}
        run(config(epochs=2, selection="last"), tmp_path, on_end=nets.append, **how)
        data = load_data(config())
        nets[0].eval()
        problem = Problem(nets[0], nn.functional.cross_entropy, (data.train.x, data.train.y))
        line = RunFolder(tmp_path).measures()[-1]
        assert line["m_sharpness"] == pytest.approx(m_sharpness(problem, 7, 0.3).value, rel=1e-4)
        assert line["worst_case"] == pytest.approx(worst_case(problem, 0.3).value, rel=1e-4)
        assert line["m_sharpness"] > line["worst_case"] > 0

    def test_groups_that_the_data_cannot_fill_are_refused_before_the_first_step(self, tmp_path):
        told = []
        how = Options(measure_every=1, measures="sharpness", measure_m=51)
        message = r"^measure_m=51 is more than the 50 samples that are measured on; use fewer\.$"
        with pytest.raises(ValueError, match=message):
            train(config(), folder=RunFolder(tmp_path / "run"), options=how, on_event=told.append)
        assert not told and not (tmp_path / "run").exists()

    def test_a_skipped_update_leaves_valid_json_and_means_of_the_others(self, tmp_path):
        settings = config(epochs=1, nonfinite="skip", model=f"{HERE}:blank_in_the_second", method="sgd", rho=None)
        result, told = run(settings, tmp_path, log_every=1)
        assert result.failure is None and lines(told)[0].skipped == 1

        def refuse(word):
            raise AssertionError(word)

        text = (tmp_path / "steps.jsonl").read_text()
        steps = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
        good = [step["loss"] for step in steps if step["loss"] is not None]
        assert len(good) == 3 and lines(told)[0].train_loss == pytest.approx(sum(good) / 3)

    def test_a_listener_of_epochs(self):
        found = []
        train(config(epochs=2), on_epoch=found.append)
        assert [line.epoch for line in found] == [1, 2]


class TestLookingChangesNothing:
    @pytest.mark.parametrize(
        ("method", "options"),
        [
            (
                "rsam",
                {"measure_every": 1, "measures": "hessian,sharpness", "measure_examples": 30, "measure_m": 10},
            ),
            ("vasso", {"diagnostics": True}),
            ("vasso", {"log_every": 0, "weights": False, "signals": False}),
            ("rsam", {"log_every": 1, "checkpoint_steps": 1}),
            ("vasso", {"checkpoint_every": 0}),
        ],
    )
    def test_options_leave_the_run_bit_for_bit(self, tmp_path, method, options):
        settings = config(method=method, epochs=2, model=f"{HERE}:dropping", ema=0.9, test_every=1)
        outcomes = []
        for name, some in (("plain", {}), ("other", options)):
            states = []
            result, told = run(
                settings, tmp_path / name, on_end=lambda model, states=states: states.append(model.state_dict()), **some
            )
            outcomes.append((timeless(result), [timeless(line) for line in lines(told)], dict(states[0])))
        assert same_bits(*outcomes)

    def test_a_listener_that_draws(self):
        settings = config(epochs=2, model=f"{HERE}:dropping")
        plain, _ = run(settings)
        assert timeless(run(settings, on_end=lambda model: torch.rand(5))[0]) == timeless(plain)


class Stop(Exception):
    pass


class TestLeftAsItWas:
    def states(self):
        return (
            torch.get_rng_state().tolist(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
            torch.backends.cuda.matmul.allow_tf32,
            torch.is_autocast_enabled("cpu"),
            torch.is_grad_enabled(),
            torch.get_num_threads(),
            dict(os.environ),
            [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)],
        )

    @pytest.mark.parametrize(
        ("changes", "ends"),
        [
            ({}, "well"),
            *(
                ({"deterministic": True, "precision": "bf16", "tf32": True}, ends)
                for ends in ("well", "by an error", "by a wrong configuration")
            ),
        ],
    )
    def test_global_switches_random_state_variables_and_signals(self, tmp_path, changes, ends):
        before = self.states()
        inside = []

        def listen(event):
            inside.append(self.states())
            if ends == "by an error" and isinstance(event, events.EpochEnded):
                raise Stop

        settings = config(epochs=2, model=f"{HERE}:dropping", **changes)
        if ends == "well":
            run(settings, tmp_path, on_event=listen)
        elif ends == "by an error":
            with pytest.raises(Stop):
                run(settings, tmp_path, on_event=listen)
        else:
            with pytest.raises(ValueError, match="larger than the 50"):
                run(dataclasses.replace(settings, batch_size=51), tmp_path, on_event=listen)
        assert self.states() == before
        if ends != "by a wrong configuration":
            assert {state[1] for state in inside} == {bool(changes)}
            assert all(("CUBLAS_WORKSPACE_CONFIG" in state[9]) is bool(changes) for state in inside)

    def test_what_was_set_before_is_set_again(self, monkeypatch):
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            seen = []
            run(config(epochs=1), on_event=lambda event: seen.append(os.environ["CUBLAS_WORKSPACE_CONFIG"]))
            run(config(epochs=1, deterministic=True))
            assert set(seen) == {":16:8"} and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
            assert torch.is_deterministic_algorithms_warn_only_enabled()
        finally:
            torch.use_deterministic_algorithms(False)

    def test_the_random_state_before_does_not_matter(self):
        results = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            results.append(timeless(run(config(epochs=2, model=f"{HERE}:dropping"))[0]))
        assert results[0] == results[1]


class TestTrackers:
    @pytest.fixture
    def made(self, monkeypatch):
        """What trackers were made with, and what they were told; one of them fails."""
        found = {}

        class Told:
            def __init__(self, name):
                self.name, self.events, self.closed = name, [], 0

            def __call__(self, event):
                self.events.append(event)
                if self.name == "mlflow" and isinstance(event, events.EpochEnded):
                    raise RuntimeError("no connection")

            def close(self):
                self.closed += 1

        def make(name, **given):
            found[name] = (given, Told(name))
            return found[name][1]

        monkeypatch.setattr(trackers, "make_tracker", make)
        return found

    def test_they_are_made_and_told_and_closed(self, made, tmp_path):
        path = tmp_path / "mine"
        _, told = run(config(epochs=2), path, trackers=("tensorboard", "wandb"), project="p")
        assert list(made) == ["tensorboard", "wandb"]
        for given, tracker in made.values():
            assert given == {"folder": path, "run": "mine", "project": "p", "resume": False}
            assert [e for e in tracker.events if not isinstance(e, events.Ticked)] == told
            assert tracker.closed == 1

    def test_they_are_told_that_a_run_goes_on(self, made, tmp_path):
        run(config(epochs=1), tmp_path, trackers=("wandb",), resume=True)
        assert made["wandb"][0]["resume"] is True

    def test_one_that_fails_is_dropped_with_a_word(self, made, tmp_path):
        result, told = run(config(epochs=2), tmp_path, trackers=("mlflow", "wandb"))
        warned = [event.text for event in told if isinstance(event, events.Warned)]
        assert len(warned) == 1 and "tracker mlflow failed (RuntimeError: no connection)" in warned[0]
        assert result.failure is None
        assert sum(isinstance(e, events.EpochEnded) for e in made["mlflow"][1].events) == 1
        assert isinstance(made["wandb"][1].events[-1], events.Ended)

    def test_they_are_closed_after_an_error(self, made, tmp_path):
        def stop(event):
            if isinstance(event, events.EpochEnded):
                raise Stop

        with pytest.raises(Stop):
            run(config(), tmp_path, trackers=("wandb",), on_event=stop)
        assert made["wandb"][1].closed == 1

    def test_without_a_folder_there_are_none(self, made):
        run(config(epochs=1), trackers=("wandb",))
        assert not made

    @pytest.mark.parametrize(
        ("name", "error", "words"),
        [
            ("tensorbord", ValueError, r"^unknown tracker 'tensorbord'; did you mean 'tensorboard'\?"),
            ("wandb", ModuleNotFoundError, r"^the tracker wandb needs wandb, .*: pip install '\.\[wandb\]' "),
        ],
    )
    def test_what_is_missing_is_said_before_anything_is_written(self, monkeypatch, tmp_path, name, error, words):
        monkeypatch.setattr(trackers, "_installed", lambda module: False)
        with pytest.raises(error, match=words):
            run(config(), tmp_path / "run", trackers=(name,))
        assert not (tmp_path / "run").exists()


class TestRefusedBeforeAnythingIsWritten:
    def test_one_sentence(self, tmp_path):
        for changes, words in [
            ({"batch_size": 51}, r"^batch_size=51 is larger than the 50 training samples"),
            ({"accumulate": 17}, r"^accumulate=17 is more than the"),
            ({"train_size": 51}, r"^train_size=51 is more than the 50 training samples"),
            ({"milestones": (2,)}, r"^constant does not use milestones"),
            ({"ascent_sync": "none"}, r"^ascent_sync=none is for several processes"),
            ({"model": f"{HERE}:nett"}, r"no function 'nett'; did you mean 'net'"),
            ({"model": "resnet18"}, r"^the network 'resnet18' needs images"),
            ({"model": "mlp", "model_params": {"widht": 3}}, r"^model=mlp has no option 'widht'"),
            ({"method": "sam-on", "model": f"{HERE}:dropping"}, r"^Layers: no layer matches"),
            ({"method": "vasso", "params": {"direction.theta": 2.0}}, r"theta must be"),
            ({"params": {"direction.theta": 0.5}}, r"theta"),
            ({"statistics": "cifar10"}, r"statistics are required for images of bytes"),
            ({"crop": 2}, r"^crop needs images stored as bytes"),
            ({"noise": 0.2, "noise_kind": "asymmetric"}, r"^noise_kind=asymmetric is defined for"),
            ({"method": "sgdhess", "precision": "fp16"}, r"fp16|float16|scaler"),
        ]:
            with pytest.raises(ValueError, match=words) as caught:
                run(config(**changes), tmp_path / "run")
            assert str(caught.value).count("\n") == 0
            assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_resumed(tmp_path):
    run(config(epochs=1), tmp_path)
    before = (tmp_path / "result.json").read_bytes()
    with pytest.raises(ValueError, match=r"is finished, so there is nothing to continue"):
        train(config(epochs=1), folder=RunFolder(tmp_path), resume=True)
    assert (tmp_path / "result.json").read_bytes() == before
