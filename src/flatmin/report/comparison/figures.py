"""The figures of a comparison, as plain data for `flatmin.report.html`: no plotly is needed to build them.

Every trace's `legendgroup` is its arm's label, so that the page's legend shows and hides an arm everywhere.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flatmin.report.html import Figure, plot_text
from flatmin.report.style import SYMBOLS, number, tone
from flatmin.stats import Stat
from flatmin.study.summary import Row, Summary


@dataclass(frozen=True)
class Mark:
    """How one arm is drawn: a colour of the style sheet, a symbol, and a dashed line for arms without an ascent."""

    tone: str
    symbol: str
    dash: str

    @property
    def color(self) -> str:
        """The colour as figures name it."""
        return f"var:{self.tone}"


def marks(rows: Sequence[Row], base: str = "sgd") -> dict[str, Mark]:
    """One mark per arm; the base is grey, all others get a colour of their own until the colours run out."""
    result = {}
    turn = 0
    for i, row in enumerate(rows):
        neutral = row.label == base
        dash = "dash" if row.gradient_evaluations <= 1 and not neutral else "solid"
        result[row.label] = Mark("tone-0" if neutral else tone(turn), SYMBOLS[i % len(SYMBOLS)], dash)
        turn += not neutral
    return result


def accuracy(summary: Summary, mark: dict[str, Mark]) -> Figure:
    """Test accuracy of every seed with mean and interval: filled at the last epoch, open at the best-validation one."""
    data: list[dict[str, Any]] = []
    for i, row in enumerate(summary.rows):
        style = mark[row.label]
        for stat, name, shift, suffix in ((row.last, "last epoch", -0.16, ""), (row.best, "best epoch", 0.16, "-open")):
            shared = {"legendgroup": row.label, "type": "scatter", "mode": "markers", "hoverinfo": "text"}
            marker = {"color": style.color, "symbol": style.symbol + suffix}
            edge = style.color if suffix else "var:paper"
            data.append(
                shared
                | {
                    "x": list(stat.values) if stat.n > 1 else [],
                    "y": [i + shift] * (stat.n if stat.n > 1 else 0),
                    "hovertext": [f"{plot_text(row.label)}, {name}: {v:.2f} %" for v in stat.values],
                    "marker": marker | {"size": 8, "opacity": 0.75, "line": {"color": edge, "width": 1}},
                }
            )
            data.append(
                shared
                | {
                    "x": [stat.mean],
                    "y": [i + shift],
                    "hovertext": [f"{plot_text(row.label)}, {name}: {number(stat)} % (n = {stat.n})"],
                    "error_x": error_bars([stat], style.color),
                    "marker": marker | {"size": 12},
                }
            )
    rows = len(summary.rows)
    layout = {
        "xaxis": {"title": {"text": "test accuracy, %"}},
        "yaxis": {
            "tickvals": list(range(rows)),
            "ticktext": [broken(row.label) for row in summary.rows],
            "range": [rows - 0.5, -0.5],
            "showgrid": False,
        },
    }
    return Figure(data, layout, height=90 + 44 * max(rows, 3), narrow_margin={"l": 8, "r": 8, "t": 12})


def curve(summary: Summary, mark: dict[str, Mark], metric: str, title: str) -> Figure | None:
    """A metric over the epochs: the mean over the seeds as a line, each seed as a faint one; None without values."""
    data: list[dict[str, Any]] = []
    for row in summary.rows:
        seeds = [s for s in summary.curves.get(row.label, {}).get(metric, []) if any(_known(v) for v in s)]
        if not seeds:
            continue
        style = mark[row.label]
        shared = {"legendgroup": row.label, "type": "scatter", "mode": "lines"}
        line = {"color": style.color, "dash": style.dash}
        if len(seeds) > 1:
            data += [
                shared
                | {"x": _epochs(s), "y": list(s), "hoverinfo": "skip", "opacity": 0.22, "line": line | {"width": 1}}
                for s in seeds
            ]
        mean = _mean_curve(seeds)
        data.append(
            shared
            | {
                "x": _epochs(mean),
                "y": mean,
                "hoverinfo": "text",
                "hovertext": [
                    f"{plot_text(row.label)}, epoch {e}: {v:.2f}" for e, v in zip(_epochs(mean), mean, strict=True)
                ],
                "line": line | {"width": 2.2},
            }
        )
    if not data:
        return None
    layout = {"xaxis": {"title": {"text": "epoch"}}, "yaxis": {"title": {"text": plot_text(title)}}}
    return Figure(data, layout)


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _epochs(values: Sequence[object]) -> list[int]:
    return list(range(1, len(values) + 1))


def _mean_curve(seeds: Sequence[Sequence[float]]) -> list[float]:
    """Mean over the seeds that have the epoch."""
    length = max(len(s) for s in seeds)
    columns = [[s[e] for s in seeds if e < len(s) and _known(s[e])] for e in range(length)]
    return [sum(c) / len(c) if c else math.nan for c in columns]


def sharpness(summary: Summary, mark: dict[str, Mark]) -> Figure | None:
    """λ_max against train cross-entropy, one point a seed, both on log axes; None if no value is positive."""
    data: list[dict[str, Any]] = []
    for row in summary.rows:
        pairs = [
            (x, y)
            for x, y in zip(row.train_ce.values, row.lambda_max.values, strict=False)
            if _known(x) and _known(y) and x > 0 and y > 0
        ]
        if not pairs:
            continue
        style = mark[row.label]
        data.append(
            {
                "legendgroup": row.label,
                "type": "scatter",
                "mode": "markers",
                "x": [x for x, _ in pairs],
                "y": [y for _, y in pairs],
                "hoverinfo": "text",
                "hovertext": [f"{plot_text(row.label)}<br>train loss {x:.4g}, λ_max {y:.4g}" for x, y in pairs],
                "marker": {"color": style.color, "symbol": style.symbol, "size": 10, "opacity": 0.85},
            }
        )
    if not data:
        return None
    layout = {
        "xaxis": log_axis([v for d in data for v in d["x"]], "train cross-entropy at the end (noisy labels)"),
        "yaxis": log_axis([v for d in data for v in d["y"]], "λ<sub>max</sub> of the train loss"),
    }
    return Figure(data, layout)


def cost(summary: Summary, mark: dict[str, Mark], base: str = "sgd") -> Figure | None:
    """Test accuracy against all gradients of a run, as a multiple of the base arm's; None without a base arm."""
    reference = next((row for row in summary.rows if row.label == base), None)
    if reference is None or not _total(summary, reference):
        return None
    data = []
    for i, row in enumerate(summary.rows):
        ratio = _total(summary, row) / _total(summary, reference)
        if not ratio:
            continue
        style = mark[row.label]
        spread = 1 + 0.012 * (i % 9 - 4)  # arms of equal cost would hide each other
        hover = f"{plot_text(row.label)}: {number(row.last)} %<br>{ratio:.2f} × the base's gradients"
        if row.time_ratio is not None:
            hover += f"<br>{row.time_ratio.median:.2f} × the base's time per step"
        data.append(
            {
                "legendgroup": row.label,
                "type": "scatter",
                "mode": "markers",
                "x": [ratio * spread],
                "y": [row.last.mean],
                "error_y": error_bars([row.last], style.color),
                "hoverinfo": "text",
                "hovertext": [hover],
                "marker": {"color": style.color, "symbol": style.symbol, "size": 11},
            }
        )
    layout = {
        "xaxis": {
            "title": {"text": f"gradients of a run, relative to {plot_text(base)}"},
            "rangemode": "tozero",
        },
        "yaxis": {"title": {"text": "test accuracy at the last epoch, %"}},
    }
    return Figure(data, layout)


