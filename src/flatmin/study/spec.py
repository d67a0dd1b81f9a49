"""What a study is: arms, axes, seeds and published numbers, from a TOML preset and `key=value` words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flatmin.recipes import compose, method_table
from flatmin.study.sweep import Axis, points, read_axis, tidy, words
from flatmin.train.config import RunConfig
from flatmin.train.preset import load_run
from flatmin.train.settings import field_types, read_preset
from flatmin.words import suggest

_LISTS = tuple(key for key, kind in field_types(RunConfig).items() if str(kind).startswith("tuple"))
_ARM = ("label", "axes")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A row of the table, or several: one for each point of its axes.

    Args:
        label: what the table calls it.
        settings: of its runs, as words.
        axes: of its own, beside the study's.
    """

    label: str
    settings: Mapping[str, str]
    axes: tuple[Axis, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published number that stands beside one of ours.

    Args:
        label: of the arm.
        where: values of axes that it belongs to.
        metric: a column, e.g. "test_acc".
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
    """A study before it is unfolded.

    Args:
        name: of the preset.
        title: of the table.
        source: what it remakes.
        train: the preset of `flatmin train` that its runs start from.
        settings: of all runs, as words.
        axes: of all arms.
        arms: rows.
        seeds: one run each.
        baseline: label of the arm that differences are taken to.
        published: numbers to stand beside.
        notes: what a reader must know, such as how this differs from the source.
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
    published: tuple[Published, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row: an arm at one point of the axes, with its runs by seed.

    Args:
        arm: label.
        values: of the axes that have more than one value.
        configs: by seed.
    """

    arm: str
    values: Mapping[str, str]
    configs: Mapping[int, RunConfig] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Arm and values."""
        return " ".join([self.arm, *words(self.values)])


def read_study(name: str, overrides: Sequence[str] = (), *, demo: bool = False) -> StudySpec:
    """A study by the name of its preset or the path of a .toml file.

    Args:
        name: see `flatmin study list`.
        overrides: "epochs=20" sets all runs, "rho=0.1,0.2" makes an axis of all arms that have the key, "seed=0..4"
            says which seeds.
        demo: the small twin that the preset has.

    Raises:
        ValueError: an unknown preset or key, or a table of another form.
    """
    table = read_preset(name, "study")
    twin = table.pop("demo", None)
    if demo:
        if twin is None:
            raise ValueError(f"the study {name} has no demo.")
        table = {**table, **twin, "published": []}
    spec = _spec(name, table)
    for word in overrides:
        axis = read_axis(word, lists=_LISTS)
        if axis.key == "seed":
            spec = dataclasses.replace(spec, seeds=tuple(map(_seed, axis.values)))
        elif len(axis.values) == 1:
            spec = _set(spec, axis.key, axis.values[0])
        else:
            spec = _set(dataclasses.replace(spec, axes=(*_without(spec.axes, axis.key), axis)), axis.key, None)
    return spec


def cells(spec: StudySpec) -> list[Cell]:
    """All rows with their configurations.

    Raises:
        ValueError: settings that `flatmin train` would refuse.
    """
    found = []
    for arm in spec.arms:
        axes = [axis for axis in spec.axes if axis.key not in {own.key for own in arm.axes} and _takes(spec, arm, axis)]
        axes += arm.axes
        shown = {axis.key for axis in axes if len(axis.values) > 1}
        for point in points(axes):
            chosen = {**spec.settings, **arm.settings, **point}
            configs = {seed: load_run(spec.train, words({**chosen, "seed": str(seed)}))[0] for seed in spec.seeds}
            values = {key: value for key, value in point.items() if key in shown}
            found.append(Cell(arm=arm.label, values=values, configs=configs))
    return found


def _takes(spec: StudySpec, arm: Arm, axis: Axis) -> bool:
    """Whether an arm has what an axis of all arms varies: methods that stay at w have no radius."""
    if axis.key != "rho":
        return True
    method = arm.settings.get("method", spec.settings.get("method", "sam"))
    plugins = tuple(spec.settings.get("plugins", "").split(",")) if spec.settings.get("plugins") else ()
    return compose(method, method_table(plugins)).ascends


def _without(axes: Sequence[Axis], key: str) -> tuple[Axis, ...]:
    return tuple(axis for axis in axes if axis.key != key)


def _set(spec: StudySpec, key: str, value: str | None) -> StudySpec:
    """The study with a setting for all arms in place of whatever they had; None: an axis of the study has it."""
    arms = tuple(
        dataclasses.replace(
            arm, settings={k: v for k, v in arm.settings.items() if k != key}, axes=_without(arm.axes, key)
        )
        for arm in spec.arms
    )
    if value is None:
        return dataclasses.replace(spec, arms=arms)
    return dataclasses.replace(spec, arms=arms, axes=_without(spec.axes, key), settings={**spec.settings, key: value})


_KEYS = tuple(f.name for f in dataclasses.fields(StudySpec) if f.name != "name")


def _spec(name: str, table: Mapping[str, Any]) -> StudySpec:
    """A preset's table, checked.

    Raises:
        ValueError: an entry that is missing, unknown or of another form.
    """
    for key in table:
        if key not in _KEYS:
            raise ValueError(f"study {name}: unknown entry {key!r}{suggest(key, _KEYS)} (entries: {', '.join(_KEYS)})")
    for key in ("title", "train", "arms"):
        if not table.get(key):
            raise ValueError(f"study {name} has no {key}.")
    arms = tuple(_arm(name, one) for one in table["arms"])
    labels = [arm.label for arm in arms]
    baseline = str(table.get("baseline", labels[0]))
    double = [label for i, label in enumerate(labels) if label in labels[:i]]
    if double or baseline not in labels:
        raise ValueError(
            f"study {name}: the arm {double[0]!r} is there twice."
            if double
            else f"study {name}: the baseline {baseline!r} is no arm{suggest(baseline, labels)}"
        )
    return StudySpec(
        name=name,
        title=str(table["title"]),
        source=str(table.get("source", "")),
        train=str(table["train"]),
        settings=_words(table.get("settings", {})),
        axes=_axes(table.get("axes", {})),
        arms=arms,
        seeds=tuple(int(seed) for seed in table.get("seeds", (0, 1, 2))),
        baseline=baseline,
        published=tuple(_published(name, one, labels) for one in table.get("published", ())),
        notes=tuple(map(str, table.get("notes", ()))),
    )


def _arm(name: str, table: Mapping[str, Any]) -> Arm:
    if not table.get("label"):
        raise ValueError(f"study {name}: an arm has no label.")
    settings = {key: value for key, value in table.items() if key not in _ARM}
    return Arm(label=str(table["label"]), settings=_words(settings), axes=_axes(table.get("axes", {})))


def _published(name: str, table: Mapping[str, Any], labels: Sequence[str]) -> Published:
    wanted = ("label", "metric", "value", "source")
    missing = [key for key in wanted if key not in table]
    if missing or table["label"] not in labels:
        what = f"no {missing[0]}" if missing else f"the label {table['label']!r}, which is no arm"
        raise ValueError(f"study {name}: a published number has {what}; it needs {', '.join(wanted)}.")
    where = {key: tidy(_word(value)) for key, value in table.items() if key not in (*wanted, "spread")}
    spread = None if "spread" not in table else float(table["spread"])
    return Published(
        label=str(table["label"]),
        where=where,
        metric=str(table["metric"]),
        value=float(table["value"]),
        spread=spread,
        source=str(table["source"]),
    )


def _axes(table: Mapping[str, Any]) -> tuple[Axis, ...]:
    return tuple(Axis(key, tuple(map(_word, values))) for key, values in table.items())


def _words(table: Mapping[str, Any]) -> dict[str, str]:
    return {key: _word(value) for key, value in table.items()}


def _word(value: Any) -> str:
    """A TOML value as one types it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ",".join(map(_word, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _seed(word: str) -> int:
    if not word.isdigit():
        raise ValueError(f"seed={word} is not a whole number.")
    return int(word)
