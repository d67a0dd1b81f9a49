"""The HTML page of a comparison: the table, what follows from it, the figures, and how it was made."""

from __future__ import annotations

import math
import os
from pathlib import Path

from flatmin.report.comparison import figures
from flatmin.report.comparison.figures import Mark
from flatmin.report.html import (
    Cell,
    Column,
    Markup,
    code,
    facts,
    figure,
    flat,
    heading,
    legend,
    notes,
    page,
    paragraph,
    table,
    write,
)
from flatmin.report.studies.text import CUT
from flatmin.report.style import number
from flatmin.study.summary import Row, Summary

_COLUMNS = (
    Column("arm", "what was trained; the colour is that of the figures", text=True),
    Column("rho", "radius of the perturbation, in the method's own norm"),
    Column("test %, last epoch", "mean ± half width of the 95 % t interval over the seeds"),
    Column("difference to sgd", "paired over the seeds that both have, last epoch, mean ± 95 % t interval"),
    Column("test %, best epoch", "at the epoch with the best validation accuracy"),
    Column("noise memorised, %", "share of the wrongly labelled training samples predicted as their wrong label"),
    Column("train loss", "cross-entropy on the training set with its noisy labels, evaluation mode"),
    Column("λ max", "largest eigenvalue of the train loss's Hessian, evaluation mode; largest relative residual"),
    Column("gradients / step", "gradient evaluations per step"),
    Column("time / step", "relative to the base, interleaved, median with quartiles"),
)
_SEEDS = Column("seeds", "number of seeds")


def render_report(summary: Summary) -> str:
    """The page as text.

    Raises:
        ModuleNotFoundError: plotly is not installed (extra "report").
    """
    mark = figures.marks(summary.rows)
    seeds = sorted({row.n for row in summary.rows})
    span = "–".join(str(n) for n in dict.fromkeys((seeds[0], seeds[-1]))) if seeds else "0"
    columns, rows = [*_COLUMNS], [_row(row, mark[row.label]) for row in summary.rows]
    if len(seeds) > 1:
        columns.append(_SEEDS)
        rows = [[*cells, Cell(str(row.n), sort=row.n)] for cells, row in zip(rows, summary.rows, strict=True)]
    body = [
        paragraph(f"{len(summary.rows)} arms, {span} seed{'s' * (span != '1')} each. Click a header to sort.", "lead"),
        table(columns, rows),
        notes(
            [
                *summary.notes,
                *([CUT] if any(row.cut for row in summary.rows) else []),
                *(f"No result from {run}: {why}" for run, why in summary.errors.items()),
            ]
        ),
        legend({row.label: (row.label, mark[row.label].tone) for row in summary.rows}),
        *_figures(summary, mark),
        *_choices(summary, mark),
    ]
    foot = [heading("How this was made"), code(summary.command), facts(flat(summary.environment))]
    return page(summary.title, body, foot)


def write_report(summary: Summary, path: str | os.PathLike[str]) -> Path:
    """Write the page, by a temporary file and a rename, so that a reader never sees half of it.

    Args:
        summary: what to report.
        path: the file; its folder is made if it is missing.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: plotly is not installed (extra "report").
        OSError: the file cannot be written.
    """
    return write(render_report(summary), path)


def _figures(summary: Summary, mark: dict[str, Mark]) -> list[Markup]:
    shown = [
        (
            "Accuracy per seed",
            "Small marks are seeds; large marks are means with the 95 % interval. Filled: last epoch. "
            "Open: the epoch with the best validation accuracy.",
            figures.accuracy(summary, mark),
        ),
        (
            "Memorisation of wrong labels",
            "Share of the wrongly labelled training samples that the net predicts as labelled. "
            "Bold: mean over the seeds; dashed: arms without an ascent.",
            figures.curve(summary, mark, "memorised", "memorised, %"),
        ),
        (
            "Test accuracy over the epochs",
            "Shown for the reader; nothing was chosen by it.",
            figures.curve(summary, mark, "test_acc", "test accuracy, %"),
        ),
        (
            "Sharpness against train loss",
            "Both fall together once the noise is memorised, so a small λ alone is no sign of a flat minimum. "
            "One point per seed; both axes are logarithmic.",
            figures.sharpness(summary, mark),
        ),
        (
            "What the accuracy costs",
            "All gradients of a run, so that arms of equal cost stand above each other.",
            figures.cost(summary, mark),
        ),
        (
            "Choice of rho",
            "Each value was judged on the validation set; the best mean was taken.",
            figures.tuning(summary, mark),
        ),
    ]
    return [heading(title, caption) + figure(fig, title) for title, caption, fig in shown if fig is not None]


def _choices(summary: Summary, mark: dict[str, Mark]) -> list[Markup]:
    """Everything that was tried on the validation set, on any axis."""
    rows = [
        [
            Cell(label, tone=mark[label].tone if label in mark else ""),
            Cell(", ".join(f"{name} = {value}" for name, value in choice.values.items())),
            Cell(number(choice.val_acc), sort=choice.val_acc.mean),
            Cell("chosen" if choice.chosen else ""),
        ]
        for label, found in summary.choices.items()
        for choice in found
    ]
    if not rows:
        return []
    columns = [Column("arm", text=True), Column("tried", text=True), Column("validation %"), Column("", text=True)]
    return [heading("Tried on validation", "Validation accuracy at the last epoch."), table(columns, rows)]


def _row(row: Row, mark: Mark) -> list[Cell]:
    diff = Cell("–") if row.diff is None else Cell(row.diff.text("+.1f", gap=" "), sort=row.diff.mean)
    time = (
        Cell("–")
        if row.time_ratio is None
        else Cell(
            f"{row.time_ratio.median:.2f} ×",
            sort=row.time_ratio.median,
            minor=f"({row.time_ratio.q25:.2f}–{row.time_ratio.q75:.2f})",
        )
    )
    residual = "" if math.isnan(row.lambda_residual) else f"({row.lambda_residual:.0e})"
    return [
        Cell(row.label, flag=", ".join(row.flags), tone=mark.tone),
        Cell("–" if row.rho is None else f"{row.rho:g}", sort=row.rho),
        Cell(number(row.last), sort=row.last.mean),
        diff,
        Cell(number(row.best), sort=row.best.mean),
        Cell(number(row.memorised), sort=row.memorised.mean),
        Cell(number(row.train_ce, 3), sort=row.train_ce.mean),
        Cell(number(row.lambda_max), sort=row.lambda_max.mean, minor=residual),
        Cell(f"{row.gradient_evaluations:g}", sort=row.gradient_evaluations),
        time,
    ]
