"""The grid points of a study: each arm at each point of its axes, as configurations of runs."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flatmin.data.named import DATASETS
from flatmin.methods import Recipe, compose, current_word, method_table
from flatmin.models.zoo import MODELS
from flatmin.study.spec import Arm, StudySpec, as_text
from flatmin.study.sweep import MULTIPLE, Axis, is_multiple, overrides, points, tidy
from flatmin.train.config import RunConfig
from flatmin.train.locate import find_module
from flatmin.train.options import Options
from flatmin.train.preset import load_run
from flatmin.train.result import Epoch, Result
from flatmin.train.settings import field_types, read_preset
from flatmin.train.trainer import build_recipe
from flatmin.words import suggest

Score = tuple[float, float]
# Settings that two rows must share to be on the same task.
TASK = (
    *("data", "model", "model_params", "noise", "noise_kind", "train_size", "train_on_val", "val_share", "split_seed"),
    "image_size",
)
_FIELDS = field_types(RunConfig)
_USUAL = {f.name: f.default for f in dataclasses.fields(RunConfig) if f.default is not dataclasses.MISSING}


@dataclass(frozen=True, kw_only=True)
class GridPoint:
    """A row of the table: an arm at one point of the axes, with its runs by seed.

    Args:
        arm: label of the arm.
        values: values of the axes that have more than one value.
        configs: configurations by seed; at least one.
        choose: keys of `values` that are chosen on validation data.
        axes: values of all axes, including those with one value.
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
        """The configuration for the first seed."""
        return next(iter(self.configs.values()))

    def setting(self, key: str) -> str | None:
        """The value of a setting as text: a field, a parameter of the method, or `model.NAME`; None if unset."""
        value = _setting(self.config, key)
        return None if value is None else tidy(as_text(value))

    @property
    def point(self) -> dict[str, str]:
        """The values that are not chosen."""
        return {key: value for key, value in self.values.items() if key not in self.choose}

    @property
    def group(self) -> tuple[object, ...]:
        """A key that the rows from which one is chosen have in common."""
        return (self.arm, *sorted(self.point.items()))

    def at(self, where: Mapping[str, str]) -> bool:
        """Whether its runs have all these settings."""
        return all(self.setting(key) == value for key, value in where.items())


def best(scores: Sequence[Score | None]) -> int:
    """The index of the row to choose: the one with the highest validation accuracy.

    Ties are resolved by the lower validation loss, then by order. If no row has a score, the first is chosen.

    Args:
        scores: means of validation accuracy and loss for each row; None for a row that lacks a seed.

    Examples:
        >>> best([None, (61.0, 1.2), (61.0, 1.1), (60.5, 0.9)]), best([None, None])
        (2, 0)
    """

    def merit(i: int) -> Score:
        score = scores[i]
        return (-math.inf, -math.inf) if score is None else (score[0], -score[1])

    return max(range(len(scores)), key=merit)


def validation_score(runs: Iterable[tuple[Result, Sequence[Epoch]]]) -> Score:
    """Mean validation accuracy and loss of a row's runs, at the epochs whose weights they kept; see `best`.

    Args:
        runs: result and epochs of each run; at least one run.
    """
    accuracies, losses = [], []
    for result, lines in runs:
        if result.chosen is not None:
            accuracies.append(float(result.chosen["val_acc"]))
            losses += [line.val_loss for line in lines if line.epoch == result.chosen["epoch"]]
    return math.fsum(accuracies) / len(accuracies), math.fsum(losses) / len(losses) if losses else math.inf


def grid_points(spec: StudySpec) -> list[GridPoint]:
    """All grid points with their configurations; their device need not be available on this machine.

    Raises:
        ValueError: settings that are invalid for `flatmin train`, or an axis that applies to no arm.
    """
    preset = read_preset(spec.train, "train")
    rows: list[GridPoint] = []
    used: set[str] = set()
    parameters: list[str] = []
    for arm in spec.every_arm:
        recipe = _recipe(spec, arm, preset)
        parameters += recipe.parameters()
        # A multiple among the arm's settings multiplies the axis's value; a multiple in the axis multiplies the arm's.
        own = {key for key, value in arm.settings.items() if not is_multiple(value)}
        if arm not in spec.baselines:
            own -= {axis.key for axis in spec.axes if all(map(is_multiple, axis.values))}
        own |= {axis.key for axis in arm.axes}
        axes = [axis for axis in spec.axes if axis.key not in own and _takes(recipe, axis.key)]
        used |= {axis.key for axis in axes} | own | {*arm.settings}
        axes += arm.axes
        shown = {axis.key for axis in axes if len(axis.values) > 1}
        known: list[Mapping[str, str]] = []
        for written in points(axes):
            point, config = _config(spec, arm, written, preset)
            if point in known:  # multiples that round to the same whole number
                continue
            known.append(point)
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
            near = "" if axis.key in keys else suggest(axis.key, keys)
            if near:
                raise ValueError(f"unknown setting {axis.key!r}{near}")
            raise ValueError(f"study {spec.name}: no arm has a setting {axis.key!r}")
    for grid_point in rows:
        if grid_point.choose and grid_point.config.train_on_val:
            raise ValueError(
                f"study {spec.name}: {', '.join(sorted(grid_point.choose))} cannot be chosen on validation data with "
                "train_on_val=true, which validates on the test part."
            )
    axes_of_all = {axis.key for axis in (*spec.axes, *(axis for arm in spec.every_arm for axis in arm.axes))}
    for key in (*spec.choose, *(key for arm in spec.every_arm for key in arm.choose)):
        if key not in axes_of_all:
            raise ValueError(
                f"study {spec.name}: {key} cannot be chosen, because it is not an axis{suggest(key, axes_of_all)}"
            )
    return rows


