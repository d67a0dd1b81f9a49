"""The resolved configuration of one run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from flatmin.methods import BASE, current_word
from flatmin.train.keys import OneOf, Range, check
from flatmin.train.schedule import SCHEDULES, UNITS
from flatmin.train.settings import canonical

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

    Args:
        The method and its base optimizer

        method: name of the method, or several joined by "+", such as "vasso+asam"; "base" is the base optimizer
            alone; see `flatmin methods`.
        rho: radius of the ascent, or the factor that a method has in its place (sgdhess); none: that of the preset's
            table, or the method's default.
        params: parameters of the method's parts by qualified name, such as {"direction.theta": 0.8}.
        micro_batches: equal parts of a batch, each with an ascent of its own, for methods such as micro-sam; a smaller
            batch has one part a sample.
        ascent_sync: with several processes, whether an ascent uses the gradient of all of them or none but its own.
        freeze_batchnorm: let only the first pass of an update change the running statistics of BatchNorm.
        optimizer: the base optimizer.
        lr: learning rate at the start of the schedule.
        momentum: momentum of SGD.
        nesterov: use Nesterov momentum in SGD.
        betas: the two decay rates of Adam and AdamW.
        weight_decay: weight decay of the base optimizer; no part of a loss that is climbed or measured.
        clip_norm: clip the gradient that the base optimizer gets to this global norm; none: no clipping.
        plugins: modules that define further methods.

        Training

        seed: seed of initialisation, label noise, batch order, augmentation and dropout; two methods with one seed see
            the same of all five.
        epochs: length of training and of the schedule.
        batch_size: samples of one update, over all processes; the last batch of an epoch may be smaller.
        drop_last: leave out a last batch that is smaller.
        accumulate: parts in which a batch goes through the network, to save memory; their gradients are added up.
        schedule: how the learning rate falls; `flatmin.train.schedule` has the formulas.
        schedule_unit: change the learning rate after every epoch or after every step.
        warmup: epochs of linear warm-up, may be fractional; 0: none.
        warmup_lr: learning rate at which the warm-up begins.
        lr_min: learning rate at which cosine and linear end.
        milestones: epochs at which multistep multiplies the learning rate by gamma.
        gamma: factor of multistep at each milestone, and of exponential for each epoch.
        as_coded: run the diminishing schedules as their published code does, not as the paper has them.
        label_smoothing: share of the target that is taken from the true class.
        smoothing: spread that share over all classes (uniform, torch's rule) or over the others (BiSAM's rule).
        ema: decay per update of an exponential average of the weights, which is then evaluated and kept; none: no
            average.

        The data

        data: name of a data set, or your own as package.module:function.
        data_dir: folder of the data sets that are files; not part of the outcome.
        split_seed: seed of the split into training and validation part.
        val_share: share of the official training part for validation, where the data set has no validation part.
        train_on_val: train on the whole official training part and validate on the test part, as VaSSO's protocol does.
        train_size: use this many samples of the training part, the same share of every class; none: all.
        noise: share of the training labels that are replaced by wrong ones.
        noise_kind: replace a label by any other class (symmetric) or by the next class (asymmetric).
        statistics: normalise with those of this data set; none: with the data's own.
        crop: pixels by which training images are padded before the random crop; none: what is usual for the data set.
        flip: mirror training images at random; none: what is usual for the data set.
        cutout: side of the square that is cut out of training images, 0: no cutout; none: what is usual for the data
            set.
        cutout_p: probability of the cutout; none: what is usual for the data set.
        image_size: side of the images of folders; none: what is usual for the data set.
        workers: processes that read image files; not part of the outcome.

        The network

        model: name of a network, "timm:NAME", "torchvision:NAME", or your own as package.module:function.
        model_params: keywords of the network, such as {"max_pool": True}; as a word: model.max_pool=true.

        The machine

        device: where to train; auto: the GPU if there is one.
        precision: float32, or autocast to bf16 or fp16 (with a GradScaler); the weights stay in float32. auto: bf16 on
            a GPU.
        tf32: compute float32 products and convolutions in TF32, on a GPU that has it. auto: true on a GPU.
        channels_last: memory format of images and convolutions. auto: true.
        compile: pass the network through torch.compile.
        graph: capture the whole update, all passes, as one CUDA graph.
        deterministic: use algorithms that give the same numbers in every run; on a GPU they can be slower.
        parallel: with several processes, replicate the weights (ddp) or shard them (fsdp, FSDP2).
        sync_batchnorm: share the statistics of BatchNorm between processes.

        Evaluation

        selection: which weights are kept and tested: those of the epoch that is best on validation (val), the last
            ones, or the best on the test part (max-test), which is no honest estimate.
        test_every: epochs between looks at the test part, for curves; 0: once, at the end.
        flip_tta: evaluate on the mean of the logits of image and mirrored image.
        nonfinite: when a loss or gradient is not finite, stop the run, or skip the update and continue.
        max_skips: how many updates may be skipped before the run stops nevertheless.
        measure: measure lambda_max at the end.

    Raises:
        ValueError: a value out of range, or values that contradict each other.
    """

    method: str
    rho: Annotated[float | None, Range(0)] = None
    params: Mapping[str, Scalar] = field(default_factory=dict)
    micro_batches: Annotated[int, Range(1)] = 4
    ascent_sync: Annotated[str, OneOf(SYNCS)] = "all"
    freeze_batchnorm: bool = True
    optimizer: Annotated[str, OneOf(OPTIMIZERS)] = "sgd"
    lr: Annotated[float, Range(0)] = 0.1
    momentum: Annotated[float, Range(0)] = 0.9
    nesterov: bool = False
    betas: tuple[float, ...] = (0.9, 0.999)
    weight_decay: Annotated[float, Range(0)] = 5e-4
    clip_norm: Annotated[float | None, Range(0, open_low=True)] = None
    plugins: tuple[str, ...] = ()

    seed: Annotated[int, Range(0)] = 0
    epochs: Annotated[int, Range(1)] = 30
    batch_size: Annotated[int, Range(1)] = 64
    drop_last: bool = False
    accumulate: Annotated[int, Range(1)] = 1
    schedule: Annotated[str, OneOf(SCHEDULES)] = "cosine"
    schedule_unit: Annotated[str, OneOf(UNITS)] = "epoch"
    warmup: float = 0.0
    warmup_lr: float = 0.0
    lr_min: float = 0.0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    as_coded: bool = False
    label_smoothing: Annotated[float, Range(0)] = 0.0
    smoothing: Annotated[str, OneOf(SMOOTHINGS)] = "uniform"
    ema: float | None = None

    data: str = "digits"
    data_dir: str = "data"
    split_seed: Annotated[int, Range(0)] = 0
    val_share: Annotated[float, Range(0, 0.9, open_low=True)] = 0.1
    train_on_val: bool = False
    train_size: Annotated[int | None, Range(1)] = None
    noise: Annotated[float, Range(0, 1)] = 0.0
    noise_kind: Annotated[str, OneOf(NOISES)] = "symmetric"
    statistics: str | None = None
    crop: Annotated[int | None, Range(0)] = None
    flip: bool | None = None
    cutout: Annotated[int | None, Range(0)] = None
    cutout_p: Annotated[float | None, Range(0, 1)] = None
    image_size: Annotated[int | None, Range(1)] = None
    workers: Annotated[int, Range(0)] = 0

    model: str = "conv"
    model_params: Mapping[str, Scalar] = field(default_factory=dict)

    device: Annotated[str, OneOf(DEVICES)] = "cpu"
    precision: Annotated[str, OneOf(PRECISIONS)] = "float32"
    tf32: bool = False
    channels_last: bool = False
    compile: bool = False
    graph: bool = False
    deterministic: bool = False
    parallel: Annotated[str, OneOf(PARALLEL)] = "ddp"
    sync_batchnorm: bool = False

    selection: Annotated[str, OneOf(SELECTIONS)] = "val"
    test_every: Annotated[int, Range(0)] = 0
    flip_tta: bool = False
    nonfinite: Annotated[str, OneOf(NONFINITE)] = "stop"
    max_skips: Annotated[int, Range(0)] = 10
    measure: bool = False

    def __post_init__(self) -> None:
        if self.method.lower() == "base":
            object.__setattr__(self, "method", BASE)
        object.__setattr__(self, "params", {current_word(name): value for name, value in self.params.items()})
        check(self)
        if self.label_smoothing >= 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {self.label_smoothing!r}.")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema must lie between 0 and 1, or be none, got {self.ema!r}.")
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
