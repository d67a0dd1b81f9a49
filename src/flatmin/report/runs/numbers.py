"""The numbers of runs side by side, and the differences between their settings."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flatmin.report.runs.history import FAILED, History
from flatmin.train.config import NEUTRAL
from flatmin.train.settings import canonical

Read = Callable[[History], float | None]


@dataclass(frozen=True)
class RunProperty:
    """A property of a run.

    Args:
        name: name in tables.
        hint: description.
        text: returns its text for a run, or None if the run does not have it.
        value: returns the number to sort by, for numbers.
    """

    name: str
    hint: str
    text: Callable[[History], str | None]
    value: Read | None = None


def _number(name: str, hint: str, value: Read, form: str) -> RunProperty:
    def text(run: History) -> str | None:
        number = value(run)
        return None if number is None else format(number, form)

    return RunProperty(name, hint, text, value)


def _of_chosen(key: str) -> Read:
    return lambda run: None if run.chosen is None else getattr(run.chosen, key)


def _of_result(key: str) -> Read:
    return lambda run: None if run.result is None else getattr(run.result, key)


def _median(key: str) -> Read:
    def value(run: History) -> float | None:
        values = [v for line in run.lines if (v := getattr(line, key)) is not None]
        return statistics.median(values) if values else None

    return value


def _memory(run: History) -> float | None:
    peaks = [line.peak_memory for line in run.lines if line.peak_memory is not None]
    return max(peaks) / 2**30 if peaks else None


def _memorised(run: History) -> float | None:
    epoch = None if run.chosen is None else run.chosen.epoch
    return next((line.memorised for line in run.lines if line.epoch == epoch), None)


def _skipped(run: History) -> float | None:
    return sum(line.skipped for line in run.lines) or None


def _lambda(run: History) -> float | None:
    lambda_max = None if run.result is None else run.result.lambda_max
    return None if lambda_max is None else lambda_max["value"]


def _method(run: History) -> str:
    params = ", ".join(f"{key.partition('.')[2] or key} {value}" for key, value in run.config.params.items())
    return run.config.method + (f" ({params})" if params else "")


def _epochs(run: History) -> str:
    return f"{len(run.lines)} of {run.config.epochs}"


QUANTITIES = (
    RunProperty("state", "a stopped or failed run can be continued with --resume", lambda run: run.state),
    RunProperty("method", "the method, with the parameters that were set", _method),
    _number("rho", "radius of the perturbation, in the method's own norm", lambda run: run.config.rho, "g"),
    RunProperty("model", "the network", lambda run: run.config.model),
    RunProperty("data", "the data set", lambda run: run.config.data),
    _number(
        "wrong labels, %", "share of wrong labels in the training part", lambda run: 100 * run.config.noise or None, "g"
    ),
    _number("seed", "seed of initialisation, label noise, order and augmentation", lambda run: run.config.seed, "d"),
    RunProperty("epochs", "finished and planned epochs", _epochs, lambda run: len(run.lines)),
    RunProperty(
        "weights of epoch",
        "the epoch whose weights are kept, and the rule",
        lambda run: None if run.chosen is None else run.chosen.text,
        _of_chosen("epoch"),
    ),
    _number("val %", "accuracy of these weights on the validation part", _of_chosen("val_acc"), ".2f"),
    _number("test %", "accuracy of these weights on the test part", _of_chosen("test_acc"), ".2f"),
    _number(
        "test top-5 %",
        "share of test samples with the true class among the five likeliest",
        _of_chosen("test_top5"),
        ".2f",
    ),
    _number("test loss", "cross-entropy on the test part", _of_chosen("test_loss"), ".4f"),
    _number(
        "train loss",
        "cross-entropy on the training part without augmentation, eval mode",
        _of_result("train_ce"),
        ".4f",
    ),
    _number("memorised, %", "share of wrong training labels that the model reproduces", _memorised, ".1f"),
    _number("lambda_max", "largest eigenvalue of the Hessian of the training loss, eval mode", _lambda, ".4g"),
    _number("gradients / step", "gradient evaluations per update", _of_result("gradient_evaluations"), "g"),
    _number("s / epoch", "seconds per epoch: median, training only", _median("seconds"), ".3g"),
    _number("samples / s", "samples per second: median, training only", _median("images_per_second"), ",.0f"),
    _number("peak memory, GiB", "peak memory of the GPU", _memory, ".2f"),
    _number("skipped updates", "updates that were skipped because a value was not finite", _skipped, "d"),
)

_SETTINGS = [quantity.name for quantity in QUANTITIES[:9]]  # settings and progress
_LISTED = ("method", "rho", "model", "data", "noise", "seed", "epochs")


def quantities_of(runs: Sequence[History]) -> list[RunProperty]:
    """The quantities that at least one run has."""
    return [quantity for quantity in QUANTITIES if any(quantity.text(run) is not None for run in runs)]


def alike(runs: Sequence[History]) -> tuple[str, list[RunProperty]]:
    """A sentence (perhaps empty) on the settings that all runs share, and the other quantities."""
    quantities = quantities_of(runs)
    shared = [
        quantity
        for quantity in quantities
        if len(runs) > 1 and quantity.name in _SETTINGS and len({quantity.text(run) for run in runs}) == 1
    ]
    told = []
    for quantity in shared:
        name, _, unit = quantity.name.partition(",")
        told += [f"{name} {quantity.text(runs[0])}{unit}"] if quantity.name != "state" else []
    left = [quantity for quantity in quantities if quantity not in shared]
    return f"Same in all runs: {'; '.join(told)}." if told else "", left


def settings(run: History) -> dict[str, str]:
    """The configuration as it is typed, by key; parameters of the method and the model under their own names."""
    values: dict[str, Any] = canonical(run.config)
    params, model = values.pop("params"), values.pop("model_params")
    values |= params | {f"model.{key}": value for key, value in model.items()}
    return {key: typed(value) for key, value in values.items() if key not in NEUTRAL}


def machine(run: History) -> dict[str, str]:
    """Versions and machine, by key."""
    facts: dict[str, Any] = {}
    for key, value in run.environment.items():
        facts |= value if isinstance(value, Mapping) else {key.replace("_", " "): value}
    return {key: str(value) for key, value in facts.items() if value not in (None, "")}


def differences(runs: Sequence[History]) -> dict[str, list[str]]:
    """Settings that differ between runs, then versions and machines that differ, with a value for each run."""
    differing = _differing([settings(run) for run in runs], "not set")
    return differing | {
        f"({key})": values for key, values in _differing([machine(run) for run in runs], "none").items()
    }


def unlisted(differing: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The differences that are not shown as a quantity."""
    return {key: values for key, values in differing.items() if key not in _LISTED}


