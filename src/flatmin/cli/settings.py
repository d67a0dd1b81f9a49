"""`flatmin settings`: list the KEY=VALUE settings with their defaults and what they do."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable, Mapping
from typing import Annotated

import typer

from flatmin.cli import completion as complete
from flatmin.cli.catalogue import Catalogue, Entry, catalogue, short
from flatmin.cli.console import LEAST_WIDTH, PIPE_WIDTH
from flatmin.train.keys import Key
from flatmin.words import suggest

Section = tuple[str, list[tuple[str, Key]]]
_RUNS = ("train", "logging")
_DEFAULT = 10  # columns for the default; longer defaults are printed after the help


def settings(
    word: Annotated[
        str | None,
        typer.Argument(
            metavar="WORD",
            help="A method or composition, a network, one of train, measure, study, ray and slurm, or a word to search "
            "for.",
            autocompletion=complete.anything,
        ),
    ] = None,
) -> None:
    """List the KEY=VALUE settings with their defaults and what they do.

    Without WORD it lists the settings of `flatmin train`. A default is used if neither the command line nor the preset
    sets a value.

    Examples:
        flatmin settings              all settings of flatmin train
        flatmin settings rho          all settings about rho
        flatmin settings vasso+asam   the parameters of a method
        flatmin settings resnet18     the keyword arguments of a network
    """
    book = catalogue()
    sections = _of_runs(book) if word is None else find(word, book)
    width = shutil.get_terminal_size((PIPE_WIDTH, 24)).columns
    typer.echo("\n\n".join(_text(section, max(width, LEAST_WIDTH)) for section in sections))
    if word is None:
        typer.echo(
            "\nflatmin settings WORD lists the settings of a method, a network, measure, study,\n"
            "ray or slurm, or those about a word. Separate lists by commas: betas=0.9,0.99."
        )


def find(word: str, book: Catalogue) -> list[Section]:
    """The settings of a command, a method or a network; else the settings that have the word in their name or help.

    Raises:
        ValueError: there are no such settings.
    """
    asked = word.strip().lower()
    if asked == "train":
        return _of_runs(book)
    if asked in book.settings:
        places = ("study", "record", "view") if asked == "study" else (asked,)
        return [(_title(book.settings[place]), _rows(book.settings[place].keys)) for place in places]
    if asked and all(name in book.methods for name in asked.split("+")):
        return [_own(name, book.methods[name], "parameters") for name in asked.split("+")]
    if asked in book.networks:
        return [_own(asked, book.networks[asked], "keywords", "model.")]
    found = [(title, [row for row in rows if _about(row[1], asked)]) for title, rows in _everything(book)]
    if not any(rows for _, rows in found) or not asked:
        names = [key.name for _, rows in _everything(book) for _, key in rows]
        near = suggest(word, [*names, *book.methods, *book.networks, *book.settings])
        raise ValueError(f"no setting, method or network is called {word!r}{near or '.'} See flatmin settings.")
    return [(title, rows) for title, rows in found if rows]


def _everything(book: Catalogue) -> list[Section]:
    sections = _of_runs(book)
    others = [entry for place, entry in book.settings.items() if place not in _RUNS]
    sections += [(_title(entry), _rows(entry.keys)) for entry in others]
    sections.append(("Parameters of methods", _shared(book.methods, "")))
    sections.append(("Keywords of networks", _shared(book.networks, "model.")))
    return sections


def _of_runs(book: Catalogue) -> list[Section]:
    """The settings of `flatmin train`, by heading."""
    groups: dict[str, list[tuple[str, Key]]] = {}
    for key in (key for place in _RUNS for key in book.settings[place].keys):
        groups.setdefault(key.group, []).append((key.name, key))
    return list(groups.items())


def _rows(keys: Iterable[Key]) -> list[tuple[str, Key]]:
    return [(key.name, key) for key in keys]


def _title(entry: Entry) -> str:
    return f"Settings of {entry.summary}"


def _own(name: str, entry: Entry, what: str, prefix: str = "") -> Section:
    none = "" if entry.keys else f" It has no {what} of its own."
    return f"{name}: {entry.summary}{none}", [(f"{prefix}{key.name}", key) for key in entry.keys]


def _shared(entries: Mapping[str, Entry], prefix: str) -> list[tuple[str, Key]]:
    """Each parameter once; its help begins with the names that have it."""
    owners: dict[Key, list[str]] = {}
    for name, entry in entries.items():
        for key in entry.keys:
            owners.setdefault(key, []).append(name)
    return [
        (f"{prefix}{key.name}", Key(**{**vars(key), "help": f"of {', '.join(names)}: {key.help}"}))
        for key, names in owners.items()
    ]


def _about(key: Key, word: str) -> bool:
    return word in key.name.lower() or bool(re.search(rf"\b{re.escape(word)}", key.help.lower()))


def _text(section: Section, width: int) -> str:
    title, rows = section
    lines = textwrap.wrap(title, width)
    lines = [typer.style(line, bold=True) for line in lines]
    names = min(max((len(name) for name, _ in rows), default=0), 20)
    for name, key in rows:
        default = key.default if len(key.default) <= _DEFAULT else ""
        head = f"  {name:<{names}}  {default:<{_DEFAULT}}  "
        if len(name) > names:
            lines.append(f"  {name}")
            head = f"  {'':<{names}}  {default:<{_DEFAULT}}  "
        wrapped = textwrap.wrap(_help(key), max(width - len(head), LEAST_WIDTH), break_on_hyphens=False)
        lines += [f"{head}{wrapped[0]}", *(" " * len(head) + line for line in wrapped[1:])]
    return "\n".join(line.rstrip() for line in lines)


def _help(key: Key) -> str:
    """The help text, with the choices if it does not name them, and with a long default."""
    text = key.help.replace("`", "")
    values = short(key)
    if values != key.kind and not all(re.search(rf"\b{re.escape(one)}\b", text) for one in key.choices):
        text += f" {'Any' if key.kind.startswith('list') else 'One'} of: {values}."
    return text if len(key.default) <= _DEFAULT else f"{text} Default: {key.default}."
