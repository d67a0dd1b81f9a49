"""The pools of processes that all distributed tests share."""

from collections.abc import Callable, Iterator

import pytest

from tests.dist.pool import Ranks


@pytest.fixture(scope="session")
def ranks_of() -> Iterator[Callable[[int], Ranks]]:
    """`ranks_of(n)`: the pool of n processes; it starts with its first call."""
    pools: dict[int, Ranks] = {}
    yield lambda world: pools.setdefault(world, Ranks(world))
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def ranks(ranks_of: Callable[[int], Ranks]) -> Ranks:
    """The pool of two processes: `ranks.run(function, *args)` calls function(rank, world, *args) on both."""
    return ranks_of(2)
