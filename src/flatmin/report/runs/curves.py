"""The curves of runs: over epochs, updates and measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flatmin.report.figures.chart import Chart
from flatmin.report.runs.figures import POINTS, Curves, Points, Wanted, draw
from flatmin.report.runs.history import History, names_of


def charts(runs: Sequence[History]) -> list[Chart]:
    """All figures for which there are values."""
    wanted = [*_EPOCHS, *_updates(runs), *_measurements(runs)]
    return [chart for one in wanted if (chart := draw(runs, one)) is not None]


def _epochs(key: str) -> Callable[[History], Points]:
    return lambda run: _known((line.epoch, getattr(line, key)) for line in run.lines)


def _steps(key: str) -> Callable[[History], Points]:
    return lambda run: _known((row.get("step"), row.get(key)) for row in run.steps)


def _measures(key: str) -> Callable[[History], Points]:
    return lambda run: _known((row.get("epoch"), row.get(key)) for row in run.measures)


def _known(pairs: Iterable[tuple[Any, Any]]) -> Points:
    good = [(x, y) for x, y in pairs if x is not None and y is not None and math.isfinite(y)]
    return [x for x, _ in good], [y for _, y in good]


_LOSSES: Curves = {
    "training": _epochs("train_loss"),
    "at perturbed weights": _epochs("perturbed_loss"),
    "validation": _epochs("val_loss"),
}
_ACCURACIES: Curves = {
    "validation": _epochs("val_acc"),
    "training": _epochs("train_acc"),
    "test": _epochs("test_acc"),
}
_EPOCHS = (
    Wanted(
        "Losses",
        "The training losses are means over the samples of an epoch while the weights change: at the weights, and at "
        "the perturbed weights of methods with two passes. The validation loss is measured after the epoch.",
        _LOSSES,
        y="cross-entropy",
        log=True,
    ),
    Wanted(
        "Accuracy",
        "The star marks the epoch whose weights are kept. Test accuracy is shown for epochs at which it was measured.",
        _ACCURACIES,
        y="accuracy, %",
        marked=True,
    ),
    Wanted("Memorisation of wrong labels", "", {"memorised": _epochs("memorised")}, y="memorised, %", zero=True),
    Wanted("Learning rate", "At the start of the epoch.", {"lr": _epochs("lr")}, y="lr", height=280, zero=True),
    Wanted("Radius", "At the end of the epoch.", {"rho": _epochs("rho")}, y="rho", height=280, zero=True),
    Wanted("Time", "Training only.", {"seconds": _epochs("seconds")}, y="seconds per epoch", height=280, zero=True),
    Wanted("Speed", "", {"samples": _epochs("images_per_second")}, y="samples per second", height=280, zero=True),
)

# The diagnostics of `SAM.diagnostics` that share a figure.
_DIAGNOSTICS: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("Losses of updates", "loss is the mean since the previous point, loss_perturbed that of the last update.",
     ("loss", "loss_perturbed"), "loss"),
    ("Norms of the gradients", "At the weights, and at the perturbed weights.",
     ("gradient_norm", "perturbed_gradient_norm"), "norm"),
    ("Angle of the two gradients", "Cosine of the gradients at the weights and at the perturbed weights.",
     ("cosine",), "cosine"),
    ("Angle of successive perturbations", "Cosine of the perturbation and the perturbation before it.",
     ("ascent_cosine",), "cosine"),
    ("Norm of the perturbation", "As computed (epsilon_asked), and as applied after rounding (epsilon_norm).",
     ("epsilon_asked", "epsilon_norm"), "norm"),
    ("Rounding of the perturbation", "Projection of the applied perturbation on the computed one, cosine of the two, "
     "and share of the entries that rounding left unchanged.",
     ("epsilon_projection", "epsilon_cosine", "epsilon_unmoved"), "share"),
    ("Entries of the two gradients", "Shares of the entries by the ratio of the gradient at the perturbed weights to "
     "that at the weights, and share of the entries with the same sign.",
     ("ratio_above_1", "ratio_0_to_1", "ratio_minus_1_to_0", "ratio_below_minus_1", "ratio_larger", "same_sign"),
     "share"),
    ("Samples", "Samples misclassified at the perturbed weights, and those of them that are correct at the weights.",
     ("misclassified", "flipped"), "samples per batch"),
    ("Norm of the weights", "", ("weight_norm",), "norm"),
)  # fmt: skip
NOT_A_DIAGNOSTIC = ("step", "epoch", "lr", "rho", "seconds", "images")


def _updates(runs: Sequence[History]) -> list[Wanted]:
    there = names_of([row for run in runs for row in run.steps], without=NOT_A_DIAGNOSTIC)
    grouped = {name for _, _, names, _ in _DIAGNOSTICS for name in names}
    groups = [*_DIAGNOSTICS, *((name, "", (name,), name) for name in there if name not in grouped)]
    long = any(len(run.steps) > POINTS for run in runs)
    more = f" Curves with more than {POINTS} points show means of consecutive points." if long else ""
    return [
        Wanted(
            title,
            caption + more,
            {name: _steps(name) for name in names if name in there},
            x="updates",
            y=y,
            height=340,
            zero=y != "loss",
            log=y == "loss",
        )
        for title, caption, names, y in groups
    ]


def _measurements(runs: Sequence[History]) -> list[Wanted]:
    there = names_of([row for run in runs for row in run.measures], without=("step", "epoch"))
    eigen = [name for name in there if name.removeprefix("lambda_").isdigit()]
    groups = {"Largest eigenvalues": eigen, **{f"Measured: {name}": [name] for name in there if name not in eigen}}
    return [
        Wanted(
            title,
            "Measured on the training loss after an epoch, on the first training samples, in eval mode.",
            {name: _measures(name) for name in names},
            y="eigenvalue" if names is eigen else names[0],
            height=340,
            log=True,
        )
        for title, names in groups.items()
        if names
    ]
