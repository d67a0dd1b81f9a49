"""A study's table as text: Markdown, CSV, LaTeX, and the cells that a terminal shows."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

from flatmin.study.studies import StudyRow, StudyTable, Value

TITLES = {
    "test_acc": "test %",
    "val_acc": "val %",
    "memorised": "memorised %",
    "train_ce": "train loss",
    "lambda_max": "lambda_max",
    "seconds": "seconds",
}
_DIGITS = {"test_acc": 2, "val_acc": 2, "memorised": 1, "train_ce": 3, "lambda_max": 1, "seconds": 0}
_LATEX = str.maketrans(
    {char: rf"\{char}" for char in "%&_#${}"}
    | {"±": r"$\pm$", "<": "$<$", ">": "$>$", "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\^{}"}
)
ABSENT = "-"


def header(table: StudyTable) -> list[str]:
    """Names of the columns: arm, axes, n, gradients, then the metrics, differences and published numbers."""
    found = ["arm", *_axes(table), "n", "grads/step"]
    for metric in table.metrics:
        found.append(f"{TITLES[metric]} ±95 %")
        if metric == "test_acc":
            found += [f"vs {table.spec.baseline} (paired)", "p (Holm)"]
        if _has_published(table, metric):
            found.append(f"published {TITLES[metric]}")
    return found


def body(table: StudyTable) -> list[list[str]]:
    """One list of cells a row, as `header` names them."""
    rows = []
    for row in table.rows:
        cells = [row.arm, *(row.values.get(key, ABSENT) for key in _axes(table)), str(row.n), f"{row.gradients:.3g}"]
        for metric in table.metrics:
            value = row.columns[metric]
            cells.append(estimate(value, metric))
            if metric == "test_acc":
                cells += [difference(value), ABSENT if value.p is None else f"{value.p:.2g}"]
            if _has_published(table, metric):
                cells.append(published(value, metric))
        rows.append(cells)
    return rows


def estimate(value: Value, metric: str) -> str:
    """Mean and half width of the 95 % interval; the mean alone for one seed."""
    stat, digits = value.stat, _DIGITS[metric]
    if not stat.n:
        return ABSENT
    half = "" if math.isnan(stat.half) else f" ±{stat.half:.{digits}f}"
    return f"{stat.mean:.{digits}f}{half}"


def difference(value: Value) -> str:
    """The paired difference with its interval."""
    diff = value.diff
    if diff is None:
        return ABSENT
    half = "" if math.isnan(diff.half) else f" ±{diff.half:.2f}"
    return f"{diff.mean:+.2f}{half}"


def published(value: Value, metric: str) -> str:
    """The published numbers of a cell, with their spread as printed."""
    texts = []
    for one in value.published:
        spread = "" if one.spread is None else f" ±{one.spread:g}"
        texts.append(f"{one.value:.{_DIGITS[metric]}f}{spread}")
    return ", ".join(texts) or ABSENT


def remarks(table: StudyTable) -> list[str]:
    """What stands below the table: flags, sources, notes, and what p and the intervals are."""
    spec = table.spec
    found = [f"{_name(row)}: {', '.join(row.flags)}." for row in table.rows if row.flags]
    found += [f"{run}: {error}" for run, error in table.errors.items()]
    shown = [one for row in table.rows for metric in table.metrics for one in row.columns[metric].published]
    found += [f"Published: {source}." for source in dict.fromkeys(one.source for one in shown)]
    if spec.changed:
        beside = "; a published number is of the source's own settings" if shown else ""
        found.append(f"Changed by the command: {' '.join(spec.changed)}{beside}.")
    if any(row.columns["test_acc"].p is not None for row in table.rows):
        found.append(
            f"Differences are to {spec.baseline} at the same point of the axes, paired over seeds; p is that of their "
            "t test, corrected for all rows by Holm's method. Nothing is bold: what lies inside the intervals is not "
            "told apart."
        )
    return [*found, *spec.notes]


def markdown(table: StudyTable) -> str:
    """A Markdown table with the remarks below."""
    rows = [header(table), ["---"] * len(header(table)), *body(table)]
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    below = [f"- {text}" for text in remarks(table)]
    return "\n".join([f"# {table.spec.title}", "", *lines, "", *below]) + "\n"


def comma_separated(table: StudyTable) -> str:
    """CSV with one number a cell: mean, half width, standard deviation, difference, its half width, p, published."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    axes = _axes(table)
    kinds = ("mean", "half", "std", "diff", "diff_half", "p", "published")
    writer.writerow(["arm", *axes, "n", "gradients", *(f"{m}_{kind}" for m in table.metrics for kind in kinds)])
    for row in table.rows:
        cells: list[object] = [row.arm, *(row.values.get(key, "") for key in axes), row.n, row.gradients]
        for metric in table.metrics:
            value = row.columns[metric]
            diff = value.diff
            numbers = [value.stat.mean, value.stat.half, value.std]
            numbers += [math.nan, math.nan] if diff is None else [diff.mean, diff.half]
            numbers += [math.nan if value.p is None else value.p]
            numbers += [value.published[0].value if value.published else math.nan]
            cells += ["" if math.isnan(number) else number for number in numbers]
        writer.writerow(cells)
    return out.getvalue()


def latex(table: StudyTable) -> str:
    """A LaTeX tabular for the package booktabs."""
    names = header(table)
    columns = "l" * (1 + len(_axes(table))) + "r" * (len(names) - 1 - len(_axes(table)))
    lines = [" & ".join(cell.translate(_LATEX) for cell in row) + r" \\" for row in [names, *body(table)]]
    begin = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule"]
    return "\n".join([*begin, *lines[1:], r"\bottomrule", r"\end{tabular}"]) + "\n"


def _axes(table: StudyTable) -> list[str]:
    return list(dict.fromkeys(key for row in table.rows for key in row.values))


def _has_published(table: StudyTable, metric: str) -> bool:
    return any(row.columns[metric].published for row in table.rows)


def _name(row: StudyRow) -> str:
    return " ".join([row.arm, *(f"{key}={value}" for key, value in row.values.items())])


def widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """The widest cell of each column."""
    return [max(map(len, column)) for column in zip(*rows, strict=True)]
