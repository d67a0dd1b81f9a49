"""Rules from text, for the command line: `constant:0.1`, `power:c=0.5,p=0.5001`, `diminish1`, `tied:0.5`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from flatmin.theory.rules import ConstantRule, PowerRule, Product, Rule, Tied, as_rule
from flatmin.theory.schedules import Cosine, Diminish
from flatmin.words import suggest


@dataclass(frozen=True)
class Form:
    """One form of the grammar.

    Attributes:
        make: makes the rule from its keys.
        keys: all keys.
        lone: the key that a number without a key sets.
        required: keys that must be given.
        whole: keys whose values must be whole numbers.
        formula: the formula, for help texts.
    """

    make: Callable[..., Rule | Tied]
    keys: tuple[str, ...]
    lone: str
    required: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    formula: str = ""


FORMS: dict[str, Form] = {
    "constant": Form(ConstantRule, ("c",), "c", ("c",), formula="c"),
    "power": Form(PowerRule, ("c", "p", "q", "shift"), "p", ("p",), formula="c / ((n + shift)^p (log(n + shift))^q)"),
    "harmonic": Form(partial(PowerRule, p=1.0), ("c", "shift"), "c", formula="c / (n + shift)"),
    "nlogn": Form(partial(PowerRule, p=1.0, q=1.0, shift=1.0), ("c", "shift"), "c", formula="c / ((n + 1) log(n + 1))"),
    "diminish1": Form(partial(Diminish, 1), ("lr", "epoch"), "lr", (), ("epoch",), "lr / (e + 1)"),
    "diminish2": Form(partial(Diminish, 2), ("lr", "epoch"), "lr", (), ("epoch",), "lr / (e + 1)^0.5001"),
    "diminish3": Form(
        partial(Diminish, 3), ("lr", "epoch"), "lr", (), ("epoch",), "lr / (b ln b), b = 2 + floor(e / 5)"
    ),
    "cosine": Form(Cosine, ("T", "lr", "floor"), "T", ("T",), ("T",), "cosine from lr to floor over T updates"),
    "tied": Form(Tied, ("factor",), "factor", ("factor",), formula="factor t_n (radii only)"),
}
"""The grammar: `name`, `name:number` or `name:key=number,...`; a product of rules is joined by `*`."""


def read_rule(words: str) -> Rule:
    """The rule that a text describes.

        >>> read_rule("power:c=0.5,p=0.5001").at(1)
        0.5
        >>> read_rule("harmonic:0.1*constant:0.5").at(5)
        0.01
        >>> read_rule("0.1")
        ConstantRule(c=0.1)

    Args:
        words: a number, a form of `FORMS`, or several of them joined by `*`.

    Raises:
        ValueError: an unknown form or key, a missing or invalid number, or a tied radius in place of a step size.
    """
    rule = _read(words)
    if isinstance(rule, Tied):
        raise ValueError(f"{words!r} is a radius tied to the step size and cannot be used as the step size.")
    return rule


def read_radius(words: str) -> Rule | Tied:
    """The radius that a text describes: as in `read_rule`, or `tied:factor`."""
    return _read(words)


def as_step(value: Rule | float | str | Callable[[int], float]) -> Rule:
    """A step size from a rule, a number, text or a function of n."""
    if isinstance(value, Tied):
        raise ValueError(f"{value} is a radius tied to the step size and cannot be used as the step size.")
    return read_rule(value) if isinstance(value, str) else as_rule(value)


def as_radius(value: Rule | Tied | float | str | Callable[[int], float], step: Rule) -> Rule:
    """A radius from a rule, a tied radius, a number, text or a function of n; tied radii follow `step`."""
    read = read_radius(value) if isinstance(value, str) else value
    return read.of(step) if isinstance(read, Tied) else as_rule(read)


def _read(words: str) -> Rule | Tied:
    parts = [_read_one(part.strip(), words) for part in words.split("*")]
    if len(parts) == 1:
        return parts[0]
    rules = [part for part in parts if not isinstance(part, Tied)]
    if len(rules) < len(parts):
        raise ValueError(f"{words!r}: a tied radius cannot be part of a product.")
    return Product(tuple(rules))


def _read_one(part: str, words: str) -> Rule | Tied:
    name, colon, rest = part.partition(":")
    if not colon and (lone := _number(part)) is not None:
        return ConstantRule(lone)
    if name not in FORMS:
        raise ValueError(f"unknown rule {name!r}{suggest(name, FORMS)} (rules: a number, {', '.join(FORMS)}).")
    form, given = FORMS[name], dict[str, float]()
    for item in filter(None, rest.split(",")):
        key, equals, text = (s.strip() for s in item.partition("="))
        if not equals:
            key, text = form.lone, key
        if key not in form.keys:
            raise ValueError(f"{name} has no key {key!r}{suggest(key, form.keys)} (keys: {', '.join(form.keys)}).")
        value = _number(text)
        if value is None or key in given:
            raise ValueError(f"{words!r}: {key} must be given one number, got {text!r}.")
        if key in form.whole and not (value >= 1 and value.is_integer()):
            raise ValueError(f"{name}: {key} must be a whole number >= 1, got {text}.")
        given[key] = int(value) if key in form.whole else value
    if missing := [key for key in form.required if key not in given]:
        raise ValueError(f"{name} needs {missing[0]}, as in '{name}:{missing[0]}=0.5'.")
    return form.make(**given)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
