"""What runs cost before they are done."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch.nn import functional as F

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


class Sizes:
    """How many samples runs train on and what these look like, each data set asked once.

    Known by name where the table of data sets has the official numbers, so that no data need be there; read otherwise.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[object, ...], tuple[int, Inputs]] = {}

    def of(self, config: RunConfig) -> tuple[int, Inputs]:
        """Training samples, and what the model takes.

        Raises:
            OSError, ValueError, ModuleNotFoundError: data that must be read and cannot be had.
        """
        source = (config.data, config.data_dir, config.split_seed, config.train_on_val, config.val_share)
        key = (*source, config.image_size, config.train_size)
        if key not in self._found:
            self._found[key] = _official(config) or _read(config)
        return self._found[key]

    def updates(self, config: RunConfig) -> int:
        """Updates of a whole run."""
        return config.epochs * steps_of(config, self.of(config)[0])

    def cost(self, config: RunConfig) -> float:
        """Gradient evaluations on one batch of the whole run: epochs, times updates, times the recipe's own cost."""
        updates = self.updates(config)
        return updates * build_recipe(config).for_length(updates).gradient_evaluations


def _official(config: RunConfig) -> tuple[int, Inputs] | None:
    known = DATASETS.get(config.data)
    if known is None or known.train is None or known.shape is None or known.classes is None:
        return None
    share = 0.0 if config.train_on_val else config.val_share
    samples = config.train_size or known.train - round(share * known.train)
    side = config.image_size
    shape = known.shape if side is None else (known.shape[0], side, side)
    return samples, Inputs(data=config.data, num_classes=known.classes, shape=shape)


def _read(config: RunConfig) -> tuple[int, Inputs]:
    data = load_clean(config)
    return config.train_size or len(data.train), Inputs.of(data)


def guess_seconds(configs: Sequence[RunConfig], workers: int, sizes: Sizes | None = None) -> float:
    """A guess of the wall time of runs on so many workers, from one gradient of each network on a few made-up samples.

    Training only: reading data, evaluation and the start of workers come on top.

    Raises:
        OSError, ValueError, ModuleNotFoundError: a network, a device, or data of no known size, cannot be had.
    """
    sizes = sizes or Sizes()
    known: dict[tuple[object, ...], float] = {}
    each: list[float] = []
    for config in configs:
        _, inputs = sizes.of(config)
        key: tuple[object, ...] = (
            inputs,
            config.model,
            str(config.model_params),
            config.device,
            config.precision,
            config.channels_last,
        )
        key += (min(_SAMPLES[config.device], config.batch_size),)
        if key not in known:
            known[key] = _gradient_seconds(config, inputs)
        each.append(sizes.cost(config) * config.batch_size * known[key])
    if not each:
        return 0.0
    # Runs that share a GPU share its speed.
    at_once = 1 if configs[0].device == "cuda" else max(1, min(workers, len(each)))
    return max(max(each), sum(each) / at_once)


def _gradient_seconds(config: RunConfig, inputs: Inputs) -> float:
    """Seconds of forward and backward for one sample of a batch."""
    check_machine(config)
    few = min(_SAMPLES[config.device], config.batch_size)
    model = build_model(config, inputs).train()
    x = _samples(inputs, few).to(config.device)
    if config.channels_last and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    y = torch.zeros(few, dtype=torch.long, device=config.device)
    times: list[float] = []
    with one_thread(), torch.random.fork_rng(devices=[]):
        while len(times) < 3 and sum(times) < _ENOUGH:
            begun = time.perf_counter()
            with autocast(config):
                output = model(x).float()
            F.cross_entropy(output, y).backward()
            if config.device != "cpu":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
    return min(times) / few


def _samples(inputs: Inputs, few: int) -> torch.Tensor:
    if inputs.kind == "integers":
        return torch.zeros(few, *inputs.shape, dtype=torch.long)
    return torch.rand(few, *inputs.shape)
