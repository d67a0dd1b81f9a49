"""What follows from a comparison and what does not, worked out from its own numbers."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from flatmin.stats import POINTS, Stat, paired
from flatmin.study.arms import EARLY, LONG, WEIGHT_DECAY
from flatmin.study.config import BASE, CompareConfig
from flatmin.study.summary import Choice, Finding, Row

FEWEST_SEEDS = 3  # the t of two is 12.7
MOST_PAIRS = 8  # pairs that a note names
Accuracies = Mapping[str, Mapping[int, float]]
Difference = Callable[..., Stat | None]


def write_notes(
    config: CompareConfig,
    sizes: tuple[int, int, int] | None,
    rows: Sequence[Row],
    findings: Sequence[Finding],
    choices: Mapping[str, Sequence[Choice]],
    ascends: Mapping[str, bool],
) -> list[str]:
    """The sentences under the table.

    Args:
        config: the settings.
        sizes: samples in train, validation and test; None if no data was loaded.
        rows: of the table.
        findings: what the rows were made of, in the same order.
        choices: candidates of the tuned arms.
        ascends: label -> whether the method perturbs the weights.
    """
    known: dict[str, dict[int, float]] = {f.label: f.last() for f in findings if f.last()}
    family = {label: values for label, values in known.items() if ascends[label]}
    by_label = {row.label: row for row in rows}
    # One test sample more or less.
    step = 0.0 if sizes is None else 100 / sizes[2]
    difference = partial(paired, step=step, ends=POINTS)
    found = [
        _protocol(config, sizes),
        _choice(config, choices, ascends, sizes),
        _against_base(rows),
        _ranking(family, difference),
        *_baselines(family, known, difference),
        _cost(by_label, known, ascends, difference),
        _curvature(by_label, ascends),
        _time(rows),
        _noise(config),
        *_failures(rows),
    ]
    return [note for note in found if note]


def _protocol(config: CompareConfig, sizes: tuple[int, int, int] | None) -> str:
    parts = "" if sizes is None else " of {} training, {} validation and {} test samples".format(*sizes)
    noise = config.noise_share
    labels = (
        f"{noise:.0%} of the training labels are wrong (drawn evenly from the other classes); "
        "validation and test labels are clean. "
        if noise
        else ""
    )
    seeds = (
        "One seed gives no interval: nothing here can be told from chance."
        if config.seeds == 1
        else f"Intervals are 95 % Student t over {config.seeds} seeds; differences to {BASE} are paired by seed."
    )
    return (
        f"One fixed split{parts}. {labels}A seed sets initialisation, wrong labels and batch order, the same for every "
        f"row. {seeds}"
    )


def _choice(
    config: CompareConfig,
    choices: Mapping[str, Sequence[Choice]],
    ascends: Mapping[str, bool],
    sizes: tuple[int, int, int] | None,
) -> str:
    if choices:
        told = []
        for label, tried in choices.items():
            best = next((choice for choice in tried if choice.chosen), None)
            if best is None:
                told.append(f"{label}: none, every value had a failed run")
                continue
            words = []
            for key, value in best.values.items():
                values = [choice.values[key] for choice in tried]
                edge = len(set(values)) > 1 and _at_edge(value, values)
                words.append(f"{key}={_text(value)}" + (" (the end of its list: try further values)" if edge else ""))
            told.append(f"{label}: {' '.join(words)} at {_percent(best.val_acc)}")
        step = "" if sizes is None else f" One validation sample is {100 / sizes[1]:.2g} % of one seed's figure."
        return (
            "Chosen by mean validation accuracy at the last epoch (ties: lower validation loss, then the earlier value "
            f"in the list), never on test: {'; '.join(told)}.{step}"
        )
    if config.axes:
        return (
            "Several rows of one method are a grid. To report its best row by test accuracy would be choosing on test; "
            "--tune chooses on validation."
        )
    if not any(ascends.values()):
        return ""
    if config.rho:
        return "rho was fixed before this comparison; --tune chooses it anew on validation. Nothing is chosen on test."
    return "rho is each geometry's default and was not chosen for this data; --tune chooses it on validation."


def _against_base(rows: Sequence[Row]) -> str:
    several = [row for row in rows if row.diff is not None and row.diff.n > 1]
    compared = [row for row in several if row.diff and row.diff.n >= FEWEST_SEEDS]
    if not compared:
        return "Two seeds are too few to tell any row from another; --seeds 3 is the least." if several else ""
    better = [row for row in compared if row.diff and not row.diff.covers_zero and row.diff.mean > 0]
    worse = [row for row in compared if row.diff and not row.diff.covers_zero and row.diff.mean < 0]
    unsure = [row for row in compared if row.diff and row.diff.covers_zero]
    told = []
    if better:
        told.append(f"above {BASE} at the last epoch, interval without 0: {_labels(better)}")
    if worse:
        told.append(f"below {BASE}, interval without 0: {_labels(worse)}")
    if unsure:
        told.append(f"interval covers 0, so no difference is shown: {_labels(unsure)}")
    return _sentence("; ".join(told))


def _ranking(family: Accuracies, difference: Difference) -> str:
    pairs = list(itertools.combinations(family, 2))
    if not pairs:
        return ""
    # Of many 95 % intervals some miss by chance: each pair gets the share of 5 % that keeps the whole at 5 %.
    level = 1 - 0.05 / len(pairs)
    told: list[tuple[float, str]] = []
    widest = None
    for one, other in pairs:
        plain, wide = difference(family[one], family[other]), difference(family[one], family[other], level)
        if plain is None or wide is None or plain.n < FEWEST_SEEDS:
            continue
        if not wide.covers_zero:
            upper, lower = (one, other) if wide.mean > 0 else (other, one)
            ahead = dataclasses.replace(wide, mean=abs(wide.mean))
            told.append((ahead.mean, f"{upper} over {lower} ({ahead.text(gap=' ')})"))
        if widest is None or abs(plain.mean) > abs(widest[1].mean):
            widest = (f"{one} and {other}", plain)
    if widest is None:
        return ""
    count = f"{len(pairs)} pair{'s' * (len(pairs) > 1)}"
    if len(pairs) == 1 and not told:
        return (
            f"{_sentence(widest[0])[:-1]} are not ranked: they differ at the last epoch by "
            f"{_percent(widest[1], unit='points')}, within the noise."
        )
    if told:
        named = [text for _, text in told]
        if len(told) > MOST_PAIRS:
            named = [text for _, text in sorted(told, key=lambda one: -one[0])[:MOST_PAIRS]]
            named.append(f"and {len(told) - MOST_PAIRS} more with a smaller difference")
        return (
            f"Among the methods that ascend, {len(told)} of the {count} differ at the last epoch beyond the noise "
            f"(intervals widened for the number of pairs): {'; '.join(named)}. The others are not ranked."
        )
    return (
        f"The {len(family)} methods that ascend are not ranked: none of the {count} differs at the last epoch beyond "
        f"the noise (largest difference: {widest[0]}, {_percent(widest[1], unit='points')}; "
        "the test widens intervals for the number of pairs)."
    )


def _baselines(family: Accuracies, known: Accuracies, difference: Difference) -> list[str]:
    """The family's mean against the regularised baselines and the longer schedule."""
    if not family:
        return []
    seeds = set.intersection(*(set(values) for values in family.values()))
    mean = {seed: math.fsum(values[seed] for values in family.values()) / len(family) for seed in seeds}
    told = []
    for label in (WEIGHT_DECAY, EARLY):
        if label not in known or BASE not in known:
            continue
        ahead, gain = difference(mean, known[label]), difference(known[label], known[BASE])
        if ahead is None or gain is None or ahead.n < 2:
            continue
        verdict = (
            "the interval covers 0: no advantage of an ascent over it is shown"
            if ahead.covers_zero
            else ("the family is ahead" if ahead.mean > 0 else "it is ahead of the family")
        )
        told.append(
            f"'{label}' gains {_percent(gain, unit='points')} over {BASE} with no second gradient; the mean of the "
            f"methods that ascend minus it is {_percent(ahead, unit='points')}: {verdict}."
        )
    return told


