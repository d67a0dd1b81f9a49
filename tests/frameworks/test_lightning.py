"""Lightning, plain and with the mixin, against loops written by hand."""

import itertools
import logging
import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import flatmin
from tests.helpers import ENTRY_POINTS, drive, noisy_net, same_bits

L = pytest.importorskip("lightning", reason="needs lightning: run make test-frameworks")
from lightning.fabric import Fabric  # noqa: E402
from lightning.fabric.plugins import MixedPrecision as FabricMixedPrecision  # noqa: E402
from lightning.pytorch.callbacks import Callback  # noqa: E402
from lightning.pytorch.plugins.precision import MixedPrecision  # noqa: E402

from flatmin.integrations.lightning import SharpnessAware  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error:the passes of one step")]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
METHODS = ("sam", "vasso", "gsam", "looksam", "every-k", "bernoulli", "ae-sam", "sgd", "n-step", "sgdhess", "micro-sam")
WITH_CRITERION = ("bisam-log", "esam", "bisam-log+every-k", "esam+every-k")
MOVED_FIRST = ("momentum-sam", "stale-sam", "rsam")


def plain_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def loader(size, n=48):
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(n, 6, generator=g), torch.randint(3, (n,), generator=g)
    return DataLoader(TensorDataset(x, y), batch_size=size)


def optimizer_of(model, method="sam", **options):
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return flatmin.wrap(base, method, rho=0.1, model=model, **options)


class Plain(L.LightningModule):
    def __init__(self, method="sam", net=noisy_net, **options):
        super().__init__()
        self.net, self.method, self.options = net(), method, options
        self.criterion = flatmin.Criterion(nn.CrossEntropyLoss())
        self.outputs, self.passes = [], []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        self.passes.append(batch_idx)
        loss = self.criterion(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.outputs.append((outputs["loss"].item(), self.trainer.callback_metrics["loss"].item()))

    def configure_optimizers(self):
        return optimizer_of(self, self.method, criterion=self.criterion, **self.options)


class Net(SharpnessAware, Plain):
    pass


def test_the_mixin_on_the_right_of_the_module_is_refused():
    with pytest.raises(TypeError, match=r"write class Wrong\(SharpnessAware, LightningModule\)"):
        type("Wrong", (Plain, SharpnessAware), {})


def fit(module, size=8, *, epochs=1, ckpt=None, validate=False, **options):
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", **{**QUIET, **options})
    torch.manual_seed(7)
    trainer.fit(module, loader(size), loader(size) if validate else None, ckpt_path=ckpt)
    return trainer


def by_hand(method="sam", n=1, *, size=8, clip=None, net=noisy_net, dtype=None, scaler=None):
    """The loop that accumulates n batches in every pass; the net, and the loss at w of each step."""
    model = net()
    criterion = flatmin.Criterion(nn.CrossEntropyLoss())
    optimizer = optimizer_of(model, method, scaler=scaler, criterion=criterion)
    torch.manual_seed(7)
    batches, losses = iter(loader(size)), []
    while held := list(itertools.islice(batches, n)):
        for evaluation in optimizer.passes(len(held) if method == "micro-sam" else 1):
            with evaluation:
                chunk = evaluation.chunk
                for x, y in held if chunk is None else [held[chunk]]:
                    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                        loss = criterion(model(x), y)
                    loss = loss / n * (1 if chunk is None else len(held))
                    optimizer.backward(loss if scaler is None else scaler.scale(loss))
                    if evaluation.index == 0:
                        losses.append(loss.item())
        if scaler is not None:
            scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    return model, losses, optimizer


def same(a, b):
    return same_bits(a.state_dict(), b.state_dict())


def apart(a, b):
    return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters(), strict=True))


