"""Conclusions from a study's table: which differences are significant, in sentences."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from flatmin.methods import BASE
from flatmin.stats import POINTS, Stat, paired
from flatmin.study.tabulate import StudyRow, StudyTable, same
from flatmin.train.trainer import build_recipe

FEWEST_SEEDS = 3  # with two, the 97.5 % quantile of Student's t is 12.7
LEVEL = 0.05
_LESS = 0.9  # a number counts as smaller if it is below this share of another
_MOST = 8  # rows or pairs that a sentence names
_METRIC = "test_acc"
_LAMBDA = ("lambda_max", "lambda_1")
Accuracies = Mapping[int, float]


def verdicts(table: StudyTable) -> list[str]:
    """Conclusions as sentences: against the baseline, among the methods, against cheap baselines, at equal cost."""
    rows = [row for row in table.rows if row.runs and row.config is not None]
    if not rows:
        return []
    ascending = [row for row in rows if ascends(row)]
    # Rows are compared with each other only if all are at one point of the axes and on one task.
    single = len({tuple(sorted(row.point.items())) for row in rows}) == 1 and all(same(row, rows[0]) for row in rows)
    found = [
        against_base(table),
        *([_ranking(ascending)] if single else []),
        *(_cheap(table, rows, ascending) if single else []),
        _equal_cost(table),
        *_without_effect(table, rows),
        _curvature(rows, ascending) if single else "",
    ]
    return [text for text in found if text]


def ascends(row: StudyRow) -> bool:
    """Whether the method of a row takes gradients at perturbed weights."""
    return row.config is not None and build_recipe(row.config).moves


def accuracies(row: StudyRow) -> dict[int, float]:
    """Test accuracy by seed."""
    return {seed: value for seed, run in row.runs.items() if (value := run.number(_METRIC)) is not None}


def against_base(table: StudyTable) -> str:
    """Which rows differ from the baseline, before and after correction for the number of tests."""
    base = named_labels([table.base])
    several = [(row, diff) for row in table.rows if (diff := row.columns[_METRIC].diff) is not None and diff.n > 1]
    compared = [(row, diff) for row, diff in several if diff.n >= FEWEST_SEEDS]
    if not compared:
        return "Two seeds are too few for a comparison; at least three are needed." if several else ""
    tests = table.tests(_METRIC)
    among = f" after correction for {tests} tests" if tests > 1 else ""
    kinds: dict[str, list[StudyRow]] = {}
    for row, diff in sorted(compared, key=lambda one: (one[1].covers_zero, one[1].mean < 0)):
        corrected = row.columns[_METRIC].corrected
        side = f"{'above' if diff.mean > 0 else 'below'} {base}"
        if diff.covers_zero:
            kind = f"not significantly different from {base} (the interval of the difference contains 0)"
        elif tests > 1 and (corrected is None or corrected >= LEVEL):
            kind = f"{side} by the 95 % interval of the difference, but not{among}"
        else:
            kind = f"{side} (p < {LEVEL:g}{among})"
        kinds.setdefault(kind, []).append(row)
    told = "; ".join(f"{kind}: {named(found)}" for kind, found in kinds.items())
    return f"Test accuracy, paired by seed, is {told}."


def _ranking(rows: Sequence[StudyRow]) -> str:
    """Which of the methods that perturb the weights differ from each other, with Bonferroni's correction."""
    pairs = list(itertools.combinations([row for row in rows if accuracies(row)], 2))
    if not pairs:
        return ""
    level = 1 - LEVEL / len(pairs)
    told: list[tuple[float, str]] = []
    widest: tuple[str, Stat] | None = None
    for one, other in pairs:
        plain, wide = _difference(one, other), _difference(one, other, level)
        if plain is None or wide is None or plain.n < FEWEST_SEEDS:
            continue
        if not wide.covers_zero:
            upper, lower = (one, other) if wide.mean > 0 else (other, one)
            ahead = dataclasses.replace(wide, mean=abs(wide.mean))
            told.append((ahead.mean, f"{named([upper])} over {named([lower])} by {_points(ahead)}"))
        if widest is None or abs(plain.mean) > abs(widest[1].mean):
            widest = (f"{named([one])} and {named([other])}", plain)
    if widest is None:
        return ""
    if not told:
        if len(pairs) == 1:
            return f"The difference between {widest[0]} is not significant: {_points(widest[1])}."
        return (
            f"The {len(rows)} methods that perturb the weights do not differ significantly from each other after "
            f"correction for {len(pairs)} pairs; the largest difference, between {widest[0]}, is {_points(widest[1])}."
        )
    texts = [text for _, text in sorted(told, key=lambda one: -one[0])]
    more = f"; and {len(texts) - _MOST} more" if len(texts) > _MOST else ""
    others = "" if len(told) == len(pairs) else " The other pairs do not differ significantly."
    return (
        f"Among the methods that perturb the weights, {len(told)} of {_counted(len(pairs), 'pair')} "
        f"{'differs' if len(told) == 1 else 'differ'} significantly (intervals with Bonferroni's correction for the "
        f"number of pairs): {'; '.join(texts[:_MOST])}{more}.{others}"
    )


