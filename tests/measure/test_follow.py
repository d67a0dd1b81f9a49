"""The largest eigenvalue along a run, against dense matrices, and the two edges against orbits."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flatmin.measure.curvature import Hessian, dense
from flatmin.measure.follow import Follow, edge, sam_edge
from flatmin.measure.krylov import spectrum
from flatmin.measure.problem import Problem
from tests.measure.nets import make


def test_it_follows_the_weights():
    model, x, y, loss = make("mlp")
    follow = Follow(Problem(model, loss, (x, y)), every=5, tol=1e-3)
    base = torch.optim.SGD(model.parameters(), lr=0.5)
    want = []
    for step in range(21):
        if step % 5 == 0:
            want.append(float(torch.linalg.eigvalsh(dense(Hessian(Problem(model, loss, (x, y)))))[-1]))
        point = follow(step, lr=0.5)
        assert (point is None) == bool(step % 5)
        base.zero_grad()
        loss(model(x), y).backward()
        base.step()
    assert [p.step for p in follow.points] == [0, 5, 10, 15, 20]
    assert [p.largest for p in follow.points] == pytest.approx(want, rel=1e-4)
    assert all(p.converged and p.edge == 4.0 and math.isnan(p.sam_edge) for p in follow.points)
    assert max(want) > 1.1 * min(want)


def test_warm_starts_are_cheaper():
    model, x, y, loss = make("groupnorm")
    problem = Problem(model, loss, (x, y))
    follow = Follow(problem, every=1, tol=1e-3)
    for step in range(4):
        follow(step)
    cold = spectrum(Hessian(problem), tol=1e-3)
    assert follow.points[-1].products < cold.products
    assert follow.points[-1].largest == pytest.approx(cold.largest, rel=1e-4)


def test_alignment_of_the_ascent():
    model, x, y, loss = make("mlp")
    problem = Problem(model, loss, (x, y))
    _, gradient = problem.gradient()
    follow = Follow(problem, every=1, tol=1e-6)
    _, vectors = torch.linalg.eigh(dense(Hessian(problem)))
    point = follow(0, epsilon=problem.shaped(0.05 * gradient / gradient.norm()), extra={"ratio_larger": 0.3})
    want = abs(float(vectors[:, -1] @ gradient / gradient.norm()))
    assert point.alignment == pytest.approx(want, rel=1e-4) and point.extra == {"ratio_larger": 0.3}
    assert follow(1, epsilon=problem.shaped(-3 * vectors[:, -1])).alignment == pytest.approx(1.0, rel=1e-6)
    assert follow(2, epsilon=problem.shaped(torch.zeros(problem.size))).alignment == 0.0
    with pytest.raises(ValueError, match="must have the shapes of the problem's weights"):
        follow(3, epsilon=[torch.zeros(3)])


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_gradient_descent_diverges_just_beyond_the_edge(momentum):
    for factor, stays in ((0.999, True), (1.001, False)):
        lam = factor * edge(0.1, momentum)
        w, v = 1.0, 0.0
        for _ in range(20000):
            v = momentum * v + lam * w
            w -= 0.1 * v
            if abs(w) > 1e3:
                break
        assert (abs(w) < 1e3) == stays


def test_sam_diverges_just_beyond_its_edge():
    """Linearised at a gradient of fixed norm: w <- w - eta lambda (1 + rho lambda / ||g||) w."""
    lr, rho, norm = 0.1, 0.05, 0.3
    for factor, stays in ((0.999, True), (1.001, False)):
        lam = factor * sam_edge(lr, rho, norm)
        growth = abs(1.0 - lr * lam * (1.0 + rho * lam / norm))
        assert (growth < 1.0) == stays
    assert sam_edge(lr, rho, norm) < edge(lr)
    assert sam_edge(lr, 1e-9, norm) == pytest.approx(edge(lr), rel=1e-6)
    assert sam_edge(lr, 0.0, norm) == edge(lr)


def test_the_model_is_left_alone():
    model, x, y, loss = make("batchnorm")
    model.train()
    F.cross_entropy(model(x), y).backward()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    Follow(Problem(model, loss, (x, y)))(0)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))


def test_bad_numbers():
    model, x, y, loss = make("mlp")
    with pytest.raises(ValueError, match="every must be at least 1"):
        Follow(Problem(model, loss, (x, y)), every=0)
    for bad in ({"lr": 0.0}, {"lr": 0.1, "momentum": 1.0}):
        with pytest.raises(ValueError, match="edge"):
            edge(**bad)
    for bad in ((0.0, 0.1, 1.0), (0.1, -1.0, 1.0), (0.1, 0.1, 0.0)):
        with pytest.raises(ValueError, match="sam_edge"):
            sam_edge(*bad)
    assert isinstance(model, nn.Module)
