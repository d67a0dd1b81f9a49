"""Outdated runs: runs that no study uses, because the code or the data have changed since."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

import flatmin
from flatmin.study.code import Contents, code_of, modules_of
from flatmin.study.store import Run, Store
from flatmin.train.folder import RunFolder
from flatmin.train.package import package_digest
from flatmin.words import reason


def former_runs(missing: Sequence[Run], store: Store) -> list[str]:
    """A sentence on runs in the store that have a study's settings but were made with different code or data."""
    found: dict[str, list[bool]] = {}
    for run in missing:
        for folder in store.alike(run):
            if folder.path != store.folder(run) and (why := difference(folder, run)) is not None:
                found.setdefault(why, []).append(folder.finished)
    if not found:
        return []
    ends = [end for group in found.values() for end in group]
    counts = [f"{count} {word}" for count, word in ((sum(ends), "finished"), (len(ends) - sum(ends), "unfinished"))]
    whole = " and ".join(count for count in counts if not count.startswith("0 "))
    each = [f"{why} ({len(group)})" if len(found) > 1 else why for why, group in found.items()]
    runs, were, they = ("run", "was", "it is") if len(ends) == 1 else ("runs", "were", "they are")
    return [
        f"{whole} {runs} in {store.out} with settings of this study {were} made {', '.join(each)}, so {they} not used "
        f"and will be trained again. `--archive {store.out}` uses finished runs as they are; "
        f"`flatmin runs rm --stale {store.out}` removes outdated runs."
    ]


def stale(path: Path, contents: Contents | None = None) -> str | None:
    """Why a run is outdated, in words; None if it is not, or if that cannot be determined here.

    Runs of `flatmin train`, which belong to no study, and runs that cannot be read are not outdated.

    Args:
        path: the run folder.
        contents: the data of runs. Default: data are not checked.
    """
    folder = RunFolder(path)
    try:
        config, labels = folder.config()
        if "code" not in labels or "key" not in labels:
            return None
        run = Run(label=labels.get("label", ""), config=config, code=code_of(config))
    except ValueError:  # the folder is damaged, or a module is missing
        return None
    known = contents is not None and not contents.absent(config)
    if contents is not None and known:
        run = dataclasses.replace(run, content=contents.of(config))
    if (why := difference(folder, run, data=known)) is not None:
        return f"made {why}"
    try:
        if folder.finished:
            folder.result(lambda table: table["key"] == labels["key"])
    except ValueError as error:
        return f"its result cannot be used: {reason(error)}"
    return None


def difference(folder: RunFolder, run: Run, *, data: bool = True) -> str | None:
    """How an existing run differs in code or data from a run planned now, in words; None if it does not.

    Args:
        folder: folder of the existing run.
        run: the planned run with the same settings.
        data: whether to compare the data too.
    """
    labels = folder.config()[1]
    if labels.get("code") != run.code:
        return _other_code(folder, run)
    theirs = labels.get("data_key")
    if data and theirs != run.data_word and not (theirs or "").startswith("data_dir="):
        return "on different data" if theirs is not None else "by a version that did not record its data"
    return None


def _other_code(folder: RunFolder, run: Run) -> str:
    there = folder.environment()
    versions = there.get("versions")
    versions = versions if isinstance(versions, dict) else {}
    if package_digest()[:10] in str(there.get("code", "")).split("; "):
        return f"with another version of {', '.join(modules_of(run.config))}"
    for name, version in (("flatmin", flatmin.__version__), ("torch", torch.__version__)):
        if name in versions and str(versions[name]) != str(version):
            return f"by {name} {versions[name]} (now {version})"
    return f"by different code of flatmin {flatmin.__version__}"
