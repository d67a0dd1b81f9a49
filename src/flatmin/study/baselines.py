"""Baselines of a study: plain training with more regularisation, or with as many gradient evaluations as SAM."""

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
    """The study with further arms of the plain optimizer, whose settings are chosen on validation data.

    - the optimizer itself, unless an arm is that already;
    - "more weight decay": 2, 4 or 8 times the study's weight decay (left out if that is 0);
    - "early stop": a schedule of a third, a half or two thirds of the epochs;
    - "averaged": an exponential moving average of the weights with decay 0.99 or 0.999 per update;
    - "N x epochs", one for each cost among the methods: plain training with as many gradient evaluations as the method
      (its expected number if the method decides at each update whether to perturb), unless an arm of plain training
      has that length already.

    Axes of the study that apply to plain training, such as networks, apply to the baselines too.

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
    # Settings of plain training in this study besides its method, such as a weight decay of its own.
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
            # An axis of one value overrides the entries of `given`.
            longer = (*axes, Axis("epochs", (str(epochs),)))
            settings = {"method": BASE, **settings_left, **decay}
            arms.append(Arm(label=f"{name}, {cost:g}x epochs", settings=settings, axes=longer, choose=own.choose))
    taken = {one.label for one in spec.every_arm}
    for one in arms:
        if one.label in taken:
            raise ValueError(f"study {spec.name} already has an arm {one.label!r}; leave out --baselines.")
    return dataclasses.replace(spec, baselines=(*spec.baselines, *arms))


def _costs(configs: Iterable[RunConfig]) -> list[float]:
    """The mean numbers of gradient evaluations per update of the runs, those above one, to three digits."""
    sizes = Sizes()
    costs = {float(f"{sizes.cost(config) / sizes.updates(config):.3g}") for config in configs}
    return sorted(cost for cost in costs if cost > 1)
