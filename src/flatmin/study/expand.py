"""The grid points of a study: each arm at each point of its axes, as configurations of runs."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flatmin.data.named import DATASETS
from flatmin.methods import Recipe, compose, current_word, method_table
from flatmin.models.zoo import MODELS
from flatmin.study.spec import Arm, StudySpec, as_text
from flatmin.study.sweep import overrides, points, tidy
from flatmin.train.config import RunConfig
from flatmin.train.locate import find_module
from flatmin.train.options import Options
from flatmin.train.preset import load_run
from flatmin.train.settings import field_types, read_preset
from flatmin.words import suggest

_FIELDS = field_types(RunConfig)
_USUAL = {f.name: f.default for f in dataclasses.fields(RunConfig) if f.default is not dataclasses.MISSING}


@dataclass(frozen=True, kw_only=True)
class GridPoint:
    """A row of the table: an arm at one point of the axes, with its runs by seed.

    Args:
        arm: label.
        values: of the axes that have more than one value.
        configs: by seed; at least one.
        choose: those of `values` that are chosen on validation.
        axes: what all axes set, also those of one value.
    """

    arm: str
    values: Mapping[str, str]
    configs: Mapping[int, RunConfig]
    choose: frozenset[str] = frozenset()
    axes: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Arm and values."""
        return " ".join([self.arm, *overrides(self.values)])

    @property
    def config(self) -> RunConfig:
        """Of the first seed."""
        return next(iter(self.configs.values()))

    def setting(self, key: str) -> str | None:
        """The value of its runs for a key, as text: a field, a parameter of the method, or `model.NAME`."""
        config = self.config
        if key in _FIELDS:
            value: Any = getattr(config, key)
        elif key.startswith("model."):
            value = config.model_params.get(key.removeprefix("model."))
        else:
            names = [name for name in config.params if current_word(key) in (name, name.partition(".")[2])]
            value = config.params[names[0]] if names else None
        return None if value is None else tidy(as_text(value))

    @property
    def point(self) -> dict[str, str]:
        """The values that are not chosen."""
        return {key: value for key, value in self.values.items() if key not in self.choose}

    @property
    def group(self) -> tuple[object, ...]:
        """What it shares with the rows that one is chosen from."""
        return (self.arm, *sorted(self.point.items()))

    def at(self, where: Mapping[str, str]) -> bool:
        """Whether its runs have all these settings."""
        return all(self.setting(key) == value for key, value in where.items())


def best(scores: Sequence[float | None]) -> int:
    """Which of the rows of a choice is the chosen one: the first with the highest score; the first if none has one.

    Args:
        scores: mean validation accuracies; None of a row that lacks a seed.

    Example:
        >>> best([None, 61.0, 61.0]), best([None, None])
        (1, 0)
    """
    return max(range(len(scores)), key=lambda i: -math.inf if (score := scores[i]) is None else score)


def grid_points(spec: StudySpec) -> list[GridPoint]:
    """All grid points with their configurations; their device need not be on this machine.

    Raises:
        ValueError: settings that `flatmin train` would refuse, or an axis that no arm has.
    """
    preset = read_preset(spec.train, "train")
    rows: list[GridPoint] = []
    used: set[str] = set()
    parameters: list[str] = []
    for arm in spec.arms:
        recipe = _recipe(spec, arm, preset)
        parameters += recipe.parameters()
        own = {*arm.settings, *(axis.key for axis in arm.axes)}
        axes = [axis for axis in spec.axes if axis.key not in own and _takes(recipe, axis.key)]
        used |= {axis.key for axis in axes} | own
        axes += arm.axes
        shown = {axis.key for axis in axes if len(axis.values) > 1}
        for point in points(axes):
            config = _config(spec, arm, point, preset)
            rows.append(
                GridPoint(
                    arm=arm.label,
                    values={key: value for key, value in point.items() if key in shown},
                    configs={seed: dataclasses.replace(config, seed=seed) for seed in spec.seeds},
                    choose=frozenset(shown & {*spec.choose, *arm.choose}),
                    axes=point,
                )
            )
    for axis in spec.axes:
        if axis.key not in used:
            keys = [*_FIELDS, *dict.fromkeys(name.partition(".")[2] for name in parameters)]
            raise ValueError(f"study {spec.name}: no arm has {axis.key!r} to set{suggest(axis.key, keys)}")
    for grid_point in rows:
        if grid_point.choose and grid_point.config.train_on_val:
            raise ValueError(
                f"study {spec.name}: {', '.join(sorted(grid_point.choose))} cannot be chosen on validation with "
                "train_on_val=true, which validates on the test part."
            )
    axes_of_all = {axis.key for axis in (*spec.axes, *(axis for arm in spec.arms for axis in arm.axes))}
    for key in (*spec.choose, *(key for arm in spec.arms for key in arm.choose)):
        if key not in axes_of_all:
            raise ValueError(
                f"study {spec.name}: {key} cannot be chosen because it is not an axis{suggest(key, axes_of_all)}"
            )
    return rows


def _config(spec: StudySpec, arm: Arm, point: Mapping[str, str], preset: Mapping[str, Any]) -> RunConfig:
    chosen = {**spec.settings, **arm.settings, **point}
    extra: dict[str, str] = {}
    for given in spec.given:
        have = {key: chosen.get(key, tidy(as_text(preset.get(key, _USUAL.get(key, ""))))) for key in given.when}
        if all(tidy(have[key]) in values for key, values in given.when.items()):
            extra |= given.settings
    try:
        config = load_run(spec.train, overrides({**spec.settings, **arm.settings, **extra, **point}), here=False)[0]
        _check_names(config)
    except ValueError as error:
        raise ValueError(f"study {spec.name}, arm {arm.label}: {error}") from error
    return config


def _check_names(config: RunConfig) -> None:
    """Refuse an unknown data set, network or keyword of a network before any data are read."""
    for key, name, choices in (("data", config.data, DATASETS), ("model", config.model, MODELS)):
        if ":" not in name and name not in choices:
            raise ValueError(f"unknown {key}={name}{suggest(name, choices)} ({key}: {', '.join(choices)})")
    if config.model in MODELS:
        keywords = inspect.signature(MODELS[config.model]).parameters
        for key in config.model_params:
            if key not in keywords:
                raise ValueError(f"model={config.model} has no option {key!r}{suggest(key, keywords)}")


def _recipe(spec: StudySpec, arm: Arm, preset: Mapping[str, Any]) -> Recipe:
    chosen = {**spec.settings, **arm.settings}
    named = chosen.get("plugins", as_text(preset.get("plugins", ())))
    plugins = tuple(word.strip() for word in named.split(",") if word.strip())
    for plugin in plugins:
        find_module(plugin, option="plugin")
    return compose(chosen.get("method", str(preset.get("method", "sam"))), method_table(plugins))


def takes(spec: StudySpec, arm: Arm, key: str) -> bool:
    """Whether an arm's runs have a setting: sgd has no radius, and only some methods a theta."""
    return _takes(_recipe(spec, arm, read_preset(spec.train, "train")), key)


def _takes(recipe: Recipe, key: str) -> bool:
    if key == "rho":
        return recipe.ascends
    if key in _FIELDS or key in field_types(Options) or key.startswith("model."):
        return True
    return bool(recipe.qualified(key))
