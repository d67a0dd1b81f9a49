"""Conversion of events to named numbers, the same for all trackers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from flatmin.train.events import Began, Ended, EpochEnded, Event, Measured, Stepped
from flatmin.train.result import Epoch, Result
from flatmin.train.settings import canonical

Plain = bool | int | float | str

_PARTS = ("train", "val", "test")
_OUTCOME = ("trained", "train_ce", "seconds", "gradient_evaluations", "lambda_max", "chosen", "best", "last")


def scalars(event: Event) -> dict[str, float]:
    """The numbers of an event by name; values that are None are left out.

    Stepped: step/loss, step/lr, step/rho, step/images_per_second, and step/NAME for every diagnostic. A diagnostic with
    the name of one of these four becomes step/last_NAME, since it belongs to the last update alone.
    EpochEnded: epoch, and every number of the line as train/NAME, val/NAME or test/NAME.
    Measured: measure/NAME.
    Ended: summary/NAME, with summary/chosen/test_acc, summary/best/val_acc, summary/lambda_max/value and so on.
    Began, Ticked and Warned have no numbers.

    Examples:
        >>> from flatmin.train.events import Measured
        >>> scalars(Measured(epoch=1, step=10, values={"trace": 2}))
        {'measure/trace': 2.0}
    """
    pairs: Iterator[tuple[str, Any]]
    match event:
        case Stepped():
            pairs = _step(event)
        case EpochEnded():
            pairs = _epoch(event.line)
        case Measured():
            pairs = ((f"measure/{name}", value) for name, value in event.values.items())
        case Ended():
            pairs = _outcome(event.result)
        case _:
            return {}
    return {name: float(value) for name, value in pairs if isinstance(value, (int, float))}


def settings(event: Began) -> dict[str, Plain]:
    """The configuration as one flat table: nested names are joined by dots, lists by commas, and None is "none".

    It also has run.parameters, run.samples, run.steps, run.gradient_evaluations, and environment.NAME.
    """
    run = {name: getattr(event, name) for name in ("parameters", "samples", "steps", "gradient_evaluations")}
    return dict(_flat({**canonical(event.config), "run": run, "environment": canonical(event.environment)}))


def _step(event: Stepped) -> Iterator[tuple[str, Any]]:
    own = {"loss": event.loss, "lr": event.lr, "rho": event.rho}
    own["images_per_second"] = event.images / event.seconds if event.seconds > 0 else None
    for name, value in own.items():
        yield f"step/{name}", value
    for name, value in event.diagnostics.items():
        yield f"step/{f'last_{name}' if name in own else name}", value


def _epoch(line: Epoch) -> Iterator[tuple[str, Any]]:
    for name, value in dataclasses.asdict(line).items():
        part, _, rest = name.partition("_")
        if name == "epoch":
            yield name, value
        elif part in _PARTS:
            yield f"{part}/{rest}", value
        else:
            yield f"train/{name}", value


def _outcome(result: Result) -> Iterator[tuple[str, Any]]:
    for name in _OUTCOME:
        value = getattr(result, name)
        if isinstance(value, Mapping):
            yield from ((f"summary/{name}/{key}", one) for key, one in value.items())
        else:
            yield f"summary/{name}", value


def _flat(table: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Plain]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        elif isinstance(value, (list, tuple)):
            yield before + name, ",".join(str(one) for one in value)
        elif isinstance(value, (bool, int, float, str)):
            yield before + name, value
        else:
            yield before + name, "none" if value is None else str(value)
