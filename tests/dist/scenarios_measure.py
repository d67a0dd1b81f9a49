"""Measuring over data that are spread over processes."""

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from flatmin.measure.curvature import EmpiricalFisher, GaussNewton, Hessian, dense
from flatmin.measure.krylov import spectrum
from flatmin.measure.problem import Problem
from flatmin.measure.trace import trace
from tests.measure.nets import batches, make

OPERATORS = {"hessian": Hessian, "gauss-newton": GaussNewton, "empirical fisher": EmpiricalFisher}


def problem_of(name, rank=0, world=1, group=None, wrapped=False, cut=11):
    """Rank 0 has the first `cut` samples, rank 1 the rest, in uneven batches."""
    model, x, y, loss = make(name)
    if wrapped:
        model = DistributedDataParallel(model)
    part = slice(None) if world == 1 else (slice(0, cut), slice(cut, None))[rank]
    return Problem(model, loss, batches(x[part], y[part], 4), group=group, weight_decay=0.1)


def matrices(rank, world, name, cut):
    """(value, gradient, matrices, conventions, messages of one product)"""
    problem = problem_of(name, rank, world, "world", wrapped=True, cut=cut)
    value, gradient = problem.gradient()
    found = {key: dense(operator(problem)) for key, operator in OPERATORS.items()}
    operator = Hessian(problem)
    real, sent = dist.all_reduce, []
    dist.all_reduce = lambda *args, **kwargs: (sent.append(args[0].numel()), real(*args, **kwargs))[1]
    try:
        operator.matvec(torch.ones(problem.size, dtype=torch.float64))
    finally:
        dist.all_reduce = real
    return value, gradient, found, problem.conventions, sent


def runs(rank, world, name):
    """The top of the spectrum and the trace."""
    operator = Hessian(problem_of(name, rank, world, "world"))
    known = spectrum(operator, top=3)
    return known.top, trace(operator, known, tol=0.1).value
