"""Turns names and parameters into recipes, with the built-in methods and those of plugins.

>>> from flatmin.methods import compose
>>> recipe = compose("vasso+bisam-log+asam", theta=0.8)
>>> recipe.direction
EMA(theta=0.8)
>>> recipe.default_rho, recipe.gradient_evaluations
(0.5, 2.0)
>>> compose("asam+usam")
Traceback (most recent call last):
...
ValueError: 'asam' and 'usam' both set the geometry; choose one.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from flatmin.methods.part import KINDS, Part, current_word
from flatmin.methods.recipe import DEFAULTS, ContradictionError, Method, Recipe
from flatmin.methods.table import BUILT_IN
from flatmin.words import suggest

if TYPE_CHECKING:
    from importlib.metadata import EntryPoints

__all__ = ["BASE", "ELSEWHERE", "ENTRY_POINTS", "METHODS", "compose", "method_table"]

ENTRY_POINTS = "flatmin.methods"
BASE = "sgd"  # the method without a perturbation, whatever the base optimizer is; "base" is an alias
METHODS: Mapping[str, Method] = {m.name: m for m in BUILT_IN}
# Names that the literature gives to more than one method.
_AMBIGUOUS = {
    "msam": "write 'micro-sam' for mSAM (an ascent per micro-batch), 'momentum-sam' for Momentum-SAM",
    "ssam": "write 'ssam-f' or 'ssam-d' for Sparse SAM, 'bernoulli' for stochastically scheduled SAM (SS-SAM)",
}

# Methods that are no recipes: what they are instead, and where. README and docs/methods/index.md are written from it.
ELSEWHERE: Mapping[str, str] = {
    "mesa": (
        "a term of the loss: flatmin.methods.losses.trajectory with the outputs of flatmin.optim.WeightAverage, "
        "in docs/methods/trajectory-loss.md"
    ),
    "saf": (
        "a term of the loss: flatmin.methods.losses.trajectory with the logits of flatmin.optim.RecordedLogits, "
        "in docs/methods/trajectory-loss.md"
    ),
    "flat-lora": "noise on frozen weights around a plain step: flatmin.optim.FlatLoRA, in docs/loops/adapters.md",
    "lora-sam": "'sam' with the adapters in the base's param groups, in docs/loops/adapters.md",
}


def elsewhere(name: str) -> str | None:
    """For a method that is not a recipe: its form and the page that describes it. None for any other name."""
    return ELSEWHERE.get(name.lower().replace("_", "-"))


def method_table(plugins: Sequence[str] = ()) -> dict[str, Method]:
    """All methods by name: the built-in ones, those of entry points in the group "flatmin.methods", those of plugins.

    A plugin is an importable module with a dict `METHODS` of name -> `Method`. An entry point refers to such a dict.

    Args:
        plugins: names of plugin modules to import. Default ().

    Raises:
        ValueError: a plugin cannot be imported or has no such dict, or one of its names is already taken.
    """
    table = dict(METHODS)
    for entry in _installed(tuple(sys.path)):
        _merge(table, entry.load(), f"entry point {entry.value!r}")
    for name in plugins:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise ValueError(f"plugin {name!r} could not be imported: {error}.") from error
        _merge(table, getattr(module, "METHODS", None), f"plugin {name!r}")
    return table


@lru_cache(maxsize=4)
def _installed(path: tuple[str, ...]) -> EntryPoints:
    """The entry points of installed packages. Cached, since the search reads a file of every package on the path."""
    from importlib.metadata import entry_points

    return entry_points(group=ENTRY_POINTS)


def _merge(table: dict[str, Method], new: Any, origin: str) -> None:
    if not isinstance(new, Mapping) or not all(isinstance(m, Method) for m in new.values()):
        raise ValueError(f"{origin} must define a dict METHODS that maps names to flatmin.methods.Method objects.")
    for name, method in new.items():
        if "+" in name or name != method.name:
            raise ValueError(f"{origin}: the key {name!r} must equal the method's name and must not contain '+'.")
        if name in table and table[name] is not method:
            raise ValueError(f"{origin}: the name {name!r} is already taken; choose another one.")
        table[name] = method


def compose(name: str, table: Mapping[str, Method] | None = None, **params: Any) -> Recipe:
    """Make a recipe from one or several names joined by "+"; each name contributes the parts that it sets.

    Args:
        name: for example "sam" or "vasso+bisam-log+asam". Order and case do not matter. "base" is the base optimizer
            alone, like "sgd".
        table: the methods to choose from. Default: the built-in ones and those of entry points.
        params: parameters of the parts. Write `theta=0.8` if exactly one part has a parameter of this name; else
            qualify it by the part's kind: `direction=dict(theta=0.8)`, `direction=EMA(theta=0.8)` or
            `**{"direction.theta": 0.8}`. `when` and `points` are accepted for `schedule` and `inner_loop`.

    Returns:
        The recipe. All parts that no name sets are SAM's.

    Raises:
        ValueError: an unknown name or parameter, two names that set the same part, parts that contradict each other, or
            a value out of range.
    """
    names = [n.strip() for n in name.split("+")]
    if table is None:
        table = METHODS if all(n in METHODS for n in names) else method_table()
    names = [_spelled(n, table) for n in names]
    chosen: dict[str, Part] = {}
    owner: dict[str, str] = {}
    for n in names:
        if n not in table:
            if n in _AMBIGUOUS:
                raise ValueError(f"{n!r} is the name of two methods: {_AMBIGUOUS[n]}.")
            if place := elsewhere(n):
                raise ValueError(f"{n!r} is not a recipe but {place}.")
            raise ValueError(f"unknown method {n!r}{_guess(n, table)} (methods: {', '.join(table)})")
        for part in table[n].parts:
            if part.kind in chosen:
                raise ValueError(f"{owner[part.kind]!r} and {n!r} both set the {part.kind}; choose one.")
            chosen[part.kind], owner[part.kind] = part, n
    for kind, changes in _by_kind(name, chosen, params).items():
        chosen[kind] = changes if isinstance(changes, Part) else _replace(chosen.get(kind, DEFAULTS[kind]), changes)
    try:
        return Recipe(name="+".join(names), **chosen)  # type: ignore[arg-type]
    except ContradictionError as error:
        raise error.between(names) from None


def _spelled(name: str, table: Mapping[str, Method]) -> str:
    """The name as the table spells it, matched without regard to case; the name unchanged if nothing matches."""
    if name.lower() == "base" and name not in table:
        return BASE
    alike = [name] if name in table else [entry for entry in table if entry.lower() == name.lower()]
    return alike[0] if len(alike) == 1 else name


def _guess(name: str, table: Mapping[str, Method]) -> str:
    """The end of an error message: a method with this title or with a similar name, if there is one."""
    titled = [entry for entry, method in table.items() if method.title.lower() == name.lower()]
    return f"; did you mean {titled[0]!r}?" if titled else suggest(name, (*table, *ELSEWHERE))


def _by_kind(name: str, chosen: Mapping[str, Part], params: Mapping[str, Any]) -> dict[str, Any]:
    """Bring the three ways of writing a parameter into one form: {kind: part or {field: value}}."""
    by_kind: dict[str, Any] = {}
    for word, value in params.items():
        key = current_word(word)
        kind, _, fld = key.partition(".")
        if key in KINDS:
            if not isinstance(value, (Part, Mapping)):
                raise ValueError(f"{word} must be a part or a dict of its parameters, got {value!r}.")
            by_kind[key] = value if isinstance(value, Part) else {**by_kind.get(key, {}), **value}
            continue
        if fld:
            if kind not in KINDS:
                raise ValueError(f"unknown part {kind!r} in {key!r}{suggest(kind, KINDS)} (parts: {', '.join(KINDS)})")
        else:
            holders = [k for k, part in chosen.items() if key in part.parameters()]
            if len(holders) > 1:
                both = " or ".join(f"{k}.{key}" for k in holders)
                raise ValueError(f"{name!r} has several parameters {key!r}; write {both}.")
            fields = [f for part in chosen.values() for f in part.parameters()]
            if not holders:
                listed = f" (parameters: {', '.join(fields)})" if fields else " (it has none)"
                raise ValueError(f"{name!r} has no parameter {key!r}{suggest(key, fields)}{listed}")
            kind, fld = holders[0], key
        if isinstance(by_kind.get(kind), Part):
            raise ValueError(f"{kind} is given both as a part and by {key!r}; give one of the two.")
        by_kind.setdefault(kind, {})[fld] = value
    return by_kind


def _replace(part: Part, changes: Mapping[str, Any]) -> Part:
    defaults = part.parameters()
    typed = {}
    for key, value in changes.items():
        if key not in defaults:
            raise ValueError(f"{part.kind} {part} has no parameter {key!r}{suggest(key, defaults)}")
        default = defaults[key]
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if isinstance(default, (bool, str)) and not isinstance(value, type(default)):
            raise ValueError(f"{part.kind}.{key} must be {type(default).__name__}, got {value!r}.")
        typed[key] = value
    return dataclasses.replace(part, **typed)
