"""The comparison of methods on one task: a study with one arm for each method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flatmin.data.dataset import Data
from flatmin.methods import BASE, compose, method_table
from flatmin.study.expand import grid_points, tuned
from flatmin.study.reading import changed, read_study
from flatmin.study.spec import Arm, Given, StudySpec, as_text
from flatmin.study.sweep import is_multiple, tidy
from flatmin.train.config import RunConfig
from flatmin.train.locate import find_module
from flatmin.train.radii import radius_of
from flatmin.train.settings import parse, read_preset, split_override
from flatmin.train.sources import check_device, load_clean
from flatmin.train.trainer import Trainer

ALL = "all"  # every method of the table
# Options of the comparison besides those of a study.
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
# Those of them that the table lists with the settings that the command changed.
_SHOWN = ("methods", "baselines", "tune", "strong_weight_decay", "early_share")
_ADAM_LR = "0.001"  # torch's default
# Weight decay of AdamW for that of SGD. On the digits, where SGD has 0.02, of 0.3, 1 and 2.5 none had a better mean
# validation accuracy than 1 over three seeds, for each of lr = 0.001, 0.003 and 0.01.
_ADAMW_DECAY = 50.0


def comparison(preset: str = "digits", overrides: Sequence[str] = (), **options: Any) -> StudySpec:
    """The study that `flatmin compare` runs.

    With your own network or data, each method uses its default radius unless the study names one, because the
    preset's radii belong to the preset's network and data. Likewise, label noise is added only to the preset's data
    unless `noise` is given.

    Args:
        preset: name of a built-in study, or path of a .toml file.
        overrides: overrides as in `flatmin.study.reading.changed`, and options as text: "methods=sgd,sam" ("all" for
            every method that works with the network), "seeds=10", "tune=true", "baselines=false", "timing=false",
            and for the baselines "strong_weight_decay=0.05" and "early_share=0.3".
        options: the same options as keyword arguments. They take precedence; None means not given.

    Raises:
        ValueError: an unknown preset, option, method or parameter, or a value of the wrong type or out of range.
    """
    spec, own = _read(preset)
    words, rest = _sorted_out([*own, *overrides])
    words |= {key: value for key, value in options.items() if value is not None}
    given = {split_override(override)[0] for override in rest}
    if "seeds" in words and "seed" in given:
        raise ValueError(f"seeds={words['seeds']} and seed=... both set the seeds; leave one out.")
    if words.get("seeds", 1) < 1:
        raise ValueError(f"seeds must be at least 1, got {words['seeds']}.")
    spec = _with_base(_with_methods(spec, words), given, rest, scaled="strong_weight_decay" not in words)
    rest += _settings(spec, words, given)
    if "seeds" in words:
        rest.append(f"seed=0..{words['seeds'] - 1}")
    spec = dataclasses.replace(changed(spec, rest), timing=words.get("timing", spec.timing))
    if words.get("tune", False):
        spec = tuned(spec)
    named = {**_sorted_out(overrides)[0], **{key: value for key, value in options.items() if value is not None}}
    also = [f"{key}={as_text(value)}" for key, value in named.items() if key in _SHOWN]
    changes = (*also, *(one for one in spec.changed if one not in own))
    return _titled(dataclasses.replace(spec, changed=changes), words)


def _sorted_out(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The options of a comparison, and the other overrides."""
    words: dict[str, Any] = {}
    rest: list[str] = []
    for override in overrides:
        key, text = split_override(override)
        axis = key in ("model", "data", "noise") and "," in text
        if key in _WORDS and not axis:
            words[key] = parse(key, text, _WORDS[key])
        else:
            rest.append(override)
    return words, rest


def _read(preset: str) -> tuple[StudySpec, list[str]]:
    """A study with its overrides; a file with the key `methods` in place of `arms` yields overrides."""
    table: dict[str, Any] = read_preset(preset, "study")
    if "arms" in table:
        return read_study(preset), []
    radii: Mapping[str, float] = table.pop("rho", {})
    skip = bool(table.pop("skip_unfit", False))
    methods, plugins = tuple(table.pop("methods", ("sgd", "sam", "vasso"))), tuple(table.get("plugins", ()))
    spec = dataclasses.replace(read_study("digits"), name=Path(preset).stem, skip_unfit=skip)
    spec = _with_methods(spec, {"methods": methods, "plugins": plugins})
    known = method_table(plugins)

    def radius(arm: Arm) -> Arm:
        method = arm.settings["method"]
        rho = radius_of(method, compose(method, known), radii, known)
        return arm if rho is None else dataclasses.replace(arm, settings={**arm.settings, "rho": as_text(rho)})

    entries = {**table, **table.pop("params", {}), **table.pop("axes", {})}
    entries = {key: value for key, value in entries.items() if key not in ("params", "axes")}
    return spec.with_arms(radius), [f"{key}={as_text(value)}" for key, value in entries.items()]


