"""What the options of an update do, against references by hand in double precision."""

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flatmin.data.augment import Augment
from flatmin.data.dataset import Data, Split
from flatmin.data.images import Statistics
from flatmin.train.config import RunConfig
from flatmin.train.feed import Batch
from flatmin.train.loop import train
from flatmin.train.options import Options
from flatmin.train.trainer import Trainer
from tests.helpers import cosine, soft_targets

HERE = "tests.train.test_steps"


def images():
    """Bytes of 3 x 8 x 8 in three classes that can be told apart."""
    g = torch.Generator().manual_seed(0)
    centres = torch.randint(60, 200, (3, 3, 8, 8), generator=g)
    parts = []
    for n in (50, 20, 30):
        y = torch.arange(n) % 3
        parts.append(Split((centres[y] + torch.randint(-50, 51, (n, 3, 8, 8), generator=g)).to(torch.uint8), y))
    return Data(
        *parts, num_classes=3, statistics=Statistics.of(parts[0].x), augment=Augment(crop=1, cutout=3, cutout_p=0.5)
    )


def smooth():
    """No BatchNorm, and no kinks at which rounding could choose another side."""
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def layered():
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3))


def normed():
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))


def dropping():
    return nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Dropout(0.5), nn.Linear(64, 3))


def convolving():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.Flatten()),
        nn.Linear(32, 3),
    )


def config(**changes):
    """Two epochs of four updates."""
    usual = {
        "method": "sgd",
        "epochs": 2,
        "batch_size": 16,
        "data": "tests.user_side:data",
        "model": f"{HERE}:smooth",
        "selection": "last",
    }
    return RunConfig(**{**usual, **changes})


def steps(trainer, epochs=None):
    """The whole training; batches and what each update saw."""
    found = []
    for _ in range(epochs or trainer.config.epochs):
        for batch in trainer.batches():
            trainer.net.train()
            found.append((batch, trainer.step(batch)))
    return found


@dataclass
class Seen:
    """An update by hand: loss at w, loss at w + eps, samples that were right at w."""

    loss: float
    perturbed: float
    right: int


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def train_by_hand(run, loss, base, *, rho=None, clip=None, rate=None):
    """The training of a configuration in float64, with torch alone.

    Args:
        run: its initialisation and its batches are taken.
        loss: of outputs and labels.
        base: the optimizer for a list of weights.
        rho: of SAM; None for none.
        clip: norm of the gradient that the base takes.
        rate: learning rate of update k; default: the base's own.

    Returns:
        The model, and what each update saw.
    """
    source = Trainer(run)
    model = copy.deepcopy(source.model).double().train()
    weights = list(model.parameters())
    optimizer = base(weights)
    seen = []
    for _ in range(run.epochs):
        for batch in source.batches():
            x, y = batch.x.double(), batch.y
            output = model(x)
            at_w = at_moved = loss(output, y)
            grads = gradient(model, at_w)
            if rho is not None:
                norm = torch.sqrt(sum(g.square().sum() for g in grads))
                kept = [w.detach().clone() for w in weights]
                with torch.no_grad():
                    for w, g in zip(weights, grads, strict=True):
                        w += rho * g / norm
                at_moved = loss(model(x), y)
                gradient(model, at_moved)
                with torch.no_grad():
                    for w, old in zip(weights, kept, strict=True):
                        w.copy_(old)
            if clip is not None:
                nn.utils.clip_grad_norm_(weights, clip)
            if rate is not None:
                optimizer.param_groups[0]["lr"] = rate(len(seen))
            optimizer.step()
            seen.append(Seen(at_w.item(), at_moved.item(), int((output.argmax(1) == y).sum())))
    return model, seen


