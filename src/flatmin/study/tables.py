"""A study's table as text: Markdown, CSV, LaTeX, and cells for the terminal."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence

from flatmin.stats import Stat
from flatmin.study.conclusions import protocol, verdicts
from flatmin.study.tabulate import StudyRow, StudyTable, Value
from flatmin.study.timing import Ratio

TITLES = {
    "test_acc": "test %",
    "test_best": "test %, best epoch",
    "test_top5": "test top-5 %",
    "val_acc": "val %",
    "memorised": "memorised %",
    "train_ce": "train loss",
    "lambda_max": "lambda_max",
    "seconds": "seconds",
}
_DIGITS = {
    **dict.fromkeys(("test_acc", "test_best", "test_top5", "val_acc"), 2),
    **{"memorised": 1, "train_ce": 3, "lambda_max": 1, "seconds": 0},
}
_LATEX = str.maketrans(
    {char: rf"\{char}" for char in "%&_#${}"}
    | {"±": r"$\pm$", "<": "$<$", ">": "$>$", "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\^{}"}
)
ABSENT = "-"
_WIDE = 9  # columns that fit side by side on a page
CUT = (
    "Intervals that would leave the possible range, such as below 0 or above 100 %, are cut there and written with "
    "both ends. An interval from 0 to 100 % means that there are too few seeds."
)


def header(table: StudyTable) -> list[str]:
    """Titles of the columns: arm, axes, radius, n, metrics with differences and published numbers, and cost."""
    titles = ["arm", *axes(table), *(["chosen"] if table.tried else []), *(["rho"] if _has_radius(table) else [])]
    titles.append("n")
    for metric in table.metrics:
        titles.append(f"{title(metric) if metric != 'seconds' else _unit(table)[0]} ±95 %")
        if metric == "test_acc":
            titles.append(f"vs {table.base} (paired)")
            titles += _chances(table.tests(metric))
            if _has_equal(table):
                titles += ["vs plain, equal grads", *(f"{one}, equal grads" for one in _chances(table.tests("equal")))]
        if _has_published(table, metric):
            titles.append(f"published {title(metric)}")
    return [*titles, "grads/step", *(["time/step"] if _has_time(table) else [])]


def groups(table: StudyTable) -> list[tuple[str, list[int]]]:
    """Title and column indices of each narrower table that the table is split into; a narrow table is not split."""
    names = header(table)
    if len(names) <= _WIDE:
        return [("", list(range(len(names))))]
    labels = list(range(1 + len(axes(table)) + bool(table.tried)))
    first = [i for i, name in enumerate(names) if i not in labels and name.startswith(("rho", "n", "test", "vs ", "p"))]
    first = [i for i in first if not names[i].endswith("equal grads")]
    rest = [i for i in range(len(names)) if i not in labels and i not in first]
    return [("Test accuracy", [*labels, *first]), ("Cost, losses and sharpness", [*labels, *rest])]


def _chances(tests: int) -> list[str]:
    """Titles of the columns of p values: uncorrected, and corrected if there is more than one test."""
    return ["p", *([f"p (Holm, {tests} tests)"] if tests > 1 else [])]


def title(metric: str) -> str:
    """The title of a metric's column."""
    return TITLES.get(metric, metric)


def body(table: StudyTable) -> list[list[str]]:
    """The cells of each row, in the order of `header`."""
    rows = []
    for row in table.rows:
        cells = [_arm(row, table), *(row.point.get(key, ABSENT) for key in axes(table))]
        if table.tried:
            cells.append(_words(row.chosen) or ABSENT)
        if _has_radius(table):
            cells.append(ABSENT if row.config is None or row.config.rho is None else f"{row.config.rho:g}")
        cells.append(str(row.n))
        for metric in table.metrics:
            value = row.columns[metric]
            cells.append(estimate(value, metric) if metric != "seconds" else _time(value, table))
            if metric == "test_acc":
                cells += [difference(value.diff), *_p(value.p, value.corrected, table.tests(metric))]
                if _has_equal(table):
                    equal, tests = row.equal, table.tests("equal")
                    cells.append(difference(None if equal is None else equal.diff))
                    cells += _p(None, None, tests) if equal is None else _p(equal.p, equal.corrected, tests)
            if _has_published(table, metric):
                cells.append(published(value, metric))
        cells.append(f"{row.gradients:.3g}")
        if _has_time(table):
            cells.append(ABSENT if row.time is None else time_text(row.time))
        rows.append(cells)
    return rows


def _arm(row: StudyRow, table: StudyTable) -> str:
    """The label of an arm; that of a baseline is followed by its own settings, unless another column has them."""
    arm = next((one for one in table.spec.baselines if one.label == row.arm), None)
    if arm is None or row.grid_point is None:
        return row.arm
    keys = [key for key in arm.settings if key not in ("method", *row.values)]
    keys += [axis.key for axis in arm.axes if axis.key not in (*keys, *row.values)]
    own = ", ".join(f"{key}={value}" for key in keys if (value := row.grid_point.setting(key)) is not None)
    return f"{row.arm} ({own})" if own else row.arm


