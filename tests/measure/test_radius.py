"""How far the linear prediction holds along a method's own ascent: closed forms, words, figure, reports."""

import json
import math
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import flatmin
from flatmin.cli.main import app
from flatmin.measure import Problem, radius, report
from flatmin.measure.radius import LOW_RESOLUTION, MULTIPLES, RESOLUTION, FoundRadius
from flatmin.report import figures
from flatmin.train.ascents import ascents
from flatmin.train.preset import load_run
from flatmin.train.trainer import Trainer

FINE = tuple(2.0 ** (k / 4) for k in range(-24, 25))


def optimizer_of(loss_of, start, method="sam", rho=0.05, **options):
    """An optimizer of w in float64 with the closure of a loss."""
    w = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = flatmin.wrap(torch.optim.SGD([w], lr=0.1, momentum=0.9), method, rho=rho, **options)

    def closure(scale=1.0):
        optimizer.zero_grad()
        loss = scale * loss_of(w)
        loss.backward()
        return loss

    return optimizer, closure, w


def parabola(curvatures):
    h = torch.tensor(curvatures, dtype=torch.float64)
    return lambda w: 0.5 * (h * w.square()).sum(), h


class TestLimit:
    @pytest.mark.parametrize("off", [0.5, 0.1])
    @pytest.mark.parametrize("rho", [0.05, 0.3])
    def test_of_sam_on_a_parabola(self, rho, off):
        """rise = r ||g|| + r^2 h / 2 with h the curvature along g, so off at r = 2 off ||g|| / h, whatever rho is."""
        loss_of, h = parabola([1.0, 4.0, 0.5])
        optimizer, closure, w = optimizer_of(loss_of, [3.0, -1.0, 2.0], rho=rho)
        g = h * w.detach()
        along = float((h * (g / g.norm()).square()).sum())
        found = radius(optimizer, [closure], off=off)
        assert found.limit == pytest.approx(2 * off * float(g.norm()) / along, rel=1e-6)
        assert found.radii == pytest.approx([rho * m for m in MULTIPLES])

    def test_of_asam_on_a_parabola(self):
        """The same with d = T^2 g / ||T g|| in place of the unit vector: <g, d> = ||T g||."""
        loss_of, h = parabola([1.0, 4.0, 0.5])
        optimizer, closure, w = optimizer_of(loss_of, [3.0, -1.0, 2.0], "asam")
        w = w.detach()
        t = w.abs() * h * w
        d = w.abs() * t / t.norm()
        assert radius(optimizer, [closure]).limit == pytest.approx(float(t.norm() / (h * d * d).sum()), rel=1e-6)

    def test_where_the_surface_falls_off(self):
        """A parabola that opens downwards: the rise falls short by half at the same distance."""
        optimizer, closure, _ = optimizer_of(lambda w: 10 - 0.5 * (w - 3).square().sum(), [1.0])
        assert radius(optimizer, [closure]).limit == pytest.approx(2.0, rel=1e-6)

    def test_of_a_logistic_loss(self):
        """L = log(1 + exp(-w)) climbed to w - r: the radius at which the rise is 3/2 or 1/2 of r sigma(-w)."""
        start, rho = 4.0, 0.5
        optimizer, closure, _ = optimizer_of(lambda w: nn.functional.softplus(-w).sum(), [start], rho=rho)

        def ratio(r):
            return (math.log1p(math.exp(r - start)) - math.log1p(math.exp(-start))) * (1 + math.exp(start)) / r

        low, high = 1e-3, 3.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if ratio(middle) < 1.5 else (low, middle)
        assert radius(optimizer, [closure], multiples=FINE).limit == pytest.approx(low, rel=0.01)
        assert radius(optimizer, [closure]).limit == pytest.approx(low, rel=0.1)

    def test_a_median_over_batches_with_its_range(self):
        loss_of, _ = parabola([2.0])
        optimizer, closure, w = optimizer_of(loss_of, [1.0])

        def steep(k):
            def other():
                optimizer.zero_grad()
                loss = loss_of(w) + k * w.sum()
                loss.backward()
                return loss

            return other

        found = radius(optimizer, [closure, steep(2.0), steep(4.0)])
        assert found.limits == pytest.approx((1.0, 2.0, 3.0))
        assert found.limit == pytest.approx(2.0)
        assert found.uphill == found.limits

    def test_beyond_the_radii_tried(self):
        optimizer, closure, _ = optimizer_of(lambda w: w.sum(), [3.0])
        found = radius(optimizer, [closure])
        assert found.limit == math.inf
        assert found.sentence().startswith("The linear prediction is off by less than 50% up to rho = 3.2, the largest")

    def test_where_the_ascent_does_not_lead_uphill(self):
        """Momentum-SAM goes where the momentum leads, here downhill: there is no rise to predict."""
        optimizer, closure, _ = optimizer_of(lambda w: w.square().sum(), [1.0], "momentum-sam")
        optimizer.step(closure)
        found = radius(optimizer, [closure])
        assert math.isnan(found.limit) and not found.uphill
        assert "uphill on none of 1 batch" in found.sentence()

    def test_rounding_is_not_judged(self):
        """A loss of 100 000 in float32 does not resolve the rises at small radii."""
        w = nn.Parameter(torch.tensor([1.0]))
        optimizer = flatmin.wrap(torch.optim.SGD([w], lr=0.1))

        def closure():
            optimizer.zero_grad()
            loss = 1e5 + w.square().sum()
            loss.backward()
            return loss

        assert radius(optimizer, [closure]).limit == pytest.approx(1.0, rel=0.02)
        assert radius(optimizer, [closure], resolution=1e-9).limit < 0.1

    def test_a_loss_that_overflows(self):
        optimizer, closure, _ = optimizer_of(lambda w: torch.where(w > 3.2, torch.inf, w).sum(), [3.0])
        between = math.sqrt(0.2 * 0.4)  # the last radius at which it is finite, and the next
        assert radius(optimizer, [closure]).limit == pytest.approx(between)