def _cost(rows: Mapping[str, Row], known: Accuracies, ascends: Mapping[str, bool], difference: Difference) -> str:
    doubled = [row for row in rows.values() if ascends[row.label] and row.gradient_evaluations > 1]
    if not doubled or LONG not in known or BASE not in known:
        return ""
    gain = difference(known[LONG], known[BASE])
    if gain is None:
        return ""
    return (
        f"A step of {doubled[0].label} costs {doubled[0].gradient_evaluations:g} gradients; spent on twice the "
        f"epochs of {BASE} instead, they change its accuracy by {_percent(gain, unit='points')}."
    )


def _curvature(rows: Mapping[str, Row], ascends: Mapping[str, bool]) -> str:
    """A pair of rows that shows lambda falling with the loss and not with the test error, if there is one."""
    measured = {label: row for label, row in rows.items() if row.lambda_max.n}
    climbing = [row for label, row in measured.items() if ascends[label]]
    long, base = measured.get(LONG), measured.get(BASE)
    if not measured:
        return ""
    if long is not None:
        others = sorted(climbing, key=lambda row: row.lambda_max.mean)
        middle = others[len(others) // 2] if others else None
        for other in (middle, base):
            if other is not None and _misleads(long, other):
                return (
                    f"A small λ_max alone does not mean a better minimum: '{LONG}' has {long.lambda_max.mean:.3g} "
                    f"against {other.lambda_max.mean:.3g} of {other.label}, and a lower test accuracy. Its train loss "
                    f"is {long.train_ce.mean:.2g} against {other.train_ce.mean:.2g}, and the curvature of "
                    "cross-entropy goes to 0 with the loss. Compare λ_max at equal train loss."
                )
    return "Compare λ_max at equal train loss: the curvature of cross-entropy goes to 0 with it."


def _misleads(low: Row, other: Row) -> bool:
    """Smaller lambda, smaller loss, and yet a lower test accuracy."""
    return (
        low.lambda_max.mean < other.lambda_max.mean
        and low.train_ce.mean < other.train_ce.mean
        and low.last.mean < other.last.mean
    )


def _time(rows: Sequence[Row]) -> str:
    copy = next((row.time_ratio for row in rows if row.label == BASE), None)
    if all(row.time_ratio is None for row in rows):
        return ""
    control = (
        f" A copy of {BASE} against itself gives {copy.q25:.2f}-{copy.q75:.2f}: that is the noise." if copy else ""
    )
    return (
        f"Time per step: training only, one thread, interleaved with the base after warm-up, median of ratios.{control}"
    )


def _noise(config: CompareConfig) -> str:
    if config.noise_share:
        return (
            "What is shown is resistance to memorising wrong labels. It says nothing about clean labels: "
            "noise=0 runs the same comparison without them."
        )
    return "Without wrong labels there is nothing to memorise, and such small tasks leave little room for a gain."


def _failures(rows: Sequence[Row]) -> list[str]:
    told = []
    if any("did not train" in flag for row in rows for flag in row.flags):
        told.append(
            "'did not train': the final train loss is not clearly below chance level, the loss of answering every "
            "sample with the frequencies of the classes (log K for K equally frequent ones)."
        )
    if any("failed" in flag for row in rows for flag in row.flags):
        told.append("'failed': a run without a result, left out of the row's means; its n is smaller.")
    return told


def _at_edge(value: object, values: Sequence[object]) -> bool:
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    return len(numbers) == len(values) and value in (min(numbers), max(numbers))


def _percent(stat: Stat, unit: str = "%") -> str:
    return f"{stat.text('+.1f' if unit == 'points' else '.1f', gap=' ')} {unit}"


def _labels(rows: Sequence[Row]) -> str:
    return ", ".join(f"'{row.label}'" if " " in row.label else row.label for row in rows)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "." if text else ""


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
