"""Figures: what they show, drawn interactively in pages and as files for papers.

`profile`, `contour`, `surface`, `density`, `eigenvalues`, `curve`, `followed` and `rise` describe what was measured,
`Chart` and `Series` anything else. `save` writes a figure by the ending of its file; `as_matplotlib` gives it as a
figure of matplotlib.
"""

from flatmin.report.figures.chart import Axis, Chart, Drawable, Field, Radar, Series
from flatmin.report.figures.files import save, save_all, save_page
from flatmin.report.figures.landscapes import contour, profile, surface
from flatmin.report.figures.radius import rise
from flatmin.report.figures.spectra import curve, density, eigenvalues, followed
from flatmin.report.figures.static import figure as as_matplotlib

__all__ = [
    "Axis", "Chart", "Drawable", "Field", "Radar", "Series", "as_matplotlib", "contour", "curve", "density",
    "eigenvalues", "followed", "profile", "rise", "save", "save_all", "save_page", "surface",
]  # fmt: skip
