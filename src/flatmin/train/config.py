"""The resolved configuration of one run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flatmin.methods import BASE, current_word
from flatmin.train.schedule import SCHEDULES
from flatmin.train.settings import at_least, canonical, one_of

Scalar = bool | int | float | str

DEVICES = ("cpu", "cuda")
OPTIMIZERS = ("sgd", "adam", "adamw")
SMOOTHINGS = ("uniform", "others")
NOISES = ("symmetric", "asymmetric")
PRECISIONS = ("float32", "bf16", "fp16")
PARALLEL = ("ddp", "fsdp")
SELECTIONS = ("val", "last", "max-test")
SYNCS = ("all", "none")
NONFINITE = ("stop", "skip")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides the outcome of one run.

    The method:

    Args:
        method: composed name, e.g. "vasso+asam"; "base", or "sgd", is the base optimizer alone.
        rho: radius, or the factor of a method that has one in its place (sgdhess); None for the plain base.
        params: parameters of the method's parts by qualified name, e.g. {"direction.theta": 0.8}.
        micro_batches: equal parts of a batch, for methods with an ascent for each; a batch of fewer samples has
            one part a sample.
        ascent_sync: whose batches the ascent sees in several processes: "all" replicas', or "none" but its own.
        freeze_batchnorm: running statistics are those of the first pass only.
        optimizer: the base: "sgd", "adam" or "adamw".
        lr: at the start of the schedule.
        momentum, nesterov: of SGD.
        betas: of Adam and AdamW.
        weight_decay: of the base; not part of any loss that is climbed or measured.
        clip_norm: global norm that the gradient handed to the base is clipped to; None: not.
        plugins: modules that bring methods.

        seed: of initialisation, label noise, batch order, augmentation and dropout. Two methods with one seed see the
            same of all five.
        epochs: length of training and of the schedule.
        batch_size: samples of one update, over all processes; the last batch of an epoch may be smaller.
        drop_last: leave out a last batch that is smaller.
        accumulate: parts in which a batch goes through the model, to save memory; gradients are added up.
        schedule, schedule_unit, warmup, warmup_lr, lr_min, milestones, gamma, as_coded: see
            `flatmin.train.schedule.LearningRateSchedule`.
        label_smoothing: share of the target that is taken from the true class.
        smoothing: where it goes: "uniform" over all K classes (torch), or "others": the K - 1 other ones (BiSAM).
        ema: decay per update of an exponential average of the weights, which is then what is evaluated and kept; None:
            no average.

        data: "digits", "cifar10", "cifar100", ... (see `flatmin.train.sources.DATA`), or "pkg:function".
        data_dir: folder of the data sets that are files; not part of the outcome.
        split_seed: of the split into training and validation part; the same for all runs.
        val_share: of the official training part, for validation, where the data set brings none.
        train_on_val: train on the whole official training part and validate on the test part, as VaSSO's protocol does.
        train_size: use so many samples of the training part, the same share of every class; None: all.
        noise: share of training labels replaced by wrong ones.
        noise_kind: "symmetric": any other class; "asymmetric": the next class.
        statistics: normalise with those of this data set; None: of the data's own.
        crop, flip, cutout, cutout_p: of `flatmin.data.augment.Augment`; None: what is usual for the data set.
        image_size: side of the images of folders; None: what is usual for the data set.
        workers: processes that read image files; not part of the outcome.

        model: a name of `flatmin.models.zoo.MODELS`, "timm:NAME", "torchvision:NAME", or "pkg:function".
        model_params: keyword arguments of the model, e.g. {"max_pool": True}.

        device: "cpu" or "cuda".
        precision: "float32", or autocast to "bf16" or "fp16" (with a GradScaler); weights stay in float32.
        tf32: matrix products and convolutions of float32 in TF32, on a GPU that has it.
        channels_last: memory format of images and convolutions.
        compile: the model goes through torch.compile.
        graph: the whole step, all passes, as one CUDA graph.
        deterministic: algorithms that give the same numbers in every run, also on a GPU, where they can be slower.
        parallel: with several processes: "ddp" or "fsdp" (FSDP2).
        sync_batchnorm: statistics of BatchNorm over all processes.

        selection: which weights are kept and tested: those of the epoch that is best on "val", the "last", or
            "max-test": the best on the test part, which is no honest estimate.
        test_every: look at the test part every so many epochs, for curves; 0: once, at the end.
        flip_tta: evaluate on the mean of the logits of image and mirrored image.
        nonfinite: when a loss or gradient is not finite: "stop" the run, or "skip" the update and continue.
        max_skips: how many updates may be skipped before the run stops all the same.
        measure: whether lambda_max is measured at the end.

    Raises:
        ValueError: a value out of range, or values that contradict each other.
    """

    method: str
    rho: float | None = None
    params: Mapping[str, Scalar] = field(default_factory=dict)
    micro_batches: int = 4
    ascent_sync: str = "all"
    freeze_batchnorm: bool = True
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, ...] = (0.9, 0.999)
    weight_decay: float = 5e-4
    clip_norm: float | None = None
    plugins: tuple[str, ...] = ()

    seed: int = 0
    epochs: int = 30
    batch_size: int = 64
    drop_last: bool = False
    accumulate: int = 1
    schedule: str = "cosine"
    schedule_unit: str = "epoch"
    warmup: float = 0.0
    warmup_lr: float = 0.0
    lr_min: float = 0.0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    as_coded: bool = False
    label_smoothing: float = 0.0
    smoothing: str = "uniform"
    ema: float | None = None

    data: str = "digits"
    data_dir: str = "data"
    split_seed: int = 0
    val_share: float = 0.1
    train_on_val: bool = False
    train_size: int | None = None
    noise: float = 0.0
    noise_kind: str = "symmetric"
    statistics: str | None = None
    crop: int | None = None
    flip: bool | None = None
    cutout: int | None = None
    cutout_p: float | None = None
    image_size: int | None = None
    workers: int = 0

    model: str = "conv"
    model_params: Mapping[str, Scalar] = field(default_factory=dict)

    device: str = "cpu"
    precision: str = "float32"
    tf32: bool = False
    channels_last: bool = False
    compile: bool = False
    graph: bool = False
    deterministic: bool = False
    parallel: str = "ddp"
    sync_batchnorm: bool = False

    selection: str = "val"
    test_every: int = 0
    flip_tta: bool = False
    nonfinite: str = "stop"
    max_skips: int = 10
    measure: bool = False

    def __post_init__(self) -> None:
        if self.method.lower() == "base":
            object.__setattr__(self, "method", BASE)
        object.__setattr__(self, "params", {current_word(name): value for name, value in self.params.items()})
        for name in ("epochs", "batch_size", "micro_batches", "accumulate"):
            at_least(self, name, 1)
        for name in ("lr", "momentum", "weight_decay", "seed", "split_seed", "test_every", "max_skips", "workers"):
            at_least(self, name, 0)
        at_least(self, "noise", 0, high=1)
        at_least(self, "label_smoothing", 0)
        if self.label_smoothing >= 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {self.label_smoothing!r}.")
        at_least(self, "val_share", 0, open_low=True, high=0.9)
        for name, low in (("rho", 0), ("train_size", 1), ("image_size", 1), ("crop", 0), ("cutout", 0)):
            if getattr(self, name) is not None:
                at_least(self, name, low)
        if self.cutout_p is not None:
            at_least(self, "cutout_p", 0, high=1)
        if self.clip_norm is not None:
            at_least(self, "clip_norm", 0, open_low=True)
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema must lie between 0 and 1, or be none, got {self.ema!r}.")
        one_of(self, "device", DEVICES)
        one_of(self, "optimizer", OPTIMIZERS)
        one_of(self, "schedule", SCHEDULES)
        one_of(self, "smoothing", SMOOTHINGS)
        one_of(self, "noise_kind", NOISES)
        one_of(self, "precision", PRECISIONS)
        one_of(self, "parallel", PARALLEL)
        one_of(self, "selection", SELECTIONS)
        one_of(self, "ascent_sync", SYNCS)
        one_of(self, "nonfinite", NONFINITE)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers from 0 to below 1, got {self.betas!r}.")
        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            raise ValueError("nesterov=true needs optimizer=sgd and a momentum above 0.")
        if self.train_on_val and self.selection == "val":
            raise ValueError(
                "train_on_val=true leaves no validation part to choose on; set selection=last, or selection=max-test "
                "for the protocol that reports the maximum over the test part."
            )
        if self.graph and self.device == "cpu":
            raise ValueError("graph=true captures a CUDA graph; it needs device=cuda.")


