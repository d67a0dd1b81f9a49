"""Figures: what was measured is what is drawn, with words and units, in both ways of drawing."""

import copy
import json
import math
import re
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from flatmin.measure.curvature import Hessian
from flatmin.measure.directions import difference, eigenvector, gaussian, gaussian_pair
from flatmin.measure.follow import Point
from flatmin.measure.krylov import spectrum
from flatmin.measure.landscape import landscape
from flatmin.measure.paths import bezier, linear
from flatmin.measure.problem import Problem
from flatmin.measure.trace import Density
from flatmin.measure.trace import density as density_of
from flatmin.measure.trajectory import pca
from flatmin.report.figures import content as plots
from flatmin.report.figures import interactive as draw_interactive
from flatmin.report.figures import static as draw
from tests.measure.nets import make

with_matplotlib = pytest.mark.skipif(
    find_spec("matplotlib") is None, reason="matplotlib is not installed (extra 'plot')"
)
with_plotly = pytest.mark.skipif(find_spec("plotly") is None, reason="plotly is not installed (extra 'report')")
BOTH = pytest.mark.parametrize("module", [pytest.param(draw, marks=with_matplotlib), draw_interactive])


@pytest.fixture(scope="module")
def made():
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
        "density": density_of(Hessian(problem), run, runs=1, steps=10),
    }


