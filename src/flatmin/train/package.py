"""A digest of flatmin's own files that a run's outcome depends on. Needs no torch: lists of runs use it."""

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
    """The package's files that a run depends on."""
    root = Path(flatmin.__file__).parent
    paths = [root / name for name in FILES]
    for part in PARTS:
        paths += sorted((root / part).rglob("*.py"))
    return [path for path in paths if path.is_file()]


def digest(paths: Sequence[Path], *extra: str) -> str:
    """Hex digest of files' names and contents and of further words."""
    state = hashlib.sha256()
    # Not by path: the same code may lie elsewhere on another machine.
    for name, content in sorted((path.name, path.read_bytes()) for path in paths):
        state.update(name.encode() + b"\0" + content + b"\0")
    for word in extra:
        state.update(word.encode() + b"\0")
    return state.hexdigest()


@lru_cache(maxsize=1)
def package_digest() -> str:
    """Digest of the package's own files and of the version of torch; read once per process."""
    return digest(package_sources(), torch_version())


def torch_version() -> str:
    """As `torch.__version__`, without importing torch."""
    if (torch := sys.modules.get("torch")) is not None:
        return str(torch.__version__)
    spec = importlib.util.find_spec("torch")
    places = [] if spec is None else spec.submodule_search_locations or []
    found = [re.search(r"^__version__ = '(.+)'", read_text(Path(place) / "version.py"), re.M) for place in places]
    return next((one[1] for one in found if one), "")
