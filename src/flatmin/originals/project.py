"""A research project: the flags of its script, and the rule that translates them to `flatmin train` settings."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from flatmin.originals.reader import read_flags, strip_script
from flatmin.train import settings
from flatmin.train.config import RunConfig
from flatmin.train.preset import AUTOMATIC, load_run
from flatmin.train.trainer import build_recipe, build_schedule

F = TypeVar("F")
Value = bool | int | float | str | tuple[int, ...] | tuple[float, ...]
_ALWAYS = ("method", "rho", *AUTOMATIC)  # always written, even if the preset has the same value


@dataclass(frozen=True, kw_only=True)
class Translation:
    """The command line of a research repository as arguments of `flatmin train`.

    Args:
        command: a preset, then `key=value` overrides.
        notes: sentences about differences from the script's run, and about flags without effect.

    Examples:
        >>> translation = Translation(command=("cifar10-resnet56", "method=sam", "rho=0.05"))
        >>> translation.with_overrides(["epochs=1", "rho=0.1"]).line
        'flatmin train cifar10-resnet56 method=sam rho=0.1 epochs=1'
    """

    command: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """The equivalent `flatmin train` command line."""
        return shlex.join(("flatmin", "train", *self.command))

    def with_overrides(self, overrides: Sequence[str]) -> Translation:
        """The translation with additional `key=value` overrides, which replace those with the same key.

        Raises:
            ValueError: an override is not `key=value`.
        """
        preset, *own = self.command
        table = dict(settings.split_override(word) for word in (*own, *overrides))
        joined = (f"{key}={value}" for key, value in table.items())
        return dataclasses.replace(self, command=(preset, *joined))


Rule = Callable[[F, frozenset[str]], Translation]


@dataclass(frozen=True, kw_only=True)
class Project(Generic[F]):
    """The command line of a research repository.

    Args:
        name: name for `flatmin original`.
        script: script that the flags belong to, for error messages and lists.
        paper: source.
        flags: a frozen dataclass with a field for each flag, with the defaults of the script.
        rule: translates the flags; called with the flags and the names of those that were given.
        inert: flags without effect, with the reasons.
    """

    name: str
    script: str
    paper: str
    flags: type[F]
    rule: Rule[F]
    inert: Mapping[str, str] = field(default_factory=dict)

    def translate(self, arguments: Sequence[str]) -> Translation:
        """Translate a command line of the script; `python` and the script's name before the flags are optional.

        Raises:
            ValueError: a flag is unknown or not supported, an argument is unexpected, or a value is missing, has
                another type, or is out of range.
        """
        rest, variables = strip_script(arguments)
        flags, given = read_flags(self.flags, rest, script=self.script)
        translation = self.rule(flags, given)
        check(translation.command)
        outside = [f"{word} is ignored; put it before the word flatmin." for word in variables]
        return dataclasses.replace(translation, notes=(*translation.notes, *idle(given, **self.inert), *outside))


def check(command: Sequence[str]) -> RunConfig:
    """The configuration of a preset with overrides.

    Raises:
        ValueError: the configuration is not valid.
    """
    config, _ = load_run(command[0], command[1:])
    build_recipe(config)
    build_schedule(config, 1)
    return config


def to_overrides(preset: str, table: Mapping[str, Value]) -> tuple[str, ...]:
    """A preset, and the settings in which the run differs from it.

    The method, the radius, and settings whose default depends on the machine are always included.
    """
    kinds, preset_table = settings.field_types(RunConfig), settings.read_preset(preset, "train")
    usual = {f.name: f.default for f in dataclasses.fields(RunConfig)} | preset_table
    command = [preset]
    for key, value in table.items():
        same = key in kinds and type(value) in (bool, int, float, str) and usual.get(key) == value
        if key in _ALWAYS or not same:
            command.append(f"{key}={settings.written(value)}")
    return tuple(command)


def idle(given: frozenset[str], **reasons: str) -> list[str]:
    """A note for each given flag without effect: its name and the reason.

    Examples:
        >>> idle(frozenset({"mu"}), mu="SAM has none", alpha="SAM has none")
        ['--mu has no effect: SAM has none.']
    """
    return [f"--{name} has no effect: {reason}." for name, reason in reasons.items() if name in given]


def truth(given: frozenset[str], flags: Any, name: str) -> list[str]:
    """A note if a flag is given as false; the script reads it with `bool(text)`, which is true for any text."""
    wrong = name in given and not getattr(flags, name)
    return [f"--{name} is false here, as given; the script reads any value as true."] if wrong else []
