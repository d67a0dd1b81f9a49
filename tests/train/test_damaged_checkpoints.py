"""A checkpoint that is not whole is passed over, with a word, and one of another run is refused."""

import errno
import hashlib
import io
import os
import pathlib
import random
import shutil

import pytest
import torch

from flatmin.train import checkpoint
from flatmin.train.events import Began, Warned
from flatmin.train.folder import RunFolder
from flatmin.train.loop import train
from tests.helpers import same_bits
from tests.train.runs import At, Stop, config, content, go, options, outcome, saved_steps

CONFIG = config(method="rsam", ema=0.8)


def named(content, step=11):
    """The name of a checkpoint with this content."""
    return f"step-{step:09d}-{hashlib.sha256(content).hexdigest()[:16]}.pt"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that was stopped after its checkpoints of the updates 8 and 9, and one that was left alone."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.raises(Stop):
        go(folder / "stopped", CONFIG, None, At("step 11"))
    go(folder / "alone", CONFIG)
    assert saved_steps(folder / "stopped") == [9, 8]
    return folder


@pytest.fixture
def stopped(runs, tmp_path):
    shutil.copytree(runs / "stopped", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def files(stopped):
    """The two checkpoints, the newest first."""
    return checkpoint.listed(stopped / "checkpoints")


def resumed(path):
    """Where it continued, and its warnings."""
    told = go(path, CONFIG)
    return next(e.step for e in told if isinstance(e, Began)), [e.text for e in told if isinstance(e, Warned)]


def as_left_alone(path, runs):
    return same_bits(outcome(path), outcome(runs / "alone"))


class TestPassedOver:
    @pytest.mark.parametrize("seed", range(4))
    def test_one_that_is_cut_short_anywhere(self, stopped, files, runs, seed):
        size = files[0].stat().st_size
        os.truncate(files[0], random.Random(seed).randrange(1, size))
        step, warnings = resumed(stopped)
        assert step == 8
        assert warnings == [f"the checkpoint {files[0]} is truncated or damaged. It is skipped."]
        assert as_left_alone(stopped, runs)

    @pytest.mark.parametrize("seed", range(4))
    def test_one_with_a_single_wrong_bit(self, stopped, files, seed):
        damaged = bytearray(files[0].read_bytes())
        draw = random.Random(seed)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        files[0].write_bytes(damaged)
        step, warnings = resumed(stopped)
        assert step == 8 and "truncated or damaged" in warnings[0] and str(files[0]) in warnings[0]

    def test_one_that_is_empty(self, stopped, files):
        files[0].write_bytes(b"")
        step, (warning,) = resumed(stopped)
        assert step == 8 and str(files[0]) in warning

    def test_one_that_cannot_be_read(self, stopped, files, monkeypatch):
        opened = pathlib.Path.open

        def refuse(path, *rest, **more):
            if path == files[0]:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return opened(path, *rest, **more)

        monkeypatch.setattr(pathlib.Path, "open", refuse)
        step, (warning,) = resumed(stopped)
        assert step == 8
        assert warning == f"the checkpoint {files[0]} cannot be read: Permission denied. It is skipped."

    def test_a_folder_by_such_a_name(self, stopped, files):
        files[0].unlink()
        files[0].mkdir()
        assert resumed(stopped) == (8, [])

    @pytest.mark.parametrize("content", [b"not a checkpoint", b"\x80\x02.", b"PK\x03\x04 and no more"])
    def test_one_that_is_whole_and_something_else(self, stopped, content):
        other = stopped / "checkpoints" / named(content)
        other.write_bytes(content)
        step, (warning,) = resumed(stopped)
        assert step == 9 and str(other) in warning

    def test_one_of_another_format(self, stopped):
        buffer = io.BytesIO()
        torch.save({"format": 99, "step": 11}, buffer)
        other = stopped / "checkpoints" / named(buffer.getvalue())
        other.write_bytes(buffer.getvalue())
        step, (warning,) = resumed(stopped)
        assert step == 9 and "has format 99, expected 1" in warning

    @pytest.mark.parametrize("name", ["step-000000011.pt", "last.pt", ".step.0123abcd", "step-11-0123456789abcdef.pt"])
    def test_files_by_other_names_are_none_of_ours(self, stopped, files, name):
        (stopped / "checkpoints" / name).write_bytes(files[0].read_bytes())
        assert resumed(stopped) == (9, [])

    def test_both_and_it_begins_from_the_start(self, stopped, files, runs):
        for file in files:
            os.truncate(file, 100)
        step, warnings = resumed(stopped)
        assert step == 0
        assert [str(file) in warning for file, warning in zip(files, warnings[:2], strict=True)] == [True, True]
        assert "starts from the beginning" in warnings[2] and len(warnings) == 3
        assert as_left_alone(stopped, runs)

    def test_none_are_there_and_it_begins_without_a_word(self, stopped, files, runs):
        shutil.rmtree(stopped / "checkpoints")
        assert resumed(stopped) == (0, [])
        assert as_left_alone(stopped, runs)

    def test_a_damaged_one_does_not_push_out_a_good_one(self, stopped, files):
        os.truncate(files[0], 100)
        with pytest.raises(Stop):
            go(stopped, CONFIG, options(checkpoint_steps=2), At("step 11"))
        good = [path for path in checkpoint.listed(stopped / "checkpoints") if path.stat().st_size > 100]
        assert [int(path.name[5:14]) for path in good] == [10, 8]


class TestRefused:
    """One sentence, before any step, and nothing on disk is changed."""

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"method": "sam"}, "method is 'rsam' there and 'sam' here"),
            ({"lr": 0.2}, "lr is 0.1 there and 0.2 here"),
            ({"seed": 1}, "seed is 0 there and 1 here"),
            ({"epochs": 4}, "epochs is 3 there and 4 here"),
            ({"epochs": 4, "lr": 0.2}, "lr is 0.1 there and 0.2 here, epochs is 3 there and 4 here"),
            ({"ema": None}, "ema is 0.8 there and None here"),
            ({"optimizer": "adamw"}, "optimizer is 'sgd' there and 'adamw' here"),
            ({"model": "tests.train.runs:plain_net"}, "model is .*image_net.* there and .*plain_net.* here"),
        ],
    )
    def test_a_checkpoint_of_another_run(self, stopped, changes, words):
        before, told = content(stopped), []
        other = config(**{"method": "rsam", "ema": 0.8, **changes})
        with pytest.raises(
            ValueError, match=rf"^the checkpoint in .* belongs to another run: {words}.*; use the same"
        ) as error:
            go(stopped, other, None, told.append)
        assert "\n" not in str(error.value)
        assert told == [] and content(stopped) == before

    def test_a_checkpoint_of_another_number_of_processes(self, stopped, files):
        state = torch.load(files[0], weights_only=True)
        buffer = io.BytesIO()
        torch.save({**state, "processes": 2}, buffer)
        (stopped / "checkpoints" / named(buffer.getvalue())).write_bytes(buffer.getvalue())
        before, told = content(stopped), []
        with pytest.raises(ValueError, match=r"^the checkpoint was written by 2 process\(es\), but this run has 1"):
            go(stopped, CONFIG, None, told.append)
        assert told == [] and content(stopped) == before

    def test_where_the_data_are_is_not_part_of_a_run(self, stopped):
        moved = config(method="rsam", ema=0.8, data_dir="elsewhere", workers=3)
        assert go(stopped, moved)[0].step == 9


def test_beginning_anew_takes_the_checkpoints_away(stopped, runs):
    train(CONFIG, folder=RunFolder(stopped), options=options(), on_event=lambda event: None)
    assert as_left_alone(stopped, runs)
