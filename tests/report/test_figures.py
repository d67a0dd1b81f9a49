"""What figures of landscapes, paths and spectra say: what was measured, with its units, and what is missing."""

import copy
import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from flatmin.measure.directions import gaussian_pair
from flatmin.measure.follow import Point
from flatmin.measure.landscape import landscape
from flatmin.measure.trace import Density
from flatmin.report import figures as plots
from flatmin.report.figures import interactive
from tests.report.measured import measured

with_matplotlib = pytest.mark.skipif(
    find_spec("matplotlib") is None, reason="matplotlib is not installed (extra 'plot')"
)


@pytest.fixture(scope="module")
def made():
    return measured()


class TestNumbers:
    """The measured values themselves, neither smoothed nor filled nor clipped."""

    def test_lines(self, made):
        line = made["line"]
        one = plots.profile(line).series[0]
        assert one.y == line.loss.tolist() and one.x == line.relative(0).tolist() and not one.label
        assert plots.profile(line, value="error").series[0].y == pytest.approx((100 * line.error).tolist())
        assert plots.profile(line, unit="absolute").series[0].x == line.axes[0].distances().tolist()
        assert plots.profile(line, unit="steps").series[0].x == line.axes[0].points.tolist()

    def test_planes(self, made):
        plane = made["plane"]
        field = plots.contour(plane, log=False)
        np.testing.assert_array_equal(field.z, plane.loss.numpy().T)
        np.testing.assert_allclose(field.xs, plane.relative(0).numpy(), rtol=1e-15)
        np.testing.assert_allclose(field.ys, plane.relative(1).numpy(), rtol=1e-15)
        assert len(np.unique(field.z)) == 35
        for log in (False, True):
            page = interactive.figure(plots.surface(plane, log=log)).data[0]
            height = np.log10(plane.loss.numpy()) if log else plane.loss.numpy()
            np.testing.assert_allclose(page["z"], height.T, rtol=1e-15)
            assert f": {float(plane.loss[6, 1]):.6g}" in page["text"][1][6]

    def test_trajectories_are_in_the_units_of_the_axes(self, made):
        for unit, scale in (("auto", made["walk"].origin.norm), ("absolute", 1.0)):
            field = plots.contour(made["walk"], unit=unit)
            (path,) = [one for one in field.series if one.label == "checkpoints, projected"]
            want = made["trajectory"].coordinates.numpy() / scale
            np.testing.assert_allclose(np.stack([path.x, path.y], 1), want, rtol=1e-9)
            assert field.xs[0] <= min(path.x) and field.xs[-1] >= max(path.x)
            assert path.x in [trace.get("x") for trace in interactive.figure(field).data]

    def test_densities_and_eigenvalues(self, made):
        chart = plots.density(made["density"], width=0.05)
        one = chart.series[0]
        assert one.y == made["density"].smoothed(torch.tensor(one.x, dtype=torch.float64), 0.05).tolist()
        assert torch.trapezoid(torch.tensor(one.y), torch.tensor(one.x)) == pytest.approx(1.0, abs=1e-3)
        single = 1 / (57 * 0.05 * math.sqrt(2 * math.pi))
        assert chart.y.range[0] == pytest.approx(0.1 * single), "a single eigenvalue can be seen"
        largest, smallest = plots.eigenvalues(made["spectrum"]).series
        assert (len(largest.x), len(smallest.x), largest.filled, smallest.filled) == (4, 2, True, False)
        assert largest.x == [1.0, 2.0, 3.0, 4.0] and largest.y == made["spectrum"].top.tolist()
        error = (made["spectrum"].top_residuals * made["spectrum"].top.abs()).numpy()
        np.testing.assert_allclose(np.subtract(largest.y_interval[1], largest.y), error, atol=1e-12)

    def test_the_edge_of_stability_is_drawn_where_it_is_known(self):
        points = [
            Point(step=i, largest=5.0 + i, residual=0.0, products=9, converged=i != 2, edge=20.0, sam_edge=10.0 - i)
            for i in range(4)
        ]
        drawn = plots.followed(points)
        assert [one.label for one in drawn.series] == ["λ max", "edge of stability, 2 (1 + β) / η", "SAM's edge"]
        assert drawn.series[0].y == [5.0, 6.0, 7.0, 8.0] and drawn.note == "1 point not converged"
        bare = [Point(step=p.step, largest=p.largest, residual=0.0, products=9, converged=True) for p in points]
        assert [one.label for one in plots.followed(bare).series] == ["λ max"]


class TestHoles:
    @pytest.fixture
    def holed(self, made):
        line, plane = copy.deepcopy(made["line"]), copy.deepcopy(made["plane"])
        line.loss[2], line.loss[8] = math.nan, math.inf
        line.done[10] = False
        plane.loss[0, 0], plane.loss[3, 2] = math.inf, math.nan
        plane.done[6, 3:] = False
        return line, plane

    def test_what_is_missing_is_said_and_left_out(self, holed):
        line, plane = holed
        drawn = plots.profile(line)
        assert drawn.note == "2 points not finite (×); 1 point not evaluated yet"
        one = drawn.series[0]
        assert np.isnan(np.array(one.y)[[2, 8, 10]]).all()
        assert one.lost == [line.relative(0)[2], line.relative(0)[8]]
        field = plots.contour(plane)
        assert field.note == "2 points not finite; 2 points not evaluated yet"
        assert int(np.isnan(field.z).sum()) == 4
        assert [(one.x[0], one.y[0]) for one in field.series if one.label == "not finite"] == [
            (field.xs[0], field.ys[0])
        ]
        known = plane.loss[plane.done & plane.loss.isfinite()]
        assert field.levels[[0, -1]] == pytest.approx([float(known.min()), float(known.max())])
        assert math.isinf(plane.loss[0, 0]), "drawing changes nothing"
        crosses = interactive.figure(drawn).data[-1]
        assert crosses["x"] == one.lost and crosses["y"] == [np.nanmax(one.y)] * 2

    @with_matplotlib
    def test_they_and_odd_surfaces_can_be_drawn(self, holed, made):
        line, plane = holed
        shown = [plots.profile(line), plots.contour(plane), plots.surface(plane)]
        constant, wide = copy.deepcopy(made["plane"]), copy.deepcopy(made["plane"])
        wide.loss[:] = torch.logspace(-3, 21, 35, dtype=torch.float64).view(7, 5)
        shown += [make(wide) for make in (plots.contour, plots.surface)]
        for value in (0.0, 2.0, -3.0):
            constant.loss[:] = value
            shown += [make(constant) for make in (plots.contour, plots.surface)]
        shown.append(plots.contour(made["plane"], levels=[0.5, 1.0, 2.0]))
        for one in shown:
            plots.as_matplotlib(one).canvas.draw()
            assert interactive.figure(one).data


