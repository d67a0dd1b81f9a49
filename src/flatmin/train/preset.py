"""The settings of `flatmin train`: a preset, then `key=value` overrides, then defaults of the machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Literal, NoReturn

import torch

from flatmin.methods import Recipe, compose, method_table
from flatmin.train import settings
from flatmin.train.config import RunConfig, Scalar
from flatmin.train.locate import find_module
from flatmin.train.options import Options
from flatmin.train.radii import radius_of
from flatmin.train.sources import check_machine
from flatmin.words import suggest

AUTO = "auto"
METHOD = "sam"  # the method of a preset that names none
_BY_NAME = ("params", "model_params")  # set entry by entry, the latter as model.NAME
# What "auto", the default, means on each device.
AUTOMATIC: dict[str, dict[str, Scalar]] = {
    "precision": {"cpu": "float32", "cuda": "bf16"},
    "channels_last": {"cpu": True, "cuda": True},
    "tf32": {"cpu": False, "cuda": True},
}


def load_run(
    preset: str, overrides: Sequence[str] = (), *, here: bool = True, **given: Any
) -> tuple[RunConfig, Options]:
    """Read the configuration and the options of a run.

    `device`, `precision`, `channels_last` and `tf32` are "auto" unless set: the GPU if there is one, with autocast to
    bf16 and TF32; channels_last on both devices. A preset has a table of radii by method. A method that is not in the
    table gets its own default if one of its parts defines one, otherwise the first entry with the same geometry, or the
    geometry's default.

    Args:
        preset: name of a preset of the package, or path to a .toml file.
        overrides: such as "epochs=10", "method=vasso", "rho=0.1", "theta=0.8" (a parameter of the method's parts),
            "model.max_pool=true" (a keyword argument of the model), "log_every=10" (an option).
        here: whether this machine will execute the run; its device is then checked.
        given: values of fields by name; values that are not None replace preset and overrides.

    Raises:
        ValueError: a preset, key or parameter is unknown, or a value has another type or is out of range.
    """
    table = settings.read_preset(preset, "train")
    every = {**settings.field_types(RunConfig), **settings.field_types(Options)}
    chosen, texts = settings.read_words(overrides, word_types())
    loose = {key: settings.guess(text) for key, text in texts.items()}
    chosen |= {key: value for key, value in given.items() if value is not None}
    radii = settings.coerce("rho", table.pop("rho", {}), Mapping[str, float])
    table = {**table, **chosen}
    for key, usual in (("method", METHOD), ("plugins", ()), ("params", {}), ("model_params", {})):
        table[key] = settings.coerce(key, table.get(key, usual), every[key])
    _automatic(table)
    options = {key: table.pop(key) for key in [f.name for f in dataclasses.fields(Options)] if key in table}
    recipe, methods = _recipe(table["method"], table["plugins"])
    # Parameters of the preset's method may not exist in another method.
    own = {key: value for key, value in table["params"].items() if "method" not in chosen or recipe.qualified(key)}
    table["params"], extra = _params(recipe, {**own, **loose})
    table["model_params"] |= extra
    for name in radii:
        for override in name.split("+"):
            if override not in methods:
                raise ValueError(
                    f"preset {preset}: the table rho names an unknown method {override!r}{suggest(override, methods)}"
                )
    if chosen.get("rho") is None:
        table["rho"] = radius_of(recipe.name, recipe, radii, methods)
    elif not recipe.ascends:
        raise ValueError(f"{recipe.name} has no radius; leave out rho.")
    origin = f"preset {preset}"
    config = settings.fill(RunConfig, table, origin=origin)
    if here:
        check_machine(config)
    return config, settings.fill(Options, options, origin=origin)


def load_options(overrides: Sequence[str]) -> tuple[Options, list[str]]:
    """Split overrides into options and the rest.

    Raises:
        ValueError: a value has another type or is out of range.
    """
    values, rest = settings.read_words(overrides, settings.field_types(Options))
    return Options(**values), [f"{key}={text}" for key, text in rest.items()]


@cache
def word_types() -> Mapping[str, Any]:
    """The type of every setting of the form KEY=VALUE, including "auto" where it is allowed."""
    every = {**settings.field_types(RunConfig), **settings.field_types(Options)}
    kinds = {key: kind for key, kind in every.items() if key not in _BY_NAME}
    return kinds | {key: Literal["auto"] | kinds[key] for key in ("device", *AUTOMATIC)}


def _automatic(table: dict[str, Any]) -> None:
    """Replace "auto" by values that suit this machine."""
    if table.get("device", AUTO) == AUTO:
        table["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    for key, choices in AUTOMATIC.items():
        if table.get(key, AUTO) == AUTO:
            table[key] = choices.get(table["device"], choices["cpu"])


def _recipe(method: str, plugins: Iterable[str]) -> tuple[Recipe, Mapping[str, Any]]:
    for plugin in plugins:
        find_module(plugin, option="plugin")
    table = method_table(tuple(plugins))
    return compose(method, table), table


def _params(recipe: Recipe, loose: Mapping[str, Any]) -> tuple[dict[str, Scalar], dict[str, Scalar]]:
    """Parameters of the method's parts by qualified name, and keyword arguments of the model."""
    params: dict[str, Scalar] = {}
    model: dict[str, Scalar] = {}
    for key, value in loose.items():
        if key.startswith("model."):
            model[key.removeprefix("model.")] = value
            continue
        full = recipe.qualified(key)
        if len(full) > 1:
            raise ValueError(f"several parts of {recipe.name!r} have a parameter {key!r}; write {' or '.join(full)}.")
        if not full:
            _refuse(key, recipe)
        params[full[0]] = value
    return params, model


def _refuse(key: str, recipe: Recipe) -> NoReturn:
    own = sorted(recipe.parameters())
    short = [name.partition(".")[2] for name in own]
    raise ValueError(
        f"unknown setting {key!r}{suggest(key, [*word_types(), *own, *short])} (parameters of {recipe.name}: "
        f"{', '.join(own) or 'none'}; keyword arguments of the network: model.NAME; all settings: flatmin settings)"
    )
