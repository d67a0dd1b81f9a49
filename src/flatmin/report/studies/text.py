"""A study's table as text: Markdown, CSV, LaTeX, and the cells that a terminal shows."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence

from flatmin.stats import Stat
from flatmin.study.tabulate import StudyRow, StudyTable, Value

TITLES = {
    "test_acc": "test %",
    "test_top5": "test top-5 %",
    "val_acc": "val %",
    "memorised": "memorised %",
    "train_ce": "train loss",
    "lambda_max": "lambda_max",
    "seconds": "seconds",
}
_DIGITS = {"test_acc": 2, "test_top5": 2, "val_acc": 2, "memorised": 1, "train_ce": 3, "lambda_max": 1, "seconds": 0}
_LATEX = str.maketrans(
    {char: rf"\{char}" for char in "%&_#${}"}
    | {"±": r"$\pm$", "<": "$<$", ">": "$>$", "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\^{}"}
)
ABSENT = "-"
CUT = (
    "Intervals are cut where a number cannot go, such as below 0 or above 100 %, and both ends are given then. An "
    "interval from 0 to 100 % means that there are too few seeds."
)


def header(table: StudyTable) -> list[str]:
    """Names of the columns: arm, axes, n, gradients, then the metrics, differences and published numbers."""
    titles = ["arm", *axes(table), *(["chosen"] if table.tried else []), "n", "grads/step"]
    for metric in table.metrics:
        titles.append(f"{title(metric)} ±95 %")
        if metric == "test_acc":
            titles += [f"vs {table.spec.baseline} (paired)", "p (Holm)"]
            if _has_equal(table):
                titles += ["vs plain, equal grads", "p (Holm), equal grads"]
        if _has_published(table, metric):
            titles.append(f"published {title(metric)}")
    return titles


def title(metric: str) -> str:
    """What a column is called."""
    return TITLES.get(metric, metric)


def body(table: StudyTable) -> list[list[str]]:
    """One list of cells a row, as `header` names them."""
    rows = []
    for row in table.rows:
        cells = [row.arm, *(row.point.get(key, ABSENT) for key in axes(table))]
        if table.tried:
            cells.append(_words(row.chosen) or ABSENT)
        cells += [str(row.n), f"{row.gradients:.3g}"]
        for metric in table.metrics:
            value = row.columns[metric]
            cells.append(estimate(value, metric))
            if metric == "test_acc":
                cells += [difference(value.diff), _chance(value.p)]
                if _has_equal(table):
                    equal = row.equal
                    cells += [ABSENT, ABSENT] if equal is None else [difference(equal.diff), _chance(equal.p)]
            if _has_published(table, metric):
                cells.append(published(value, metric))
        rows.append(cells)
    return rows


def estimate(value: Value, metric: str) -> str:
    """The mean with its 95 % interval (see `Stat.text`); the mean alone for one seed."""
    return value.stat.text(_form(metric)) if value.stat.n else ABSENT


def _form(metric: str) -> str:
    return f".{_DIGITS[metric]}f" if metric in _DIGITS else ".4g"


def _chance(p: float | None) -> str:
    return ABSENT if p is None or math.isnan(p) else f"{p:.2g}"


def difference(diff: Stat | None) -> str:
    """A paired difference with its interval."""
    return ABSENT if diff is None else diff.text("+.2f")


def published(value: Value, metric: str) -> str:
    """The published numbers of a cell, with their spread as printed."""
    texts = []
    for one in value.published:
        spread = "" if one.spread is None else f" ±{one.spread:g}"
        texts.append(f"{one.value:{_form(metric)}}{spread}")
    return ", ".join(texts) or ABSENT


def remarks(table: StudyTable) -> list[str]:
    """What stands below the table: flags, sources, notes, and what p and the intervals are."""
    spec = table.spec
    texts = [f"{row.label}: {', '.join(row.flags)}." for row in table.rows if row.flags]
    texts += [f"{run}: {error}" for run, error in table.errors.items()]
    texts += table.origins
    shown = [one for row in table.rows for metric in table.metrics for one in row.columns[metric].published]
    texts += [f"Published: {source}." for source in dict.fromkeys(one.source for one in shown)]
    if spec.changed:
        beside = "; a published number is of the source's own settings" if shown else ""
        texts.append(f"Changed by the command: {' '.join(spec.changed)}{beside}.")
    if any(row.columns["test_acc"].p is not None for row in table.rows):
        texts.append(
            f"Differences are to {spec.baseline} at the same point of the axes, paired over seeds; p is that of their "
            "t test, corrected for all rows by Holm's method. No row is bold: differences inside the intervals are not "
            "significant."
        )
    if any(stat.cut for stat in _shown(table)):
        texts.append(CUT)
    if _has_equal(table):
        names = dict.fromkeys(row.equal.label for row in table.rows if row.equal is not None)
        texts.append(
            "Equal grads: against plain training that took as many gradient evaluations (within 2 %), of several the "
            f"best on validation: {', '.join(names)}."
        )
    texts += [_choice(label, rows, spec.choose_seeds) for label, rows in table.tried.items()]
    texts += [f"No run has the column {name}." for name in spec.columns if _empty(table, name)]
    return [*texts, *spec.notes]


def _shown(table: StudyTable) -> list[Stat]:
    """Everything in the table that has an interval."""
    values = [row.columns[metric] for row in table.rows for metric in table.metrics]
    stats = [value.stat for value in values] + [value.diff for value in values if value.diff is not None]
    return stats + [row.equal.diff for row in table.rows if row.equal is not None]


def _empty(table: StudyTable, metric: str) -> bool:
    return any(row.n for row in table.rows) and not any(row.columns[metric].stat.n for row in table.rows)


def _choice(label: str, rows: Sequence[StudyRow], seeds: Sequence[int]) -> str:
    """What a row was chosen from, and on which seeds if they are others than those of the table."""
    own = f" with seed {', '.join(map(str, seeds))}, not in the table" if seeds else ""
    scores = [f"{_words(row.chosen)} {estimate(row.columns['val_acc'], 'val_acc')}" for row in rows]
    if not any(row.grid_point is not None and row.n == len(row.grid_point.configs) for row in rows):
        return f"{label} stands for all values, none of which has every seed{own}: {'; '.join(scores)}."
    return f"{label} is chosen by mean validation accuracy in %{own}: {'; '.join(scores)}."


def _words(values: Mapping[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in values.items())


def markdown(table: StudyTable) -> str:
    """A Markdown table with the remarks below."""
    rows = [header(table), ["---"] * len(header(table)), *body(table)]
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    below = [f"- {text}" for text in remarks(table)]
    return "\n".join([f"# {table.spec.title}", "", *lines, "", *below]) + "\n"


def comma_separated(table: StudyTable) -> str:
    """CSV with one number a cell: mean, interval, standard deviation, difference, its interval, p, published.

    An interval has its half width and its ends; the half width is left out where the interval is cut.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    keys = axes(table)
    kinds = ("mean", "half", "low", "high", "std", *("diff", "diff_half", "diff_low", "diff_high"), "p", "published")
    equal = ("equal_diff", "equal_half", "equal_low", "equal_high", "equal_p")
    names = [f"{m}_{kind}" for m in table.metrics for kind in kinds]
    writer.writerow(["arm", *keys, "chosen", "n", "gradients", "budget", *equal, *names])
    for row in table.rows:
        cells: list[object] = [row.arm, *(row.point.get(key, "") for key in keys), _words(row.chosen)]
        cells += [row.n, row.gradients]
        own = [row.budget, *(_numbers(None, None) if row.equal is None else _numbers(row.equal.diff, row.equal.p))]
        cells += ["" if math.isnan(number) else number for number in own]
        for metric in table.metrics:
            value = row.columns[metric]
            numbers = [*_interval(value.stat), value.std, *_numbers(value.diff, value.p)]
            numbers += [value.published[0].value if value.published else math.nan]
            cells += ["" if math.isnan(number) else number for number in numbers]
        writer.writerow(cells)
    return out.getvalue()


