import dataclasses
import json
import os

import pytest

from flatmin.study import fingerprint
from flatmin.study.store import Run, Store, append_line, read_lines, write_atomically
from flatmin.train.config import RunConfig
from flatmin.train.loop import Epoch, Result

CONFIG = RunConfig(method="sam", rho=0.1, epochs=2)
LINE = Epoch(
    epoch=1, lr=0.1, rho=0.1, train_loss=1.0, val_acc=50.0, val_loss=1.0, test_acc=50.0, memorised=None, seconds=0.1
)
RESULT = Result(
    method="sam",
    rho=0.1,
    gradient_evaluations=2.0,
    seed=0,
    epochs=2,
    noise=0.0,
    trained=True,
    last={"epoch": 2, "test_acc": 90.0, "val_acc": 91.0, "memorised": None, "train_loss": 0.1},
    best={"epoch": 1, "test_acc": 89.0, "val_acc": 92.0},
    train_ce=0.1,
    lambda_max={"value": 1.0, "residual": 1e-3, "products": 7, "converged": True},
    seconds=0.5,
)


def make(label="sam", config=CONFIG, code="c"):
    return Run(label=label, config=config, code=code)


@pytest.fixture
def finished(tmp_path):
    """A store with one finished run."""
    store, run = Store(tmp_path / "out"), make()
    folder = store.begin(run, {"threads": 1})
    for epoch in (1, 2):
        append_line(folder / "metrics.jsonl", dataclasses.replace(LINE, epoch=epoch))
    store.finish(run, RESULT)
    return store, run, folder


def test_a_finished_run_is_found(finished):
    store, run, folder = finished
    warnings = []
    result, lines = store.find(run, warnings.append)
    assert result == RESULT
    assert [line.epoch for line in lines] == [1, 2]
    assert warnings == []
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "env.json", "metrics.jsonl", "result.json"]
    assert json.loads((folder / "config.json").read_text())["rho"] == 0.1
    assert json.loads((folder / "result.json").read_text())["version"] == 1


def test_another_configuration_seed_or_code_is_another_run(finished):
    store, run, _ = finished
    others = [
        make(config=dataclasses.replace(CONFIG, rho=0.2)),
        make(config=dataclasses.replace(CONFIG, seed=1)),
        make(code="d"),
    ]
    for other in others:
        assert other.key != run.key
        assert store.find(other, pytest.fail) is None
    assert make(label="other").key == run.key


def damage_truncate(folder):
    path = folder / "result.json"
    path.write_text(path.read_text()[:100])


def damage_empty(folder):
    (folder / "result.json").write_text("")


def damage_alien(folder):
    (folder / "result.json").write_text("[1, 2]")


def damage_other_key(folder):
    path = folder / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "key": "x"}))


def damage_no_key(folder):
    (folder / "result.json").write_text('{"version": 1}')


def damage_fields(folder):
    path = folder / "result.json"
    found = json.loads(path.read_text())
    del found["trained"]
    path.write_text(json.dumps(found))


def damage_binary(folder):
    (folder / "result.json").write_bytes(b"\xff\xfe\x00")


def damage_metrics(folder):
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text()[:-20])


def damage_metrics_gone(folder):
    (folder / "metrics.jsonl").unlink()


def damage_metrics_short(folder):
    (folder / "metrics.jsonl").write_text("")


@pytest.mark.parametrize("damage", [f for n, f in list(globals().items()) if n.startswith("damage_")])
def test_a_damaged_result_is_not_finished_and_is_named(finished, damage):
    store, run, folder = finished
    damage(folder)
    warnings = []
    assert store.find(run, warnings.append) is None
    (text,) = warnings
    assert str(folder / "result.json") in text
    assert text.endswith("the run is done again.")


def test_an_unfinished_run_is_no_cause_for_a_warning(finished):
    store, run, folder = finished
    (folder / "result.json").unlink()
    assert store.find(run, pytest.fail) is None


def test_a_failed_run_is_kept_with_the_epochs_it_had(finished):
    store, run, folder = finished
    store.begin(run, {})
    append_line(folder / "metrics.jsonl", LINE)
    failed = dataclasses.replace(RESULT, failure="not finite", last=None, best=None, train_ce=None, lambda_max=None)
    store.finish(run, failed)
    result, lines = store.find(run, pytest.fail)
    assert result.failure == "not finite"
    assert len(lines) == 1


def test_beginning_again_removes_the_old_result_first(finished):
    store, run, folder = finished
    store.begin(run, {})
    assert not (folder / "result.json").exists()
    assert read_lines(folder / "metrics.jsonl", expected=None) == []


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "x.json"
    write_atomically(path, {"a": 1})
    with pytest.raises(TypeError):
        write_atomically(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"the folder '.*file.out' cannot be written \(.*\); name another one"):
        Store(tmp_path / "file" / "out")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot be written"):
        Store(tmp_path / "out")


def test_a_folder_where_writing_fails(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ValueError, match=r"cannot be written \(Permission denied\)"):
        Store(tmp_path)


def test_folder_names_are_plain(tmp_path):
    assert make(label="sgd, 2x epochs").name.startswith("sgd-2x-epochs-s0-")
    assert make(label="vasso+asam").name.startswith("vasso+asam-s0-")
    assert make(label="../../etc").name.startswith("..-..-etc-s0-")
    assert "/" not in make(label="a/b").name


def test_the_fingerprint_covers_what_a_run_depends_on():
    names = {"/".join(path.parts[-2:]) for path in fingerprint.package_sources()}
    assert {"train/loop.py", "measure/krylov.py", "data/noise.py", "models/small.py"} <= names
    assert {"flatmin/recipe.py", "flatmin/recipes.py", "flatmin/catalogue.py"} <= names
    assert any(name.startswith("engine/") for name in names)
    assert any(name.startswith("parts/") for name in names)
    assert not any(name.startswith(("study/", "cli/")) for name in names)


def test_a_changed_file_changes_the_digest(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("x = 1")
    before = fingerprint.digest([file])
    file.write_text("x = 2")
    assert fingerprint.digest([file]) != before
    assert fingerprint.digest([file], "x") != fingerprint.digest([file], "y")


def test_a_module_in_a_package_brings_its_whole_folder(tmp_path, monkeypatch):
    package = tmp_path / "flatmin_test_package"
    package.mkdir()
    for name in ("__init__", "one", "two"):
        (package / f"{name}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    found = fingerprint.user_sources(["flatmin_test_package.one:f"], [])
    assert [path.name for path in found] == ["__init__.py", "one.py", "two.py"]


def test_the_environment_names_no_host_and_no_user():
    found = json.dumps(fingerprint.environment("cpu", 1))
    assert os.uname().nodename not in found
    assert os.path.expanduser("~") not in found
    assert '"torch"' in found