def sgd(**options):
    return lambda weights: torch.optim.SGD(weights, **{"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, **options})


def check(run, loss=F.cross_entropy, base=None, **options):
    """The trainer's weights and numbers are those by hand."""
    trainer = Trainer(run)
    found = steps(trainer)
    model, seen = train_by_hand(run, loss, base or sgd(), rho=run.rho, **options)
    for one, two in zip(trainer.model.parameters(), model.parameters(), strict=True):
        assert torch.allclose(one.double(), two, rtol=1e-4, atol=1e-5)
    for (batch, step), by_hand in zip(found, seen, strict=True):
        assert step.loss.item() == pytest.approx(by_hand.loss, rel=1e-4)
        assert (int(step.right), step.samples) == (by_hand.right, len(batch))
        if run.rho is None:
            assert step.perturbed is None
        else:
            assert step.perturbed.item() == pytest.approx(by_hand.perturbed, rel=1e-4)


CONSTANT = {"schedule": "constant"}
BOTH = pytest.mark.parametrize("method", [{}, {"method": "sam", "rho": 0.1}], ids=["sgd", "sam"])


def uniform(output, y, smoothing=0.2):
    return -(soft_targets(y, 3, smoothing) * output.log_softmax(1)).sum(1).mean()


def others(output, y, smoothing=0.2):
    """The divergence from a target that has 1 - s on the true class and s / (K - 1) on each other one."""
    target = torch.full((len(y), 3), smoothing / 2, dtype=torch.float64)
    target[torch.arange(len(y)), y] = 1 - smoothing
    return (target * (target.log() - output.log_softmax(1))).sum(1).mean()


@BOTH
class TestAgainstByHand:
    def test_cross_entropy(self, method):
        check(config(**CONSTANT, **method))

    @pytest.mark.parametrize("form", ["uniform", "others"])
    def test_label_smoothing(self, method, form):
        loss = {"uniform": uniform, "others": others}[form]
        check(config(**CONSTANT, **method, label_smoothing=0.2, smoothing=form), loss)

    def test_without_smoothing_both_forms_are_cross_entropy(self, method):
        check(config(**CONSTANT, **method, smoothing="others"))

    def test_clipping(self, method):
        check(config(**CONSTANT, **method, clip_norm=0.05), clip=0.05)

    def test_nesterov(self, method):
        check(config(**CONSTANT, **method, nesterov=True), base=sgd(nesterov=True))

    def test_neither_momentum_nor_decay(self, method):
        run = config(**CONSTANT, **method, momentum=0.0, weight_decay=0.0)
        check(run, base=sgd(momentum=0.0, weight_decay=0.0))

    @pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
    def test_adam(self, method, name, kind):
        run = config(**CONSTANT, **method, optimizer=name, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)
        check(run, base=lambda weights: kind(weights, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1))

    def test_a_schedule(self, method):
        run = config(**method, warmup=0.5, schedule_unit="step")

        def rate(k):
            return 0.1 * (k + 1) / 2 if k < 2 else 0.1 * cosine(k - 2, 6)

        check(run, rate=rate)

    def test_accumulation(self, method):
        check(config(**CONSTANT, **method, accumulate=4))


class TestLabelSmoothing:
    def test_the_forms_differ(self):
        one, two = (Trainer(config(label_smoothing=0.2, smoothing=form)) for form in ("uniform", "others"))
        for trainer in (one, two):
            steps(trainer)
        assert not torch.allclose(one.model[0].weight, two.model[0].weight, rtol=1e-3)

    def test_it_is_of_the_training_loss_alone(self):
        """What is evaluated is plain cross-entropy."""
        trainer = Trainer(config(label_smoothing=0.2))
        steps(trainer)
        result = train(config(label_smoothing=0.2))
        with torch.no_grad():
            loss = F.cross_entropy(trainer.model(trainer.data.train.x), trainer.data.train.y).item()
        assert result.train_ce == pytest.approx(loss, rel=1e-5)


class TestAccumulation:
    @pytest.mark.parametrize(
        ("method", "parts"),
        [
            *(("sam", parts) for parts in (2, 3, 16)),
            *(("vasso", 4), ("bisam-log", 3), ("asam", 2), ("gsam", 4), ("sgdhess", 3), ("n-step", 16), ("ae-sam", 2)),
        ],
    )
    def test_parts_are_the_batch_that_they_make(self, method, parts):
        """Also a last batch of two samples, which has fewer parts than asked for, and parts of unequal size."""
        whole, divided = (
            Trainer(config(method=method, rho=0.1, accumulate=k, label_smoothing=0.1, model=f"{HERE}:layered"))
            for k in (1, parts)
        )
        for (batch, one), (_, two) in zip(steps(whole), steps(divided), strict=True):
            assert two.loss.item() == pytest.approx(one.loss.item(), rel=1e-4)
            assert (two.perturbed is None) is (one.perturbed is None)
            if one.perturbed is not None:
                assert two.perturbed.item() == pytest.approx(one.perturbed.item(), rel=1e-4)
            assert (int(two.right), two.samples) == (int(one.right), len(batch))
        assert divided.gradient_evaluations == whole.gradient_evaluations
        for one, two in zip(whole.model.parameters(), divided.model.parameters(), strict=True):
            assert torch.allclose(one, two, rtol=1e-4, atol=1e-5)

    def test_every_part_goes_through_the_model_once_a_pass(self):
        trainer = Trainer(config(method="sam", rho=0.1, accumulate=4))
        sizes = []
        trainer.model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
        for batch in trainer.batches():
            trainer.step(batch)
        assert sizes == [4] * 8 * 3 + [1] * 4

    def test_both_passes_see_the_same_masks(self):
        trainer = Trainer(config(method="sam", rho=0.1, accumulate=4, model=f"{HERE}:dropping"))
        masks = []
        trainer.model[2].register_forward_hook(lambda module, inputs, output: masks.append(output == 0))
        trainer.step(next(trainer.batches()))
        assert len(masks) == 8
        assert all(map(torch.equal, masks[:4], masks[4:]))
        assert not torch.equal(masks[0], masks[1])

    def test_a_method_that_chooses_samples_chooses_in_each_part(self):
        """So here, and only here, the parts are not the batch that they make."""
        chosen = []
        for parts in (1, 4):
            trainer = Trainer(config(method="esam", rho=0.1, accumulate=parts, params={"mask.beta": 1.0}))
            steps(trainer)
            chosen.append(trainer.model[0].weight)
        assert not torch.allclose(*chosen, rtol=1e-3)

    @pytest.mark.parametrize(
        ("method", "words"),
        [
            ("micro-sam", r"^micro-sam already splits each batch \(micro_batches=4\); leave out accumulate\.$"),
            ("sam-db", r"^sam-db uses another batch for the ascent; leave out accumulate\.$"),
        ],
    )
    def test_methods_that_take_batches_of_their_own(self, method, words):
        with pytest.raises(ValueError, match=words):
            Trainer(config(method=method, rho=0.1, accumulate=2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 7}, r"^the last batch of an epoch has one sample, and .* drop_last=true, or another"),
        ({"batch_size": 7, "drop_last": True}, None),
        ({"accumulate": 2}, r"^the last batch of an epoch has one sample in a part, and"),
        ({"accumulate": 16, "drop_last": True}, r"^each batch has one sample in a part, .* set a larger batch_size"),
        ({"method": "micro-sam"}, r"^the last batch of an epoch has one sample in a part"),
        ({"method": "esam"}, r"^the last batch of an epoch has one sample chosen by esam, and"),
        ({"method": "esam", "accumulate": 5, "drop_last": True}, r"^each batch has one sample in a part chosen by"),
        ({"method": "esam", "batch_size": 46}, None),
    ],
)
def test_batches_too_small_for_their_own_statistics(changes, words):
    """50 samples; the refusals are of what torch itself would refuse within the first epoch."""
    asked = config(model=f"{HERE}:normed", rho=0.1, **changes)
    if words is None:
        steps(Trainer(asked), 1)
        return
    with pytest.raises(ValueError, match=words):
        Trainer(asked)
    trainer = Trainer(config(rho=0.1, **changes))
    trainer.model.insert(1, nn.BatchNorm1d(16))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        steps(trainer, 1)