def _differing(tables: Sequence[Mapping[str, str]], absent: str) -> dict[str, list[str]]:
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = {key: [table.get(key, absent) for table in tables] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def typed(value: Any) -> str:
    """The value of a setting as it is typed in key=value."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ",".join(typed(one) for one in value) or "none"
    return str(value)


def sentence(runs: Sequence[History]) -> str:
    """A sentence that describes the runs."""
    if len(runs) > 1:
        states = [run.state for run in runs]
        return f"{len(runs)} runs: {', '.join(f'{states.count(one)} {one}' for one in dict.fromkeys(states))}."
    (run,) = runs
    config = run.config
    rho = "" if config.rho is None else f", rho {config.rho:g}"
    done = f"{len(run.lines)} of {config.epochs} epochs"
    return f"{config.method}{rho}: {config.model} on {config.data}, {done}, {run.state}."


def troubles(runs: Sequence[History]) -> list[str]:
    """Notes on the runs, such as failures, as sentences."""
    texts = []
    for run in runs:
        if run.state == FAILED:
            texts.append(f"{run.name} failed: {run.failure}.")
        elif run.result is not None and run.result.untrained is not None:
            texts.append(f"{run.name} {run.result.untrained}.")
        if run.config.selection == "max-test":
            texts.append(f"{run.name} chose its weights on the test part, so its test accuracy is a biased estimate.")
        lambda_max = None if run.result is None else run.result.lambda_max
        if lambda_max is not None and not lambda_max.get("converged", True):
            texts.append(
                f"lambda_max of {run.name} has not converged (relative residual {lambda_max['residual']:.0e})."
            )
    kinds = [tuple((key, value) for key, value in settings(run).items() if key != "seed") for run in runs]
    if len(runs) > 1 and len(set(kinds)) == len(runs):
        texts.append(
            "Each setting has a single run. Seeds can differ more than methods do; `flatmin compare` runs several "
            "seeds."
        )
    return texts
