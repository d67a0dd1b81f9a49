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
METHOD = "sam"  # of a preset that names none
_BY_NAME = ("params", "model_params")  # set entry by entry, the latter as model.NAME
# What "auto", the default, stands for on a device.
AUTOMATIC: dict[str, dict[str, Scalar]] = {
    "precision": {"cpu": "float32", "cuda": "bf16"},
    "channels_last": {"cpu": True, "cuda": True},
    "tf32": {"cpu": False, "cuda": True},
}


def load_run(
    preset: str, overrides: Sequence[str] = (), *, here: bool = True, **given: Any
) -> tuple[RunConfig, Options]:
    """A run's configuration and options.

    `device`, `precision`, `channels_last` and `tf32` are "auto" unless set: the GPU if there is one, and there
    autocast to bf16 and TF32; channels_last on both. A preset has a table of radii by method; a method that is not in
    it takes its own default if one of its parts states one, else the first entry in the same geometry, or the
    geometry's default.

    Args:
        preset: a name inside the package, or a path to a .toml file.
        overrides: such as "epochs=10", "method=vasso", "rho=0.1", "theta=0.8" (a parameter of the method's parts),
            "model.max_pool=true" (a keyword of the model), "log_every=10" (an option).
        here: whether the run is to be done on this machine, which must then have its device.
        given: fields by name that are not None, as a command line has them; they win.

    Raises:
        ValueError: an unknown preset, key or parameter, or a value of another type or out of range.
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
    # What a preset says of the parts of its own method need not be there in another one.
    own = {key: value for key, value in table["params"].items() if "method" not in chosen or recipe.qualified(key)}
    table["params"], extra = _params(recipe, {**own, **loose})
    table["model_params"] |= extra
    for name in radii:
        for override in name.split("+"):
            if override not in methods:
                raise ValueError(f"preset {preset}: rho of an unknown method {override!r}{suggest(override, methods)}")
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
    """The options among the overrides, and the other overrides.

    Raises:
        ValueError: a value of another type or out of range.
    """
    values, rest = settings.read_words(overrides, settings.field_types(Options))
    return Options(**values), [f"{key}={text}" for key, text in rest.items()]


@cache
def word_types() -> Mapping[str, Any]:
    """Type of every setting that one word sets; those that can be "auto" take this word too."""
    every = {**settings.field_types(RunConfig), **settings.field_types(Options)}
    kinds = {key: kind for key, kind in every.items() if key not in _BY_NAME}
    return kinds | {key: Literal["auto"] | kinds[key] for key in ("device", *AUTOMATIC)}


def _automatic(table: dict[str, Any]) -> None:
    """Replace "auto" by what the machine has."""
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
    """Parameters of the method's parts by qualified name, and keywords of the model."""
    params: dict[str, Scalar] = {}
    model: dict[str, Scalar] = {}
    for key, value in loose.items():
        if key.startswith("model."):
            model[key.removeprefix("model.")] = value
            continue
        full = recipe.qualified(key)
        if len(full) > 1:
            raise ValueError(f"{recipe.name!r} has several parameters {key!r}; write {' or '.join(full)}.")
        if not full:
            _refuse(key, recipe)
        params[full[0]] = value
    return params, model


def _refuse(key: str, recipe: Recipe) -> NoReturn:
    own = sorted(recipe.parameters())
    short = [name.partition(".")[2] for name in own]
    raise ValueError(
        f"unknown key {key!r}{suggest(key, [*word_types(), *own, *short])} (parameters of {recipe.name}: "
        f"{', '.join(own) or 'none'}; model.NAME: a keyword of the network; all keys: flatmin settings)"
    )
