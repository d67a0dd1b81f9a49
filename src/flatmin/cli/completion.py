"""Shell completion: presets, studies, runs, methods, and `KEY=VALUE` settings. Nothing here imports torch.

Shells treat "=" differently: bash splits `rho=0.1` into three words, zsh and fish pass it as one.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence

import typer

from flatmin.cli.catalogue import Catalogue, catalogue
from flatmin.cli.targets import HOME
from flatmin.train.keys import Key
from flatmin.train.settings import preset_names

Candidates = Sequence[str | tuple[str, str]]
Completer = Callable[[typer.Context, str], Candidates]
_LISTS = ("trackers", "measures")  # settings whose value is a list of names separated by commas


def presets(kind: str, *also: str) -> Completer:
    """Complete names of the package's presets, and the words in `also`."""
    return lambda ctx, incomplete: _starting([*also, *preset_names(kind)], incomplete)


def runs(ctx: typer.Context, incomplete: str) -> Candidates:
    """Complete names of runs in flatmin-runs/runs."""
    return _starting(_run_names(), incomplete)


def runs_and_studies(ctx: typer.Context, incomplete: str) -> Candidates:
    """Complete names of runs in flatmin-runs/runs, and of studies."""
    return _starting([*_run_names(), *preset_names("study")], incomplete)


def demonstrations(ctx: typer.Context, incomplete: str) -> Candidates:
    """Complete demonstrations of `flatmin theory`."""
    return _starting(catalogue().demonstrations, incomplete)


def presets_and_runs(ctx: typer.Context, incomplete: str) -> Candidates:
    """Complete presets of `flatmin train`, and paths of runs."""
    paths = [str(HOME / "runs" / name) for name in _run_names()] if incomplete.startswith(HOME.name) else []
    return _starting([*preset_names("train"), *paths], incomplete)


def methods(ctx: typer.Context, incomplete: str) -> Candidates:
    """Complete methods and compositions: after "vasso+", methods that set other parts than vasso."""
    return _methods(incomplete)


def data(ctx: typer.Context, incomplete: str) -> Candidates:
    """Complete data sets."""
    return _starting(_choices("data"), incomplete)


def networks(ctx: typer.Context, incomplete: str) -> Candidates:
    """Complete networks."""
    return _starting(catalogue().networks, incomplete)


def originals(ctx: typer.Context, incomplete: str) -> Candidates:
    """Complete projects of `flatmin original`."""
    return _starting(["list", *catalogue().originals], incomplete)


def one_of(*words: str) -> Completer:
    """Complete one of these words."""
    return lambda ctx, incomplete: _starting(words, incomplete)


def several_of(key: str) -> Completer:
    """Complete a list, separated by commas, of the names that a setting allows."""
    return lambda ctx, incomplete: _listed(_choices(key), incomplete)


def anything(ctx: typer.Context, incomplete: str) -> Candidates:
    """Complete the words that `flatmin settings` accepts."""
    book = catalogue()
    entries = [*book.settings.values(), *book.methods.values()]
    keys = [key.name for entry in entries for key in entry.keys]
    return [*_starting(dict.fromkeys([*book.settings, *keys, *book.networks]), incomplete), *_methods(incomplete)]


def words(*places: str, also: Completer | None = None) -> Completer:
    """Complete `KEY=VALUE` words: the keys, and the values of keys that have only a few.

    Args:
        places: which settings: keys of `flatmin.cli.catalogue.TITLES`, or "executor" for those of --executor.
        also: completes other words that are allowed in the same place.
    """

    def complete(ctx: typer.Context, incomplete: str) -> Candidates:
        before = _before(ctx)
        keys = _keys(catalogue(), places, ctx, before)
        if before and "=" not in incomplete:  # bash splits the word at "="
            if before[-1] == "=" and len(before) > 1:
                return _values(keys[before[-2]], incomplete) if before[-2] in keys else []
            if incomplete == "" and before[-1] in keys:
                return _values(keys[before[-1]], "")
        name, equals, text = incomplete.partition("=")
        if equals:
            return [f"{name}={value}" for value in _values(keys[name], text)] if name in keys else []
        names = _starting(keys, name)
        if len(names) == 1:  # offer two candidates, because shells add a space after a single one
            only = names[0]
            return [f"{only}={value}" for value in ["", *_values(keys[only], "")]]
        described = [(f"{key}=", textwrap.shorten(keys[key].help, 70, placeholder=" ...")) for key in names]
        return [*described, *(also(ctx, incomplete) if also else ())]

    return complete


def _before(ctx: typer.Context) -> list[str]:
    """The arguments and settings before the incomplete word, as the shell passed them."""
    given: list[str] = []
    for value in ctx.params.values():
        given += [str(one) for one in value] if isinstance(value, (list, tuple)) else []
    return given


def _keys(book: Catalogue, places: Sequence[str], ctx: typer.Context, before: Sequence[str]) -> dict[str, Key]:
    """The settings by name, including the parameters of the method and the network that the words before name."""
    places = [str(ctx.params.get("executor")) if place == "executor" else place for place in places]
    found = {key.name: key for place in places if place in book.settings for key in book.settings[place].keys}
    if "train" in places:
        pairs = "\n".join(before).replace("\n=\n", "=").splitlines()
        named = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        for name in named.get("method", "sam").split("+"):
            if name in book.methods:
                found |= {key.name: key for key in book.methods[name].keys}
        network = book.networks.get(named.get("model", ""))
        found |= {f"model.{key.name}": key for key in (network.keys if network else ())}
    return found


def _values(key: Key, text: str) -> list[str]:
    """The values that a setting allows; if there are too many to list, its default as an example."""
    if key.name == "method":
        return _methods(text)
    if key.name in _LISTS:
        return _listed(key.choices, text)
    choices = key.choices or (("true", "false") if key.kind.startswith("true or false") else ())
    return _starting(choices or ([key.default] if key.default else []), text)


def _methods(text: str) -> list[str]:
    book = catalogue().methods
    first, plus, last = text.rpartition("+")
    set_before = {kind for name in first.split("+") if name in book for kind in book[name].parts}
    names = [name for name in book if not set_before & set(book[name].parts) and name not in first.split("+")]
    return [f"{first}{plus}{name}" for name in _starting(names, last)]


def _listed(names: Iterable[str], text: str) -> list[str]:
    first, comma, last = text.rpartition(",")
    return [f"{first}{comma}{name}" for name in _starting(names, last) if name not in first.split(",")]


def _run_names() -> list[str]:
    folder = HOME / "runs"
    return sorted(one.name for one in folder.iterdir()) if folder.is_dir() else []


def _choices(name: str) -> tuple[str, ...]:
    return next(key.choices for key in catalogue().settings["train"].keys if key.name == name)


def _starting(names: Iterable[str], text: str) -> list[str]:
    return [name for name in names if name.startswith(text)]
