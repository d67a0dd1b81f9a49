"""Weights & Biases: files in FOLDER/wandb; without a network or an API key, upload them later with `wandb sync`."""

from __future__ import annotations

import netrc
import os
import socket
import warnings
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import wandb

from flatmin.train.events import Began
from flatmin.train.trackers.content import settings
from flatmin.train.trackers.tracker import Sink, Status

_EXIT = {"finished": 0, "stopped": 255}  # wandb uses 255 for Ctrl-C
_PATIENCE = 5.0  # s
_KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")


class Wandb(Sink):
    """Logs to a separate wandb run, independent of one that the program may have open; steps are those of the run.

    WANDB_MODE and `wandb offline` decide whether the run is online. Without them, it is online if there is an API key
    and the server can be reached; otherwise it is offline. It never asks for a key, and warns if the server cannot be
    reached.

    A resumed run keeps its id. Offline, each part of a resumed run has its own folder: sync the folders in order, with
    `wandb sync --append`. wandb accepts each step once, so steps that are repeated after a checkpoint keep their first
    values.
    """

    name = "wandb"
    _run: Any = None

    def begin(self, event: Began) -> None:
        mode = _mode()
        if mode == "online" and not os.environ.get("WANDB_MODE"):
            why = _unreachable(wandb.setup().settings.base_url)
            if why is not None:
                warnings.warn(
                    f"wandb cannot reach its server ({why}); this run is recorded offline in {self.folder / 'wandb'}. "
                    "Upload it later with wandb sync, or set WANDB_MODE=offline to avoid this warning.",
                    stacklevel=2,
                )
                mode = "offline"
        self._run = wandb.init(
            project=self.project,
            name=self.run,
            id=self.identity,
            resume=None if self.identity is None else "allow",
            dir=os.environ.get("WANDB_DIR") or str(self.folder),
            config=settings(event),
            mode=mode,
            reinit="create_new",
            # wandb's capture of the terminal does not work together with a progress bar.
            settings=wandb.Settings(console="off", silent=mode == "offline"),
        )
        self.keep_identity(self._run.id)

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def end(self, values: dict[str, float], step: int, failure: str | None) -> None:
        self._run.summary.update(values)
        if failure is not None:
            self._run.summary["failure"] = failure

    def finish(self, status: Status) -> None:
        if self._run is not None:
            self._run.finish(exit_code=_EXIT.get(status, 1))


SINK = Wandb


def _mode() -> str:
    """The mode from WANDB_MODE or wandb's settings; without them, "online" with an API key, else "offline"."""
    # Read here, because wandb reads the variable only once per process.
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    settings = wandb.setup().settings
    mode: str = settings.mode
    return "offline" if mode == "online" and not _has_key(settings) else mode


def _has_key(settings: Any) -> bool:
    """Whether wandb finds an API key, so that it does not ask for one."""
    if settings.api_key or any(os.environ.get(name) for name in _KEYS):
        return True
    hosts = [urlsplit(settings.base_url).netloc]
    if settings.base_url == wandb.Settings().base_url:
        hosts.append("api.wandb.ai")  # the name under which keys of wandb's own server are stored
    try:
        logins = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return any(host in logins.hosts for host in hosts)


def _unreachable(server: str) -> str | None:
    """Why the server cannot be reached, or None. wandb itself would notice after minutes, or never."""
    if getproxies():
        return None
    where = urlsplit(server)
    port = where.port or (80 if where.scheme == "http" else 443)
    try:
        socket.create_connection((where.hostname or "", port), timeout=_PATIENCE).close()
    except OSError as error:
        return f"{where.hostname}: {error}"
    return None
