"""Slices: exact values at the right places, the model untouched, and files that can be continued."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flatmin.measure.curvature import Hessian
from flatmin.measure.directions import difference, eigenvector, gaussian, gaussian_pair, given
from flatmin.measure.evaluate import batch_statistics, evaluate
from flatmin.measure.krylov import spectrum
from flatmin.measure.landscape import Slice, grid_around, landscape
from flatmin.measure.problem import Problem
from tests.measure.nets import CASES, batches, dense_hessian, function_of, make


class Quadratic(nn.Module):
    """Its output is 1/2 w^T H w + b^T w."""

    def __init__(self, size=6):
        super().__init__()
        g = torch.Generator().manual_seed(4)
        a = torch.randn(size, size, generator=g, dtype=torch.float64)
        self.register_buffer("H", a @ a.T - 2.0 * torch.eye(size, dtype=torch.float64))
        self.register_buffer("b", torch.randn(size, generator=g, dtype=torch.float64))
        self.w = nn.Parameter(torch.randn(size, generator=g, dtype=torch.float64))

    def at(self, w):
        return 0.5 * w @ self.H @ w + self.b @ w

    def forward(self, x):
        return self.at(self.w) + 0.0 * x.sum()


def quadratic():
    model = Quadratic()
    return Problem(model, lambda f, y: f, (torch.zeros(1), torch.zeros(1)))


def problem_of(name="mlp", size=7, **options):
    model, x, y, loss = make(name)
    return Problem(model, loss, batches(x, y, size), **options)


def random(problem, seed=0, scale=1.0):
    v = torch.randn(problem.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return given(problem, scale * v, label=f"v{seed}")


class TestValues:
    def test_a_quadratic_is_exact_on_a_line_and_a_plane(self):
        problem = quadratic()
        model, w = problem.model, problem.model.w.detach()
        d, e = random(problem, 1), random(problem, 2)
        line = landscape(problem, d, span=2.0, points=9)
        want = torch.tensor([float(model.at(w + t * d.vector)) for t in line.axes[0].points])
        torch.testing.assert_close(line.loss, want.double(), rtol=1e-6, atol=0)
        want = [model.at(w + float(t) * d.vector).item() for t in line.axes[0].points]
        assert line.loss.tolist() == pytest.approx(want, rel=1e-12)
        plane = landscape(problem, [d, e], span=[(-1.0, 1.0), (-0.5, 1.5)], points=(5, 9))
        for i, a in enumerate(plane.axes[0].points.tolist()):
            for j, b in enumerate(plane.axes[1].points.tolist()):
                assert float(plane.loss[i, j]) == pytest.approx(
                    model.at(w + a * d.vector + b * e.vector).item(), rel=1e-12
                )
        assert plane.loss.shape == (5, 9) and plane.loss.dtype == torch.float64

    @pytest.mark.parametrize("name", CASES)
    def test_the_centre_is_the_model_to_the_bit(self, name):
        problem = problem_of(name)
        pair = gaussian_pair(problem, vectors="tensor")
        assert landscape(problem, pair[0], points=3).centre == problem.value()
        assert landscape(problem, pair, points=3).centre == problem.value()
        assert landscape(problem, pair[0], span=(-0.5, 1.5), points=5).centre == problem.value()
        single = Problem(*make_single(name))
        assert landscape(single, gaussian(single, vectors="tensor"), points=3).centre == single.value()

    @pytest.mark.parametrize("name", ["mlp", "groupnorm", "lstm", "regression"])
    def test_values_are_those_of_the_net_with_these_weights(self, name):
        model, x, y, loss = make(name)
        problem = Problem(model, loss, batches(x, y, 5))
        fn, flat, _ = function_of(model, x, y, loss)
        d = gaussian(problem, vectors="tensor")
        found = landscape(problem, d, points=7)
        want = [float(fn(flat + t * d.vector).detach()) for t in found.axes[0].points.tolist()]
        assert found.loss.tolist() == pytest.approx(want, rel=1e-12)

    def test_a_distance_of_a_tenth_moves_by_a_tenth(self):
        """And not by ten times: the scale of the grid is the direction's own."""
        problem = problem_of()
        d = gaussian(problem, normalise="model", vectors="tensor")
        found = landscape(problem, d, span=0.1, points=3)
        there = problem.flat(found.weights_at(problem, 2)) - problem.flat(problem.weights)
        torch.testing.assert_close(there, 0.1 * d.vector, rtol=0, atol=1e-15)
        w = float(problem.flat(problem.weights).norm())
        assert float(there.norm()) == pytest.approx(0.1 * w, rel=1e-12)
        assert found.relative(0).tolist() == pytest.approx([-0.1, 0.0, 0.1])
        assert found.axes[0].distances().tolist() == pytest.approx([-0.1 * w, 0.0, 0.1 * w])
        assert found.origin.norm == pytest.approx(w)

    def test_a_surface_is_not_constant(self):
        problem = problem_of()
        found = landscape(problem, gaussian_pair(problem), points=5)
        assert len(found.loss.unique()) == 25
        for axis in (0, 1):
            assert float(found.loss.diff(dim=axis).abs().min()) > 0

    @pytest.mark.parametrize("name", ["mlp", "attention", "regression"])
    def test_along_an_eigenvector_the_curvature_is_the_eigenvalue(self, name):
        model, x, y, loss = make(name)
        problem = Problem(model, loss, (x, y))
        run = spectrum(Hessian(problem), top=1, bottom=1, tol=1e-9, max_products=problem.size)
        values = torch.linalg.eigvalsh(dense_hessian(model, x, y, loss))
        for end, value in (("top", values[-1]), ("bottom", values[0])):
            h = 0.01
            cut = landscape(problem, eigenvector(problem, run, end=end), grid=[[-2 * h, -h, 0.0, h, 2 * h]]).loss
            second = (-cut[0] + 16 * cut[1] - 30 * cut[2] + 16 * cut[3] - cut[4]) / (12 * h * h)
            assert float(second) == pytest.approx(float(value), rel=1e-6, abs=1e-6)

    def test_weight_decay_is_part_of_it(self):
        problem = problem_of(weight_decay=0.3)
        d = random(problem)
        found = landscape(problem, d, points=3)
        bare = landscape(problem_of(), d, points=3)
        w = problem.flat(problem.weights)
        want = [0.15 * float((w + t * d.vector).square().sum()) for t in (-1.0, 0.0, 1.0)]
        assert (found.loss - bare.loss).tolist() == pytest.approx(want, rel=1e-12)

    def test_accuracy_in_the_same_pass(self):
        model, x, y, loss = make("mlp")
        problem = Problem(model, loss, batches(x, y, 7))
        d = random(problem, scale=3.0)
        found = landscape(problem, d, points=5, accuracy=True)
        assert torch.equal(found.loss, landscape(problem, d, points=5).loss)
        _, flat, outputs = function_of(model, x, y, loss)
        want = [float((outputs(flat + t * d.vector).argmax(1) == y).double().mean()) for t in found.axes[0].points]
        assert found.accuracy.tolist() == pytest.approx(want, abs=1e-15)
        assert found.error.tolist() == pytest.approx([1 - v for v in want])
        assert len(set(want)) > 1

    def test_accuracy_leaves_out_ignored_targets_and_serves_sequences(self):
        torch.manual_seed(0)
        model, x = nn.Linear(3, 5).double(), torch.randn(4, 6, 3).double()
        y = torch.randint(5, (4, 6))
        y[0], y[1, 3:] = -100, -100
        last = Problem(model, lambda f, t: F.cross_entropy(f.transpose(1, 2), t), (x, y))
        right = (model(x).argmax(-1) == y)[y != -100].double().mean()
        assert evaluate(last, list(last.weights), accuracy=True)[1] == pytest.approx(float(right))
        second = nn.Sequential(model, nn.Flatten(1), nn.Unflatten(1, (6, 5)))
        problem = Problem(Swap(second), nn.CrossEntropyLoss(), (x, y))
        assert evaluate(problem, list(problem.weights), accuracy=True)[1] == pytest.approx(float(right))

    def test_losses_that_are_not_finite_stay_as_they_are(self):
        class Odd(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.tensor([1.0]))

            def forward(self, x):
                return torch.sqrt(self.w) / torch.where(self.w > 1.6, 0.0, 1.0)

        problem = Problem(Odd(), lambda f, y: f.sum(), (torch.zeros(1), torch.zeros(1)))
        found = landscape(problem, given(problem, torch.ones(1), label="w"), span=2.0, points=5)
        assert math.isnan(found.loss[0]) and found.loss[1:3].tolist() == [0.0, 1.0]
        assert found.loss[3:].tolist() == [math.inf, math.inf] and found.complete


