"""Principal components of checkpoints, against the singular value decomposition and scikit-learn."""

import pytest
import torch
from torch import nn

from flatmin.measure import trajectory as module
from flatmin.measure.landscape import Slice
from flatmin.measure.problem import Problem
from flatmin.measure.trajectory import pca
from tests.measure.nets import batches, make


def problem_of(name="mlp"):
    model, x, y, loss = make(name)
    return Problem(model, loss, batches(x, y, 7))


def walk(problem, n=9, seed=0):
    """A random walk that ends at the model."""
    g = torch.Generator().manual_seed(seed)
    steps = torch.randn(n, problem.size, generator=g, dtype=torch.float64)
    points = steps.cumsum(0)
    return list(points - points[-1] + problem.flat(problem.weights))


@pytest.mark.parametrize("chunk", [1 << 20, 10])
def test_against_the_singular_value_decomposition(chunk, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    problem = problem_of()
    points = walk(problem)
    found = pca(problem, points, components=4)
    rows = torch.stack(points)
    _, s, v = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    torch.testing.assert_close(found.explained, (s**2 / (s**2).sum())[:4], rtol=1e-10, atol=0)
    basis = torch.stack([d.vector for d in found.directions])
    torch.testing.assert_close((basis @ v[:4].T).abs(), torch.eye(4).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(basis @ basis.T, torch.eye(4).double(), rtol=0, atol=1e-12)
    centred = rows - problem.flat(problem.weights)
    torch.testing.assert_close(found.coordinates, centred @ basis.T, rtol=0, atol=1e-10)
    off = (centred - found.coordinates @ basis).norm(dim=1)
    torch.testing.assert_close(found.off, off, rtol=0, atol=1e-10)
    assert found.coordinates[-1].abs().max() < 1e-12, "the last checkpoint is the model"
    assert (found.coordinates[-1] >= found.coordinates[0]).all()


def test_against_scikit_learn():
    decomposition = pytest.importorskip("sklearn.decomposition", reason="scikit-learn is not installed")
    problem = problem_of()
    points = walk(problem, n=12)
    found = pca(problem, points)
    theirs = decomposition.PCA(n_components=2).fit(torch.stack(points).numpy())
    assert found.explained.tolist() == pytest.approx(theirs.explained_variance_ratio_.tolist(), rel=1e-9)
    for mine, its in zip(found.directions, theirs.components_, strict=True):
        assert abs(float(mine.vector @ torch.tensor(its))) == pytest.approx(1.0, abs=1e-9)


def test_checkpoints_in_a_plane_are_on_it():
    problem = problem_of()
    g = torch.Generator().manual_seed(2)
    plane = torch.randn(2, problem.size, generator=g, dtype=torch.float64)
    where = torch.tensor([[-3.0, 1.0], [-1.0, 2.0], [-0.5, 0.3], [0.0, 0.0]], dtype=torch.float64)
    found = pca(problem, list(problem.flat(problem.weights) + where @ plane))
    assert float(found.explained.sum()) == pytest.approx(1.0) and float(found.off.max()) < 1e-10


def test_the_slice_in_its_plane(tmp_path):
    problem = problem_of()
    points = walk(problem)
    found = pca(problem, points)
    path = tmp_path / "plane.pt"
    cut = found.slice(problem, points=15, margin=0.1, accuracy=True, path=path)
    assert cut.centre == problem.value() and cut.accuracy is not None
    assert torch.equal(cut.trajectory, found.coordinates)
    for k, axis in enumerate(cut.axes):
        reached = found.coordinates[:, k]
        assert axis.points[0] <= reached.min() - 0.099 * (reached.max() - reached.min())
        assert axis.points[-1] >= reached.max() + 0.099 * (reached.max() - reached.min())
        assert len(axis.points) <= 15 and (axis.points == 0).sum() == 1
    again = Slice.load(path, problem)
    assert torch.equal(again.loss, cut.loss) and torch.equal(again.trajectory, cut.trajectory)
    assert again.axes[0].direction.recipe["explained"] == pytest.approx(float(found.explained[0]))
    share = f"{float(found.explained[0]):.0%}"
    assert again.axes[0].direction.label == f"principal component 1 ({share} of the variance)"
    resumed = pca(problem, points).slice(problem, points=15, margin=0.1, accuracy=True, path=path)
    assert torch.equal(resumed.loss, cut.loss)


def test_buffers_that_differ_ask_for_a_choice():
    problem = problem_of("batchnorm")
    checkpoints = []
    for k in range(3):
        model, x, _, _ = make("batchnorm")
        with torch.no_grad():
            model[0].weight += k * torch.randn(model[0].weight.shape, generator=torch.Generator().manual_seed(k))
        model.train()(x)
        checkpoints.append(model.state_dict())
    found = pca(problem, checkpoints)
    assert found.directions[0].unlike == ("1.running_mean", "1.running_var")
    with pytest.raises(ValueError, match="choose statistics="):
        found.slice(problem, points=5)
    assert found.slice(problem, points=5, statistics="recomputed").complete


class TestBadInput:
    def test_too_few_checkpoints(self):
        problem = problem_of()
        points = walk(problem)
        with pytest.raises(ValueError, match="components=2 needs more than 2 checkpoints, got 2"):
            pca(problem, points[:2])
        with pytest.raises(ValueError, match="got 1"):
            pca(problem, problem.model)
        with pytest.raises(ValueError, match="components must be at least 1"):
            pca(problem, points, components=0)

    def test_checkpoints_on_a_line(self):
        problem = problem_of()
        w, d = problem.flat(problem.weights), torch.ones(problem.size, dtype=torch.float64)
        with pytest.raises(ValueError, match="span 1 dimension; use components=1"):
            pca(problem, [w - 2 * d, w - d, w])
        line = pca(problem, [w - 2 * d, w - d, w], components=1)
        with pytest.raises(ValueError, match="a plane needs two components"):
            line.slice(problem)
        with pytest.raises(ValueError, match="span 0 dimensions; pass checkpoints with different weights"):
            pca(problem, [w, w, w], components=1)

    def test_margins_and_models(self):
        problem = problem_of()
        with pytest.raises(ValueError, match="margin must be >= 0"):
            pca(problem, walk(problem)).slice(problem, margin=-1)
        with pytest.raises(ValueError, match=r"no tensor '0\.weight'"):
            pca(problem, [nn.Conv2d(1, 1, 1)] * 4)
