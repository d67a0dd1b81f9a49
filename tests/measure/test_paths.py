"""Paths between checkpoints: exact at the checkpoints, trained to be lower, remade from one file."""

import math

import pytest
import torch
from torch import nn

from flatmin.measure.directions import difference
from flatmin.measure.landscape import Slice, landscape
from flatmin.measure.paths import Path, bezier, bezier_point, linear
from flatmin.measure.problem import Problem
from tests.helpers import same_bits
from tests.measure.nets import batches, function_of, make


def data(seed=0, n=120):
    """Two rings, which a small net can separate in more than one way."""
    g = torch.Generator().manual_seed(seed)
    angle, label = torch.rand(n, generator=g) * 2 * math.pi, torch.arange(n) % 2
    radius = 1.0 + label + 0.1 * torch.randn(n, generator=g)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), label


def trained(seed, norm=False, steps=300):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 12), *([nn.BatchNorm1d(12)] if norm else []), nn.Tanh(), nn.Linear(12, 2))
    x, y = data()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def nets():
    return [trained(seed) for seed in (0, 1, 2)]


@pytest.fixture(scope="module")
def normed():
    return [trained(seed, norm=True) for seed in (0, 1)]


def problem_on(model, size=40, **options):
    x, y = data()
    return Problem(model, nn.CrossEntropyLoss(), batches(x, y, size), **options)


def loss_of(model):
    x, y = data()
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(x), y))


def mixed(first, second, s):
    model = trained(0, steps=0)
    states = first.state_dict(), second.state_dict()
    model.load_state_dict({k: (1 - s) * states[0][k] + s * states[1][k] for k in states[0]})
    return model


class TestLinear:
    def test_losses_are_those_of_nets_with_mixed_weights(self, nets):
        found = linear(problem_on(nets[0]), nets, points=7, accuracy=True)
        assert found.times.tolist() == pytest.approx([k / 6 for k in range(13)]) and found.segments == 2
        want = [loss_of(mixed(nets[min(int(t), 1)], nets[min(int(t), 1) + 1], t - min(int(t), 1))) for t in found.times]
        assert found.loss.tolist() == pytest.approx(want, rel=1e-5)
        x, y = data()
        right = [float((net(x).argmax(1) == y).double().mean()) for net in nets]
        assert found.accuracy[[0, 6, 12]].tolist() == pytest.approx(right)

    def test_at_the_checkpoints_to_the_bit(self, nets):
        problem = problem_on(nets[1])
        found = linear(problem, [nets[0], nets[1].state_dict(), problem.flat(list(nets[2].parameters()))], points=3)
        for k, net in enumerate(nets):
            assert found.loss[2 * k] == problem_on(net).value()
            assert torch.equal(found.point(float(k)), problem.flat(list(net.parameters())))

    def test_in_double_precision_and_as_a_slice_along_the_difference(self):
        model, x, y, loss = make("mlp")
        torch.manual_seed(9)
        other = make("mlp")[0]
        with torch.no_grad():
            for p in other.parameters():
                p += torch.randn_like(p)
        problem = Problem(model, loss, batches(x, y, 7))
        found = linear(problem, [model, other], points=5)
        fn, start, _ = function_of(model, x, y, loss)
        end = problem.flat(list(other.parameters()))
        want = [float(fn((1 - t) * start + t * end).detach()) for t in found.times.tolist()]
        assert found.loss.tolist() == pytest.approx(want, rel=1e-12)
        cut = landscape(problem, difference(problem, other), span=(0.0, 1.0), points=5)
        assert cut.loss.tolist() == pytest.approx(want, rel=1e-12)

    def test_barriers(self, nets):
        found = linear(problem_on(nets[0]), nets, points=11, labels=["a", "b", "c"])
        loss = found.loss.tolist()
        by_hand = []
        for k in range(2):
            part = loss[10 * k : 10 * k + 11]
            by_hand.append(max(v - ((1 - i / 10) * part[0] + i / 10 * part[-1]) for i, v in enumerate(part)))
        assert found.barriers == pytest.approx(by_hand, rel=1e-9) and found.barrier == max(found.barriers)
        assert found.rise == pytest.approx(max(loss) - max(loss[0], loss[10], loss[20]))
        assert found.barrier > 0.1, "these nets are not linearly connected"
        assert found.labels == ("a", "b", "c")

    def test_a_convex_loss_has_no_barrier_and_one_that_is_nan_says_so(self):
        model, x, y, loss = make("linear")
        other = make("linear")[0]
        with torch.no_grad():
            other.weight += 1.0
        found = linear(Problem(model, loss, (x, y)), [model, other], points=9)
        assert found.barriers == [0.0] and found.barrier == found.rise == 0.0
        found.loss[4] = math.nan
        assert math.isnan(found.barrier) and math.isnan(found.rise)
        found.loss[4] = math.inf
        assert found.barrier == found.rise == math.inf

    def test_lengths(self, nets):
        problem = problem_on(nets[0])
        flats = [problem.flat(list(net.parameters())).double() for net in nets]
        found = linear(problem, nets, points=5).lengths()
        first, second = (float((b - a).norm()) for a, b in ((flats[0], flats[1]), (flats[1], flats[2])))
        assert found[[0, 2, 4, 8]].tolist() == pytest.approx([0, first / 2, first, first + second], rel=1e-6)

    def test_the_model_does_not_change(self, nets):
        problem = problem_on(nets[0])
        before = {k: v.clone() for k, v in nets[0].state_dict().items()}, torch.get_rng_state()
        linear(problem, nets, points=3)
        bezier(problem, nets[0], nets[1], steps=3, points=3)
        assert same_bits((dict(nets[0].state_dict()), torch.get_rng_state()), before)
        assert all(p.grad is None or not p.grad.isnan().any() for p in nets[0].parameters())


