"""A small network trained by SAM with constant and diminishing step sizes."""

from __future__ import annotations

import statistics

import numpy as np

from flatmin.theory.demonstrations.demonstration import (
    PAPER,
    Claim,
    Demonstration,
    DemonstrationResult,
    Panel,
    PanelCurve,
    above,
    below,
)
from flatmin.train.config import RunConfig
from flatmin.train.loop import train
from flatmin.train.result import Epoch
from flatmin.train.schedule import LearningRateSchedule
from flatmin.train.sources import load_data

ARMS = (
    ("constant 0.1", "constant", 0.1),
    ("constant 0.01", "constant", 0.01),
    ("constant 0.001", "constant", 0.001),
    ("Diminish 1", "diminish1", 0.1),
    ("Diminish 2", "diminish2", 0.1),
    ("Diminish 3", "diminish3", 0.1),
)
SEEDS, EPOCHS = (0, 1), 8


def _config(schedule: str, lr: float, seed: int) -> RunConfig:
    return RunConfig(
        method="sam",
        rho=0.05,
        data="digits",
        model="mlp",
        noise=0.0,
        batch_size=8,
        momentum=0.0,
        weight_decay=1e-3,
        epochs=EPOCHS,
        schedule=schedule,
        lr=lr,
        seed=seed,
        selection="last",
    )


def _run() -> DemonstrationResult:
    data = load_data(_config("constant", 0.1, 0))
    rows: list[tuple[str | float, ...]] = []
    losses, accuracies = {}, {}
    curves, dots = [], []
    for number, (label, schedule, lr) in enumerate(ARMS):
        lines: list[list[Epoch]] = []
        ends, tests = list[float](), list[float]()
        for seed in SEEDS:
            epochs: list[Epoch] = []
            result = train(_config(schedule, lr, seed), data=data, on_epoch=epochs.append)
            lines.append(epochs)
            if result.failure is not None or result.train_ce is None or result.chosen is None:
                raise ArithmeticError(f"the run with {label} failed: {result.failure}.")
            ends.append(result.train_ce)
            tests.append(float(result.chosen["test_acc"]))
        losses[label] = statistics.fmean(ends)
        accuracies[label] = statistics.fmean(tests)
        rule = LearningRateSchedule(kind=schedule, lr=lr, epochs=EPOCHS, steps_per_epoch=1)
        steps = [rule.at(e) for e in range(EPOCHS)]
        both = ", ".join(f"{acc:.1f}" for acc in tests)
        rows.append((label, sum(steps), sum(s * s for s in steps), losses[label], accuracies[label], both))
        y = np.array([[line.val_loss for line in epochs] for epochs in lines]).mean(axis=0)
        dots.append(
            PanelCurve(label=label, x=np.array([sum(steps)]), y=np.array([losses[label]]), style="points", color=number)
        )
        curves.append(PanelCurve(label=label, x=np.arange(1.0, EPOCHS + 1), y=y, color=number))
    claims: list[Claim] = []
    small, tiny = "constant 0.01", "constant 0.001"
    for label in ("constant 0.1", "Diminish 1", "Diminish 2", "Diminish 3"):
        claims.append(above(f"{label}: test accuracy", accuracies[label], 90.0))
        claims.append(
            below(f"{label}: train loss is at most half of that of {small}", losses[label], losses[small] / 2)
        )
    claims.append(below(f"{small}: train loss is at most half of that of {tiny}", losses[small], losses[tiny] / 2))
    return DemonstrationResult(
        title="A small network with constant and diminishing steps",
        statement=(
            "A scaled-down version of the paper's table: a fully connected network on handwritten digits, SAM with "
            f"rho = 0.05, batches of 8, no momentum, {EPOCHS} epochs, means over {len(SEEDS)} seeds. Sums are over "
            "epochs. In so few epochs the sum of the steps matters most: small constant steps do not reach a low loss, "
            "and the constant step 0.1, with the largest sum, reaches the lowest. Two seeds are too few to rank the "
            "diminishing rules."
        ),
        columns=("step", "sum t", "sum t^2", "train loss", "test %", "each seed"),
        rows=tuple(rows),
        claims=tuple(claims),
        panels=(
            Panel(
                title=f"mean of {len(SEEDS)} seeds",
                xlabel="epoch",
                ylabel="validation loss (nats)",
                curves=tuple(curves),
                log_y=True,
                low=0.01,
            ),
            Panel(
                title="training loss over the sum of the steps",
                xlabel="sum of the steps over epochs",
                ylabel="final training loss (nats)",
                curves=tuple(dots),
                log_x=True,
                log_y=True,
            ),
        ),
    )


NETWORK = Demonstration(
    "network",
    "a small network on handwritten digits, constant and diminishing steps",
    f"{PAPER}, experiments: a scaled-down version of their table, with this network and these data",
    _run,
)
