"""What is said where a framework is not installed; runs in any environment."""

import importlib
import importlib.util
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "package", "extra"), [("lightning", "lightning", "lightning"), ("hf", "transformers", "hf")]
)
def test_absence_is_said_with_the_extra(monkeypatch, module, package, extra):
    name = f"flatmin.integrations.{module}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    for loaded in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"needs .*; run: pip install '\.\[{extra}\]'"):
        importlib.import_module(name)


def test_flatmin_imports_no_framework():
    names = {"lightning", "transformers", "accelerate", "skorch"}
    if not any(map(importlib.util.find_spec, names)):
        pytest.skip("no framework is installed: run make test-frameworks")
    code = f"import sys, flatmin; flatmin.SAM; print({names} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
