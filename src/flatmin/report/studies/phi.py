"""The figure of BiSAM's phi: the 0-1 loss, and the surrogates that the arms of a study maximise instead."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from flatmin.methods import BiSAMLog, BiSAMTanh
from flatmin.methods import losses as objectives
from flatmin.report.figures.chart import Axis, Chart, Series
from flatmin.report.studies.style import FigureSection
from flatmin.report.style import tone
from flatmin.study.tabulate import StudyTable
from flatmin.train.trainer import build_recipe

_REACH = 5.0
_POINTS = 201
_NAMED = 2  # the most arms that the legend names


@dataclass(frozen=True, kw_only=True)
class _Phi:
    name: str
    x: Tensor
    phi: Tensor
    bound: Tensor


def phi(table: StudyTable) -> FigureSection | None:
    """The curves; None if no arm uses BiSAM's objective."""
    arms: dict[BiSAMLog | BiSAMTanh, list[str]] = {}
    for row in table.rows:
        objective = build_recipe(row.grid_point.config).objective if row.grid_point is not None else None
        if isinstance(objective, (BiSAMLog, BiSAMTanh)):
            names = arms.setdefault(objective, [])
            names += [row.arm] if row.arm not in names else []
    if not arms:
        return None
    series = [Series(label="0-1 loss", x=[-_REACH, 0.0, 0.0, _REACH], y=[0.0, 0.0, 1.0, 1.0], tone="ink")]
    for i, (objective, names) in enumerate(arms.items()):
        one = _curves(objective)
        more = "" if len(names) <= _NAMED else f" and {len(names) - _NAMED} more"
        whose = f"{one.name}: {', '.join(names[:_NAMED])}{more}"
        xs = one.x.tolist()
        for label, values, what, dash in ((whose, one.phi, "φ", "solid"), ("", one.bound, "lower bound", "dot")):
            heights = values.tolist()
            text = [f"{one.name}\n{what}({x:.2f}) = {y:.3f}" for x, y in zip(xs, heights, strict=True)]
            series.append(Series(label=label, x=xs, y=heights, tone=tone(i), dash=dash, hover=text))
    chart = Chart(
        title="Surrogate of the 0-1 loss in BiSAM",
        x=Axis(label="F, the margin of a wrong class over the true class"),
        y=Axis(label="loss of a sample", range=(-1.6, 1.15)),
        series=series,
        legend=True,
    )
    return FigureSection(
        title="Surrogate of the 0-1 loss in BiSAM",
        caption="The 0-1 loss of a sample over the margin F of a wrong class, and the function φ that replaces it, "
        "with the parameters of the arms. The dotted line, for two classes, is the soft maximum (1/μ) log Σ exp(μ φ) "
        "minus log 2 / μ, which is never above the 0-1 loss. The curves are formulas, so there are no error bars.",
        figures=[chart],
    )


def _curves(objective: BiSAMLog | BiSAMTanh) -> _Phi:
    x = torch.linspace(-_REACH, _REACH, _POINTS, dtype=torch.float64)
    if isinstance(objective, BiSAMTanh):
        name = f"tanh, α = {objective.alpha:g}, μ = {objective.mu:g}"
        heights = torch.tanh(objective.alpha * x)
    else:
        name = f"-log, μ = {objective.mu:g}"
        heights = 1.0 - F.softplus(objectives.GAMMA - x)
    true = torch.zeros(1, dtype=torch.int64)
    smooth = [objective.ascent(torch.tensor([[0.0, float(at)]], dtype=torch.float64), true) for at in x]
    return _Phi(name=name, x=x, phi=heights, bound=torch.stack(smooth) - math.log(2) / objective.mu)
