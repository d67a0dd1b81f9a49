"""Measures of the loss surface around trained weights: curvature, sharpness, flatness, landscapes.

They do not depend on the optimizer and need only torch.
"""

from flatmin.measure.average import Average, average_case
from flatmin.measure.curvature import EmpiricalFisher, Fisher, GaussNewton, Hessian
from flatmin.measure.flatness import fisher_rao, pac_bayes, relative_flatness
from flatmin.measure.follow import Follow, edge, sam_edge
from flatmin.measure.krylov import Spectrum, spectrum
from flatmin.measure.landscape import landscape
from flatmin.measure.losses import LogitNormalised, error_rate
from flatmin.measure.paths import bezier, linear
from flatmin.measure.problem import Conventions, Problem, restricted, under
from flatmin.measure.radius import FoundRadius, radius
from flatmin.measure.report import Report, ReportSettings, report
from flatmin.measure.sharpness import Sharpness, curve, m_sharpness, worst_case
from flatmin.measure.trace import density, diagonal, frobenius, trace
from flatmin.measure.trajectory import pca

# Aliases for compatibility.
Card, CardSettings, card = Report, ReportSettings, report

__all__ = [
    "Average",
    "Card",
    "CardSettings",
    "Conventions",
    "EmpiricalFisher",
    "Fisher",
    "Follow",
    "FoundRadius",
    "GaussNewton",
    "Hessian",
    "LogitNormalised",
    "Problem",
    "Report",
    "ReportSettings",
    "Sharpness",
    "Spectrum",
    "average_case",
    "bezier",
    "card",
    "curve",
    "density",
    "diagonal",
    "edge",
    "error_rate",
    "fisher_rao",
    "frobenius",
    "landscape",
    "linear",
    "m_sharpness",
    "pac_bayes",
    "pca",
    "radius",
    "relative_flatness",
    "report",
    "restricted",
    "sam_edge",
    "spectrum",
    "trace",
    "under",
    "worst_case",
]
