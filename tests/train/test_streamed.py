"""Training on images that stay files: the same batches as in memory, in every number of processes, and again."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from typer.testing import CliRunner

from flatmin.cli.main import app, main
from flatmin.data import dataset
from flatmin.data.augment import Augment
from flatmin.data.dataset import Data, Split
from flatmin.data.folder import scan_folder
from flatmin.data.images import IMAGENET
from flatmin.data.loader import load_files
from flatmin.data.streamed import FileImages
from flatmin.data.views import Centre
from flatmin.study import measuring
from flatmin.train import evaluate
from flatmin.train.feed import Feed
from flatmin.train.fingerprint import data_digest
from flatmin.train.loop import train
from flatmin.train.measuring import check, measured
from flatmin.train.options import Options
from flatmin.train.processes import World
from flatmin.train.sources import load_data
from flatmin.train.trainer import Trainer
from tests.helpers import same_bits
from tests.pictures import cut_short, tree
from tests.train.runs import HERE, At, Stop, config, go, left_alone, options, outcome

pytest.importorskip("PIL.Image", reason="Pillow makes the images that are read here")

pytestmark = [
    # A machine with one core, and Python's word on fork where other threads run: neither is what is tested here.
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

SIDE = 8
AUGMENT = Augment(crop=1, cutout=3)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """50 images to train and validate on, 12 to test; to be read only."""
    return tree(tmp_path_factory.mktemp("images"), train=50, val=12)


@pytest.fixture
def root(kept, tmp_path):
    """The same, to be broken."""
    return shutil.copytree(kept, tmp_path / "images")


def settings(root, **changes):
    """Two epochs of four updates: 12 images of 45 in each, and a last batch of 9."""
    usual = {"data": "imagenet", "data_dir": str(root), "image_size": SIDE, "batch_size": 12, "epochs": 2}
    return config(**{**usual, **changes})


def pair(root, *, workers=0, augment=AUGMENT):
    """The same images as files and in memory; the view of training draws nothing."""
    files = scan_folder(root / "train")
    y = torch.tensor(files.labels)
    view = Centre(SIDE)
    parts = (FileImages(files, view, view, workers=workers), load_files(files, view).x)
    known = {"num_classes": 3, "statistics": IMAGENET, "augment": augment}
    return [Data(Split(x, y), Split(x, y), Split(x, y), **known) for x in parts]


def feed(data, *, rank=0, size=1, **changes):
    return Feed(data, config(batch_size=12, **changes), World(rank, size, rank))


def epochs(one, count=2):
    return [list(one.epoch()) for _ in range(count)]


def same(one, two):
    return same_bits([[vars(b) for b in epoch] for epoch in one], [[vars(b) for b in epoch] for epoch in two])


class TestBatches:
    @pytest.mark.parametrize("changes", [{}, {"drop_last": True}, {"channels_last": True}])
    @pytest.mark.parametrize("workers", [0, 2])
    def test_those_of_memory_where_the_views_are_the_same(self, kept, workers, changes):
        one, two = (feed(data, **changes) for data in pair(kept, workers=workers))
        assert same(epochs(one), epochs(two))
        states = [f.state_dict(inside=inside) for f in (one, two) for inside in (False, True)]
        assert same_bits(states[:2], states[2:])

    def test_without_an_augmentation(self, kept):
        one, two = (feed(data) for data in pair(kept, augment=None))
        assert same(epochs(one), epochs(two))

    def test_the_same_for_any_number_of_workers(self, kept):
        found = [epochs(Trainer(settings(kept, workers=workers)).feed) for workers in (0, 1, 2)]
        assert same(found[0], found[1]) and same(found[0], found[2])
        assert [len(batch) for batch in found[0][0]] == [12, 12, 12, 9]
        by_index = [{int(k): x for b in epoch for k, x in zip(b.index, b.x, strict=True)} for epoch in found[0]]
        assert sum(torch.equal(by_index[0][k], by_index[1][k]) for k in range(45)) == 0, "other parts every epoch"

    @pytest.mark.parametrize("size", [2, 3])
    def test_processes_share_what_one_would_see(self, kept, size):
        data = load_data(settings(kept))
        alone = epochs(feed(data))
        shares = [epochs(feed(data, rank=rank, size=size)) for rank in range(size)]
        for number in range(2):
            for k, batch in enumerate(alone[number]):
                parts = [share[number][k] for share in shares]
                left = len(batch) - len(batch) % size
                assert [len(part) for part in parts] == [left // size] * size
                for name in ("x", "y", "index"):
                    both = torch.cat([getattr(part, name) for part in parts])
                    assert torch.equal(both, getattr(batch, name)[:left])

    @pytest.mark.parametrize("start", [0, 1, 3, 4])
    def test_going_on_inside_an_epoch_reads_only_the_rest(self, kept, start, monkeypatch):
        data = load_data(settings(kept))
        alone = epochs(feed(data), 3)
        first = feed(data)
        list(first.epoch())
        begun = first.epoch()
        for _ in range(start):
            next(begun)
        state = first.state_dict(inside=True) if start else first.state_dict(inside=False)
        second = feed(data)
        second.load_state_dict(state)
        asked = []
        monkeypatch.setattr(FileImages, "check", lambda self: asked.append(len(self)))
        assert same([list(second.epoch(start)), list(second.epoch())], [alone[1][start:], alone[2]])
        assert asked == [45, 5, 12]

    def test_noise_is_on_the_labels_that_are_trained_on(self, kept):
        data = load_data(settings(kept, noise=0.4))
        assert int(data.wrong.sum()) == 18
        for batch in feed(data).epoch():
            assert torch.equal(batch.y, data.train.y[batch.index])


class TestResume:
    @pytest.mark.parametrize("workers", [(0, 0), (2, 0), (0, 2)])
    def test_stopped_inside_an_epoch(self, kept, tmp_path, workers):
        """Bit for bit, also with another number of workers."""
        how = options(checkpoint_steps=1)
        run = settings(kept, model=f"{HERE}:image_net", noise=0.2)
        alone = left_alone(tmp_path, run, how)
        with pytest.raises(Stop):
            go(tmp_path / "run", dataclasses.replace(run, workers=workers[0]), how, At("step 6"))
        go(tmp_path / "run", dataclasses.replace(run, workers=workers[1]), how)
        assert same_bits(outcome(tmp_path / "run"), alone)


class TestFilesThatCannotBeRead:
    def weights(self, trainer):
        return [p.detach().clone() for p in trainer.model.parameters()]

    @pytest.mark.parametrize("part", ["train", "val"])
    def test_no_image_is_told_before_the_first_update(self, root, part):
        broken = sorted((root / part).rglob("*.png"))[-1]
        broken.write_text("<html>")
        trainer = Trainer(settings(root))
        with pytest.raises(ValueError, match=rf"^\S*{broken.name} cannot be read as an image: [^\n]*$"):
            next(trainer.batches())

    @pytest.mark.parametrize("workers", [0, 2])
    def test_one_cut_short_is_told_before_the_update_of_its_batch(self, root, workers):
        trainer = Trainer(settings(root, workers=workers))
        order = torch.cat([batch.index for batch in Feed(trainer.data, trainer.config).epoch()])
        x = trainer.data.train.x
        broken = x.files.root / x.files.paths[int(x.chosen[order[20]])]
        cut_short(broken)
        batches = trainer.batches()
        trainer.step(next(batches))
        before = self.weights(trainer)
        with pytest.raises(ValueError, match=rf"^\S*{broken.name} cannot be read as an image: [^\n]*$"):
            trainer.step(next(batches))
        assert same_bits(before, self.weights(trainer)) and trainer.steps == 1

    def test_the_run_goes_on_once_it_is_replaced(self, root, tmp_path):
        go(tmp_path / "alone", settings(root))
        broken = sorted((root / "train").rglob("*.png"))[0]
        whole = broken.read_bytes()
        cut_short(broken)
        with pytest.raises(ValueError, match=broken.name):
            go(tmp_path / "run", settings(root))
        broken.write_bytes(whole)
        go(tmp_path / "run", settings(root))
        assert same_bits(outcome(tmp_path / "run"), outcome(tmp_path / "alone"))


class TestMeasuring:
    def test_scores_are_those_of_memory(self, kept):
        one, two = pair(kept, workers=2)
        model = Trainer(settings(kept)).model
        run = settings(kept)
        assert evaluate.score(model, one, one.train, run, size=7) == evaluate.score(model, two, two.train, run, size=7)
        wrong = [data.with_labels((data.train.y + 1) % 3) for data in (one, two)]
        assert evaluate.memorised(model, wrong[0], run) == evaluate.memorised(model, wrong[1], run)
        assert evaluate.sharpness(model, one) == evaluate.sharpness(model, two)

    def test_large_images_in_smaller_batches(self):
        y = torch.zeros(40, dtype=torch.int64)
        data = Data(*[Split(torch.zeros(40, 3, 128, 128), y)] * 3, num_classes=1)
        assert [len(y) for _, y in evaluate.batches(data, data.train, 20)] == [5] * 8
        small = Data(*[Split(torch.zeros(40, 3, 64, 64), y)] * 3, num_classes=1)
        assert [len(y) for _, y in evaluate.batches(small, small.train, 20)] == [20, 20]

    def test_some_examples(self, kept):
        trainer = Trainer(settings(kept))
        found = measured(trainer, Options(measures="sharpness", measure_examples=9), pytest.fail)
        one, two = pair(kept)
        view = measuring.View(examples=9, batch=4)
        for (a, b), (c, d) in zip(measuring.batches(one, view), measuring.batches(two, view), strict=True):
            assert torch.equal(a, c) and torch.equal(b, d)
        assert found

    def test_more_than_memory_holds_is_refused(self, kept, monkeypatch):
        trainer = Trainer(settings(kept))
        monkeypatch.setattr(dataset, "HELD", 4 * 3 * SIDE**2 * 10)
        said = r"^the measurements keep .*, and {} images of shape \(3, 8, 8\) take .*; use at most 10 images"
        with pytest.raises(ValueError, match=said.format(45)):
            load_data(settings(kept, measure=True))
        load_data(settings(kept, measure=True, train_size=10))
        with pytest.raises(ValueError, match=said.format(45)):
            evaluate.sharpness(trainer.model, trainer.data)
        with pytest.raises(ValueError, match=said.format(11)):
            check(trainer, Options(measure_every=1, measures="sharpness", measure_examples=11))
        with pytest.raises(ValueError, match=said.format(45)):
            list(measuring.batches(trainer.data, measuring.View()))
        assert len(list(measuring.batches(trainer.data, measuring.View(examples=10, batch=5)))) == 2
        two = pair(kept)[1]
        assert list(measuring.batches(two, measuring.View())), "what is in memory is there already"

    def test_the_digest_is_of_names_and_content(self, root):
        data = [load_data(settings(root, workers=workers)) for workers in (0, 2)]
        first = data_digest(data[0])
        assert data_digest(data[1]) == first
        assert data_digest(load_data(settings(root, split_seed=9))) != first
        path = sorted((root / "val").rglob("*.png"))[0]
        path.write_bytes(path.read_bytes() + b" ")
        assert data_digest(data[0]) != first


class TestCommand:
    def words(self, root, out, data, **changes):
        given = {"data": data, "data_dir": root, "image_size": SIDE, "batch_size": 8, "epochs": 2, **changes}
        return ["train", "smoke", *(f"{key}={value}" for key, value in given.items()), "--out", str(out), "--name", "x"]

    @pytest.mark.parametrize("data", ["images", "imagenet"])
    @pytest.mark.parametrize("model", ["mlp", "conv"])
    def test_from_a_folder_of_images_to_a_result(self, kept, tmp_path, data, model):
        words = self.words(kept, tmp_path, data, model=model)
        result = CliRunner().invoke(app, words, env={"COLUMNS": "100"}, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        found = json.loads((tmp_path / "runs" / "x" / "result.json").read_text())
        assert found["failure"] is None and 0 <= found["chosen"]["test_acc"] <= 100

    @pytest.mark.slow
    def test_in_a_process_of_its_own_with_workers(self, kept, tmp_path):
        command = [sys.executable, "-m", "flatmin"]
        words = self.words(kept, tmp_path, "imagenet", workers=2)
        done = subprocess.run([*command, *words], check=False, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr

    def test_what_a_worker_cannot_read_is_one_sentence(self, root, tmp_path, capfd):
        """On the standard error of this process, which the workers share."""
        broken = sorted((root / "train").rglob("*.png"))[0]
        broken.write_text("<html>")
        with pytest.raises(SystemExit) as stopped:
            main(self.words(root, tmp_path, "imagenet", workers=2))
        err = capfd.readouterr().err
        assert stopped.value.code not in (0, None) and "Traceback" not in err
        assert f"{broken.name} cannot be read as an image" in " ".join(err.split())

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
    def test_a_signal_to_all_processes_ends_in_a_checkpoint(self, kept, tmp_path, name):
        """As a terminal sends it for Ctrl-C: to the workers too."""
        words = self.words(kept, tmp_path, "imagenet", workers=2, epochs=500, log_every=1)
        run = subprocess.Popen(
            [sys.executable, "-m", "flatmin", *words], start_new_session=True, stderr=subprocess.PIPE, text=True
        )
        steps = tmp_path / "runs" / "x" / "steps.jsonl"
        while run.poll() is None and not (steps.exists() and steps.stat().st_size):
            time.sleep(0.05)
        os.killpg(run.pid, getattr(signal, name))
        said = run.communicate(timeout=60)[1]
        assert run.returncode == 130, said
        assert said.startswith("Interrupted after ") and said.count("\n") == 1

    def test_the_preset_of_imagenet(self, kept, tmp_path):
        small = {"data_dir": kept, "batch_size": 8, "val_share": 0.2, "workers": 0, "image_size": 32}
        words = ["train", "imagenet-resnet50", *(f"{key}={value}" for key, value in small.items()), "--dry-run"]
        result = CliRunner().invoke(app, [*words, "--out", str(tmp_path)], env={"COLUMNS": "100"})
        assert result.exit_code == 0, result.output


def test_train_takes_files_of_the_users_own(kept):
    one, two = pair(kept)
    run = settings(kept, model=f"{HERE}:plain_net", epochs=1)
    first, second = (train(run, data=data) for data in (one, two))
    assert dataclasses.replace(first, seconds=0) == dataclasses.replace(second, seconds=0)
