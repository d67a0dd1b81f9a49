"""Which methods a CUDA graph of one update can serve; the graphs themselves are tested where there is a GPU."""

import inspect

import pytest
import torch

from flatmin import methods as parts
from flatmin.data.dataset import Data, Split
from flatmin.data.images import Statistics
from flatmin.methods import METHODS, compose
from flatmin.optim.support import capture_refusal
from flatmin.train.config import RunConfig
from flatmin.train.folder import RunFolder
from flatmin.train.loop import train
from flatmin.train.numerics import numerics
from flatmin.train.options import Options
from flatmin.train.trainer import Trainer

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TRAINED = [name for name in METHODS if not compose(name).inner_loop.closures_for]
CAPTURABLE = [name for name in TRAINED if capture_refusal(compose(name)) is None]


def every_part():
    found = [parts.Part]
    for kind in found:
        found += kind.__subclasses__()
    return [kind for kind in found if kind.__module__.startswith("flatmin.")]


def test_a_part_that_reads_the_number_of_the_update_says_so():
    reading = [kind for kind in every_part() if "c.step" in inspect.getsource(kind)]
    assert reading and all(kind.step_dependent for kind in reading)


def test_the_plain_ones_can_be_captured():
    assert {"sgd", "sam", "asam", "vasso", "fsam", "bisam-log", "usam", "gsam"} <= set(CAPTURABLE)


def test_others_are_refused_with_the_reason():
    for method, words in [
        ("looksam", "depends on the number of the update"),
        ("late", "depends on the number of the update"),
        ("rsam", "needs random numbers"),
        ("ae-sam", "depends on the number"),
        ("sam-db", "ascends on the previous batch"),
        ("sam+rho-lr", "needs the learning rate"),
    ]:
        assert words in (capture_refusal(compose(method)) or "")


def images():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(256) % 4
    x = (torch.randint(0, 100, (256, 3, 8, 8), generator=g) + 30 * y.view(-1, 1, 1, 1)).to(torch.uint8)
    split = Split(x, y)
    return Data(split, split, split, num_classes=4, statistics=Statistics.of(x))


def dropping():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4), torch.nn.Dropout(0.5))


def config(**changes):
    usual = {"method": "sam", "rho": 0.05, "batch_size": 32, "epochs": 3, "device": "cuda", "model": "resnet20"}
    return RunConfig(**{**usual, "data": "tests.train.test_graph:images", **changes})


def final_weights(**changes):
    torch.manual_seed(0)
    wanted = config(deterministic=True, **changes)
    with numerics(wanted):
        trainer = Trainer(wanted)
        losses = [trainer.step(batch).loss.item() for _ in range(3) for batch in trainer.batches()]
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()]), losses, trainer


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("method", CAPTURABLE)
def test_a_captured_run_is_the_run(method):
    rho = None if not compose(method).ascends else 0.05
    plain, losses, before = final_weights(method=method, rho=rho)
    captured, seen, trainer = final_weights(method=method, rho=rho, graph=True)
    assert seen == pytest.approx(losses, rel=1e-4)
    torch.testing.assert_close(captured, plain, rtol=1e-3, atol=1e-5)
    assert trainer.gradients == before.gradients
    assert trainer.optimizer.counts() == before.optimizer.counts()


@on_gpu
@pytest.mark.gpu
def test_the_learning_rate_moves_in_a_captured_run():
    plain, _, _ = final_weights(schedule_unit="step")
    captured, _, trainer = final_weights(schedule_unit="step", graph=True)
    torch.testing.assert_close(captured, plain, rtol=1e-3, atol=1e-5)
    assert float(trainer.optimizer.param_groups[0]["lr"]) < 0.01


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 48},  # the last batch of an epoch is another one
        {"precision": "bf16", "channels_last": True, "nesterov": True},
        {"ema": 0.9},
        {"nonfinite": "skip"},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_a_whole_captured_run_is_the_run(tmp_path, changes):
    """With evaluations, lines of steps and their diagnostics in between."""
    ends = []
    for graph in (False, True):
        folder = RunFolder(tmp_path / str(graph))
        wanted = config(deterministic=True, graph=graph, test_every=1, **changes)
        result = train(wanted, folder=folder, options=Options(log_every=1, diagnostics=True, checkpoint_every=0))
        assert result.failure is None
        ends.append((torch.load(folder.weights, weights_only=True), folder.steps(), folder.lines()))
    for name, value in ends[0][0].items():
        torch.testing.assert_close(ends[1][0][name], value, rtol=2e-2 if "precision" in changes else 1e-3, atol=1e-3)
    for plain, captured in zip(ends[0][1], ends[1][1], strict=True):
        assert plain.keys() == captured.keys()
        assert captured["gradient_norm"] == pytest.approx(plain["gradient_norm"], rel=0.05)


@on_gpu
@pytest.mark.gpu
def test_a_captured_run_goes_on_from_a_checkpoint(tmp_path):
    class Stop(Exception):
        pass

    def stop(line):
        if line.epoch == 2:
            raise Stop

    wanted, folder = config(deterministic=True, graph=True), RunFolder(tmp_path / "stopped")
    train(wanted, folder=RunFolder(tmp_path / "whole"))
    with pytest.raises(Stop):
        train(wanted, folder=folder, on_epoch=stop)
    train(wanted, folder=folder, resume=True)
    whole, gone_on = (
        torch.load(RunFolder(tmp_path / name).weights, weights_only=True) for name in ("whole", "stopped")
    )
    for name, value in whole.items():
        torch.testing.assert_close(gone_on[name], value, rtol=1e-3, atol=1e-5)


@on_gpu
@pytest.mark.gpu
def test_dropout_is_refused():
    trainer = Trainer(config(model="tests.train.test_graph:dropping", graph=True))
    with pytest.raises(ValueError, match="draws random numbers"):
        for batch in trainer.batches():
            trainer.step(batch)


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{"precision": "fp16"}, {"method": "looksam"}])
def test_what_cannot_be_captured_is_refused(changes):
    with pytest.raises(ValueError, match="graph=true does not support"):
        Trainer(config(graph=True, **changes))