def _total(summary: Summary, row: Row) -> float:
    """Gradient evaluations of a run in units of epochs."""
    lengths = [len(seed) for curves in summary.curves.get(row.label, {}).values() for seed in curves]
    return row.gradient_evaluations * max(lengths, default=0)


def tuning(summary: Summary, mark: dict[str, Mark]) -> Figure | None:
    """Validation accuracy over rho, with intervals, for the arms whose rho was chosen on validation."""
    data = []
    for row in summary.rows:
        points = sorted(summary.tuning.get(row.label, []), key=lambda point: point[0])
        if not points:
            continue
        style = mark[row.label]
        data.append(
            {
                "legendgroup": row.label,
                "type": "scatter",
                "mode": "lines+markers",
                "x": [rho for rho, _ in points],
                "y": [stat.mean for _, stat in points],
                "error_y": error_bars([stat for _, stat in points], style.color),
                "hoverinfo": "text",
                "hovertext": [
                    f"{plot_text(row.label)}, rho {rho:g}: {number(stat)} % (n = {stat.n})" for rho, stat in points
                ],
                "line": {"color": style.color, "dash": style.dash},
                "marker": {"color": style.color, "symbol": style.symbol, "size": 9},
            }
        )
    if not data:
        return None
    tried = sorted({rho for points in summary.tuning.values() for rho, _ in points if rho > 0})
    layout = {
        "xaxis": {
            "title": {"text": "rho"},
            "type": "log",
            "tickvals": tried,
            "ticktext": [f"{rho:g}" for rho in tried],
        },
        "yaxis": {"title": {"text": "validation accuracy, %"}},
    }
    return Figure(data, layout)


def error_bars(stats: Sequence[Stat], color: str) -> dict[str, Any]:
    """Error bars of the intervals, thick enough to be seen and never in the way.

    Args:
        stats: one for each point.
        color: as figures name it.
    """
    over = [0.0 if math.isnan(stat.half) else max(0.0, stat.high - stat.mean) for stat in stats]
    under = [0.0 if math.isnan(stat.half) else max(0.0, stat.mean - stat.low) for stat in stats]
    visible = any(over) or any(under)
    bars: dict[str, Any] = {"type": "data", "visible": visible, "thickness": 2, "width": 5, "color": color}
    if not any(stat.cut for stat in stats):
        return bars | {"array": over}
    return bars | {"array": over, "arrayminus": under, "symmetric": False}


def log_axis(values: Sequence[float], title: str) -> dict[str, Any]:
    """Powers of ten as ticks where there are several of them, else whatever fits into what is shown."""
    steps = {"dtick": 1} if max(values) > 100 * min(values) else {"nticks": 8}
    return {"type": "log", "exponentformat": "power", "title": {"text": title}, **steps}


def broken(label: str, width: int = 20, lines: int = 3) -> str:
    """A long label in short lines, so that it leaves room for the plot."""
    pieces = textwrap.wrap(label, width) or [label]
    if len(pieces) > lines:
        pieces = [*pieces[: lines - 1], pieces[lines - 1][: width - 1] + "…"]
    return "<br>".join(plot_text(piece) for piece in pieces)
