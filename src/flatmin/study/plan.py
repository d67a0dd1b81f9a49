"""What a study will do: its rows, their runs, and which of these are finished."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flatmin.recipes import Recipe
from flatmin.study.cards import card_path
from flatmin.study.executors import Outcome, finished_and_missing
from flatmin.study.measuring import View
from flatmin.study.record import Record
from flatmin.study.spec import StudySpec
from flatmin.study.store import Run, Store, unique
from flatmin.study.unfold import Cell, cells
from flatmin.train.config import RunConfig
from flatmin.train.fingerprint import digest, external_versions, package_digest, user_sources
from flatmin.train.folder import RunFolder
from flatmin.train.trainer import build_recipe


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """What a study will do.

    Args:
        spec: the study.
        store: where its runs are.
        cells: its rows.
        runs: by (row, seed); rows of one configuration share their runs.
        found: outcomes of finished runs by name.
        missing: runs to do.
        warnings: about the run folders.
    """

    spec: StudySpec
    store: Store
    cells: list[Cell]
    runs: Mapping[tuple[int, int], Run]
    found: Mapping[str, Outcome]
    missing: list[Run]
    warnings: list[str] = field(default_factory=list)


def plan(spec: StudySpec, out: Path, *, make: bool = True, retry: bool = False) -> StudyPlan:
    """Unfold a study and look for finished runs; no data are read.

    A run that raised an error has no result, so it is among the missing ones. One whose loss was not finite has.

    Args:
        spec: the study.
        out: the folder of the runs.
        make: make that folder if it does not exist.
        retry: also do those runs again whose loss was not finite. If `make`, the results of these are taken away, as
            are those of runs without weights whose networks are to be measured.

    Raises:
        ValueError: settings that do not go together, or a folder that cannot be written.
    """
    rows = cells(spec)
    store = Store(out, make=make)
    runs = {
        (i, seed): run_of(config, spec.record) for i, cell in enumerate(rows) for seed, config in cell.configs.items()
    }
    warnings: list[str] = []
    found, missing = finished_and_missing(runs.values(), store, warnings.append)
    again = set() if spec.measure is None else _without_weights(spec.measure, store, runs.values(), found)
    if retry:
        again |= {name for name, outcome in found.items() if outcome.result is not None and outcome.result.failure}
    for run in unique(runs.values()):
        if run.name in again:
            missing.append(run)
            del found[run.name]
            if make:
                (store.folder(run) / "result.json").unlink(missing_ok=True)
    return StudyPlan(spec=spec, store=store, cells=rows, runs=runs, found=found, missing=missing, warnings=warnings)


def _without_weights(view: View, store: Store, runs: Iterable[Run], found: Mapping[str, Outcome]) -> set[str]:
    """Names of finished runs whose networks are to be measured and are not there."""
    names = set()
    for run in runs:
        outcome, folder = found.get(run.name), store.folder(run)
        ended = outcome is not None and outcome.result is not None and outcome.result.failure is None
        if ended and not RunFolder(folder).weights.is_file() and not card_path(folder, view).is_file():
            names.add(run.name)
    return names


def run_of(config: RunConfig, record: Record | None = None) -> Run:
    """The run of a configuration.

    The method names its folder, not the arm: studies that call one configuration by two names share its runs.
    """
    return Run(label=config.method, config=config, code=_code(config), record=record or Record())


def _code(config: RunConfig) -> str:
    """Digest of the code that decides a run's outcome; a named data set is known by its name."""
    specs = [*config.plugins, *(spec for spec in (config.model, config.data) if ":" in spec)]
    recipes: list[Recipe] = [build_recipe(config)]
    return digest(user_sources(specs, recipes), package_digest(), *external_versions(specs))