class TestMicroBatches:
    @pytest.mark.parametrize("parts", [1, 2, 4])
    def test_by_hand(self, parts):
        """Every part climbs on its own gradient; the base takes the mean of theirs at their own points."""
        run = config(method="micro-sam", rho=0.1, micro_batches=parts, drop_last=True, **CONSTANT)
        trainer, source = Trainer(run), Trainer(run)
        found = steps(trainer)
        model = copy.deepcopy(source.model).double()
        weights = list(model.parameters())
        base = sgd()(weights)
        losses = []
        for _ in range(2):
            for batch in source.batches():
                total, values = [torch.zeros_like(w) for w in weights], []
                for x, y in zip(batch.x.double().chunk(parts), batch.y.chunk(parts), strict=True):
                    at_w = F.cross_entropy(model(x), y)
                    values.append(at_w.item())
                    g = gradient(model, at_w)
                    norm = torch.sqrt(sum(part.square().sum() for part in g))
                    kept = [w.detach().clone() for w in weights]
                    with torch.no_grad():
                        for w, part in zip(weights, g, strict=True):
                            w += 0.1 * part / norm
                    for t, part in zip(total, gradient(model, F.cross_entropy(model(x), y)), strict=True):
                        t += part / parts
                    with torch.no_grad():
                        for w, old in zip(weights, kept, strict=True):
                            w.copy_(old)
                for w, t in zip(weights, total, strict=True):
                    w.grad = t
                base.step()
                losses.append(sum(values) / parts)
        for one, two in zip(trainer.model.parameters(), weights, strict=True):
            assert torch.allclose(one.double(), two, rtol=1e-4, atol=1e-5)
        assert [step.loss.item() for _, step in found] == pytest.approx(losses, rel=1e-4)
        assert all(step.samples == 16 and 0 <= int(step.right) <= 16 for _, step in found)