def _p(p: float | None, corrected: float | None, tests: int) -> list[str]:
    return [_chance(p), *([_chance(corrected)] if tests > 1 else [])]


def time_text(time: Ratio) -> str:
    """A time ratio with its quartiles."""
    return f"{time.median:.2f} ({time.q25:.2f}-{time.q75:.2f})"


def estimate(value: Value, metric: str) -> str:
    """The mean with its 95 % interval (see `Stat.text`); the mean alone for one seed."""
    return value.stat.text(_form(metric)) if value.stat.n else ABSENT


def _unit(table: StudyTable) -> tuple[str, float, str]:
    """Name, length in seconds and format of the unit of the times of runs: the longest decides."""
    values = [row.columns["seconds"] for row in table.rows if "seconds" in row.columns]
    longest = max((value.stat.mean for value in values if value.stat.n), default=0.0)
    if longest < 180 or any(value.published for value in values):
        return title("seconds"), 1.0, ".0f" if longest >= 10 else ".1f"
    return ("minutes", 60.0, ".1f") if longest < 3 * 3600 else ("hours", 3600.0, ".2f")


def _time(value: Value, table: StudyTable) -> str:
    """The time of a run with its interval, in the table's unit."""
    _, length, form = _unit(table)
    stat = value.stat
    values = tuple(seconds / length for seconds in stat.values)
    scaled = dataclasses.replace(stat, mean=stat.mean / length, half=stat.half / length, values=values)
    return scaled.text(form) if stat.n else ABSENT


def _form(metric: str) -> str:
    return f".{_DIGITS[metric]}f" if metric in _DIGITS else ".4g"


def _chance(p: float | None) -> str:
    return ABSENT if p is None or math.isnan(p) else f"{p:.2g}"


def difference(diff: Stat | None) -> str:
    """A paired difference with its interval."""
    return ABSENT if diff is None else diff.text("+.2f")


def published(value: Value, metric: str) -> str:
    """The published numbers of a cell, with their spread as printed in the source."""
    texts = []
    for one in value.published:
        spread = "" if one.spread is None else f" ±{one.spread:g}"
        texts.append(f"{one.value:{_form(metric)}}{spread}")
    return ", ".join(texts) or ABSENT


def troubles(table: StudyTable) -> list[str]:
    """Sentences on flagged rows, failed runs, missing numbers and empty columns."""
    texts = [f"{row.label}: {', '.join(row.flags)}." for row in table.rows if row.flags]
    texts += [f"{run}: {error}" for run, error in table.errors.items()]
    return texts + [f"The column {name} is empty." for name in table.spec.columns if _empty(table, name)]


def remarks(table: StudyTable) -> list[str]:
    """Notes on how to read the table: where numbers come from, what p and the intervals are, how values were chosen."""
    spec = table.spec
    texts = [*spec.notes, *table.origins]
    shown = [one for row in table.rows for metric in table.metrics for one in row.columns[metric].published]
    texts += [f"Published: {source}." for source in dict.fromkeys(one.source for one in shown)]
    if spec.changed:
        beside = "; published numbers belong to the settings of their source" if shown else ""
        texts.append(f"Settings changed by the command: {' '.join(spec.changed)}{beside}.")
    texts += protocol(table)
    if tests := table.tests("test_acc"):
        at = " at the same point of the axes" if axes(table) else ""
        holm = (
            f" p (Holm) is corrected for the {tests} tests in the column, so it grows with the number of rows."
            if tests > 1
            else ""
        )
        texts.append(f"p is the p value of the paired t test against {table.base}{at}.{holm}")
    if any(stat.cut for stat in _shown(table)):
        texts.append(CUT)
    if _has_equal(table):
        names = dict.fromkeys(row.equal.label for row in table.rows if row.equal is not None)
        texts.append(
            "'equal grads' is the difference from plain training with as many gradient evaluations (within 2 %); if "
            f"there are several such rows, from the best one on validation data: {', '.join(names)}."
        )
    return texts


def _shown(table: StudyTable) -> list[Stat]:
    """All values and differences in the table that have an interval."""
    values = [row.columns[metric] for row in table.rows for metric in table.metrics]
    stats = [value.stat for value in values] + [value.diff for value in values if value.diff is not None]
    return stats + [row.equal.diff for row in table.rows if row.equal is not None]


def _empty(table: StudyTable, metric: str) -> bool:
    return any(row.n for row in table.rows) and not any(row.columns[metric].stat.n for row in table.rows)


