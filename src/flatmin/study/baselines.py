"""Honest baselines of a study: what plain training reaches with more regularisation, or at SAM's cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from flatmin.study.config import BASE
from flatmin.study.spec import Arm, StudySpec
from flatmin.study.sweep import Axis, tidy
from flatmin.study.unfold import cells
from flatmin.train.config import RunConfig
from flatmin.train.trainer import build_recipe

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
    - "N x epochs", for the cost of each method: as many gradient evaluations as SAM and its kind take.

    Axes of the study that plain training has, such as networks, hold for them too.

    Args:
        spec: the study.

    Raises:
        ValueError: an arm of the study has the name of a baseline.
    """
    found = cells(spec)
    plain = [cell for cell in found if cell.config.method == BASE]
    first = (plain or found)[0].config
    name = NAMES[first.optimizer]
    own = next((arm for arm in spec.arms if plain and arm.label == plain[0].arm), Arm(label=name, settings={}))
    # What plain training of this study has beside its method, such as a weight decay of its own.
    kept = {key: value for key, value in own.settings.items() if key not in _OWN}
    decay = own.settings.get("weight_decay", tidy(repr(first.weight_decay)))

    def arm(label: str, key: str, values: Iterable[float]) -> Arm:
        words = tuple(dict.fromkeys(tidy(f"{value:.6g}") for value in values))
        settings = {"method": BASE, **kept, **({} if key == "weight_decay" else {"weight_decay": decay})}
        return Arm(label=f"{name}, {label}", settings=settings, axes=(Axis(key, words),), choose=(key,))

    arms = [] if plain else [Arm(label=name, settings={"method": BASE})]
    if first.weight_decay:
        arms.append(arm("more weight decay", "weight_decay", (f * first.weight_decay for f in WEIGHT_DECAY_FACTORS)))
    if first.epochs > 1:
        arms.append(arm("early stop", "epochs", (max(1, round(share * first.epochs)) for share in EARLY_SHARES)))
    if first.ema is None:
        arms.append(arm("averaged", "ema", AVERAGES))
    for cost in _costs(cell.config for cell in found):
        longer = Arm(
            label=f"{name}, {cost:g}x epochs",
            settings={"method": BASE, **kept, "weight_decay": decay, "epochs": str(round(cost * first.epochs))},
        )
        arms.append(longer)
    taken = {one.label for one in spec.arms}
    for one in arms:
        if one.label in taken:
            raise ValueError(f"study {spec.name} has an arm {one.label!r} already; leave out the baselines.")
    return dataclasses.replace(spec, arms=(*spec.arms, *arms))


def _costs(configs: Iterable[RunConfig]) -> list[float]:
    """Gradient evaluations an update that some method takes, above one, to a tenth."""
    found = {round(build_recipe(config).gradient_evaluations, 1) for config in configs}
    return sorted(cost for cost in found if cost > 1)
