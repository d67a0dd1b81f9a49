"""The definition of a study: arms, axes, seeds and published numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flatmin.study.measuring import View
from flatmin.study.record import Record
from flatmin.study.sweep import Axis

# Numbers that every run has; those in NAMED are columns only if a study lists them.
NAMED = ("test_top5", "test_best")
METRICS = ("test_acc", "val_acc", "memorised", "train_ce", "lambda_max", "seconds")


@dataclass(frozen=True, kw_only=True)
class Given:
    """Settings that apply only if other settings have certain values, e.g. a keyword that only one network has.

    Args:
        when: key -> values; every key must have one of its values.
        settings: the settings that apply then, as text.
    """

    when: Mapping[str, tuple[str, ...]]
    settings: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One row of the table, or several: one for each point of its axes.

    Args:
        label: name in the table.
        settings: settings of its runs, as text.
        axes: axes of this arm, in addition to the study's.
        choose: axes whose value is chosen on validation data, in addition to the study's.
        tune: axes that `tuned` adds to this arm, in addition to the study's.
        given: settings of this arm that apply if other settings have certain values, in addition to the study's.
    """

    label: str
    settings: Mapping[str, str]
    axes: tuple[Axis, ...] = ()
    choose: tuple[str, ...] = ()
    tune: tuple[Axis, ...] = ()
    given: tuple[Given, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published number that the table shows beside the measured one.

    Args:
        label: label of the arm.
        where: values of the axes.
        metric: a column, e.g. "test_acc"; see `StudySpec.columns`.
        value: the number, in the column's unit.
        spread: the spread as printed in the source, e.g. a standard deviation; None if there is none.
        source: paper and table.
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

    A number may be written as a multiple, such as "2x", of the value that the arm would have without this setting or
    axis. For example, with the setting epochs = "0.5x" an arm trains half as long as the others.

    Args:
        name: name of the preset.
        title: title of the table.
        source: what the study reproduces; printed with the table.
        train: the preset of `flatmin train`, or a .toml file, that all runs start from.
        settings: settings of all runs, as text.
        axes: settings with several values, for all arms to which they apply and that do not set them.
        arms: the rows of the table; an arm with axes makes several rows.
        baselines: further rows to compare with, such as plain training for twice as long. Overrides do not change
            the settings that a baseline sets itself.
        seeds: seeds; each row has one run for each seed.
        baseline: label of the arm to which the others are compared. Default: the first arm.
        columns: columns of the table. Default: those of `METRICS` that some run has, and the measured quantities of the
            networks (the first of each section if there are more than four). Further columns are test_top5, for more
            than five classes; test_best, the test accuracy at the epoch with the best validation accuracy, for runs
            with test_every = 1; NAME@first and NAME@last, the mean of a diagnostic over the first and the last tenth
            of the recorded lines (see `record`); and names of quantities that `measure` measures, such as lambda_1.
        tune: axes that `--tune` adds, with values to be chosen on validation data, to arms that have the key and no
            such axis.
        choose: axes whose value is chosen by mean validation accuracy, for each arm and point of the other axes.
        choose_seeds: seeds of the runs on which values are chosen, different from `seeds`; only the chosen value is
            then run with `seeds`. Default: values are chosen on the runs with `seeds`.
        record: what runs record while they train.
        measure: what is measured of the trained networks. Default: nothing.
        timing: measure the time of a training step of each row, relative to plain training, after the runs.
        skip_unfit: leave out arms whose method does not work with the network or the training loop, with a note,
            instead of raising an error.
        given: further settings that apply if other settings have certain values.
        published: published numbers to show beside the measured ones.
        notes: notes for the reader, such as how this study differs from its source.
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
    """A TOML value as it is typed on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ",".join(map(as_text, value))
    return repr(value) if isinstance(value, float) else str(value)
