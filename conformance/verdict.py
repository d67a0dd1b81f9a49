"""Behaviours and their outcomes."""

from __future__ import annotations

import math
import random
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, overload

import torch

from conformance.adapter import Adapter, NotOfferedError

Check = Callable[[Adapter], "str | None"]
PASS, FAIL, ABSENT = "pass", "fail", "not offered"


class Fault(AssertionError):  # noqa: N818
    """A requirement that is not met; the message has the figure."""


@dataclass(frozen=True)
class Behaviour:
    """A requirement on an implementation.

    Attributes:
        name: its name in the table.
        theme: the module that defines it.
        demand: what must hold, in one sentence.
        why: what goes wrong for a user otherwise.
        check: returns the figure, or raises Fault with it, NotOfferedError, or any error of the implementation.
        ranks: number of processes that run it together. Default 1.
        limit_s: time limit in seconds, after which it counts as hung. Default 60.
    """

    name: str
    theme: str
    demand: str
    why: str
    check: Check
    ranks: int = 1
    limit_s: float = 60.0

    def run(self, adapter: Adapter) -> BehaviourOutcome:
        """Test it on new objects."""
        random.seed(0)
        torch.manual_seed(0)
        begun = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                figure = self.check(adapter) or ""
            status = PASS
        except NotOfferedError as error:
            status, figure = ABSENT, _first_line(error)
        except Fault as error:
            status, figure = FAIL, _first_line(error)
        except Exception as error:
            status, figure = FAIL, f"{type(error).__name__}: {_first_line(error)}".rstrip(": ")
            if _is_mine(error):
                raise
        return BehaviourOutcome(self.name, status, figure, round(time.perf_counter() - begun, 3))


@dataclass(frozen=True)
class BehaviourOutcome:
    """One cell of the table."""

    behaviour: str
    status: str
    figure: str
    seconds: float = 0.0


@overload
def behaviour(check: Check, /) -> Behaviour: ...


@overload
def behaviour(*, ranks: int = 1, limit_s: float = 60.0) -> Callable[[Check], Behaviour]: ...


def behaviour(check: Check | None = None, /, *, ranks: int = 1, limit_s: float = 60.0) -> Any:
    """Make a Behaviour from a function: its name, and the two paragraphs of its docstring as `demand` and `why`."""

    def make(check: Check) -> Behaviour:
        demand, _, why = (check.__doc__ or "").strip().partition("\n\n")
        name = check.__name__.replace("_", " ")
        theme = check.__module__.rpartition(".")[2]
        return Behaviour(name, theme, " ".join(demand.split()), " ".join(why.split()), check, ranks, limit_s)

    return make if check is None else make(check)


def at_most(value: Any, limit: float, what: str) -> str:
    """Return the figure as text if it is at most the limit; else raise Fault."""
    value = float(value)
    text = f"{what} {value:.2g}"
    # `not <=` catches nan.
    if not value <= limit:
        raise Fault(f"{text} (at most {limit:g})")
    return text


def demand(holds: Any, fault: str) -> None:
    """Raise Fault unless it holds."""
    if not holds:
        raise Fault(fault)


def within(value: Any, target: float, share: float, what: str) -> str:
    """Return the figure as text if its relative difference to the target is at most `share`; else raise Fault."""
    value = float(value)
    if not math.isfinite(value) or abs(value - target) > share * abs(target):
        raise Fault(f"{what} {value:.3g}, not {target:.3g}")
    return f"{what} {value:.3g}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else ""


def _is_mine(error: BaseException) -> bool:
    """Whether the error is a programming error in a behaviour itself, not in code that it called."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, (NameError, UnboundLocalError)) and "conformance" in frames[-1].filename
