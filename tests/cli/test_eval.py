"""`flatmin eval`: the numbers of a run's kept weights on its own data and on others, and how it refuses."""

import dataclasses
import json

import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

from flatmin.cli.main import app, main
from flatmin.data.dataset import Data, Split, as_data
from flatmin.data.images import Statistics
from flatmin.stats import share_interval
from flatmin.train import reevaluate as module
from flatmin.train import saved
from flatmin.train.config import RunConfig
from flatmin.train.folder import RunFolder
from flatmin.train.loop import train
from flatmin.train.reevaluate import Asked, reevaluate
from flatmin.train.saved import open_run
from tests.user_side import data as clouds

runner = CliRunner()
CONFIG = RunConfig(
    method="sam", rho=0.1, epochs=2, batch_size=25, noise=0.2, data="tests.user_side:data", model="tests.user_side:net"
)
HERE = "tests.cli.test_eval"


def pictures(low=0, high=200):
    g = torch.Generator().manual_seed(0)
    return tuple((torch.randint(low, high, (n, 2, 4, 4), generator=g).byte(), torch.arange(n) % 7) for n in (42, 9, 23))


def brighter():
    """Other images, with statistics of their own."""
    return pictures(100, 256)


def small(num_classes, in_channels, image_size):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(in_channels * image_size**2, num_classes))


def shifted():
    return tuple((x + 1, y) for x, y in clouds())


def two():
    return tuple((x, y % 2) for x, y in clouds())


def wide():
    return tuple((x.repeat(1, 2), y) for x, y in clouds())


def lacking():
    """Three classes, of which the test part has two."""
    (x, y), (u, v), (s, t) = clouds()
    return Data(Split(x, y), Split(u, v), Split(s[t < 2], t[t < 2]), num_classes=3, name="lacking")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = RunFolder(tmp_path_factory.mktemp("eval") / "clouds")
    train(CONFIG, folder=folder)
    return folder.path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = RunFolder(tmp_path_factory.mktemp("eval") / "images")
    config = dataclasses.replace(CONFIG, data=f"{HERE}:pictures", model=f"{HERE}:small", noise=0.0, lr=0.05)
    train(config, folder=folder)
    return folder.path


