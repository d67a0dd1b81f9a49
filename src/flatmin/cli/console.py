"""The console and the progress bar of the commands."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

PIPE_WIDTH = 100  # columns of output that does not go to a terminal
LEAST_WIDTH = 20


def make_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console with the width of the terminal, or `PIPE_WIDTH` columns without a terminal.

    A dumb terminal, which cannot redraw a line, is treated as a pipe.
    """
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    terminal = stream is not None and stream.isatty() and not dumb  # the stream is None if it was closed
    width = None if terminal else max(LEAST_WIDTH, shutil.get_terminal_size((PIPE_WIDTH, 24)).columns)
    return Console(stderr=stderr, width=width, highlight=False, quiet=quiet, force_terminal=False if dumb else None)


def make_bar(console: Console) -> Progress:
    """A progress bar with percentage, remaining time and a note; it is removed at the end.

    Without a terminal it prints nothing. Tasks need the field `last`, the note.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(compact=True),
        TextColumn("[dim]{task.fields[last]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