class TestAverage:
    @pytest.mark.parametrize("method", ["sgd", "sam"])
    def test_by_hand(self, method):
        """Parameters and floating-point buffers are averaged from the first update on; counters are copied."""
        trainer = Trainer(config(method=method, rho=None if method == "sgd" else 0.1, ema=0.9, model=f"{HERE}:normed"))
        expected = None
        for _ in range(2):
            for batch in trainer.batches():
                trainer.step(batch)
                now = {name: tensor.double() for name, tensor in trainer.model.state_dict().items()}
                expected = now if expected is None else {k: 0.9 * expected[k] + 0.1 * now[k] for k in now}
        found = trainer.average.state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            if name.endswith("num_batches_tracked"):
                assert tensor == trainer.model.state_dict()[name] == 8
            else:
                assert torch.allclose(tensor.double(), expected[name], rtol=1e-5, atol=1e-7), name
        assert not torch.allclose(found["0.weight"], trainer.model[0].weight)

    def test_it_is_put_in_and_taken_out_again(self):
        trainer = Trainer(config(ema=0.5))
        with trainer.average.applied():
            pass  # before the first update there is none
        steps(trainer, 1)
        before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        kept = trainer.average.state_dict()
        with pytest.raises(ZeroDivisionError), trainer.average.applied():
            assert all(torch.equal(tensor, kept[name]) for name, tensor in trainer.model.state_dict().items())
            raise ZeroDivisionError
        assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())

    def test_the_training_does_not_see_it(self):
        one, two = Trainer(config(method="sam", rho=0.1, ema=0.9)), Trainer(config(method="sam", rho=0.1))
        for trainer in (one, two):
            steps(trainer)
        assert all(map(torch.equal, one.model.parameters(), two.model.parameters()))


