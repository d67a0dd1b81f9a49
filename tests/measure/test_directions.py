"""Directions: normalised as stated, Gaussian, remade from their recipe, of this model only."""

import math

import pytest
import torch
from torch import nn

from flatmin.measure.curvature import Hessian
from flatmin.measure.directions import difference, eigenvector, gaussian, gaussian_pair, given
from flatmin.measure.krylov import spectrum
from flatmin.measure.landscape import landscape
from flatmin.measure.problem import Problem
from tests.measure.nets import CASES, dense_hessian, make


def problem_of(name="mlp", **options):
    model, x, y, loss = make(name)
    return Problem(model, loss, (x, y), **options)


def wide(dtype=torch.float64):
    """A net with enough entries for statistics, with filters of very different size."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 40)).to(dtype)
    with torch.no_grad():
        model[0].weight *= torch.logspace(-3, 2, 8).view(-1, 1, 1, 1)
    return Problem(model, nn.CrossEntropyLoss(), (torch.randn(5, 2, 6, 6, dtype=dtype), torch.randint(40, (5,))))


def pieces(problem, direction):
    return dict(zip(problem.names, problem.shaped(direction.vector), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_every_filter_is_as_long_as_the_weights_own(name):
    problem = problem_of(name)
    both = [(vectors, pieces(problem, gaussian(problem, vectors=vectors))) for vectors in ("ignore", "tensor")]
    rows = [
        (vectors, key, part, w)
        for vectors, d in both
        for (key, part), w in zip(d.items(), problem.weights, strict=True)
    ]
    for vectors, key, part, w in rows:
        if w.dim() >= 2:
            for mine, its in zip(part, w.detach(), strict=True):
                assert float(mine.norm()) == pytest.approx(float(its.norm()), rel=1e-12), key
        elif vectors == "ignore":
            assert not part.any()
        else:
            assert float(part.norm()) == pytest.approx(float(w.detach().norm()), rel=1e-12), key


def test_layers_the_model_and_nothing_normalised():
    problem = wide()
    w = dict(zip(problem.names, (w.detach() for w in problem.weights), strict=True))
    for key, part in pieces(problem, gaussian(problem, normalise="layer", vectors="tensor")).items():
        assert float(part.norm()) == pytest.approx(float(w[key].norm()), rel=1e-12), key
    whole = gaussian(problem, normalise="model", vectors="tensor")
    assert whole.length == pytest.approx(float(problem.flat(problem.weights).norm()), rel=1e-12)
    matrices = torch.cat([t.flatten() for t in w.values() if t.dim() > 1])
    assert gaussian(problem, normalise="model").length == pytest.approx(float(matrices.norm()), rel=1e-12)
    plain = gaussian(problem, normalise="none", vectors="tensor").vector
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(plain, torch.randn(problem.size, generator=generator, dtype=torch.float64))


def test_one_dimensional_tensors_are_not_scaled_entry_by_entry():
    """A norm of each entry by itself would make the direction of a bias +-its own values."""
    problem = wide()
    d = pieces(problem, gaussian(problem, vectors="tensor"))
    ratio = (d["4.bias"] / problem.weights[problem.names.index("4.bias")]).abs()
    assert float(ratio.detach().std()) > 0.1


def test_entries_are_gaussian_and_two_directions_nearly_orthogonal():
    problem = wide()
    for seed in range(5):
        first, second = gaussian_pair(problem, seeds=(seed, seed + 100), normalise="layer", vectors="tensor")
        cosine = float(first.vector @ second.vector) / first.length / second.length
        assert abs(cosine) < 0.3
    z = pieces(problem, gaussian(problem, normalise="layer"))["4.weight"].flatten()
    z = z / z.std()
    n = len(z)
    assert abs(float(z.mean())) < 4 / math.sqrt(n)
    assert abs(float((z**3).mean())) < 4 * math.sqrt(15 / n)  # no skew
    assert float((z**4).mean()) == pytest.approx(3.0, abs=4 * math.sqrt(96 / n))  # 1.8 if uniform
    assert 0.45 < float((z > 0).double().mean()) < 0.55


def test_cosines_fall_like_one_over_the_root_of_the_size():
    problem = wide()
    cosines = []
    for seed in range(40):
        a, b = gaussian_pair(problem, seeds=(seed, 1000 + seed), normalise="none", vectors="tensor")
        cosines.append(float(a.vector @ b.vector) / a.length / b.length)
    found = torch.tensor(cosines)
    assert float(found.std()) * math.sqrt(problem.size) == pytest.approx(1.0, abs=0.45)
    assert abs(float(found.mean())) * math.sqrt(problem.size) < 0.6


@pytest.mark.parametrize("normalise", ["filter", "layer", "model", "none"])
def test_an_orthogonal_pair_keeps_its_norms(normalise):
    problem = wide()
    options = {"normalise": normalise, "vectors": "tensor"}
    first, second = gaussian_pair(problem, seeds=(0, 1), orthogonal=True, **options)
    assert abs(float(first.vector @ second.vector)) < 1e-12 * first.length * second.length
    plain = gaussian(problem, seed=1, **options)
    assert torch.equal(first.vector, gaussian(problem, seed=0, **options).vector)
    assert second.length == pytest.approx(plain.length, rel=1e-12)
    if normalise == "filter":
        mine, its = (pieces(problem, d)["0.weight"].flatten(1).norm(dim=1) for d in (second, plain))
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=0)
    assert second.recipe["orthogonal_to"] == 0


def test_filters_of_one_entry_are_left_out_of_the_second_of_an_orthogonal_pair():
    model = nn.Sequential(nn.Linear(1, 6, bias=False), nn.Linear(6, 2, bias=False)).double()
    problem = Problem(model, nn.MSELoss(), (torch.randn(4, 1).double(), torch.randn(4, 2).double()))
    first, second = gaussian_pair(problem, orthogonal=True)
    assert not pieces(problem, second)["0.weight"].any() and pieces(problem, first)["0.weight"].all()
    assert float(first.vector @ second.vector) == pytest.approx(0.0, abs=1e-14)


def test_directions_are_remade_from_their_recipe():
    problem = wide()
    made = gaussian(problem, seed=7, normalise="layer", vectors="tensor")
    again = gaussian(problem, **{k: v for k, v in made.recipe.items() if k != "kind"})
    assert torch.equal(made.vector, again.vector)
    assert made.label == "random direction, layer-normalised, seed 7"
    state = torch.get_rng_state()
    gaussian_pair(problem)
    assert torch.equal(state, torch.get_rng_state())


def test_the_draw_does_not_depend_on_the_precision():
    double, single = gaussian(wide()).vector, gaussian(wide(torch.float32)).vector
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-7)


def test_filters_of_zeros_stay_where_they_are():
    problem = problem_of("mlp")
    with torch.no_grad():
        problem.model[0].weight[2] = 0.0
    d = pieces(problem, gaussian(problem))["0.weight"]
    assert not d[2].any() and d[[0, 1, 3, 4, 5]].all()
    assert d.isfinite().all()


def test_eigenvectors():
    model, x, y, loss = make("mlp")
    problem = Problem(model, loss, (x, y))
    run = spectrum(Hessian(problem), top=2, bottom=1, tol=1e-8)
    values, vectors = torch.linalg.eigh(dense_hessian(model, x, y, loss))
    for direction, k in (
        (eigenvector(problem, run), -1),
        (eigenvector(problem, run, 1), -2),
        (eigenvector(problem, run, end="bottom"), 0),
    ):
        assert direction.length == pytest.approx(1.0, rel=1e-12)
        assert abs(float(direction.vector @ vectors[:, k])) == pytest.approx(1.0, abs=1e-8)
        assert direction.recipe["eigenvalue"] == pytest.approx(float(values[k]), rel=1e-7)
        assert float(direction.vector[direction.vector.abs().argmax()]) > 0
    assert eigenvector(problem, run).label == f"eigenvector 1 (λ = {float(values[-1]):.3g})"
    assert eigenvector(problem, run, end="bottom").label.startswith("eigenvector 1 from below (λ = ")
    assert eigenvector(problem, run, norm=0.25).length == pytest.approx(0.25, rel=1e-12)
    w = float(problem.flat(problem.weights).norm())
    assert eigenvector(problem, run, norm="weights").length == pytest.approx(w, rel=1e-12)


def test_differences_of_checkpoints():
    problem = problem_of("tied")
    torch.manual_seed(5)
    other = type(problem.model)().double()
    for checkpoint in (other, other.state_dict(), {f"module.{n}": t for n, t in other.state_dict().items()}):
        d = difference(problem, checkpoint, label="other")
        torch.testing.assert_close(problem.moved(d.vector)[0], other.embed.weight.detach(), rtol=0, atol=1e-15)
        assert (d.kind, d.label, d.unlike) == ("difference", "other", ())


def test_differing_buffers_are_named():
    problem = problem_of("batchnorm")
    other, x, _, _ = make("batchnorm")
    other.train()(x)
    with torch.no_grad():
        other[0].bias += 1.0
    assert difference(problem, other).unlike == ("1.running_mean", "1.running_var")


class TestBadInput:
    def test_words(self):
        problem = problem_of()
        with pytest.raises(ValueError, match="normalise must be 'filter', 'layer', 'model' or 'none', got 'filters'"):
            gaussian(problem, normalise="filters")
        with pytest.raises(ValueError, match="vectors must be 'ignore' or 'tensor', got 'bias'"):
            gaussian(problem, vectors="bias")
        with pytest.raises(ValueError, match="both seeds are 3"):
            gaussian_pair(problem, seeds=(3, 3))

    def test_nothing_moves(self):
        with pytest.raises(ValueError, match="vectors='ignore' ignores biases"):
            gaussian(problem_of(params="*.bias"))

    def test_eigenvectors(self):
        problem = problem_of()
        run = spectrum(Hessian(problem), top=1)
        with pytest.raises(ValueError, match="1 top eigenvectors, so index=1 is out of range"):
            eigenvector(problem, run, 1)
        with pytest.raises(ValueError, match="0 bottom eigenvectors"):
            eigenvector(problem, run, end="bottom")
        with pytest.raises(ValueError, match="end must be"):
            eigenvector(problem, run, end="left")
        with pytest.raises(ValueError, match="norm must be positive, got 0"):
            eigenvector(problem, run, norm=0)
        with pytest.raises(ValueError, match="the spectrum has size 57, but the problem has size 10"):
            eigenvector(problem_of("linear"), run)

    def test_checkpoints(self):
        problem = problem_of()
        state = problem.model.state_dict()
        with pytest.raises(ValueError, match="'checkpoint' has the same weights as the model"):
            difference(problem, problem.model)
        with pytest.raises(ValueError, match=r"no tensor '0.weight'; it has 'model', 'epoch'"):
            difference(problem, {"model": 3, "epoch": 3})
        with pytest.raises(ValueError, match=r"no tensor '2.bias'; it has"):
            difference(problem, {k: v for k, v in state.items() if k != "2.bias"})
        with pytest.raises(ValueError, match=r"belongs to another model: this model has no '4.weight'"):
            difference(problem, {**state, "4.weight": torch.zeros(3)})
        with pytest.raises(ValueError, match=r"'0.weight' has shape \(5, 6\) in the checkpoint, but \(6, 5\)"):
            difference(problem, {**state, "0.weight": torch.zeros(5, 6)})
        with pytest.raises(ValueError, match=r"shape \(57,\), got \(5,\)"):
            difference(problem, torch.zeros(5))
        with pytest.raises(ValueError, match="a model, a state dict or a vector of weights, got list"):
            difference(problem, [1])

    def test_checkpoints_as_people_save_them(self):
        problem = problem_of()
        moved = {f"module.{k}": v + 1.0 for k, v in problem.model.state_dict().items()}
        for saved in (moved, {"net": moved, "epoch": 3}, {"state_dict": {f"model.{k}": v for k, v in moved.items()}}):
            torch.testing.assert_close(difference(problem, saved).vector, torch.ones(57, dtype=torch.float64))

    def test_frozen_weights_that_differ(self):
        model, x, y, loss = make("mlp")
        model[0].requires_grad_(False)
        other = make("mlp")[0]
        with torch.no_grad():
            other[0].weight += 1.0
            other[2].weight += 1.0
        with pytest.raises(ValueError, match=r"also differs in '0.weight', which are not selected"):
            difference(Problem(model, loss, (x, y)), other)
        model.requires_grad_(True)
        assert difference(Problem(model, loss, (x, y), params="2.*"), other).vector.numel() == 21

    def test_zero_and_foreign_vectors(self):
        problem = problem_of()
        with pytest.raises(ValueError, match=r"length 0\.0; it must be finite"):
            given(problem, torch.zeros(57), label="g")
        with pytest.raises(ValueError, match="length nan"):
            given(problem, torch.full((57,), math.nan), label="g")
        with pytest.raises(ValueError, match="'g' has 57 entries, but the problem has 10 weights"):
            given(problem, torch.ones(57), label="g").check(problem_of("linear"))
        with pytest.raises(ValueError, match="weights with other names or shapes"):
            other = Problem(nn.Linear(18, 3), nn.CrossEntropyLoss(), (torch.zeros(2, 18), torch.tensor([0, 1])))
            given(problem, torch.ones(57), label="g").check(other)
        with pytest.raises(ValueError, match=r"no selected weight is called '3\.weight'; the names are '0\.weight', "):
            given(problem, {"3.weight": torch.ones(3)}, label="g")
        with pytest.raises(ValueError, match=r"'2\.bias' has shape \(4,\) in the direction, but \(3,\) in the model"):
            given(problem, {"2.bias": torch.ones(4)}, label="g")
        with pytest.raises(ValueError, match="2 tensors for 4 selected weights"):
            given(problem, [torch.ones(3), torch.ones(3)], label="g")
        with pytest.raises(TypeError, match="make one of a vector with "):
            landscape(problem, torch.ones(57))

    def test_given_by_name_or_one_by_one(self):
        problem = problem_of()
        gradient = problem.gradient()[1]
        pieces = problem.shaped(gradient)
        for form in (pieces, tuple(pieces), dict(zip(problem.names, pieces, strict=True))):
            assert torch.equal(given(problem, form, label="g").vector, gradient)
        one = given(problem, {"2.bias": pieces[3]}, label="g").vector
        assert torch.equal(one[-3:], gradient[-3:]) and not one[:-3].any()
