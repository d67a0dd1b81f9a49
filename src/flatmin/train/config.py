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
    """The settings that decide the outcome of one run.

    Args:
        The method and its base optimizer

        method: name of the method, or several names joined by "+", such as "vasso+asam"; "base" trains with the base
            optimizer alone; `flatmin methods` lists the names.
        rho: radius of the ascent step; for sgdhess, the factor that takes its place; None: the preset's radius for this
            method, or the method's default.
        params: parameters of the method's parts by qualified name, such as {"direction.theta": 0.8}.
        micro_batches: number of equal parts of a batch, each with its own ascent, for methods such as micro-sam; a
            batch with fewer samples has one part per sample.
        ascent_sync: with several processes, compute the ascent from the gradient of all processes (all), or in each
            process from its own gradient (none).
        freeze_batchnorm: update the running statistics of BatchNorm only in the first forward pass of each update.
        optimizer: the base optimizer, which makes the update.
        lr: base learning rate, at the start of the schedule; with a warm-up, at its end.
        momentum: momentum of SGD.
        nesterov: use Nesterov momentum in SGD.
        betas: the two decay rates of Adam and AdamW.
        weight_decay: weight decay of the base optimizer; it is not part of the loss of the ascent, nor of any loss that
            is recorded.
        clip_norm: largest global l2 norm of the gradient that the base optimizer receives; larger gradients are scaled
            down to it; None: no clipping.
        plugins: Python modules that define further methods.

        Training

        seed: seed of the initial weights, label noise, batch order, augmentation and dropout; two methods with the same
            seed get the same of each.
        epochs: length of the training and of the learning rate schedule, in epochs.
        batch_size: samples per update, over all processes; the last batch of an epoch may be smaller.
        drop_last: leave out the last batch of an epoch if it is smaller than the others.
        accumulate: number of parts in which each batch passes through the network, to save memory; their gradients are
            added up.
        schedule: how the learning rate falls; `flatmin.train.schedule` has the formulas.
        schedule_unit: change the learning rate after every epoch or after every step.
        warmup: length of the linear warm-up in epochs, which may be fractional; 0: no warm-up.
        warmup_lr: learning rate at the start of the warm-up.
        lr_min: learning rate at the end of the cosine and linear schedules.
        milestones: epochs at which the multistep schedule multiplies the learning rate by gamma.
        gamma: factor of the learning rate at each milestone of multistep, and for each epoch of exponential.
        as_coded: compute the diminishing schedules as their published code does, instead of by the paper's formulas.
        label_smoothing: share of the target that is taken from the true class, from 0 to below 1.
        smoothing: spread that share over all classes (uniform, as torch does) or over the other classes (others, as
            BiSAM does).
        ema: decay per update of an exponential moving average of the weights; the average is then evaluated and kept;
            None: no average.

        The data

        data: name of a data set, or your own function as package.module:function.
        data_dir: folder of the data sets that are read from files; it does not affect the outcome.
        split_seed: seed of the split into training and validation part.
        val_share: share of the official training part that becomes the validation part, if the data set has none of its
            own; at most 0.9.
        train_on_val: train on the whole official training part and validate on the test part, as VaSSO's protocol does.
        train_size: number of training samples to use, the same share of every class; None: all.
        noise: share of the training labels that are replaced by wrong ones, from 0 to 1.
        noise_kind: replace a label by any other class (symmetric), or by the class that it is confused with
            (asymmetric).
        statistics: normalise images with the mean and standard deviation of this data set; None: with the data's own.
        crop: padding of training images before the random crop, in pixels; None: what is usual for the data set.
        flip: mirror training images at random; None: what is usual for the data set.
        cutout: side of the square that is cut out of training images, in pixels; 0: no cutout; None: what is usual for
            the data set.
        cutout_p: probability of the cutout, from 0 to 1; None: what is usual for the data set.
        image_size: side of the images that are read from folders, in pixels; None: what is usual for the data set.
        workers: number of processes that read image files; it does not affect the outcome.

        The network

        model: name of a network, "timm:NAME", "torchvision:NAME", or your own function as package.module:function.
        model_params: keyword arguments of the network, such as {"max_pool": True}; on the command line:
            model.max_pool=true.

        The machine

        device: device to train on; auto: the GPU if there is one.
        precision: float32, or autocast to bf16 or fp16 (with a GradScaler); the weights stay in float32. auto: bf16 on
            a GPU, float32 on the CPU.
        tf32: compute float32 matrix products and convolutions in TF32, on GPUs that support it. auto: true on a GPU.
        channels_last: store images and convolution weights in the channels-last memory format. auto: true.
        compile: compile the network with torch.compile.
        flat: keep the weights in few large tensors, which is faster for networks of many small weights (see
            `flatmin.SAM`); values agree up to rounding.
        graph: capture the whole update, with all its passes, in one CUDA graph.
        deterministic: use algorithms that give the same numbers in every run; on a GPU they can be slower.
        parallel: with several processes, replicate the weights (ddp) or shard them (fsdp, which is FSDP2).
        sync_batchnorm: share the batch statistics of BatchNorm between processes.

        Evaluation

        selection: which weights are kept and tested: those of the epoch with the best validation accuracy (val), those
            of the last epoch (last), or those of the epoch with the best test accuracy (max-test), which overestimates
            the accuracy on new data.
        test_every: number of epochs between evaluations on the test part, for curves; 0: only at the end.
        flip_tta: evaluate on the mean of the logits of each image and its mirror image.
        nonfinite: what to do if a loss or gradient is not finite: stop the run, or skip the update and continue.
        max_skips: number of updates that nonfinite=skip may skip before the run stops.
        measure: measure lambda_max, the largest eigenvalue of the Hessian, at the end of the run.

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
    flat: bool = False
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
        if self.graph and self.flat:
            raise ValueError("graph=true and flat=true cannot be combined; leave out flat, since a graph saves more.")


NEUTRAL = ("data_dir", "workers")  # fields that do not affect the outcome
# Fields added after runs had been recorded, with the value that those runs used. A field with this value is left out of
# the identity, so that old runs keep their names.
_LATER = {"flat": False}


def identity(config: RunConfig) -> dict[str, Any]:
    """The fields that decide the outcome, as plain values."""
    fields = {name: value for name, value in canonical(config).items() if name not in NEUTRAL}
    return {name: value for name, value in fields.items() if name not in _LATER or value != _LATER[name]}


def differences(recorded: Mapping[str, Any], config: RunConfig) -> dict[str, str]:
    """The settings in which a recorded run differs from this one: a phrase for each field.

    Args:
        recorded: settings of the recorded run, as `identity` returns them.
        config: configuration of this run.

    Examples:
        >>> differences({**identity(RunConfig(method="sam")), "lr": 0.2}, RunConfig(method="sam"))
        {'lr': 'lr is 0.2 there and 0.1 here'}
    """
    mine = {**_LATER, **identity(config)}
    theirs = {
        **_LATER,
        **recorded,
        "params": {current_word(name): value for name, value in recorded.get("params", {}).items()},
    }
    return {
        key: f"{key} is {theirs.get(key)!r} there and {value!r} here"
        for key, value in mine.items()
        if theirs.get(key) != value
    }


def derive_seed(seed: int, purpose: str) -> int:
    """Derive a seed for one purpose; seeds for different purposes are unrelated.

    Examples:
        >>> derive_seed(0, "noise") == derive_seed(0, "noise") != derive_seed(0, "order")
        True
    """
    return int.from_bytes(hashlib.sha256(f"{purpose}:{seed}".encode()).digest()[:7], "big")