def _words(values: Mapping[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in values.items())


def markdown(table: StudyTable) -> str:
    """A Markdown table with the remarks below."""
    rows = [header(table), ["---"] * len(header(table)), *body(table)]
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    below = [f"- {text}" for text in (*troubles(table), *verdicts(table), *remarks(table))]
    return "\n".join([f"# {table.spec.title}", "", *lines, "", *below]) + "\n"


def comma_separated(table: StudyTable) -> str:
    """CSV with one number per cell: mean, interval, standard deviation, difference, its interval, p, published.

    An interval has columns for its half width and its ends; the half width is empty if the interval is cut. `p` is the
    uncorrected p value, `p_holm` is corrected for all tests of the column.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    keys = axes(table)
    kinds = ("mean", "half", "low", "high", "std", "diff", "diff_half", "diff_low", "diff_high", "p", "p_holm")
    equal = ("equal_diff", "equal_half", "equal_low", "equal_high", "equal_p", "equal_p_holm")
    names = [f"{m}_{kind}" for m in table.metrics for kind in (*kinds, "published")]
    times = ("time", "time_q25", "time_q75")
    radius = [] if "rho" in keys else ["rho"]
    writer.writerow(["arm", *keys, "chosen", *radius, "n", "gradients", "budget", *times, *equal, *names])
    for row in table.rows:
        cells: list[object] = [row.arm, *(row.point.get(key, "") for key in keys), _words(row.chosen)]
        if radius:
            cells.append("" if row.config is None or row.config.rho is None else row.config.rho)
        cells += [row.n, row.gradients]
        time = [math.nan] * 3 if row.time is None else [row.time.median, row.time.q25, row.time.q75]
        equal_numbers = [] if row.equal is None else _numbers(row.equal.diff, row.equal.p, row.equal.corrected)
        own = [row.budget, *time, *(equal_numbers or _numbers(None, None, None))]
        cells += ["" if math.isnan(number) else number for number in own]
        for metric in table.metrics:
            value = row.columns[metric]
            numbers = [*_interval(value.stat), value.std, *_numbers(value.diff, value.p, value.corrected)]
            numbers += [value.published[0].value if value.published else math.nan]
            cells += ["" if math.isnan(number) else number for number in numbers]
        writer.writerow(cells)
    return out.getvalue()


def per_seed(table: StudyTable) -> str:
    """CSV with one line for each row of the table, seed and metric: the values behind every mean.

    Columns: arm, the axes, chosen (false for values that were tried and not chosen), method, rho (unless it is an
    axis), seed, metric, value.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    rows = [(row, True) for row in table.rows]
    shown = {id(row.grid_point) for row in table.rows}
    rows += [(row, False) for tried in table.tried.values() for row in tried if id(row.grid_point) not in shown]
    keys = list(dict.fromkeys(key for row, _ in rows for key in row.values))
    radius = [] if "rho" in keys else ["rho"]
    writer.writerow(["arm", *keys, "chosen", "method", *radius, "seed", "metric", "value"])
    for row, chosen in rows:
        for seed, run in row.runs.items():
            result = run.result
            start: list[object] = [row.arm, *(row.values.get(key, "") for key in keys), str(chosen).lower()]
            start += [result.method, *(["" if result.rho is None else result.rho] if radius else []), seed]
            for metric in dict.fromkeys((*table.metrics, "val_acc", "test_acc", "seconds")):
                if (value := run.number(metric)) is not None:
                    writer.writerow([*start, metric, value])
    return out.getvalue()


def _numbers(diff: Stat | None, p: float | None, corrected: float | None) -> list[float]:
    return [*_interval(diff), math.nan if p is None else p, math.nan if corrected is None else corrected]


def _interval(stat: Stat | None) -> list[float]:
    """Mean, half width, and both ends."""
    if stat is None:
        return [math.nan] * 4
    return [stat.mean, math.nan if stat.cut else stat.half, stat.low, stat.high]


def latex(table: StudyTable) -> str:
    """A LaTeX tabular that uses the package booktabs."""
    names = header(table)
    columns = "l" * (1 + len(axes(table))) + "r" * (len(names) - 1 - len(axes(table)))
    lines = [" & ".join(cell.translate(_LATEX) for cell in row) + r" \\" for row in [names, *body(table)]]
    begin = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule"]
    return "\n".join([*begin, *lines[1:], r"\bottomrule", r"\end{tabular}"]) + "\n"


def axes(table: StudyTable) -> list[str]:
    """Keys of the axes that distinguish the rows of an arm."""
    return list(dict.fromkeys(key for row in table.rows for key in row.point))


def _has_published(table: StudyTable, metric: str) -> bool:
    return any(row.columns[metric].published for row in table.rows)


def _has_radius(table: StudyTable) -> bool:
    """Whether the table has a column for the radius: some row has a radius, and it is not an axis."""
    said = any("rho" in row.values for row in table.rows)
    return not said and any(row.config is not None and row.config.rho is not None for row in table.rows)


def _has_time(table: StudyTable) -> bool:
    return any(row.time is not None for row in table.rows)


def _has_equal(table: StudyTable) -> bool:
    return any(row.equal is not None for row in table.rows)


def widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """The width of each column in characters."""
    return [max(map(len, column)) for column in zip(*rows, strict=True)]
