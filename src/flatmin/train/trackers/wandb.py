"""Weights & Biases: FOLDER/wandb, for `wandb sync` where there is no network or no API key."""

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

_EXIT = {"finished": 0, "stopped": 255}  # 255 is what wandb says of Ctrl-C
_PATIENCE = 5.0  # s
_KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")


class Wandb(Sink):
    """A run of its own beside one that the program may have open, with the run's steps as wandb's.

    WANDB_MODE and `wandb offline` decide whether it is online. Without them it is online where there is an API key, and
    else offline, without asking for a key; a server that cannot be reached then makes it offline too, with a warning.

    A resumed run has the same id. What is recorded offline is then in one folder for each part: sync them in
    order, with `wandb sync --append`. wandb takes no step twice: what is repeated after a checkpoint stays as it was.
    """

    name = "wandb"
    _run: Any = None

    def begin(self, event: Began) -> None:
        mode = _mode()
        if mode == "online" and not os.environ.get("WANDB_MODE"):
            why = _unreachable(wandb.setup().settings.base_url)
            if why is not None:
                warnings.warn(
                    f"wandb cannot reach its server ({why}); this run is recorded offline, in {self.folder / 'wandb'}: "
                    "upload it with wandb sync, or set WANDB_MODE=offline.",
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
            # wandb's capture of the terminal does not go together with a display that draws on it.
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
    """What WANDB_MODE or wandb's settings say; without them "online" with a key, and "offline"."""
    # Not left to wandb: it reads the variable once in the life of a process.
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    settings = wandb.setup().settings
    mode: str = settings.mode
    return "offline" if mode == "online" and not _has_key(settings) else mode


def _has_key(settings: Any) -> bool:
    """Whether wandb finds an API key where it looks for one, so that it need not ask."""
    if settings.api_key or any(os.environ.get(name) for name in _KEYS):
        return True
    hosts = [urlsplit(settings.base_url).netloc]
    if settings.base_url == wandb.Settings().base_url:
        hosts.append("api.wandb.ai")  # keys of wandb's own server are kept under this name, whatever it is called now
    try:
        logins = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return any(host in logins.hosts for host in hosts)


def _unreachable(server: str) -> str | None:
    """Why nothing can be sent there, or None. wandb itself would find out after minutes, or not at all."""
    if getproxies():
        return None
    where = urlsplit(server)
    port = where.port or (80 if where.scheme == "http" else 443)
    try:
        socket.create_connection((where.hostname or "", port), timeout=_PATIENCE).close()
    except OSError as error:
        return f"{where.hostname}: {error}"
    return None
