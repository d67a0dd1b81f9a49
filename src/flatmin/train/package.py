"""Digest of the package files that a run's outcome depends on. It does not import torch: `runs list` uses it."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import flatmin
from flatmin.words import read_text

PARTS = ("methods", "optim", "data", "models", "measure", "train")
FILES = ("streams.py",)


def package_sources() -> list[Path]:
    """The files of the package that a run depends on."""
    root = Path(flatmin.__file__).parent
    paths = [root / name for name in FILES]
    for part in PARTS:
        paths += sorted((root / part).rglob("*.py"))
    return [path for path in paths if path.is_file()]


def digest(paths: Sequence[Path], *extra: str) -> str:
    """Hex digest of the names and contents of files, and of additional words."""
    state = hashlib.sha256()
    # Names instead of paths: another machine may have the same code in another folder.
    for name, content in sorted((path.name, path.read_bytes()) for path in paths):
        state.update(name.encode() + b"\0" + content + b"\0")
    for word in extra:
        state.update(word.encode() + b"\0")
    return state.hexdigest()


@lru_cache(maxsize=1)
def package_digest() -> str:
    """Digest of the package's files and the version of torch; computed once per process."""
    return digest(package_sources(), torch_version())


def torch_version() -> str:
    """`torch.__version__`, found without importing torch."""
    if (torch := sys.modules.get("torch")) is not None:
        return str(torch.__version__)
    spec = importlib.util.find_spec("torch")
    places = [] if spec is None else spec.submodule_search_locations or []
    found = [re.search(r"^__version__ = '(.+)'", read_text(Path(place) / "version.py"), re.M) for place in places]
    return next((one[1] for one in found if one), "")