def rates(**changes):
    """The learning rate at which the optimizer did each update."""
    trainer = Trainer(config(method="sam", rho=0.05, epochs=6, batch_size=25, **changes))
    found, step = [], trainer.optimizer.step
    trainer.optimizer.step = lambda closure: found.append(trainer.optimizer.param_groups[0]["lr"]) or step(closure)
    steps(trainer)
    return found


def by_torch(scheduler, per_step=False):
    """Those of a scheduler of torch, for 6 epochs of 2 updates."""
    base = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    made, found = scheduler(base), []
    for _ in range(6):
        for update in range(2):
            found.append(base.param_groups[0]["lr"])
            base.step()
            if per_step or update == 1:
                made.step()
    return found


class TestSchedulesReachTheOptimizer:
    @pytest.mark.parametrize(
        ("changes", "scheduler"),
        [
            ({}, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 6)),
            ({"lr_min": 0.01}, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 6, eta_min=0.01)),
            (
                {"schedule": "multistep", "milestones": (2, 5)},
                lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 5], gamma=0.1),
            ),
            ({"schedule": "exponential", "gamma": 0.8}, lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.8)),
            ({"schedule": "constant"}, lambda o: torch.optim.lr_scheduler.ConstantLR(o, factor=1.0)),
            ({"schedule": "linear"}, lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=6)),
        ],
    )
    def test_by_epoch(self, changes, scheduler):
        assert rates(**changes) == pytest.approx(by_torch(scheduler))

    @pytest.mark.parametrize(
        ("changes", "scheduler"),
        [
            ({}, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12)),
            ({"schedule": "linear"}, lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=12)),
        ],
    )
    def test_by_step(self, changes, scheduler):
        assert rates(schedule_unit="step", **changes) == pytest.approx(by_torch(scheduler, per_step=True))

    def test_warm_up_by_step(self):
        expected = [0.02 + 0.08 * k / 3 for k in (1, 2, 3)] + [0.1 * cosine(k, 9) for k in range(9)]
        assert rates(schedule_unit="step", warmup=1.5, warmup_lr=0.02) == pytest.approx(expected)

    def test_warm_up_by_epoch(self):
        expected = [0.05, 0.1] + [0.1 * cosine(k, 4) for k in range(4)]
        assert rates(warmup=2.0) == pytest.approx([one for one in expected for _ in range(2)])

    def test_diminishing(self):
        expected = [0.1 / (epoch + 1) for epoch in range(6)]
        assert rates(schedule="diminish1") == pytest.approx([one for one in expected for _ in range(2)])

    def test_a_radius_in_proportion_follows(self):
        """rho-lr: rho_t / rho = lr_t / lr."""
        trainer = Trainer(config(method="rho-lr", rho=0.2, epochs=2), diagnostics=True)
        norms = []
        for batch in [*trainer.batches(), *trainer.batches()]:
            trainer.step(batch)
            norms.append(trainer.optimizer.diagnostics()["epsilon_norm"])
        assert norms == pytest.approx([0.2] * 4 + [0.1] * 4, rel=1e-4)

    def test_options_that_do_not_go_together(self):
        """The schedule's own refusals, of which test_schedule.py has all, for every setting that reaches it."""
        for changes, words in (
            ({"schedule": "multistep"}, r"^multistep needs milestones: whole epochs in increasing order from 1 to 5"),
            ({"milestones": (2,)}, r"^cosine does not use milestones"),
            ({"gamma": 0.5}, r"^cosine does not use gamma"),
            ({"as_coded": True}, r"^cosine does not use as_coded"),
            ({"warmup": 6.0}, r"^warmup must be shorter than the training of 6 epochs"),
            ({"warmup_lr": 0.1}, r"^warmup_lr = 0\.1 has no effect without a warm-up"),
            ({"lr_min": 0.5}, r"^lr_min must be at most lr = 0\.1"),
            ({"schedule": "diminish1", "schedule_unit": "step"}, r"^diminish1 is defined by epoch"),
        ):
            with pytest.raises(ValueError, match=words):
                Trainer(config(epochs=6, **changes))


