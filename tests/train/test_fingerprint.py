"""What a run's outcome depends on, as a digest."""

import dataclasses
import json
import os

import pytest
import torch

from flatmin.data.dataset import Data, Split
from flatmin.train import fingerprint, package
from flatmin.train.config import RunConfig


def test_the_fingerprint_covers_what_a_run_depends_on():
    names = {"/".join(path.parts[-2:]) for path in package.package_sources()}
    assert {"train/loop.py", "measure/krylov.py", "data/noise.py", "models/small.py"} <= names
    assert {"flatmin/streams.py", "methods/recipe.py", "methods/table.py"} <= names
    assert any(name.startswith("optim/") for name in names)
    assert any(name.startswith("methods/") for name in names)
    assert not any(name.startswith(("study/", "cli/")) for name in names)


def test_a_changed_file_changes_the_digest(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("x = 1")
    before = package.digest([file])
    file.write_text("x = 2")
    assert package.digest([file]) != before
    assert package.digest([file], "x") != package.digest([file], "y")


def test_a_module_in_a_package_brings_its_whole_folder(tmp_path, monkeypatch):
    folder = tmp_path / "flatmin_test_package"
    folder.mkdir()
    for name in ("__init__", "one", "two"):
        (folder / f"{name}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    found = fingerprint.user_sources({"flatmin_test_package.one:f": "data"}, [])
    assert [path.name for path in found] == ["__init__.py", "one.py", "two.py"]
    (folder / "three.py").write_text("import no_such_module")
    with pytest.raises(ValueError, match=r"^data=flatmin_test_package\.three:f: importing .* 'no_such_module'\.$"):
        fingerprint.user_sources({"flatmin_test_package.three:f": "data"}, [])


def test_the_environment_names_no_host_and_no_user():
    found = json.dumps(fingerprint.environment("cpu", 1))
    assert os.uname().nodename not in found
    assert os.path.expanduser("~") not in found
    assert '"torch"' in found


def test_a_digest_does_not_depend_on_where_the_code_lies(tmp_path):
    for first, second in (("a", "b"), ("d", "c")):
        for folder, name in ((first, "net.py"), (second, "parts.py")):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / name).write_text(name)
    here = sorted([tmp_path / "a" / "net.py", tmp_path / "b" / "parts.py"])
    there = sorted([tmp_path / "d" / "net.py", tmp_path / "c" / "parts.py"])
    assert [path.name for path in here] != [path.name for path in there]
    assert package.digest(here) == package.digest(there)


def test_environments_that_differ_have_every_value_once():
    a = {"versions": {"torch": "2.0", "numpy": "1"}, "device": "cpu", "threads": 1}
    b = {"versions": {"torch": "2.1", "numpy": "1"}, "device": "cpu", "threads": 2, "processes": 1}
    both = fingerprint.merged([a, b, a])
    assert both == {"versions": {"torch": "2.0; 2.1", "numpy": "1"}, "device": "cpu", "threads": "1; 2", "processes": 1}
    assert fingerprint.merged([both, a, b]) == both and fingerprint.merged([a]) == a and fingerprint.merged([]) == {}


def clouds(change=lambda x: x):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(10_000, 3, generator=g), torch.arange(10_000) % 2
    return Data(Split(change(x), y), Split(x[:5], y[:5]), Split(x[5:9], y[5:9]), num_classes=2, name="mine:load")


def test_tensors_agree_up_to_rounding_and_in_no_other_change():
    config = RunConfig(method="sgd", data="mine:load")
    one = fingerprint.content_of(config, clouds())
    rounded = fingerprint.content_of(config, clouds(lambda x: x * (1 + 1e-7)))
    assert one.digest != rounded.digest and one.agrees(rounded) and rounded.agrees(one)
    for change in (
        lambda x: x.index_fill(0, torch.tensor([77]), 3.0),
        lambda x: x.flip(0),
        lambda x: x.flip(1),
        lambda x: x * 1.001,
        lambda x: x[:9_999].repeat(2, 1)[:10_000],
    ):
        assert not one.agrees(fingerprint.content_of(config, clouds(change)))
    labels = clouds().train.y.clone()
    labels[:2] = labels[:2].flip(0)
    data = dataclasses.replace(clouds(), train=Split(clouds().train.x, labels))
    assert not one.agrees(fingerprint.content_of(config, data)), "two labels that have changed places"
    noisy = dataclasses.replace(config, noise=0.3)
    assert fingerprint.content_of(noisy, clouds().with_labels(1 - clouds().train.y)) == one, "noise is a setting"
    assert fingerprint.content_of(RunConfig(method="sgd")) is None
