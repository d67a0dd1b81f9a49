"""Functions by name, for the command line."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from flatmin.theory.functions import Function, LeastSquares, Quadratic, Square, random_system
from flatmin.theory.landscapes import LogSum, MexicanHat, Quartic, Rosenbrock, Wave
from flatmin.theory.logistic import breast_cancer, digits_pair
from flatmin.words import suggest


@dataclass(frozen=True)
class NamedFunction:
    """A function with a name.

    Attributes:
        make: makes the function from the numbers after the colon.
        numbers: the largest number of numbers; -1 for any number.
        summary: a description of the function and its numbers, with defaults in brackets.
        least: the smallest value if the numbers must be whole; None if any finite numbers are allowed.
        default: the numbers used if none are given.
    """

    make: Callable[..., Function]
    numbers: int
    summary: str
    least: int | None = None
    default: tuple[float, ...] = ()


FUNCTIONS: dict[str, NamedFunction] = {
    "square": NamedFunction(Square, 0, "x^2"),
    "quadratic": NamedFunction(lambda *s: Quadratic(s or (1.0, 4.0)), -1, "a quadratic with these eigenvalues (1,4)"),
    "least-squares": NamedFunction(
        lambda m=10, n=5: LeastSquares(*random_system(m, n)), 2, "||A x - b||^2 / 2, A random of m,n (10,5)", least=1
    ),
    "log-sum": NamedFunction(
        LogSum.random, 1, "sum log(1 + (A x - b)^2) of n variables (20), L = 8", least=1, default=(20,)
    ),
    "breast-cancer": NamedFunction(
        lambda l2=1e-3: breast_cancer(l2), 1, "logistic regression on real data, l2 (0.001)"
    ),
    "digits": NamedFunction(
        lambda one=3, other=8: digits_pair(one, other), 2, "logistic regression, two digits (3,8)", least=0
    ),
    "rosenbrock": NamedFunction(Rosenbrock, 1, "Rosenbrock's function, L on |x| <= reach (2)"),
    "quartic": NamedFunction(Quartic, 1, "x^4 / 4, KL with q = 1/4, L on |x| <= reach (2)"),
    "wave": NamedFunction(Wave, 0, "1 - cos x, L = 1"),
    "hat": NamedFunction(MexicanHat, 0, "the Mexican hat, without the KL property"),
}


def read_function(words: str) -> Function:
    """The function that a text names: a name from `FUNCTIONS`, perhaps with numbers, such as `quadratic:1,4`.

        >>> read_function("quadratic:1,4").function_class.L
        4.0

    Raises:
        ValueError: an unknown name, or numbers that the function does not accept.
    """
    name, _, rest = words.partition(":")
    if name not in FUNCTIONS:
        raise ValueError(f"unknown function {name!r}{suggest(name, FUNCTIONS)} (functions: {', '.join(FUNCTIONS)}).")
    named = FUNCTIONS[name]
    try:
        numbers = [float(text) for text in rest.split(",") if text.strip()]
    except ValueError:
        raise ValueError(f"{words!r}: the text after the colon must be numbers separated by commas.") from None
    if 0 <= named.numbers < len(numbers):
        raise ValueError(f"{name} takes at most {named.numbers} numbers, got {len(numbers)}: {named.summary}.")
    for number in numbers:
        if not math.isfinite(number):
            raise ValueError(f"{words!r}: the numbers must be finite, got {number:g}.")
        if named.least is not None and not (number >= named.least and number.is_integer()):
            raise ValueError(f"{words!r}: {name} takes whole numbers >= {named.least}, got {number:g}.")
    if named.least is not None:
        return named.make(*(int(number) for number in numbers or named.default))
    return named.make(*numbers)
