"""Landscapes, paths, spectra and densities of a small net, as figures show them."""

from functools import cache

import torch

from flatmin.measure.curvature import Hessian
from flatmin.measure.directions import difference, eigenvector, gaussian, gaussian_pair
from flatmin.measure.krylov import spectrum
from flatmin.measure.landscape import landscape
from flatmin.measure.paths import bezier, linear
from flatmin.measure.problem import Problem
from flatmin.measure.trace import density
from flatmin.measure.trajectory import pca
from tests.measure.nets import make


@cache
def measured():
    """One of everything that can be drawn."""
    model, x, y, loss = make("mlp")
    problem = Problem(model, loss, (x, y), split="train")
    g = torch.Generator().manual_seed(0)
    steps = torch.randn(6, problem.size, generator=g, dtype=torch.float64).cumsum(0) * 0.3
    points = list(steps - steps[-1] + problem.flat(problem.weights))
    other = points[0]
    run = spectrum(Hessian(problem), top=4, bottom=2, tol=1e-4)
    walk = pca(problem, points)
    return {
        "problem": problem,
        "line": landscape(problem, gaussian(problem), points=11, accuracy=True),
        "to": landscape(problem, difference(problem, other, label="the start"), span=(-0.5, 1.5), points=9),
        "eigen": landscape(problem, eigenvector(problem, run), points=9),
        "plane": landscape(problem, gaussian_pair(problem), points=(7, 5), accuracy=True),
        "walk": walk.slice(problem, points=9),
        "trajectory": walk,
        "linear": linear(problem, [points[0], points[3], problem.model], points=5, labels=["a", "b", "c"]),
        "straight": linear(problem, [points[0], problem.model], points=5),
        "bezier": bezier(problem, points[0], problem.model, points=5, steps=5),
        "spectrum": run,
        "density": density(Hessian(problem), run, runs=1, steps=10),
    }