def test_under_autocast():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    optimizer = flatmin.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    x, y = torch.randn(64, 8), torch.randint(4, (64,))

    def closure(enabled):
        def run():
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        return run

    full = radius(optimizer, [closure(False)])
    assert math.isfinite(full.limit)
    assert radius(optimizer, [closure(True)], resolution=1e-2).limit == pytest.approx(full.limit, rel=0.05)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"closures": []}, "closures is empty"),
        ({"multiples": [1.0, 0.5]}, "multiples must be finite, ascending and above 0"),
        ({"multiples": [0.0, 0.5]}, "multiples must be finite, ascending and above 0"),
        ({"off": 0.0}, "off must be above 0"),
        ({"resolution": math.nan}, "resolution must be above 0"),
        ({"multiples": "a few"}, "multiples must be numbers above 0"),
    ],
)
def test_bad_arguments(given, why):
    optimizer, closure, _ = optimizer_of(lambda w: w.sum(), [3.0])
    with pytest.raises(ValueError, match=why):
        radius(optimizer, **{"closures": [closure], **given})


def test_any_number_and_no_other_optimizer():
    optimizer, closure, w = optimizer_of(lambda w: w.square().sum(), [1.0])
    assert radius(optimizer, [closure], multiples=np.float32(2)).radii == (0.1,)
    with pytest.raises(TypeError, match=r"radius needs an optimizer made by flatmin.wrap, got SGD\."):
        radius(torch.optim.SGD([w], lr=0.1), [closure])


def found(limits=(0.2, 0.3, 0.6)):
    radii = (0.1, 0.2, 0.4, 0.8)
    predicted = tuple(tuple(r for r in radii) for _ in limits)
    measured = tuple(tuple(r + 0.5 * r * r / limit for r in radii) for limit in limits)
    losses = (1.0,) * len(limits)
    return FoundRadius(
        method="vasso",
        rho=0.1,
        radii=radii,
        losses=losses,
        predicted=predicted,
        measured=measured,
        off=0.5,
        limits=limits,
    )


def test_words():
    assert str(found()).splitlines() == [
        "vasso, rho = 0.1, loss 1 on 3 batches",
        "",
        "rho  predicted rise  measured rise  measured / predicted",
        "0.1             0.1          0.117   1.17 (1.08 to 1.25)",
        "0.2             0.2          0.267    1.33 (1.17 to 1.5)",
        "0.4             0.4          0.667      1.67 (1.33 to 2)",
        "0.8             0.8           1.87      2.33 (1.67 to 3)",
        "",
        "The linear prediction is off by 50% at rho = 0.3 (0.2 to 0.6 over 3 batches), 3 times the param groups' rho.",
        "This is where the linear prediction fails. It is not a radius to train with: good radii are often much "
        "smaller.",
    ]


def test_words_where_some_limits_lie_beyond_the_radii_tried():
    head = "On 3 of 5 batches the linear prediction is off by less than 50% up to rho = 0.8, the largest radius tried; "
    inf, nan = math.inf, math.nan
    assert found((0.11, inf, inf, inf, 0.3)).sentence() == f"{head}on the others from rho = 0.11."
    words = found((0.11, inf, inf, inf, nan)).sentence()
    assert words == f"{head}on 1 of them from rho = 0.11. On 1 of 5 batches the ascent does not lead uphill."
    assert "on 1 batch\n" in str(found((0.2,)))


