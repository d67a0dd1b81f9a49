"""Figures, drawn interactively in pages or as files for papers.

`profile`, `contour`, `surface`, `density`, `eigenvalues`, `curve`, `followed` and `rise` make figures of measurements;
`Chart` and `Series` make any other figure. `save` writes a figure to a file whose suffix sets the format.
`as_matplotlib` returns a figure of matplotlib.
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
