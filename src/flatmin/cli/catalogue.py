"""The catalogue of settings, methods, networks, projects and demonstrations, which can be read without torch.

`tools/generate.py` writes its file from the definitions in the code.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from flatmin.train.keys import Key, keys_of, keywords_of

FILE = "catalogue.jsonl"
# What each group of settings is for, by the word for `flatmin settings`.
TITLES = {
    "train": "flatmin train, and of all commands that train",
    "logging": "flatmin train that do not affect the outcome",
    "measure": "flatmin measure RUN KEY=VALUE ...",
    "study": "a study's .toml file",
    "record": "the table [record] of a study's .toml file",
    "view": "the table [measure] of a study's .toml file",
    "ray": "flatmin study --executor ray --on KEY=VALUE ...",
    "slurm": "flatmin study --executor slurm --on KEY=VALUE ...",
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A method, a network, a project, a demonstration, or a group of settings.

    Args:
        summary: description, in one sentence.
        keys: the settings.
        parts: kinds of the parts that a method sets; methods with a kind in common do not compose.
    """

    summary: str
    keys: tuple[Key, ...]
    parts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """All settings, and the names that commands accept.

    Args:
        settings: groups of settings, by key of `TITLES`.
        methods: methods, by name.
        networks: networks, by name.
        originals: research projects of `flatmin original`, by name.
        demonstrations: demonstrations of `flatmin theory`, by name.
    """

    settings: Mapping[str, Entry]
    methods: Mapping[str, Entry]
    networks: Mapping[str, Entry]
    originals: Mapping[str, Entry]
    demonstrations: Mapping[str, Entry]


@cache
def catalogue() -> Catalogue:
    """The catalogue, read from its file."""
    made: dict[str, dict[str, Any]] = {field.name: {} for field in dataclasses.fields(Catalogue)}
    for line in resources.files("flatmin.cli").joinpath(FILE).read_text(encoding="utf-8").splitlines():
        kind, name, fields = json.loads(line)
        fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
        if "name" in fields:
            made[kind][name]["keys"] += (Key(**fields),)
        else:
            made[kind][name] = {**fields, "keys": ()}
    return Catalogue(**{kind: {name: Entry(**one) for name, one in table.items()} for kind, table in made.items()})


def as_text(what: Catalogue) -> str:
    """The content of the file: one line of JSON for each entry and for each of its settings."""
    lines = []
    for field in dataclasses.fields(what):
        for name, entry in getattr(what, field.name).items():
            for one in (entry, *entry.keys):
                fields = {key: value for key, value in vars(one).items() if key != "keys"}
                lines.append(json.dumps([field.name, name, fields], ensure_ascii=False))
    return "\n".join(lines) + "\n"


def collect() -> Catalogue:
    """The catalogue, built from the definitions; this imports torch."""
    from flatmin.data.images import STATISTICS
    from flatmin.data.named import DATASETS
    from flatmin.measure.report import SECTIONS, ReportSettings
    from flatmin.methods import METHODS
    from flatmin.models.zoo import MODELS
    from flatmin.originals.projects import PROJECTS
    from flatmin.study.executors.settings import SETTINGS
    from flatmin.study.measuring import View
    from flatmin.study.record import Record
    from flatmin.study.spec import StudySpec
    from flatmin.theory.demonstrations import DEMONSTRATIONS
    from flatmin.train.config import RunConfig
    from flatmin.train.options import Options
    from flatmin.train.preset import AUTO, METHOD, word_types
    from flatmin.train.settings import describe
    from flatmin.train.trackers import TRACKERS

    names = {
        "method": METHODS,
        "data": DATASETS,
        "model": MODELS,
        "statistics": STATISTICS,
        "trackers": TRACKERS,
        "measures": SECTIONS,
        "what": SECTIONS,
    }
    train = []
    for key in keys_of(RunConfig, values=names):
        if key.name in word_types():
            if key.name == "method":
                key = dataclasses.replace(key, default=METHOD)
            kind = describe(word_types()[key.name])
            if kind.startswith(f"{AUTO} or "):
                choices = (AUTO, *(key.choices or ("true", "false")))
                key = dataclasses.replace(key, kind=kind, default=AUTO, choices=choices)
            train.append(key)
    settings = {
        "train": train,
        "logging": keys_of(Options, values=names),
        "measure": keys_of(ReportSettings),
        "study": [key for key in keys_of(StudySpec) if key.name not in ("name", "changed")],
        "record": keys_of(Record, values=names),
        "view": [key for key in keys_of(View, values=names) if key.name not in ("device", "landscapes")],
        "ray": keys_of(SETTINGS["ray"]),
        "slurm": keys_of(SETTINGS["slurm"]),
    }
    methods = {}
    for name, method in METHODS.items():
        keys: list[Key] = []
        for part in method.parts:
            keys += [dataclasses.replace(key, group=part.kind) for key in keys_of(type(part), like=part)]
        kinds = tuple(part.kind for part in method.parts)
        methods[name] = Entry(summary=f"{method.title}. {method.summary}".rstrip(), keys=tuple(keys), parts=kinds)
    given = ("num_classes", "in_channels", "image_size")  # set by the trainer, from the data
    networks = {
        name: Entry(
            summary=_first_sentence(function),
            keys=tuple(key for key in keywords_of(function) if key.name not in given),
        )
        for name, function in MODELS.items()
    }
    places = {word: Entry(summary=TITLES[word], keys=tuple(keys)) for word, keys in settings.items()}
    originals = {name: Entry(summary=f"{one.script}: {one.paper}", keys=()) for name, one in PROJECTS.items()}
    demonstrations = {name: Entry(summary=one.title, keys=()) for name, one in DEMONSTRATIONS.items()}
    return Catalogue(
        settings=places, methods=methods, networks=networks, originals=originals, demonstrations=demonstrations
    )


def short(key: Key, *, most: int = 120) -> str:
    """The values of a setting: its choices if their list is short, else its type."""
    words = ", ".join(key.choices)
    if key.kind.endswith(" or none") and key.choices:
        words += ", none"
    return words if words and len(words) <= most else key.kind


def _first_sentence(function: Any) -> str:
    doc = (getattr(function, "func", function).__doc__ or "").strip().partition("\n\n")[0]
    return " ".join(doc.split()).partition(". ")[0].rstrip(".") + "."
