"""Which methods the ordinary tests of several processes run: one of each kind; the others are slow."""

from collections.abc import Iterable
from typing import Any

import pytest

KINDS = ("sam", "asam", "vasso", "rsam", "n-step", "gsam", "looksam", "bernoulli")


def slow(*values: Any) -> Any:
    """A row of parameters that only `make test-all` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


def chosen(methods: Iterable[str]) -> list[Any]:
    """These methods, of which those that are another of their kind are slow."""
    return [method if method in KINDS else slow(method) for method in methods]
