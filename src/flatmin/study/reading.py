"""Read a study from a TOML preset with `key=value` overrides."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from flatmin.measure.report import ReportSettings, chosen
from flatmin.study.measuring import View
from flatmin.study.record import Record
from flatmin.study.spec import METRICS, NAMED, Arm, Given, Published, StudySpec, as_text
from flatmin.study.sweep import Axis, is_multiple, read_axis, tidy
from flatmin.train.config import RunConfig
from flatmin.train.options import Options
from flatmin.train.settings import articled, describe, field_types, fill, read_preset
from flatmin.words import suggest

_LISTS = tuple(key for key, kind in field_types(RunConfig).items() if str(kind).startswith("tuple"))
_ARM = ("label", "axes", "choose", "tune")
_FIXED = ("method", "plugins")


def read_study(name: str, overrides: Sequence[str] = (), *, demo: bool = False) -> StudySpec:
    """Read a study by the name of its preset or the path of a .toml file.

    Args:
        name: a name from `flatmin study list`, or a path.
        overrides: see `changed`.
        demo: read the scaled-down version of the preset.

    Raises:
        ValueError: an unknown preset or key, or an entry of the wrong form.
    """
    table = read_preset(name, "study")
    scaled_down = table.pop("demo", None)
    if demo:
        if scaled_down is None:
            raise ValueError(f"the study {name} has no scaled-down version; leave out --demo.")
        table = {**table, **scaled_down, "published": []}
    return changed(_spec(name, table), overrides)


def changed(spec: StudySpec, overrides: Sequence[str]) -> StudySpec:
    """The study with overrides.

    Args:
        spec: of `read_study`.
        overrides: "epochs=20" applies to all runs, "rho=0.1,0.2" becomes an axis of all arms that have the key,
            "seed=0..4" sets the seeds, and "rho.NAME=0.1" applies only to arms with that label or method.

    Raises:
        ValueError: an override of the wrong form, or an unknown key or arm.
    """
    axes = [(read_axis(override, lists=_LISTS), override) for override in overrides]
    own = [(axis, override) for axis, override in axes if axis.key.startswith("rho.")]
    for axis, override in axes:
        if (axis, override) not in own:
            spec = _changed(spec, axis, override)
    for axis, override in own:
        spec = _changed_for_one(spec, axis, override)
    _apart(spec)
    return spec


def _changed_for_one(spec: StudySpec, axis: Axis, override: str) -> StudySpec:
    """The study with an axis of the radius for the arms with one label or method."""
    name = axis.key.removeprefix("rho.")
    named = [arm for arm in spec.every_arm if name in (arm.label, arm.settings.get("method"))]
    if not named:
        names = list(dict.fromkeys(x for arm in spec.arms for x in (arm.label, arm.settings.get("method", arm.label))))
        raise ValueError(
            f"{axis.key}: this study has no such arm or method{suggest(name, names)} (arms: {', '.join(names)})"
        )

    def change(arm: Arm) -> Arm:
        if arm not in named:
            return arm
        own = _without(arm, "rho", keep=all(map(is_multiple, axis.values)))
        return dataclasses.replace(own, axes=(*own.axes, Axis("rho", axis.values)))

    return dataclasses.replace(spec.with_arms(change), changed=(*spec.changed, override))


def _changed(spec: StudySpec, axis: Axis, override: str) -> StudySpec:
    """The study with an axis of one or more values that replaces the settings and axes with the same key."""
    if axis.key == "seed":
        return dataclasses.replace(spec, seeds=_seeds(axis.values))
    _as_texts(spec.name, {axis.key: override})
    if axis.key in _FIXED and len(axis.values) > 1:
        raise ValueError(f"{axis.key} takes one value, got {override}; write one arm for each value in a .toml file.")
    multiple = all(map(is_multiple, axis.values))
    arms = [_without(arm, axis.key, keep=multiple) for arm in spec.arms]
    before = {one.key: one.values[0] for one in spec.axes if one.key == axis.key and len(one.values) == 1}
    settings = {key: value for key, value in spec.settings.items() if key != axis.key or multiple}
    settings |= before if multiple else {}
    axes = [axis if one.key == axis.key else one for one in spec.axes]
    if axis.key in _FIXED:
        settings[axis.key] = axis.values[0]
        axes = [one for one in axes if one.key != axis.key]
    elif axis not in axes:
        axes.append(axis)
    changed = (*(one for one in spec.changed if one.partition("=")[0] != axis.key), override)
    return dataclasses.replace(spec, arms=tuple(arms), settings=settings, axes=tuple(axes), changed=changed)


def _without(arm: Arm, key: str, *, keep: bool) -> Arm:
    """The arm without its setting or axis for a key; with `keep`, its value stays as a setting to be multiplied."""
    settings = {name: value for name, value in arm.settings.items() if name != key or keep}
    if keep:
        settings |= {one.key: one.values[0] for one in arm.axes if one.key == key and len(one.values) == 1}
    return dataclasses.replace(arm, settings=settings, axes=tuple(one for one in arm.axes if one.key != key))


def _apart(spec: StudySpec) -> None:
    """Raise ValueError if two arms of a study have the same runs."""
    for i, arm in enumerate(spec.every_arm):
        for other in spec.every_arm[:i]:
            if (arm.settings, arm.axes) == (other.settings, other.axes):
                by = f" with {' '.join(spec.changed)}" if spec.changed else ""
                raise ValueError(f"study {spec.name}: the arms {other.label!r} and {arm.label!r} are identical{by}.")


_KEYS = tuple(f.name for f in dataclasses.fields(StudySpec) if f.name not in ("name", "changed"))
_TABLES = ("settings", "axes", "tune", "record", "measure")
_FLAGS = ("timing", "skip_unfit")
_LISTED = ("arms", "baselines", "seeds", "columns", "choose", "choose_seeds", "given", "published", "notes")


def _spec(name: str, table: Mapping[str, Any]) -> StudySpec:
    """The study of a preset's table.

    Raises:
        ValueError: a missing or unknown entry, or one of the wrong form.
    """
    for key, value in table.items():
        if key not in _KEYS:
            if key == "methods" and "arms" not in table:
                raise ValueError(f"{name} is a preset of `flatmin compare`; run `flatmin compare --preset {name}`.")
            raise ValueError(f"study {name}: unknown entry {key!r}{suggest(key, _KEYS)} (entries: {', '.join(_KEYS)})")
        wanted: type = dict if key in _TABLES else list if key in _LISTED else bool if key in _FLAGS else str
        _expect(name, key, value, wanted)
        if key in ("arms", "baselines", "given", "published"):
            for one in value:
                _expect(name, f"an entry of {key}", one, dict)
    for key in ("title", "train", "arms"):
        if not table.get(key):
            raise ValueError(f"study {name} has no {key}.")
    arms = tuple(_arm(name, one) for one in table["arms"])
    baselines = tuple(_arm(name, one) for one in table.get("baselines", ()))
    labels = [arm.label for arm in (*arms, *baselines)]
    baseline = table.get("baseline", labels[0])
    double = [label for i, label in enumerate(labels) if label in labels[:i]]
    if double:
        raise ValueError(f"study {name}: the arm {double[0]!r} exists twice.")
    if baseline not in labels:
        raise ValueError(f"study {name}: the baseline {baseline!r} is not an arm{suggest(baseline, labels)}")
    spec = StudySpec(
        name=name,
        title=table["title"],
        source=table.get("source", ""),
        train=table["train"],
        settings=_as_texts(name, table.get("settings", {})),
        axes=_axes(name, table.get("axes", {})),
        arms=arms,
        seeds=_seeds(table.get("seeds", (0, 1, 2))),
        baseline=baseline,
        baselines=baselines,
        columns=_names(name, "columns", table),
        tune=_axes(name, table.get("tune", {})),
        choose=_names(name, "choose", table),
        choose_seeds=_seeds(table["choose_seeds"]) if "choose_seeds" in table else (),
        record=_record(name, table.get("record", {})),
        measure=_view(name, table["measure"]) if "measure" in table else None,
        timing=table.get("timing", False),
        skip_unfit=table.get("skip_unfit", False),
        given=tuple(_given(name, one) for one in table.get("given", ())),
        published=tuple(_published(name, one) for one in table.get("published", ())),
        notes=tuple(map(str, table.get("notes", ()))),
    )
    if spec.choose_seeds and not spec.choose and not any(arm.choose for arm in (*arms, *baselines)):
        raise ValueError(f"study {name} has choose_seeds but nothing to choose; list axes in choose.")
    for column in spec.columns:
        _check_column(spec, column)
    for one in spec.published:
        _check_published(spec, one)
    return spec


def _names(name: str, key: str, table: Mapping[str, Any]) -> tuple[str, ...]:
    names = table.get(key, ())
    _expect(name, key, list(names) if isinstance(names, tuple) else names, list)
    return tuple(map(str, names))


def _record(name: str, table: Mapping[str, Any]) -> Record:
    try:
        return fill(Record, table, origin="record")
    except ValueError as error:
        raise ValueError(f"study {name}, record: {error}") from error


_VIEW = ("what", "split", "examples", "batch", "params", "mode", "dtype")


def _view(name: str, table: Mapping[str, Any]) -> View:
    """The view of the table `measure`; its table `settings` has the fields of `flatmin.measure.ReportSettings`."""
    for key, value in table.items():
        if key != "settings" and key not in _VIEW:
            raise ValueError(f"study {name}: measure has no {key!r}{suggest(key, _VIEW)} (entries: {', '.join(_VIEW)})")
        if key != "settings":
            wanted = int if key in ("examples", "batch") else str
            if type(value) is not wanted:
                raise ValueError(f"study {name}: measure.{key} = {value!r} is not {articled(describe(wanted))}.")
    try:
        own = fill(ReportSettings, table.get("settings", {}), origin="measure.settings")
        view = View(**{**{key: value for key, value in table.items() if key != "settings"}, "settings": own})
        chosen(view.what)
    except ValueError as error:
        raise ValueError(f"study {name}, measure: {error}") from error
    return view


def _check_column(spec: StudySpec, column: str) -> None:
    """Raise ValueError for a column that no run of the study can fill."""
    diagnostic, _, when = column.partition("@")
    if when:
        good = when in ("first", "last") and diagnostic and spec.record.diagnostics
        wanted = "NAME@first or NAME@last, with diagnostics in [record]"
    else:
        good = column in (*METRICS, *NAMED) or spec.measure is not None
        wanted = f"{', '.join((*METRICS, *NAMED))}, or a quantity that [measure] measures"
    if not good:
        raise ValueError(f"study {spec.name}: unknown column {column!r}; expected {wanted}.")


def _expect(name: str, what: str, value: Any, wanted: type) -> None:
    if not isinstance(value, wanted):
        kinds: dict[type, str] = {dict: "a table", list: "a list", str: "text", bool: "true or false"}
        raise ValueError(f"study {name}: {what} is not {kinds[wanted]}.")


def _arm(name: str, table: Mapping[str, Any]) -> Arm:
    if not table.get("label"):
        raise ValueError(f"study {name}: an arm has no label.")
    settings = {key: value for key, value in table.items() if key not in _ARM}
    axes = table.get("axes", {})
    _expect(name, f"axes of {table['label']!r}", axes, dict)
    tune = table.get("tune", {})
    _expect(name, f"tune of {table['label']!r}", tune, dict)
    return Arm(
        label=str(table["label"]),
        settings=_as_texts(name, settings),
        axes=_axes(name, axes),
        choose=_names(name, "choose", table),
        tune=_axes(name, tune),
    )


def _given(name: str, table: Mapping[str, Any]) -> Given:
    settings = table.get("set", {})
    _expect(name, "set of given", settings, dict)
    when = {key: value if isinstance(value, list) else [value] for key, value in table.items() if key != "set"}
    if not settings or not when:
        raise ValueError(f"study {name}: an entry of given needs a key with its values, and a table set.")
    tidied = {key: tuple(tidy(as_text(value)) for value in values) for key, values in when.items()}
    return Given(when=tidied, settings=_as_texts(name, settings))


def _published(name: str, table: Mapping[str, Any]) -> Published:
    wanted = ("label", "metric", "value", "source")
    missing = [key for key in wanted if key not in table]
    if missing:
        raise ValueError(f"study {name}: a published number has no {missing[0]}; it needs {', '.join(wanted)}.")
    for key in ("value", "spread"):
        if isinstance(table.get(key, 0), bool) or not isinstance(table.get(key, 0), (int, float)):
            raise ValueError(f"study {name}: the {key} {table[key]!r} of a published number is not a number.")
    where = {key: tidy(as_text(value)) for key, value in table.items() if key not in (*wanted, "spread")}
    return Published(
        label=str(table["label"]),
        where=where,
        metric=str(table["metric"]),
        value=float(table["value"]),
        spread=float(table["spread"]) if "spread" in table else None,
        source=str(table["source"]),
    )


def _check_published(spec: StudySpec, one: Published) -> None:
    """Raise ValueError for a published number that belongs to no row, which a typing error would cause."""
    arm = next((arm for arm in spec.every_arm if arm.label == one.label), None)
    if arm is None:
        raise ValueError(f"study {spec.name}: a published number has the label {one.label!r}, which is not an arm.")
    if one.metric not in (spec.columns or METRICS):
        raise ValueError(
            f"study {spec.name}: a published number has the unknown metric {one.metric!r} "
            f"(columns: {', '.join(spec.columns or METRICS)})"
        )
    axes = {axis.key: axis.values for axis in (*spec.axes, *arm.axes)}
    keys = {*axes, *field_types(RunConfig), *spec.settings, *arm.settings}
    for key, value in one.where.items():
        if key not in keys or value not in axes.get(key, (value,)):
            raise ValueError(f"study {spec.name}: a published number is for {key}={value}, which no run has.")


def _axes(name: str, table: Mapping[str, Any]) -> tuple[Axis, ...]:
    for key, values in table.items():
        _expect(name, f"the axis {key}", values, list)
        if key in _FIXED:
            raise ValueError(f"study {name}: {key} cannot be an axis; write one arm for each value.")
    _as_texts(name, table)
    return tuple(Axis(key, tuple(map(as_text, values))) for key, values in table.items())


def _as_texts(name: str, table: Mapping[str, Any]) -> dict[str, str]:
    """Settings as text.

    Raises:
        ValueError: a key that is not a setting of runs.
    """
    for key, value in table.items():
        _expect_flat(name, key, value)
        if key == "seed":
            raise ValueError(f"study {name}: seed is not a setting; write the seeds in the list seeds.")
        if key in field_types(Options):
            own = "; it belongs into [record]" if key in field_types(Record) else ""
            raise ValueError(f"study {name}: {key} is an option of logging and storage, not a setting of runs{own}.")
    return {key: as_text(value) for key, value in table.items()}


def _expect_flat(name: str, key: str, value: Any) -> None:
    if isinstance(value, dict):
        raise ValueError(f'study {name}: {key} is a table; write its entries as "{key}.NAME" = value.')


def _seeds(values: Sequence[Any]) -> tuple[int, ...]:
    return tuple(map(_seed, Axis("seed", tuple(map(as_text, values))).values))


def _seed(word: str) -> int:
    if not word.isdigit():
        raise ValueError(f"seed={word} is not a whole number from 0.")
    return int(word)
