"""The records of a run: one line per epoch, and the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

VERSION = 1  # of result.json
_BELOW, _ABOVE = 0.99, 1.01  # a loss between these multiples of the chance level counts as chance level


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One line of metrics.jsonl. Accuracies and `memorised` are in percent, losses in nats.

    Args:
        epoch: number of the epoch, from 1.
        lr: learning rate of the epoch's first update.
        rho: radius of the first param group; None for a method that does not perturb the weights w.
        train_loss: mean over the epoch's updates of the loss that the step returned: at w before the step, or at
            w + eps for methods that skip pass 1 or start it elsewhere.
        perturbed_loss: mean loss of the last pass, at w + eps; None unless the method has exactly two passes.
        train_acc: accuracy in the first passes, on augmented images, while the weights change.
        val_acc, val_top5, val_loss: on the validation part after the epoch; top-5 only with more than five classes.
        test_acc, test_top5: on the test part; None if it was not evaluated in this epoch.
        memorised: percentage of the wrong training labels that the model predicts; None without label noise.
        seconds: training time of the epoch in seconds, without evaluation.
        images_per_second: training samples per second of `seconds`.
        peak_memory: largest GPU memory so far, in bytes; None on a CPU.
        skipped: number of updates that were skipped because they were not finite.
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
    """The result of a run: the content of result.json.

    Args:
        gradient_evaluations: gradient evaluations per step: the average of the recipe, or the number that the run used
            if the method decides by value.
        trained: whether the selected weights do better than chance on the training part, see
            `flatmin.train.evaluate.Chance.beaten`.
        last, best: the last epoch, and the epoch with the best validation accuracy (ties: lower validation loss, then
            earlier); None if the run failed. Their `test_acc` is None if the test part was not evaluated then.
        chosen: the weights that are kept: `selection`, epoch, val_acc, test_acc, test_top5 and test_loss; None if the
            run failed.
        train_ce: mean cross-entropy of the selected weights on the training part, without augmentation, with the noisy
            labels, in eval mode; lambda_max is measured on the same loss.
        lambda_max: value, relative residual, products and convergence; None if not measured.
        seconds: training time in seconds, without evaluation.
        failure: why the run stopped early, or None.
        chance: cross-entropy of a constant prediction of the class frequencies; None for failed runs and for runs of
            earlier versions.
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
        """Why a run that reached its end has not learned, as the end of a sentence; None if it has learned."""
        if self.trained or self.failure is not None or self.train_ce is None:
            return None
        if self.chance is None:
            return f"has not learned: the training loss of the kept weights is {self.train_ce:.3f}"
        level = f"({self.train_ce:.3f}; chance is {self.chance:.3f})"
        if self.train_ce > _ABOVE * self.chance:
            return f"has not learned: the training loss of the kept weights is above chance level {level}"
        if self.train_ce < _BELOW * self.chance:
            return f"has hardly learned: the training loss of the kept weights is just below chance level {level}"
        return f"has not learned: the training loss of the kept weights is at chance level {level}"
