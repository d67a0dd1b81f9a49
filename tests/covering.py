"""Products of parameters of which the ordinary tests take a part."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def pairs(names: str, *axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize with a product, of which what is beyond a cover of all pairs of values is slow.

    All axes but the last are crossed in full; the last goes round with them, and is shorter than one of the others.

    Args:
        names: of the parameters, as for `pytest.mark.parametrize`.
        axes: the values of each.
    """
    sizes = sorted(len(axis) for axis in axes[:-1])
    assert len(axes) > 2 and sizes[-2] >= len(axes[-1]), "too few values for all pairs"
    rows = []
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        ordinary = (sum(places[:-1]) - places[-1]) % len(axes[-1]) == 0
        values = [axis[place] for axis, place in zip(axes, places, strict=True)]
        rows.append(pytest.param(*values, marks=() if ordinary else pytest.mark.slow))
    return pytest.mark.parametrize(names, rows)
