"""What a study will do: its rows, their runs, and which of these are finished."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flatmin.study.code import Contents, code_of
from flatmin.study.executors import RunOutcome, finished_and_missing
from flatmin.study.executors.executor import done_again
from flatmin.study.expand import GridPoint, grid_points
from flatmin.study.measuring import View
from flatmin.study.record import Record
from flatmin.study.spec import StudySpec
from flatmin.study.store import Run, Store, unique
from flatmin.study.stored_reports import lacking, report_path, stored_report
from flatmin.train.config import RunConfig
from flatmin.train.folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """What a study will do.

    Args:
        spec: the study.
        store: where its runs are.
        grid_points: its rows.
        runs: by (row, seed); rows with the same configuration share their runs.
        finished: outcomes of finished runs by name, with their reports.
        missing: runs to do.
        unmeasured: finished runs whose networks are still to be measured.
        warnings: about the run folders.
    """

    spec: StudySpec
    store: Store
    grid_points: list[GridPoint]
    runs: Mapping[tuple[int, int], Run]
    finished: Mapping[str, RunOutcome]
    missing: list[Run]
    unmeasured: list[Run] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def open(self) -> list[Run]:
        """The runs of which something is still to be done."""
        return [*self.missing, *self.unmeasured]


def plan(spec: StudySpec, out: Path, *, make: bool = True, retry: bool = False) -> StudyPlan:
    """Expand a study to grid points and look for finished runs.

    Of the data only the digest is read, see `flatmin.train.fingerprint.content_of`. The data may be absent: runs are
    then identified by their settings, code and data_dir, with a warning.

    A run that raised an error has no result, so it is among the missing ones. One whose loss was not finite has.

    Args:
        spec: the study.
        out: the folder of the runs.
        make: make that folder if it does not exist.
        retry: also repeat runs whose loss was not finite, and measure networks again whose report is incomplete. If
            `make`, their results are removed, as are those of runs without weights whose networks are to be measured.

    Raises:
        ValueError: settings that do not go together, or a folder that cannot be written.
    """
    rows = grid_points(spec)
    store = Store(out, make=make)
    contents = Contents()
    runs = {
        (i, seed): run_of(config, store, contents, spec.record, spec.measure)
        for i, grid_point in enumerate(rows)
        for seed, config in grid_point.configs.items()
    }
    warnings = contents.warnings
    finished, missing = finished_and_missing(runs.values(), store, warnings.append)
    unmeasured = []
    again = set()
    for run in unique(runs.values()):
        if (outcome := finished.get(run.name)) is None or outcome.result is None:
            continue
        if outcome.result.failure is not None:
            again |= {run.name} if retry else set()
        elif run.view is not None:
            folder = store.folder(run)
            report = stored_report(folder, run.view)
            if retry and report is not None and lacking(report):
                report = None
                if make:
                    report_path(folder, run.view).unlink(missing_ok=True)
            finished[run.name] = dataclasses.replace(outcome, report=report)
            if report is None and RunFolder(folder).weights.is_file():
                unmeasured.append(run)
            elif report is None:
                again.add(run.name)
    for run in unique(runs.values()):
        if run.name in again:
            missing.append(done_again(run, store))
            del finished[run.name]
            if make:
                (store.folder(run) / "result.json").unlink(missing_ok=True)
    return StudyPlan(
        spec=spec,
        store=store,
        grid_points=rows,
        runs=runs,
        finished=finished,
        missing=missing,
        unmeasured=unmeasured,
        warnings=warnings,
    )


def run_of(
    config: RunConfig,
    store: Store,
    contents: Contents,
    record: Record | None = None,
    view: View | None = None,
) -> Run:
    """The run of a configuration.

    The method names its folder, not the arm: studies that call one configuration by two names share its runs.
    """
    run = Run(
        label=config.method,
        config=config,
        code=code_of(config),
        record=record or Record(),
        view=view,
        content=contents.of(config),
    )
    if not contents.absent(config):
        return run
    return dataclasses.replace(run, data_key=store.known_data(run) or f"data_dir={config.data_dir}")
