"""Find the run that a command line names: by its folder, or by its name in flatmin-runs/runs."""

from __future__ import annotations

from pathlib import Path

from flatmin.words import suggest

HOME = Path("flatmin-runs")


def run_folder(word: str) -> Path:
    """The folder of a run: the path itself, or flatmin-runs/runs/NAME for a name.

    Raises:
        ValueError: there is neither such a folder nor such a name.
    """
    path = Path(word)
    named = HOME / "runs" / path.name
    if path.name == word and word != ".." and named.is_dir() and not (path / "config.json").is_file():
        return named
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(
            f"{word} is a file, but this command needs a run folder; for the loss and error rate of a file of weights, "
            f"use `flatmin measure {word} --model MODULE:FUNCTION --data MODULE:FUNCTION --what model --split test`."
        )
    names = sorted(one.name for one in (HOME / "runs").iterdir()) if (HOME / "runs").is_dir() else []
    raise ValueError(
        f"there is no run {word!r}: neither a folder nor a name in {HOME / 'runs'}{suggest(word, names)} "
        "(`flatmin runs list` lists the runs)"
    )
