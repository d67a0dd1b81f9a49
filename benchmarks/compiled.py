"""Eager steps beside compiled ones: `torch.compile` of the model, and of a whole step as a pure function.

The whole step is `flatmin.value_and_grad` with momentum SGD written out: both passes, the perturbation and the update
in one function. BatchNorm keeps no running statistics in it. Every step is built once, because compiling takes seconds
to minutes: "start" is the wall time until the second step has ended, with an empty cache of compiled code. Steps that
compile the same model share its graphs, so that only the first of them shows the time. Steps take turns, each between
two eager floors.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

import flatmin
from benchmarks.loops import Setting, floor, ours
from benchmarks.nets import LR, MOMENTUM, NETS
from benchmarks.peers import RHO
from benchmarks.results import BenchmarkResult, Spread, Table
from benchmarks.timing import seconds

HELP = "torch.compile of the model and of the whole step beside eager steps; 6 min, wants a C++ compiler"
DEFAULT_NETS = ("mlp20", "vit-d64", "resnet18-w8")
CONTROL = "A/A control (the floor)"
HEADERS = ("step", "x eager floor, median [IQR]", "p10", "ms, median", "start, s", "graphs", "breaks")


def whole_step(setting: Setting, *, compiled: bool) -> Callable[[], None]:
    """SAM with momentum SGD as a pure function of weights and momentum."""
    model, x, y = setting.net.make(setting.device, setting.batch)
    torch.func.replace_all_batch_norm_modules_(model)

    def loss_of(params: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, params, (x,)), y)

    def function(params: dict[str, Tensor], momenta: dict[str, Tensor]) -> Any:
        loss, grads, _ = flatmin.value_and_grad(loss_of, params, rho=RHO)
        momenta = {n: MOMENTUM * m + grads[n] for n, m in momenta.items()}
        return loss, {n: w - LR * momenta[n] for n, w in params.items()}, momenta

    run = torch.compile(function) if compiled else function
    params = {n: w.detach() for n, w in model.named_parameters()}
    held = [params, {n: torch.zeros_like(w) for n, w in params.items()}]

    def step() -> None:
        _, held[0], held[1] = run(*held)

    return step


def makers(setting: Setting) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Everything that is timed, by label."""

    def with_compiled_model(build: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], Any]:
        loop = build(setting, *args, **kwargs)
        loop.model.compile()
        return loop.step  # type: ignore[no-any-return]

    return {
        CONTROL: lambda: floor(setting).step,
        "sam": lambda: ours(setting, "sam").step,
        "floor, compiled model": lambda: with_compiled_model(floor),
        "sam, compiled model": lambda: with_compiled_model(ours, "sam"),
        "sam, flat=True, compiled model": lambda: with_compiled_model(ours, "sam", flat=True),
        "whole step as a function": lambda: whole_step(setting, compiled=False),
        "whole step as a function, compiled": lambda: whole_step(setting, compiled=True),
    }


def measure(setting: Setting, rounds: int, result: BenchmarkResult) -> None:
    """Add the table of one net."""
    steps: dict[str, Callable[[], Any]] = {}
    about: dict[str, tuple[str, str, str]] = {}
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()  # the functions of another net would make this net's sizes symbolic
    for label, make in makers(setting).items():
        counters.clear()
        begun = time.perf_counter()
        try:
            step = make()
            step()
            step()
        except Exception as error:  # what cannot be compiled must not take the others' numbers away
            reason = str(error).strip().partition("\n")[0][:160]
            result.notes.append(f"{setting.net.name}, {label}: not available: {type(error).__name__}: {reason}")
            continue
        start = time.perf_counter() - begun
        for _ in range(2):
            step()
        graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        about[label] = (f"{start:.1f}", str(graphs) if graphs else "-", str(breaks) if graphs else "-")
        steps[label] = step
    reference, order = floor(setting).step, random.Random(0)
    samples: dict[str, list[list[float]]] = {label: [] for label in steps}
    for _ in range(rounds):
        for label in order.sample(list(steps), len(steps)):
            runs = (reference, steps[label], reference)
            samples[label].append([seconds(run, setting.device, 3) for run in runs])
            gc.collect()
    table = Table(setting.net.name, HEADERS)
    for label, rows in samples.items():
        over = Spread.of([2 * b / (a + c) for a, b, c in rows])
        times = Spread.of([b for _, b, _ in rows])
        table.rows.append((label, over.ratio(), f"{over.p10:.3f}", f"{times.median * 1e3:.2f}", *about[label]))
    result.tables.append(table)
    result.raw[setting.net.name] = samples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(DEFAULT_NETS), metavar="NET")
    parser.add_argument("--rounds", type=int, default=8, help="samples of each step")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, help="default: the net's own")


def run(options: argparse.Namespace) -> BenchmarkResult:
    """The benchmark as asked for on the command line."""
    result = BenchmarkResult("compiled", settings={"device": options.device, "rounds": options.rounds})
    with tempfile.TemporaryDirectory() as empty, mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=empty):
        torch.compile(lambda x: x + 1)(torch.ones(2))  # the compiler's own start
        for name in options.nets:
            measure(Setting(NETS[name], device=options.device, batch=options.batch), options.rounds, result)
    result.notes.append("graphs, breaks: those that torch.compile has made in the first four steps.")
    return result