class TestWithoutGlue:
    """One batch a step: Lightning calls `step(closure)`, and that is enough."""

    @pytest.mark.parametrize("method", ("sam", "vasso", "every-k", *MOVED_FIRST, "n-step"))
    def test_trains_as_the_loop(self, method):
        module = Plain(method)
        fit(module)
        assert same(module.net, by_hand(method)[0])

    def test_bf16(self):
        module = Plain(net=plain_net)
        fit(module, precision="bf16-mixed")
        assert same(module.net, by_hand(net=plain_net, dtype=torch.bfloat16)[0])

    def test_clipping_is_of_each_pass(self):
        module = Plain()
        fit(module, gradient_clip_val=0.3)
        assert apart(module.net, by_hand(clip=0.3)[0]) < 1e-6, "SAM's eps does not see the length of g"
        module = Plain("gsam")
        fit(module, gradient_clip_val=0.3)
        assert apart(module.net, by_hand("gsam", clip=0.3)[0]) > 1e-4, "but u of GSAM is not what was clipped"

    def test_clip_norm_is_of_what_the_base_takes(self):
        module = Plain("gsam", clip_norm=0.3)
        fit(module)
        assert apart(module.net, by_hand("gsam", clip=0.3)[0]) < 1e-6

    def test_accumulation_needs_the_mixin(self):
        """What docs/loops/lightning.md warns of: Lightning's closure is that of the last batch alone."""
        module = Plain()
        with pytest.warns(UserWarning, match="drops the gradients that were there before it"):
            fit(module, accumulate_grad_batches=3)
        assert apart(module.net, by_hand(n=3)[0]) > 1e-3

    def test_fp16_is_refused(self):
        with pytest.raises(RuntimeError, match="does not know the scaler"):
            fit(Plain(), plugins=[MixedPrecision("16-mixed", "cpu")])

    def test_the_train_and_eval_swap(self):
        """`train()` through the wrapper; the closure that Lightning gives to step() then runs at w + eps."""

        class Swapped(Plain):
            def on_train_start(self):
                self.optimizers().train()

            def on_train_end(self):
                self.optimizers().eval()

        module = Swapped("momentum-sam", plain_net)
        assert fit(module).global_step == 6 and len(module.passes) == 6
        model, optimizer = plain_net(), None
        optimizer = optimizer_of(model, "momentum-sam")
        optimizer.train()
        for x, y in loader(8):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        optimizer.eval()
        assert same(module.net, model)


class Manual(Plain):
    """A module that drives its optimizers itself, by one entry point."""

    automatic_optimization = False

    def __init__(self, *args, door="closure", clip=None, decay=1.0, setup=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.door, self.clip, self.decay, self.setup_optimizer, self.hooks = door, clip, decay, setup, []

    def backward_of(self, batch):
        self.passes.append(batch)
        loss = self.criterion(self(batch[0]), batch[1])
        self.manual_backward(loss)
        return loss

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        if self.clip is None:
            drive(optimizer, lambda: self.backward_of(batch), self.door)
        else:
            for evaluation in optimizer.passes():
                with evaluation:
                    self.backward_of(batch)
            self.clip_gradients(optimizer, self.clip, "norm")
            optimizer.step()
        self.lr_schedulers().step()

    def on_before_optimizer_step(self, optimizer):
        assert any(p.grad is not None for p in self.parameters())
        self.hooks.append(optimizer)

    def on_train_batch_end(self, *_):
        pass

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        if self.setup_optimizer is not None:
            self.setup_optimizer(self, optimizer)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, self.decay)]


def scaled(module, optimizer):
    """Give the optimizer the scaler of the precision plugin."""
    optimizer.scaler = module.trainer.precision_plugin.scaler


