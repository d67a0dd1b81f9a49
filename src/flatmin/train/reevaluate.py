"""Evaluate the weights of a run again: on its own data or on other data of the same kind."""

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
    """What is evaluated, and how.

    Args:
        data: a data set by name or as "pkg:function". Default: the run's own.
        data_dir: folder of the data sets that are files. Default: that of the run.
        split: "train" (of the run's own data with the labels that were trained on), "val" or "test".
        flip_tta: mean of the logits of image and mirrored image. Default: as the run did.
        batch: samples per forward pass. Default: what is usual for the device.
        device: "cpu" or "cuda". On another kind of device than the run's it is done in float32.
        classes: the accuracy of every class too, by a second pass.

    Raises:
        ValueError: an unknown part, or a batch below 1.
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
    """Of the samples of one class: how many there are, and the percentage that is answered rightly; None of none."""

    samples: int
    acc: float | None


@dataclass(frozen=True, kw_only=True)
class Reevaluation:
    """The result of an evaluation.

    Args:
        data, split, samples: what was evaluated.
        wrong: percent of its labels that are wrong on purpose.
        loss: mean cross-entropy in nats.
        acc, top5: percent; top-5 with more than five classes only.
        acc_low, acc_high: 95 % Wilson interval of `acc` over the samples, for these weights; it says nothing about
            another seed.
        classes: by number, if asked for.
        normalised_with: mean and std of the run's training data, if they were used.
        device, precision, flip_tta: how it was evaluated.
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
    """Evaluate a run's kept weights.

    Images of bytes are normalised with the statistics of the run's training data, whatever data they are of: the model
    knows no others.

    Args:
        run: finished, with weights.
        asked: Default `Asked()`: its own test part, as the run did.

    Raises:
        ValueError: no weights, data with other classes or samples of another kind, or an unknown name.
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
    # Its own statistics are no news to the model.
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
    """How the run evaluated, where that is possible on the device."""
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