def _numbers(diff: Stat | None, p: float | None) -> list[float]:
    return [*_interval(diff), math.nan if p is None else p]


def _interval(stat: Stat | None) -> list[float]:
    """Mean, half width, and both ends."""
    if stat is None:
        return [math.nan] * 4
    return [stat.mean, math.nan if stat.cut else stat.half, stat.low, stat.high]


def latex(table: StudyTable) -> str:
    """A LaTeX tabular for the package booktabs."""
    names = header(table)
    columns = "l" * (1 + len(axes(table))) + "r" * (len(names) - 1 - len(axes(table)))
    lines = [" & ".join(cell.translate(_LATEX) for cell in row) + r" \\" for row in [names, *body(table)]]
    begin = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule"]
    return "\n".join([*begin, *lines[1:], r"\bottomrule", r"\end{tabular}"]) + "\n"


def axes(table: StudyTable) -> list[str]:
    """Keys of the columns that tell the rows of an arm apart."""
    return list(dict.fromkeys(key for row in table.rows for key in row.point))


def _has_published(table: StudyTable, metric: str) -> bool:
    return any(row.columns[metric].published for row in table.rows)


def _has_equal(table: StudyTable) -> bool:
    return any(row.equal is not None for row in table.rows)


def widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """The widest cell of each column."""
    return [max(map(len, column)) for column in zip(*rows, strict=True)]