class Swap(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).transpose(1, 2)


def make_single(name):
    model, x, y, loss = make(name)
    weight = getattr(loss, "weight", None)
    loss = nn.CrossEntropyLoss(weight=weight.float()) if weight is not None else loss
    x, y = (t.float() if t.is_floating_point() else t for t in (x, y))
    return model.float(), loss, batches(x, y, 7)


class TestGrid:
    def test_symmetric_to_the_bit_with_an_exact_centre(self):
        problem = quadratic()
        for span in (1.0, 0.3, 1e-3):
            points = landscape(problem, random(problem), span=span, points=51).axes[0].points
            assert points[25] == 0 and torch.equal(points, -points.flip(0)) and points[-1] == span

    def test_defaults(self):
        problem = quadratic()
        assert landscape(problem, random(problem)).loss.shape == (51,)
        assert landscape(problem, [random(problem), random(problem, 1)]).loss.shape == (25, 25)

    def test_a_grid_of_ones_own_and_one_that_leaves_the_model_out(self):
        problem = quadratic()
        found = landscape(problem, random(problem), grid=[[-1.0, 0.0, 5.0]])
        assert found.axes[0].points.tolist() == [-1.0, 0.0, 5.0] and found.centre == problem.value()
        away = landscape(problem, random(problem), span=(0.5, 1.5), points=4)
        assert away.centre is None and away.axes[0].points[[0, -1]].tolist() == [0.5, 1.5]

    @pytest.mark.parametrize(
        ("low", "high", "points"), [(-1.3, 2.1, 25), (-0.01, 5.0, 9), (0.0, 1.0, 3), (2.0, 3.0, 11), (-7.0, -1.0, 8)]
    )
    def test_grids_around_checkpoints_hold_the_model_and_reach_far_enough(self, low, high, points):
        grid = grid_around(low, high, points)
        assert (grid == 0).any() and len(grid) <= points
        assert grid[0] <= min(low, 0) + 1e-12 and grid[-1] >= max(high, 0) - 1e-12
        assert grid.diff().tolist() == pytest.approx([float(grid[1] - grid[0])] * (len(grid) - 1))


