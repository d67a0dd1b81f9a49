"""What is recorded of a model, against loops by hand."""

import math

import pytest
import torch
from torch import nn

from flatmin.data.augment import Augment
from flatmin.data.dataset import Data, Split
from flatmin.data.images import Statistics
from flatmin.data.noise import symmetric_noise
from flatmin.train import evaluate
from flatmin.train.config import RunConfig
from flatmin.train.evaluate import Chance, Scores, batches, logits, memorised, score
from flatmin.train.processes import World


def config(**changes):
    return RunConfig(**{"method": "sgd", **changes})


def images(n=37, classes=8):
    """Bytes with an augmentation, which no evaluation may use."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=g)
    part = Split(x, torch.randint(classes, (n,), generator=g))
    augment = Augment(crop=2, cutout=4, cutout_p=1.0)
    return Data(part, part, part, num_classes=classes, statistics=Statistics.of(x), augment=augment)


def points(n=37, classes=3):
    g = torch.Generator().manual_seed(0)
    part = Split(torch.randn(n, 6, generator=g), torch.randint(classes, (n,), generator=g))
    return Data(part, part, part, num_classes=classes)


def net(classes=8):
    """With everything that behaves differently in training."""
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(216, classes)
    )
    made[1].running_mean.uniform_(-0.1, 0.1)
    made[1].running_var.uniform_(0.5, 1.5)
    return made


def outputs_by_hand(model, data, split, *, mirrored=False):
    """One sample after the other in eval mode."""
    mean = torch.tensor(data.statistics.mean).view(1, -1, 1, 1)
    std = torch.tensor(data.statistics.std).view(1, -1, 1, 1)
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    rows = []
    with torch.no_grad():
        for x in split.x:
            x = (x.unsqueeze(0) / 255 - mean) / std
            rows.append((model(x) + model(x.flip(3))) / 2 if mirrored else model(x))
    for module, flag in flags:
        module.training = flag
    return torch.cat(rows)


def scores_by_hand(output, y, classes):
    loss = right = among = 0.0
    for row, label in zip(output.double().tolist(), y.tolist(), strict=True):
        loss += math.log(sum(math.exp(value) for value in row)) - row[label]
        order = sorted(range(classes), key=lambda k: -row[k])
        right += order[0] == label
        among += label in order[:5]
    n = len(y)
    return Scores(loss=loss / n, acc=100 * right / n, top5=100 * among / n if classes > 5 else None)


def close(one, two, tolerance=1e-5):
    """Accuracies of one and the same predictions are equal, losses up to rounding."""
    assert one.loss == pytest.approx(two.loss, rel=tolerance)
    assert one.acc == pytest.approx(two.acc, abs=1e-9)
    assert one.top5 == (None if two.top5 is None else pytest.approx(two.top5, abs=1e-9))


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_against_a_loop_by_hand(mirrored, channels_last):
    data, model = images(), net()
    found = score(model, data, data.test, config(flip_tta=mirrored, channels_last=channels_last))
    expected = scores_by_hand(outputs_by_hand(model, data, data.test, mirrored=mirrored), data.test.y, 8)
    close(found, expected)
    assert 0 < found.acc < found.top5 < 100


def test_the_mirrored_image_changes_the_answer_and_points_have_none():
    data, model = images(), net()
    assert score(model, data, data.test, config(flip_tta=True)) != score(model, data, data.test, config())
    flat, line = points(), nn.Linear(6, 3)
    assert score(line, flat, flat.test, config(flip_tta=True)) == score(line, flat, flat.test, config())


@pytest.mark.parametrize(("classes", "known"), [(3, False), (5, False), (6, True), (8, True)])
def test_top_5_with_more_than_five_classes_only(classes, known):
    data = images(classes=classes)
    found = score(net(classes), data, data.test, config())
    assert (found.top5 is not None) is known
    close(found, scores_by_hand(outputs_by_hand(net(classes), data, data.test), data.test.y, classes))


def test_chunks_of_any_size(monkeypatch):
    data, model = images(), net()
    whole = score(model, data, data.test, config())
    for size in (1, 2, 5, 36, 37, 38, 1000):
        close(score(model, data, data.test, config(), size=size), whole)
        monkeypatch.setitem(evaluate.CHUNK, "cpu", size)
        close(score(model, data, data.test, config()), whole)


@pytest.mark.parametrize(("processes", "size"), [(2, 10), (3, 10), (5, 10), (4, 37)])
def test_processes_share_the_chunks(processes, size, monkeypatch):
    """The sum over all is that of one process; also one that has no share computes, as sharded models need."""
    data, model = images(), net()
    shares, calls = [], []
    monkeypatch.setattr(World, "sum_", lambda self, values: shares.append(values.clone()) or values)
    for rank in range(processes):
        count = []
        hook = model.register_forward_hook(lambda *args, count=count: count.append(1))
        score(model, data, data.test, config(), World(rank, processes), size=size)
        hook.remove()
        calls.append(len(count))
    loss, right, among = (sum(shares) / 37).tolist()
    close(Scores(loss=loss, acc=100 * right, top5=100 * among), score(model, data, data.test, config(), size=size))
    assert len(set(calls)) == 1


class TestUntouched:
    @pytest.mark.parametrize("training", [True, False])
    def test_weights_buffers_flags_gradients_and_random_state(self, training):
        data, model = images(), net().train(training)
        model[3].eval()
        model[0].weight.grad = torch.ones_like(model[0].weight)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state = torch.get_rng_state()
        score(model, data, data.test, config(flip_tta=True))
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert [module.training for module in model] == [training] * 3 + [False] + [training] * 2
        assert model.training is training
        assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
        assert torch.equal(torch.get_rng_state(), state)

    def test_also_after_an_error(self):
        data, model = images(), net()
        model[5] = nn.Linear(3, 8)
        with pytest.raises(RuntimeError):
            score(model, data, data.test, config())
        assert all(module.training for module in model.modules())


class TestMemorised:
    def test_share_of_the_wrong_labels_that_come_back(self):
        data, model = images(), net()
        noisy = data.train.y.clone()
        wrong = torch.arange(0, 37, 3)
        predicted = outputs_by_hand(model, data, data.train).argmax(1)
        noisy[wrong] = (noisy[wrong] + 1) % 8
        noisy[wrong[:4]] = predicted[wrong[:4]]
        given = data.with_labels(noisy)
        at = given.wrong
        expected = 100 * (predicted[at] == noisy[at]).double().mean().item()
        assert memorised(model, given, config()) == pytest.approx(expected)
        assert 0 < expected < 100

    def test_none_without_wrong_labels(self):
        data = images()
        assert memorised(net(), data, config()) is None
        assert memorised(net(), data.with_labels(data.train.y.clone()), config()) is None


class TestPrecision:
    def test_bf16_is_close_to_float32(self):
        data, model = images(200), net()
        one, two = (score(model, data, data.test, config(precision=kind)) for kind in ("float32", "bf16"))
        assert two.loss == pytest.approx(one.loss, rel=1e-2) and two.loss != one.loss
        assert two.acc == pytest.approx(one.acc, abs=3.0)

    @pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
    def test_answers_are_float32(self, precision):
        data = images()
        found = logits(net().eval(), data.inputs(data.test.x), config(precision=precision))
        assert found.dtype == torch.float32
        kinds = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        with torch.autocast("cpu", dtype=kinds[precision], enabled=precision != "float32"), torch.no_grad():
            expected = net().eval()(data.inputs(data.test.x)).float()
        assert torch.equal(found, expected)

    def test_large_losses_are_added_up_in_double(self):
        """Single precision would lose what small losses add to a large one."""
        n = 4000
        part = Split(torch.cat([torch.full((1, 2), 1e8), torch.zeros(n - 1, 2)]), torch.ones(n, dtype=torch.int64))
        data = Data(part, part, part, num_classes=2)
        line = nn.Linear(2, 2)
        with torch.no_grad():
            line.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
            line.bias.zero_()
        assert score(line, data, part, config()).loss * n == pytest.approx(1e8 + (n - 1) * math.log(2), rel=1e-12)


def test_batches_are_all_samples_in_order():
    data = images()
    parts = list(batches(data, data.train, 10))
    assert [len(y) for _, y in parts] == [10, 10, 10, 7]
    assert torch.equal(torch.cat([y for _, y in parts]), data.train.y)
    assert torch.equal(torch.cat([x for x, _ in parts]), data.inputs(data.train.x))


def test_curvature_is_that_of_the_whole_training_part():
    """By power iteration on the Hessian of the mean loss, built row by row; images are normalised and not augmented."""
    data = images(24, classes=3)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    found = evaluate.sharpness(model, data)
    x = data.inputs(data.train.x).flatten(1).double()
    p = model.double()(data.inputs(data.train.x).double()).softmax(1).detach()
    full = torch.zeros(3 * 193, 3 * 193, dtype=torch.float64)
    for row, share in zip(x, p, strict=True):
        a = torch.cat([row, torch.ones(1, dtype=torch.float64)])
        full += torch.kron(torch.diag(share) - torch.outer(share, share), torch.outer(a, a)) / len(x)
    assert found["value"] == pytest.approx(torch.linalg.eigvalsh(full)[-1].item(), rel=1e-3)
    assert found["converged"]


def labelled(counts, wrong=0.0):
    """Data with so many samples of each class; of those, the first share of the labels is moved to the next class."""
    y = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    noisy = symmetric_noise(y, wrong, len(counts), seed=0)
    data = Data(*[Split(torch.zeros(len(y), 2), y)] * 3, num_classes=len(counts))
    return data.with_labels(noisy) if wrong else data


def scored(loss, acc):
    return Scores(loss=loss, acc=acc, top5=None)


def test_chance_is_the_best_constant_answer():
    """Of frequent classes it is far below log K, and a network that has found the frequencies has learned nothing."""
    for counts in ((50, 50), (90, 10), (10, 20, 70, 0)):
        data = labelled(counts)
        constant = nn.Linear(2, len(counts), bias=True)
        nn.init.zeros_(constant.weight)
        shares = torch.tensor(counts) / sum(counts)
        constant.bias.data = (shares + 1e-12).log()
        found, chance = score(constant, data, data.train, config()), Chance.of(data, config())
        assert (chance.loss, chance.acc) == pytest.approx((found.loss, found.acc), rel=1e-5)
        assert chance.least == 0.0 and not chance.beaten(found)
        assert chance.beaten(scored(0.94 * chance.loss, chance.acc)) and not chance.beaten(scored(9.0, chance.acc))
        assert chance.beaten(scored(9.0, (chance.acc + 100) / 2 + 1)), "sure of itself, and mostly right"
        assert not chance.beaten(scored(math.inf, 100.0)) and not chance.beaten(scored(math.nan, 0.0))
    one = Chance.of(labelled((5,)), config())
    assert one.beaten(scored(0.0, 100.0)) and one.loss == 0


@pytest.mark.parametrize("smoothing", ["uniform", "others"])
@pytest.mark.parametrize(("noise", "share"), [(0.0, 0.0), (0.8, 0.0), (0.0, 0.8), (0.8, 0.5)])
def test_what_wrong_labels_and_smoothing_leave_is_no_failure_to_learn(noise, share, smoothing):
    """The right classes with the best probabilities under the smoothed loss, against an average over the labels."""
    data, k = labelled((1000,) * 10, noise), 10
    run = config(noise=noise, label_smoothing=share, smoothing=smoothing)
    off = share / k if smoothing == "uniform" else share / (k - 1)
    target = torch.full((k, k), off).fill_diagonal_(1 - (k - 1) * off)
    clean = data.train.y if data.clean is None else data.clean
    best = torch.stack([target[data.train.y[clean == c]].mean(0) for c in range(k)])
    loss = float(-best[clean, data.train.y].log().mean())
    chance = Chance.of(data, run)
    assert chance.least == pytest.approx(loss, rel=2e-3)
    assert chance.beaten(scored(loss, 0.0)) and not chance.beaten(scored(chance.loss, 0.0))
