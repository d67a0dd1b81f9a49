"""A full disk, at any write of a run: it stops with a sentence, and nothing is lost but work since the checkpoint."""

import contextlib
import errno
import os
import pathlib
import stat

import pytest

from flatmin.train import checkpoint
from flatmin.train.folder import RunFolder
from tests.helpers import same_bits
from tests.train.runs import config, go, options, outcome, saved_steps

# Seven updates in two epochs, a checkpoint after 2, 4, 6, and one between the epochs.
CONFIG = config(method="rsam", model="tests.train.runs:plain_net", epochs=2, train_size=40, batch_size=12)
HOW = options(checkpoint_steps=2, measure_every=2, measures="sharpness", measure_examples=12)


class Full:
    """A file on a disk that fills up: half of what does not fit any more is written."""

    def __init__(self, file, disk, name):
        self._file, self._disk, self._name = file, disk, name

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def write(self, data):
        if self._disk.full("write", self._name):
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            raise Disk.error()
        return self._file.write(data)

    def close(self):
        was_open = not self._file.closed
        self._file.close()
        if was_open and self._disk.full("close", self._name):
            raise Disk.error()


class Disk:
    """Counts what is asked of the disk below a folder, and fails at one of them."""

    def __init__(self, folder, fails_at=None):
        self.folder, self.fails_at, self.asked = folder, fails_at, []

    @staticmethod
    def error():
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full(self, what, name):
        self.asked.append((what, self._plain(name)))
        return len(self.asked) - 1 == self.fails_at

    def _plain(self, name):
        """The name without what is drawn: digests and the end of temporary names."""
        name = pathlib.Path(name).name
        return ".".join(name.split(".")[:-1]) if name.startswith(".") else name[:14]

    @contextlib.contextmanager
    def in_place(self):
        """The functions that write, with this disk below them."""
        names, real_open, real_fsync, real_replace = {}, pathlib.Path.open, os.fsync, os.replace

        def open_(path, mode="r", *rest, **more):
            file = real_open(path, mode, *rest, **more)
            if mode[0] == "r" or self.folder not in path.parents:
                return file
            names[file.fileno()] = path.name
            return Full(file, self, path.name)

        def fsync(handle):
            if self.full("fsync", "folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else names[handle]):
                raise self.error()
            real_fsync(handle)

        def replace(source, target):
            if self.full("replace", str(source)):
                raise self.error()
            real_replace(source, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pathlib.Path, "open", open_)
            patch.setattr(os, "fsync", fsync)
            patch.setattr(os, "replace", replace)
            yield self


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run that was left alone: its folder, and all that it asked of the disk."""
    folder = tmp_path_factory.mktemp("alone")
    with Disk(folder).in_place() as disk:
        go(folder / "run", CONFIG, HOW)
    return folder / "run", disk.asked


def chosen(asked, but):
    """One operation on every file but some, another one for each."""
    found = {}
    for number, (what, name) in enumerate(asked):
        if name not in but:
            found.setdefault(name, {}).setdefault(what, []).append(number)
    for turn, kinds in enumerate(found.values()):
        places = list(kinds.values())[turn % len(kinds)]
        yield places[len(places) // 2]


def check(folder, number, alone):
    """Let one operation fail: a sentence, whole files, and a run that continues to the same end."""
    path, (what, name) = folder / "run", alone[1][number]
    with Disk(folder, number).in_place() as disk, pytest.raises(OSError) as error:
        go(path, CONFIG, HOW)
    said = str(error.value)
    assert disk.asked[-1] == (what, name) or what == "write" or disk.asked[number] == (what, name)
    assert "could not be written" in said and "No space left on device" in said and "\n" not in said, (what, name, said)
    assert str(path) in said, (what, name, said)
    assert not [p for p in path.rglob(".*")], (what, name)
    for file in checkpoint.listed(path / "checkpoints"):
        checkpoint.read(file)
    updates = saved_steps(path)
    if RunFolder(path).finished:  # only the name of its result was not yet safe
        checkpoint.clear(path / "checkpoints")
    else:
        go(path, CONFIG, HOW)
    assert same_bits(outcome(path), outcome(alone[0])), (what, name)
    return updates


class TestEveryWrite:
    def test_of_every_file(self, tmp_path, alone):
        """But of those that the tests of checkpoints fail."""
        for number in chosen(alone[1], but=(".step", ".weights.pt", ".result.json")):
            check(tmp_path / str(number), number, alone)

    @pytest.mark.slow
    @pytest.mark.timeout(900)
    def test_at_every_moment(self, tmp_path, alone):
        """But of the many writes of a file of tensors only some."""
        for number, (what, name) in enumerate(alone[1]):
            if what != "write" or name not in (".step", ".weights.pt") or number % 20 == 0:
                check(tmp_path / str(number), number, alone)

    def test_all_files_of_a_run_are_among_them(self, alone):
        files = {"config.json", "env.json", "metrics.jsonl", "steps.jsonl", "measures.jsonl", "weights.pt"}
        assert {name.lstrip(".") for _, name in alone[1]} >= files | {"result.json", "step", "folder"}
        assert {what for what, _ in alone[1]} == {"write", "close", "fsync", "replace"}


class TestCheckpoints:
    """One that could not be written: the one before is there, and no part of the new one."""

    @pytest.mark.parametrize(("what", "kept"), [("write", [2]), ("fsync", [2]), ("close", [2])])
    def test_the_one_before_stays(self, tmp_path, alone, what, kept):
        asked = [k for k, one in enumerate(alone[1]) if one == (what, ".step")]
        first = alone[1].index(("replace", ".step"))
        assert check(tmp_path, next(k for k in asked if k > first), alone) == kept

    def test_the_sentence_says_how_to_go_on(self, tmp_path, alone):
        first = alone[1].index(("fsync", ".step"))
        with Disk(tmp_path, first).in_place(), pytest.raises(OSError) as error:
            go(tmp_path / "run", CONFIG, HOW)
        assert str(error.value) == (
            f"the checkpoint of step 2 could not be written to {tmp_path / 'run' / 'checkpoints'}: No space left on "
            "device; free disk space, and continue from the previous checkpoint with --resume."
        )

    def test_a_limit_of_the_operating_system(self, tmp_path, alone):
        resource = pytest.importorskip("resource")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
        try:
            with pytest.raises(OSError, match=r"^the checkpoint of step 2 could not be written to .*: File too large;"):
                go(tmp_path / "run", CONFIG, HOW)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert saved_steps(tmp_path / "run") == [] and not list(tmp_path.rglob(".*"))
        go(tmp_path / "run", CONFIG, HOW)
        assert same_bits(outcome(tmp_path / "run"), outcome(alone[0]))

    @pytest.mark.parametrize("name", [".weights.pt", ".result.json"])
    def test_they_stay_until_the_run_is_finished(self, tmp_path, alone, name):
        assert check(tmp_path, alone[1].index(("replace", name)), alone) == [6, 4]


class TestOrder:
    """What a loss of power may not turn around."""

    def test_content_is_on_the_disk_before_its_name(self, alone):
        asked = alone[1]
        for number, (what, name) in enumerate(asked):
            if what == "replace":
                assert asked[number - 1] == ("close", name) and asked[number - 2] == ("fsync", name)
                assert asked[number + 1] == ("fsync", "folder")

    def test_the_result_is_written_last(self, alone):
        names = [name for _, name in alone[1] if name != "folder"]
        assert names[-1] == ".result.json" and ".weights.pt" in names
        assert names.index(".result.json") > len(names) - 1 - names[::-1].index(".weights.pt")
