"""The planted faults of `make mutants` fit the code as it is now."""

import dataclasses
from pathlib import Path

import pytest

from tools.mutants import PACKAGE, faults

ROOT = Path(__file__).parents[2]


def test_every_planted_fault_fits_the_code():
    """Each text is there exactly once, the code with the fault is Python, and the tests named are files."""
    for fault in faults():
        compile(fault.planted(), fault.file, "exec")
        assert fault.tests and all((ROOT / file).is_file() for file in fault.tests), fault.name
        assert fault.find != fault.put and fault.breaks.endswith("."), fault.name


def test_every_file_of_the_engine_that_changes_weights_has_one():
    files = {fault.file for fault in faults()}
    for name in ("combine", "curvature", "direction", "geometry", "inner_loop", "mask", "schedule"):
        assert (PACKAGE / "methods" / f"{name}.py").is_file() and f"methods/{name}.py" in files


def test_a_fault_that_does_not_fit_says_so():
    fault = dataclasses.replace(faults()[0], find="no such line")
    with pytest.raises(ValueError, match="does not fit the code any more: its text is 0 times in src/flatmin/methods"):
        fault.planted()
