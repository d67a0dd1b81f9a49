"""Python calls into the package during one step: how many, in how many files, and how often the file changes.

A call is what `sys.setprofile` reports for a code object of the package: a function that is entered, and a generator
(also a generator expression) that is resumed. List, set and dict comprehensions are no calls: Python 3.12 and later run
them inside the function that holds them, so their frames are left out on 3.11. A change of file is a call whose file is
not that of the call before.

Every step is counted after `WARM` others, when what is set up once is there and the updates that look at the model
are not due, and the most calls of `COUNTED` steps are shown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import flatmin
from benchmarks.nets import make_base
from benchmarks.results import BenchmarkResult, Gate, Table

HELP = "Python calls into the package in one step, against limits"
PACKAGE = Path(flatmin.__file__).resolve().parent
WARM, COUNTED = 10, 3
PLAIN, WATCHED = "sam, step(closure)", "sam, model="
# The most calls, and the most files.
LIMITS = {PLAIN: (70, 8), WATCHED: (110, 11)}
_INLINED = frozenset({"<listcomp>", "<setcomp>", "<dictcomp>"})


@dataclass(frozen=True)
class Call:
    """One call: the file within the package, the function, and how many functions of the package are around it."""

    file: str
    function: str
    depth: int


def recorded(run: Callable[[], object]) -> list[Call]:
    """The calls into the package while `run` runs, in order."""
    calls: list[Call] = []
    files: dict[str, str | None] = {}  # name of a code object's file -> the file within the package
    depth = 0

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal depth
        if event not in ("call", "return") or frame.f_code.co_name in _INLINED:
            return
        name = frame.f_code.co_filename
        if name not in files:
            path = Path(name)
            files[name] = path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else None
        file = files[name]
        if file is None:
            return
        if event == "return":
            depth -= 1
            return
        calls.append(Call(file, frame.f_code.co_qualname, depth))
        depth += 1

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(before)
    return calls


def steady(step: Callable[[], object]) -> list[Call]:
    """The calls of a step once everything has been set up: of the one of `COUNTED` that has the most."""
    for _ in range(WARM):
        step()
    return max((recorded(step) for _ in range(COUNTED)), key=len)


def files_of(calls: list[Call]) -> set[str]:
    """The files entered."""
    return {call.file for call in calls}


def changes_of(calls: list[Call]) -> int:
    """How often a call lies in another file than the call before."""
    return sum(a.file != b.file for a, b in pairwise(calls))


def _parts(model: nn.Module, method: str, *, given: bool = False) -> tuple[Any, Callable[[], torch.Tensor]]:
    """An optimizer of the method around SGD with momentum, and a closure on one batch; `given`: the model as well."""
    optimizer = flatmin.wrap(make_base(model.parameters(), "default"), method, model=model if given else None)
    x, y, loss_of = torch.randn(8, 16), torch.randint(4, (8,)), nn.CrossEntropyLoss()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = loss_of(model(x), y)
        loss.backward()
        return loss

    return optimizer, closure


def _plain() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


def _guarded() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 4))


def _closure_step(model: nn.Module, method: str = "sam", *, given: bool = False) -> Callable[[], object]:
    optimizer, closure = _parts(model, method, given=given)
    return lambda: optimizer.step(closure)


def _perturbed(model: nn.Module) -> Callable[[], object]:
    optimizer, closure = _parts(model, "sam")

    def step() -> None:
        closure()
        with optimizer.perturbed():
            closure()
        optimizer.step()

    return step


def _two_steps(model: nn.Module) -> Callable[[], object]:
    optimizer, closure = _parts(model, "sam")

    def step() -> None:
        closure()
        optimizer.first_step()
        closure()
        optimizer.second_step()

    return step


STEPS: dict[str, Callable[[], Callable[[], object]]] = {
    PLAIN: lambda: _closure_step(_plain()),
    WATCHED: lambda: _closure_step(_plain(), given=True),
    "sam, model= with BatchNorm and dropout": lambda: _closure_step(_guarded(), given=True),
    "sam, perturbed()": lambda: _perturbed(_plain()),
    "sam, first_step(), second_step()": lambda: _two_steps(_plain()),
    "asam": lambda: _closure_step(_plain(), "asam"),
    "vasso": lambda: _closure_step(_plain(), "vasso"),
}


def gates(label: str, calls: list[Call]) -> list[Gate]:
    """The limits for a step."""
    most, files = LIMITS[label], files_of(calls)
    return [
        Gate(f"{label}: calls", str(len(calls)), f"<= {most[0]}", len(calls) <= most[0]),
        Gate(f"{label}: files", str(len(files)), f"<= {most[1]}", len(files) <= most[1]),
    ]


def measure(*, verbose: bool = False) -> BenchmarkResult:
    """Count every step; `verbose`: list its calls as well."""
    torch.manual_seed(0)
    result = BenchmarkResult("calls", settings={"net": "MLP of two layers", "base": "SGD with momentum"})
    headers = ("step", "calls", "of generator expressions", "files", "changes of file")
    table = Table("One step of a small net", headers)
    result.tables.append(table)
    for label, build in STEPS.items():
        calls = steady(build())
        inline = sum(call.function.endswith("<genexpr>") for call in calls)
        table.rows.append((label, *map(str, (len(calls), inline, len(files_of(calls)), changes_of(calls)))))
        if label in LIMITS:
            result.gates += gates(label, calls)
        if verbose:
            rows = [("· " * call.depth + call.function, call.file) for call in calls]
            result.tables.append(Table(label, ("call", "file"), list(rows)))
        result.raw[label] = [(call.depth, call.file, call.function) for call in calls]
    result.notes.append(
        "A generator that is resumed is a call; list, set and dict comprehensions are none, on every version of Python."
    )
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--verbose", action="store_true", help="list the calls of every step, indented by depth")


def run(options: argparse.Namespace) -> BenchmarkResult:
    """The benchmark as asked for on the command line."""
    return measure(verbose=options.verbose)