class TestPrecision:
    @pytest.mark.parametrize(
        ("method", "precision"),
        [("sgd", "fp16"), ("sam", "bf16"), ("vasso+bisam-log+asam", "bf16"), ("vasso+bisam-log+asam", "fp16")],
    )
    def test_it_trains_and_weights_stay_float32(self, precision, method):
        rho = None if method == "sgd" else 0.1
        kinds = []
        trainer = Trainer(config(method=method, rho=rho, precision=precision, epochs=4, model=f"{HERE}:normed"))
        trainer.model[0].register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
        found = [step.loss.item() for _, step in steps(trainer)]
        assert set(kinds) == {torch.bfloat16 if precision == "bf16" else torch.float16}
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        assert sum(found[-4:]) < 0.8 * sum(found[:4])
        assert (trainer.scaler is not None) is (precision == "fp16")

    def test_bf16_by_hand(self):
        run = config(precision="bf16", drop_last=True, **CONSTANT)
        trainer, source = Trainer(run), Trainer(run)
        steps(trainer)
        base = sgd()(list(source.model.parameters()))
        for _ in range(2):
            for batch in source.batches():
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    output = source.model(batch.x)
                base.zero_grad()
                F.cross_entropy(output.float(), batch.y).backward()
                base.step()
        for one, two in zip(trainer.model.parameters(), source.model.parameters(), strict=True):
            assert torch.allclose(one, two, rtol=1e-6, atol=1e-7)

    def test_fp16_takes_the_gradient_of_the_unscaled_loss(self):
        """The scaler's factor is nowhere in the weights, nor in the clipping, nor in the reported loss."""
        runs = [
            config(method="sam", rho=0.1, precision=kind, clip_norm=0.5, **CONSTANT) for kind in ("fp16", "float32")
        ]
        (half, a), (full, b) = ((trainer := Trainer(run), steps(trainer)) for run in runs)
        assert half.scaler.get_scale() == 65536.0
        for one, two in zip(half.model.parameters(), full.model.parameters(), strict=True):
            assert torch.allclose(one, two, atol=5e-3)
        assert [s.loss.item() for _, s in a] == pytest.approx([s.loss.item() for _, s in b], rel=1e-2)

    def test_a_scale_that_overflows_is_halved_and_the_update_left_out(self):
        trainer = Trainer(config(precision="fp16"))
        trainer.scaler.update(2.0**40)
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.step(next(trainer.batches()))
        assert all(map(torch.equal, before, trainer.model.parameters()))
        assert trainer.scaler.get_scale() < 2.0**40


