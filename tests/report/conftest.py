"""A small made-up comparison, so that tables and pages are tested without training anything."""

from collections.abc import Callable

import pytest

from flatmin.stats import summarise
from flatmin.study.summary import Choice, Ratio, Row, Summary

SEEDS = 3


def make_row(
    label: str, *, method: str = "sam", rho: float | None = 0.2, last: tuple[float, ...] = (94.0, 95.0, 94.5), **changes
):
    values = dict(
        label=label,
        method=method,
        rho=rho,
        gradient_evaluations=1.0 if rho is None else 2.0,
        n=len(last),
        last=summarise(last),
        best=summarise([v + 0.5 for v in last]),
        diff=None if label == "sgd" else summarise([v - 77.0 for v in last]),
        memorised=summarise([8.0 + v / 100 for v in last]),
        train_ce=summarise([0.9 + v / 1000 for v in last]),
        lambda_max=summarise([20.0 + v / 10 for v in last]),
        lambda_residual=1e-3,
        time_ratio=Ratio(median=2.01, q25=1.95, q75=2.1),
    )
    return Row(**(values | changes))


def make_summary(*labels: str, seeds: int = SEEDS, **changes) -> Summary:
    rows = [make_row("sgd", method="sgd", rho=None, last=(76.0, 77.5, 77.0)[:seeds])]
    rows += [make_row(label, last=(94.0, 95.0, 94.5)[:seeds]) for label in labels]
    curve = [[float(e) for e in range(5)] for _ in range(seeds)]
    values = dict(
        title="Digits with 40 % wrong labels",
        rows=rows,
        curves={row.label: {"memorised": curve, "test_acc": curve} for row in rows},
        notes=["The methods are not ranked: the largest difference is within the noise."],
        command="flatmin compare --seeds 3",
        environment={"versions": {"torch": "2.13.0", "absent": None}, "threads": 1},
    )
    return Summary(**(values | changes))


@pytest.fixture
def summary() -> Summary:
    tried = [(0.1, summarise([90.0, 91.0])), (0.2, summarise([94.0, 95.0]))]
    choices = [Choice(values={"rho": rho}, val_acc=stat, chosen=rho == 0.2) for rho, stat in tried]
    return make_summary("sam", "asam", tuning={"sam": tried}, choices={"sam": choices})


@pytest.fixture
def build() -> Callable[..., Summary]:
    return make_summary


@pytest.fixture
def nothing():
    return summarise([])