def invoke(*given):
    found = runner.invoke(app, ["eval", *map(str, given)], env={"COLUMNS": "100"}, catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.output


def numbers(*given):
    return json.loads(invoke(*given, "--json"))


@pytest.fixture
def refused(capsys):
    def run(*given):
        with pytest.raises(SystemExit) as stop:
            main(["eval", *map(str, given)])
        said = capsys.readouterr()
        assert stop.value.code == 2, said.err
        assert said.err.startswith("flatmin: ") and said.err.count("\n") == 1 and said.out == ""
        return said.err

    return run


class TestItsOwnData:
    def test_the_numbers_are_those_of_the_result(self, folder, images):
        for one in (folder, images):
            chosen, found = RunFolder(one).result().chosen, numbers(one)
            assert (found["loss"], found["acc"], found["top5"]) == (
                chosen["test_loss"], chosen["test_acc"], chosen["test_top5"]
            )  # fmt: skip
            assert found["split"] == "test" and found["device"] == "cpu" and found["precision"] == "float32"

    def test_another_part(self, folder, images):
        assert numbers(folder, "--split", "val")["acc"] == RunFolder(folder).result().chosen["val_acc"]
        found = numbers(folder, "--split", "train")
        assert found["loss"] == pytest.approx(RunFolder(folder).result().train_ce, abs=1e-12)
        assert (found["samples"], found["wrong"]) == (50, 20)
        assert "20 % of these labels are wrong (label noise)" in invoke(folder, "--split", "train")

    def test_top5_with_more_than_five_classes(self, folder, images):
        assert numbers(folder)["top5"] is None and "top-5" not in invoke(folder)
        assert 0 < numbers(images)["top5"] <= 100 and "top-5" in invoke(images)

    def test_classes_add_up(self, images):
        found = numbers(images, "--classes")
        assert [one["samples"] for one in found["classes"]] == [4, 4, 3, 3, 3, 3, 3]
        right = sum(one["samples"] * one["acc"] for one in found["classes"]) / 23
        assert right == pytest.approx(found["acc"])
        assert numbers(images)["classes"] == []
        assert invoke(images, "--classes").count("%") == 2 + 1 + 7

    def test_a_class_without_samples(self, folder):
        found = numbers(folder, "--data", f"{HERE}:lacking", "--classes")
        assert [one["samples"] for one in found["classes"]] == [10, 10, 0] and found["classes"][2]["acc"] is None
        assert invoke(folder, "--data", f"{HERE}:lacking", "--classes").splitlines()[-1].split() == ["2", "0", "-"]

    def test_the_size_of_a_batch_does_not_matter(self, images):
        whole, parts = (numbers(images, "--batch", size, "--classes") for size in (1000, 2))
        assert parts["classes"] == whole["classes"] and parts["loss"] == pytest.approx(whole["loss"], abs=1e-6)

    def test_mirrored_images(self, images):
        saved = open_run(images)
        data, model = saved.data(), saved.model().eval()
        x = data.inputs(data.test.x)
        with torch.no_grad():
            logits = (model(x) + model(x.flip(3))) / 2
        found = numbers(images, "--flip-tta")
        assert found["loss"] == pytest.approx(F.cross_entropy(logits.double(), data.test.y).item(), abs=1e-6)
        assert found["flip_tta"] and not numbers(images)["flip_tta"]
        assert "averaged over each image and its mirror image" in invoke(images, "--flip-tta")

    def test_the_interval_is_wilsons(self, folder):
        found = numbers(folder)
        low, high = share_interval(round(0.3 * found["acc"]), 30)
        assert (found["acc_low"], found["acc_high"]) == (100 * low, 100 * high)
        assert low < found["acc"] / 100 < high or found["acc"] == 100

    def test_a_person_reads(self, folder):
        said = invoke(folder)
        assert said.startswith("clouds: sam, tests.user_side:net trained on tests.user_side:data\ntest part of ")
        assert "30 samples, on cpu\n" in said and "normalised" not in said
        assert f"top-1  {numbers(folder)['acc']:8.2f} %  (95 % interval over the samples: " in said

    def test_a_run_of_before_data_json(self, folder, tmp_path):
        again = RunFolder(tmp_path / "old")
        train(CONFIG, folder=again)
        (again.path / "data.json").unlink()
        assert numbers(again.path)["loss"] == numbers(folder)["loss"]
        assert numbers(again.path, "--data", f"{HERE}:shifted") == {
            **numbers(folder, "--data", f"{HERE}:shifted"), "run": str(again.path)
        }  # fmt: skip


class TestOtherData:
    def test_features(self, folder):
        model = open_run(folder).model().eval()
        x, y = shifted()[2]
        with torch.no_grad():
            want = F.cross_entropy(model(x).double(), y).item()
        found = numbers(folder, "--data", f"{HERE}:shifted")
        assert found["loss"] == pytest.approx(want, abs=1e-6) != numbers(folder)["loss"]
        assert found["data"] == f"{HERE}:shifted" and found["wrong"] == 0

    def test_images_are_normalised_with_the_statistics_of_the_training_data(self, images):
        model, own = open_run(images).model().eval(), as_data(pictures(), "own").statistics
        x, y = brighter()[2]
        with torch.no_grad():
            logits = model(
                (x.float() / 255 - torch.tensor(own.mean).view(1, 2, 1, 1)) / torch.tensor(own.std).view(1, 2, 1, 1)
            )
        found = numbers(images, "--data", f"{HERE}:brighter")
        assert found["loss"] == pytest.approx(F.cross_entropy(logits.double(), y).item(), abs=1e-5)
        assert tuple(map(tuple, found["normalised_with"])) == (own.mean, own.std)
        assert Statistics.of(brighter()[0][0]).mean != own.mean
        said = invoke(images, "--data", f"{HERE}:brighter")
        assert f"normalised with the statistics of the run's training data: mean {own.mean[0]:.4f}" in said

    def test_named_sets_are_read_at_the_size_of_the_run(self, images, monkeypatch):
        asked = []
        monkeypatch.setattr(module, "load_clean", lambda config: asked.append(config) or as_data(brighter(), "images"))
        reevaluate(open_run(images), Asked(data="images", data_dir="elsewhere"))
        assert (asked[0].data, asked[0].data_dir, asked[0].image_size, asked[0].noise) == ("images", "elsewhere", 4, 0)

    def test_its_own_data_from_another_folder(self, images, monkeypatch):
        asked = []
        monkeypatch.setattr(saved, "load_data", lambda config: asked.append(config) or as_data(pictures(), "p"))
        reevaluate(open_run(images), Asked(data_dir="elsewhere"))
        assert asked[0].data_dir == "elsewhere" and asked[0].data == f"{HERE}:pictures"

    def test_data_that_have_changed_since_training(self, images, monkeypatch):
        """Of the same name and shape; the numbers are of what is there now, and a warning says so."""
        (x, y), val, test = pictures()
        monkeypatch.setattr(saved, "load_data", lambda config: as_data(((x, y.roll(1)), val, test), "pictures"))
        with pytest.warns(UserWarning, match="test_eval:pictures' differ from those that 'images'"):
            found = reevaluate(open_run(images))
        assert found.samples == 23
        with pytest.warns(UserWarning, match="differ from those"):
            open_run(images).data()


class TestRefusals:
    def test_data_that_do_not_fit(self, folder, images, refused):
        assert "two has 2 classes, but the run was trained on tests.user_side:data with 3" in refused(
            folder, "--data", f"{HERE}:two"
        )
        assert "wide has floats of shape 12, but the run was trained on floats of shape 6" in refused(
            folder, "--data", f"{HERE}:wide"
        )
        said = refused(images, "--data", "tests.user_side:data")
        assert "has 3 classes, but the run was trained on" in said

    def test_unknown_words(self, folder, refused):
        assert "split=tset is not known; did you mean 'test'? (split: train, val, test)" in refused(
            folder, "--split", "tset"
        )
        assert "unknown data 'cifar'; did you mean 'cifar10'?" in refused(folder, "--data", "cifar")
        assert "device=tpu cannot be used here" in refused(folder, "--device", "tpu")

    def test_runs_that_have_no_weights(self, folder, tmp_path, refused):
        assert f"there is no run {str(tmp_path / 'absent')!r}" in refused(tmp_path / "absent")
        (tmp_path / "empty").mkdir()
        assert "is not a run" in refused(tmp_path / "empty")
        again = RunFolder(tmp_path / "mine")
        train(CONFIG, folder=again)
        again.weights.unlink()
        assert "has no weights" in refused(again.path)
        (again.path / "result.json").unlink()
        assert "is not finished" in refused(again.path)
        train(dataclasses.replace(CONFIG, lr=1e30), folder=RunFolder(tmp_path / "failed"))
        assert "failed: the training loss was not finite" in refused(tmp_path / "failed")
        (again.path / "config.json").write_text("{")
        assert "cannot be read: truncated or damaged" in refused(again.path)

    def test_a_batch_of_nothing(self):
        with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
            Asked(batch=0)


def test_on_another_device_it_is_done_in_float32(images, monkeypatch):
    config = dataclasses.replace(open_run(images).config, device="cuda", precision="bf16", channels_last=True)
    saved = dataclasses.replace(open_run(images), config=config)
    assert reevaluate(saved).precision == "float32"
    there = module._config(config, Asked(device="cuda"))
    assert (there.precision, there.channels_last) == ("bf16", True)


def test_a_name_is_found_in_the_usual_place(folder, monkeypatch):
    home = folder.parent / "work"
    (home / "flatmin-runs").mkdir(parents=True)
    (home / "flatmin-runs" / "runs").symlink_to(folder.parent)
    monkeypatch.chdir(home)
    assert numbers("clouds")["loss"] == numbers(folder)["loss"]