def test_without_a_gradient():
    optimizer, closure, _ = optimizer_of(lambda w: w.square().sum(), [0.0])
    words = "The gradient is zero on every batch."
    nothing = radius(optimizer, [closure])
    assert nothing.sentence() == words and "nan" not in str(nothing) and str(nothing).endswith(words)
    optimizer, flat, w = optimizer_of(lambda w: w.square().sum(), [1.0])

    def still():
        optimizer.zero_grad()
        loss = 0.0 * w.sum()
        loss.backward()
        return loss

    assert "nan" not in str(radius(optimizer, [flat, still]))


def test_the_figure(tmp_path):
    chart = figures.rise(found())
    lines = {one.label: one for one in chart.series}
    assert list(lines) == ["predicted", "measured", "off by 50% at 0.3", "rho of the param groups 0.1"]
    assert lines["predicted"].y == pytest.approx([0.1, 0.2, 0.4, 0.8])
    assert lines["measured"].y_interval[0] == pytest.approx([r + 0.5 * r * r / 0.6 for r in found().radii])
    assert lines["off by 50% at 0.3"].x == [0.3, 0.3]
    assert "sam: off by 50% at 0.3" in [one.label for one in figures.rise({"sam": found(), "asam": found()}).series]
    assert figures.save(chart, tmp_path / "rise.svg").stat().st_size > 1000
    assert figures.save(chart, tmp_path / "rise.html").stat().st_size > 1000


class TestReports:
    def test_a_problem_alone_has_no_method(self):
        net = nn.Linear(3, 2)
        measured = report(Problem(net, nn.functional.cross_entropy, (torch.randn(8, 3), torch.arange(8) % 2)), "radius")
        assert "measure the folder of a run" in measured.missing["Radius of the method"]

    def test_in_training(self):
        """The trainer's own optimizer with what it remembers, and the run goes on as if nothing had been measured."""
        config, _ = load_run("smoke", ["method=fsam", "epochs=2"])
        looked, twin = Trainer(config), Trainer(config)
        for trainer in (looked, twin):
            for batch in trainer.batches():
                trainer.step(batch)
            if trainer is looked:
                with ascents(trainer, torch.arange(100)) as (optimizer, closures, resolution):
                    assert resolution == RESOLUTION
                    seen = radius(optimizer, closures, multiples=(0.5, 1.0))
                assert seen.method == "fsam" and len(closures) >= 1
            last = [trainer.step(batch).loss for batch in trainer.batches()]
        assert looked.gradients == twin.gradients
        for a, b in zip(looked.model.parameters(), twin.model.parameters(), strict=True):
            assert torch.equal(a, b)
        assert all(map(math.isfinite, map(float, last)))

    def test_the_resolution_of_16_bits(self):
        """The section of a report judges a run under autocast by what 16 bits resolve."""
        config, _ = load_run("smoke", ["precision=bf16"])
        trainer, given = Trainer(config), []

        @contextmanager
        def asking(coarser):
            with ascents(trainer, torch.arange(100)) as (optimizer, closures, resolution):
                given.append(resolution)
                yield optimizer, closures, resolution * coarser

        problem = Problem(nn.Linear(3, 2), nn.functional.cross_entropy, (torch.randn(8, 3), torch.arange(8) % 2))
        one, none = (
            report(problem, "radius", ascents=partial(asking, coarser)).sections[0].results["radius"].limit
            for coarser in (1.0, 1e6)
        )
        assert given == [LOW_RESOLUTION] * 2
        assert math.isfinite(one) and math.isnan(none)

    def test_the_command(self, tmp_path):
        run = CliRunner().invoke(
            app, ["train", "smoke", "method=vasso", "epochs=1", "--out", str(tmp_path), "--name", "one"]
        )
        assert run.exit_code == 0, run.output
        command = [
            "measure",
            str(tmp_path / "runs" / "one"),
            "--what",
            "radius",
            "--out",
            str(tmp_path / "m"),
            "--no-page",
        ]
        measured = CliRunner().invoke(app, command)
        assert measured.exit_code in (0, 3), measured.output
        section = json.loads((tmp_path / "m" / "one.json").read_text())["nets"][0]["sections"]["radius"]
        assert section["results"]["radius"]["method"] == "vasso"
        assert len(section["results"]["radius"]["radii"]) == len(MULTIPLES)
        assert "linear_radius" in section["quantities"]
