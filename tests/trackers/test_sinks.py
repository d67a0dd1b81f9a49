"""What the four trackers write is read back and compared number by number."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flatmin.train.trackers import TRACKERS, Safely, make_tracker, settings
from tests.trackers.readers import READERS
from tests.trackers.story import began, ended, ended_epoch, first_epoch, numbers, stepped, whole

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[2]
THERE = {name for name in TRACKERS if importlib.util.find_spec(name) is not None}
if not THERE:
    pytest.skip("needs a tracker's package: run make test-trackers", allow_module_level=True)

STATUS = {
    "tensorboard": {"finished": "STATUS_SUCCESS", "failed": "STATUS_FAILURE", "stopped": None},
    "wandb": {"finished": 0, "failed": 1, "stopped": 255},
    "mlflow": {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"},
    "trackio": dict.fromkeys(("finished", "failed", "stopped")),
}


def needs(name):
    return pytest.mark.skipif(name not in THERE, reason=f"needs {name}: run make test-trackers")


each = pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in TRACKERS])


@pytest.fixture(autouse=True)
def away(tmp_path, monkeypatch):
    """A home without keys and a working directory without anything."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_", "NETRC", "HF_")):
            monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path / "work")
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


def record(name, folder, events, **options):
    tracker = make_tracker(name, folder=folder, run="run", project="studies", **options)
    try:
        for event in events:
            tracker(event)
    finally:
        tracker.close()


def read(name, folder):
    return READERS[name](folder, "studies")


def same(name, found, wanted):
    """Every number wanted is there once, and no other."""
    if name == "wandb":
        assert {n: v for n, v in found.summary.items() if n.startswith("summary/")} == {
            n: v for (n, _), v in wanted.items() if n.startswith("summary/")
        }
        wanted = {(n, s): v for (n, s), v in wanted.items() if not n.startswith("summary/")}
    if name == "mlflow":
        wanted = {(n.replace("[", "_").replace("]", "_"), s): v for (n, s), v in wanted.items()}
    tolerance = 1e-7 if name == "tensorboard" else 0  # its files have float32
    assert set(found.numbers) == set(wanted)
    for key, values in found.numbers.items():
        assert values == pytest.approx([wanted[key]], rel=tolerance, abs=0, nan_ok=True), key


@each
def test_numbers_settings_and_status_are_read_back(name, tmp_path):
    folder = tmp_path / "with space, ü#1, sam+asam & rho=0.1"
    record(name, folder, whole())
    found = read(name, folder)
    same(name, found, numbers(whole()))
    assert found.status == STATUS[name]["finished"]
    assert found.failure is None
    wanted = settings(began())
    if name == "mlflow":
        wanted = {key: str(value) for key, value in wanted.items()}
    elif name == "tensorboard":
        wanted = {key: str(value).lower() if isinstance(value, bool) else value for key, value in wanted.items()}
    assert {key: found.settings[key] for key in wanted} == wanted
    assert not os.listdir(tmp_path / "work"), "nothing outside the run's folder"


@each
def test_a_failed_run(name, tmp_path):
    failure = "the training loss was not finite in step 5; try a smaller lr or rho"
    events = [began(), stepped(5, loss=math.nan, lr=math.inf), ended(failure)]
    record(name, tmp_path / "run", events)
    found = read(name, tmp_path / "run")
    assert found.status == STATUS[name]["failed"]
    assert found.failure == failure
    (loss,), (rate,) = found.numbers["step/loss", 5], found.numbers["step/lr", 5]
    assert math.isnan(float(loss))
    assert float(rate) == (sys.float_info.max if name == "mlflow" else math.inf)