def _with_methods(spec: StudySpec, words: Mapping[str, Any]) -> StudySpec:
    """The study with the requested arms and baselines."""
    plugins = words.get("plugins", ())
    for plugin in plugins:
        find_module(plugin, option="plugin")
    table = method_table(plugins)
    arms, skip = spec.arms, spec.skip_unfit
    if "methods" in words:
        names = tuple(words["methods"])
        if ALL in names:
            names, skip = (*table, *(name for name in names if name != ALL and name not in table)), True
        names = tuple(compose(name, table).name for name in names)
        double = [name for i, name in enumerate(names) if name in names[:i]]
        if double:
            raise ValueError(f"the method {double[0]!r} is listed twice.")
        arms = tuple(Arm(label=name, settings={"method": name}) for name in names)
    baselines = spec.baselines if words.get("baselines", True) else ()
    for key, setting, share in (("strong_weight_decay", "weight_decay", ""), ("early_share", "epochs", "x")):
        if key not in words:
            continue
        if not 0 < words[key] < (1 if share else float("inf")):
            raise ValueError(f"{key} must be above 0{' and below 1' * bool(share)}, got {words[key]!r}.")
        changed_ones = tuple(_replaced(arm, setting, f"{tidy(repr(words[key]))}{share}") for arm in baselines)
        if changed_ones == baselines and not any(_about(arm, setting) for arm in baselines):
            raise ValueError(f"{key}={words[key]} has no effect: no baseline of this comparison sets {setting}.")
        baselines = changed_ones
    if not arms and not baselines:
        raise ValueError("nothing to compare: there is no method and no baseline.")
    if any(":" in words.get(key, "") for key in ("model", "data")):
        arms = tuple(_with_default_radius(arm, table) for arm in arms)
    labels = [arm.label for arm in (*arms, *baselines)]
    baseline = spec.baseline if spec.baseline in labels else labels[0]
    return dataclasses.replace(spec, arms=arms, baselines=baselines, baseline=baseline, skip_unfit=skip)


def _about(arm: Arm, key: str) -> bool:
    """Whether a baseline varies a setting as regularisation; "2x" epochs is there for the cost."""
    return arm.settings.get(key) not in (None, "2x")


def _replaced(arm: Arm, key: str, value: str) -> Arm:
    return dataclasses.replace(arm, settings={**arm.settings, key: value}) if _about(arm, key) else arm


def _with_default_radius(arm: Arm, table: Mapping[str, Any]) -> Arm:
    """The arm with its method's default radius in place of that of the training preset; its own radius is kept."""
    recipe = compose(arm.settings.get("method", "sam"), table)
    own = {*arm.settings, *(axis.key for axis in arm.axes)}
    if "rho" in own or not recipe.ascends or recipe.default_rho is None:
        return arm
    return dataclasses.replace(arm, settings={**arm.settings, "rho": as_text(recipe.default_rho)})


def _settings(spec: StudySpec, words: Mapping[str, Any], given: set[str]) -> list[str]:
    """The options that are settings of runs, as overrides."""
    made = [f"{key}={as_text(words[key])}" for key in ("model", "data", "plugins") if words.get(key)]
    noise = words.get("noise")
    if noise is not None:
        made.append(f"noise={as_text(noise)}")
    elif words.get("data") not in (None, read_preset(spec.train, "train").get("data")) and "noise" not in given:
        made.append("noise=0")
    return made


def _with_base(spec: StudySpec, given: set[str], rest: Sequence[str], *, scaled: bool) -> StudySpec:
    """The study with plain training named after the base optimizer.

    A preset for SGD has no learning rate for Adam; Adam then takes torch's default.

    Args:
        spec: the study.
        given: keys of the overrides.
        rest: the overrides.
        scaled: whether the weight decay of the baselines is converted from SGD to AdamW, see `_with_decay`.
    """
    chosen = next((text for key, text in map(split_override, rest) if key == "optimizer"), "")
    names = [name.strip() for name in chosen.split(",") if name.strip()]
    if not names:
        return spec
    usual = {"optimizer": read_preset(spec.train, "train").get("optimizer", "sgd"), **spec.settings}
    before = {arm.settings.get("optimizer", usual["optimizer"]) for arm in spec.every_arm}
    notes, rates = spec.notes, spec.given
    others = [name for name in names if name != "sgd"]
    if others and "lr" not in given and before == {"sgd"}:
        rates = (*rates, Given(when={"optimizer": tuple(others)}, settings={"lr": _ADAM_LR}))
        notes = (*notes, f"lr is torch's default {_ADAM_LR} for {' and '.join(others)}; the preset's is for SGD.")
    name = names[0] if len(names) == 1 else "base"

    def rename(label: str) -> str:
        plain = label == BASE or label.startswith((f"{BASE} ", f"{BASE},"))
        return f"{name}{label.removeprefix(BASE)}" if plain else label

    renamed = spec.with_arms(lambda arm: dataclasses.replace(arm, label=rename(arm.label)))
    if scaled and before == {"sgd"}:
        renamed, more = _with_decay(renamed, others)
        notes = (*notes, *more)
    return dataclasses.replace(renamed, baseline=rename(spec.baseline), notes=notes, given=rates)


