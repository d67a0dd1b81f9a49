"""The trained networks behind the table of a study, as runs to be measured."""

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
    """The finished runs of a study's rows, and a sentence for each row that lacks some.

    Where values were chosen on validation, the chosen ones only. Each run is labelled by its row: the arm, and where
    it stands on the axes if the arm has several rows.

    Args:
        spec: the study.
        out: the folder of its runs.
        arms: those that are wanted, by the arm or the whole row. Default: all.

    Raises:
        ValueError: an arm that the study does not have, no finished run, or a run without weights.
    """
    # Whatever else the runs have recorded.
    spec = dataclasses.replace(spec, measure=None, record=Record(), timing=False)
    todo, lacking = plan(spec, out, make=False), []
    if todo.missing and (out / "runs").is_dir():
        # Weights can be measured whatever code trained them.
        every = plan(spec, out, make=False, archive=out)
        if (more := len(every.finished) - len(todo.finished)) > 0:
            todo = every
            lacking.append(f"{more} of the runs were trained by other code than this; they are measured all the same.")
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
            f"`flatmin study {spec.name} --out {out}` does them."
        )
    return found, lacking


def searched(spec: StudySpec, out: Path) -> StudySpec:
    """The study with its values chosen on validation, if that search is finished in the folder; else as it is."""
    search = tuned(dataclasses.replace(spec, measure=None, record=Record(), timing=False))
    if not any(point.choose for point in grid_points(search)):
        return spec
    todo = plan(search, out, make=False)
    return spec if todo.missing or todo.waiting else tuned(spec)


def _folder(todo: StudyPlan, *, label: str, seed: int) -> Path:
    place = next(i for i, point in enumerate(todo.grid_points) if point.label == label)
    return todo.store.folder(todo.runs[place, seed])
