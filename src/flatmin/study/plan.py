"""The plan of a study: its rows, their runs, and which of these are finished."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flatmin.data.named import Progress
from flatmin.study.archive import Archive
from flatmin.study.code import Contents, code_of
from flatmin.study.expand import GridPoint, best, grid_points, validation_score
from flatmin.study.measuring import View
from flatmin.study.record import Record
from flatmin.study.spec import StudySpec
from flatmin.study.stale import former_runs
from flatmin.study.store import Run, RunOutcome, Store, done_again, finished_and_missing, unique
from flatmin.study.stored_reports import lacking, report_path, stored_report
from flatmin.train.config import RunConfig
from flatmin.train.folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """The plan of a study.

    Args:
        spec: the study.
        store: the store of its runs.
        grid_points: its rows.
        runs: runs by (row index, seed); rows with the same configuration share their runs.
        finished: outcomes of finished runs by name, with their reports, including those of `choice`.
        missing: runs to execute.
        unmeasured: finished runs whose networks are still to be measured.
        warnings: warnings about the run folders.
        choice: the plan of the runs on which values are chosen, if these have seeds of their own. `grid_points` then
            has one row for each choice: the chosen one, or the first while such runs are missing.
        waiting: runs that are not in `missing` because their values are not chosen yet.
        archive: archive of finished runs that are used whatever code trained them.
        contents: the data of the runs, as far as they can be read here.
    """

    spec: StudySpec
    store: Store
    grid_points: list[GridPoint]
    runs: Mapping[tuple[int, int], Run]
    finished: Mapping[str, RunOutcome]
    missing: list[Run]
    unmeasured: list[Run] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    choice: StudyPlan | None = None
    waiting: list[Run] = field(default_factory=list)
    archive: Archive | None = None
    contents: Contents = field(default_factory=Contents)

    @property
    def open(self) -> list[Run]:
        """The runs that can be executed or measured at once."""
        return [*self.missing, *self.unmeasured]


def plan(
    spec: StudySpec,
    out: Path,
    *,
    make: bool = True,
    retry: bool = False,
    archive: Path | None = None,
    weights: bool = True,
    download: bool = False,
    progress: Progress | None = None,
) -> StudyPlan:
    """Expand a study to grid points and look for finished runs.

    Only the digest of the data is computed, see `flatmin.train.fingerprint.content_of`. If the data are absent, runs
    are identified by their settings, code and data_dir, with a warning. `flatmin.study.trial.check_runs` checks
    whether the runs can be executed.

    A run that raised an error has no result, so it counts as missing. A run whose loss was not finite counts as
    finished.

    With `choose_seeds`, the runs of rows whose values are chosen are planned once the choice can be made; call
    `plan_again` when the missing runs are finished.

    Args:
        spec: the study.
        out: the output folder.
        make: whether to create that folder if it does not exist.
        retry: also repeat runs whose loss was not finite, and measure networks again whose report is incomplete. If
            `make`, their results are removed, as are those of runs without weights whose networks are to be measured.
            Runs of the archive are not repeated.
        archive: archive of finished runs that are used whatever code trained them, see `flatmin.study.archive`.
        weights: whether runs keep their trained weights.
        download: download missing data where that is possible.
        progress: see `flatmin.data.named.Reading`.

    Raises:
        ValueError: inconsistent settings, a folder that cannot be written, or an archive that cannot be read.
    """
    rows = grid_points(spec)  # raises for invalid settings, so it comes before a folder is made
    _check_seeds(spec)
    kept = None if archive is None else Archive(archive)
    contents = Contents(download=download, progress=progress)
    return _plan(spec, rows, Store(out, weights=weights, make=make), kept, contents, retry=retry)


def plan_again(todo: StudyPlan) -> StudyPlan:
    """A new plan of the same study that takes into account the runs finished since."""
    return _plan(todo.spec, grid_points(todo.spec), todo.store, todo.archive, Contents(), retry=False)


def _plan(
    spec: StudySpec, rows: list[GridPoint], store: Store, archive: Archive | None, contents: Contents, *, retry: bool
) -> StudyPlan:
    def planned(spec: StudySpec, rows: list[GridPoint]) -> StudyPlan:
        return _planned(spec, rows, store, archive, contents, retry=retry)

    def told(found: StudyPlan) -> StudyPlan:
        former = former_runs([*found.missing, *found.waiting], store)
        return dataclasses.replace(found, warnings=list(dict.fromkeys([*found.warnings, *former])))

    if not spec.choose_seeds or not any(row.choose for row in rows):
        return told(planned(spec, rows))
    trial = dataclasses.replace(spec, seeds=spec.choose_seeds, choose_seeds=())
    # Only the rows of the table need to be measured and recorded.
    trial = dataclasses.replace(trial, measure=None, record=Record())
    choice = planned(trial, [row for row in grid_points(trial) if row.choose])
    chosen, undecided = _decided(choice)
    kept = [row for row in rows if not row.choose or row.label in chosen]
    own = planned(spec, kept)
    late = {own.runs[i, seed].name for i, row in enumerate(kept) if row.label in undecided for seed in row.configs}
    early = {own.runs[i, seed].name for i, row in enumerate(kept) if row.label not in undecided for seed in row.configs}
    late -= early
    whole = dataclasses.replace(
        own,
        finished={**choice.finished, **own.finished},
        missing=[*choice.missing, *(run for run in own.missing if run.name not in late)],
        unmeasured=[*choice.unmeasured, *(run for run in own.unmeasured if run.name not in late)],
        warnings=[*choice.warnings, *own.warnings],
        choice=choice,
        waiting=[run for run in own.open if run.name in late],
    )
    return told(whole)


def _check_seeds(spec: StudySpec) -> None:
    both = [seed for seed in spec.choose_seeds if seed in spec.seeds]
    if both:
        raise ValueError(f"study {spec.name}: seed {both[0]} is in both seeds and choose_seeds; use different seeds.")


def _decided(choice: StudyPlan) -> tuple[set[str], set[str]]:
    """The labels of the rows that represent each choice, and the subset that is not decided yet."""
    chosen: set[str] = set()
    undecided: set[str] = set()
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, row in enumerate(choice.grid_points):
        groups.setdefault(row.group, []).append(i)
    for group in groups.values():
        outcomes = [
            [choice.finished.get(choice.runs[i, seed].name, RunOutcome()) for seed in choice.grid_points[i].configs]
            for i in group
        ]
        scores = []
        for own in outcomes:
            whole = [(one.result, one.lines) for one in own if one.result is not None and one.result.chosen is not None]
            scores.append(validation_score(whole) if len(whole) == len(own) else None)
        label = choice.grid_points[group[best(scores)]].label
        chosen.add(label)
        if any(one.result is None for own in outcomes for one in own):
            undecided.add(label)
    return chosen, undecided


def _planned(
    spec: StudySpec, rows: list[GridPoint], store: Store, archive: Archive | None, contents: Contents, *, retry: bool
) -> StudyPlan:
    """The plan of some rows, each with its own seeds."""
    runs = {
        (i, seed): run_of(config, store, contents, spec.record, spec.measure)
        for i, grid_point in enumerate(rows)
        for seed, config in grid_point.configs.items()
    }
    warnings = contents.warnings
    for run in unique(runs.values()):
        if archive is not None and (folder := archive.find(run)) is not None:
            store.take(run, folder)
    if archive is not None and archive.unrecorded:
        names = ", ".join(sorted(archive.unrecorded))
        warnings.append(
            f"these runs of {archive.path} are not used, because they lack records that this study needs: {names}."
        )
    finished, missing = finished_and_missing(runs.values(), store, warnings.append)
    unmeasured = []
    again = set()
    for run in unique(runs.values()):
        if (outcome := finished.get(run.name)) is None or outcome.result is None:
            continue
        folder, archived = store.folder(run), store.taken(run)
        if outcome.result.failure is not None:
            again |= {run.name} if retry and not archived else set()
        elif run.view is not None:
            report = stored_report(folder, run.view)
            if retry and not archived and report is not None and lacking(report):
                report = None
                if store.writes:
                    report_path(folder, run.view).unlink(missing_ok=True)
            finished[run.name] = dataclasses.replace(outcome, report=report)
            if report is None and RunFolder(folder).weights.is_file():
                unmeasured.append(run)
            elif report is None and archived:
                warnings.append(f"{run.name} of the archive lacks the measurements that this study needs.")
            elif report is None:
                again.add(run.name)
    for run in unique(runs.values()):
        if run.name in again:
            missing.append(done_again(run, store))
            del finished[run.name]
            if store.writes:
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
        archive=archive,
        contents=contents,
    )


def run_of(
    config: RunConfig,
    store: Store,
    contents: Contents,
    record: Record | None = None,
    view: View | None = None,
) -> Run:
    """The run of a configuration.

    The folder is named after the method rather than the arm, so that studies with different labels share runs.
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
