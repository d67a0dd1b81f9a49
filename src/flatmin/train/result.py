"""What a run writes: a line per epoch, and the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

VERSION = 1  # of result.json
_BELOW, _ABOVE = 0.99, 1.01  # times chance: in between, a loss is at chance level


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One line of metrics.jsonl. Accuracies and `memorised` in percent, losses in nats.

    Args:
        epoch: from 1.
        lr: of the epoch's first update.
        rho: radius of the first param group; None for a method that never leaves w.
        train_loss: mean over the epoch's updates of the loss that the step returned: at w before the step, or at
            w + eps for methods that skip or move pass 1.
        perturbed_loss: the same of the loss of the last pass, at w + eps; None for methods with another number of
            passes than two.
        train_acc: of the first passes, on augmented images, while the weights change.
        val_acc, val_top5, val_loss: on the validation part after the epoch; top-5 only with more than five classes.
        test_acc, test_top5: None where the test part was not looked at.
        memorised: share of the wrong training labels that the model reproduces; None without label noise.
        seconds: training only.
        images_per_second: training samples over `seconds`.
        peak_memory: largest memory of the GPU so far, in bytes; None on a CPU.
        skipped: updates of the epoch that were skipped as not finite.
    """

    epoch: int
    lr: float
    rho: float | None
    train_loss: float
    val_acc: float
    val_loss: float
    test_acc: float | None
    memorised: float | None
    seconds: float
    perturbed_loss: float | None = None
    train_acc: float | None = None
    val_top5: float | None = None
    test_top5: float | None = None
    images_per_second: float | None = None
    peak_memory: int | None = None
    skipped: int = 0


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run ended with: the content of result.json.

    Args:
        gradient_evaluations: per step; what the recipe costs on average, or what the run took if its rule decides by
            value.
        trained: whether the chosen weights do better than chance on the training part, see
            `flatmin.train.evaluate.Chance.beaten`.
        last, best: the last epoch and the one with the best validation accuracy (ties: lower validation loss, then
            earlier); None if the run failed. `test_acc` in them is None where the test part was not looked at then.
        chosen: of the weights that are kept: by which `selection`, from which epoch, and their val_acc, test_acc,
            test_top5 and test_loss; None if the run failed.
        train_ce: mean cross-entropy of the un-augmented training part with its noisy labels, eval mode, of the chosen
            weights, as lambda_max.
        lambda_max: value, relative residual, products and convergence; None if not measured.
        seconds: training only.
        failure: why the run stopped early, or None.
        chance: cross-entropy of the frequencies of the training labels as a constant answer; None for failed runs, and
            for those of earlier versions.
    """

    method: str
    rho: float | None
    gradient_evaluations: float
    seed: int
    epochs: int
    noise: float
    trained: bool
    last: dict[str, Any] | None
    best: dict[str, Any] | None
    train_ce: float | None
    lambda_max: dict[str, Any] | None
    seconds: float
    chosen: dict[str, Any] | None = None
    failure: str | None = None
    chance: float | None = None

    @property
    def untrained(self) -> str | None:
        """In what way a run that reached its end has not trained; None if it has."""
        if self.trained or self.failure is not None or self.train_ce is None:
            return None
        if self.chance is None:
            return f"has not learned: its final training loss is {self.train_ce:.3f}"
        level = f"({self.train_ce:.3f}; chance is {self.chance:.3f})"
        if self.train_ce > _ABOVE * self.chance:
            return f"has not learned: its final training loss is above chance level {level}"
        if self.train_ce < _BELOW * self.chance:
            return f"has hardly learned: its final training loss is little below chance level {level}"
        return f"has not learned: its final training loss is at chance level {level}"
