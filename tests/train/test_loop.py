import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flatmin.measure.curvature import Hessian, dense
from flatmin.measure.problem import Problem
from flatmin.methods import METHODS
from flatmin.train import evaluate
from flatmin.train.config import RunConfig, derive_seed
from flatmin.train.feed import Batch
from flatmin.train.loop import train
from flatmin.train.trainer import Trainer

OWN = "tests.methods.test_own_parts"


def config(**changes):
    usual = {
        "method": "sam",
        "rho": 0.1,
        "epochs": 3,
        "batch_size": 16,
        "noise": 0.3,
        "data": "tests.user_side:data",
        "model": "tests.user_side:net",
        "measure": True,
        "selection": "last",
        "test_every": 1,
    }
    return RunConfig(**{**usual, **changes})


def batch_of(trainer, first, last):
    index = torch.arange(first, last)
    return Batch(trainer.data.train.x[index], trainer.data.train.y[index], index)


def run(**changes):
    lines = []
    result = train(config(**changes), on_epoch=lines.append)
    return result, lines


def without_time(result, lines):
    plain = {**vars(result), "seconds": None}
    return plain, [{**vars(line), "seconds": None, "images_per_second": None} for line in lines]


@pytest.mark.parametrize("model", ["net", "dropping"])
def test_same_configuration_same_numbers_bit_for_bit(model):
    name = f"tests.user_side:{model}"
    torch.manual_seed(1)
    first = without_time(*run(model=name))
    torch.manual_seed(2)
    assert without_time(*run(model=name)) == first
    assert without_time(*run(model=name, seed=1)) != first


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    run()
    assert torch.equal(torch.get_rng_state(), before)


def test_methods_with_one_seed_are_paired():
    one, two = Trainer(config()), Trainer(config(method="sgd", rho=None))
    assert all(torch.equal(p, q) for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True))
    assert torch.equal(one.data.train.y, two.data.train.y)
    for _ in range(3):
        pairs = list(zip(one.batches(), two.batches(), strict=True))
        for a, b in pairs:
            one.step(a)
            assert torch.equal(a.index, b.index) and torch.equal(a.x, b.x)
        assert [len(a) for a, _ in pairs] == [16, 16, 16, 2]
        assert sorted(torch.cat([a.index for a, _ in pairs]).tolist()) == list(range(50))


def test_sgd_is_the_plain_loop():
    trainer = Trainer(config(method="sgd", rho=None))
    result, _ = run(method="sgd", rho=None)
    data = trainer.data
    base = torch.optim.SGD(trainer.model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for epoch in range(3):
        base.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * epoch / 3))
        for batch in trainer.batches():
            base.zero_grad()
            F.cross_entropy(trainer.model(batch.x), batch.y).backward()
            base.step()
    assert result.train_ce == pytest.approx(
        evaluate.score(trainer.model, data, data.train, trainer.config).loss, rel=1e-6
    )


def test_what_is_recorded():
    result, lines = run()
    assert [line.epoch for line in lines] == [1, 2, 3]
    assert [line.lr for line in lines] == pytest.approx([0.1, 0.075, 0.025])
    assert {line.rho for line in lines} == {0.1}
    assert all(0 <= line.memorised <= 100 and line.seconds > 0 for line in lines)
    assert result.last == {
        k: getattr(lines[-1], k) for k in ("epoch", "test_acc", "val_acc", "memorised", "train_loss")
    }
    assert result.gradient_evaluations == 2
    assert result.seconds == pytest.approx(sum(line.seconds for line in lines))
    assert result.trained
    assert result.failure is None
    assert result.lambda_max["converged"]
    assert result.lambda_max["residual"] <= 1e-2


def test_the_best_epoch_is_chosen_on_validation():
    result, lines = run(epochs=6)
    best = max(lines, key=lambda line: (line.val_acc, -line.val_loss, -line.epoch))
    assert result.best == {"epoch": best.epoch, "test_acc": best.test_acc, "val_acc": best.val_acc}


def test_plain_sgd_reports_no_radius_and_no_noise_no_memory():
    result, lines = run(method="sgd", rho=None, noise=0.0)
    assert result.rho is None
    assert result.last["memorised"] is None
    assert lines[0].rho is None


def test_curvature_is_that_of_the_last_weights():
    trainer = Trainer(config(method="sgd", rho=None))
    for _ in range(3):
        for batch in trainer.batches():
            trainer.step(batch)
    found = evaluate.sharpness(trainer.model, trainer.data)
    full = dense(Hessian(Problem(trainer.model, F.cross_entropy, (trainer.data.train.x, trainer.data.train.y))))
    assert found["value"] == pytest.approx(torch.linalg.eigvalsh(full.double())[-1].item(), rel=1e-3)
    assert found["converged"] and found["residual"] <= 1e-2


def test_a_net_that_only_guesses_has_not_trained():
    result, _ = run(lr=0.0, rho=0.0)
    assert not result.trained
    assert result.untrained.endswith(f"chance level ({result.train_ce:.3f}; chance is {result.chance:.3f})")


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (
            35.0,
            "has not learned: the training loss of the kept weights is above chance level (35.000; chance is 2.303)",
        ),
        (2.3, "has not learned: the training loss of the kept weights is at chance level (2.300; chance is 2.303)"),
        (
            2.2,
            "has hardly learned: the training loss of the kept weights is just below chance level (2.200; chance is "
            "2.303)",
        ),
    ],
)
def test_chance_level_is_said_only_of_a_loss_that_is_there(loss, words):
    result, _ = run(lr=0.0, rho=0.0, epochs=1)
    assert dataclasses.replace(result, train_ce=loss, chance=math.log(10)).untrained == words
    assert dataclasses.replace(result, train_ce=loss, trained=True).untrained is None


