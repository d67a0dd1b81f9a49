"""Baselines of a study: plain training with more regularisation, or at SAM's cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from flatmin.methods import BASE
from flatmin.study.costs import Sizes
from flatmin.study.expand import grid_points
from flatmin.study.spec import Arm, StudySpec
from flatmin.study.sweep import Axis, tidy
from flatmin.train.config import RunConfig

NAMES = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}
WEIGHT_DECAY_FACTORS = (2.0, 4.0, 8.0)
EARLY_SHARES = (1 / 3, 1 / 2, 2 / 3)
AVERAGES = (0.99, 0.999)
_OWN = ("method", "weight_decay", "epochs", "ema")


def with_baselines(spec: StudySpec) -> StudySpec:
    """The study with further arms of the plain optimizer, each of whose settings is chosen on validation.

    - the optimizer itself, unless an arm is that;
    - "more weight decay": 2, 4 or 8 times the study's (none if it has none);
    - "early stop": a schedule of a third, a half or two thirds of the epochs;
    - "averaged": an exponential average of the weights, decay 0.99 or 0.999 an update;
    - "N x epochs", for the cost of each method: as many gradient evaluations as SAM and its kind take (a method that
      decides by value when to climb is taken at its expected cost), unless an arm of plain training has that length.

    Axes of the study that plain training has, such as networks, hold for them too.

    Args:
        spec: the study.

    Raises:
        ValueError: an arm of the study has the name of a baseline.
    """
    rows = grid_points(spec)
    plain = [grid_point for grid_point in rows if grid_point.config.method == BASE]
    first = (plain or rows)[0].config
    name = NAMES[first.optimizer]
    own = next((arm for arm in spec.every_arm if plain and arm.label == plain[0].arm), Arm(label=name, settings={}))
    # What plain training of this study has beside its method, such as a weight decay of its own.
    settings_left = {key: value for key, value in own.settings.items() if key not in _OWN}
    decay = {key: value for key, value in own.settings.items() if key == "weight_decay"}
    axes = tuple(axis for axis in own.axes if axis.key not in _OWN)

    def arm(label: str, key: str, values: Iterable[float]) -> Arm:
        texts = tuple(dict.fromkeys(tidy(f"{value:.6g}") for value in values))
        settings = {"method": BASE, **settings_left, **({} if key == "weight_decay" else decay)}
        chosen = (*own.choose, key)
        return Arm(label=f"{name}, {label}", settings=settings, axes=(*axes, Axis(key, texts)), choose=chosen)

    arms = [] if plain else [Arm(label=name, settings={"method": BASE})]
    if first.weight_decay:
        arms.append(arm("more weight decay", "weight_decay", (f * first.weight_decay for f in WEIGHT_DECAY_FACTORS)))
    if first.epochs > 1:
        arms.append(arm("early stop", "epochs", (max(1, round(share * first.epochs)) for share in EARLY_SHARES)))
    if first.ema is None:
        arms.append(arm("averaged", "ema", AVERAGES))
    lengths = {grid_point.config.epochs for grid_point in plain}
    for cost in _costs(grid_point.config for grid_point in rows):
        epochs = round(cost * first.epochs)
        if epochs not in lengths:
            # As an axis of one value, so that it wins over what is given with other values.
            longer = (*axes, Axis("epochs", (str(epochs),)))
            settings = {"method": BASE, **settings_left, **decay}
            arms.append(Arm(label=f"{name}, {cost:g}x epochs", settings=settings, axes=longer, choose=own.choose))
    taken = {one.label for one in spec.every_arm}
    for one in arms:
        if one.label in taken:
            raise ValueError(f"study {spec.name} has an arm {one.label!r} already; leave out the baselines.")
    return dataclasses.replace(spec, baselines=(*spec.baselines, *arms))


def _costs(configs: Iterable[RunConfig]) -> list[float]:
    """Gradient evaluations an update that some method takes over its run, above one, to three digits."""
    sizes = Sizes()
    costs = {float(f"{sizes.cost(config) / sizes.updates(config):.3g}") for config in configs}
    return sorted(cost for cost in costs if cost > 1)
