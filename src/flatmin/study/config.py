"""What is compared: the settings of `flatmin compare`, from a preset and `key=value` words."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from flatmin.methods import Recipe, compose, current_word, method_table
from flatmin.train import settings
from flatmin.train.config import Scalar
from flatmin.train.locate import find_module
from flatmin.train.settings import at_least
from flatmin.words import suggest

BASE = "sgd"
ALL = "all"  # every method of the table, wherever a list of methods is given
DEFAULT_METHODS = ("sgd", "sam", "vasso")
DIGITS_NOISE = 0.4
# Fields of a run that may be an axis: a list of values to choose from on validation.
SWEPT = ("lr", "epochs", "batch_size", "momentum", "weight_decay")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """The settings of a comparison.

    Args:
        title: of the table.
        methods: composed names, each a row, e.g. ("sgd", "sam", "vasso+asam"). `load` writes every name of the table
            for "all".
        skip_unfit: leave out methods that this loop, model or base cannot serve, with a note, instead of refusing the
            whole. `load` sets it for "all".
        baselines: also run SGD with more weight decay, with a shorter schedule, and with a longer one.
        seeds: how many; they are 0, 1, 2, ...
        noise: share of training labels replaced by wrong ones. None: 0.4 for the built-in data, 0 for your own.
        epochs, batch_size, micro_batches, lr, momentum, weight_decay: of every run; see
            `flatmin.train.config.RunConfig`.
        strong_weight_decay: of the row "sgd + weight decay".
        early_share: length of the row "sgd, early stop", as a share of `epochs`; the schedule ends there.
        rho: radius by method. A method that is not named takes the entry of the first named one in the same
            geometry, else the geometry's default. A method that never leaves w has no radius but a factor in its place
            (sgdhess), and takes its own default.
        params: parameters of parts, for all methods that have them, e.g. {"theta": 0.8}.
        axes: lists of values, for `tune` to choose from or, without it, one row each: "rho", "rho.<method>", a part's
            parameter, or one of lr, epochs, batch_size, momentum, weight_decay.
        tune: choose per row on validation. Rows without an axis get one: half, once and twice their rho; the two
            regularised baselines likewise for what they regularise by.
        model, data: "conv" or "mlp", "digits", or your own as "package.module:function".
        plugins: modules that bring methods.
        timing: whether the time per step is measured.
        measure: whether lambda_max is measured.
        weights: whether runs keep their trained weights, for `flatmin measure`.
        split_seed: of the split of the built-in data.
        device: "cpu" or "cuda".

    Raises:
        ValueError: a value out of range.
    """

    title: str = "Sharpness-aware training"
    methods: tuple[str, ...] = DEFAULT_METHODS
    skip_unfit: bool = False
    baselines: bool = True
    seeds: int = 5
    noise: float | None = None
    epochs: int = 30
    batch_size: int = 64
    micro_batches: int = 4
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    strong_weight_decay: float = 0.02
    early_share: float = 0.5
    rho: Mapping[str, float] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    axes: Mapping[str, tuple[Scalar, ...]] = field(default_factory=dict)
    tune: bool = False
    model: str = "conv"
    data: str = "digits"
    plugins: tuple[str, ...] = ()
    timing: bool = True
    measure: bool = True
    weights: bool = True
    split_seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        at_least(self, "seeds", 1)
        at_least(self, "epochs", 1)
        at_least(self, "micro_batches", 1)
        at_least(self, "early_share", 0, open_low=True, high=1)
        at_least(self, "strong_weight_decay", 0)
        if self.noise is not None:
            at_least(self, "noise", 0, high=1)
        if not self.methods and not self.baselines:
            raise ValueError("nothing to compare: methods is empty and baselines is false.")
        double = [name for i, name in enumerate(self.methods) if name in self.methods[:i]]
        if double:
            raise ValueError(f"the method {double[0]!r} is listed twice.")

    @property
    def noise_share(self) -> float:
        """The noise that is used."""
        if self.noise is not None:
            return self.noise
        return DIGITS_NOISE if self.data == "digits" else 0.0


def load(preset: str = "digits", overrides: Sequence[str] = (), **options: Any) -> CompareConfig:
    """Settings from a preset, then from words, then from options that are not None.

    Args:
        preset: a name inside the package, or a path to a .toml file.
        overrides: words like "epochs=10", "methods=sgd,sam" ("methods=all" is every one), "rho=0.1" (all methods),
            "rho.sam=0.1", "theta=0.8" (a part's parameter). A list where one value is expected makes an axis:
            "rho=.1,.2,.4", "theta=.8,.9".
        options: fields by name, as a command line has them.

    Raises:
        ValueError: an unknown preset, option or parameter, a value of another type or out of range.
    """
    table = settings.read_preset(preset)
    kinds = settings.field_types(CompareConfig)
    given = {key: value for key, value in options.items() if value is not None}
    loose: dict[str, str] = {}
    for word in overrides:
        key, text = settings.split_override(word)
        kind = kinds.get(key)
        if kind is not None and key not in ("rho", "params", "axes") and not (key in SWEPT and "," in text):
            given.setdefault(key, settings.parse(key, text, kind))
        else:
            loose[key] = text
    if any(":" in given.get(key, "") for key in ("model", "data")):
        # Radii that were chosen for the preset's data and model say nothing about others.
        table = {key: value for key, value in table.items() if key != "rho"}
    config = _expand(settings.fill(CompareConfig, {**table, **given}, origin=f"preset {preset}"))
    return _apply(config, loose) if loose else config


def _expand(config: CompareConfig) -> CompareConfig:
    """Every name of the table in place of "all", then what else was named."""
    if ALL not in config.methods:
        return config
    every = method_table(config.plugins)
    rest = [name for name in config.methods if name != ALL and name not in every]
    return dataclasses.replace(config, methods=(*every, *rest), skip_unfit=True)


def _apply(config: CompareConfig, loose: Mapping[str, str]) -> CompareConfig:
    """Radii, part parameters and axes."""
    rho, params, axes = dict(config.rho), dict(config.params), dict(config.axes)
    kinds = settings.field_types(CompareConfig)
    names = part_parameters(config)
    for given, text in loose.items():
        key = current_word(given)
        words = [word.strip() for word in text.split(",") if word.strip()]
        if not words:
            raise ValueError(f"{key}= has no value.")
        head, _, method = key.partition(".")
        if key == "rho" or (head == "rho" and method in config.methods):
            values: tuple[Scalar, ...] = tuple(settings.parse(key, word, float) for word in words)
            if len(values) == 1:
                targets = [method] if method else list(config.methods)
                rho |= dict.fromkeys(targets, float(values[0]))
                continue
        elif key in SWEPT:
            values = tuple(settings.parse(key, word, kinds[key]) for word in words)
        elif key in names:
            values = tuple(settings.guess(word) for word in words)
            if len(values) == 1:
                params[key] = values[0]
                continue
        else:
            _refuse(key, config, names)
        if len(set(values)) < len(values):
            raise ValueError(f"{key}={text} names a value twice.")
        axes[key] = values
    return dataclasses.replace(config, rho=rho, params=params, axes=axes)


def part_parameters(config: CompareConfig) -> set[str]:
    """Names of the parameters of all methods' parts, short ("theta") and qualified ("direction.theta")."""
    found: set[str] = set()
    for method in config.methods:
        for name in recipe_of(method, config.plugins).parameters():
            found |= {name, name.partition(".")[2]}
    return found


def _refuse(key: str, config: CompareConfig, parameters: Iterable[str]) -> NoReturn:
    options = [f.name for f in dataclasses.fields(CompareConfig) if f.name not in ("params", "axes")]
    if key.startswith("rho."):
        known = [f"rho.{method}" for method in config.methods]
        methods = ", ".join(config.methods)
        raise ValueError(f"{key}: no such method here{suggest(key, known)} (methods: {methods})")
    known = [*options, *parameters]
    short = sorted(name for name in parameters if "." not in name)
    raise ValueError(
        f"unknown option {key!r}{suggest(key, known)} (options: {', '.join(options)}; "
        f"parameters of the methods: {', '.join(short) or 'none'})"
    )


def recipe_of(method: str, plugins: Sequence[str] = ()) -> Recipe:
    """The recipe of a composed name.

    Raises:
        ValueError: unknown or clashing names, or a plugin that cannot be imported.
    """
    for plugin in plugins:
        find_module(plugin, option="plugin")
    return compose(method, method_table(plugins))
