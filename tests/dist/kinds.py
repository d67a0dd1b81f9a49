"""Which methods the ordinary tests of several processes run: one of each kind; the others are slow."""

from collections.abc import Iterable
from typing import Any

import pytest

KINDS = ("sam", "asam", "usam", "vasso", "fsam", "rsam", "bisam-log", "n-step", "micro-sam", "momentum-sam", "stale-sam")
KINDS += ("gsam", "looksam", "sam-magnitude", "ae-sam", "bernoulli", "rho-lr", "esam")


def slow(*values: Any) -> Any:
    """A row of parameters that only `make test-all` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


def chosen(methods: Iterable[str]) -> list[Any]:
    """These methods, of which those that are another of their kind are slow."""
    return [method if method in KINDS else slow(method) for method in methods]
