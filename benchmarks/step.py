"""Time of a whole training step over the floor: interleaved, against a control, with its spread.

The floor is twice zero_grad, forward and backward and one step of the base, on its own copy of the model. Each sample
of a method is taken between two of the floor and divided by their mean; the order of methods is random in every round.
The control is the floor itself, run as if it were a method: its spread is what the machine can resolve.

With `--against`, a step of this source tree beside that of another commit instead; see `against.py`.
"""

from __future__ import annotations

import argparse
import gc
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import flatmin
from benchmarks import against, peers, peers_jax
from benchmarks.loops import Loop, Setting, floor, other, ours, recipe_of
from benchmarks.nets import BASES, NETS
from benchmarks.results import BenchmarkResult, Gate, Spread, Table
from benchmarks.timing import seconds

HELP = "time of a step over the floor of two passes and one base step"
CONTROL, SGD = "A/A control (the floor)", "plain SGD step"
RESOLUTION, TARGET = 0.10, 1.07
DEFAULT_NETS = {"mlp200": 12, "vit-d64": 8, "resnet18-w8": 8}
AGAINST_ROUNDS = 24
GPU_NETS = ("mlp200", "vit-d192", "resnet18-w64")
# Two passes in every step (and the base), so that the floor is theirs; `cost` has the others.
METHODS = ("sgd", "sam", "asam", "usam", "vasso", "fsam", "bisam-log", "bisam-tanh")
Files = Mapping[str, Path] | None
HEADERS = ("step", "x floor, median [IQR]", "p10", "ms, median", "x SGD step", "us above floor")


def makers(setting: Setting, methods: list[str], files: Files = None) -> dict[str, Callable[[], Loop]]:
    """Everything that is timed, by label; "sam" comes in its variants. `files`: see `peers.found`."""
    loops: dict[str, Callable[[], Loop]] = {
        CONTROL: lambda: floor(setting),
        SGD: lambda: floor(setting, passes=1),
    }
    for method in methods:
        loops[method] = lambda m=method: ours(setting, m)
        if method != "sgd" and recipe_of(method).joins:
            loops[f"{method}, flat=True"] = lambda m=method: ours(setting, m, flat=True)
        if recipe_of(method).samples.selects:
            loops[f"{method}, select_samples"] = lambda m=method: ours(setting, m, chooses=True)
        if method == "sam":
            loops["sam, nonfinite=propagate"] = lambda: ours(setting, "sam", "propagate")
            loops["sam, without model="] = lambda: ours(setting, "sam", model_handling=False)
    for label, build in peers.found(files, setting.base).items():
        loops[label] = lambda b=build: other(setting, b)
    return loops


def sample(
    setting: Setting, methods: list[str], rounds: int, repeats: int, seed: int = 0, files: Files = None
) -> dict[str, Any]:
    """Raw seconds: {label: [[floor before, method, floor after], ...]}.

    Models are rebuilt for every sample, so that a lucky place in memory is part of the spread and not of a method.
    """
    build = makers(setting, methods, files)
    order = random.Random(seed)
    samples: dict[str, list[list[float]]] = {label: [] for label in build}
    gc.disable()
    gc.freeze()
    try:
        for _ in range(rounds):
            reference = _warm(floor(setting))
            for label in order.sample(list(build), len(build)):
                loop = _warm(build[label]())
                runs = (reference.step, loop.step, reference.step)
                samples[label].append([seconds(run, setting.device, repeats) for run in runs])
                del loop, runs
                gc.collect()
    finally:
        gc.unfreeze()
        gc.enable()
    return samples


def _warm(loop: Loop) -> Loop:
    for _ in range(4):  # in its first three updates, flatmin looks for further parameters of the loss
        loop.step()
    return loop


def ratios(samples: dict[str, list[list[float]]]) -> dict[str, Spread]:
    """Each method over the mean of the floors beside it."""
    return {label: Spread.of([2 * b / (a + c) for a, b, c in rows]) for label, rows in samples.items()}


