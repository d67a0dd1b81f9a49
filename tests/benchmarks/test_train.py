"""Whole training runs: the arms do the same, and what is printed and gated follows from the samples."""

import importlib.util
import json
from argparse import Namespace

import pytest
import torch
from torch import nn

from benchmarks import agreement, images, peak, train, training
from benchmarks.__main__ import main
from benchmarks.results import BenchmarkResult, Gate

NET = "resnet8-w4"


@pytest.fixture(autouse=True)
def settings_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def data():
    return images.synthetic(64)


# -- the same images, the same step


def test_three_pipelines_make_the_same_images():
    assert agreement.image_difference(64) < 1e-6


@pytest.mark.parametrize("name", ["cut", "finished"])
def test_an_image_without_its_square_is_seen(name, monkeypatch):
    instead = {"cut": lambda image, centre: image, "finished": lambda x, *centre: x.float()}
    monkeypatch.setattr(images, name, instead[name])
    assert agreement.image_difference(64) > 0.1


def test_images_are_drawn_anew_each_time(data):
    dataset = images.Prepared(data.train)
    made = torch.stack([dataset[0][0] for _ in range(200)])
    assert len(made.unique(dim=0)) > 150
    squares = (made == 0).flatten(1).sum(1) >= 3 * 8 * 8
    assert 0.3 < squares.float().mean() < 0.7


def test_loaders_give_whole_batches_without_end(data):
    for source, parts in ((images.Prepared, 2), (images.Bytes, 4)):
        batches = images.endless(source(data.train), 24, workers=0, pinned=False)
        found = [next(batches) for _ in range(5)]
        assert {len(batch) for batch in found} == {parts}
        assert {tuple(batch[0].shape) for batch in found} == {(24, 3, 32, 32)}


def test_workers_draw_differently(data):
    batches = images.endless(images.Bytes(data.train), 16, workers=2, pinned=False)
    rows = [next(batches)[2].tolist() for _ in range(4)]
    assert len({tuple(row) for row in rows}) == 4


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="it is installed")
def test_torchvision_is_said_to_be_missing(data):
    assert images.torchvision_images(data.train) is None
    assert train.prepare(training.original("cpu", 0, torchvision=True), NET, 8, data, "cpu", 0.01) is None


@pytest.mark.parametrize("method", training.METHODS)
def test_the_plain_step_is_that_of_flatmin(method):
    assert agreement.difference_in_double(NET, method, "cpu") < 1e-6


def test_a_step_that_stays_where_it_climbed_is_seen(monkeypatch):
    monkeypatch.setattr(training.PlainLoop, "second_step", lambda self: self.base.step())
    assert not all(gate.passed for gate in agreement.gates(NET, "cpu"))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_setting_takes_the_plain_update(data, compiled):
    """Compiling takes minutes."""
    x = images.AUGMENT.apply(data.train.x[:16], images.CIFAR10, images.AUGMENT.draw(16, torch.Generator()))
    config = training.config_of(NET, "sam", 16, "cpu")
    reference = training.Plain(config, data, images.Bytes(data.train), workers=0)
    for kind in [kind for kind in train.kinds("cpu") if ("compile" in kind.name) == compiled]:
        arm = kind.build(NET, "sam", 16, data)
        arm.run(2)
        difference, cosine = agreement.beside_plain(arm, reference, x, data.train.y[:16])
        assert cosine > (train.SAME_WAY if kind.exact else train.SAME_WAY_ROUNDED), kind.name
        assert kind.exact == (difference < 0.03), kind.name