def _with_decay(spec: StudySpec, optimizers: Sequence[str]) -> tuple[StudySpec, list[str]]:
    """The study with baselines whose weight decay, written for SGD, suits the base optimizer.

    AdamW subtracts lr wd w from a weight w beside a gradient step of about lr, whatever the size of the gradient, so
    its scale of wd depends on neither gradient nor lr. Adam adds wd w to the gradient, as SGD does: the penalised loss
    is the same, and so is wd.

    Args:
        spec: the study.
        optimizers: the base optimizers besides SGD.

    Returns:
        The study, and notes on the values.
    """
    notes: list[str] = []

    def converted(arm: Arm) -> Arm:
        decay = arm.settings.get("weight_decay")
        if arm not in spec.baselines or decay is None or is_multiple(decay):
            return arm
        if "adam" in optimizers:
            notes.append(f"Adam adds the weight decay to the gradient, as SGD does, so {arm.label!r} has SGD's value.")
        if "adamw" not in optimizers:
            return arm
        larger = tidy(f"{_ADAMW_DECAY * float(decay):.6g}")
        notes.append(
            f"AdamW does not add the weight decay to the gradient, and its step along the gradient is about lr per "
            f"weight, so it needs larger values than SGD: {arm.label!r} has weight_decay={larger} in place of {decay}, "
            "and --tune tries multiples of that. strong_weight_decay=VALUE sets another value."
        )
        given = Given(when={"optimizer": ("adamw",)}, settings={"weight_decay": larger})
        return dataclasses.replace(arm, given=(*arm.given, given))

    return spec.with_arms(converted), notes


def _titled(spec: StudySpec, words: Mapping[str, Any]) -> StudySpec:
    """The study with a title that names the user's data and network and the share of wrong labels.

    Columns that no run can fill are left out.
    """
    configs = [row.config for row in grid_points(spec)]
    title = words.get("title", spec.title)
    if "title" not in words and any(key in words for key in ("model", "data")):
        title = f"{configs[0].model} on {configs[0].data}"
    shares = {config.noise for config in configs}
    share = 100 * configs[0].noise
    noise = f", {share:.3g} % of the training labels wrong" if len(shares) == 1 and share else ""
    absent = {
        *(["memorised"] if shares == {0.0} else []),
        *([] if any(config.measure for config in configs) else ["lambda_max"]),
    }
    columns = tuple(column for column in spec.columns if column not in absent)
    return dataclasses.replace(spec, title=title + noise, columns=columns)


def without_unfit(spec: StudySpec) -> StudySpec:
    """The study without the arms whose method does not work with the network or the training loop.

    The study's notes say which arms were left out and why.

    Raises:
        OSError, ValueError, ModuleNotFoundError: the data or a device is not available, or no arm is left.
    """
    if not spec.skip_unfit:
        return spec
    kept, refusals = [], {}
    first: dict[str, RunConfig] = {}
    for row in grid_points(spec):
        first.setdefault(row.arm, row.config)
    data: dict[tuple[str, ...], Data] = {}
    for arm in spec.arms:
        config = first[arm.label]
        place = (config.data, config.data_dir, config.device)
        if place not in data:
            check_device(config.device)
            data[place] = load_clean(config).to(config.device)
        try:
            Trainer(config, data=data[place])
        except (ValueError, TypeError) as error:
            refusals[arm.label] = str(error)
        else:
            kept.append(arm)
    if not kept:
        raise ValueError(f"no method is left to compare; the first error: {next(iter(refusals.values()))}")
    labels = [arm.label for arm in (*kept, *spec.baselines)]
    return dataclasses.replace(
        spec,
        arms=tuple(kept),
        baseline=spec.baseline if spec.baseline in labels else labels[0],
        notes=(*spec.notes, *(f"'{label}' is left out: {why}" for label, why in refusals.items())),
    )
