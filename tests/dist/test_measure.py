"""Data spread over processes: every measure is that of all of them."""

import pytest
import torch

from flatmin.measure.curvature import Hessian, dense
from flatmin.measure.directions import gaussian
from flatmin.measure.krylov import spectrum
from flatmin.measure.landscape import Slice, landscape
from flatmin.measure.paths import Path, linear
from flatmin.measure.trace import trace
from tests.dist import scenarios_measure as scenarios
from tests.dist.kinds import slow

pytestmark = pytest.mark.dist


@pytest.mark.parametrize(
    ("name", "cut"),
    [slow("mlp", 17), slow("sum", 16), ("class weights", 11), slow("batchnorm", 11)],
)
def test_products_are_those_of_all_data(ranks, name, cut):
    whole = scenarios.problem_of(name)
    want_value, want_gradient = whole.gradient()
    want = {key: dense(operator(whole)) for key, operator in scenarios.OPERATORS.items() if key}
    for value, gradient, found, record, sent in ranks.run(scenarios.matrices, name, cut):
        assert value == pytest.approx(want_value, rel=1e-12)
        torch.testing.assert_close(gradient, want_gradient, rtol=0, atol=1e-12)
        for key, matrix in found.items():
            torch.testing.assert_close(matrix, want[key], rtol=0, atol=1e-12)
        assert (record.examples, record.terms) == (17, whole.conventions.terms)
        assert sent == [whole.size]  # one message a product


def test_runs_agree_on_all_ranks(ranks):
    operator = Hessian(scenarios.problem_of("mlp"))
    known = spectrum(operator, top=3)
    want = trace(operator, known, tol=0.1).value
    results = ranks.run(scenarios.runs, "mlp")
    # Where a run stops may hang on rounding, but never on the rank.
    assert results[0][1] == results[1][1] == pytest.approx(want, rel=0.02)
    for top, _ in results:
        assert torch.equal(top, results[0][0])
        torch.testing.assert_close(top, known.top, rtol=1e-6, atol=0)


def lines(rank, world, name, cut, statistics="as they are", folder=None):
    """A line through the model and a path of two segments, each in a file of this rank if there is a folder."""
    problem = scenarios.problem_of(name, rank, world, "world" if world > 1 else None, cut=cut)
    d = gaussian(problem, vectors="tensor")
    w = problem.flat(problem.weights)
    files = [folder and f"{folder}/{kind}{rank}.pt" for kind in ("line", "path")]
    options = {"accuracy": True, "statistics": statistics}
    return (
        landscape(problem, d, points=5, path=files[0], **options),
        linear(problem, [w - d.vector, w, w + d.vector.flip(0)], points=3, path=files[1], **options),
    )


@pytest.mark.parametrize("cut", [11, 17], ids=["11+6", "17+0"])
@pytest.mark.parametrize("name", ["mlp", "class weights"])
def test_lines_and_paths_are_those_of_all_data(ranks, name, cut):
    same_lines(ranks.run(lines, name, cut), lines(0, 1, name, cut))


@pytest.mark.parametrize("cut", [12, 17], ids=["12+5", "17+0"])
def test_statistics_are_recomputed_from_all_data(ranks, cut):
    """Cut between two batches, on which these depend."""
    results = ranks.run(lines, "batchnorm", cut, "recomputed")
    same_lines(results, lines(0, 1, "batchnorm", cut, "recomputed"))
    assert abs(float(results[0][0].loss[1] - lines(0, 1, "batchnorm", cut)[0].loss[1])) > 1e-3


def same_lines(results, want):
    for found in results:
        for mine, other, its in zip(found, results[0], want, strict=True):
            assert mine.complete and torch.equal(mine.loss, other.loss)
            torch.testing.assert_close(mine.loss, its.loss, rtol=1e-12, atol=0)
            torch.testing.assert_close(mine.accuracy, its.accuracy, rtol=1e-12, atol=0)
            assert mine.conventions.examples == 17 and len(its.loss.unique()) == len(its.loss)


def test_one_rank_writes_the_file_that_one_process_can_read(ranks, tmp_path):
    line, path = ranks.run(lines, "mlp", 11, "as they are", str(tmp_path))[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["line0.pt", "path0.pt"]
    alone = scenarios.problem_of("mlp")
    assert torch.equal(Slice.load(tmp_path / "line0.pt", alone).loss, line.loss)
    assert torch.equal(Path.load(tmp_path / "path0.pt", alone).loss, path.loss)


def continued(rank, world, path):
    problem = scenarios.problem_of("mlp", rank, world, "world")
    seen = []
    options = {"points": 5, "path": path, "progress": lambda done, share: seen.append(done)}
    return landscape(problem, gaussian(problem), **options).loss, seen


def test_a_file_of_one_process_is_continued_by_all(ranks, tmp_path):
    problem, path = scenarios.problem_of("mlp"), tmp_path / "line.pt"
    part = landscape(problem, gaussian(problem), points=5)
    whole = part.loss.clone()
    part.done[[1, 4]], part.loss[[1, 4]] = False, torch.nan
    part.save(path)
    for loss, seen in ranks.run(continued, str(path)):
        torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
        assert seen == [4, 5]
    assert Slice.load(path, problem).complete
