"""The trained networks of a study's table, as runs that can be measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from flatmin.study.expand import grid_points, tuned
from flatmin.study.plan import StudyPlan, plan
from flatmin.study.record import Record
from flatmin.study.spec import StudySpec
from flatmin.study.tabulate import tabulate
from flatmin.train.saved import SavedRun, open_run
from flatmin.words import suggest


def networks_of(spec: StudySpec, out: Path, *, arms: Sequence[str] = ()) -> tuple[list[SavedRun], list[str]]:
    """The finished runs of a study's rows, and a sentence for each row with missing runs.

    If values were chosen on validation data, only the runs with the chosen values are returned. Each run is labelled
    with its row: the arm, and its point on the axes if the arm has several rows.

    Args:
        spec: the study.
        out: the study's output folder.
        arms: labels of arms or of whole rows to return. Default: all.

    Raises:
        ValueError: an unknown arm, no finished run, or a run without weights.
    """
    # Take runs whatever else they recorded.
    spec = dataclasses.replace(spec, measure=None, record=Record(), timing=False)
    todo, lacking = plan(spec, out, make=False), []
    if todo.missing and (out / "runs").is_dir():
        # Weights can be measured even if different code trained them.
        every = plan(spec, out, make=False, archive=out)
        if (more := len(every.finished) - len(todo.finished)) > 0:
            todo = every
            lacking.append(f"{more} of the runs were trained by a different version of the code; they are included.")
    table = tabulate(todo, todo.finished)
    rows = {" ".join([row.arm, *(f"{key}={value}" for key, value in row.point.items())]): row for row in table.rows}
    names = dict.fromkeys([*(row.arm for row in rows.values()), *rows])
    for arm in arms:
        if arm not in names:
            raise ValueError(
                f"study {spec.name} has no arm {arm!r}{suggest(arm, names)} (arms: {', '.join(map(repr, names))})"
            )
    found: list[SavedRun] = []
    for label, row in rows.items():
        if arms and label not in arms and row.arm not in arms:
            continue
        planned = () if row.grid_point is None else row.grid_point.configs
        if row.n < len(planned):
            lacking.append(f"{label}: {row.n} of {len(planned)} seeds are finished.")
        for seed in row.runs:
            run = open_run(_folder(todo, label=row.label, seed=seed))
            run.check()
            found.append(dataclasses.replace(run, label=label))
    if not found:
        raise ValueError(
            f"no run of study {spec.name} is finished in {out}{' for ' + ', '.join(arms) if arms else ''}; "
            f"`flatmin study {spec.name} --out {out}` executes them."
        )
    return found, lacking


def searched(spec: StudySpec, out: Path) -> StudySpec:
    """The study with its values chosen on validation data if those runs are finished in the folder; else unchanged."""
    search = tuned(dataclasses.replace(spec, measure=None, record=Record(), timing=False))
    if not any(point.choose for point in grid_points(search)):
        return spec
    todo = plan(search, out, make=False)
    return spec if todo.missing or todo.waiting else tuned(spec)


def _folder(todo: StudyPlan, *, label: str, seed: int) -> Path:
    place = next(i for i, point in enumerate(todo.grid_points) if point.label == label)
    return todo.store.folder(todo.runs[place, seed])
