"""Every behaviour of one process on flatmin, as `python -m conformance flatmin` runs them."""

import pytest

from conformance import adapters
from conformance.behaviours import ALL, BY_NAME
from conformance.verdict import PASS

# Those of two processes are in tests/dist.
ALONE = [b for b in ALL if b.ranks == 1]


@pytest.mark.parametrize("theme", dict.fromkeys(b.theme for b in ALONE))
def test_every_behaviour_of_a_theme(theme):
    flatmin = adapters.load("flatmin")
    outcomes = {b.name: b.run(flatmin) for b in ALONE if b.theme == theme}
    assert not {name: outcome.figure for name, outcome in outcomes.items() if outcome.status != PASS}


def test_every_behaviour_says_what_it_demands_and_why():
    assert len(BY_NAME) == len(ALL) and {b.ranks for b in ALL} == {1, 2}
    for b in ALL:
        assert b.demand.endswith(".") and b.why.endswith("."), b.name
        assert b.name == b.name.lower() and len(b.name) <= 32, b.name