@pytest.mark.parametrize("method", ["sgd", "sam"])
def test_a_run_that_blows_up_says_so(method):
    result, lines = run(method=method, rho=None if method == "sgd" else 0.1, lr=1e30)
    assert "not finite" in result.failure
    assert not result.trained
    assert result.last is result.best is result.train_ce is result.lambda_max is None
    assert len(lines) < 3


def normed():
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))


@pytest.mark.parametrize("name", [*(name for name in METHODS if name != "imbsam"), "vasso+asam"])
def test_every_method_runs(name):
    own = {"momentum": 0.0, "weight_decay": 0.0} if name == "bsam" else {}
    result, _ = run(method=name, rho=0.05, epochs=1, measure=False, model="tests.train.test_loop:normed", **own)
    assert result.failure is None
    assert result.lambda_max is None


def test_a_model_without_the_layers_is_refused_with_a_sentence():
    with pytest.raises(ValueError, match=r"^Layers: no layer matches '.*'; the trained layers are Linear\.$"):
        Trainer(config(method="sam-on"))


def test_closures_that_are_no_parts_of_a_batch_are_not_made_of_one():
    with pytest.raises(
        ValueError, match=r"^imbsam takes one closure each for the head and the tail of the classes, wh"
    ):
        Trainer(config(method="imbsam", micro_batches=2))


def by_hand(trainer, pieces):
    """The weights after one step of the same optimizer on these pieces of a batch."""
    twin = Trainer(trainer.config)
    twin.optimizer.step([lambda k=k, piece=piece: twin._closure(k, [piece]) for k, piece in enumerate(pieces)])
    return list(twin.model.parameters())


@pytest.mark.parametrize(
    ("samples", "parts", "sizes"), [(16, 4, [4, 4, 4, 4]), (16, 3, [6, 5, 5]), (2, 4, [1, 1]), (16, 1, [16])]
)
def test_a_batch_is_divided_into_equal_micro_batches(samples, parts, sizes):
    trainer = Trainer(config(method="micro-sam", micro_batches=parts))
    ends = list(itertools.accumulate(sizes))
    pieces = [batch_of(trainer, last - size, last) for size, last in zip(sizes, ends, strict=True)]
    trainer.step(batch_of(trainer, 0, samples))
    assert all(map(torch.equal, trainer.model.parameters(), by_hand(trainer, pieces)))


def test_one_micro_batch_is_sam():
    micro, plain = Trainer(config(method="micro-sam", micro_batches=1)), Trainer(config())
    for first in (0, 16):
        micro.step(batch_of(micro, first, first + 16))
        plain.step(batch_of(plain, first, first + 16))
    for a, b in zip(micro.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("words", [{"method": "sam-db"}, {"method": "swapped", "plugins": (OWN,)}])
def test_the_probe_climbs_on_the_batch_before_and_at_first_on_its_own(words):
    """The built-in one, and a part of one's own that declares two batches."""
    probe, plain = Trainer(config(**words)), Trainer(config())
    first, second = batch_of(probe, 0, 16), batch_of(probe, 16, 32)
    probe.step(first)
    plain.step(first)
    assert all(map(torch.equal, probe.model.parameters(), plain.model.parameters()))
    expected = probe.optimizer.step  # the list that the loop hands over
    seen = []
    probe.optimizer.step = lambda closures: seen.append(closures) or expected(closures)
    loss = probe.step(second).loss
    assert [c.args[1] for c in seen[0]] == [[first], [second]]
    assert loss.isfinite()


def test_parts_are_told_the_length_of_the_training():
    # 50 samples in batches of 16 are 4 updates an epoch.
    assert Trainer(config(method="late", epochs=5)).recipe.schedule.total == 20
    assert Trainer(config(method="late", params={"when.total": 7})).recipe.schedule.total == 7
    assert Trainer(config(method="ssam-d+ae-sam")).recipe.mask.total == 12


def test_a_rule_that_decides_by_value_reports_what_it_took():
    result, _ = run(method="ae-sam", rho=0.05, measure=False)
    assert 1 <= result.gradient_evaluations <= 2
    assert result.gradient_evaluations * 12 == pytest.approx(round(result.gradient_evaluations * 12), abs=0.1)
    assert run(method="every-k", rho=0.05, measure=False)[0].gradient_evaluations == pytest.approx(1.2)


def test_parameters_of_parts_reach_the_recipe():
    assert Trainer(config(method="vasso", params={"direction.theta": 0.5})).recipe.direction.theta == 0.5
    with pytest.raises(ValueError, match="theta"):
        Trainer(config(params={"theta": 0.5}))


def test_streams_differ_by_purpose_and_seed():
    seeds = {derive_seed(seed, purpose) for seed in range(20) for purpose in ("model", "noise", "order", "engine")}
    assert len(seeds) == 80
    assert max(seeds) < 2**63