CALLS = {
    "line": lambda m, d: m.profile(d["line"]),
    "accuracy": lambda m, d: m.profile(d["line"], value="accuracy"),
    "lines": lambda m, d: m.profile({"sgd": d["line"], "sam": d["eigen"]}),
    "to": lambda m, d: m.profile(d["to"]),
    "path": lambda m, d: m.profile(d["linear"]),
    "paths": lambda m, d: m.profile({"straight": d["straight"], "bent": d["bezier"]}, log=True),
    "contour": lambda m, d: m.contour(d["plane"]),
    "error": lambda m, d: m.contour(d["plane"], value="error", levels=8),
    "walk": lambda m, d: m.contour(d["walk"]),
    "surface": lambda m, d: m.surface(d["plane"], log=True),
    "surface, linear": lambda m, d: m.surface(d["walk"], log=False),
    "density": lambda m, d: m.density(d["density"]),
    "densities": lambda m, d: m.density({"a": d["density"], "b": d["density"]}, width=0.1),
    "eigenvalues": lambda m, d: m.eigenvalues({"sgd": d["spectrum"]}),
    "curve": lambda m, d: m.curve(
        {"sam": ([0.1, 0.2], [1.0, 3.0], [0.1, 0.2]), "sgd": ([0.1, 0.2], [2.0, math.nan])},
        xlabel="ρ", ylabel="rise of the loss", log_x=True,
    ),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("call", CALLS)
def test_every_figure_has_words_and_can_be_written(module, call, made, tmp_path):
    found = CALLS[call](module, made)
    if module is draw:
        for axes in found.axes:
            words = [axes.get_xlabel(), axes.get_ylabel()] if axes.get_label() != "<colorbar>" else [axes.get_ylabel()]
            assert all(words)
        for ending in ("png", "svg"):
            path = draw.save(found, tmp_path / "new" / f"figure.{ending}", dpi=40)
            assert path.stat().st_size > 3000
    else:
        if "surface" in call:
            assert all(found.layout["scene"][f"{k}axis"]["title"]["text"] for k in "xyz")
        else:
            assert all(found.layout[f"{k}axis"]["title"]["text"] for k in "xy")


@with_plotly
def test_all_of_them_on_one_page(made, tmp_path):
    figures = {f"figure <{name}>": call(draw_interactive, made) for name, call in CALLS.items()}
    text = draw_interactive.save(figures, tmp_path / "new" / "page.html", title="A & B").read_text()
    assert "<title>A &amp; B</title>" in text and "figure &lt;contour&gt;" in text
    specs = [json.loads(s) for s in re.findall(r'<script type="application/json">(.*?)</script>', text)]
    assert len(specs) == len(CALLS)
    assert {t["type"] for spec in specs for t in spec["data"]} == {"scatter", "contour", "surface"}
    import plotly.graph_objects as go

    def colored(value):  # the page's own colours become real ones in the browser
        if isinstance(value, dict):
            return {k: colored(v) for k, v in value.items()}
        if isinstance(value, list):
            return [colored(v) for v in value]
        return "#000000" if isinstance(value, str) and value.startswith("var:") else value

    for spec in specs:
        go.Figure(data=colored(spec["data"]), layout=colored(spec["layout"]))  # plotly's own check of every key


class TestNumbers:
    """The measured values themselves, neither smoothed nor filled nor clipped."""

    @with_matplotlib
    def test_lines(self, made):
        line = made["line"]
        axes = draw.profile(line).axes[0]
        np.testing.assert_array_equal(axes.lines[0].get_ydata(), line.loss.numpy())
        np.testing.assert_array_equal(axes.lines[0].get_xdata(), line.relative(0).numpy())
        np.testing.assert_allclose(
            draw.profile(line, value="error").axes[0].lines[0].get_ydata(), 100 * line.error.numpy()
        )
        absolute = draw.profile(line, unit="absolute").axes[0].lines[0].get_xdata()
        np.testing.assert_array_equal(absolute, line.axes[0].distances().numpy())
        np.testing.assert_array_equal(
            draw.profile(line, unit="steps").axes[0].lines[0].get_xdata(), line.axes[0].points.numpy()
        )

    def test_the_same_lines_in_the_browser(self, made):
        trace = draw_interactive.profile(made["line"]).data[0]
        assert trace["y"] == made["line"].loss.tolist() and trace["x"] == made["line"].relative(0).tolist()

    def test_planes_are_not_transposed(self, made):
        plane = made["plane"]
        field = plots.field(plane)
        assert field.z.shape == (5, 7) and len(field.x) == 7 and len(field.y) == 5
        np.testing.assert_array_equal(field.z, plane.loss.numpy().T)
        flat = draw_interactive.surface(plane, log=False).data[0]
        assert flat["z"][1][6] == float(plane.loss[6, 1])
        logarithmic = draw_interactive.contour(plane, log=True).data[0]
        assert logarithmic["z"][1][6] == pytest.approx(math.log10(float(plane.loss[6, 1])))
        assert f": {float(plane.loss[6, 1]):.6g}" in logarithmic["text"][1][6]

    def test_the_surface_is_not_constant(self, made):
        assert len(np.unique(plots.field(made["plane"]).z)) == 35

    def test_trajectories_are_in_the_units_of_the_axes(self, made):
        field = plots.field(made["walk"])
        norm = made["walk"].origin.norm
        np.testing.assert_allclose(field.trajectory, made["trajectory"].coordinates.numpy() / norm, rtol=1e-9)
        absolute = plots.field(made["walk"], unit="absolute")
        np.testing.assert_allclose(absolute.trajectory, made["trajectory"].coordinates.numpy(), rtol=1e-9)
        assert field.x[0] <= field.trajectory[:, 0].min() and field.x[-1] >= field.trajectory[:, 0].max()
        traces = {t.get("name"): t for t in draw_interactive.contour(made["walk"]).data}
        assert traces["checkpoints, projected"]["x"] == field.trajectory[:, 0].tolist()

    def test_densities_and_eigenvalues(self, made):
        lines = plots.density(made["density"], width=0.05)
        line = lines.lines[0]
        want = made["density"].smoothed(torch.tensor(line.x), 0.05).numpy()
        np.testing.assert_array_equal(line.y, want)
        assert torch.trapezoid(torch.tensor(line.y), torch.tensor(line.x)) == pytest.approx(1.0, abs=1e-3)
        one = 1 / (57 * 0.05 * math.sqrt(2 * math.pi))
        assert lines.low == pytest.approx(0.1 * one), "a single eigenvalue can be seen"
        ends = plots.eigenvalues(made["spectrum"])
        assert [len(line.x) for line in ends.lines] == [4, 2]
        np.testing.assert_array_equal(ends.lines[0].y, made["spectrum"].top.numpy())
        np.testing.assert_allclose(
            ends.lines[0].error, (made["spectrum"].top_residuals * made["spectrum"].top.abs()).numpy()
        )


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
        assert np.isnan(drawn.lines[0].y[[2, 8, 10]]).all() and drawn.lines[0].lost.tolist() == [
            line.relative(0)[2], line.relative(0)[8],
        ]  # fmt: skip
        field = plots.field(plane)
        assert field.note == "2 points not finite; 2 points not evaluated yet"
        assert int(np.isnan(field.z).sum()) == 4 and len(field.lost) == 2
        assert field.lost[0].tolist() == [field.x[0], field.y[0]]
        known = plane.loss[plane.done & plane.loss.isfinite()]
        assert field.levels[0] == pytest.approx(float(known.min())) and field.levels[-1] == pytest.approx(
            float(known.max())
        )
        assert math.isinf(plane.loss[0, 0]), "drawing changes nothing"

    @BOTH
    def test_they_can_be_drawn(self, module, holed):
        line, plane = holed
        found = [module.profile(line), module.contour(plane), module.surface(plane)]
        if module is draw:
            for figure in found:
                figure.canvas.draw()
            assert found[0].axes[0].get_title("left") == "2 points not finite (×); 1 point not evaluated yet"
        else:
            assert all("not finite" in figure.layout["title"]["text"] for figure in found)

    @BOTH
    def test_a_constant_surface_is_one_colour(self, module, made):
        plane = copy.deepcopy(made["plane"])
        for value in (0.0, 2.0, -3.0):
            plane.loss[:] = value
            for figure in (module.contour(plane), module.surface(plane)):
                if module is draw:
                    figure.canvas.draw()

    @BOTH
    def test_values_over_many_decades(self, module, made):
        plane = copy.deepcopy(made["plane"])
        plane.loss[:] = torch.logspace(-3, 21, 35, dtype=torch.float64).view(7, 5)
        for figure in (module.contour(plane), module.surface(plane)):
            if module is draw:
                figure.canvas.draw()


class TestWords:
    def test_axes(self, made):
        assert plots.profile(made["line"]).xlabel.replace("\n", " ") == (
            "distance ‖Δw‖ / ‖w‖ along random direction, filter-normalised, seed 0"
        )
        assert plots.profile(made["line"]).ylabel == "train loss (CrossEntropyLoss)"
        assert plots.profile(made["line"], value="accuracy").ylabel == "train accuracy, %"
        assert plots.profile(made["to"]).xlabel == "from the model (0) to the start (1)"
        assert plots.profile(made["linear"]).ticks == ([0.0, 1.0, 2.0], ["a", "b", "c"])
        assert plots.profile(made["straight"]).xlabel == "t, from 0 (0) to 1 (1)"
        assert plots.profile({"a": made["line"], "b": made["eigen"]}).xlabel == "distance ‖Δw‖ / ‖w‖ from the model"
        assert "principal component 2" in plots.field(made["walk"]).ylabel.replace("\n", " ")
        assert f"(barrier {made['bezier'].barrier:.3g})" in plots.profile(made["bezier"]).lines[0].label

    @pytest.mark.parametrize("label", ["", "short", "a-b " * 30, "x" * 200, "λ = 3 " * 20])
    def test_long_labels_are_broken(self, label):
        found = plots.broken(label, 40)
        assert found.replace("\n", "").replace(" ", "").replace("\u00a0", "") == label.replace(" ", "")
        assert all(len(line) <= 40 for line in found.split("\n"))

    @pytest.mark.parametrize(
        ("low", "high", "log", "want"),
        [
            (0.001, 20.0, True, [0.001, 0.01, 0.1, 1.0, 10.0]),
            (1.0, 7.0, True, [1.0, 2.0, 5.0]),
            (30.2, 100.0, False, [40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 100.0]),
            (-0.13, 0.12, False, [-0.1, -0.05, 0.0, 0.05, 0.1]),
        ],
    )
    def test_ticks(self, low, high, log, want):
        assert plots.ticks(np.array([low, high]), log) == pytest.approx(want)

    def test_ticks_inside_a_decade(self):
        found = plots.ticks(np.array([1.1, 1.3]), log=True)
        assert len(found) >= 3 and min(found) >= 1.1 - 1e-9 and max(found) <= 1.3 + 1e-9


@with_matplotlib
class TestMatplotlib:
    def test_the_same_figure_gives_the_same_file(self, made, tmp_path):
        for ending in ("png", "svg", "pdf"):
            first, second = (
                draw.save(draw.contour(made["plane"]), tmp_path / f"{k}.{ending}", dpi=50) for k in ("a", "b")
            )
            assert first.read_bytes() == second.read_bytes()

    def test_its_global_state_is_left_alone(self, made, tmp_path):
        import matplotlib

        before = dict(matplotlib.rcParams)
        draw.save(draw.surface(made["plane"]), tmp_path / "a.svg")
        assert dict(matplotlib.rcParams) == before

    def test_lines_differ_in_more_than_colour(self, made):
        lines = draw.profile({str(k): made["line"] for k in range(4)}).axes[0].lines
        assert len({line.get_linestyle() for line in lines}) == 4

    def test_dollars_are_no_formulas(self):
        figure = draw.curve({"a $b$ c": ([1, 2], [1, 2]), "d": ([1, 2], [2, 1])}, xlabel="cost in $, $ a", ylabel="y")
        figure.canvas.draw()
        texts = [figure.axes[0].get_legend().get_texts()[0], figure.axes[0].xaxis.label]
        assert [t._preprocess_math(t.get_text()) for t in texts] == [("a $b$ c", False), ("cost in $, $ a", False)]

    def test_another_ending(self, made, tmp_path):
        with pytest.raises(ValueError, match=r"written as \.png, \.svg, \.pdf, got 'a\.jpg'"):
            draw.save(draw.profile(made["line"]), tmp_path / "a.jpg")


def test_without_matplotlib_the_extra_is_named(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for call in (lambda: draw.profile(made["line"]), lambda: draw.contour(made["plane"])):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'flatmin\[plot\]'"):
            call()


@BOTH
class TestBadInput:
    def test_slices(self, module, made):
        with pytest.raises(ValueError, match="needs a slice of two directions, got one direction; use profile"):
            module.contour(made["line"])
        with pytest.raises(ValueError, match="got a Path; use profile"):
            module.surface(made["linear"])
        with pytest.raises(ValueError, match="this slice has two; use contour or surface"):
            module.profile(made["plane"])
        with pytest.raises(ValueError, match="slices and paths have no axis in common"):
            module.profile({"a": made["line"], "b": made["linear"]})
        with pytest.raises(ValueError, match="there is nothing to draw"):
            module.profile({})

    def test_values(self, module, made):
        with pytest.raises(ValueError, match="measured without accuracy, so there is no error to draw"):
            module.contour(made["walk"], value="error")
        with pytest.raises(ValueError, match="value must be 'loss', 'accuracy' or 'error', got 'lost'"):
            module.profile(made["line"], value="lost")
        with pytest.raises(ValueError, match="unit must be"):
            module.profile(made["line"], unit="metres")
        with pytest.raises(ValueError, match="levels must be at least 2"):
            module.contour(made["plane"], levels=1)

    def test_nothing_finite_or_nothing_done(self, module, made):
        plane = copy.deepcopy(made["plane"])
        plane.loss[:] = math.inf
        with pytest.raises(ValueError, match=r"none of the 35 points has a finite loss \(35 are evaluated\)"):
            module.contour(plane)
        plane.done[:] = False
        with pytest.raises(ValueError, match=r"\(0 are evaluated\), so there is nothing to draw"):
            module.surface(plane)

    def test_a_logarithm_of_what_is_not_positive(self, module, made):
        line = copy.deepcopy(made["line"])
        line.loss[0] = -1.0
        with pytest.raises(ValueError, match="a logarithmic scale needs positive values"):
            module.profile(line, log=True)
        module.profile(line)

    def test_planes_of_one_row(self, module, made):
        thin = landscape(made["problem"], gaussian_pair(made["problem"]), grid=[[0.0, 1.0], [0.0]])
        with pytest.raises(ValueError, match="two points on each axis, got 2 by 1"):
            module.contour(thin)

    def test_spectra(self, module, made):
        empty = Density(
            nodes=torch.empty(0), weights=torch.empty(0), runs=0, steps=0, products=0, conventions=None
        )  # fmt: skip
        with pytest.raises(ValueError, match="no node"):
            module.density(empty)
        with pytest.raises(ValueError, match="width must be positive"):
            module.density(made["density"], width=0.0)
        with pytest.raises(ValueError, match="no eigenvalue"):
            module.eigenvalues({})

    def test_curves(self, module):
        words = {"xlabel": "x", "ylabel": "y"}
        for shown, sentence in (
            ({}, "no finite value"),
            ({"a": ([1.0], [math.nan])}, "no finite value"),
            ({"a": ([1.0],)}, r"must be \(x, y\) or \(x, y, error\), got 1"),
            ({"a": ([1.0], [1.0, 2.0])}, "lists of one length"),
            ({"a": ([1.0], [1.0], [-1.0])}, "negative error"),
        ):
            with pytest.raises(ValueError, match=sentence):
                module.curve(shown, **words)


@with_matplotlib
def test_levels_of_ones_own(made):
    draw.contour(made["plane"], levels=[0.5, 1.0, 2.0]).canvas.draw()
    for bad in ([1.0], [2.0, 1.0]):
        with pytest.raises(ValueError, match="levels must rise"):
            draw.contour(made["plane"], levels=bad)


def test_a_page_without_figures(tmp_path):
    with pytest.raises(ValueError, match="no figure to write"):
        draw_interactive.save({}, tmp_path / "a.html", title="t")


@BOTH
def test_the_edge_of_stability_is_drawn_where_it_is_known(module):
    points = [
        Point(step=i, largest=5.0 + i, residual=0.0, products=9, converged=i != 2, edge=20.0, sam_edge=10.0 - i)
        for i in range(4)
    ]
    drawn = plots.followed(points)
    assert [line.label for line in drawn.lines] == ["λ max", "edge of stability, 2 (1 + β) / η", "SAM's edge"]
    assert drawn.lines[0].y.tolist() == [5.0, 6.0, 7.0, 8.0] and drawn.note == "1 point not converged"
    bare = [Point(step=p.step, largest=p.largest, residual=0.0, products=9, converged=True) for p in points]
    assert [line.label for line in plots.followed(bare).lines] == ["λ max"]
    module.followed(points)
    with pytest.raises(ValueError, match="nothing to draw"):
        module.followed([])