class TestManual:
    """`self.optimizers()` is Lightning's wrapper: its steps are counted, and the state is the optimizer's own.

    davda54/sam#31 and #42.
    """

    @pytest.mark.parametrize("door", ENTRY_POINTS)
    @pytest.mark.parametrize("method", ("sam", "vasso", "gsam", "ae-sam", "sgd"))
    def test_every_entry_point_trains_as_the_loop(self, method, door):
        module = Manual(method, door=door)
        trainer = fit(module)
        assert same(module.net, by_hand(method)[0])
        assert trainer.global_step == 6
        assert len(module.hooks) == (len(module.passes) if door == "closure" else 6), (
            "Lightning's hook is in its closure"
        )
        assert trainer.optimizers[0].counts()["updates"] == 6

    @pytest.mark.parametrize("method", (*MOVED_FIRST, "n-step"))
    def test_passes_and_closures_serve_every_method(self, method):
        for door in ("passes", "closure"):
            module = Manual(method, door=door)
            fit(module)
            assert same(module.net, by_hand(method)[0]), door

    @pytest.mark.parametrize("door", ENTRY_POINTS)
    def test_bf16_and_schedulers(self, door):
        modules = [Manual("gsam", plain_net, door=one, decay=0.5) for one in (door, "passes")]
        for module in modules:
            fit(module, precision="bf16-mixed")
        assert same(modules[0].net, modules[1].net)
        assert modules[0].trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**6)
        flat = Manual("gsam", plain_net, door=door)
        fit(flat, precision="bf16-mixed")
        assert same(flat.net, by_hand("gsam", net=plain_net, dtype=torch.bfloat16)[0])

    @pytest.mark.parametrize("scale", (2.0**10, 2.0**20))
    @pytest.mark.parametrize("door", ("perturbed", "two calls", "passes"))
    def test_fp16(self, door, scale):
        """With the larger scale the first steps overflow in fp16, and are skipped."""
        scalers = [torch.amp.GradScaler("cpu", init_scale=scale) for _ in range(2)]
        module = Manual(net=plain_net, door=door, setup=scaled)
        trainer = fit(module, plugins=[MixedPrecision("16-mixed", "cpu", scalers[0])])
        model, _, optimizer = by_hand(net=plain_net, dtype=torch.float16, scaler=scalers[1])
        assert same(module.net, model) and not same(model, plain_net())
        assert scalers[0].state_dict() == scalers[1].state_dict()
        assert trainer.optimizers[0].counts() == optimizer.counts()

    def test_fp16_takes_no_closure_and_wants_its_scaler(self):
        for setup, words in ((None, "does not know the scaler"), (scaled, "'16-mixed' does not pass a closure")):
            with pytest.raises(RuntimeError, match=words):
                fit(Manual(net=plain_net, setup=setup), plugins=[MixedPrecision("16-mixed", "cpu")])

    def test_clipping_is_of_what_the_base_takes(self):
        module = Manual("gsam", clip=0.3)
        fit(module)
        assert same(module.net, by_hand("gsam", clip=0.3)[0])

    def test_a_step_after_one_backward_says_what_is_missing(self):
        class Forgets(Manual):
            def training_step(self, batch, batch_idx):
                self.backward_of(batch)
                self.optimizers().step()

            def on_before_optimizer_step(self, optimizer):
                pass

        with pytest.raises(RuntimeError, match=r"step\(\) without a closure passes an empty one"):
            fit(Forgets())

    def test_a_closure_after_the_passes_is_refused(self):
        class Twice(Manual):
            def training_step(self, batch, batch_idx):
                optimizer = self.optimizers()
                self.backward_of(batch)
                with optimizer.perturbed():
                    self.backward_of(batch)
                optimizer.step(lambda: self.backward_of(batch))

        module = Twice()
        with pytest.raises(RuntimeError, match="the passes of this update are done"):
            fit(module)
        assert apart(module.net, noisy_net()) == 0

    def test_an_update_given_up_through_the_wrapper(self):
        class Gives(Manual):
            def training_step(self, batch, batch_idx):
                if batch_idx % 2 == 0:
                    optimizer = self.optimizers()
                    self.backward_of(batch)
                    optimizer.first_step()
                    with pytest.raises(RuntimeError, match="an update is under way"):
                        self.trainer.optimizers[0].state_dict()
                    optimizer.abort()
                else:
                    super().training_step(batch, batch_idx)

        module = Gives(net=plain_net, door="two calls")
        trainer = fit(module)
        model = plain_net()
        optimizer = optimizer_of(model)
        for x, y in list(loader(8))[1::2]:

            def backward(x=x, y=y):
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss

            drive(optimizer, backward)
        assert same(module.net, model) and trainer.global_step == 3

    def test_options_set_on_the_wrapper_are_the_optimizers(self):
        seen = []

        class Sets(Manual):
            def training_step(self, batch, batch_idx):
                wrapper, inside = self.optimizers(), self.optimizers().optimizer
                wrapper.clip_norm, wrapper.nonfinite = 0.3, "raise"
                wrapper.scaler = torch.amp.GradScaler("cpu", enabled=False)
                assert inside.clip_norm == wrapper.clip_norm == 0.3 and inside.nonfinite == "raise"
                assert inside.scaler is wrapper.scaler is not None
                assert isinstance(wrapper, flatmin.SAM) and wrapper.base is inside.base
                seen.append(repr(wrapper))
                super().training_step(batch, batch_idx)

        module = Sets("gsam", door="two calls")
        fit(module)
        assert len(seen) == 6
        assert apart(module.net, by_hand("gsam", clip=0.3)[0]) < 1e-6

    @pytest.mark.parametrize("toggled", (False, True))
    @pytest.mark.parametrize("door", ENTRY_POINTS)
    def test_two_optimizers(self, door, toggled):
        """A generator and a discriminator, each with SAM; with and without `toggle_optimizer`."""

        def backward(side, halves, x, run):
            for w in itertools.chain(*(h.parameters() for h in halves)):
                w.grad = None  # of the other side, and of the pass before
            fake = halves[0](x)
            real = F.softplus(-halves[1](x)).mean()
            loss = (
                F.softplus(-halves[1](fake)).mean() if side == 0 else real + F.softplus(halves[1](fake.detach())).mean()
            )
            run(loss)
            return loss

        def halves():
            torch.manual_seed(0)
            return nn.ModuleList([nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))])

        def both(parts):
            return [flatmin.SAM(torch.optim.Adam(h.parameters(), lr=0.01), rho=0.1) for h in parts]

        class Gan(L.LightningModule):
            automatic_optimization = False

            def __init__(self):
                super().__init__()
                self.halves = halves()

            def training_step(self, batch, _):
                for side, optimizer in enumerate(self.optimizers()):
                    if toggled:
                        self.toggle_optimizer(optimizer)
                    drive(optimizer, lambda s=side: backward(s, self.halves, batch[0], self.manual_backward), door)
                    if toggled:
                        self.untoggle_optimizer(optimizer)

            def configure_optimizers(self):
                return both(self.halves)

        module, parts = Gan(), halves()
        assert fit(module, epochs=2).global_step == 24
        optimizers = both(parts)
        for x, _ in itertools.chain(loader(8), loader(8)):
            for side, optimizer in enumerate(optimizers):
                drive(optimizer, lambda s=side, x=x: backward(s, parts, x, torch.Tensor.backward))
        assert apart(module.halves, parts) < 1e-6 and apart(parts, halves()) > 1e-2

    @pytest.mark.parametrize("door", ("two calls", "passes"))
    def test_resume_is_exact(self, door, tmp_path):
        whole, half, rest = (Manual("vasso", plain_net, door=door, decay=0.9) for _ in range(3))
        at_end = fit(whole, epochs=4)
        fit(half, epochs=2).save_checkpoint(tmp_path / "half.ckpt")
        resumed = fit(rest, epochs=4, ckpt=tmp_path / "half.ckpt")
        assert same(whole.net, rest.net) and not same(whole.net, half.net)
        assert same_bits(at_end.optimizers[0].state_dict(), resumed.optimizers[0].state_dict())

    def test_the_mixin_holds_no_batches_and_gives_the_scaler(self):
        class Mixed(SharpnessAware, Manual):
            pass

        scaler = torch.amp.GradScaler("cpu")
        module, plain = (kind("sgdhess", plain_net, door="passes") for kind in (Mixed, Manual))
        fit(module)
        assert module._window is None
        with pytest.raises(RuntimeError, match=r"optimizer\.backward\(loss\) instead of loss\.backward"):
            fit(plain)
        assert same(module.net, by_hand("sgdhess", net=plain_net)[0])
        module = Mixed(net=plain_net, door="two calls")
        trainer = fit(module, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        assert trainer.optimizers[0].scaler is scaler


class TestFabric:
    """Fabric's optimizer imitates the class likewise."""

    def trained(self, door, method="sam", *, net=noisy_net, **options):
        fabric = Fabric(accelerator="cpu", devices=1, **options)
        raw, criterion = net(), flatmin.Criterion(nn.CrossEntropyLoss())
        scaler = getattr(fabric._precision, "scaler", None)
        model, optimizer = fabric.setup(raw, optimizer_of(raw, method, criterion=criterion, scaler=scaler))
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 1.0)
        torch.manual_seed(7)
        for x, y in loader(8):

            def backward(x=x, y=y):
                loss = criterion(model(x), y)
                fabric.backward(loss)
                return loss

            drive(optimizer, backward, door)
            scheduler.step()
        return raw, optimizer, fabric

    @pytest.mark.parametrize("door", ENTRY_POINTS)
    @pytest.mark.parametrize("method", ("sam", "vasso", "gsam"))
    def test_every_entry_point_trains_as_the_loop(self, method, door):
        model, optimizer, _ = self.trained(door, method)
        assert same(model, by_hand(method)[0])
        assert optimizer.counts()["updates"] == 6

    def test_bf16(self):
        model, _, _ = self.trained("two calls", net=plain_net, precision="bf16-mixed")
        assert same(model, by_hand(net=plain_net, dtype=torch.bfloat16)[0])

    @pytest.mark.parametrize("door", ("perturbed", "passes"))
    @pytest.mark.parametrize("scale", (2.0**10, 2.0**20))
    def test_fp16(self, door, scale):
        scalers = [torch.amp.GradScaler("cpu", init_scale=scale) for _ in range(2)]
        model, optimizer, _ = self.trained(
            door, net=plain_net, plugins=[FabricMixedPrecision("16-mixed", "cpu", scalers[0])]
        )
        right, _, alone = by_hand(net=plain_net, dtype=torch.float16, scaler=scalers[1])
        assert same(model, right) and scalers[0].state_dict() == scalers[1].state_dict()
        assert optimizer.counts() == alone.counts()

    def test_checkpoints(self, tmp_path):
        model, optimizer, fabric = self.trained("two calls", "vasso")
        fabric.save(tmp_path / "a.ckpt", {"model": model, "optimizer": optimizer})
        again = noisy_net(3)
        _, other = fabric.setup(again, optimizer_of(again, "vasso"))
        fabric.load(tmp_path / "a.ckpt", {"model": again, "optimizer": other})
        assert same(model, again) and same_bits(optimizer.state_dict(), other.state_dict())


