"""Sharpness over data that are spread over processes."""

from flatmin.measure.average import average_case
from flatmin.measure.flatness import fisher_rao, pac_bayes, relative_flatness
from flatmin.measure.sharpness import m_sharpness, worst_case
from tests.dist.scenarios_measure import problem_of

MEASURES = {
    "worst case": lambda p: worst_case(p, 0.5, adaptive=True, steps=6, restarts=1, errors=True),
    "average": lambda p: average_case(p, 0.5, draws=4),
    "pac-bayes": lambda p: pac_bayes(p, 0.2, of="loss", draws=2, tol=0.1),
    "relative flatness": lambda p: relative_flatness(p, "2.weight"),
    "fisher-rao": lambda p: fisher_rao(p),
}


def measures(rank, world, cut):
    """The value of every measure, and the error rate's gap."""
    problem = problem_of("mlp", rank, world, "world", cut=cut)
    found = {name: measure(problem) for name, measure in MEASURES.items()}
    values = {name: f.sigma if name == "pac-bayes" else f.value for name, f in found.items()}
    return values, found["worst case"].error_gap


def groups(rank, world, m, cut):
    return m_sharpness(problem_of("mlp", rank, world, "world", cut=cut), m, 0.5, steps=4, errors=True)