class TestBatchNorm:
    def test_buffers_that_differ_ask_for_a_choice(self, normed):
        problem = problem_on(normed[0])
        for call in (lambda **kw: linear(problem, normed, **kw), lambda **kw: bezier(problem, *normed, steps=0, **kw)):
            with pytest.raises(ValueError, match="choose statistics='recomputed'"):
                call(points=3)
            assert call(points=3, statistics="as they are").statistics == "as they are"

    def test_recomputed_statistics_make_the_far_end_meaningful(self, normed):
        problem = problem_on(normed[0], size=120)
        kept = linear(problem, normed, points=5, statistics="as they are")
        anew = linear(problem, normed, points=5, statistics="recomputed")
        for k, i in ((0, 0), (1, -1)):
            assert float(anew.loss[i]) == pytest.approx(loss_of(normed[k]), abs=0.02)
        assert float(kept.loss[-1]) > float(anew.loss[-1]) + 0.1

    def test_the_curve_is_trained_with_each_batchs_statistics(self, normed):
        problem = problem_on(normed[0])
        before = {k: v.clone() for k, v in normed[0].state_dict().items()}
        flags = [m.training for m in normed[0].modules()]
        straight = linear(problem, normed, points=11, statistics="recomputed")
        bent = bezier(problem, *normed, points=11, steps=300, lr=0.1, statistics="recomputed")
        assert bent.barrier < 0.7 * straight.barrier
        assert same_bits(dict(normed[0].state_dict()), before)
        assert flags == [m.training for m in normed[0].modules()]


class TestBezier:
    def test_ends_are_fixed_and_the_barrier_falls(self, nets):
        problem = problem_on(nets[0])
        straight = linear(problem, nets[:2], points=21)
        bent = bezier(problem, nets[0], nets[1], points=21, steps=600, lr=0.1)
        assert bent.loss[0] == straight.loss[0] and bent.loss[-1] == straight.loss[-1]
        for k in (0, 1):
            assert torch.equal(bent.point(float(k)), problem.flat(list(nets[k].parameters())))
        assert bent.barrier <= straight.barrier and bent.barrier < 0.3 * straight.barrier
        assert len(bent.training) == 600 and bent.training.isfinite().all()
        assert float(bent.lengths()[-1]) > float(straight.lengths()[-1])

    def test_untrained_it_is_the_straight_line(self, nets):
        problem = problem_on(nets[0])
        straight, bent = linear(problem, nets[:2], points=9), bezier(problem, *nets[:2], points=9, steps=0)
        assert bent.loss.tolist() == pytest.approx(straight.loss.tolist(), rel=1e-4)

    def test_the_seed_decides(self, nets):
        problem = problem_on(nets[0])
        state = torch.get_rng_state()
        runs = [bezier(problem, *nets[:2], points=3, steps=20, seed=seed) for seed in (0, 0, 1)]
        assert torch.equal(runs[0].knots, runs[1].knots) and not torch.equal(runs[0].knots, runs[2].knots)
        assert torch.equal(state, torch.get_rng_state())

    @pytest.mark.slow
    def test_the_trained_point_is_that_of_a_quadratic(self):
        """On L = |w|^2/2 the best control point is known: E[m (e + m c)] = 0 with m = 2t(1-t), e the ends' part."""

        class Bowl(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.tensor([3.0, 1.0], dtype=torch.float64))

            def forward(self, x):
                return 0.5 * self.w.square().sum() + 0.0 * x.sum()

        problem = Problem(Bowl(), lambda f, y: f, (torch.zeros(1), torch.zeros(1)))
        ends = torch.tensor([[3.0, 1.0], [3.0, -1.0]], dtype=torch.float64)
        found = bezier(problem, ends[0], ends[1], points=3, steps=5000, lr=0.1, momentum=0.0)
        # int m (1-t)^2 = int m t^2 = 1/10, int m^2 = 2/15
        want = -(ends[0] + ends[1]) * (1 / 10) / (2 / 15)
        torch.testing.assert_close(found.knots[1], want, rtol=0.02, atol=0.02)
        assert torch.equal(bezier_point(found.knots, 0.5), 0.25 * ends[0] + 0.5 * found.knots[1] + 0.25 * ends[1])

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_a_batch_estimates_the_whole_loss(self, reduction, nets):
        x, y = data()
        problem = Problem(nets[0], nn.CrossEntropyLoss(reduction=reduction), batches(x, y, 40), weight_decay=0.1)
        found = bezier(problem, *nets[:2], points=3, steps=200, lr=1e-12)
        flat = linear(problem_on(nets[0]), nets[:2], points=41)
        assert float(found.training.mean()) == pytest.approx(float(flat.loss.mean()), rel=0.15)

    def test_divergence_is_said(self, nets):
        with pytest.raises(ArithmeticError, match=r"in training step \d+; use an lr below 1e\+38"):
            bezier(problem_on(nets[0]), *nets[:2], lr=1e38, steps=50)

    def test_progress(self, nets):
        seen, points = [], []
        bezier(
            problem_on(nets[0]),
            *nets[:2],
            steps=4,
            points=3,
            training=lambda step, loss: seen.append((step, loss > 0)),
            progress=lambda done, share: points.append(done),
        )
        assert seen == [(k, True) for k in range(1, 5)] and points == [1, 2, 3]