class TestScheduleFree:
    """The module calls `train()` and `eval()` of `self.optimizers()`. kozistr/pytorch_optimizer#334."""

    @pytest.mark.parametrize("form", ("closure", "mixin", "manual"))
    def test_validation_sees_the_average(self, form):
        schedulefree = pytest.importorskip("schedulefree")

        class Free:
            def configure_optimizers(self):
                base = schedulefree.AdamWScheduleFree(self.parameters(), lr=0.05)
                optimizer = flatmin.SAM(base, rho=0.1, model=self)
                return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)]

            def on_train_start(self):
                self.optimizers().train()
                self.seen = []

            def on_validation_start(self):
                self.optimizers().eval()

            def validation_step(self, batch, batch_idx):
                if not self.trainer.sanity_checking and batch_idx == 0:
                    self.seen.append([p.detach().clone() for p in self.net.parameters()])

            def on_validation_end(self):
                self.optimizers().train()

        kind = {"closure": Plain, "mixin": Net, "manual": Manual}[form]
        options = {"door": "two calls"} if form == "manual" else {}
        module = type("Module", (Free, kind), {})(net=plain_net, **options)
        fit(module, epochs=2, validate=True, val_check_interval=3)
        model = plain_net()
        base = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.05)
        optimizer = flatmin.SAM(base, rho=0.1)
        batches = [*loader(8), *loader(8)]
        for validated in range(4):
            base.train()
            for x, y in batches[3 * validated : 3 * validated + 3]:

                def closure(x=x, y=y):
                    optimizer.zero_grad()
                    loss = F.cross_entropy(model(x), y)
                    loss.backward()
                    return loss

                optimizer.step(closure)
            base.eval()
            assert all(torch.equal(p, q) for p, q in zip(module.seen[validated], model.parameters(), strict=True))
        assert len(module.seen) == 4


