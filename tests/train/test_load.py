"""`flatmin.load` and `export`: the trained net without its data, and as a file for others; who trains in a folder."""

import dataclasses
import errno
import json
import os
import stat
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import flatmin
from flatmin.data.dataset import as_data
from flatmin.train import lock
from flatmin.train.config import RunConfig
from flatmin.train.export import export
from flatmin.train.folder import RunFolder
from flatmin.train.inputs import Inputs
from flatmin.train.loop import train
from flatmin.train.saved import open_run
from tests.helpers import same_bits
from tests.user_side import data as clouds

CONFIG = RunConfig(
    method="sam", rho=0.1, epochs=1, batch_size=25, data="tests.user_side:data", model="tests.user_side:net"
)
PICTURES = dataclasses.replace(CONFIG, data="tests.train.test_load:pictures", model="tests.train.test_load:small")


def pictures():
    """Images of bytes, three classes."""
    g = torch.Generator().manual_seed(0)
    return tuple((torch.randint(0, 200, (n, 2, 4, 4), generator=g).byte(), torch.arange(n) % 3) for n in (30, 9, 12))


def small(num_classes, in_channels, image_size):
    return nn.Sequential(
        nn.Flatten(), nn.BatchNorm1d(in_channels * image_size**2), nn.Linear(in_channels * image_size**2, num_classes)
    )


