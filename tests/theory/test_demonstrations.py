"""What the demonstrations show: their claims hold, their tables are the closed forms, their figures have the axes."""

import dataclasses
import math
import re
import sys

import numpy as np
import pytest

from flatmin.theory import draw, largest_step, limit_distance, orbit_square
from flatmin.theory.demonstrations import DEMONSTRATIONS, Marks, Panel, find, noise, usam
from flatmin.theory.demonstrations.demonstration import above, below, near, same, shown, slope

SLOW = {"diminishing", "network", "noise", "properties", "radius", "rates"}
FAST = [name for name in DEMONSTRATIONS if name not in SLOW]
_found = {}


def show(name):
    """Each is run once."""
    if name not in _found:
        _found[name] = find(name).run()
    return _found[name]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in DEMONSTRATIONS])
def test_every_claim_holds(name):
    if name == "network":
        pytest.importorskip("sklearn")
    found = show(name)
    assert len(found.claims) >= 4
    assert not [str(c) for c in found.claims if not c.holds]
    assert all(len(row) == len(found.columns) for row in found.rows)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in DEMONSTRATIONS])
def test_figures_have_the_axes(name, tmp_path):
    if name == "network":
        pytest.importorskip("sklearn")
    found = show(name)
    figure = draw.figure(found)
    assert figure.get_suptitle() == found.title
    assert len(figure.axes) == len(found.panels)
    for axes, panel in zip(figure.axes, found.panels, strict=True):
        if isinstance(panel, Marks):
            assert [t.get_text() for t in axes.get_yticklabels()] == list(panel.rows)
            assert len(axes.patches) == len(panel.rows) * len(panel.columns)
            continue
        assert isinstance(panel, Panel)
        assert (axes.get_xlabel(), axes.get_ylabel()) == (panel.xlabel, panel.ylabel)
        assert axes.get_xscale() == ("log" if panel.log_x else "linear")
        assert axes.get_yscale() == ("log" if panel.log_y else "linear")
        legend = axes.get_legend()
        labels = [] if legend is None else [re.sub(r"\s", " ", t.get_text()) for t in legend.get_texts()]
        assert labels == [curve.label for curve in panel.curves if curve.label]
        assert len(axes.lines) == len(panel.curves) + len(panel.levels)
    path = draw.save(figure, tmp_path / f"{name}.png", dpi=96)
    assert 10_000 < path.stat().st_size < 120_000
    if name == FAST[0] or name in SLOW:  # one will do: the figure is the same
        assert draw.save(figure, tmp_path / f"{name}.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_the_cycle_is_the_closed_form():
    found = show("orbit")
    for t, rho, x, predicted, before, after in found.rows:
        assert predicted == orbit_square(t, rho) == pytest.approx(t * rho / (1 - t), rel=1e-14)
        assert x == pytest.approx(predicted, abs=1e-10) and before == pytest.approx(-after, abs=1e-10)
    assert [round(float(x), 8) for x in found.column("|x|")] == [0.01111111, 0.00101010, 0.21428571]


def test_the_distances_are_the_closed_form():
    rows = show("quadratic").rows
    assert len(rows) >= 10
    for method, t, rho, distance, predicted, along in rows:
        if method in ("gradient descent", "USAM"):
            assert distance < 1e-15 and predicted == 0
        else:
            assert predicted == limit_distance(t, rho, [1.0, 4.0])
            assert distance == pytest.approx(predicted, abs=1e-10) and along == pytest.approx(distance, abs=1e-10)
    assert [row[4] for row in rows[2:5]] == [pytest.approx(0.025, abs=1e-15)] * 3


def test_usam_falls_below_the_bounds_and_not_always_beyond():
    rows = show("usam").rows
    for f, nu, t, falls, rise, _, theorem in rows:
        if f == "log-sum":
            assert t == pytest.approx(0.99 * largest_step(8.0, nu)) and falls == "yes" and theorem == "Section 4"
        assert (falls == "yes") == (rise <= 1e-12)
    beyond = {(f, nu, t): (falls, norm) for f, nu, t, falls, _, norm, theorem in rows if theorem == "none"}
    assert beyond[("quadratic 1, 4", 0.4, 0.4)][0] == "no"
    assert beyond[("1 - cos x", 2.0, 0.1)][0] == "no"
    assert beyond[("1 - cos x", 6.0, 0.1)][1] > 0.8
    x = usam.landing(6.0, 2 * math.pi, 0.5, 1.3)
    assert x + 6 * math.sin(x) == pytest.approx(2 * math.pi)


def test_the_floor_of_noise_is_the_limit_of_its_means():
    from flatmin.theory import ConstantRule

    for t, rho in ((0.1, 0.0), (0.05, 0.1)):
        means = noise.means(ConstantRule(t), rho, np.ones(noise.DIM), 2000)
        assert means[0] == pytest.approx(0.5 * noise.SPECTRUM.sum())
        assert means[-1] == pytest.approx(noise.floor(t, rho), rel=1e-9)
    plain = sum(0.1 * noise.SIGMA**2 / (2 * (2 - 0.1 * s)) for s in noise.SPECTRUM)
    assert noise.floor(0.1, 0.0) == pytest.approx(plain)


def test_claims_say_whether_they_hold():
    assert near("x", 1.0, 1.05, rel=0.1).holds and not near("x", 1.0, 1.05, tol=0.01).holds
    assert below("x", 1.0, 1.0).holds and not below("x", 1.1, 1.0).holds
    assert above("x", 1.0, 1.0).holds and not above("x", 0.9, 1.0).holds
    assert same("x", "F", "F").holds and not same("x", "F", "n").holds
    for claim in (near("x", math.nan, 1.0, rel=9.0), below("x", math.nan, 1.0), above("x", math.nan, 1.0)):
        assert not claim.holds and "measured" not in str(claim)
    assert str(near("the distance", 0.5, 0.4, tol=0.2)) == "the distance: 0.5, expected 0.4 ± 0.2"
    assert str(below("rise", 2.0, 1.0)) == "rise: 2, at most 1"


@pytest.mark.parametrize("name", FAST)
def test_a_planted_wrong_claim_fails(name):
    for claim in show(name).claims:
        if isinstance(claim.expected, str):
            wrong = dataclasses.replace(claim, expected="Theorem 9.9")
        else:
            other = {
                "equals": claim.expected + 3 * claim.tolerance + 1,
                "below": float(claim.measured) - 1,
                "above": math.inf,
            }
            wrong = dataclasses.replace(claim, expected=other[claim.relation])
        assert claim.holds and not wrong.holds


def test_cells_and_slopes():
    assert [shown(v) for v in ("a", 3, 0.1 + 0.2, math.nan, 1e-12)] == ["a", "3", "0.3", "-", "1e-12"]
    assert slope([0, 1, 2], [1, 3, 5]) == pytest.approx(2.0)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="unknown demonstration 'orbt'; did you mean 'orbit'"):
        find("orbt")


