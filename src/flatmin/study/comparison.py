"""The comparison of methods on one task: a study with one arm for each method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flatmin.methods import BASE, compose, method_table
from flatmin.study.expand import grid_points, tuned
from flatmin.study.reading import changed, read_study
from flatmin.study.spec import Arm, StudySpec, as_text
from flatmin.study.sweep import tidy
from flatmin.train.config import RunConfig
from flatmin.train.locate import find_module
from flatmin.train.radii import radius_of
from flatmin.train.settings import parse, read_preset, split_override
from flatmin.train.sources import check_device, load_clean
from flatmin.train.trainer import Trainer

ALL = "all"  # every method of the table
# Words of the comparison beside those of a study.
_WORDS: Mapping[str, Any] = {
    "title": str,
    "methods": tuple[str, ...],
    "baselines": bool,
    "seeds": int,
    "noise": float | None,
    "tune": bool,
    "model": str,
    "data": str,
    "plugins": tuple[str, ...],
    "timing": bool,
    "strong_weight_decay": float,
    "early_share": float,
}
_ADAM_LR = "0.001"  # torch's default


def comparison(preset: str = "digits", overrides: Sequence[str] = (), **options: Any) -> StudySpec:
    """The study that `flatmin compare` does.

    Args:
        preset: a study of the package, or a .toml file.
        overrides: those of `flatmin.study.reading.changed`, and the options as words: "methods=sgd,sam" ("all" is every
            method, those that the network cannot serve left out), "seeds=10", "tune=true", "baselines=false",
            "timing=false", "strong_weight_decay=0.05" and "early_share=0.3" of the baselines.
        options: the same by name, as a command line has them; they win, and None stands for one that is not given.

    A network or data of one's own has no radii in the preset: each method takes its geometry's default then. Labels are
    made wrong on the data of the preset only, unless `noise` says so.

    Raises:
        ValueError: an unknown preset, option, method or parameter, or a value of another type or out of range.
    """
    words: dict[str, Any] = {}
    rest: list[str] = []
    for override in overrides:
        key, text = split_override(override)
        several = key in ("model", "data") and "," in text
        if key in _WORDS and not several:
            words[key] = parse(key, text, _WORDS[key])
        else:
            rest.append(override)
    words |= {key: value for key, value in options.items() if value is not None}
    spec = _read(preset)
    spec = _with_methods(spec, words)
    given = {split_override(override)[0] for override in rest}
    rest += _settings(spec, words, given)
    spec = _with_base(spec, words, given, rest)
    if words.get("seeds", 1) < 1:
        raise ValueError(f"seeds must be at least 1, got {words['seeds']}.")
    if "seeds" in words:
        rest.append(f"seed=0..{words['seeds'] - 1}")
    spec = dataclasses.replace(changed(spec, rest), timing=words.get("timing", spec.timing))
    if words.get("tune", False):
        spec = tuned(spec)
    return _titled(spec, words)


def _read(preset: str) -> StudySpec:
    """A study, or the comparison of a file in the form that comparisons had before they were studies."""
    if preset.lower().endswith(".toml"):
        table = read_preset(preset, "study")
        if "arms" not in table:
            return _former(preset, table)
    return read_study(preset)


def _former(name: str, table: dict[str, Any]) -> StudySpec:
    """A study from a flat table: settings, `methods`, `seeds` as their number, radii by method in `rho`."""
    table = dict(table)
    spec = read_study("digits")
    radii = table.pop("rho", {})
    words = {key: table.pop(key) for key in list(table) if key in _WORDS}
    skip = bool(table.pop("skip_unfit", False))
    params, axes = table.pop("params", {}), table.pop("axes", {})
    spec = dataclasses.replace(spec, name=Path(name).stem, skip_unfit=skip)
    words.setdefault("methods", ["sgd", "sam", "vasso"])
    spec = _with_methods(spec, {"methods": tuple(words.pop("methods")), "plugins": tuple(words.get("plugins", ()))})
    methods = method_table(tuple(words.get("plugins", ())))

    def radius(arm: Arm) -> Arm:
        method = arm.settings["method"]
        rho = radius_of(method, compose(method, methods), radii, methods)
        return arm if rho is None else dataclasses.replace(arm, settings={**arm.settings, "rho": as_text(rho)})

    spec = spec.with_arms(radius)
    overrides = [f"{key}={as_text(value)}" for key, value in {**words, **table, **params, **axes}.items()]
    return _applied(spec, overrides)


def _applied(spec: StudySpec, overrides: Sequence[str]) -> StudySpec:
    """Words and overrides laid over a study that is read, as its own content."""
    words = {key: parse(key, text, _WORDS[key]) for key, text in map(split_override, overrides) if key in _WORDS}
    rest = [word for word in overrides if split_override(word)[0] not in _WORDS]
    given = {split_override(word)[0] for word in rest}
    spec = changed(_with_methods(spec, words), [*rest, *_settings(spec, words, given)])
    if "seeds" in words:
        spec = dataclasses.replace(spec, seeds=tuple(range(words["seeds"])))
    spec = dataclasses.replace(spec, timing=words.get("timing", spec.timing), title=words.get("title", spec.title))
    return dataclasses.replace(tuned(spec) if words.get("tune") else spec, changed=())


def _with_methods(spec: StudySpec, words: Mapping[str, Any]) -> StudySpec:
    """The study with the wanted arms and baselines."""
    plugins = words.get("plugins", ())
    for plugin in plugins:
        find_module(plugin, option="plugin")
    table = method_table(plugins)
    arms, skip = spec.arms, spec.skip_unfit
    if "methods" in words:
        names = tuple(words["methods"])
        if ALL in names:
            names, skip = (*table, *(name for name in names if name != ALL and name not in table)), True
        double = [name for i, name in enumerate(names) if name in names[:i]]
        if double:
            raise ValueError(f"the method {double[0]!r} is listed twice.")
        arms = tuple(Arm(label=name, settings={"method": name}) for name in names)
    baselines = spec.baselines if words.get("baselines", True) else ()
    for key, setting, share in (("strong_weight_decay", "weight_decay", ""), ("early_share", "epochs", "x")):
        if key in words:
            if not 0 < words[key] < (1 if share else float("inf")):
                raise ValueError(f"{key} must be above 0{' and below 1' * bool(share)}, got {words[key]!r}.")
            baselines = tuple(_replaced(arm, setting, f"{tidy(repr(words[key]))}{share}") for arm in baselines)
    if not arms and not baselines:
        raise ValueError("nothing to compare: there is no method and no baseline.")
    if any(":" in words.get(key, "") for key in ("model", "data")):
        arms = tuple(_with_default_radius(arm, table) for arm in arms)
    labels = [arm.label for arm in (*arms, *baselines)]
    baseline = spec.baseline if spec.baseline in labels else labels[0]
    return dataclasses.replace(spec, arms=arms, baselines=baselines, baseline=baseline, skip_unfit=skip)


def _replaced(arm: Arm, key: str, value: str) -> Arm:
    """A baseline that has this setting of its own, with another value; "2x" stays, as it is about cost."""
    old = arm.settings.get(key)
    if old is None or old == "2x":
        return arm
    return dataclasses.replace(arm, settings={**arm.settings, key: value})


def _with_default_radius(arm: Arm, table: Mapping[str, Any]) -> Arm:
    recipe = compose(arm.settings["method"], table)
    if not recipe.ascends or recipe.default_rho is None:
        return arm
    return dataclasses.replace(arm, settings={**arm.settings, "rho": as_text(recipe.default_rho)})


def _settings(spec: StudySpec, words: Mapping[str, Any], given: set[str]) -> list[str]:
    """The words that are settings of runs, as overrides."""
    made = [f"{key}={as_text(words[key])}" for key in ("model", "data", "plugins") if words.get(key)]
    noise = words.get("noise")
    if noise is not None:
        made.append(f"noise={as_text(noise)}")
    elif words.get("data") not in (None, read_preset(spec.train, "train").get("data")) and "noise" not in given:
        made.append("noise=0")
    return made


def _with_base(spec: StudySpec, words: Mapping[str, Any], given: set[str], rest: list[str]) -> StudySpec:
    """The study with plain training called by the name of the base optimizer; Adam gets a learning rate of its own."""
    optimizer = next((text for key, text in map(split_override, rest) if key == "optimizer"), "sgd")
    notes = spec.notes
    if optimizer != "sgd" and "," not in optimizer and "lr" not in given:
        rest.append(f"lr={_ADAM_LR}")
        notes = (*notes, f"lr is {_ADAM_LR}, the usual one of {optimizer}; the preset's is for SGD.")
    name = optimizer if "," not in optimizer else "base"

    def rename(label: str) -> str:
        plain = label == BASE or label.startswith((f"{BASE} ", f"{BASE},"))
        return f"{name}{label.removeprefix(BASE)}" if plain else name if label == "base" else label

    renamed = spec.with_arms(lambda arm: dataclasses.replace(arm, label=rename(arm.label)))
    return dataclasses.replace(renamed, baseline=rename(spec.baseline), notes=notes)


def _titled(spec: StudySpec, words: Mapping[str, Any]) -> StudySpec:
    """The study with a title that names data and network of one's own, and the share of wrong labels."""
    config = grid_points(spec)[0].config
    title = words.get("title", spec.title)
    if "title" not in words and any(key in words for key in ("model", "data")):
        title = f"{_name(config.model)} on {_name(config.data)}"
    noise = f", {config.noise:.0%} of the training labels wrong" if config.noise else ""
    return dataclasses.replace(spec, title=title + noise)


