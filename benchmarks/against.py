"""Time of a step of this source tree beside that of another commit, interleaved in one run.

The other commit is unpacked into a temporary folder. Three processes stay alive beside each other and take turns, one
sample each: this tree's package, the other commit's, and the other commit's once more as the control. Each sample of
the first and of the control lies between two of the other commit and is divided by their mean. A process builds the
model anew for every sample, as `step` does, and uses only what flatmin exports, so that it runs any commit that has it.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.nets import NETS, make_base
from benchmarks.results import BenchmarkResult, Gate, Spread, Table
from benchmarks.timing import seconds

ROOT = Path(__file__).resolve().parent.parent
NEW, OLD, CONTROL = "new", "old", "control"
HEADERS = ("net, method", "new / old, median [quartiles]", "control", "new, ms", "old, ms", "samples")
RESTARTS = 3


# -- the process that runs one package -----------------------------------------------------------------------------


def _sample(asked: dict[str, Any]) -> float:
    """Seconds of one step."""
    import flatmin

    model, x, y = NETS[asked["net"]].make("cpu", asked["batch"])
    optimizer = flatmin.wrap(make_base(model.parameters(), asked["base"]), asked["method"], model=model)
    loss_of = nn.CrossEntropyLoss()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = loss_of(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.step(closure)
    return seconds(lambda: optimizer.step(closure), "cpu", asked["repeats"])


def serve() -> None:
    """Say which package this is, then answer questions until there are no more: JSON lines [seconds, error]."""
    import flatmin

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    gc.disable()
    answers, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps(str(Path(flatmin.__file__).resolve())), file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = [_sample(json.loads(line)), None]
        except Exception as error:
            answer = [None, f"{type(error).__name__}: {error}"]
        print(json.dumps(answer), file=answers, flush=True)
        gc.collect()


# -- the process that asks -----------------------------------------------------------------------------------------


class Worker:
    """A process with the package of one source folder.

    Args:
        source: the folder that holds `flatmin`.

    Raises:
        RuntimeError: the process ended, it imports flatmin from elsewhere, or its package cannot run what is asked.
    """

    def __init__(self, source: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from benchmarks import against; against.serve()"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(source), str(ROOT)])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with self._closing():
            found = Path(self._answer())
            if not found.is_relative_to(source.resolve()):
                raise RuntimeError(f"the worker imported {found}, expected flatmin from {source}.")

    def seconds(self, asked: dict[str, Any]) -> float:
        """Time of one step of what is asked for."""
        assert self._process.stdin is not None
        with self._closing():
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            taken, error = self._answer()
            if error is not None:
                raise RuntimeError(f"{asked['method']} on {asked['net']} does not run with only a closure: {error}")
            return float(taken)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the worker ended; its error is above.")
        return json.loads(line)

    @contextlib.contextmanager
    def _closing(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise


def commit_of(revision: str) -> str:
    """The short name of a commit.

    Raises:
        ValueError: git knows no such commit.
    """
    found = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", "--short=12", f"{revision}^{{commit}}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if found.returncode:
        raise ValueError(f"--against {revision}: git knows no such commit.")
    return found.stdout.strip()


@contextlib.contextmanager
def source_of(commit: str) -> Iterator[Path]:
    """A temporary folder with the `src` of a commit. It is no worktree: the repository hears nothing of it."""
    packed = subprocess.run(["git", "archive", commit, "src"], cwd=ROOT, check=True, capture_output=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(folder, filter="data")
        yield Path(folder) / "src"


@contextlib.contextmanager
def workers(sources: dict[str, Path]) -> Iterator[dict[str, Worker]]:
    """A process for each label."""
    with contextlib.ExitStack() as stack:
        found: dict[str, Worker] = {}
        for label, source in sources.items():
            found[label] = Worker(source)
            stack.callback(found[label].close)
        yield found


def sample(sources: dict[str, Path], asked: dict[str, Any], rounds: int, order: random.Random) -> dict[str, Any]:
    """Raw seconds {label: [[old before, label, old after], ...]} of NEW and CONTROL.

    The processes start anew RESTARTS times, so that their places in memory are part of the spread.
    """
    rows: dict[str, list[list[float]]] = {NEW: [], CONTROL: []}
    for part in range(min(RESTARTS, rounds)):
        with workers(sources) as at:
            for worker in at.values():
                worker.seconds(asked)
            for _ in range(part, rounds, RESTARTS):
                for label in order.sample(list(rows), len(rows)):
                    rows[label].append([at[one].seconds(asked) for one in (OLD, label, OLD)])
    return rows


def judge(net: str, method: str, rows: dict[str, list[list[float]]], table: Table, result: BenchmarkResult) -> None:
    """Add a row to the table and a gate to the result, which fails if it is slower beyond the control."""
    over = {label: Spread.of([2 * b / (a + c) for a, b, c in of]) for label, of in rows.items()}
    new = Spread.of([b for _, b, _ in rows[NEW]]).median
    old = Spread.of([t for of in rows.values() for a, _, c in of for t in (a, c)]).median
    cells = [f"{s.median:.3f} [{s.q25:.3f}-{s.q75:.3f}]" for s in (over[NEW], over[CONTROL])]
    table.rows.append((f"{net}, {method}", *cells, f"{new * 1e3:.2f}", f"{old * 1e3:.2f}", str(len(rows[NEW]))))
    limit, value = max(1.0, over[CONTROL].q75), over[NEW].q25
    name = f"{net}, {method}: lower quartile of new / old"
    result.gates.append(Gate(name, f"{value:.3f}", f"<= {limit:.3f}", value <= limit))
    result.raw[f"{net}, {method}"] = rows


def measure(
    revision: str,
    nets: Iterable[str],
    methods: Sequence[str],
    *,
    rounds: int,
    base: str = "default",
    batch: int | None = None,
    repeats: int = 3,
) -> BenchmarkResult:
    """Time every method on every net.

    Args:
        revision: the commit to compare with, in git's words.
        nets: names of networks.
        methods: those that need nothing but a closure and `model=`.
        rounds: samples of each, at least 2.
        base: implementation of SGD.
        batch: default: the net's own.
        repeats: steps in a sample, of which the fastest counts.

    Raises:
        ValueError: git knows no such commit.
        RuntimeError: one of the packages cannot run the step.
    """
    commit = commit_of(revision)
    result = BenchmarkResult("step", settings={"against": commit, "base": base, "clock": "thread CPU time"})
    table = Table(f"This tree (new) beside {commit} (old)", HEADERS)
    result.tables.append(table)
    order = random.Random(0)
    with source_of(commit) as old:
        sources = {NEW: ROOT / "src", OLD: old, CONTROL: old}
        for net in nets:
            for method in methods:
                asked = {"net": net, "method": method, "base": base, "batch": batch, "repeats": repeats}
                judge(net, method, sample(sources, asked, rounds, order), table, result)
    result.notes.append("The control is the old commit beside itself: where quartiles overlap, nothing is shown.")
    return result