def _cheap(table: StudyTable, rows: Sequence[StudyRow], ascending: Sequence[StudyRow]) -> list[str]:
    """Baselines without a second gradient, compared with the mean of the methods that perturb the weights."""
    plain = _plain(table, rows)
    if plain is None or not ascending:
        return []
    arms = {arm.label for arm in table.spec.baselines}
    seeds = set.intersection(*(set(accuracies(row)) for row in ascending))
    mean = {seed: math.fsum(accuracies(row)[seed] for row in ascending) / len(ascending) for seed in seeds}
    family = "the mean of the methods that perturb the weights" if len(ascending) > 1 else named(ascending)
    told = []
    for row in rows:
        if row.arm not in arms or ascends(row) or row.budget > 1.02 * plain.budget:
            continue
        step = row.steps.get(_METRIC, 0.0)
        ahead = paired(mean, accuracies(row), step=step, ends=POINTS)
        gain = _difference(row, plain)
        if ahead is None or gain is None or ahead.n < FEWEST_SEEDS:
            continue
        told.append(
            f"{named([row])}, which needs no second gradient, differs from {named([plain])} by {_points(gain)}; "
            f"{family} differs from {named([row])} by {_points(ahead)}, which is {'not ' * ahead.covers_zero}"
            "significant."
        )
    return told


def _plain(table: StudyTable, rows: Sequence[StudyRow]) -> StudyRow | None:
    """The row of plain training among the arms of the study."""
    arms = {arm.label for arm in table.spec.arms}
    return next((row for row in rows if row.arm in arms and row.config and row.config.method == BASE), None)


def _equal_cost(table: StudyTable) -> str:
    """Methods compared with plain training that took as many gradient evaluations."""
    rows = [row for row in table.rows if row.equal is not None and row.equal.diff.n >= FEWEST_SEEDS]
    if not rows:
        return ""
    tests = table.tests("equal")
    level = f" (p < {LEVEL:g}" + (f" after correction for {tests} tests)" if tests > 1 else ")")
    kinds: dict[str, list[StudyRow]] = {}
    for row in rows:
        equal = row.equal
        assert equal is not None
        beyond = equal.corrected is not None and equal.corrected < LEVEL
        side = "higher" if equal.diff.mean > 0 else "lower"
        kind = f"{side}{level}" if beyond else "not significantly different"
        kinds.setdefault(kind, []).append(row)
    told = "; ".join(f"{kind}: {named(found)}" for kind, found in sorted(kinds.items()))
    names = {row.label: name_of(row) for row in table.rows}
    rivals = named_labels(dict.fromkeys(names[row.equal.label] for row in rows if row.equal is not None))
    return f"Compared with plain training at equal cost ({rivals}), test accuracy is {told}."


def _without_effect(table: StudyTable, rows: Sequence[StudyRow]) -> list[str]:
    """Baselines whose weight decay leaves the results of plain training as they are.

    Either test accuracy is equal for every seed, or its mean differs by at most one sample and every training loss by
    less than 2 %.
    """
    arms = {arm.label for arm in table.spec.baselines}
    told = []
    for row in rows:
        config = row.config
        plain = next((one for one in rows if one.arm not in arms and _but_for_decay(one, row)), None)
        if row.arm not in arms or config is None or plain is None:
            continue
        mine, theirs = accuracies(row), accuracies(plain)
        gaps = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
        losses = [[one.runs[seed].number("train_ce") for one in (row, plain)] for seed in mine if seed in theirs]
        step = row.steps.get(_METRIC, 0.0) * (1 + 1e-6)
        alike = all(a is not None and b is not None and abs(a - b) < 0.02 * abs(b) for a, b in losses)
        if gaps and (not any(gaps) or (alike and abs(math.fsum(gaps)) <= step * len(gaps))):
            told.append(
                f"weight_decay={config.weight_decay:g} of {named([row])} has no visible effect: its test accuracy is "
                f"that of {named([plain])} up to one sample. Try larger values."
            )
    return told


