"""The pool that distributed tests run in: values, failures, hangs, and that nothing is left behind."""

import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.dist.pool import RankError

# The pool is a tool of the tests, and each failure makes it start anew.
pytestmark = [pytest.mark.dist, pytest.mark.slow]


def total(rank, world, shares):
    x = torch.tensor([shares[rank]])
    dist.all_reduce(x)
    return {"rank": rank, "world": world, "total": x, "backend": dist.get_backend(), "threads": torch.get_num_threads()}


def draw(rank, world):
    return torch.rand(3)


def fail_on(rank, world, bad):
    if rank == bad:
        raise KeyError(f"planned on {rank}")
    dist.barrier()


def wait_for_ever(rank, world):
    if rank == 1:
        time.sleep(600)
    dist.barrier()


def die(rank, world):
    if rank == 0:
        os._exit(7)
    dist.barrier()


def lose_step(rank, world):
    if rank == 0:
        dist.all_reduce(torch.ones(1), async_op=True)


def warn(rank, world):
    warnings.warn("own", UserWarning, stacklevel=1)


def train_ddp(rank, world):
    torch.manual_seed(3)
    model = DistributedDataParallel(torch.nn.Linear(2, 1))
    model(torch.full((1, 2), float(rank))).sum().backward()
    return model.module.weight.grad


def nap(rank, world):
    time.sleep(600)


def alive(pid):
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat").read_text() if sys.platform == "linux" else ") R"
    except (ProcessLookupError, FileNotFoundError):
        return False
    # A container may have nobody who takes note of an orphan's end.
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_every_rank_computes_and_answers_in_order(ranks):
    answers = ranks.run(total, [1.5, 2.0])
    assert [a["rank"] for a in answers] == [0, 1]
    for a in answers:
        assert a["world"] == 2 and a["backend"] == "gloo" and a["threads"] == 1
        assert torch.equal(a["total"], torch.tensor([3.5]))


def test_the_processes_are_kept_and_every_call_starts_from_the_same_seed(ranks):
    first = ranks.run(draw)
    pids = ranks.pids
    again = ranks.run(draw)
    assert ranks.pids == pids and os.getpid() not in pids
    assert torch.equal(first[0], first[1]) and torch.equal(first[0], again[0])


def test_ddp_runs_call_after_call(ranks):
    for _ in range(2):
        for grad in ranks.run(train_ddp):
            assert torch.equal(grad, torch.full((1, 2), 0.5))


def test_an_exception_on_one_rank_is_raised_with_its_traceback(ranks):
    ranks.run(draw)
    pids = ranks.pids
    with pytest.raises(RankError, match=r"(?s)fail_on, rank 1: \nTraceback.*in fail_on.*planned on 1"):
        ranks.run(fail_on, 1)
    assert ranks.pids == [] and not any(map(alive, pids))
    assert torch.equal(ranks.run(total, [1, 2])[1]["total"], torch.tensor([3]))


def test_a_hang_kills_the_pool_and_the_next_call_starts_another(ranks):
    ranks.run(draw)
    pids = ranks.pids
    with pytest.raises(RankError, match=r"wait_for_ever: rank 0, rank 1 did not end within 0\.3 s; the pool was kill"):
        ranks.run(wait_for_ever, timeout=0.3)
    assert not any(map(alive, pids))
    assert torch.equal(ranks.run(total, [1, 2])[0]["total"], torch.tensor([3]))
    assert not set(ranks.pids) & set(pids)


def test_a_rank_that_dies_is_reported_and_replaced(ranks):
    with pytest.raises(RankError, match=r"die, rank 0: died with exit code 7"):
        ranks.run(die)
    assert ranks.pids == []
    assert torch.equal(ranks.run(total, [1, 2])[0]["total"], torch.tensor([3]))


def test_ranks_that_lose_step_fail_the_call_that_did_it(ranks):
    ranks.run(draw)
    with pytest.raises(RankError, match=r"lose_step"):
        ranks.run(lose_step, timeout=0.5)


def test_warnings_of_a_scenario_are_errors(ranks):
    with pytest.raises(RankError, match="UserWarning: own"):
        ranks.run(warn)


@pytest.mark.slow
def test_there_are_larger_pools(ranks_of):
    assert [float(a["total"]) for a in ranks_of(4).run(total, [1.0, 2.0, 3.0, 4.0])] == [10.0] * 4
    assert ranks_of(4) is ranks_of(4)


def test_only_functions_that_can_be_found_by_name_are_taken(ranks):
    def local(rank, world):
        pass

    for function in (local, lambda rank, world: None, os.getpid):
        with pytest.raises(TypeError, match="functions of a module"):
            ranks.run(function)


def test_no_process_outlives_tests_that_are_killed():
    """Also not a rank that hangs, which sees nothing of its closed pipe."""
    code = (
        "from tests.dist import pool, test_pool\n"
        "if __name__ == '__main__':\n"
        "    p = pool.Ranks(1)\n"
        "    p.run(test_pool.draw)\n"
        "    print(*p.pids, flush=True)\n"
        "    p.run(test_pool.nap)\n"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True) as tests:
        assert tests.stdout is not None
        pid = int(tests.stdout.readline())
        assert alive(pid)
        time.sleep(0.2)
        tests.kill()
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(pid)
