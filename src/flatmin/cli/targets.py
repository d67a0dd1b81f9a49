"""Runs as they are named on the command line: by their folder, or by their name in the usual place."""

from __future__ import annotations

from pathlib import Path

from flatmin.words import suggest

HOME = Path("flatmin-runs")


def run_folder(word: str) -> Path:
    """The folder that is meant: the path itself, or flatmin-runs/runs/NAME for a name without a folder.

    Raises:
        ValueError: neither is there.
    """
    path = Path(word)
    named = HOME / "runs" / path.name
    if path.name == word and word != ".." and named.is_dir() and not (path / "config.json").is_file():
        return named
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(
            f"{word} is a file, and this takes the folder of a run; of a file of weights, "
            f"`flatmin measure {word} --model MODULE:FUNCTION --data MODULE:FUNCTION --what model --split test` gives "
            "loss and error rate."
        )
    names = sorted(one.name for one in (HOME / "runs").iterdir()) if (HOME / "runs").is_dir() else []
    raise ValueError(
        f"there is no run {word!r}, neither as a folder nor as a name in {HOME / 'runs'}{suggest(word, names)}; "
        "`flatmin runs list` names them."
    )
