"""Estimates of the cost of runs before they start."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from flatmin.data.dataset import Data, Split
from flatmin.data.named import DATASETS
from flatmin.study.timing import one_thread
from flatmin.train.config import RunConfig
from flatmin.train.feed import steps_of
from flatmin.train.inputs import Inputs
from flatmin.train.numerics import autocast
from flatmin.train.sources import build_model, check_machine, load_clean
from flatmin.train.trainer import build_recipe

_SAMPLES = {"cpu": 8, "cuda": 256}
_ENOUGH = 1.0  # seconds
_TIMES = 3  # of which the fastest counts
_START = 4.0  # seconds that a worker needs to import torch and the package of the data
_FORWARD = 1 / 3  # cost of a forward pass, in gradients
_CURVATURE = 30.0  # cost of the eigenvalue, in gradients over the training part: about a dozen Lanczos products
_FEW = 64  # samples of each part that are kept after the data have been read
# Samples of the official test parts.
_TESTS = {
    **dict.fromkeys(("cifar10", "cifar100", "cifar100-coarse", "mnist", "fashion-mnist", "tiny-imagenet"), 10_000),
    **{"imagenet": 50_000, "flowers102": 6149, "pets": 3669},
}


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many samples the parts of a data set have.

    Args:
        train, val, test: numbers of samples.
        wrong: number of training samples whose label is wrong in the data themselves.
        inputs: form of the model's inputs.
        few: a few samples of each part; None where the data have not been read.
    """

    train: int
    val: int
    test: int
    wrong: int = 0
    inputs: Inputs
    few: Data | None = dataclasses.field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, data: Data) -> Counts:
        """The counts of data without the label noise of a run."""
        parts = {"train": len(data.train), "val": len(data.val), "test": len(data.test)}
        return cls(**parts, wrong=int(data.wrong.sum()), inputs=Inputs.of(data), few=_first(data))

    def steps(self, config: RunConfig) -> dict[str, float]:
        """For every metric that is a share of samples: the change in percent that one sample makes.

        For asymmetric noise, classes are assumed to be of equal size.
        """
        dataset = DATASETS.get(config.data)
        confusions = dataset.confusions if dataset and config.noise_kind == "asymmetric" else None
        share = config.noise * (len(confusions) / self.inputs.num_classes if confusions else 1.0)
        wrong = self.wrong or round(share * self.train)
        counts = {"val_acc": self.val, "test_acc": self.test, "test_top5": self.test, "memorised": wrong}
        return {metric: 100.0 / count for metric, count in counts.items() if count}


class Sizes:
    """Sizes of data sets and speeds of networks, looked up or measured once each, before the runs.

    For data sets with official splits the numbers of samples are taken from a table, so the data need not be present.
    Other data are read.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[object, ...], Counts] = {}
        self._seconds: dict[tuple[object, ...], float] = {}

    def of(self, config: RunConfig) -> tuple[int, Inputs]:
        """The number of training samples, and the form of the model's inputs.

        Raises:
            OSError, ValueError, ModuleNotFoundError: the data must be read and are not available.
        """
        sizes = self._of(config)
        return sizes.train, sizes.inputs

    def steps(self, config: RunConfig) -> dict[str, float]:
        """See `Counts.steps`.

        Raises:
            OSError, ValueError, ModuleNotFoundError: as `of`.
        """
        return self._of(config).steps(config)

    def official(self, config: RunConfig) -> bool:
        """Whether the sizes are known without reading the data of a run."""
        return self._key(config) in self._found or _official(config) is not None

    def take(self, config: RunConfig, data: Data) -> None:
        """Use the data of a run that have been read already."""
        self._found[self._key(config)] = Counts.of(data)

    def samples(self, config: RunConfig, count: int) -> Data:
        """Data with at most `count` training samples: real ones if the data have been read, otherwise random ones.

        Raises:
            OSError, ValueError, ModuleNotFoundError: as `of`.
        """
        counts = self._of(config)
        if counts.few is None:
            part = Split(_samples(counts.inputs, count), torch.arange(count) % counts.inputs.num_classes)
            return Data(part, part, part, num_classes=counts.inputs.num_classes, name=config.data)
        train = counts.few.train.only(slice(0, count))
        clean = None if counts.few.clean is None else counts.few.clean[:count]
        return dataclasses.replace(counts.few, train=train, clean=clean)

    def gradient_seconds(self, config: RunConfig) -> float:
        """Seconds of forward and backward pass per sample, measured on a few random samples.

        Raises:
            OSError, ValueError, ModuleNotFoundError: the network, the device or data of unknown size are not
                available.
        """
        inputs = self.of(config)[1]
        few = min(_SAMPLES[config.device], config.batch_size)
        network = (config.model, str(config.model_params), config.device, config.precision, config.channels_last)
        key = (inputs, *network, few)
        if key not in self._seconds:
            self._seconds[key] = _gradient_seconds(config, inputs, few)
        return self._seconds[key]

    def _of(self, config: RunConfig) -> Counts:
        key = self._key(config)
        if key not in self._found:
            self._found[key] = _official(config) or Counts.of(load_clean(config))
        return self._found[key]

    def parts(self, config: RunConfig) -> tuple[int, int, int]:
        """Numbers of samples in the training, validation and test part.

        Raises:
            OSError, ValueError, ModuleNotFoundError: as `of`.
        """
        sizes = self._of(config)
        return sizes.train, sizes.val, sizes.test

    @staticmethod
    def _key(config: RunConfig) -> tuple[object, ...]:
        source = (config.data, config.data_dir, config.split_seed, config.train_on_val, config.val_share)
        return (*source, config.image_size, config.train_size)

    def updates(self, config: RunConfig) -> int:
        """Number of updates of a whole run."""
        return config.epochs * steps_of(config, self.of(config)[0])

    def cost(self, config: RunConfig) -> float:
        """Gradient evaluations of a whole run, each on one batch: the updates times the recipe's cost per update."""
        updates = self.updates(config)
        return updates * build_recipe(config).for_length(updates).gradient_evaluations