def _name(source: str) -> str:
    """A network or data set as a title names it: of "package.module:function" the function."""
    return source.rpartition(":")[2] or source


def without_unfit(spec: StudySpec) -> StudySpec:
    """The study without the arms whose method the network or the loop cannot serve; its notes say which and why.

    Raises:
        OSError, ValueError, ModuleNotFoundError: the data or a device cannot be had, or no arm is left.
    """
    if not spec.skip_unfit:
        return spec
    kept, refusals = [], {}
    first = grid_points(spec)[0].config
    check_device(first.device)
    data = {_place(first): load_clean(first).to(first.device)}
    for arm in spec.arms:
        try:
            config = grid_points(dataclasses.replace(spec, arms=(arm,), baselines=(), axes=(), choose=()))[0].config
            place = _place(config)
            if place not in data:
                data[place] = load_clean(config).to(config.device)
            Trainer(config, data=data[place])
        except (ValueError, TypeError) as error:
            refusals[arm.label] = str(error)
        else:
            kept.append(arm)
    if not kept:
        raise ValueError(f"no method is left to compare; the first refusal: {next(iter(refusals.values()))}")
    labels = [arm.label for arm in (*kept, *spec.baselines)]
    return dataclasses.replace(
        spec,
        arms=tuple(kept),
        baseline=spec.baseline if spec.baseline in labels else labels[0],
        notes=(*spec.notes, *(f"'{label}' is left out: {why}" for label, why in refusals.items())),
    )


def _place(config: RunConfig) -> tuple[str, str, str]:
    return config.data, config.data_dir, config.device
