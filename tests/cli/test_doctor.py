import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flatmin.cli import doctor
from flatmin.cli.main import app

runner = CliRunner()
PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_says_what_is_there():
    result = runner.invoke(app, ["doctor"], catch_exceptions=False)
    assert result.exit_code == 0
    for name in doctor.CORE:
        assert re.search(rf"{name} +{re.escape(version(name))}", result.output)
    assert re.search(r"cpu +\d+ threads", result.output)


def test_missing_extras_come_with_their_command(monkeypatch):
    gone = {extra.distribution for extra in doctor.EXTRAS}
    real = version

    def without(name):
        if name in gone:
            raise PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor, "version", without)
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 0, "extras are optional"
    for extra in doctor.EXTRAS:
        assert f"pip install '.[{extra.name}]'" in result.output


@pytest.mark.parametrize(("name", "message"), [("rich", "rich is missing; run: pip install rich")])
def test_a_missing_core_package_is_a_failure(monkeypatch, name, message):
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda found: None if found == name else real(found))
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 1 and message in result.output


def test_an_old_torch_is_a_failure(monkeypatch):
    monkeypatch.setattr("torch.__version__", "2.5.1+cpu")
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 1 and "torch 2.5.1+cpu is too old" in result.output


def test_the_lists_are_those_of_the_project():
    project = tomllib.loads(PROJECT.read_text())["project"]
    names = {re.split(r"[<>=\[]", item)[0] for item in project["dependencies"]}
    assert names == set(doctor.CORE)
    extras = project["optional-dependencies"]
    for extra in doctor.EXTRAS:
        assert extra.distribution in [re.split(r"[<>=\[]", item)[0] for item in extras[extra.name]]
    assert set(extras) - {"demo", "dev", "docs"} == {extra.name for extra in doctor.EXTRAS}
    oldest = next(item for item in project["dependencies"] if item.startswith("torch"))
    assert oldest == f"torch>={'.'.join(map(str, doctor.OLDEST_TORCH))}"
