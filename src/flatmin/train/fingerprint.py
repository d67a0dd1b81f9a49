"""Digests of the code and the data that decide a run's outcome, so that results of changed code are not reused."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import inspect
import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import flatmin
from flatmin.data.dataset import Data, Samples, Split
from flatmin.data.folder import files_digest
from flatmin.data.named import DATASETS
from flatmin.methods import Recipe
from flatmin.models.external import external
from flatmin.train.config import RunConfig
from flatmin.train.locate import find_module
from flatmin.train.package import package_digest
from flatmin.train.settings import canonical
from flatmin.train.sources import load_clean, reading_of
from flatmin.words import read_text

_AND = "; "
_ROUNDING = 1e-6
_ROWS = 4096


def module_sources(module: ModuleType) -> list[Path]:
    """The file of a user's module; for a module of a package, all files in the folder of the package."""
    file = getattr(module, "__file__", None)
    if file is None:
        return []
    path = Path(file)
    return sorted(path.parent.rglob("*.py")) if (path.parent / "__init__.py").is_file() else [path]


def user_sources(specs: Mapping[str, str], recipes: Iterable[Recipe]) -> list[Path]:
    """The files of plugins, of "module:function" names, and of parts that are defined outside of flatmin.

    Args:
        specs: the plugins and names, each with the setting that names it, for error messages.
        recipes: the recipes.
    """
    modules = {spec.partition(":")[0]: f"{key}={spec}" for spec, key in specs.items() if external(spec) is None}
    paths = [path for name in sorted(modules) for path in module_sources(find_module(name, option=modules[name]))]
    for recipe in recipes:
        for part in recipe.parts.values():
            module = inspect.getmodule(type(part))
            if module is not None and module.__name__.partition(".")[0] != "flatmin":
                paths += module_sources(module)
    return sorted(set(paths))


def external_versions(specs: Iterable[str]) -> list[str]:
    """Versions of the packages of models such as "timm:NAME"."""
    packages = sorted({spec.partition(":")[0] for spec in specs if external(spec) is not None})
    return [f"{name} {_version(name)}" for name in packages]


class OtherDataError(ValueError):
    """The data have changed since a run, or a plan of runs, started."""


@dataclass(frozen=True, kw_only=True)
class Content:
    """The content of a run's data, independent of where they are stored.

    Args:
        digest: hex digest of the data.
        sums: two sums per tensor, to compare tensors up to rounding; empty for files.
        notes: see `flatmin.data.dataset.Data.notes`.
    """

    digest: str
    sums: tuple[float, ...] = ()
    notes: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    def agrees(self, other: Content) -> bool:
        """Whether both are the same; tensors are compared up to rounding, which depends on processor and threads."""
        if self.digest == other.digest or len(self.sums) != len(other.sums):
            return self.digest == other.digest or bool(self.sums) != bool(other.sums)
        pairs = list(zip(self.sums, other.sums, strict=True))
        # The first sum of each pair is of absolute values; the second one is at most four times as large.
        return bool(pairs) and all(abs(a - b) <= _ROUNDING * pairs[k - k % 2][0] for k, (a, b) in enumerate(pairs))


def content_of(config: RunConfig, data: Data | None = None) -> Content | None:
    """The content of a run's data, without label noise; None for data that are part of an installed package.

    For folders of images this is `flatmin.data.folder.files_digest`; otherwise it is a digest of the tensors.

    Args:
        config: configuration of the run.
        data: the data, if they are already loaded. Default: load them here.

    Raises:
        OSError, ValueError, ModuleNotFoundError: see `flatmin.train.sources.load_clean`.
    """
    dataset = DATASETS.get(config.data)
    if dataset is not None and dataset.scan is not None:
        parts = dataset.scan(reading_of(config))
        return Content(digest=files_digest(parts), notes=tuple(note for part in parts for note in part.notes))
    if dataset is not None and dataset.shipped and (data is None or data.name == config.data):
        return None
    if data is None:
        data = load_clean(config)
    elif config.noise and data.clean is not None:
        data = dataclasses.replace(data, train=Split(data.train.x, data.clean), clean=None)
    return Content(digest=data_digest(data), sums=tuple(_sums(data)) if dataset is None else (), notes=data.notes)


def data_digest(data: Data) -> str:
    """Digest of a data set's content, for data whose files are not known."""
    # The text of a user's own augmentation may contain its address in memory.
    augment = canonical(data.augment) if dataclasses.is_dataclass(data.augment) else type(data.augment).__qualname__
    state = hashlib.sha256(f"{data.num_classes} {data.statistics} {augment}".encode())
    for part in _tensors(data):
        state.update(f"{part.dtype}{tuple(part.shape)}".encode())
        if isinstance(part, torch.Tensor):
            state.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            for fact in part.facts():
                state.update(fact.encode(errors="surrogateescape") + b"\0")
    return state.hexdigest()


def _tensors(data: Data) -> Iterator[Samples]:
    for part in (data.train.x, data.train.y, data.val.x, data.val.y, data.test.x, data.test.y, data.clean):
        if part is not None:
            yield part


def _sums(data: Data) -> Iterator[float]:
    """For every tensor: the sum of absolute values, and a sum weighted by position."""
    for part in _tensors(data):
        if not isinstance(part, torch.Tensor):
            continue
        plain = weighted = 0.0
        for start in range(0, len(part), _ROWS):
            rows = part[start : start + _ROWS].detach().cpu().double().flatten(1 if part.dim() > 1 else 0)
            place = _weights(start, len(rows))
            if rows.dim() > 1:
                place = place.unsqueeze(1) * _weights(0, rows.shape[1])
            plain, weighted = plain + float(rows.abs().sum()), weighted + float((rows * place).sum())
        yield from (plain, weighted)


def _weights(start: int, count: int) -> torch.Tensor:
    """Weights from 1 to 2 that differ strongly between neighbours: 1 + the fractional part of n (sqrt(5) - 1) / 2."""
    return 1 + (torch.arange(start, start + count, dtype=torch.float64) * 0.6180339887498949) % 1


def environment(device: str, threads: int, processes: int = 1) -> dict[str, object]:
    """Versions and hardware, without host or user names."""
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
        **({} if (known := commit()) is None else {"commit": known}),
    }


def commit() -> str | None:
    """The commit of this copy of the package, if `git archive` or pip recorded it; else None."""
    written = read_text(Path(flatmin.__file__).parent / "commit.txt").strip()
    if not written.startswith("$"):
        return written
    try:
        about = json.loads(importlib.metadata.distribution("flatmin").read_text("direct_url.json") or "{}")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None
    found = about.get("vcs_info", {}).get("commit_id")
    return None if found is None else str(found)


def merged(environments: Iterable[Mapping[str, Any]]) -> dict[str, object]:
    """Merge environments into one table; an entry that differs lists all its values, in order of appearance."""
    values_of: dict[str, list[Any]] = {}
    for environment in environments:
        for key, value in environment.items():
            values = values_of.setdefault(key, [])
            several = value.split(_AND) if isinstance(value, str) else [value]
            values += [one for one in several if str(one) not in map(str, values)]
    return {
        key: merged(values) if all(isinstance(one, dict) for one in values) else _joined(values)
        for key, values in values_of.items()
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
