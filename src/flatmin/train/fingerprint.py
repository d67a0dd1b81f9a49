"""A digest of the code and data that decide a run's outcome, so that changed code does not reuse old results."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import flatmin
from flatmin.data.base import Data
from flatmin.models.external import external
from flatmin.recipes import Recipe
from flatmin.train.locate import find_module

PARTS = ("parts", "engine", "data", "models", "measure", "train")
_AND = "; "
FILES = ("recipe.py", "recipes.py", "catalogue.py", "objectives.py")


def package_sources() -> list[Path]:
    """The package's files that a run depends on."""
    root = Path(flatmin.__file__).parent
    found = [root / name for name in FILES]
    for part in PARTS:
        found += sorted((root / part).rglob("*.py"))
    return [path for path in found if path.is_file()]


def module_sources(module: ModuleType) -> list[Path]:
    """The file of a user's module; of a module inside a package, all files of that package's folder."""
    file = getattr(module, "__file__", None)
    if file is None:
        return []
    path = Path(file)
    return sorted(path.parent.rglob("*.py")) if (path.parent / "__init__.py").is_file() else [path]


def user_sources(specs: Iterable[str], recipes: Iterable[Recipe]) -> list[Path]:
    """The files behind plugins, "module:function" names, and parts that come from outside the package."""
    modules = {spec.partition(":")[0] for spec in specs if external(spec) is None}
    found = [path for name in sorted(modules) for path in module_sources(find_module(name, option="fingerprint"))]
    for recipe in recipes:
        for part in recipe.parts.values():
            module = inspect.getmodule(type(part))
            if module is not None and module.__name__.partition(".")[0] != "flatmin":
                found += module_sources(module)
    return sorted(set(found))


def external_versions(specs: Iterable[str]) -> list[str]:
    """Versions of the packages behind models such as "timm:NAME"."""
    packages = sorted({spec.partition(":")[0] for spec in specs if external(spec) is not None})
    return [f"{name} {_version(name)}" for name in packages]


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
    return digest(package_sources(), torch.__version__)


def data_digest(data: Data) -> str:
    """Digest of a data set's content, for data whose files are unknown to us."""
    state = hashlib.sha256()
    for part in (data.train.x, data.train.y, data.val.x, data.val.y, data.test.x, data.test.y, data.clean):
        if part is not None:
            state.update(f"{part.dtype}{tuple(part.shape)}".encode())
        if isinstance(part, torch.Tensor):
            state.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        elif part is not None:
            for fact in part.facts():
                state.update(fact.encode() + b"\0")
    return state.hexdigest()


def environment(device: str, threads: int, processes: int = 1) -> dict[str, object]:
    """Versions and machine, without names of hosts or users."""
    versions = {name: _version(name) for name in ("flatmin", "torch", "numpy", "scikit-learn")}
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": f"{sys.platform}-{platform.machine()}",
        "cpu_count": os.cpu_count(),
        "threads": threads,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "processes": processes,
        "code": package_digest()[:10],
    }


def merged(environments: Iterable[Mapping[str, Any]]) -> dict[str, object]:
    """One table for several environments; where they differ, every value that there is, in the order of the first."""
    found: dict[str, list[Any]] = {}
    for environment in environments:
        for key, value in environment.items():
            values = found.setdefault(key, [])
            several = value.split(_AND) if isinstance(value, str) else [value]
            values += [one for one in several if str(one) not in map(str, values)]
    return {
        key: merged(values) if all(isinstance(one, dict) for one in values) else _joined(values)
        for key, values in found.items()
    }


def _joined(values: Sequence[Any]) -> object:
    return values[0] if len(values) == 1 else _AND.join(map(str, values))


def _version(name: str) -> str | None:
    if name == "torch":
        return torch.__version__
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
