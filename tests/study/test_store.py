import dataclasses
import json
import os

import pytest

from flatmin.study.store import Run, Store
from flatmin.train.config import RunConfig
from flatmin.train.folder import RunFolder
from flatmin.train.result import Epoch, Result

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
    folder = RunFolder(store.folder(run))
    folder.begin(run.config, {"threads": 1}, **run.labels)
    for epoch in (1, 2):
        folder.add_line(dataclasses.replace(LINE, epoch=epoch))
    folder.finish(RESULT, **run.labels)
    return store, run, folder.path


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


def test_where_the_data_are_and_who_reads_them_make_no_other_run():
    assert make(config=dataclasses.replace(CONFIG, data_dir="/elsewhere", workers=3)).name == make().name


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
    assert text.endswith("the run is repeated.")


def test_an_unfinished_run_is_no_cause_for_a_warning(finished):
    store, run, folder = finished
    (folder / "result.json").unlink()
    assert store.find(run, pytest.fail) is None


def test_a_failed_run_is_kept_with_the_epochs_it_had(finished):
    store, run, folder = finished
    again = RunFolder(folder)
    again.begin(run.config, {}, **run.labels)
    again.add_line(LINE)
    failed = dataclasses.replace(RESULT, failure="not finite", last=None, best=None, train_ce=None, lambda_max=None)
    again.finish(failed, **run.labels)
    result, lines = store.find(run, pytest.fail)
    assert result.failure == "not finite"
    assert len(lines) == 1


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
