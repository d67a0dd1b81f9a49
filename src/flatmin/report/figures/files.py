"""Write figures to image files or pages. The same figure always gives the same bytes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flatmin.report.figures import static
from flatmin.report.figures.chart import Drawable
from flatmin.report.figures.interactive import embed
from flatmin.report.html import heading, page, write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDINGS = (".svg", ".pdf", ".png")
_DATES: dict[str, dict[str, None]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
_SIGNS = str.maketrans({sign: f" {word} " for sign, word in {
    "<": "lt", ">": "gt", "≤": "le", "|": "bar", "ε": "epsilon", "λ": "lambda", "φ": "phi", "ρ": "rho",
}.items()})  # fmt: skip
_LONGEST = 80  # the most characters of a file's name


def endings(text: str) -> tuple[str, ...]:
    """The suffixes in a list such as "svg,pdf". Also checks that matplotlib is installed.

    Raises:
        ValueError: no suffix, or an unknown one.
        ModuleNotFoundError: matplotlib is not installed (extra "plot").

    Examples:
        >>> endings("svg, .pdf")
        ('.svg', '.pdf')
    """
    found = tuple(dict.fromkeys(f".{word.strip().lstrip('.').lower()}" for word in text.split(",") if word.strip()))
    unknown = [ending for ending in found if ending not in ENDINGS]
    if unknown or not found:
        known = ", ".join(ending[1:] for ending in ENDINGS)
        raise ValueError(f"the formats of figures must be one or more of {known}, with commas between; got {text!r}.")
    static.require()
    return found


def save(shown: Drawable, path: str | os.PathLike[str], *, width: float = static.COLUMN) -> Path:
    """Write a figure as .svg, .pdf or .png, or as .html for a page that works without a network.

    Args:
        shown: the figure.
        path: path of the file; its suffix sets the format, and its folder is created.
        width: width in inches, except for pages. Default: 3.3, a column of a paper, with text 8 points high.

    Raises:
        ValueError: a different suffix.
        ModuleNotFoundError: matplotlib (extra "plot"), or plotly for a page (extra "report"), is not installed.
        OSError: the file cannot be written.
    """
    target = Path(path)
    if target.suffix == ".html":
        return save_page([shown], target, title=shown.title)
    check_ending(target)
    return write_figure(static.figure(shown, width=width), target)


def save_all(
    shown: Iterable[Drawable], folder: str | os.PathLike[str], suffix: str, *, width: float = static.COLUMN
) -> list[Path]:
    """Write figures into a folder, each into a file named after its title.

    Args:
        shown: the figures; if several have the same title, all but the first get a number.
        folder: the folder; made if it does not exist.
        suffix: ".svg", ".pdf", ".png" or ".html".
        width: see `save`.

    Raises:
        ValueError, ModuleNotFoundError, OSError: see `save`.
    """
    taken: dict[str, int] = {}
    written = []
    for one in shown:
        words = re.findall("[a-z0-9]+", one.title.lower().translate(_SIGNS))
        name = "-".join(words)[:_LONGEST].strip("-") or "figure"
        taken[name] = taken.get(name, 0) + 1
        number = f"-{taken[name]}" if taken[name] > 1 else ""
        written.append(save(one, Path(folder) / f"{name}{number}{suffix}", width=width))
    return written


def save_page(shown: Sequence[Drawable], path: str | os.PathLike[str], *, title: str) -> Path:
    """Write figures with headings as one HTML page that works without a network.

    Raises:
        ValueError: there is no figure.
        ModuleNotFoundError: plotly is not installed (extra "report").
        OSError: the file cannot be written.
    """
    if not shown:
        raise ValueError("there is no figure to write.")
    return write(page(title, [heading(one.title, one.caption) + embed(one) for one in shown]), path)


def write_figure(figure: Figure, path: str | os.PathLike[str], *, dpi: int = 300) -> Path:
    """Write a figure of matplotlib as .svg, .pdf or .png; text is kept as text.

    Raises:
        ValueError: a different suffix.
        OSError: the file cannot be written.
    """
    target = check_ending(Path(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    with static.defaults():
        figure.savefig(target, dpi=dpi, facecolor="white", metadata=_DATES.get(target.suffix))
    return target


def check_ending(path: Path) -> Path:
    """The path, if its suffix is that of a figure.

    Raises:
        ValueError: a different suffix.
    """
    if path.suffix not in ENDINGS:
        raise ValueError(f"the name of a figure's file must end in {', '.join(ENDINGS)}, got {path.name!r}.")
    return path