@each
def test_a_stopped_run_goes_on(name, tmp_path):
    folder = tmp_path / "run"
    before = [began(), *first_epoch(), stepped(15, loss=100.0)]
    after = [began(step=10), stepped(15), stepped(20), ended_epoch(2), ended()]
    record(name, folder, before)
    stopped = read(name, folder)
    assert stopped.status == STATUS[name]["stopped"]
    tracker = make_tracker(name, folder=folder, run="run", project="studies", resume=True)
    tracker(after[0])
    if name == "mlflow":
        assert read(name, folder).status == "RUNNING"
    for event in after[1:]:
        tracker(event)
    tracker.close()
    found = read(name, folder)
    assert found.identity == stopped.identity
    assert found.status == STATUS[name]["finished"]
    if name == "tensorboard":
        same(name, found, numbers(before[:-1]) | numbers(after))
        return
    assert found.numbers["step/loss", 15] == [100.0, 1 / 15], "what was recorded cannot be taken back"
    once = {key: values[-1:] for key, values in found.numbers.items()}
    found.numbers = once
    same(name, found, numbers(before) | numbers(after))


@each
def test_resume_where_nothing_is(name, tmp_path):
    events = [began(step=10), stepped(15), ended()]
    record(name, tmp_path / "run", events, resume=True)
    same(name, read(name, tmp_path / "run"), numbers(events))


@each
def test_a_new_run_in_the_same_folder(name, tmp_path):
    folder = tmp_path / "run"
    record(name, folder, [began(), stepped(5, loss=100.0)])
    first = (folder / "trackers.json").read_text() if name in ("wandb", "mlflow") else None
    record(name, folder, [began(), stepped(5)])
    if name == "tensorboard":
        same(name, read(name, folder), numbers([began(), stepped(5)]))
    elif first is not None:
        assert (folder / "trackers.json").read_text() != first


@each
def test_two_runs_in_one_process_each_in_its_folder(name, tmp_path):
    events = {kind: [began(), stepped(5, loss=float(k)), ended()] for k, kind in enumerate("ab", 1)}
    trackers = {kind: make_tracker(name, folder=tmp_path / kind, run="run", project="studies") for kind in "ab"}
    for k in range(3):
        for kind in "ab":
            trackers[kind](events[kind][k])
    for kind in "ab":
        trackers[kind].close()
    for kind in "ab":
        same(name, read(name, tmp_path / kind), numbers(events[kind]))


@each
def test_nothing_before_began_and_close_twice(name, tmp_path):
    tracker = make_tracker(name, folder=tmp_path / "run", run="run")
    assert not (tmp_path / "run").exists()
    tracker.close()
    assert not (tmp_path / "run").exists()
    tracker(began())
    tracker.close()
    tracker.close()


