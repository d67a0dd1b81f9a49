"""Evaluate the weights of a run again, on its own data or on other data of the same kind."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from flatmin.data.dataset import Data, Split
from flatmin.measure.modes import evaluating
from flatmin.stats import share_interval
from flatmin.train.config import RunConfig
from flatmin.train.evaluate import CHUNK, logits, score
from flatmin.train.inputs import Inputs
from flatmin.train.numerics import numerics
from flatmin.train.saved import SavedRun
from flatmin.train.settings import one_of
from flatmin.train.sources import check_device, load_clean

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Options of an evaluation.

    Args:
        data: a data set, by name or as "pkg:function". Default: the run's own.
        data_dir: folder of the data sets that are read from files. Default: that of the run.
        split: "train" (for the run's own data with the labels that were trained on), "val" or "test".
        flip_tta: use the mean of the logits of each image and its mirror image. Default: as in the run.
        batch: samples per forward pass. Default: depends on the device.
        device: "cpu" or "cuda". If the run used another kind of device, the evaluation uses float32.
        classes: also compute the accuracy of every class, in a second pass.

    Raises:
        ValueError: the split is unknown, or the batch is below 1.
    """

    data: str | None = None
    data_dir: str | None = None
    split: str = "test"
    flip_tta: bool | None = None
    batch: int | None = None
    device: str = "cpu"
    classes: bool = False

    def __post_init__(self) -> None:
        one_of(self, "split", SPLITS)
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch!r}.")


@dataclass(frozen=True, kw_only=True)
class ClassShare:
    """The number of samples of one class, and the accuracy on them in percent; None if there are no samples."""

    samples: int
    acc: float | None


@dataclass(frozen=True, kw_only=True)
class Reevaluation:
    """The result of an evaluation.

    Args:
        data, split, samples: data set, part, and number of samples.
        wrong: percentage of labels that were replaced by wrong ones (label noise).
        loss: mean cross-entropy in nats.
        acc, top5: accuracy and top-5 accuracy in percent; top-5 only with more than five classes.
        acc_low, acc_high: 95 % Wilson interval of `acc` over the samples, for these weights; it does not include the
            variation between seeds.
        classes: accuracy by class number, if it was requested.
        normalised_with: mean and standard deviation of the run's training data, if images were normalised with them.
        device, precision, flip_tta: device, precision and test-time augmentation of the evaluation.
    """

    data: str
    split: str
    samples: int
    wrong: float
    loss: float
    acc: float
    acc_low: float
    acc_high: float
    top5: float | None
    classes: tuple[ClassShare, ...]
    normalised_with: tuple[tuple[float, ...], tuple[float, ...]] | None
    device: str
    precision: str
    flip_tta: bool


def reevaluate(run: SavedRun, asked: Asked | None = None) -> Reevaluation:
    """Evaluate the saved weights of a run.

    Images stored as bytes are normalised with the statistics of the run's training data, also those of another data
    set, because the model was trained with these statistics.

    Args:
        run: a finished run with weights.
        asked: options. Default `Asked()`: the run's own test part, evaluated as in the run.

    Raises:
        ValueError: there are no weights, the data have other classes or another kind of samples, or a name is unknown.
        FileNotFoundError, OSError, ModuleNotFoundError: see `load_data`.
    """
    asked = Asked() if asked is None else asked
    run.check()
    check_device(asked.device)
    config = _config(run.config, asked)
    inputs, data = run.known, _data(run, asked)
    if inputs is None:
        inputs = Inputs.of(data if asked.data is None else run.data())
    inputs.check(data)
    # The data set's own statistics would be new to the model.
    data = dataclasses.replace(data, statistics=inputs.statistics, augment=None).to(asked.device)
    part: Split = getattr(data, asked.split)
    model = run.model(data).to(asked.device)
    size = asked.batch or CHUNK[asked.device]
    with numerics(config):
        scores = score(model, data, part, config, size=size)
        shares = _by_class(model, data, part, config, size) if asked.classes else ()
    low, high = share_interval(round(scores.acc * len(part) / 100), len(part))
    statistics = inputs.statistics
    return Reevaluation(
        data=data.name,
        split=asked.split,
        samples=len(part),
        wrong=100 * data.wrong.double().mean().item() if asked.split == "train" else 0.0,
        loss=scores.loss,
        acc=scores.acc,
        acc_low=100 * low,
        acc_high=100 * high,
        top5=scores.top5,
        classes=shares,
        normalised_with=None if statistics is None else (statistics.mean, statistics.std),
        device=asked.device,
        precision=config.precision,
        flip_tta=config.flip_tta,
    )


def _config(config: RunConfig, asked: Asked) -> RunConfig:
    """The run's own way to evaluate, as far as the device allows it."""
    flip = config.flip_tta if asked.flip_tta is None else asked.flip_tta
    changes: dict[str, object] = {"device": asked.device, "flip_tta": flip, "graph": False}
    if asked.device != config.device:
        changes |= {"precision": "float32", "channels_last": False, "tf32": False}
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def _data(run: SavedRun, asked: Asked) -> Data:
    own = run.here if asked.data_dir is None else dataclasses.replace(run.here, data_dir=asked.data_dir)
    if asked.data is None or asked.data == own.data:
        return run.data(asked.data_dir)
    shape = () if run.known is None else run.known.shape
    foreign = RunConfig(
        method="sgd",
        data=asked.data,
        data_dir=own.data_dir,
        split_seed=own.split_seed,
        val_share=own.val_share,
        image_size=shape[1] if len(shape) == 3 else own.image_size,
        workers=own.workers,
    )
    return load_clean(foreign)


def _by_class(model: nn.Module, data: Data, part: Split, config: RunConfig, size: int) -> tuple[ClassShare, ...]:
    hits = torch.zeros(data.num_classes, dtype=torch.int64, device=part.y.device)
    with evaluating(model), torch.no_grad():
        for start in range(0, len(part), size):
            x, y = part.x[start : start + size], part.y[start : start + size]
            answers = logits(model, data.inputs(x, channels_last=config.channels_last), config).argmax(1)
            hits += torch.bincount(y[answers == y], minlength=data.num_classes)
    counts = torch.bincount(part.y, minlength=data.num_classes).tolist()
    return tuple(
        ClassShare(samples=count, acc=100 * right / count if count else None)
        for count, right in zip(counts, hits.tolist(), strict=True)
    )
