"""Workers and drivers killed at random moments: no finished run is lost, none is repeated, all come to the same end."""

import importlib.util

import pytest

from tests.executors.killing import check

ENGINES = {
    "local": {},
    "slurm": {"executor": "slurm", "settings": {"cluster": "local"}, "outlive": True},
    "ray": {"executor": "ray", "mark": b"ray::", "outlive": True},
}
PACKAGES = {"slurm": "submitit", "ray": "ray"}


@pytest.fixture(params=["local", pytest.param("slurm", marks=pytest.mark.slow), "ray"])
def engine(request):
    package = PACKAGES.get(request.param)
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; make test-executors has it")
    return ENGINES[request.param]


def test_four_runs(tmp_path, engine):
    check(tmp_path, count=4, kills=2, **engine)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_runs(tmp_path, engine):
    check(tmp_path, count=200, kills=40, **engine)
