"""Which methods a CUDA graph of one update can serve; the graphs themselves are tested where there is a GPU."""

import inspect

import pytest
import torch

from flatmin import parts
from flatmin.data.base import Data, Split
from flatmin.data.images import Statistics
from flatmin.engine.serving import capture_refusal
from flatmin.recipes import METHODS, compose
from flatmin.train.config import RunConfig
from flatmin.train.trainer import Trainer

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CAPTURABLE = [name for name in METHODS if capture_refusal(compose(name)) is None]


def every_part():
    found = [parts.Part]
    for kind in found:
        found += kind.__subclasses__()
    return [kind for kind in found if kind.__module__.startswith("flatmin.")]


@pytest.mark.parametrize("kind", every_part(), ids=lambda kind: kind.__name__)
def test_a_part_that_reads_the_number_of_the_update_says_so(kind):
    reads = "c.step" in inspect.getsource(kind)
    assert kind.counts or not reads


def test_the_plain_ones_can_be_captured():
    assert {"sgd", "sam", "asam", "vasso", "fsam", "bisam-log", "usam", "gsam"} <= set(CAPTURABLE)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("looksam", "depends on the number of the update"),
        ("late", "depends on the number of the update"),
        ("rsam", "needs random draws"),
        ("ae-sam", "depends on the number"),
        ("sam-db", "climbs on the batch before"),
        ("sam+rho-lr", "needs the learning rate"),
    ],
)
def test_others_are_refused_with_the_reason(method, words):
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
    trainer = Trainer(config(deterministic=True, **changes))
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
def test_dropout_is_refused():
    trainer = Trainer(config(model="tests.train.test_graph:dropping", graph=True))
    with pytest.raises(ValueError, match="draws random numbers"):
        for batch in trainer.batches():
            trainer.step(batch)


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{"precision": "fp16"}, {"method": "looksam"}])
def test_what_cannot_be_captured_is_refused(changes):
    with pytest.raises(ValueError, match="graph=true cannot serve"):
        Trainer(config(graph=True, **changes))
