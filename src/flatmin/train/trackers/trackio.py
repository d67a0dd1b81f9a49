"""Trackio: a SQLite database in FOLDER/trackio, or in TRACKIO_DIR, written by a separate process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from flatmin.train.events import Began
from flatmin.train.trackers.content import settings
from flatmin.train.trackers.tracker import Sink, Status

_WRITER = Path(__file__).with_name("trackio_writer.py")
_PATIENCE = 60.0


class Trackio(Sink):
    """Logs numbers by step; they are sent as JSON lines to `trackio_writer.py`.

    Trackio fixes its folder once per process, prints to the terminal, and supports one run at a time. With a separate
    process, every run writes below its own folder, and the writer ends when the run's process ends, even if that is
    killed. Trackio's output is in FOLDER/trackio.log.

    A resumed run has the steps after its checkpoint twice. Trackio has no status; a failure becomes an alert.
    """

    name = "trackio"
    _writer: subprocess.Popen[bytes] | None = None

    def begin(self, event: Began) -> None:
        environment = {"TRACKIO_DIR": str(self.folder / "trackio"), **os.environ}
        self._log = self.folder / "trackio.log"
        with self._log.open("wb") as log:
            self._writer = subprocess.Popen(
                # -P: modules next to the script have the names of the trackers' packages.
                [sys.executable, "-P", str(_WRITER)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                # Ctrl-C must reach only the run; the writer ends when its input is closed.
                start_new_session=True,
            )
        resume = "allow" if self.resume else "never"
        self._send({"project": self.project, "name": self.run, "resume": resume, "config": settings(event)})

    def log(self, values: dict[str, float], step: int) -> None:
        self._send({"values": values, "step": step})

    def end(self, values: dict[str, float], step: int, failure: str | None) -> None:
        self._send({"values": values, "step": step, "failure": failure})

    def finish(self, status: Status) -> None:
        if self._writer is None:
            return
        try:
            self._writer.communicate(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            self._writer.kill()
            self._writer.communicate()
            raise RuntimeError(f"its writer process did not end within {_PATIENCE:.0f} s; see {self._log}") from None
        if self._writer.returncode:
            raise RuntimeError(self._why())

    def _send(self, line: dict[str, Any]) -> None:
        assert self._writer is not None and self._writer.stdin is not None
        try:
            self._writer.stdin.write(json.dumps(line).encode() + b"\n")
            self._writer.stdin.flush()
        except OSError as error:
            raise RuntimeError(self._why()) from error

    def _why(self) -> str:
        said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"its writer process ended: {said[-1] if said else 'without a message'}; see {self._log}"


SINK = Trackio