class TestFormats:
    @pytest.mark.parametrize("method", ["sgd", "sam"])
    def test_channels_last_is_the_same_up_to_rounding(self, method):
        runs = [
            config(
                method=method,
                rho=None if method == "sgd" else 0.05,
                data=f"{HERE}:images",
                model=f"{HERE}:convolving",
                channels_last=last,
            )
            for last in (False, True)
        ]
        plain, last = map(Trainer, runs)
        for trainer in (plain, last):
            seen = steps(trainer)
        assert seen[0][0].x.is_contiguous(memory_format=torch.channels_last)
        assert last.model[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert not plain.model[0].weight.is_contiguous(memory_format=torch.channels_last)
        for one, two in zip(plain.model.state_dict().values(), last.model.state_dict().values(), strict=True):
            assert torch.allclose(one, two, rtol=1e-3, atol=1e-4)

    def test_points_have_no_format(self):
        trainer = Trainer(config(channels_last=True))
        steps(trainer)
        plain = Trainer(config())
        steps(plain)
        assert all(map(torch.equal, trainer.model.parameters(), plain.model.parameters()))

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, on its way to the compiler
    def test_compiled_is_the_same_up_to_rounding(self):
        runs = [
            config(method="vasso+bisam-log", rho=0.05, compile=one, model=f"{HERE}:normed") for one in (False, True)
        ]
        plain, compiled = map(Trainer, runs)
        pairs = list(zip(steps(plain), steps(compiled), strict=True))
        assert all(a.loss.item() == pytest.approx(b.loss.item(), rel=1e-4) for (_, a), (_, b) in pairs)
        for one, two in zip(plain.model.state_dict().values(), compiled.model.state_dict().values(), strict=True):
            assert torch.allclose(one, two, rtol=1e-4, atol=1e-5)
        assert list(compiled.model.state_dict()) == list(plain.model.state_dict()), "names without a prefix"


class TestWhatAnEpochAddsUpTo:
    def lines(self, run, **options):
        told = []
        train(run, options=Options(**{"log_every": 1, **options}), on_event=told.append)
        kinds = {name: [e for e in told if type(e).__name__ == name] for name in ("Stepped", "EpochEnded")}
        return [event.line for event in kinds["EpochEnded"]], kinds["Stepped"]

    @BOTH
    def test_losses_and_hits(self, method):
        run = config(**CONSTANT, **method)
        lines, _ = self.lines(run)
        _, seen = train_by_hand(run, F.cross_entropy, sgd(), rho=run.rho)
        for line, own in zip(lines, (seen[:4], seen[4:]), strict=True):
            assert line.train_loss == pytest.approx(sum(one.loss for one in own) / 4, rel=1e-4)
            assert line.train_acc == pytest.approx(100 * sum(one.right for one in own) / 50)
            if run.rho is None:
                assert line.perturbed_loss is None
            else:
                assert line.perturbed_loss == pytest.approx(sum(one.perturbed for one in own) / 4, rel=1e-4)
                assert line.perturbed_loss > line.train_loss

    @pytest.mark.parametrize(
        "changes", [{}, {"method": "sam"}, {"method": "sam-db"}, {"accumulate": 4}, {"drop_last": True}]
    )
    def test_images_per_second(self, changes):
        """Every image of the epoch counts once, whatever is done with it."""
        rho = 0.1 if "method" in changes else None
        lines, stepped = self.lines(config(rho=rho, **changes))
        images = 48 if "drop_last" in changes else 50
        for line in lines:
            assert line.seconds > 0 and line.images_per_second == pytest.approx(images / line.seconds)
        assert sum(event.images for event in stepped) == 2 * images
        assert all(event.seconds > 0 for event in stepped)
        assert sum(event.seconds for event in stepped) <= sum(line.seconds for line in lines)

    @pytest.mark.parametrize("method", ["n-step", "micro-sam", "momentum-sam", "stale-sam", "sgdhess"])
    def test_a_perturbed_loss_is_of_exactly_two_passes(self, method):
        lines, _ = self.lines(config(method=method, rho=0.05))
        assert all(line.perturbed_loss is None for line in lines)

    def test_hits_are_on_augmented_images(self):
        run = config(data=f"{HERE}:images", model=f"{HERE}:convolving", lr=0.0)
        source = Trainer(run)
        source.model.train()
        right = sum(int((source.model(b.x).argmax(1) == b.y).sum()) for b in source.batches())
        assert self.lines(run)[0][0].train_acc == pytest.approx(100 * right / 50)


def test_a_step_by_itself_takes_a_batch_of_ones_own():
    trainer = Trainer(config(method="sam", rho=0.1))
    data = trainer.data.train
    step = trainer.step(Batch(data.x[:5], data.y[:5], torch.arange(5)))
    assert step.samples == 5 and math.isfinite(step.loss.item())
