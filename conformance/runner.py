"""Tests behaviours in separate processes, so that a crash or a hang affects only one cell of the table."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from conformance.verdict import ABSENT, FAIL, Behaviour, BehaviourOutcome

# Use the loopback interface: gloo may not find a route if the host name cannot be resolved.
_GLOO = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
START_S = 120.0  # time for importing torch and an implementation
Progress = Callable[[str, BehaviourOutcome], None]


def run(adapter: str, chosen: Sequence[Behaviour], progress: Progress) -> list[BehaviourOutcome]:
    """The outcomes of all chosen behaviours on one adapter, in their order."""
    outcomes: dict[str, BehaviourOutcome] = {}
    for ranks in sorted({b.ranks for b in chosen}):
        left = [b for b in chosen if b.ranks == ranks]
        while left:
            done = _session(adapter, left, ranks)
            for outcome in done:
                progress(adapter, outcome)
                outcomes[outcome.behaviour] = outcome
            left = [b for b in left if b.name not in outcomes]
    return [outcomes[b.name] for b in chosen]


def _session(adapter: str, left: Sequence[Behaviour], ranks: int) -> list[BehaviourOutcome]:
    """Run in one set of processes until all are done, or one fails in a way that may affect the following ones."""
    with tempfile.TemporaryDirectory() as folder:
        teams = [_Worker(adapter, left, rank, ranks, Path(folder) / "store") for rank in range(ranks)]
        done: list[BehaviourOutcome] = []
        try:
            for behaviour in left:
                deadline = time.monotonic() + behaviour.limit_s + (0.0 if done else START_S)
                outcome = _together(behaviour, [w.outcome(behaviour.name, deadline) for w in teams])
                done.append(outcome)
                if any(w.lost for w in teams) or (ranks > 1 and outcome.status == FAIL):
                    break
        finally:
            for worker in teams:
                worker.end()
    return done


def _together(behaviour: Behaviour, parts: list[BehaviourOutcome]) -> BehaviourOutcome:
    """Combine the outcomes of the ranks. Failures of a rank itself come before those of ranks that wait for it."""
    parts.sort(key=lambda o: "closed" in o.figure or "no answer" in o.figure or "peer" in o.figure)
    for status in (FAIL, ABSENT):
        for part in parts:
            if part.status == status:
                return part
    return parts[0]


class _Worker:
    """A worker process and its output."""

    def __init__(self, adapter: str, behaviours: Sequence[Behaviour], rank: int, ranks: int, store: Path) -> None:
        words = [sys.executable, "-m", "conformance.worker", adapter, *(b.name for b in behaviours)]
        if ranks > 1:
            words += ["--rank", str(rank), "--ranks", str(ranks), "--store", str(store)]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in end()
        self.process = subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**_GLOO, **os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.lost = False
        self._said: queue.Queue[dict | None] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._said.put(json.loads(line))
        self._said.put(None)

    def outcome(self, name: str, deadline: float) -> BehaviourOutcome:
        """The outcome of a behaviour; a failure if the process ends or does not answer in time."""
        if self.lost:
            return BehaviourOutcome(name, FAIL, "no answer: lost before")
        while True:
            try:
                said = self._said.get(timeout=max(0.1, deadline - time.monotonic()))
            except queue.Empty:
                self.lost = True
                return BehaviourOutcome(name, FAIL, "no answer in time")
            if said is None:
                self.lost = True
                return BehaviourOutcome(name, FAIL, self._last_words())
            if said.get("behaviour") == name:
                return BehaviourOutcome(**said)

    def _last_words(self) -> str:
        code = self.process.wait()
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors.read().splitlines() if line.strip()]
        return f"the process ended with {code}: {lines[-1] if lines else 'no word'}"

    def end(self) -> None:
        """Kill the process and clean up."""
        self.process.kill()
        self.process.wait()
        self._listener.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.errors.close()
