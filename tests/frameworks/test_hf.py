"""The Hugging Face Trainer against a loop written by hand over the batches that it saw."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flatmin
from tests.helpers import same_bits

transformers = pytest.importorskip("transformers", reason="needs transformers: run make test-frameworks")
pytest.importorskip("accelerate", reason="needs accelerate: run make test-frameworks")
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from flatmin.integrations.hf import SAMTrainer, SharpnessAware  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error:the passes of one step")]
METHODS = (
    "sam",
    "vasso",
    "gsam",
    "looksam",
    "every-k",
    "bernoulli",
    "sgd",
    "n-step",
    "rsam",
    "momentum-sam",
    "micro-sam",
)
CLIP, RATE = 0.5, 1e-2
ROOT = Path(__file__).parents[2]


def net(dropout=0.0):
    torch.manual_seed(0)
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    shape = {"vocab_size": 20, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**shape, **rates, attn_implementation="eager")).double()


def texts(n=24, length=10):
    """Sequences whose labels end at random places, so that a mean of means is not the mean."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 20, (n, length), generator=g)
    ends = torch.randint(3, length + 1, (n, 1), generator=g)
    labels = ids.where(torch.arange(length) < ends, -100)
    return [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]


class Recorded:
    """Keeps the batches with the number of tokens in their step, and the random state before the first of them."""

    def training_step(self, model, inputs, num_items_in_batch):
        self.seen = [*getattr(self, "seen", []), (inputs, num_items_in_batch)]
        if len(self.seen) == 1:
            self.random = torch.get_rng_state()
        return super().training_step(model, inputs, num_items_in_batch)


class Watched(Recorded, SAMTrainer):
    pass


def arguments(folder, size=4, n=1, **options):
    options = {"max_grad_norm": CLIP, "num_train_epochs": 1, "save_strategy": "no", "use_cpu": True, **options}
    return TrainingArguments(
        str(folder),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=n,
        learning_rate=RATE,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        **options,
    )


def trained(folder, recipe="sam", *, model=None, cls=Watched, resume=None, set_up=None, rho=0.05, **options):
    trainer = cls(
        model=net() if model is None else model,
        args=arguments(folder, **options),
        train_dataset=texts(),
        recipe=recipe,
        rho=rho,
        options=None,
    )
    if set_up is not None:
        set_up(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def by_hand(trainer, recipe="sam", n=1, *, model=None, dtype=None, scaler=None):
    """The same training from the batches that the Trainer saw; the model, losses, lengths of u, the optimizer."""
    model = net() if model is None else model
    decay = [p for k, p in model.named_parameters() if k in trainer.get_decay_parameter_names(model)]
    rest = [p for k, p in model.named_parameters() if k not in trainer.get_decay_parameter_names(model)]
    base = torch.optim.AdamW([{"params": decay}, {"params": rest}], lr=RATE, weight_decay=0.0, fused=True)
    optimizer = flatmin.wrap(base, recipe, rho=0.05, model=model, scaler=scaler)
    torch.set_rng_state(trainer.random)
    batches, losses, lengths = iter(trainer.seen), [], []
    total = math.ceil(len(trainer.seen) / n)
    model.train()
    while held := list(itertools.islice(batches, n)):
        loss_of_step = 0.0
        for evaluation in optimizer.passes(len(held) if recipe == "micro-sam" else 1):
            with evaluation:
                chunk = evaluation.chunk
                for batch, count in held if chunk is None else [held[chunk]]:
                    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                        loss = model(**batch, num_items_in_batch=count).loss
                    if evaluation.index == 0:
                        loss_of_step += loss.item()
                    loss = loss * (1 if chunk is None else len(held))
                    (loss if scaler is None else scaler.scale(loss)).backward()
        losses.append(loss_of_step)
        if scaler is not None:
            scaler.unscale_(optimizer)
        lengths.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - (len(lengths) - 1) / total)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    return model, losses, lengths, optimizer


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry and "loss" in entry]


def apart(a, b):
    return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("n", (1, 2, 4))
@pytest.mark.parametrize("recipe", METHODS)
def test_trains_as_the_loop(recipe, n, tmp_path):
    trainer = trained(tmp_path, recipe, size=4, n=n)
    model, losses, lengths, _ = by_hand(trainer, recipe, n)
    assert apart(trainer.model, model) < 1e-12
    assert apart(trainer.model, net()) > 5e-3
    if recipe != "micro-sam":
        assert logged(trainer, "loss") == pytest.approx(losses, abs=2e-4), "of the first pass"
    assert logged(trainer, "grad_norm") == pytest.approx(lengths, rel=1e-5), "of what the base takes"