def _but_for_decay(one: StudyRow, other: StudyRow) -> bool:
    """Whether the settings of two rows differ in weight decay and in nothing else."""
    if one.config is None or other.config is None or one.config.weight_decay == other.config.weight_decay:
        return False
    return dataclasses.replace(one.config, weight_decay=other.config.weight_decay) == other.config


def _curvature(rows: Sequence[StudyRow], ascending: Sequence[StudyRow]) -> str:
    """A pair of rows where the largest eigenvalue falls with the training loss but not with the test error, if any."""
    for metric in _LAMBDA:
        measured = [row for row in rows if metric in row.columns and row.columns[metric].stat.n]
        if not measured:
            continue
        others = sorted((row for row in ascending if row in measured), key=lambda row: _mean(row, metric))
        middle = others[len(others) // 2 : len(others) // 2 + 1]
        flat = [row for row in measured if not ascends(row)]
        for low, other in itertools.product(flat, [*middle, *flat]):
            names = (metric, "train_ce", _METRIC)
            (small, loss, test), (large, other_loss, other_test) = (
                [_mean(row, name) for name in names] for row in (low, other)
            )
            if small < _LESS * large and loss < _LESS * other_loss and test < other_test:
                return (
                    f"A smaller {metric} alone does not mean a better minimum: {named([low])} has {small:.3g}, "
                    f"{named([other])} has {large:.3g}, and {named([low])} has the lower test accuracy. Their training "
                    f"losses are {loss:.2g} and {other_loss:.2g}. The curvature of cross-entropy tends to 0 with the "
                    f"loss, so compare {metric} at equal training loss."
                )
        return f"Compare {metric} at equal training loss: the curvature of cross-entropy tends to 0 with the loss."
    return ""


def protocol(table: StudyTable) -> list[str]:
    """Notes on how to read the table: the split, the seeds, how values were chosen, what intervals and times are."""
    rows = [row for row in table.rows if row.config is not None]
    found = [
        _setting(table, rows),
        _chosen(table, rows),
        *(_choices(label, tried, table.spec.choose_seeds) for label, tried in table.tried.items()),
        _time(rows),
        _noise(rows),
        *_flags(table.rows),
    ]
    return [text for text in found if text]


def _setting(table: StudyTable, rows: Sequence[StudyRow]) -> str:
    seeds = table.spec.seeds
    parts = "" if table.parts is None else "{:,} training, {:,} validation and {:,} test samples. ".format(*table.parts)
    noise = {row.config.noise for row in rows if row.config is not None}
    wrong = (
        "Wrong training labels are drawn for each seed; validation and test labels are clean. " if noise - {0.0} else ""
    )
    if len(seeds) == 1:
        return f"{parts}{wrong}With one seed there are no intervals, so no difference can be tested."
    what = "initialisation, batch order" + (", wrong labels" if wrong else "") + " and augmentation"
    return (
        f"{parts}{wrong}A seed determines {what}; every row uses the same seeds. Intervals are 95 % Student t "
        f"intervals over {len(seeds)} seeds; differences from {named_labels([table.base])} are paired by seed."
    )


def _chosen(table: StudyTable, rows: Sequence[StudyRow]) -> str:
    if table.tried:
        return (
            "Values in the column 'chosen' have the best mean validation accuracy (ties: lower validation loss, then "
            "the earlier value in the list). No value is chosen on test data."
        )
    several: dict[str, int] = {}
    for row in rows:
        several[row.arm] = several.get(row.arm, 0) + 1
    if max(several.values(), default=0) > 1 and any("rho" in row.point for row in rows):
        return (
            "Several rows of one arm form a grid. Do not report the row with the best test accuracy, which would "
            "select on test data; choose on validation data with --tune or --choose."
        )
    if any("rho" in row.values for row in rows):
        return ""
    radii = [
        (row.config.rho, build_recipe(row.config).default_rho)
        for row in rows
        if row.config is not None and ascends(row)
    ]
    if not radii:
        return ""
    if all(rho == usual for rho, usual in radii):
        return "rho is each method's default and was not tuned on these data; --tune chooses it on validation data."
    return "rho was given, not chosen by this study; --tune chooses it on validation data."


def _choices(label: str, rows: Sequence[StudyRow], seeds: Sequence[int]) -> str:
    """The values that a row was chosen from, the seeds, and whether a better value may lie beyond the list."""
    count = "seeds" if len(seeds) > 1 else "seed"
    own = f" with {count} {', '.join(map(str, seeds))}, not in the table" if seeds else ""
    scores = "; ".join(f"{_words(row.chosen)} {row.columns['val_acc'].stat.text('.2f')}" for row in rows)
    if not any(row.whole for row in rows):
        return f"{label} is the first of its values; none was chosen, because none has every seed{own}: {scores}."
    best = next(row for row in rows if row.label == label)
    ends = {key: _end(best.chosen[key], [row.chosen.get(key, "") for row in rows]) for key in best.chosen}
    edge = "".join(
        f" {key} is at the {end} end of its list ({best.chosen[key]}): try values beyond it."
        for key, end in ends.items()
        if end
    )
    return f"{label} is chosen by mean validation accuracy in %{own}: {scores}.{edge}"


def _end(value: str, values: Sequence[str]) -> str:
    """The end of a list of three or more values at which a value is: "lower", "upper", or "" for neither."""
    try:
        numbers = sorted({float(one) for one in values})
    except ValueError:
        return ""
    if len(numbers) < 3 or float(value) not in (numbers[0], numbers[-1]):
        return ""
    return "lower" if float(value) == numbers[0] else "upper"


def _time(rows: Sequence[StudyRow]) -> str:
    times = [row.time for row in rows if row.time is not None]
    if not times:
        return ""
    copy = next((row.time for row in rows if row.config is not None and row.config.method == BASE), None)
    control = (
        f" Plain training against a copy of itself gives {copy.q25:.2f} to {copy.q75:.2f}, which is the measurement "
        "noise."
        if copy
        else ""
    )
    return (
        "time/step is the time of a training step relative to plain training: the median of ratios of interleaved "
        f"measurements on one thread after warm-up, with quartiles.{control}"
    )


def _noise(rows: Sequence[StudyRow]) -> str:
    shares = {row.config.noise for row in rows if row.config is not None}
    if shares == {0.0} or not shares or 0.0 in shares:
        return ""
    return "These results are about training with wrong labels; they say nothing about clean labels (noise=0)."


def _flags(rows: Sequence[StudyRow]) -> list[str]:
    told = []
    if any("did not train" in flag for row in rows for flag in row.flags):
        told.append(
            "'did not train': the final training loss is not clearly below chance level, the loss of predicting the "
            "class frequencies for every sample (log K for K equally frequent classes)."
        )
    if any("no result" in flag for row in rows for flag in row.flags):
        told.append("'no result': a run failed or is not finished; means leave it out, and n does not count it.")
    return told


def named(rows: Sequence[StudyRow]) -> str:
    """Names of rows for a sentence, without the values that were chosen for them."""
    return named_labels([name_of(row) for row in rows])


def name_of(row: StudyRow) -> str:
    """Arm and point of a row."""
    return " ".join([row.arm, *(f"{key}={value}" for key, value in row.point.items())])


def named_labels(labels: Mapping[str, None] | Sequence[str]) -> str:
    """Labels for a sentence: those with blanks in quotes, at most eight by name."""
    texts = [f"'{label}'" if " " in label else label for label in labels]
    more = f" and {len(texts) - _MOST} more" if len(texts) > _MOST else ""
    return ", ".join(texts[:_MOST]) + more


def _difference(one: StudyRow, other: StudyRow, confidence: float = 0.95) -> Stat | None:
    step = one.steps.get(_METRIC, 0.0)
    return paired(accuracies(one), accuracies(other), confidence, step=step, ends=POINTS)


def _points(stat: Stat) -> str:
    return f"{stat.text('+.1f', gap=' ')} points"


def _mean(row: StudyRow, metric: str) -> float:
    return row.columns[metric].stat.mean if metric in row.columns else math.nan


def _words(values: Mapping[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in values.items())


def _counted(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"