def judge(setting: Setting, samples: dict[str, list[list[float]]], result: BenchmarkResult) -> None:
    """Add the table and the verdict of one network to the result."""
    over = ratios(samples)
    times = {label: Spread.of([b for _, b, _ in rows]) for label, rows in samples.items()}
    floors = Spread.of([t for rows in samples.values() for a, _, c in rows for t in (a, c)])
    noise = over[CONTROL].relative_iqr
    name = f"{setting.net.name}, base {setting.base}" + (", bf16" if setting.autocast else "")
    table = Table(f"{name}: floor {floors.median * 1e3:.2f} ms (p10 {floors.p10 * 1e3:.2f})", HEADERS)
    sgd = over[SGD].median
    for label, ratio in over.items():
        above = (ratio.median - 1) * floors.median * 1e6
        table.rows.append(
            (
                label,
                ratio.ratio(),
                f"{ratio.p10:.3f}",
                f"{times[label].median * 1e3:.2f}",
                f"{ratio.median / sgd:.2f}",
                f"{above:+.0f}",
            )
        )
    result.tables.append(table)
    verdict = f"{name}: the control's quartiles are {noise:.1%} apart"
    inconclusive = noise > RESOLUTION
    result.notes.append(verdict + (", so this run is inconclusive." if inconclusive else "."))
    if setting.net.name == "mlp200" and setting.device == "cpu" and "sam" in over:
        value = "inconclusive" if inconclusive else f"{over['sam'].median:.3f}"
        passed = inconclusive or over["sam"].median <= TARGET
        result.gates.append(Gate(f"{name}: sam over the floor", value, f"<= {TARGET}", passed))
    result.raw[name] = samples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--nets", nargs="+", choices=list(NETS), metavar="NET", help=f"of {', '.join(NETS)}")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(flatmin.METHODS),
        metavar="METHOD",
        help="default: all with two passes in every step; with --against: sam",
    )
    parser.add_argument("--against", metavar="COMMIT", help="compare with a commit, not with the floor (CPU only)")
    parser.add_argument("--rounds", type=int, help="samples of each method")
    parser.add_argument("--repeats", type=int, help="steps in a sample (CPU: the fastest of 2; GPU: the mean of 5)")
    parser.add_argument("--base", choices=BASES, default="default", help="implementation of SGD")
    parser.add_argument("--batch", type=int, help="default: the net's own")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    peers.add_arguments(parser)
    parser.add_argument("--autocast", action="store_true", help="forward in bfloat16")


def run(options: argparse.Namespace) -> BenchmarkResult:
    """The benchmark as asked for on the command line."""
    gpu = options.device == "cuda"
    nets = options.nets or (GPU_NETS if gpu else DEFAULT_NETS)
    if options.against is not None:
        return _against(options, nets)
    settings = {"base": options.base, "device": options.device, "clock": "CUDA events" if gpu else "thread CPU time"}
    result = BenchmarkResult("step", settings=settings)
    files = dict(options.peer_file)
    for name in nets:
        setting = Setting(NETS[name], options.base, options.device, options.batch, options.autocast)
        rounds = options.rounds or (8 if gpu else DEFAULT_NETS.get(name, 8))
        repeats = options.repeats or (5 if gpu else 2)
        judge(setting, sample(setting, options.methods or list(METHODS), rounds, repeats, files=files), result)
    result.notes += peers.missing(files, options.base)
    if "mlp200" in nets and not gpu and peers_jax.installed():
        result.tables.append(peers_jax.measure(options.rounds or DEFAULT_NETS["mlp200"]))
    elif "mlp200" in nets and not gpu:
        result.notes.append("optax: not installed.")
    return result


def _against(options: argparse.Namespace, nets: Iterable[str]) -> BenchmarkResult:
    if options.device == "cuda" or options.autocast:
        raise SystemExit("--against compares on the CPU in float32: leave out --device cuda and --autocast.")
    try:
        return against.measure(
            options.against,
            nets,
            options.methods or ["sam"],
            rounds=options.rounds or AGAINST_ROUNDS,
            base=options.base,
            batch=options.batch,
            repeats=options.repeats or 3,
        )
    except (ValueError, RuntimeError) as error:
        raise SystemExit(str(error)) from error