@each
def test_the_environment_is_left_alone(name, tmp_path):
    code = (
        "import os, logging\n"
        "from pathlib import Path\n"
        "from flatmin.train.trackers import make_tracker\n"
        "from tests.trackers.story import whole\n"
        "before = dict(os.environ)\n"
        f"tracker = make_tracker({name!r}, folder=Path({str(tmp_path / 'run')!r}), run='run')\n"
        "def levels(): return [logging.getLogger(n).level for n in ('', 'mlflow', 'mlflow.store.db.utils', 'wandb')]\n"
        "loud = levels()\n"
        "for event in whole(): tracker(event)\n"
        "tracker.close()\n"
        "own = {'WANDB_SERVICE'}  # set by wandb itself, for processes that it starts\n"
        "assert {k: v for k, v in os.environ.items() if k not in own} == before, set(os.environ) - set(before)\n"
        "assert levels() == loud\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "", "trackers say nothing on the terminal"


# -- what only one of them has -----------------------------------------------------------------------------------------


@needs("wandb")
def test_wandb_is_offline_where_its_server_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("flatmin.train.trackers.wandb.getproxies", dict)
    with pytest.warns(UserWarning, match=r"wandb cannot reach its server .* recorded offline in .*wandb sync"):
        record("wandb", tmp_path / "run", whole())
    same("wandb", read("wandb", tmp_path / "run"), numbers(whole()))


@needs("wandb")
def test_a_server_that_is_there_is_found(monkeypatch):
    import socket

    from flatmin.train.trackers.wandb import _unreachable

    monkeypatch.setattr("flatmin.train.trackers.wandb.getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert _unreachable(where) is None
    assert _unreachable(where).startswith("127.0.0.1: ")
    monkeypatch.setattr("flatmin.train.trackers.wandb.getproxies", lambda: {"https": "http://proxy"})
    assert _unreachable(where) is None, "what a proxy reaches cannot be told from here"


@needs("wandb")
def test_wandb_mode_is_respected(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    record("wandb", tmp_path / "run", whole())
    assert not (tmp_path / "run" / "wandb").exists()


@needs("wandb")
@pytest.mark.parametrize("key", ["netrc", "variable", "none"])
def test_wandb_is_online_with_a_key(key, tmp_path, monkeypatch):
    from flatmin.train.trackers.wandb import _mode

    if key == "netrc":
        path = tmp_path / "home" / ".netrc"
        path.write_text(f"machine api.wandb.ai\n  login user\n  password {'0123456789' * 4}\n")
        path.chmod(0o600)
    elif key == "variable":
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    assert _mode() == ("offline" if key == "none" else "online")


@needs("wandb")
def test_wandb_leaves_the_programs_own_run_alone(tmp_path):
    import wandb

    own = wandb.init(mode="offline", project="mine", dir=tmp_path, settings=wandb.Settings(silent=True, console="off"))
    record("wandb", tmp_path / "run", whole())
    assert wandb.run is own
    own.finish()


@needs("mlflow")
def test_mlflow_tracking_uri_is_respected_and_the_programs_own_run_left_alone(tmp_path, monkeypatch):
    import mlflow

    (tmp_path / "server").mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'server' / 'mlflow.db'}")
    record("mlflow", tmp_path / "run", whole())
    assert not (tmp_path / "run" / "mlflow.db").exists()
    assert mlflow.active_run() is None
    same("mlflow", read("mlflow", tmp_path / "server"), numbers(whole()))


@needs("mlflow")
def test_mlflow_starts_anew_where_its_database_is_gone(tmp_path):
    # In another process, because MLflow keeps a database open until its process ends.
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.trackers.test_sinks import record\n"
        "from tests.trackers.story import began, stepped\n"
        "record('mlflow', Path(sys.argv[1]), [began(), stepped(5)])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], env=environment, check=True)
    (tmp_path / "run" / "mlflow.db").unlink()
    events = [began(step=10), stepped(15), ended()]
    record("mlflow", tmp_path / "run", events, resume=True)
    same("mlflow", read("mlflow", tmp_path / "run"), numbers(events))


@needs("mlflow")
@pytest.mark.parametrize("bad", ["a?b", "a%20b"])
def test_mlflow_refuses_a_path_that_its_database_would_miss(bad, tmp_path):
    with pytest.raises(ValueError, match=r"MLflow cannot write its database below .*the path contains \? or %"):
        record("mlflow", tmp_path / bad, whole())


@needs("trackio")
def test_trackio_dir_is_respected(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "all" / "trackio"))
    record("trackio", tmp_path / "run", whole())
    assert not (tmp_path / "run" / "trackio").exists()
    same("trackio", read("trackio", tmp_path / "all"), numbers(whole()))


@needs("trackio")
def test_a_writer_that_ends_early_is_told_of_and_training_goes_on(tmp_path):
    said = []
    tracker = make_tracker("trackio", folder=tmp_path / "run", run="run", project="registry-mine")
    safe = Safely(tracker, said.append)
    safe(began())
    tracker._writer.wait(timeout=60)
    for event in whole()[1:]:
        safe(event)
    safe.close()
    (text,) = said
    assert text.startswith("the tracker trackio failed (RuntimeError: its writer process ended: ValueError: ")


@needs("tensorboard")
def test_a_disk_that_is_gone_is_told_of_and_training_goes_on(tmp_path):
    said = []
    (tmp_path / "run").write_text("a file where the folder would be")
    safe = Safely(make_tracker("tensorboard", folder=tmp_path / "run", run="run"), said.append)
    for event in whole():
        safe(event)
    safe.close()
    (text,) = said
    assert "the tracker tensorboard failed (FileExistsError" in text
