"""What runs cost before they are done."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from flatmin.data.base import Data
from flatmin.data.named import DATASETS
from flatmin.study.timing import one_thread
from flatmin.train.config import RunConfig
from flatmin.train.feed import steps_of
from flatmin.train.numerics import autocast
from flatmin.train.sources import build_model, load_clean
from flatmin.train.trainer import build_recipe

_SAMPLES = {"cpu": 8, "cuda": 256}


def training_samples(config: RunConfig) -> int:
    """Samples that a run trains on: by the official size where the table has it, else by reading the data."""
    if config.train_size is not None:
        return config.train_size
    known = DATASETS.get(config.data)
    if known is None or known.train is None:
        return len(load_clean(config).train)
    return known.train if config.train_on_val else known.train - round(config.val_share * known.train)


def cost_of(config: RunConfig) -> float:
    """Gradient evaluations on one batch of the whole run: epochs, times updates, times the recipe's own cost."""
    updates = config.epochs * steps_of(config, training_samples(config))
    return updates * build_recipe(config).for_length(updates).gradient_evaluations


def guess_seconds(configs: Sequence[RunConfig], workers: int) -> float:
    """A guess of the wall time of runs on so many workers, from one gradient of each network on a few samples.

    Raises:
        OSError, ValueError, ModuleNotFoundError: the data or a network cannot be had.
    """
    known: dict[tuple[object, ...], float] = {}
    data: dict[tuple[object, ...], Data] = {}
    total = 0.0
    for config in configs:
        source = (config.data, config.data_dir, config.split_seed, config.train_on_val, config.image_size)
        if source not in data:
            data[source] = load_clean(config)
        key = (*source, config.model, str(config.model_params), config.device, config.precision)
        if key not in known:
            known[key] = _gradient_seconds(config, data[source])
        total += cost_of(config) * config.batch_size * known[key]
    return total / max(1, workers)


def _gradient_seconds(config: RunConfig, data: Data) -> float:
    """Seconds of forward and backward for one sample of a batch."""
    few = min(_SAMPLES[config.device], config.batch_size, len(data.train))
    part = data.train.only(slice(few)).to(config.device)
    model = build_model(config, data).train()
    x = data.inputs(part.x[slice(few)], channels_last=config.channels_last)
    times = []
    with one_thread(), torch.random.fork_rng(devices=[]):
        for _ in range(3):
            begun = time.perf_counter()
            with autocast(config):
                output = model(x).float()
            F.cross_entropy(output, part.y).backward()
            if config.device != "cpu":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
    return min(times) / few
