"""Evaluation of a model: accuracy, loss, memorised labels, curvature."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatmin.data.dataset import Data, Samples, Split, check_held
from flatmin.measure.curvature import Hessian
from flatmin.measure.krylov import spectrum
from flatmin.measure.modes import evaluating
from flatmin.measure.problem import Problem
from flatmin.train.config import RunConfig
from flatmin.train.numerics import autocast
from flatmin.train.processes import ALONE, World

CHUNK = {"cpu": 300, "cuda": 2000}  # samples per forward pass in evaluation
CURVATURE_CHUNK = 150  # samples per pass when measuring curvature
_USUAL = 3 * 64 * 64  # numbers per sample; with larger samples, a pass has fewer of them
TRAINED_SHARE = 0.95
TOP = 5
_TINY = 1e-300  # avoids log(0) in terms whose factor is 0


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Mean cross-entropy in nats, accuracy and top-5 accuracy in percent; top-5 only with more than five classes."""

    loss: float
    acc: float
    top5: float | None


def score(
    model: nn.Module, data: Data, split: Split, config: RunConfig, world: World = ALONE, *, size: int | None = None
) -> Scores:
    """Evaluate the model on samples without augmentation, in eval mode.

    The processes share the work, and all of them must call this function.

    Args:
        model: the model, not wrapped in DistributedDataParallel.
        data: the data set.
        split: the part of the data set to evaluate on.
        config: precision, memory format, and whether to average over mirrored images.
        world: the processes.
        size: samples per forward pass. Default: depends on the device.
    """
    size = size or _fewer(CHUNK[config.device], split.x)
    starts = range(0, len(split), size)
    sums = torch.zeros(3, dtype=torch.float64, device=split.y.device)
    with evaluating(model), torch.no_grad():
        for turn in range(0, len(starts), world.size):
            # Sharded models need all processes in every forward pass; a process without samples repeats the first ones.
            mine = turn + world.rank < len(starts)
            start = starts[turn + world.rank] if mine else 0
            x, y = split.x[start : start + size], split.y[start : start + size]
            output = logits(model, data.inputs(x, channels_last=config.channels_last), config)
            if mine:
                sums += _sums(output, y)
    loss, right, among = (world.sum_(sums) / len(split)).tolist()
    return Scores(loss=loss, acc=100 * right, top5=100 * among if data.num_classes > TOP else None)


def logits(model: nn.Module, x: Tensor, config: RunConfig) -> Tensor:
    """Logits in float32; with `flip_tta`, the mean over each image and its mirror image."""
    with autocast(config):
        output: Tensor = model(x).float()
        if config.flip_tta and x.dim() == 4:
            output = (output + model(x.flip(3)).float()) / 2
    return output


def _sums(output: Tensor, y: Tensor) -> Tensor:
    """Sum of the losses, number of correct answers, and number of targets among the five largest logits."""
    best = output.topk(min(TOP, output.shape[1]), 1).indices == y.unsqueeze(1)
    loss = F.cross_entropy(output.double(), y, reduction="sum")
    return torch.stack([loss, (output.argmax(1) == y).sum().double(), best.sum().double()])


def memorised(model: nn.Module, data: Data, config: RunConfig, world: World = ALONE) -> float | None:
    """Percentage of the wrong training labels that the model predicts; None without wrong labels."""
    wrong = data.wrong
    if not bool(wrong.any()):
        return None
    return score(model, data, data.train.only(wrong), config, world).acc


@dataclass(frozen=True, kw_only=True)
class Chance:
    """Chance level: what a constant prediction from the class frequencies reaches.

    Args:
        loss: cross-entropy of the class frequencies as a constant prediction. This is the entropy of the training
            labels: log K if all classes are equally frequent.
        acc: accuracy of always predicting the most frequent class, in percent.
        least: cross-entropy of a network that predicts every clean label correctly and has learned the share of wrong
            labels and the smoothed targets; 0 without label noise and label smoothing.
    """

    loss: float
    acc: float
    least: float

    @classmethod
    def of(cls, data: Data, config: RunConfig) -> Chance:
        """The chance level for a training part with its label noise, and for the training loss."""
        shares = torch.bincount(data.train.y.cpu(), minlength=data.num_classes).double() / len(data.train)
        entropy = -float(torch.special.xlogy(shares, shares).sum())
        wrong, others = float(data.wrong.double().mean()), data.num_classes - 1
        # With asymmetric noise each class has a single wrong class, which a network can learn.
        among = 1 if config.noise and config.noise_kind == "asymmetric" else max(1, others)
        smooth = config.label_smoothing / max(1, others + (config.smoothing == "uniform"))
        on = 1 - smooth * others  # target of the label's class; `smooth` is the target of every other class
        least = -(1 - wrong) * math.log(max(on * (1 - wrong) + smooth * wrong, _TINY))
        least -= wrong * math.log(max(on * wrong / among + smooth * (1 - wrong / among), _TINY))
        return cls(loss=entropy, acc=100 * float(shares.max()), least=min(least, entropy))

    def beaten(self, scores: Scores) -> bool:
        """Whether a network is clearly better than chance, in its loss or in its accuracy.

        In its loss: below chance by more than 5 %, or by more than half of the distance from chance to `least` if that
        is less. In its accuracy: it classifies correctly more than half of the samples that chance gets wrong. This
        second criterion is needed because an overconfident network has a large loss even if it has learned.
        """
        if not math.isfinite(scores.loss):
            return False
        bound = max(TRAINED_SHARE * self.loss, (self.loss + self.least) / 2)
        return scores.loss < bound or scores.acc > (100 + self.acc) / 2 or scores.acc == 100


def batches(data: Data, split: Split, size: int = CURVATURE_CHUNK) -> Iterator[tuple[Tensor, Tensor]]:
    """The samples of a part in order, in batches that are ready for the model.

    Raises:
        ValueError: the samples are in files, and too many to keep in memory.
    """
    check_held(split.x, len(split))
    size = _fewer(size, split.x)
    for start in range(0, len(split), size):
        yield data.inputs(split.x[start : start + size]), split.y[start : start + size]


def _fewer(size: int, x: Samples) -> int:
    """`size`, or fewer if the samples are large."""
    return max(1, min(size, size * _USUAL // math.prod(x.shape[1:])))


def sharpness(model: nn.Module, data: Data, *, seed: int = 0) -> dict[str, Any]:
    """lambda_max of the mean cross-entropy on the training part, without augmentation or weight decay, in eval mode.

    Returns:
        value, residual (relative), products (number of Hessian-vector products) and converged; see
        `flatmin.measure.krylov.Spectrum`.
    """
    problem = Problem(model, F.cross_entropy, list(batches(data, data.train)), split="train")
    run = spectrum(Hessian(problem), seed=seed)
    return {
        "value": run.largest,
        "residual": float(run.top_residuals[0]),
        "products": run.products,
        "converged": run.converged,
    }