class Tied(nn.Module):
    """Two names of one weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(self.b(self.a(x).relu()))


def tied():
    return Tied()


class More(nn.Linear):
    """State that is no tensor."""

    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        pass


def more():
    return More(6, 3)


def run(folder, config=CONFIG, **changes):
    """Train in a folder; (the folder, the trained model)."""
    kept = []
    train(dataclasses.replace(config, **changes), folder=RunFolder(folder), on_end=kept.append)
    return folder, kept[0]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return run(tmp_path_factory.mktemp("load") / "clouds")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return run(tmp_path_factory.mktemp("load") / "images", PICTURES)


@pytest.fixture
def no_data(monkeypatch):
    monkeypatch.setattr("flatmin.train.saved.load_data", lambda config: pytest.fail("the data were read"))


class TestLoad:
    def test_it_is_the_trained_model_ready_for_use(self, pair, no_data):
        folder, trained = pair
        model = flatmin.load(folder)
        assert same_bits(model.state_dict(), trained.state_dict())
        assert not model.training and all(p.requires_grad for p in model.parameters())
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        x = clouds()[2][0]
        assert torch.equal(model(x), trained.eval()(x))

    def test_statistics_of_batch_norm_are_used(self, images, no_data):
        folder, trained = images
        model, x = flatmin.load(str(folder)), torch.randn(1, 2, 4, 4)
        assert torch.equal(model(x), trained.eval()(x)), "a batch of one has no statistics of its own"

    def test_a_device(self, pair):
        assert {p.device.type for p in flatmin.load(pair[0], device="meta").parameters()} == {"meta"}

    def test_a_run_of_before_the_file_reads_its_data(self, pair, tmp_path):
        folder, trained = run(tmp_path / "old")
        (folder / "data.json").unlink()
        assert same_bits(flatmin.load(folder).state_dict(), trained.state_dict())

    def test_a_run_of_a_gpu_is_read_on_the_cpu(self, tmp_path):
        folder, _ = run(tmp_path / "gpu")
        found = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**found, "device": "cuda", "graph": True, "precision": "bf16"}))
        assert {p.device.type for p in flatmin.load(folder).parameters()} == {"cpu"}
        assert len(open_run(folder).data().train) == 50

    def test_a_run_without_a_label_is_named_by_its_folder(self, pair):
        assert open_run(pair[0]).label == open_run(pair[0]).name == "clouds"

    def test_refusals(self, tmp_path):
        with pytest.raises(ValueError, match=r"is not a run folder: it has no config\.json"):
            flatmin.load(tmp_path / "absent")
        folder, _ = run(tmp_path / "mine")
        (folder / "weights.pt").rename(tmp_path / "away.pt")
        with pytest.raises(ValueError, match="has no weights"):
            flatmin.load(folder)
        (folder / "result.json").unlink()
        with pytest.raises(ValueError, match="is not finished"):
            flatmin.load(folder)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ('{"data": "x", "num_cl', "truncated or damaged"),
            ("[]", "list"),
            ('{"data": "x", "num_classes": 3}', "shape"),
            ('{"data": "x", "num_classes": "3", "shape": [6]}', "expected a whole number"),
            ('{"data": "x", "num_classes": 3, "shape": [6], "kind": "bits"}', "kind=bits is not known"),
            ('{"data": "x", "num_classes": 3, "shape": [6], "kind": "bytes"}', "mean and std are required for kind"),
        ],
    )
    def test_a_damaged_file(self, tmp_path, content, reason):
        folder, _ = run(tmp_path / "mine")
        (folder / "data.json").write_text(content)
        with pytest.raises(ValueError, match=r"data\.json cannot be read") as error:
            flatmin.load(folder)
        assert reason in str(error.value) and "\n" not in str(error.value)


class TestInputs:
    def test_what_is_written(self, pair, images):
        found = json.loads((pair[0] / "data.json").read_text())
        assert found == {
            "data": CONFIG.data, "num_classes": 3, "shape": [6], "kind": "floats", "mean": None, "std": None
        }  # fmt: skip
        found = json.loads((images[0] / "data.json").read_text())
        data = as_data(pictures(), "p")
        assert (found["shape"], found["kind"]) == ([2, 4, 4], "bytes")
        assert tuple(found["mean"]) == data.statistics.mean and tuple(found["std"]) == data.statistics.std

    def test_bytes_are_normalised_as_in_training(self, images, no_data):
        data = as_data(pictures(), "p")
        found = open_run(images[0]).transform(data.test.x)
        assert torch.equal(found, data.inputs(data.test.x)) and found.dtype == torch.float32
        with pytest.raises(ValueError, match=r"expects images as bytes: torch\.uint8"):
            open_run(images[0]).transform(data.test.x.float())
        with pytest.raises(ValueError, match=r"expects samples of shape \(2, 4, 4\), got \(4, 4, 2\)"):
            open_run(images[0]).transform(data.test.x.permute(0, 2, 3, 1))

    def test_other_samples_are_left_as_they_are(self, pair):
        x = clouds()[0][0]
        assert open_run(pair[0]).transform(x) is x

    def test_what_fits(self):
        inputs = Inputs.of(as_data(clouds(), "clouds"))
        inputs.check(as_data(clouds(), "again"))
        two = [(x, y % 2) for x, y in clouds()]
        with pytest.raises(ValueError, match=r"two has 2 classes, but the run was trained on clouds with 3"):
            inputs.check(as_data(two, "two"))
        wide = [(x.repeat(1, 2), y) for x, y in clouds()]
        with pytest.raises(ValueError, match=r"wide has floats of shape 12, but the run .* floats of shape 6"):
            inputs.check(as_data(wide, "wide"))
        ids = [(x.long(), y) for x, y in clouds()]
        with pytest.raises(ValueError, match=r"ids has integers of shape 6"):
            inputs.check(as_data(ids, "ids"))


class TestExport:
    @pytest.mark.parametrize("ending", [".pt", ".pth"])
    def test_a_plain_state_dict(self, pair, tmp_path, no_data, ending):
        path = export(open_run(pair[0]), tmp_path / "new" / f"w{ending}")
        assert same_bits(torch.load(path, weights_only=True), pair[1].state_dict())
        assert [p.name for p in path.parent.iterdir()] == [f"w{ending}"]

    def test_safetensors(self, images, tmp_path):
        safetensors = pytest.importorskip("safetensors")
        path = export(open_run(images[0]), tmp_path / "w.safetensors")
        with safetensors.safe_open(path, framework="pt") as file:
            found, about = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
        assert same_bits(found, images[1].state_dict())
        config = json.loads(about["config"])
        assert (config["method"], config["rho"], config["label"]) == ("sam", 0.1, "images")
        assert json.loads(about["inputs"]) == json.loads((images[0] / "data.json").read_text())

    def test_weights_with_two_names(self, tmp_path):
        torch_file = pytest.importorskip("safetensors.torch")
        folder, trained = run(tmp_path / "tied", model="tests.train.test_load:tied")
        path = export(open_run(folder), tmp_path / "w.safetensors")
        assert same_bits(torch_file.load_file(path), trained.state_dict())

    def test_what_safetensors_cannot_hold(self, tmp_path):
        pytest.importorskip("safetensors")
        folder, _ = run(tmp_path / "more", model="tests.train.test_load:more")
        with pytest.raises(ValueError, match=r"more has entries that are not tensors \(_extra_state\).*a \.pt"):
            export(open_run(folder), tmp_path / "w.safetensors")
        assert export(open_run(folder), tmp_path / "w.pt").exists()

    def test_refusals(self, pair, tmp_path, monkeypatch):
        saved = open_run(pair[0])
        with pytest.raises(ValueError, match=r"must end in \.pt, \.pth or \.safetensors"):
            export(saved, tmp_path / "w.bin")
        (tmp_path / "w.pt").write_text("mine")
        with pytest.raises(ValueError, match=r"already exists; .*--force"):
            export(saved, tmp_path / "w.pt")
        assert (tmp_path / "w.pt").read_text() == "mine"
        assert torch.load(export(saved, tmp_path / "w.pt", force=True), weights_only=True)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[safetensors\]'"):
            export(saved, tmp_path / "w.safetensors")

    def test_weights_that_do_not_fit_are_not_given_away(self, tmp_path):
        folder, _ = run(tmp_path / "mine")
        torch.save(nn.Linear(2, 2).state_dict(), folder / "weights.pt")
        with pytest.raises(ValueError, match="do not fit the model"):
            export(open_run(folder), tmp_path / "w.pt")
        assert not (tmp_path / "w.pt").exists()


posix = pytest.mark.skipif(lock.fcntl is None, reason="folders can be locked on POSIX only")


class TestLock:
    @posix
    def test_a_folder_is_in_use_while_a_run_trains_in_it(self, tmp_path):
        seen = []
        train(CONFIG, folder=RunFolder(tmp_path / "a"), on_epoch=lambda line: seen.append(lock.in_use(tmp_path / "a")))
        assert seen == [True] and not lock.in_use(tmp_path / "a")

    @posix
    def test_a_second_run_is_refused_and_the_first_goes_on(self, tmp_path, monkeypatch):
        monkeypatch.setattr(lock, "_PAUSE", 0.001)

        def second(line):
            with pytest.raises(ValueError, match=r"another process is training in .*wait until it ends"):
                train(CONFIG, folder=RunFolder(tmp_path / "a"))

        result = train(CONFIG, folder=RunFolder(tmp_path / "a"), on_epoch=second)
        assert result.failure is None and RunFolder(tmp_path / "a").lines(expected=1)

    @posix
    def test_an_error_gives_it_back(self, tmp_path):
        with pytest.raises(ZeroDivisionError):
            train(CONFIG, folder=RunFolder(tmp_path / "a"), on_epoch=lambda line: 1 / 0)
        assert not lock.in_use(tmp_path / "a")

    @posix
    def test_so_does_the_end_of_the_process_by_force(self, tmp_path):
        code = (
            "import sys, time, pathlib\nfrom flatmin.train.lock import hold\n"
            "with hold(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
        )
        with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            assert lock.in_use(tmp_path)
            process.kill()
        assert not lock.in_use(tmp_path)

    @posix
    def test_a_look_does_not_keep_a_run_from_beginning(self, tmp_path):
        with lock.hold(tmp_path):
            pass
        handle = os.open(tmp_path, os.O_RDONLY)
        lock.fcntl.flock(handle, lock.fcntl.LOCK_EX)
        began = time.monotonic()
        code = f"import os, time; time.sleep(0.2); os.close({handle})"
        with subprocess.Popen([sys.executable, "-c", code], pass_fds=[handle]):
            os.close(handle)
            with lock.hold(tmp_path):
                assert time.monotonic() - began > 0.1

    @posix
    def test_where_only_files_can_be_locked_there_is_one(self, tmp_path, monkeypatch):
        """As on NFS, where a lock needs something that is open for writing."""
        flock = lock.fcntl.flock

        def files_only(handle, how):
            if stat.S_ISDIR(os.fstat(handle).st_mode):
                raise OSError(errno.EBADF, "Bad file descriptor")
            flock(handle, how)

        monkeypatch.setattr(lock.fcntl, "flock", files_only)
        folder = RunFolder(tmp_path / "a")
        with folder.hold():
            assert lock.in_use(folder.path)
            with folder.hold(), pytest.raises(ValueError, match="another process is training"):
                RunFolder(folder.path).hold(patience=0.1).__enter__()
            assert lock.in_use(folder.path), "the inner one was a part of the outer"
        assert not lock.in_use(folder.path)
        train(CONFIG, folder=folder)
        assert not lock.in_use(folder.path)

    def test_where_folders_cannot_be_locked_the_times_of_files_tell(self, tmp_path, monkeypatch):
        monkeypatch.setattr(lock, "fcntl", None)
        folder, _ = run(tmp_path / "a")
        assert lock.in_use(folder), "it was written to a moment ago"
        for path in folder.rglob("*"):
            os.utime(path, (1, time.time() - lock.RECENT - 60))
        assert not lock.in_use(folder)
        (folder / "show.html").write_text("a page is no sign of training")
        assert not lock.in_use(folder)