NEUTRAL = ("data_dir", "workers")  # where the data are and who reads them


def identity(config: RunConfig) -> dict[str, Any]:
    """The fields that decide the outcome, as plain values."""
    return {name: value for name, value in canonical(config).items() if name not in NEUTRAL}


def differences(recorded: Mapping[str, Any], config: RunConfig) -> dict[str, str]:
    """What decides the outcome and is another thing in a run that is there: by field, in words.

    Args:
        recorded: of the other run, as `identity` gives it.
        config: of this one.

    Example:
        >>> differences({**identity(RunConfig(method="sam")), "lr": 0.2}, RunConfig(method="sam"))
        {'lr': 'lr is 0.2 there and 0.1 here'}
    """
    mine = identity(config)
    theirs = {**recorded, "params": {current_word(name): value for name, value in recorded.get("params", {}).items()}}
    return {
        key: f"{key} is {theirs.get(key)!r} there and {value!r} here"
        for key, value in mine.items()
        if theirs.get(key) != value
    }


def derive_seed(seed: int, purpose: str) -> int:
    """A seed for one purpose, unrelated to the same seed for another.

    Example:
        >>> derive_seed(0, "noise") == derive_seed(0, "noise") != derive_seed(0, "order")
        True
    """
    return int.from_bytes(hashlib.sha256(f"{purpose}:{seed}".encode()).digest()[:7], "big")