def test_running_statistics_are_those_of_the_first_pass(data):
    x, y = torch.randn(8, 3, 32, 32), data.train.y[:8]
    after = {}
    for method in training.METHODS:
        config = training.config_of(NET, method, 8, "cpu")
        arm = training.Plain(config, data, images.Bytes(data.train), workers=0)
        arm.update(x, y)
        after[method] = [m.running_mean for m in arm.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(torch.equal(a, b) for a, b in zip(*after.values(), strict=True))


# -- the device's rate


def test_operations_of_a_gradient_are_counted_by_image():
    model = nn.Sequential(nn.Linear(10, 5, bias=False), nn.Linear(5, 2, bias=False))
    # Forward twice, the gradients of both weights, and that of the second layer's input.
    assert peak.operations(model, torch.randn(4, 10)) == 2 * (2 * 10 * 5 + 3 * 5 * 2)
    assert all(p.grad is None for p in model.parameters())


# -- what follows from samples


def running(name="flatmin, float32", windows=((1.0, 2.0, 1.0),) * 4, cosine=1.0, **kind):
    made = training.Kind(name, lambda *a: None, "float32", **{"ours": name.startswith("flatmin"), **kind})
    beside = {method: (0.0, cosine) for method in training.METHODS}
    return train.Running(made, {}, updates=10, samples=[list(w) for w in windows], beside=beside)


def reported(*runs, device="cpu", net="resnet18"):
    result = BenchmarkResult("train")
    train.report(net, 100, device, list(runs), 1e9, {"float32": 1e12}, "original", result)
    return result


def test_times_of_an_epoch_shares_and_ratios():
    result = reported(running("original", [(4.0, 8.0, 4.0)] * 4), running())
    epochs, more = result.tables
    assert [row[0] for row in epochs.rows] == ["flatmin, float32", "original"]
    assert epochs.rows[0][1:5] == ["1,000", "50.00", "500", "100.00"]
    assert epochs.rows[0][5] == "2.000 [2.00-2.00]"
    assert more.rows[0][5:] == ["100.0% of float32", "100.0% of float32", "4.000 [4.00-4.00]", "4.000 [4.00-4.00]"]
    assert all(len(row) == len(table.headers) for table in result.tables for row in table.rows)
    assert [gate.passed for gate in result.gates] == [True] * 3


@pytest.mark.parametrize(
    ("windows", "value", "passed"),
    [
        ([(1.0, 2.0, 1.0)] * 4, "2.000", True),
        ([(1.0, 2.1, 1.0)] * 4, "2.100", False),
        ([(1.0, 1.9, 1.0), (1.0, 2.05, 1.0), (1.0, 2.1, 1.0), (1.0, 2.0, 1.0)], "inconclusive", True),
        ([(1.0, 3.0, c) for c in (0.7, 0.9, 1.2, 1.6)], "inconclusive", True),
    ],
)
def test_sam_beside_sgd_is_judged_where_the_spread_allows_it(windows, value, passed):
    gate = reported(running(windows=windows)).gates[-1]
    assert (gate.value, gate.passed) == (value, passed)


@pytest.mark.parametrize(
    ("exact", "cosine", "passed"), [(True, 0.998, False), (False, 0.998, True), (False, 0.9, False)]
)
def test_another_update_is_a_failed_gate(exact, cosine, passed):
    assert reported(running(cosine=cosine, exact=exact)).gates[0].passed == passed


@pytest.mark.parametrize(("window", "passed"), [((0.0298, 0.029, 0.0298), True), ((0.2, 0.4, 0.2), False)])
def test_a_gpu_is_held_against_the_original_and_the_target(window, passed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    old = running("original, 2 workers", [(0.5, 1.0, 0.5)] * 3)
    gates = {g.name: g.passed for g in reported(old, running(windows=[window] * 3), device="cuda").gates}
    name = "flatmin, float32 over original, 2 workers: {}, resnet18"
    assert gates["epoch of SAM, ResNet-18, H200"] == passed
    assert [gates[name.format(method)] for method in training.METHODS] == [passed] * 2


def test_the_order_of_a_gpu_puts_the_headline_and_its_rival_first():
    names = [kind.name for kind in train.kinds("cuda")]
    assert names[:2] == ["flatmin, bf16 + channels_last + graph", "original, 2 workers"]
    assert len(set(names)) == len(names)


# -- the command


@pytest.mark.slow
def test_a_run_leaves_tables_and_samples(tmp_path, capsys):
    path = tmp_path / "runs.jsonl"
    small = [
        "--net",
        NET,
        "--pipeline-nets",
        NET,
        "--batch",
        "8",
        "--samples",
        "64",
        "--window",
        "0.01",
        "--rounds",
        "2",
    ]
    assert main(["train", "--whole", "2", *small, "--json", str(path)]) == 0
    said = capsys.readouterr().out
    for words in (
        "feed over update",
        "epochs of 64 images of `flatmin train`",
        "flatmin, bf16 + channels_last",
        "Of a",
    ):
        assert words in said
    raw = json.loads(path.read_text())["raw"]
    assert len(raw[f"{NET}, original"]["windows"]) == 2
    assert len(raw[f"pipeline, {NET}, sam"]) == 2


def test_shares_of_the_time_sum_to_one_and_name_what_ran():
    conv, head, x = nn.Conv2d(8, 8, 3), nn.Linear(14, 3), torch.randn(4, 8, 16, 16)
    shares = peak.shares(lambda: head(conv(x).relu()).square().backward(torch.ones(4, 8, 14, 3)))
    assert sum(shares.values()) == pytest.approx(1.0)
    assert min(shares[kind] for kind in ("convolutions", "ReLU", "matrix products", "copies and zeros")) > 0.0
    assert "normalisation" not in shares


def test_a_part_that_fails_leaves_the_others(monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("planted\nmore")

    monkeypatch.setitem(train.PARTS, "pipeline", broken)
    monkeypatch.setitem(train.PARTS, "epoch", lambda options, data, result, deadline: result.notes.append("ran"))
    monkeypatch.setattr(agreement, "gates", lambda net, device: [])
    options = Namespace(
        seconds=1.0,
        over="plain, bf16",
        device="cpu",
        quick=True,
        net=NET,
        pipeline_nets=None,
        rounds=2,
        window=None,
        whole=None,
        samples=64,
    )
    with pytest.raises(SystemExit, match=r"--over 'plain bf16' is none of the settings: flatmin, float32; .*original"):
        train.run(Namespace(**{**vars(options), "over": "plain bf16"}, parts=["epoch"]))
    result = train.run(Namespace(**vars(options), parts=["pipeline", "epoch"]))
    assert result.gates == [Gate("pipeline", "RuntimeError: planted", "runs", False)]
    assert result.notes == ["ran"]
    assert "planted" in capsys.readouterr().err


def test_a_setting_that_fails_leaves_the_others(data, monkeypatch):
    def refuses(*args):
        raise ValueError("planted")

    bad = training.Kind("flatmin, planted", refuses, "float32", ours=True)
    monkeypatch.setattr(train, "kinds", lambda device: [bad, training.plain("cpu", 0, autocast=False)])
    options = Namespace(
        device="cpu", net=NET, batch=8, quick=True, arms=None, compile=False, over="original", window=0.01, rounds=2
    )
    result = BenchmarkResult("train")
    train.epochs(options, data, result, float("inf"))
    assert "flatmin, planted: not available: ValueError: planted" in result.notes
    assert [row[0] for row in result.tables[0].rows] == ["plain, float32"]