class TestMixin:
    @pytest.mark.parametrize("n", (1, 3, 4, 5))
    @pytest.mark.parametrize("method", METHODS + WITH_CRITERION)
    def test_trains_as_the_loop(self, method, n):
        module = Net(method)
        fit(module, accumulate_grad_batches=n, gradient_clip_val=0.3)
        assert same(module.net, by_hand(method, n, clip=0.3)[0])

    @pytest.mark.parametrize("n", (1, 3))
    @pytest.mark.parametrize("method", MOVED_FIRST)
    def test_trains_as_the_loop_where_pass_1_is_elsewhere(self, method, n):
        """Up to the statistics of BatchNorm, which are those of Lightning's own forward, at w."""
        module = Net(method)
        fit(module, accumulate_grad_batches=n)
        assert apart(module.net, by_hand(method, n)[0]) < 1e-6

    @pytest.mark.parametrize("method", ("sam", "vasso", "n-step", "momentum-sam"))
    def test_micro_batches_equal_the_batch(self, method):
        nets = []
        for size, n in ((24, 1), (8, 3), (4, 6)):
            nets.append(Net(method, plain_net))
            fit(nets[-1], size, accumulate_grad_batches=n, precision="64-true", epochs=3)
        assert apart(nets[0].net, nets[1].net) < 1e-13
        assert apart(nets[0].net, nets[2].net) < 1e-13
        assert apart(nets[0].net, plain_net().double()) > 1e-2

    def test_clipping_by_value_is_of_what_the_base_takes(self):
        seen = []

        class Look(Callback):
            def on_train_batch_end(self, trainer, module, *_):
                seen.append(max(p.grad.abs().max().item() for p in module.parameters()))

        fit(Net("gsam"), gradient_clip_val=1e-3, gradient_clip_algorithm="value", callbacks=[Look()])
        assert seen == pytest.approx([1e-3] * 6)

    @pytest.mark.parametrize("n", (1, 2))
    def test_logs_and_outputs_are_of_the_first_pass(self, n):
        module = Net(net=plain_net)
        fit(module, accumulate_grad_batches=n)
        losses = by_hand(n=n, net=plain_net)[1]
        outputs, logged = zip(*module.outputs, strict=True)
        assert outputs == pytest.approx(losses, abs=1e-7)
        assert logged == pytest.approx([n * x for x in losses], abs=1e-6)

    def test_metrics_know_the_first_pass(self):
        class Counts(Net):
            seen = 0

            def training_step(self, batch, batch_idx):
                self.seen += len(batch[0]) if self.first_pass else 0
                return super().training_step(batch, batch_idx)

        module = Counts()
        fit(module, accumulate_grad_batches=2)
        assert module.seen == 48 and len(module.passes) == 12

    @pytest.mark.parametrize(
        ("method", "n", "runs"),
        [("sgd", 3, 6), ("sam", 1, 12), ("sam", 3, 12), ("every-k", 3, 9), ("n-step", 1, 24), ("momentum-sam", 3, 12)],
    )
    def test_cost(self, method, n, runs):
        """Gradients for 6 batches; methods whose pass 1 is not at w pay for Lightning's own when n > 1."""
        module = Net(method)
        fit(module, accumulate_grad_batches=n)
        assert len(module.passes) == runs

    @pytest.mark.parametrize("n", (1, 3))
    def test_cost_where_the_gradient_decides(self, n):
        """The first update ascends, no other one does."""
        module = Net("ae-sam", start=1e6)
        fit(module, accumulate_grad_batches=n)
        assert len(module.passes) == 6 + n

    @pytest.mark.parametrize("method", ("sam", "n-step"))
    def test_masks_are_equal_where_the_loader_draws_between_batches(self, method):
        class Draws(TensorDataset):
            def __getitem__(self, i):
                x, y = super().__getitem__(i)
                return x + 0.1 * torch.randn(6), y

        class Masks(Net):
            def training_step(self, batch, batch_idx):
                mask = F.dropout(torch.ones(64))
                seen = self.masks.setdefault(batch_idx, mask)
                assert torch.equal(mask, seen)
                return super().training_step(batch, batch_idx)

        module = Masks(method)
        module.masks = {}
        batches = DataLoader(Draws(*loader(8).dataset.tensors), batch_size=8)
        L.Trainer(max_epochs=1, accelerator="cpu", accumulate_grad_batches=3, **QUIET).fit(module, batches)
        assert len({tuple(m.tolist()) for m in module.masks.values()}) == 6 and len(module.passes) >= 12

    @pytest.mark.parametrize("n", (1, 2))
    def test_bf16(self, n):
        module = Net(net=plain_net)
        fit(module, precision="bf16-mixed", accumulate_grad_batches=n, gradient_clip_val=0.3)
        assert same(module.net, by_hand(n=n, clip=0.3, net=plain_net, dtype=torch.bfloat16)[0])

    @pytest.mark.parametrize("scale", (2.0**10, 2.0**24))
    @pytest.mark.parametrize("n", (1, 2))
    def test_fp16(self, n, scale):
        """With the larger scale the first steps overflow in fp16, and are skipped."""
        scalers = [torch.amp.GradScaler("cpu", init_scale=scale) for _ in range(2)]
        module = Net(net=plain_net)
        plugin = MixedPrecision("16-mixed", "cpu", scalers[0])
        trainer = fit(module, plugins=[plugin], accumulate_grad_batches=n, gradient_clip_val=0.3)
        model, _, optimizer = by_hand(n=n, clip=0.3, net=plain_net, dtype=torch.float16, scaler=scalers[1])
        assert same(module.net, model)
        assert scalers[0].state_dict() == scalers[1].state_dict()
        assert trainer.optimizers[0].counts() == optimizer.counts()
        assert (optimizer.counts()["skipped_steps"] > 0) == (scale > 2.0**20)

    @pytest.mark.parametrize("method", ("sam", "vasso", "bernoulli"))
    def test_resume_is_exact(self, method, tmp_path):
        def net():
            return nn.Sequential(*(layer for layer in noisy_net() if not isinstance(layer, nn.Dropout)))

        class Scheduled(Net):
            def configure_optimizers(self):
                optimizer = super().configure_optimizers()
                return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)]

        whole, half, rest = (Scheduled(method, net) for _ in range(3))
        options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
        at_end = fit(whole, epochs=4, **options)
        fit(half, epochs=2, **options).save_checkpoint(tmp_path / "half.ckpt")
        resumed = fit(rest, epochs=4, ckpt=tmp_path / "half.ckpt", **options)
        assert same(whole.net, rest.net) and not same(whole.net, half.net)
        assert same_bits(at_end.optimizers[0].state_dict(), resumed.optimizers[0].state_dict())

    @pytest.mark.parametrize("method", ("sam", "momentum-sam"))
    def test_checkpoints_and_validation_inside_an_accumulation_see_w(self, method, tmp_path):
        class Saves(Callback):
            def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
                path = tmp_path / f"{batch_idx}.ckpt"
                trainer.save_checkpoint(path)
                stored = torch.load(path, weights_only=True)["state_dict"]
                if batch_idx % 4 == 0 and batch_idx:
                    assert same_bits(stored, self.before), "no step in between"
                self.before = {k: v.clone() for k, v in stored.items()}

        class Validated(Net):
            def validation_step(self, batch, batch_idx):
                self.log("other", F.cross_entropy(self(batch[0]), batch[1]))

        watched, plain = Validated(method, plain_net), Net(method, plain_net)
        fit(watched, accumulate_grad_batches=4, validate=True, val_check_interval=1, callbacks=[Saves()])
        fit(plain, accumulate_grad_batches=4)
        assert same(watched.net, plain.net) and len(os.listdir(tmp_path)) == 6

    @pytest.mark.parametrize("n", (1, 2, 3))
    def test_a_batch_without_loss_is_left_out(self, n):
        class Picky(Net):
            def training_step(self, batch, batch_idx):
                return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)

            def on_train_batch_end(self, *_):
                pass

        module = Picky(net=plain_net)
        fit(module, accumulate_grad_batches=n)
        assert all(torch.isfinite(p).all() for p in module.parameters())
        assert module.trainer.optimizers[0].counts()["updates"] == {1: 4, 2: 3, 3: 2}[n]

    def test_another_optimizer_trains_as_without_it(self):
        class Base:
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        plain, mixed = type("A", (Base, Plain), {})(), type("B", (Base, Net), {})()
        for module in (plain, mixed):
            fit(module, accumulate_grad_batches=2, gradient_clip_val=0.1)
        assert same(plain.net, mixed.net)

    @pytest.mark.parametrize("at", (0, 1))
    def test_an_interrupted_training_leaves_w_and_can_begin_again(self, at):
        class Breaks(Net):
            broken = True

            def training_step(self, batch, batch_idx):
                if self.broken and (batch_idx == 1 if at == 0 else not self.first_pass):
                    raise ValueError("no")
                return super().training_step(batch, batch_idx)

        module, fresh = Breaks(net=plain_net), Net(net=plain_net)
        with pytest.raises(ValueError, match="no"):
            fit(module, accumulate_grad_batches=3)
        assert same(module.net, plain_net())
        module.broken = False
        for one in (module, fresh):
            fit(one, accumulate_grad_batches=3)
        assert same(module.net, fresh.net)

    def test_says_where_it_learns_of_the_batches(self):
        class Forgets(Net):
            def on_train_batch_start(self, batch, batch_idx):
                pass

        with pytest.raises(RuntimeError, match=r"Forgets\.on_train_batch_start\(batch, batch_idx\) must call super"):
            fit(Forgets())

    @pytest.mark.dist
    def test_replicas_equal_the_batch(self):

        class Half(Net):
            def training_step(self, batch, batch_idx):
                share = [part.chunk(self.trainer.world_size)[self.trainer.global_rank] for part in batch]
                return super().training_step(share, batch_idx)

        nets = []
        for devices, strategy in ((1, "auto"), (2, "ddp_fork")):
            nets.append(Half(net=plain_net))
            options = {"devices": devices, "strategy": strategy, "use_distributed_sampler": False}
            fit(nets[-1], accumulate_grad_batches=3, precision="64-true", **options)
        assert apart(nets[0].net, nets[1].net) < 1e-7, "the weights come back from the processes in float32"
        assert apart(nets[0].net, plain_net().double()) > 1e-3

    def test_refuses_strategies_that_step_themselves(self, monkeypatch):
        from lightning.pytorch.strategies import SingleDeviceStrategy

        monkeypatch.setattr(SingleDeviceStrategy, "handles_gradient_accumulation", True)
        with pytest.raises(RuntimeError, match="SingleDeviceStrategy is not supported"):
            fit(Net())
