"""The console that commands print to."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

PIPE_WIDTH = 100  # a log or a file has no width of its own


def make_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console of the terminal's width, or of `PIPE_WIDTH` columns where there is no terminal."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else shutil.get_terminal_size((PIPE_WIDTH, 24)).columns
    return Console(stderr=stderr, width=width, highlight=False, quiet=quiet)


def make_bar(console: Console) -> Progress:
    """A bar with its share, the time left and a last word, gone when it is done; nothing where there is no terminal.

    A task needs the field `last`.
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