def _config(
    spec: StudySpec, arm: Arm, point: Mapping[str, str], preset: Mapping[str, Any]
) -> tuple[dict[str, str], RunConfig]:
    """A point with its multiples resolved to numbers, and its configuration."""
    chosen = {**spec.settings, **arm.settings, **point}
    extra: dict[str, str] = {}
    for given in (*spec.given, *arm.given):
        have = {key: chosen.get(key, tidy(as_text(preset.get(key, _USUAL.get(key, ""))))) for key in given.when}
        if all(tidy(have[key]) in values for key, values in given.when.items()):
            extra |= given.settings
    single = {axis.key: axis.values[0] for axis in spec.axes if len(axis.values) == 1}
    multiplied = {key for key, value in arm.settings.items() if is_multiple(value)}
    plain = {key: value for key, value in point.items() if not is_multiple(value)}
    layers: list[Mapping[str, str]] = [
        spec.settings,
        {key: value for key, value in {**single, **plain}.items() if key in multiplied and not is_multiple(value)},
        arm.settings,
        extra,
        {key: value for key, value in plain.items() if key not in multiplied},
        {key: value for key, value in point.items() if key not in plain},
    ]
    try:
        settings: dict[str, str] = {}
        for layer in layers:
            settings |= _numbers(spec.train, settings, layer)
        point = {key: value if key in plain else settings[key] for key, value in point.items()}
        config = load_run(spec.train, overrides(settings), here=False)[0]
        _check_names(config)
        build_recipe(config)
    except ValueError as error:
        raise ValueError(f"study {spec.name}, arm {arm.label}: {error}") from error
    return point, config


def _numbers(train: str, before: Mapping[str, str], settings: Mapping[str, str]) -> dict[str, str]:
    """Settings with each multiple, such as "2x", resolved to a number.

    Args:
        train: the training preset.
        before: settings that `settings` override.
        settings: settings that may contain multiples.

    Raises:
        ValueError: a multiple of a setting that is not a number.
    """
    multiples = {key: match for key, value in settings.items() if (match := MULTIPLE.fullmatch(value))}
    if not multiples:
        return dict(settings)
    plain = {key: value for key, value in settings.items() if key not in multiples}
    config = load_run(train, overrides({**before, **plain}), here=False)[0]
    made: dict[str, str] = {}
    for key, match in multiples.items():
        value = _setting(config, key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not float(match[1]):
            there = "is not set" if value in (None, ()) else f"is {as_text(value)}"
            raise ValueError(f"{key}={match[0]}: {key} {there}, which cannot be multiplied; write the value itself.")
        product = float(match[1]) * value
        made[key] = str(max(1, round(product))) if _FIELDS.get(key) is int else tidy(f"{product:.6g}")
    return {key: made.get(key, value) for key, value in settings.items()}


def _setting(config: RunConfig, key: str) -> Any:
    """The value of a setting: a field, a parameter of the method, or `model.NAME`; None if it is not set."""
    if key in _FIELDS:
        return getattr(config, key)
    if key.startswith("model."):
        return config.model_params.get(key.removeprefix("model."))
    names = [name for name in config.params if current_word(key) in (name, name.partition(".")[2])]
    return config.params[names[0]] if names else None


def tuned(spec: StudySpec) -> StudySpec:
    """The study with its axes chosen on validation data, except axes that define the task, such as the network.

    If there is no such axis, each arm gets the axes of `spec.tune`, or 0.5, 1 and 2 times its radius, unless the arm
    or an override sets that key already.
    """
    chosen = [axis.key for axis in spec.axes if len(axis.values) > 1 and not _sets_task(axis.key)]
    usual = () if chosen else spec.tune or (Axis("rho", ("0.5x", "1x", "2x")),)
    fixed = {axis.key for axis in spec.axes}

    def tune(arm: Arm) -> Arm:
        axes = {axis.key: axis for axis in arm.axes}
        for axis in usual:
            if axis.key not in fixed and takes(spec, arm, axis.key) and _has_value(spec, arm, axis):
                axes.setdefault(axis.key, axis)
        for axis in arm.tune:
            if axis.key not in chosen and _has_value(spec, arm, axis):
                axes.setdefault(axis.key, axis)
        own = [key for key, axis in axes.items() if len(axis.values) > 1 and not _sets_task(key)]
        return dataclasses.replace(arm, axes=tuple(axes.values()), choose=tuple(dict.fromkeys([*arm.choose, *own])))

    return dataclasses.replace(spec.with_arms(tune), choose=tuple(dict.fromkeys([*spec.choose, *chosen])))


def _sets_task(key: str) -> bool:
    return key in TASK or key.startswith("model.")


def _has_value(spec: StudySpec, arm: Arm, axis: Axis) -> bool:
    """Whether an arm has a value that an axis of multiples can multiply."""
    if not all(map(is_multiple, axis.values)):
        return True
    alone = dataclasses.replace(arm, axes=tuple(one for one in arm.axes if one.key != axis.key))
    _, config = _config(spec, alone, {}, read_preset(spec.train, "train"))
    return bool(_setting(config, axis.key))


def _check_names(config: RunConfig) -> None:
    """Raise ValueError for an unknown data set, network or keyword of a network, before any data are read."""
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
    """Whether a setting applies to an arm: sgd has no radius, and only some methods have a theta."""
    return _takes(_recipe(spec, arm, read_preset(spec.train, "train")), key)


def _takes(recipe: Recipe, key: str) -> bool:
    if key == "rho":
        return recipe.ascends
    if key in _FIELDS or key in field_types(Options) or key.startswith("model."):
        return True
    return bool(recipe.qualified(key))
