"""Every behaviour of two processes on flatmin, as `python -m conformance flatmin` runs them."""

import pytest

from conformance import adapters
from conformance.behaviours import ALL, BY_NAME
from conformance.verdict import PASS

# What a user can see of it; the other tests of this folder look closer.
pytestmark = [pytest.mark.dist, pytest.mark.slow]


def run_on_rank(rank, world, name):
    return BY_NAME[name].run(adapters.load("flatmin"))


@pytest.mark.parametrize("behaviour", [b for b in ALL if b.ranks == 2], ids=lambda b: b.name.replace(" ", "-"))
def test_behaviour(ranks, behaviour):
    for outcome in ranks.run(run_on_rank, behaviour.name):
        assert outcome.status == PASS, outcome.figure
