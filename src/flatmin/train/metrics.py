"""What is recorded of a model: accuracy, loss, memorised labels, curvature."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatmin.data.base import Data, Split
from flatmin.measure.curvature import Hessian
from flatmin.measure.krylov import spectrum
from flatmin.measure.modes import evaluating
from flatmin.measure.problem import Problem

CHUNK = 300  # samples per forward pass in evaluation
CURVATURE_CHUNK = 150  # samples per gradient with a graph
TRAINED_SHARE = 0.95


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One look at a model between two epochs: percent, and nats for the loss."""

    val_acc: float
    val_loss: float
    test_acc: float
    memorised: float | None


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """Outputs for all of x in eval mode, without a graph."""
    with evaluating(model), torch.no_grad():
        return torch.cat([model(part) for part in x.split(CHUNK)])


def accuracy(output: Tensor, target: Tensor) -> float:
    """Percent of targets hit by the largest logit."""
    return 100.0 * (output.argmax(1) == target).double().mean().item()


def score(model: nn.Module, data: Data) -> Scores:
    """Validation and test accuracy, and the share of wrong training labels that the model reproduces."""
    wrong = data.wrong
    x = torch.cat([data.val.x, data.test.x, data.train.x[wrong]])
    val, test, memory = logits(model, x).split([len(data.val), len(data.test), int(wrong.sum())])
    return Scores(
        val_acc=accuracy(val, data.val.y),
        val_loss=F.cross_entropy(val, data.val.y).item(),
        test_acc=accuracy(test, data.test.y),
        memorised=accuracy(memory, data.train.y[wrong]) if len(memory) else None,
    )


def train_cross_entropy(model: nn.Module, train: Split) -> float:
    """Mean cross-entropy of the training part in eval mode, with the labels that were trained on, in nats."""
    return F.cross_entropy(logits(model, train.x), train.y).item()


def has_trained(cross_entropy: float, num_classes: int) -> bool:
    """False if the loss stayed at the guessing level: at least 95 % of log K, or not a number."""
    return cross_entropy < TRAINED_SHARE * math.log(num_classes)


def batches(split: Split, size: int = CURVATURE_CHUNK) -> list[tuple[Tensor, Tensor]]:
    """The part in order, in batches."""
    return list(zip(split.x.split(size), split.y.split(size), strict=True))


def sharpness(model: nn.Module, train: Split, *, seed: int = 0) -> dict[str, Any]:
    """lambda_max of the mean cross-entropy of the un-augmented training part, in eval mode, without weight decay.

    Returns:
        value, residual (relative), products with the Hessian, converged; see `flatmin.measure.krylov.Spectrum`.
    """
    problem = Problem(model, F.cross_entropy, batches(train), split="train")
    found = spectrum(Hessian(problem), seed=seed)
    return {
        "value": found.largest,
        "residual": float(found.top_residuals[0]),
        "products": found.products,
        "converged": found.converged,
    }