class TestStatistics:
    def test_recomputed_from_one_batch_are_that_batchs(self):
        model, x, y, loss = make("batchnorm")
        whole = Problem(model, loss, (x, y))
        model[1].reset_running_stats()
        model[1].momentum = None
        found = batch_statistics(whole, list(whole.weights))
        model.train()(x)
        assert found.keys() == {"1.running_mean", "1.running_var"}
        for name, buffer in found.items():
            torch.testing.assert_close(buffer, model.get_buffer(name), rtol=1e-12, atol=0)
        with_these = model.eval()(x)
        value = Problem(model, loss, (x, y)).value(buffers=found)
        assert value == pytest.approx(float(loss(with_these, y).detach()), rel=1e-12)

    @pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, None])
    def test_batches_count_by_their_examples_whatever_the_momentum(self, momentum):
        model, x, y, loss = make("batchnorm")
        model[1].momentum = momentum
        problem = Problem(model, loss, batches(x, y, 7))
        found = batch_statistics(problem, list(problem.weights))
        activations = [model[0](part).detach() for part in x.split(7)]
        means = torch.stack([a.mean((0, 2, 3)) for a in activations])
        variances = torch.stack([a.var((0, 2, 3)) for a in activations])
        share = torch.tensor([7.0, 7.0, 3.0]).double()[:, None] / 17
        torch.testing.assert_close(found["1.running_mean"], (share * means).sum(0), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found["1.running_var"], (share * variances).sum(0), rtol=1e-12, atol=0)

    def test_a_layer_that_is_used_twice_and_one_that_is_not_used(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm, self.idle, self.out = nn.BatchNorm1d(5), nn.BatchNorm1d(4), nn.Linear(5, 3)

            def forward(self, x):
                return self.out(self.norm(self.norm(x)))

        _, x, y, loss = make("mlp")
        model = Twice().double()
        problem = Problem(model, loss, (x, y), params="out.*")
        found = batch_statistics(problem, list(problem.weights))
        once = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
        want = (0.9 * x.mean(0) + once.mean(0)) / 1.9
        torch.testing.assert_close(found["norm.running_mean"], want, rtol=1e-10, atol=1e-12)
        assert torch.equal(found["idle.running_var"], model.idle.running_var)

    def test_slices_with_recomputed_statistics(self):
        model, x, y, loss = make("batchnorm")
        problem = Problem(model, loss, (x, y))
        d = gaussian(problem)
        recomputed = landscape(problem, d, points=5, statistics="recomputed")
        kept = landscape(problem, d, points=5)
        assert float((recomputed.loss - kept.loss).abs().min()) > 1e-4
        assert (recomputed.statistics, kept.statistics) == ("recomputed", "as they are")
        # One batch: the statistics are the batch's own, up to the unbiased variance.
        trained = landscape(Problem(model, loss, (x, y), mode="train"), d, points=5)
        torch.testing.assert_close(recomputed.loss, trained.loss, rtol=0.02, atol=0)

    def test_a_net_without_batchnorm_has_nothing_to_recompute(self):
        problem = problem_of()
        d = gaussian(problem)
        same = [landscape(problem, d, points=3, statistics=s).loss for s in ("recomputed", "as they are")]
        assert torch.equal(*same)

    def test_a_checkpoint_with_other_buffers_asks_for_a_choice(self):
        problem = problem_of("batchnorm")
        other, x, _, _ = make("batchnorm")
        other.train()(x)
        with torch.no_grad():
            other[0].weight += 0.1
        d = difference(problem, other, label="other")
        with pytest.raises(ValueError, match=r"differ from those of the model \('1.running_mean', '1.running_var'\)"):
            landscape(problem, d, points=3)
        for statistics in ("as they are", "recomputed"):
            assert landscape(problem, d, points=3, statistics=statistics).complete

    def test_refusals(self):
        problem = problem_of("batchnorm")
        with pytest.raises(ValueError, match="statistics must be 'as they are' or 'recomputed', got 'fresh'"):
            landscape(problem, gaussian(problem), statistics="fresh")
        train = problem_of("batchnorm", mode="train")
        with pytest.raises(ValueError, match="no effect with mode='train'"):
            landscape(train, gaussian(train), statistics="recomputed")
        problem.model[1].momentum = 0.0
        with pytest.raises(ValueError, match="'1' cannot be recomputed"):
            landscape(problem, gaussian(problem), statistics="recomputed")


class Interrupt(Exception):
    pass


def stop_after(n):
    def progress(done, share):
        if done == n:
            raise Interrupt

    return progress


class TestFiles:
    def test_everything_comes_back_from_one_file(self, tmp_path):
        problem = problem_of(split="train")
        pair = gaussian_pair(problem, seeds=(3, 4), vectors="tensor", orthogonal=True)
        marks = torch.tensor([[0.1, 0.2], [0.0, 0.0]])
        path = tmp_path / "new" / "slice.pt"
        found = landscape(problem, pair, points=(3, 5), accuracy=True, trajectory=marks, path=path)
        assert [p.name for p in path.parent.iterdir()] == ["slice.pt"]
        again = Slice.load(path, problem)
        assert torch.equal(again.loss, found.loss) and torch.equal(again.accuracy, found.accuracy)
        assert torch.equal(again.trajectory, marks.double()) and again.complete
        assert again.origin == found.origin and again.statistics == found.statistics
        assert again.conventions.split == "train" and again.conventions == problem.conventions
        for mine, its in zip(found.axes, again.axes, strict=True):
            assert torch.equal(mine.points, its.points) and torch.equal(mine.direction.vector, its.direction.vector)
            assert (mine.direction.label, mine.direction.recipe) == (its.direction.label, its.direction.recipe)
            remake = {k: v for k, v in its.direction.recipe.items() if k not in ("kind", "orthogonal_to")}
            if "orthogonal_to" not in its.direction.recipe:
                assert torch.equal(gaussian(problem, **remake).vector, its.direction.vector)
        assert again.axes[1].direction.recipe["orthogonal_to"] == 3

    @pytest.mark.parametrize("stop", [1, 4, 8])
    def test_a_partial_file_is_continued(self, tmp_path, stop):
        path, problem = tmp_path / "slice.pt", problem_of()
        d = gaussian(problem)
        whole = landscape(problem, d, points=9, accuracy=True)
        with pytest.raises(Interrupt):
            landscape(problem, d, points=9, accuracy=True, path=path, progress=stop_after(stop))
        part = Slice.load(path)
        assert int(part.done.sum()) == stop and not part.complete and part.loss[stop:].isnan().all()
        calls = []
        found = landscape(
            problem, d, points=9, accuracy=True, path=path, progress=lambda done, share: calls.append((done, share))
        )
        assert calls == [(k, k / 9) for k in range(stop + 1, 10)]
        assert torch.equal(found.loss, whole.loss) and torch.equal(found.accuracy, whole.accuracy)
        assert Slice.load(path).complete
        filled = Slice.load(path).fill(problem, path=path, progress=lambda *_: pytest.fail("nothing is left"))
        assert filled.complete

    def test_what_is_done_is_not_evaluated_again(self, tmp_path):
        path, problem = tmp_path / "slice.pt", problem_of()
        with pytest.raises(Interrupt):
            landscape(problem, gaussian(problem), points=9, path=path, progress=stop_after(4))
        part = Slice.load(path)
        part.loss[:4] = torch.tensor([7.0, math.nan, math.inf, -math.inf])
        part.save(path)
        found = landscape(problem, gaussian(problem), points=9, path=path)
        assert found.loss[0] == 7.0 and math.isnan(found.loss[1])
        assert found.loss[2:4].tolist() == [math.inf, -math.inf] and found.loss[4:].isfinite().all()

    def test_it_is_written_now_and_then(self, tmp_path, monkeypatch):
        path, problem, clock = tmp_path / "slice.pt", problem_of(), iter(range(0, 10000, 10))
        monkeypatch.setattr("time.monotonic", lambda: next(clock))
        writes = []
        monkeypatch.setattr(Slice, "save", lambda self, p: writes.append(int(self.done.sum())))
        landscape(problem, gaussian(problem), points=9, path=path, every=25.0)
        assert writes[-1] == 9 and 2 <= len(writes) <= 5

    def test_an_eigenvector_computed_again_continues_with_the_stored_one(self, tmp_path):
        path, problem = tmp_path / "slice.pt", problem_of()
        first = eigenvector(problem, spectrum(Hessian(problem), tol=1e-6))
        with pytest.raises(Interrupt):
            landscape(problem, first, points=5, path=path, progress=stop_after(2))
        again = eigenvector(problem, spectrum(Hessian(problem), tol=1e-6, seed=1))
        assert not torch.equal(first.vector, again.vector)
        found = landscape(problem, again, points=5, path=path)
        assert torch.equal(found.loss, landscape(problem, first, points=5).loss)

    def test_another_model_is_refused_in_words(self, tmp_path):
        path, problem = tmp_path / "slice.pt", problem_of()
        landscape(problem, gaussian(problem), points=3, path=path)
        other = problem_of()
        with torch.no_grad():
            other.model[0].bias[1] += 1e-9
        with pytest.raises(ValueError, match=r"another model or other data: the values of '0.bias' differ\.$"):
            Slice.load(path, other)
        with pytest.raises(ValueError, match=r"was measured on another model or other data: the values of '0.bias'"):
            landscape(other, gaussian(problem), points=3, path=path)
        with pytest.raises(ValueError, match="has 57 entries, but the problem has 10 weights"):
            Slice.load(path, problem_of("linear"))
        with pytest.raises(ValueError, match=r"split is 'test' instead of ''"):
            Slice.load(path, problem_of(split="test"))
        with pytest.raises(ValueError, match=r"weight_decay is 0.1 instead of 0.0"):
            Slice.load(path, problem_of(weight_decay=0.1))
        model, x, y, loss = make("mlp")
        with pytest.raises(ValueError, match=r"its loss is .* instead of .*, so data or loss function differ"):
            Slice.load(path, Problem(model, loss, batches(x, y.roll(1), 7)))
        assert Slice.load(path, problem_of()).complete
        assert Slice.load(path, problem_of(size=5)).complete, "batches of another size change nothing"

    def test_other_buffers_are_another_model(self, tmp_path):
        path, problem = tmp_path / "slice.pt", problem_of("batchnorm")
        landscape(problem, gaussian(problem), points=3, path=path)
        other = problem_of("batchnorm")
        other.model[1].running_mean += 1.0
        with pytest.raises(ValueError, match=r"the values of '1.running_mean' differ"):
            Slice.load(path, other)

    def test_another_request_is_refused_in_words(self, tmp_path):
        path, problem = tmp_path / "slice.pt", problem_of()
        landscape(problem, gaussian(problem), points=3, path=path)
        for options, sentence in (
            ({"points": 5}, "the points of axis 1 differ"),
            ({"span": 0.5, "points": 3}, "the points of axis 1 differ"),
            ({"points": 3, "accuracy": True}, "measured without accuracy"),
            ({"points": 3, "statistics": "recomputed"}, "its statistics are 'as they are'"),
        ):
            with pytest.raises(ValueError, match=f"contains another slice: .*{sentence}"):
                landscape(problem, gaussian(problem), path=path, **options)
        with pytest.raises(ValueError, match=r"the direction of axis 1 differs \(random direction, .*seed 0\)"):
            landscape(problem, gaussian(problem, seed=1), points=3, path=path)
        with pytest.raises(ValueError, match="it has 1 direction;"):
            landscape(problem, gaussian_pair(problem), points=3, path=path)

    def test_files_that_are_none(self, tmp_path):
        junk, foreign = tmp_path / "junk.pt", tmp_path / "foreign.pt"
        junk.write_bytes(b"not a checkpoint")
        torch.save({"a": 1}, foreign)
        for path in (junk, foreign):
            with pytest.raises(ValueError, match="is not a landscape file"):
                Slice.load(path)
        with pytest.raises(FileNotFoundError):
            Slice.load(tmp_path / "missing.pt")

    def test_a_model_that_changed_under_a_slice_is_noticed(self):
        problem = problem_of()
        found = landscape(problem, gaussian(problem), points=3)
        found.done[0] = False
        with torch.no_grad():
            problem.model[2].weight *= 1.1
        with pytest.raises(ValueError, match=r"the values of '2.weight' differ"):
            found.fill(problem)


class TestBadInput:
    def test_directions(self):
        problem = problem_of()
        d = gaussian(problem)
        with pytest.raises(ValueError, match="one or two directions, got 0"):
            landscape(problem, [])
        with pytest.raises(ValueError, match="one or two directions, got 3"):
            landscape(problem, [d, d, d])
        with pytest.raises(ValueError, match=r"parallel \(cosine 1\.000000\); a plane needs different directions"):
            landscape(problem, [d, d])
        with pytest.raises(ValueError, match="57 entries, but the problem has 10 weights"):
            landscape(problem_of("linear"), d)
        with pytest.raises(ValueError, match=r"points needs one number per direction \(1\), got 2"):
            landscape(problem, d, points=(11, 11))
        with pytest.raises(ValueError, match=r"one pair per direction \(1\)"):
            landscape(problem, d, span=[(-1, 1), (-1, 1)])
        with pytest.raises(ValueError, match=r"grid needs one list per direction \(1\), got 2"):
            landscape(problem, d, grid=[[0.0], [0.0]])

    def test_grids(self):
        problem = problem_of()
        d = gaussian(problem)
        with pytest.raises(ValueError, match=r"40 points from -1 to 1 do not include 0, the model itself; use 41"):
            landscape(problem, d, points=40)
        with pytest.raises(ValueError, match=r"4 points from -0.5 to 1.5 do not include 0.*; use 5"):
            landscape(problem, d, span=(-0.5, 1.5), points=4)
        with pytest.raises(ValueError, match="pass the points as grid="):
            landscape(problem, d, span=(-math.pi, 1.0), points=5)
        for span in (0.0, (1.0, 1.0), (1.0, -1.0), math.nan, math.inf):
            with pytest.raises(ValueError, match="span must be finite with low < high"):
                landscape(problem, d, span=span)
        with pytest.raises(ValueError, match="at least 3 points"):
            landscape(problem, d, points=1)
        for grid in ([[1.0, 0.0]], [[]], [[0.0, math.nan]], [[[0.0]]]):
            with pytest.raises(ValueError, match="an ascending list of finite numbers"):
                landscape(problem, d, grid=grid)
        with pytest.raises(ValueError, match="at least 3 points and low < high"):
            grid_around(0.0, 0.0, 9)

    def test_trajectories_and_accuracies(self):
        problem = problem_of()
        with pytest.raises(ValueError, match=r"must have shape \(n, 2\) and needs two"):
            landscape(problem, gaussian(problem), trajectory=torch.zeros(3, 2))
        regression = problem_of("regression")
        with pytest.raises(ValueError, match=r"class indices of shape .* got torch.float64 \(7, 2\)"):
            landscape(regression, gaussian(regression), accuracy=True)