class TestFiles:
    def test_a_path_comes_back_and_is_continued(self, nets, tmp_path):
        problem, path = problem_on(nets[0]), tmp_path / "path.pt"

        def stop(done, share):
            if done == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            bezier(problem, *nets[:2], steps=5, points=5, path=path, progress=stop)
        part = Path.load(path, problem)
        assert int(part.done.sum()) == 2 and part.recipe == {"steps": 5, "lr": 0.02, "momentum": 0.9, "seed": 0}
        done = bezier(
            problem, *nets[:2], steps=5, points=5, path=path, training=lambda *_: pytest.fail("it is trained")
        )
        whole = bezier(problem, *nets[:2], steps=5, points=5)
        assert torch.equal(done.loss, whole.loss) and torch.equal(done.knots, whole.knots)
        again = Path.load(path, problem)
        assert again.complete and torch.equal(again.training, whole.training) and again.labels == ("0", "1")

    def test_another_request_is_refused(self, nets, tmp_path):
        problem, path = problem_on(nets[0]), tmp_path / "path.pt"
        linear(problem, nets[:2], points=3, path=path)
        with pytest.raises(ValueError, match="contains another path: its points differ"):
            linear(problem, nets[:2], points=5, path=path)
        with pytest.raises(ValueError, match="its checkpoints differ"):
            linear(problem, [nets[0], nets[2]], points=3, path=path)
        with pytest.raises(ValueError, match="a linear path"):
            bezier(problem, *nets[:2], points=3, path=path)
        with pytest.raises(ValueError, match="contains a path, expected a slice"):
            Slice.load(path)

    def test_the_models_own_weights_do_not_matter_to_a_path(self, nets, tmp_path):
        path = tmp_path / "path.pt"
        first = linear(problem_on(nets[0]), nets[:2], points=3, path=path)
        again = linear(problem_on(nets[2]), nets[:2], points=3, path=path)
        assert torch.equal(first.loss, again.loss)
        with pytest.raises(ValueError, match="another model or other data"):
            Path.load(path, problem_on(trained(0, norm=True, steps=0)))


class TestBadInput:
    def test_checkpoints(self, nets):
        problem = problem_on(nets[0])
        for few in ([nets[0]], [], nets[0], torch.zeros(3, 62)):
            with pytest.raises(ValueError, match="at least two checkpoints"):
                linear(problem, few)
        with pytest.raises(ValueError, match="checkpoints 'a' and 'b' have the same weights"):
            linear(problem, [nets[0], nets[0]], labels=["a", "b"])
        with pytest.raises(ValueError, match="1 labels for 2 checkpoints"):
            linear(problem, nets[:2], labels=["a"])
        with pytest.raises(ValueError, match=r"no tensor '2\.weight'|has no '1\.weight'|has shape \(12,\)"):
            linear(problem, [nets[0], trained(0, norm=True, steps=0)])
        with pytest.raises(ValueError, match="at least 3 points"):
            linear(problem, nets[:2], points=2)

    @pytest.mark.parametrize("bad", [{"steps": -1}, {"lr": 0.0}, {"lr": math.nan}, {"momentum": 1.0}])
    def test_numbers(self, nets, bad):
        with pytest.raises(ValueError, match=r"steps must be >= 0, lr positive and momentum in \[0, 1\)"):
            bezier(problem_on(nets[0]), *nets[:2], **bad)