def _official(config: RunConfig) -> Counts | None:
    dataset, test = DATASETS.get(config.data), _TESTS.get(config.data)
    if dataset is None or test is None or dataset.train is None or dataset.shape is None or dataset.classes is None:
        return None
    held = 0 if config.train_on_val else round(config.val_share * dataset.train)
    side = config.image_size
    shape = dataset.shape if side is None else (dataset.shape[0], side, side)
    return Counts(
        train=config.train_size or dataset.train - held,
        val=held or test,
        test=test,
        inputs=Inputs(data=config.data, num_classes=dataset.classes, shape=shape),
    )


def _first(data: Data) -> Data:
    """The first samples of each part."""

    def first(part: Split) -> Split:
        return part.only(torch.arange(min(_FEW, len(part))))

    clean = None if data.clean is None else data.clean[:_FEW].clone()
    return dataclasses.replace(data, train=first(data.train), val=first(data.val), test=first(data.test), clean=clean)


def guess_seconds(configs: Sequence[RunConfig], workers: int, sizes: Sizes | None = None) -> float:
    """Estimated wall time of runs in seconds, from timed gradients of each network on a few random samples.

    The time for reading data and augmenting images is not included.

    Args:
        configs: the runs.
        workers: number of runs at a time.
        sizes: known sizes and speeds.

    Raises:
        OSError, ValueError, ModuleNotFoundError: a network, a device or data of unknown size are not available.
    """
    sizes = sizes or Sizes()
    each = [_gradients(config, sizes) * sizes.gradient_seconds(config) for config in configs]
    if not each:
        return 0.0
    # Runs that share a GPU share its speed.
    at_once = 1 if configs[0].device == "cuda" else max(1, min(workers, len(each)))
    return max(max(each), sum(each) / at_once) + (_START if workers else 0.0)


def _gradients(config: RunConfig, sizes: Sizes) -> float:
    """Gradient evaluations of a run, counted in samples: training, evaluation, and the eigenvalue at the end."""
    train, val, test = sizes.parts(config)
    looks = config.epochs * val + (config.epochs // config.test_every if config.test_every else 1) * test
    looks += train * (config.noise > 0) * config.epochs  # to count memorised labels
    curvature = _CURVATURE * train * config.measure
    return sizes.cost(config) * config.batch_size + _FORWARD * (looks + train) + curvature


def _gradient_seconds(config: RunConfig, inputs: Inputs, few: int) -> float:
    check_machine(config)
    model = build_model(config, inputs).train()
    seconds = 0.0
    # Two samples are enough to time a large network; a small one needs a whole batch.
    for count in sorted({min(2, few), few, config.batch_size}):
        if seconds * count * _TIMES > _ENOUGH:
            break
        times: list[float] = []
        x = _samples(inputs, count).to(config.device)
        if config.channels_last and x.dim() == 4:
            x = x.to(memory_format=torch.channels_last)
        y = torch.zeros(count, dtype=torch.long, device=config.device)
        with one_thread(), torch.random.fork_rng(devices=[]):
            while len(times) < _TIMES and sum(times) < _ENOUGH:
                begun = time.perf_counter()
                with autocast(config):
                    output = model(x).float()
                F.cross_entropy(output, y).backward()
                if config.device != "cpu":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - begun)
        seconds = min(times) / count
        if sum(times) > _ENOUGH:
            break
    return seconds


def _samples(inputs: Inputs, few: int) -> torch.Tensor:
    if inputs.kind == "integers":
        return torch.zeros(few, *inputs.shape, dtype=torch.long)
    return torch.rand(few, *inputs.shape, generator=torch.Generator().manual_seed(0))
