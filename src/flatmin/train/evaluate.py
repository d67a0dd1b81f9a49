"""What is recorded of a model: accuracy, loss, memorised labels, curvature."""

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
CURVATURE_CHUNK = 150  # samples per gradient with a graph
_USUAL = 3 * 64 * 64  # numbers in a sample; of larger ones a pass takes fewer
TRAINED_SHARE = 0.95
TOP = 5
_TINY = 1e-300  # for the logarithm of what counts nothing


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of one part of the data: mean cross-entropy in nats, accuracies in percent; top-5 with more classes only."""

    loss: float
    acc: float
    top5: float | None


def score(
    model: nn.Module, data: Data, split: Split, config: RunConfig, world: World = ALONE, *, size: int | None = None
) -> Scores:
    """The model on un-augmented samples, in eval mode, shared by the processes, all of which must call it.

    Args:
        model: not wrapped in DistributedDataParallel.
        data: that the part belongs to.
        split: the part.
        config: precision, memory format, and whether images are seen mirrored too.
        world: the processes.
        size: samples per forward pass. Default: what is usual for the device.
    """
    size = size or _fewer(CHUNK[config.device], split.x)
    starts = range(0, len(split), size)
    sums = torch.zeros(3, dtype=torch.float64, device=split.y.device)
    with evaluating(model), torch.no_grad():
        for turn in range(0, len(starts), world.size):
            # Sharded models need all processes in every forward pass, so one without a share repeats the first.
            mine = turn + world.rank < len(starts)
            start = starts[turn + world.rank] if mine else 0
            x, y = split.x[start : start + size], split.y[start : start + size]
            output = logits(model, data.inputs(x, channels_last=config.channels_last), config)
            if mine:
                sums += _sums(output, y)
    loss, right, among = (world.sum_(sums) / len(split)).tolist()
    return Scores(loss=loss, acc=100 * right, top5=100 * among if data.num_classes > TOP else None)


def logits(model: nn.Module, x: Tensor, config: RunConfig) -> Tensor:
    """Outputs in float32, averaged over image and mirrored image if so configured."""
    with autocast(config):
        output: Tensor = model(x).float()
        if config.flip_tta and x.dim() == 4:
            output = (output + model(x.flip(3)).float()) / 2
    return output


def _sums(output: Tensor, y: Tensor) -> Tensor:
    """Sum of the losses, right answers, and targets among the first five."""
    best = output.topk(min(TOP, output.shape[1]), 1).indices == y.unsqueeze(1)
    loss = F.cross_entropy(output.double(), y, reduction="sum")
    return torch.stack([loss, (output.argmax(1) == y).sum().double(), best.sum().double()])


def memorised(model: nn.Module, data: Data, config: RunConfig, world: World = ALONE) -> float | None:
    """Percent of the wrong training labels that the model reproduces; None if there are none."""
    wrong = data.wrong
    if not bool(wrong.any()):
        return None
    return score(model, data, data.train.only(wrong), config, world).acc


@dataclass(frozen=True, kw_only=True)
class Chance:
    """What a network reaches that knows how frequent the classes are and nothing else.

    Args:
        loss: cross-entropy of the class frequencies as a constant answer: the entropy of the training labels, log K if
            all classes are equally frequent.
        acc: percent of right answers of the most frequent class as a constant answer.
        least: cross-entropy that is left to a network which answers every sample rightly before noise, and has learned
            the shares of wrong labels and the smoothed targets; 0 without either.
    """

    loss: float
    acc: float
    least: float

    @classmethod
    def of(cls, data: Data, config: RunConfig) -> Chance:
        """Of a training part with its wrong labels and of the loss that is trained."""
        shares = torch.bincount(data.train.y.cpu(), minlength=data.num_classes).double() / len(data.train)
        entropy = -float(torch.special.xlogy(shares, shares).sum())
        wrong, others = float(data.wrong.double().mean()), data.num_classes - 1
        # Where wrong labels always are of one other class, a network can learn more of them.
        among = 1 if config.noise and config.noise_kind == "asymmetric" else max(1, others)
        smooth = config.label_smoothing / max(1, others + (config.smoothing == "uniform"))
        on = 1 - smooth * others  # the target of the label; `smooth` is that of every other class
        least = -(1 - wrong) * math.log(max(on * (1 - wrong) + smooth * wrong, _TINY))
        least -= wrong * math.log(max(on * wrong / among + smooth * (1 - wrong / among), _TINY))
        return cls(loss=entropy, acc=100 * float(shares.max()), least=min(least, entropy))

    def beaten(self, scores: Scores) -> bool:
        """Whether a network has learned: a loss clearly below, or more than half of what chance gets wrong is right.

        Clearly is by more than 5 %, or by more than half of what there is between chance and `least`, if that is less.
        The second counts because a network that is too sure of itself has a large loss, whatever it has learned.
        """
        if not math.isfinite(scores.loss):
            return False
        bound = max(TRAINED_SHARE * self.loss, (self.loss + self.least) / 2)
        return scores.loss < bound or scores.acc > (100 + self.acc) / 2 or scores.acc == 100


def batches(data: Data, split: Split, size: int = CURVATURE_CHUNK) -> Iterator[tuple[Tensor, Tensor]]:
    """The part in order, in batches ready for the model.

    Raises:
        ValueError: samples in files, and more of them than should be kept in memory.
    """
    check_held(split.x, len(split))
    size = _fewer(size, split.x)
    for start in range(0, len(split), size):
        yield data.inputs(split.x[start : start + size]), split.y[start : start + size]


def _fewer(size: int, x: Samples) -> int:
    """As many samples, or as many as have so many numbers."""
    return max(1, min(size, size * _USUAL // math.prod(x.shape[1:])))


def sharpness(model: nn.Module, data: Data, *, seed: int = 0) -> dict[str, Any]:
    """lambda_max of the mean cross-entropy of the un-augmented training part, in eval mode, without weight decay.

    Returns:
        value, residual (relative), products with the Hessian, converged; see `flatmin.measure.krylov.Spectrum`.
    """
    problem = Problem(model, F.cross_entropy, list(batches(data, data.train)), split="train")
    run = spectrum(Hessian(problem), seed=seed)
    return {
        "value": run.largest,
        "residual": float(run.top_residuals[0]),
        "products": run.products,
        "converged": run.converged,
    }