def test_words(made):
    label = plots.profile(made["line"]).x.label
    assert label == "distance ‖Δw‖ / ‖w‖ along random direction, filter-normalised, seed 0"
    assert plots.profile(made["line"]).y.label == "train loss (CrossEntropyLoss)"
    assert plots.profile(made["line"], value="accuracy").y.label == "train accuracy, %"
    assert plots.profile(made["to"]).x.label == "from the model (0) to the start (1)"
    assert plots.profile(made["linear"]).x.ticks == {0.0: "a", 1.0: "b", 2.0: "c"}
    assert plots.profile(made["straight"]).x.label == "t, from 0 (0) to 1 (1)"
    assert plots.profile({"a": made["line"], "b": made["eigen"]}).x.label == "distance ‖Δw‖ / ‖w‖ from the model"
    assert "principal component 2" in plots.contour(made["walk"]).y.label
    assert f"(barrier {made['bezier'].barrier:.3g})" in plots.profile(made["bezier"]).series[0].label


class TestBadInput:
    def test_slices(self, made):
        with pytest.raises(ValueError, match="need a slice of two directions, got one direction; use profile"):
            plots.contour(made["line"])
        with pytest.raises(ValueError, match="got a Path; use profile"):
            plots.surface(made["linear"])
        with pytest.raises(ValueError, match="but this has two; use contour or surface"):
            plots.profile(made["plane"])
        with pytest.raises(ValueError, match="slices and paths cannot be drawn in one figure"):
            plots.profile({"a": made["line"], "b": made["linear"]})
        with pytest.raises(ValueError, match="there is nothing to draw"):
            plots.profile({})

    def test_values(self, made):
        with pytest.raises(ValueError, match="measured without accuracy, so there is no error to draw"):
            plots.contour(made["walk"], value="error")
        with pytest.raises(ValueError, match="value must be 'loss', 'accuracy' or 'error', got 'lost'"):
            plots.profile(made["line"], value="lost")
        with pytest.raises(ValueError, match="unit must be"):
            plots.profile(made["line"], unit="metres")
        with pytest.raises(ValueError, match="levels must be at least 2"):
            plots.contour(made["plane"], levels=1)
        for bad in ([1.0], [2.0, 1.0]):
            with pytest.raises(ValueError, match="levels must be at least two numbers in ascending order"):
                plots.contour(made["plane"], levels=bad)

    def test_nothing_finite_or_nothing_done(self, made):
        plane = copy.deepcopy(made["plane"])
        plane.loss[:] = math.inf
        with pytest.raises(ValueError, match=r"none of the 35 points has a finite loss \(35 are evaluated\)"):
            plots.contour(plane)
        plane.done[:] = False
        with pytest.raises(ValueError, match=r"\(0 are evaluated\), so there is nothing to draw"):
            plots.surface(plane)

    def test_a_logarithm_of_what_is_not_positive(self, made):
        line = copy.deepcopy(made["line"])
        line.loss[0] = -1.0
        with pytest.raises(ValueError, match="log=True needs positive values"):
            plots.profile(line, log=True)
        plots.profile(line)

    def test_planes_of_one_row(self, made):
        thin = landscape(made["problem"], gaussian_pair(made["problem"]), grid=[[0.0, 1.0], [0.0]])
        with pytest.raises(ValueError, match="two points on each axis, got 2 by 1"):
            plots.contour(thin)

    def test_spectra(self, made):
        empty = Density(
            nodes=torch.empty(0), weights=torch.empty(0), runs=0, steps=0, products=0, conventions=None
        )  # fmt: skip
        with pytest.raises(ValueError, match="no node"):
            plots.density(empty)
        with pytest.raises(ValueError, match="width must be positive"):
            plots.density(made["density"], width=0.0)
        with pytest.raises(ValueError, match="no eigenvalue"):
            plots.eigenvalues({})
        with pytest.raises(ValueError, match="nothing to draw"):
            plots.followed([])

    def test_curves(self):
        words = {"xlabel": "x", "ylabel": "y"}
        for shown, sentence in (
            ({}, "no finite value"),
            ({"a": ([1.0], [math.nan])}, "no finite value"),
            ({"a": ([1.0],)}, r"must be \(x, y\) or \(x, y, error\), got 1"),
            ({"a": ([1.0], [1.0, 2.0])}, "lists of the same length"),
            ({"a": ([1.0], [1.0], [-1.0])}, "negative error"),
        ):
            with pytest.raises(ValueError, match=sentence):
                plots.curve(shown, **words)