@pytest.mark.parametrize("recipe", ("sam", "vasso", "n-step"))
def test_micro_batches_equal_the_batch(recipe, tmp_path):
    whole, *others = (trained(tmp_path, recipe, size=size, n=n).model for size, n in ((4, 1), (2, 2), (1, 4)))
    for other in others:
        assert apart(whole, other) < 1e-10


@pytest.mark.dist
def test_replicas_equal_the_batch(tmp_path):
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tests.frameworks.replicas"]
    run = subprocess.run(
        [sys.executable, *words, str(tmp_path), "vasso"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    alone = trained(tmp_path, "vasso", size=4).model
    together = net()
    together.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert apart(alone, together) < 1e-10


@pytest.mark.parametrize("n", (1, 2))
def test_passes_draw_the_same_dropout_masks(n, tmp_path):
    trainer = trained(tmp_path, model=net(0.2), n=n)
    assert apart(trainer.model, by_hand(trainer, n=n, model=net(0.2))[0]) < 1e-12


@pytest.mark.parametrize("n", (1, 2))
def test_bf16(n, tmp_path):
    trainer = trained(tmp_path, model=net().float(), n=n, bf16=True)
    model = by_hand(trainer, n=n, model=net().float(), dtype=torch.bfloat16)[0]
    assert apart(trainer.model, model) < 1e-6


@pytest.mark.parametrize("scale", (2.0**10, 2.0**30))
@pytest.mark.parametrize("n", (1, 2))
def test_fp16(n, scale, tmp_path):
    """Accelerate ignores fp16=True on the CPU, so its scaler is put in by hand."""
    scalers = [torch.amp.GradScaler("cpu", init_scale=scale) for _ in range(2)]

    def set_up(trainer):
        assert trainer.accelerator.scaler is None, "ignored"
        trainer.accelerator.scaler, trainer.accelerator.native_amp = scalers[0], True

    options = {"lr_scheduler_type": "linear", "fp16": True}
    trainer = trained(tmp_path, model=net().float(), n=n, set_up=set_up, **options)
    model, _, _, optimizer = by_hand(trainer, n=n, model=net().float(), dtype=torch.float16, scaler=scalers[1])
    assert apart(trainer.model, model) < 1e-6
    assert scalers[0].state_dict() == scalers[1].state_dict()
    counts = trainer.optimizer.optimizer.counts()
    assert counts == optimizer.counts() and (counts["skipped_steps"] > 0) == (scale > 2.0**20)


@pytest.mark.parametrize("recipe", ("sam", "vasso", "momentum-sam"))
def test_resume_is_exact(recipe, tmp_path):
    options = {"n": 2, "size": 2, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 4}
    whole = trained(tmp_path / "a", recipe, model=net(0.2), **options)
    rest = trained(tmp_path / "b", recipe, model=net(0.2), resume=str(tmp_path / "a" / "checkpoint-4"), **options)
    assert rest.state.global_step == whole.state.global_step == 12 and len(rest.seen) == 16
    assert same_bits(whole.model.state_dict(), rest.model.state_dict())
    assert same_bits(whole.optimizer.state_dict(), rest.optimizer.state_dict())


def test_evaluation_and_checkpoints_see_w(tmp_path):
    """Also with a method that a plain loop would leave at w + eps between steps."""

    class AtW(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            self.w = {k: v.clone() for k, v in model.state_dict().items()}

        def on_save(self, args, state, control, model=None, **_):
            assert same_bits(self.w, dict(model.state_dict()))

    class Evaluated(SAMTrainer):
        def __init__(self, **kwargs):
            super().__init__(eval_dataset=texts(), callbacks=[AtW()], **kwargs)

    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    with_it = trained(tmp_path, "momentum-sam", cls=Evaluated, **options)
    assert same_bits(with_it.model.state_dict(), trained(tmp_path, "momentum-sam").model.state_dict())


@pytest.mark.parametrize("recipe", ("sam", "stale-sam", "sgd"))
def test_a_schedule_free_base_is_evaluated_at_its_average(recipe, tmp_path):
    """The Trainer's train() and eval() reach it, outside of the passes. huggingface/accelerate#2631 and #4161."""
    schedulefree = pytest.importorskip("schedulefree")

    def base_of(model):
        return schedulefree.AdamWScheduleFree(model.parameters(), lr=RATE, warmup_steps=3)

    model, right = net(), net()
    trainer = Watched(
        model=model,
        args=arguments(tmp_path, n=2, num_train_epochs=2, eval_strategy="epoch", lr_scheduler_type="constant"),
        train_dataset=texts(),
        eval_dataset=texts(8),
        optimizers=(base_of(model), None),
        recipe=recipe,
        rho=0.05,
    )
    trainer.train()
    base, losses = base_of(right), []
    optimizer = flatmin.wrap(base, recipe, rho=0.05, model=right)
    steps = [trainer.seen[i : i + 2] for i in range(0, len(trainer.seen), 2)]
    for epoch in (steps[:3], steps[3:]):
        base.train()
        right.train()
        for held in epoch:
            for evaluation in optimizer.passes():
                with evaluation:
                    for batch, count in held:
                        right(**batch, num_items_in_batch=count).loss.backward()
            torch.nn.utils.clip_grad_norm_(right.parameters(), CLIP)
            optimizer.step()
        base.eval()
        right.eval()
        held = trainer.data_collator(texts(8))
        with torch.no_grad():
            losses.append(right(**held, num_items_in_batch=(held["labels"] != -100).sum()).loss.item())
    assert len(steps) == 6
    assert apart(model, right) < 1e-12 and apart(model, net()) > 5e-3
    seen = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert seen == pytest.approx(losses, rel=1e-5)


def test_takes_a_flatmin_optimizer_as_it_is(tmp_path):
    model = net()
    mine = flatmin.wrap(torch.optim.SGD(model.parameters(), lr=RATE), "asam", rho=0.3, model=model)
    trainer = SAMTrainer(
        model=model, args=arguments(tmp_path), train_dataset=texts(), optimizers=(mine, None), recipe="vasso"
    )
    trainer.train()
    assert trainer.optimizer.optimizer is mine and mine.counts()["updates"] == 6


def test_options_reach_wrap(tmp_path):
    trainer = SAMTrainer(
        model=net(),
        args=arguments(tmp_path),
        train_dataset=texts(),
        recipe="vasso",
        options={"theta": 0.7, "nonfinite": "raise"},
    )
    sam = trainer.create_optimizer()
    assert sam.recipe.direction.theta == 0.7 and sam.nonfinite == "raise" and sam.model is trainer.model


def test_the_plain_trainer_refuses(tmp_path):
    """A single backward is not SAM, and says so."""
    model = net()
    mine = flatmin.wrap(torch.optim.SGD(model.parameters(), lr=RATE), "sam", rho=0.05, model=model)
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=texts(), optimizers=(mine, None))
    with pytest.raises(RuntimeError, match=r"step\(\) needs a closure, or both passes before it"):
        trainer.train()


def test_the_mixin_serves_other_trainers(tmp_path):
    class Mine(Trainer):
        losses = 0

        def compute_loss(self, *args, **kwargs):
            self.losses += 1
            return super().compute_loss(*args, **kwargs)

    class SAMMine(SharpnessAware, Mine):
        pass

    mixed = trained(tmp_path, cls=SAMMine, n=2)
    assert mixed.losses == 12
    assert apart(mixed.model, trained(tmp_path, n=2).model) == 0


class BreaksInAPass(Trainer):
    last, calls = 5, 0  # the second micro-batch of the second pass

    def compute_loss(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.last:
            raise ValueError("no")
        return super().compute_loss(*args, **kwargs)


class BreaksBetween(TrainerCallback):
    broken = False

    def on_substep_end(self, *args, **kwargs):
        if not self.broken:
            self.broken = True
            raise ValueError("no")


@pytest.mark.parametrize("where", ("in a pass", "between micro-batches"))
def test_an_interrupted_training_can_begin_again(where, tmp_path):
    cls = type("Breaks", (SharpnessAware, BreaksInAPass), {})
    trainer = cls(model=net(), args=arguments(tmp_path, n=3, size=2), train_dataset=texts(), rho=0.05)
    if where == "between micro-batches":
        trainer.last = None
        trainer.add_callback(BreaksBetween())
    with pytest.raises(ValueError, match="no"):
        trainer.train()
    assert apart(trainer.model, net()) == 0
    trainer.last, trainer.calls = None, 0
    trainer.train()
    assert trainer.calls == 24, "two passes over the twelve micro-batches of this training, and no others"


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"sgdhess needs second derivatives, but the Trainer"):
        trained(tmp_path, "sgdhess")

    class Deep(SAMTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.is_deepspeed_enabled = True

    with pytest.raises(ValueError, match="DeepSpeed is not supported"):
        Deep(model=net(), args=arguments(tmp_path), train_dataset=texts())
    trainer = SAMTrainer(model=net(), args=arguments(tmp_path), train_dataset=texts())
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=RATE)
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    with pytest.raises(RuntimeError, match=r"the optimizer is a SGD, not the flatmin optimizer of create_optimizer"):
        trainer.training_step(trainer.model, texts()[0])
