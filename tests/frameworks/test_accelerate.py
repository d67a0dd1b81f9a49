"""Accelerate's own loop forms, without glue, against the same loop without Accelerate."""

import contextlib
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import flatmin
from tests.helpers import same_bits

pytest.importorskip("accelerate", reason="needs accelerate: run make test-frameworks")
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

pytestmark = pytest.mark.filterwarnings("ignore")
CLIP = 0.3


@pytest.fixture(autouse=True)
def fresh():
    """Accelerate keeps its settings for the whole process."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))


def data(size):
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(48, 6, generator=g), torch.randint(3, (48,), generator=g)
    return DataLoader(TensorDataset(x, y), batch_size=size)


class Run:
    """A model and its optimizer, prepared by Accelerate or (accelerator=None) as they are."""

    def __init__(self, accelerator=None, method="sam", *, size=8, scaler=None, dtype=None, dropout=True, **options):
        self.accelerator, self.scaler, self.dtype = accelerator, scaler, dtype
        self.model = net() if dropout else nn.Sequential(*(m for m in net() if not isinstance(m, nn.Dropout))).double()
        base = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.sam = flatmin.wrap(base, method, rho=0.1, model=self.model, scaler=scaler, **options)
        self.optimizer, self.loader = self.sam, data(size)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.sam, 0.9)
        if accelerator is not None:
            parts = (self.model, self.sam, self.loader, self.scheduler)
            self.model, self.optimizer, self.loader, self.scheduler = accelerator.prepare(*parts)
        torch.manual_seed(7)

    def backward(self, x, y, share=1.0):
        """`share` stands for what `accumulate` divides by."""
        x = x.to(next(self.model.parameters()).dtype)
        if self.accelerator is not None:
            loss = F.cross_entropy(self.model(x), y)
            self.accelerator.backward(loss)
            return loss
        with torch.autocast("cpu", self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            out = self.model(x)
        loss = F.cross_entropy(out.float() if self.dtype else out, y) * share
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss

    def clip(self):
        if self.accelerator is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP)
            return
        if self.scaler is not None:
            self.scaler.unscale_(self.sam)
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)

    def step(self, closure=None):
        if self.accelerator is not None or self.scaler is None:
            self.optimizer.step(closure)
        else:
            self.scaler.step(self.optimizer, closure)
            self.scaler.update()
        self.scheduler.step()

    def with_closures(self, epochs=1):
        for _ in range(epochs):
            for batch in self.loader:

                def closure(batch=batch):
                    self.optimizer.zero_grad()
                    return self.backward(*batch)

                self.step(closure)
        return self

    def with_passes(self):
        for batch in self.loader:
            for evaluation in self.sam.passes():
                with evaluation:
                    self.backward(*batch)
            self.clip()
            self.step()
        return self

    def with_held_batches(self, n):
        """The form of the example: n batches, every pass over all of them."""
        batches = iter(self.loader)
        while held := list(itertools.islice(batches, n)):
            for evaluation in self.sam.passes():
                with evaluation:
                    for i, batch in enumerate(held):
                        last = self.accelerator is None or i == len(held) - 1
                        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                            self.backward(*batch, share=1 / n)
            for w in self.model.parameters() if self.accelerator is not None else ():
                w.grad.div_(n)
            self.clip()
            self.step()
        return self

    def with_accumulate(self):
        """`accelerator.accumulate`: batches are held until the one that steps, whose closure runs them all."""
        held = []
        for batch in self.loader:
            with self.accelerator.accumulate(self.model):
                held.append(batch)
                if self.accelerator.sync_gradients:

                    def closure():
                        self.optimizer.zero_grad()
                        return sum(self.backward(*one).detach() for one in held)

                    self.step(closure)
                    held.clear()
        return self


def apart(a, b):
    return max((p - q).abs().max().item() for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))


def cpu(**options):
    return Accelerator(cpu=True, **options)


METHODS = ("sam", "vasso", "every-k", "momentum-sam", "n-step", "gsam")


@pytest.mark.parametrize("method", METHODS)
def test_closures(method):
    assert apart(Run(cpu(), method).with_closures(), Run(None, method).with_closures()) == 0


@pytest.mark.parametrize("method", METHODS)
def test_passes_and_clipping(method):
    assert apart(Run(cpu(), method).with_passes(), Run(None, method).with_passes()) == 0


@pytest.mark.parametrize("method", METHODS)
def test_held_batches(method):
    assert apart(Run(cpu(), method).with_held_batches(3), Run(None, method).with_held_batches(3)) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_accumulate_equals_the_batch(method):
    accelerator = cpu(gradient_accumulation_steps=3, step_scheduler_with_optimizer=False)
    parts = Run(accelerator, method, size=8, dropout=False).with_accumulate()
    assert parts.sam.counts()["updates"] == 2
    assert apart(parts, Run(None, method, size=24, dropout=False).with_closures()) < 1e-13


def test_bf16():
    run = Run(cpu(mixed_precision="bf16")).with_passes()
    assert apart(run, Run(None, dtype=torch.bfloat16).with_passes()) < 1e-6


@pytest.mark.parametrize("form", ("with_closures", "with_passes"))
@pytest.mark.parametrize("scale", (2.0**10, 2.0**24))
def test_fp16(form, scale):
    """Accelerate ignores fp16 on the CPU, so its scaler is put in by hand."""
    scalers = [torch.amp.GradScaler("cpu", init_scale=scale) for _ in range(2)]
    accelerator = cpu(mixed_precision="fp16")
    assert accelerator.scaler is None
    accelerator.scaler, accelerator.native_amp = scalers[0], True
    run = getattr(Run(accelerator, scaler=accelerator.scaler), form)()
    alone = getattr(Run(None, scaler=scalers[1], dtype=torch.float16), form)()
    assert apart(run, alone) < 1e-6
    assert scalers[0].state_dict() == scalers[1].state_dict()
    assert run.sam.counts() == alone.sam.counts()
    assert (run.sam.counts()["skipped_steps"] > 0) == (scale > 2.0**20)
    # As for every optimizer that scales by itself (torch's fused ones too), Accelerate takes a skipped step for one.
    assert not accelerator.optimizer_step_was_skipped


@pytest.mark.parametrize("method", ("sam", "vasso", "bernoulli"))
def test_resume_is_exact(method, tmp_path):
    whole = Run(cpu(), method).with_closures(2)
    half = Run(cpu(), method).with_closures()
    half.accelerator.save_state(str(tmp_path))
    rest = Run(cpu(), method)
    rest.accelerator.load_state(str(tmp_path))
    rest.with_closures()
    assert same_bits(whole.model.state_dict(), rest.model.state_dict()) and apart(whole, half) > 1e-3
    assert same_bits(whole.sam.state_dict(), rest.sam.state_dict())


@pytest.mark.parametrize("door", ("perturbed", "two calls"))
@pytest.mark.parametrize("method", ("sam", "vasso", "gsam"))
def test_other_entry_points_are_those_of_the_optimizer_inside(method, door):
    """`optimizer.optimizer` of the prepared one is the flatmin optimizer; the prepared one ends the step."""
    run = Run(cpu(), method)
    assert run.optimizer.optimizer is run.sam
    for batch in run.loader:
        run.optimizer.zero_grad()
        run.backward(*batch)
        if door == "perturbed":
            with run.sam.perturbed():
                run.backward(*batch)
            run.optimizer.step()
        else:
            run.sam.first_step()
            run.backward(*batch)
            run.sam.second_step()
        run.scheduler.step()
    assert apart(run, Run(None, method).with_closures()) == 0
    with pytest.raises(AttributeError, match="perturbed"):
        run.optimizer.perturbed()


@pytest.mark.parametrize("scale", (2.0**10, 2.0**20))
def test_fp16_between_the_passes_of_a_context(scale):
    scalers = [torch.amp.GradScaler("cpu", init_scale=scale) for _ in range(2)]
    accelerator = cpu(mixed_precision="fp16")
    accelerator.scaler, accelerator.native_amp = scalers[0], True
    run = Run(accelerator, scaler=accelerator.scaler)
    for batch in run.loader:
        run.optimizer.zero_grad()
        run.backward(*batch)
        with run.sam.perturbed():
            run.backward(*batch)
        run.clip()
        run.step()
    alone = Run(None, scaler=scalers[1], dtype=torch.float16).with_passes()
    assert apart(run, alone) < 1e-6 and scalers[0].state_dict() == scalers[1].state_dict()


def test_modes_of_a_schedule_free_base():
    """`train()` and `eval()` of the prepared optimizer reach the base. huggingface/accelerate#2631 and #4161."""
    schedulefree = pytest.importorskip("schedulefree")
    x, y = data(48).dataset.tensors
    found = []
    for accelerator in (cpu(), None):
        model = net()
        base = schedulefree.SGDScheduleFree(model.parameters(), lr=0.5)
        optimizer = flatmin.SAM(base, rho=0.1, model=model)
        prepared = model
        if accelerator is not None:
            prepared, optimizer = accelerator.prepare(model, optimizer)
        modes = base if accelerator is None else optimizer
        torch.manual_seed(7)
        for _ in range(2):
            modes.train()
            prepared.train()
            for _ in range(5):

                def closure(optimizer=optimizer, prepared=prepared):
                    optimizer.zero_grad()
                    loss = F.cross_entropy(prepared(x), y)
                    loss.backward()
                    return loss

                optimizer.step(closure)
            modes.eval()
            prepared.eval()
            found.append(F.cross_entropy(prepared(x), y).item())
    assert found[:2] == found[2:] and found[1] < found[0]


def test_a_single_backward_is_refused():
    run = Run(cpu())
    run.backward(*next(iter(run.loader)))
    with pytest.raises(RuntimeError, match="needs a closure, or both passes"):
        run.optimizer.step()
