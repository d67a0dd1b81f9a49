"""The figure of the rise of the loss along a method's perturbation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from flatmin.measure.radius import FoundRadius
from flatmin.report.figures.chart import Axis, Chart, Series
from flatmin.report.style import styles


def rise(shown: FoundRadius | Mapping[str, FoundRadius]) -> Chart:
    """Predicted and measured rise of the loss over the radius.

    Lines are means over the batches; bands reach from the smallest to the largest value. Dotted lines mark the radius
    beyond which the prediction fails and, for a single method, the rho of the param groups. Values that are not
    positive or not finite leave a gap.

    Args:
        shown: result of `flatmin.measure.radius`, or several by name.

    Raises:
        ValueError: there is nothing to draw.
    """
    named = dict(shown) if isinstance(shown, Mapping) else {"": shown}
    if not named:
        raise ValueError("there is nothing to draw.")
    series: list[Series] = []
    style = styles(list(named))
    heights: list[float] = []
    for name, found in named.items():
        own, prefix = style[name], f"{name}: " if name else ""
        predicted, measured = _means(found.predicted), _means(found.measured)
        heights += [y for y in (*predicted, *measured) if not math.isnan(y)]
        columns = list(zip(*found.measured, strict=True))
        band = [_drawn(min(c)) for c in columns], [_drawn(max(c)) for c in columns]
        series += [
            Series(label=f"{prefix}predicted", x=found.radii, y=predicted, tone=own.tone, dash="dash", group=name),
            Series(
                label=f"{prefix}measured",
                x=found.radii,
                y=measured,
                kind="both",
                tone=own.tone,
                y_interval=band if len(found.losses) > 1 else None,
                band=True,
                hover=[f"{prefix}rho {x:.3g}: {y:.3g}" for x, y in zip(found.radii, measured, strict=True)],
                group=name,
            ),
        ]
    if not heights:
        raise ValueError("the loss does not rise anywhere, so there is nothing to draw.")
    ends = min(heights), max(heights)
    for name, found in named.items():
        prefix = f"{name}: " if name else ""
        if math.isfinite(found.limit):
            label = f"{prefix}off by {found.off:.0%} at {found.limit:.2g}"
            series.append(_upright(found.limit, ends, label, style[name].tone, name))
        if len(named) == 1:
            series.append(_upright(found.rho, ends, f"rho of the param groups {found.rho:.2g}", "ink", name))
    return Chart(
        title="Rise of the loss along the ascent",
        x=Axis(label="rho", log=True),
        y=Axis(label="rise of the loss", log=True),
        series=series,
        legend=True,
    )


def _upright(x: float, ends: tuple[float, float], label: str, tone: str, group: str) -> Series:
    return Series(label=label, x=[x, x], y=list(ends), tone=tone, dash="dot", group=group)


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [
        _drawn(math.fsum(column) / len(column)) if all(map(math.isfinite, column)) else math.nan
        for column in zip(*rows, strict=True)
    ]


def _drawn(value: float) -> float:
    """A value on a logarithmic axis; NaN if it is not positive or not finite."""
    return value if value > 0 and math.isfinite(value) else math.nan