def test_every_demonstration_has_a_source_and_one_line():
    for name, d in DEMONSTRATIONS.items():
        assert d.name == name and d.title and "\n" not in d.title
        assert "NeurIPS 2024" in d.source or "Derived here" in d.source


def test_a_figure_without_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[plot\]'"):
        draw.figure(show("orbit"))


def test_noise_is_the_same_in_both_passes_and_refused_where_it_cannot_be():
    from flatmin.theory import Quadratic, run

    problem = Quadratic([1.0, 4.0])
    one = run(problem, "usam", steps=0.1, radius=0.1, updates=1, noise=1.0, seed=3, driver="program")
    other = run(problem, "sgd", steps=0.1, updates=1, noise=1.0, seed=3, driver="program")
    x, s = one.x[0], np.array([1.0, 4.0])
    e = (x - other.x[1]) / 0.1 - s * x
    assert np.allclose(one.x[1], x - 0.1 * (s * (x + 0.1 * (s * x + e)) + e))
    driver = run(problem, "usam", steps=0.1, radius=0.1, updates=1, noise=1.0, seed=3)
    assert np.allclose(driver.x[1], one.x[1])
    for method, size in (("sam", -1.0), ("sgdhess", 1.0)):
        with pytest.raises(ValueError, match="noise must be >= 0"):
            run(problem, method, steps=0.1, radius=0.1, updates=1, noise=size)
