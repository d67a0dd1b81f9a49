"""Sentences on which runs of a table come from an archive, and which versions trained them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from flatmin.study.plan import StudyPlan
from flatmin.study.store import Run, unique
from flatmin.train.fingerprint import environment
from flatmin.train.folder import RunFolder


def origins(todo: StudyPlan, runs: Iterable[Run]) -> tuple[str, ...]:
    """Sentences on the archive and the versions that trained the runs; none if the plan has no archive.

    Args:
        todo: the plan of the table.
        runs: the runs of the table.
    """
    if todo.archive is None:
        return ()
    present = [run for run in unique(runs) if RunFolder(todo.store.folder(run)).finished]
    old = [run for run in present if todo.store.taken(run)]
    here = _maker(environment("cpu", 1))
    makers = Counter(_maker(RunFolder(todo.store.folder(run)).environment()) for run in old)
    told = [f"{count} trained by {maker}" for maker, count in makers.most_common()]
    found = [
        f"{len(old)} of the {len(present)} finished runs come from the archive {todo.archive.path}"
        + (f": {', '.join(told)}." if told else ".")
    ]
    if any(maker != here for maker in makers):
        found.append(f"The table was made by {here}, which differs from the code that trained archived runs.")
        if len(old) < len(present):
            found.append(f"The other {len(present) - len(old)} runs were trained by the code that made the table.")
        parts = (todo,) if todo.choice is None else (todo.choice, todo)
        taken: dict[str, set[bool]] = {}
        for part in parts:
            for (i, _), run in part.runs.items():
                if run in present:
                    taken.setdefault(part.grid_points[i].label, set()).add(todo.store.taken(run))
        if mixed := [label for label, kinds in taken.items() if len(kinds) > 1]:
            found.append(f"Rows whose runs were trained by different code: {', '.join(mixed)}.")
    return tuple(found)


def _maker(about: Mapping[str, Any]) -> str:
    """The versions of flatmin and torch from the contents of a run's env.json."""
    versions = about.get("versions")
    known: Mapping[str, Any] = versions if isinstance(versions, dict) else {}
    commit = f"commit {about['commit']}, " if about.get("commit") else ""
    return (
        f"flatmin {known.get('flatmin', 'of an unknown version')} ({commit}code {about.get('code', 'unknown')}) with "
        f"torch {known.get('torch', 'of an unknown version')}"
    )
