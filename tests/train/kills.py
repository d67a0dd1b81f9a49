"""`flatmin train` in processes that may be killed at any moment: forked ones, which have torch already, or its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed as dist

from tests.dist.pool import end_with_parent

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0  # seconds for what should take a few


@dataclass(frozen=True)
class Plan:
    """What is trained, and by whom.

    folder: has the run in it, and what it prints. pace: seconds that an update and every call to the disk take, so
    that a kill finds something to interrupt.
    """

    folder: Path
    words: tuple[str, ...]
    ranks: int = 1
    pace: float = 0.0

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.folder / "runs" / "run"

    @property
    def log(self) -> Path:
        """What the first rank of the last start has printed."""
        return self.folder / "log"

    @property
    def arguments(self) -> list[str]:
        """The words after `flatmin`."""
        return ["train", "smoke", *self.words, "--out", str(self.folder), "--name", self.path.name, "--resume"]

    @property
    def said(self) -> str:
        """What is in the log."""
        return self.log.read_text() if self.log.exists() else ""

    @property
    def reached(self) -> int:
        """The last update that is recorded."""
        table = self.path / "steps.jsonl"
        return table.read_text().count("\n") if table.exists() else 0


class Forked:
    """One start in forked processes."""

    def __init__(self, context, plan: Plan) -> None:
        plan.folder.mkdir(parents=True, exist_ok=True)
        plan.log.unlink(missing_ok=True)
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if plan.ranks > 1 else None
        self.processes = []
        for rank in range(plan.ranks):
            process = context.Process(target=live, args=(plan, self._variables(plan, rank)), daemon=True)
            process.start()
            self.processes.append(process)

    def _variables(self, plan: Plan, rank: int) -> dict[str, str]:
        if self._store is None:
            return {}
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(plan.ranks),
            "LOCAL_WORLD_SIZE": str(plan.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }

    @property
    def pid(self) -> int:
        return self.processes[0].pid

    @property
    def alive(self) -> bool:
        return all(process.exitcode is None for process in self.processes)

    def kill(self, victims: list[int]) -> None:
        """SIGKILL to some ranks; the others are ended as torchrun ends them."""
        for rank in victims:
            if self.processes[rank].exitcode is None:
                os.kill(self.processes[rank].pid, signal.SIGKILL)
        if len(victims) < len(self.processes):
            time.sleep(0.2)  # in which the others may find out by themselves
        for process in self.processes:
            process.terminate()
            process.join(10)
            process.kill()
            process.join()

    def wait(self) -> list[int]:
        """The exit codes."""
        for process in self.processes:
            process.join(PATIENCE)
        return [process.exitcode for process in self.processes]


class Command:
    """One start of the command itself, under torchrun for several ranks."""

    def __init__(self, context, plan: Plan) -> None:
        plan.folder.mkdir(parents=True, exist_ok=True)
        plan.log.unlink(missing_ok=True)
        python = [sys.executable, "-m"]
        if plan.ranks > 1:
            python += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(plan.ranks), "-m"]
        with plan.log.open("w") as log:
            self.process = subprocess.Popen(
                [*python, "flatmin", *plan.arguments],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self, victims: list[int]) -> None:
        """SIGKILL to the whole group; torchrun's workers have groups of their own, and end with it."""
        pids = [self.process.pid, *_below(self.process.pid)]
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(PATIENCE)
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            time.sleep(0.01)

    def wait(self) -> list[int]:
        return [self.process.wait(PATIENCE)]


def _below(pid: int) -> list[int]:
    """The processes that a process has started, and those that these have."""
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            found += [int(child), *_below(int(child))]
    return found


def live(plan: Plan, variables: dict[str, str]) -> None:
    """The life of a forked process."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ.update(variables)
    os.chdir(ROOT)
    log = plan.log if variables.get("RANK", "0") == "0" else Path(os.devnull)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    if plan.pace:
        slow_down(plan.pace)
    from flatmin.cli.main import main

    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
    code: object = 0
    try:
        main(plan.arguments)
    except SystemExit as end:
        code = end.code
    sys.stdout.flush()
    # Closing the process group can deadlock in torch; nothing is left to do.
    os._exit(code if isinstance(code, int) else 1)


def slow_down(pace: float) -> None:
    """Give kills time: in an update, in the middle of a write, and between a write and its name."""
    from flatmin.train import checkpoint
    from flatmin.train.trainer import Trainer

    def late(function, seconds):
        def slowly(*arguments, **more):
            time.sleep(seconds)
            return function(*arguments, **more)

        return slowly

    Trainer.step = late(Trainer.step, pace)
    checkpoint._Hashing.write = late(checkpoint._Hashing.write, pace / 50)
    os.fsync, os.replace = late(os.fsync, pace), late(os.replace, pace)
