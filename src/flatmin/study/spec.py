"""What a study is: arms, axes, seeds and published numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flatmin.study.measuring import View
from flatmin.study.record import Record
from flatmin.study.sweep import Axis

# Numbers that every run has; the first two are columns only where a study names them.
NAMED = ("test_top5", "test_best")
METRICS = ("test_acc", "val_acc", "memorised", "train_ce", "lambda_max", "seconds")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A row of the table, or several: one for each point of its axes.

    Args:
        label: what the table calls it.
        settings: of its runs, as text.
        axes: of its own, beside the study's.
        choose: of its axes, those whose value is chosen on validation, beside the study's.
        tune: axes that `tuned` adds to it, beside the study's.
    """

    label: str
    settings: Mapping[str, str]
    axes: tuple[Axis, ...] = ()
    choose: tuple[str, ...] = ()
    tune: tuple[Axis, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Given:
    """Settings that belong to some values of others, as a keyword to the networks that have it.

    Args:
        when: key -> the values that it must have one of.
        settings: as text.
    """

    when: Mapping[str, tuple[str, ...]]
    settings: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published number that stands beside one of ours.

    Args:
        label: of the arm.
        where: values of axes that it belongs to.
        metric: a column, e.g. "test_acc"; see `StudySpec.columns`.
        value: in that column's unit.
        spread: as printed, e.g. a standard deviation; None if none is.
        source: where it was read.
    """

    label: str
    where: Mapping[str, str]
    metric: str
    value: float
    spread: float | None
    source: str


@dataclass(frozen=True, kw_only=True)
class StudySpec:
    """A study before it is expanded to grid points.

    A number may be written as a multiple, such as "2x": of the value that the arm would have without this setting or
    axis. With the setting epochs = "0.5x" an arm trains half as long as the others, however long that is.

    Args:
        name: name of the preset.
        title: title of the table.
        source: what the study reproduces; printed with the table.
        train: the preset of `flatmin train`, or a .toml file, that all runs start from.
        settings: settings of all runs, as text.
        axes: settings with several values, for all arms that have them and do not set them.
        arms: the rows of the table; an arm with axes is several rows.
        baselines: further rows to compare with, such as plain training for twice as long. Overrides leave the settings
            alone that a baseline has of its own.
        seeds: one run of each row with each seed.
        baseline: label of the arm that differences are taken to; the first arm if it is not named.
        columns: columns of the table. Without them: those of `METRICS` that some run has, and what was measured of the
            networks (of more than four numbers the first of each section). Beside these there are test_top5, with more
            than five classes; test_best, the test accuracy at the epoch with the best validation accuracy, of runs
            with test_every = 1; NAME@first and NAME@last, the mean of a diagnostic over the first and the last tenth
            of the lines that `record` asks for; and names of numbers of the report that `measure` asks for, such as
            lambda_1.
        tune: axes that `--tune` adds, to be chosen on validation: to arms that have the key, where there is no axis.
        choose: axes whose value is chosen, for every arm and point of the other axes, by mean validation accuracy.
        choose_seeds: seeds of the runs on which these values are chosen, none of them among `seeds`; only the chosen
            value is then run with `seeds`. Without them the choice is made on the runs with `seeds`.
        record: what runs write down while they train.
        measure: what is measured of the trained networks; none: nothing.
        timing: measure the time of a step of each row, relative to plain training, when the runs are done.
        skip_unfit: leave out arms whose method the network or the loop cannot serve, with a note, instead of refusing.
        given: further settings of the points whose other settings have certain values.
        published: published numbers to stand beside the rows.
        notes: what a reader must know, such as how this study differs from its source.
        changed: the overrides of the preset, except those of seeds.
    """

    name: str
    title: str
    source: str
    train: str
    settings: Mapping[str, str]
    axes: tuple[Axis, ...]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    baseline: str
    baselines: tuple[Arm, ...] = ()
    columns: tuple[str, ...] = ()
    tune: tuple[Axis, ...] = ()
    choose: tuple[str, ...] = ()
    choose_seeds: tuple[int, ...] = ()
    record: Record = field(default_factory=Record)
    measure: View | None = None
    timing: bool = False
    skip_unfit: bool = False
    given: tuple[Given, ...] = ()
    published: tuple[Published, ...] = ()
    notes: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()

    @property
    def every_arm(self) -> tuple[Arm, ...]:
        """Arms and baselines."""
        return (*self.arms, *self.baselines)

    def with_arms(self, change: Callable[[Arm], Arm]) -> StudySpec:
        """The study with each arm and each baseline changed."""
        return dataclasses.replace(
            self, arms=tuple(map(change, self.arms)), baselines=tuple(map(change, self.baselines))
        )


def as_text(value: Any) -> str:
    """A TOML value as one types it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ",".join(map(as_text, value))
    return repr(value) if isinstance(value, float) else str(value)
