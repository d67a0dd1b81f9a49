"""Rows of the table and the candidates behind each: which configurations are run."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from flatmin.methods import Recipe, method_table
from flatmin.study.config import BASE, SWEPT, CompareConfig, recipe_of
from flatmin.train.config import RunConfig, Scalar
from flatmin.train.radii import radius_of
from flatmin.train.trainer import build_recipe

WEIGHT_DECAY, EARLY, LONG = "sgd + weight decay", "sgd, early stop", "sgd, 2x epochs"
RHO_FACTORS = (0.5, 1.0, 2.0)
WEIGHT_DECAY_FACTORS = (0.25, 0.5, 1.0, 2.0)
EARLY_SHARES = (1 / 3, 1 / 2, 2 / 3)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One configuration of an arm, for all seeds.

    Args:
        label: the arm.
        values: what its axes were set to; empty without axes.
        config: the run with seed 0.
    """

    label: str
    values: Mapping[str, Scalar]
    config: RunConfig

    def with_seed(self, seed: int) -> RunConfig:
        """The run with another seed."""
        return dataclasses.replace(self.config, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A row before its axes are expanded; `own` are fields that general axes leave alone."""

    label: str
    config: RunConfig
    recipe: Recipe
    own: frozenset[str] = frozenset()


def arms(config: CompareConfig) -> list[Arm]:
    """All rows: the methods, then the baselines.

    Raises:
        ValueError: an unknown method, or a radius or parameter that fits no method.
    """
    recipes = [recipe_of(method, config.plugins) for method in config.methods]
    for name in config.params:
        if not any(recipe.qualified(name) for recipe in recipes):
            raise ValueError(f"none of the methods has a parameter {name!r}.")
    found = [_arm(method, method, config) for method in config.methods]
    if config.baselines:
        plain = _arm(BASE, BASE, config)

        def baseline(label: str, **changes: float | int) -> Arm:
            changed = dataclasses.replace(plain.config, **changes)  # type: ignore[arg-type]
            return dataclasses.replace(plain, label=label, config=changed, own=frozenset(changes))

        found += [
            baseline(WEIGHT_DECAY, weight_decay=config.strong_weight_decay),
            baseline(EARLY, epochs=max(1, round(config.early_share * config.epochs))),
            baseline(LONG, epochs=2 * config.epochs),
        ]
    return found


def _arm(label: str, method: str, config: CompareConfig) -> Arm:
    plain = recipe_of(method, config.plugins)
    run = RunConfig(
        method=method,
        rho=radius_of(method, plain, config.rho, method_table(config.plugins)),
        params=_qualified(plain, config.params),
        epochs=config.epochs,
        batch_size=config.batch_size,
        micro_batches=config.micro_batches,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        noise=config.noise_share,
        model=config.model,
        data=config.data,
        split_seed=config.split_seed,
        plugins=config.plugins,
        measure=config.measure,
        selection="last",
        test_every=1,
        device=config.device,
    )
    return Arm(label=label, config=run, recipe=build_recipe(run))


def _qualified(recipe: Recipe, params: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """The parameters that this recipe has, by qualified name.

    Raises:
        ValueError: a short name that two of its parts share.
    """
    chosen: dict[str, Scalar] = {}
    for name, value in params.items():
        full = recipe.qualified(name)
        if len(full) > 1:
            raise ValueError(f"{recipe.name!r} has several parameters {name!r}; write {' or '.join(full)}.")
        if full:
            chosen[full[0]] = value
    return chosen


def candidates(config: CompareConfig) -> list[Candidate]:
    """Every configuration to run: one per arm, or one per point of the arm's axes.

    Without `tune` every point is a row of its own, labelled by its values.

    Raises:
        ValueError: an axis that fits no arm, and what `arms` raises.
    """
    found: list[Candidate] = []
    used: set[str] = set()
    for arm in arms(config):
        axes = _axes_of(arm, config)
        used |= set(axes)
        for point in itertools.product(*axes.values()):
            values = dict(zip((key.removesuffix(f".{arm.label}") for key in axes), point, strict=True))
            label = arm.label
            if values and not config.tune:
                label += " " + " ".join(f"{key}={_text(value)}" for key, value in values.items())
            found.append(Candidate(label=label, values=values, config=_with_values(arm, values)))
    unused = set(config.axes) - used
    if unused:
        raise ValueError(f"none of the methods has {sorted(unused)[0]!r} to choose.")
    return found


def _axes_of(arm: Arm, config: CompareConfig) -> dict[str, tuple[Scalar, ...]]:
    axes: dict[str, tuple[Scalar, ...]] = {}
    for key, values in config.axes.items():
        if key == "rho":
            fits = arm.recipe.ascends and f"rho.{arm.label}" not in config.axes
        elif key.startswith("rho."):
            fits = key == f"rho.{arm.label}"
        elif key in SWEPT:
            fits = key not in arm.own
        else:
            fits = bool(arm.recipe.qualified(key))
        if fits:
            axes[key] = values
    if not config.tune:
        return axes
    if arm.recipe.ascends and not config.axes and arm.config.rho:
        axes["rho"] = tuple(_tidy(factor * arm.config.rho) for factor in RHO_FACTORS)
    elif arm.label == WEIGHT_DECAY:
        axes["weight_decay"] = tuple(_tidy(factor * config.strong_weight_decay) for factor in WEIGHT_DECAY_FACTORS)
    elif arm.label == EARLY:
        axes["epochs"] = tuple(sorted({max(1, round(share * config.epochs)) for share in EARLY_SHARES}))
    return axes


def _with_values(arm: Arm, values: Mapping[str, Scalar]) -> RunConfig:
    fields = {key: value for key, value in values.items() if key == "rho" or key in SWEPT}
    params = {key: value for key, value in values.items() if key not in fields}
    merged = {**arm.config.params, **_qualified(arm.recipe, params)}
    changed = dataclasses.replace(arm.config, **fields, params=merged)  # type: ignore[arg-type]
    build_recipe(changed)
    return changed


def _tidy(value: float) -> float:
    """Without the dust of binary arithmetic, so that names and hashes are those a person would type."""
    return float(f"{value:.6g}")


def _text(value: Scalar) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
