"""Studies whose workers and drivers are killed at random moments, and begun again until they are done."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import torch

from flatmin.study import pool
from flatmin.study.executors import execute
from flatmin.study.store import Run, Store, finished_and_missing
from flatmin.train.config import RunConfig
from tests.dist.pool import end_with_parent, forkserver
from tests.helpers import same_bits
from tests.train.kills import PATIENCE, ROOT

TIMES = ("seconds", "images_per_second", "peak_memory")


def runs(count, epochs=8, model="paced"):
    """Half of them of sgd, half of sam."""
    return [
        Run(
            label=method,
            config=RunConfig(
                method=method, rho=rho, seed=seed, epochs=epochs, batch_size=25, test_every=1, schedule="cosine",
                data="tests.user_side:data", model=f"tests.user_side:{model}",
            ),
            code="c",
        )
        for seed in range((count + 1) // 2)
        for method, rho in (("sgd", None), ("sam", 0.1))
    ][:count]  # fmt: skip


def plain(outcome):
    """What a table is made of, without times."""
    result = {key: value for key, value in vars(outcome.result).items() if key not in TIMES}
    return result, [{key: value for key, value in vars(line).items() if key not in TIMES} for line in outcome.lines]


def drive(folder, wanted, executor, settings, pace):
    """The life of a driver."""
    import threading

    threading.Thread(target=end_with_parent, daemon=True).start()
    os.chdir(ROOT)
    os.environ |= {"FLATMIN_TEST_PACE": str(pace), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    pool.START = "fork"
    store = Store(folder, checkpoint_seconds=0)
    missing = finished_and_missing(wanted, store, print)[1]
    execute(missing, store, workers=2, on_event=lambda event: None, executor=executor, settings=settings)
    os._exit(0)


def below(pid):
    """The processes that a process has started, and those that these have."""
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in children.read_text().split():
                found += [int(child), *below(child)]
    return found


def kill(pid):
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


class Assault:
    """One study under attack.

    Args:
        folder: of the study.
        wanted: its runs.
        kills: how many, turn about of a worker and of the driver.
        outlive: whether the workers outlive their driver.
        mark: what the command of a worker has in it, where a driver starts other processes too.
    """

    def __init__(self, folder, wanted, kills, *, executor="local", settings=None, outlive=False, pace=0.02, mark=b""):
        self.folder, self.wanted, self.store = folder, wanted, Store(folder)
        self._arguments = (folder, wanted, executor, settings or {}, pace)
        self._kills, self._outlive, self._mark = kills, outlive, mark
        self._draw = random.Random(kills)
        self._context = forkserver()
        self._seen, self._pids, self.starts = {}, set(), 0

    def __call__(self):
        """Attack until all is done."""
        driver = None
        try:
            for number in range(self._kills):
                driver = driver if driver is not None and driver.exitcode is None else self._start()
                self._wait(driver, int(self._total * (number + self._draw.random()) / (self._kills + 1)))
                time.sleep(self._draw.uniform(0, 0.1))
                self._strike(driver, whole=number % 2 == 1)
            while self._unfinished():
                if driver is None or driver.exitcode is not None:
                    assert self.starts < 3 * self._kills + 3
                    driver = self._start()
                self._wait(driver, self._total + 1)
            self._look()
        finally:
            for pid in self._pids:
                kill(pid)

    @property
    def _total(self):
        return sum(run.config.epochs for run in self.wanted)

    def _start(self):
        driver = self._context.Process(target=drive, args=self._arguments)
        driver.start()
        self._pids.add(driver.pid)
        self.starts += 1
        return driver

    def _wait(self, driver, epochs):
        """For so many epochs, or the end of the driver."""
        deadline = time.monotonic() + PATIENCE
        while driver.exitcode is None and self._reached() < epochs:
            assert time.monotonic() < deadline
            self._pids.update(below(driver.pid))
            self._look()
            time.sleep(0.01)

    def _strike(self, driver, whole):
        workers = below(driver.pid)
        self._pids.update(workers)
        if not whole:
            victims = [pid for pid in workers if not self._mark or self._mark in command(pid)]
            if victims:
                kill(self._draw.choice(victims))
            return
        kill(driver.pid)
        driver.join()
        deadline = time.monotonic() + 10
        while not self._outlive and any(alive(pid) for pid in workers):
            assert time.monotonic() < deadline, "a worker outlives its driver"
            time.sleep(0.01)

    def _reached(self):
        return sum(path.read_bytes().count(b"\n") for path in self.store.runs.glob("*/metrics.jsonl"))

    def _unfinished(self):
        return [run for run in self.wanted if not (self.store.folder(run) / "result.json").exists()]

    def _look(self):
        """No result is ever written twice."""
        for path in self.store.runs.glob("*/result.json"):
            found = path.stat()
            mark = (found.st_ino, found.st_mtime_ns)
            assert self._seen.setdefault(path, mark) == mark, path


def alive(pid):
    """Whether it runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def check(tmp_path, count, kills, **how):
    """Attack a study, and compare it with another that was left alone."""
    wanted = runs(count)
    alone, attacked = Store(tmp_path / "alone"), Store(tmp_path / "attacked")
    expected = execute(wanted, alone, workers=0, on_event=lambda event: None)
    assault = Assault(attacked.out, wanted, kills, **how)
    assault()
    found, missing = finished_and_missing(wanted, attacked, print)
    assert not missing and assault.starts > kills // 2
    for run in wanted:
        assert plain(found[run.name]) == plain(expected[run.name])
        ours, theirs = (torch.load(store.folder(run) / "weights.pt", weights_only=True) for store in (attacked, alone))
        assert same_bits(ours, theirs)
        assert not list(attacked.folder(run).glob("checkpoints/*.pt"))
