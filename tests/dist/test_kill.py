"""A run of two processes that is killed again and again ends where one that is left alone ends, bit for bit."""

import itertools
import os
import random
import signal
import time
from dataclasses import replace

import pytest

from tests.dist.kill_run import WORLD, Plan, train
from tests.dist.pool import forkserver
from tests.helpers import same_bits

pytestmark = pytest.mark.dist
PATIENCE = 60.0  # seconds without news from a run
PACE = 0.008


class Launch:
    """The processes of one start; leaving the context kills what is left of them."""

    def __init__(self, context, plan, number, hold=None):
        self.processes, self.pipes = [], []
        for rank in range(WORLD):
            pipe, theirs = context.Pipe(duplex=False)
            arguments = (rank, plan, plan.folder / f"store-{number}", hold, theirs)
            process = context.Process(target=train, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(pipe)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def wait_for(self, *events, rank=0):
        """Read what a rank says up to one of these events."""
        while self.pipes[rank].poll(PATIENCE):
            said = self.pipes[rank].recv()
            if said in events or said[0] in events:
                return said
            assert said[0] != "failed", said[1]
        raise AssertionError(f"rank {rank} said nothing for {PATIENCE} s")

    def kill(self):
        """SIGKILL to all at once; returns how they ended."""
        for process in self.processes:
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()
        return [p.exitcode for p in self.processes]


@pytest.fixture(scope="module")
def context():
    return forkserver()


def finish(context, plan, number=0):
    """Run to the end; the last checkpoint, and the step from which this start continued."""
    with Launch(context, plan, number) as launch:
        start = launch.wait_for("start")[1]
        for rank in range(WORLD):
            launch.wait_for("end", rank=rank)
        for process in launch.processes:
            process.join(PATIENCE)
            assert process.exitcode == 0
    return plan.saved(), start


def moments(draw, kills, steps):
    """Random steps, one in each of as many parts of the run; every third kill comes in the middle of a write."""
    for k, kind in zip(range(kills), itertools.cycle(("any", "any", "write")), strict=False):
        yield int(steps * (k + draw.random()) / (kills + 1)), kind


def check_kills(context, folder, method, kills, steps):
    """Kill one training `kills` times and compare it with another that is left alone."""
    alone = Plan(method, folder / "alone", steps)
    killed = replace(alone, folder=folder / "killed", pace=PACE)
    for plan in (alone, killed):
        plan.folder.mkdir()
    draw = random.Random(kills)
    starts = []
    for number, (step, kind) in enumerate(moments(draw, kills, steps)):
        saved = killed.saved()
        begin = 0 if saved is None else saved["step"]
        step = max(step, begin) + 1
        # A run that got so far that the kill might miss it waits for it.
        with Launch(context, killed, number, hold=step if kind == "write" else step + 4) as launch:
            assert launch.wait_for("start") == ("start", begin)
            starts.append(begin)
            if kind == "write":
                launch.wait_for("held")
            else:
                launch.wait_for(("step", step))
                time.sleep(draw.uniform(0, 3 * PACE))
            assert launch.kill() == [-signal.SIGKILL] * WORLD
        assert kind != "write" or killed.half_written.exists()
        killed.half_written.unlink(missing_ok=True)
    assert starts == sorted(starts) and starts[-1] > 0
    end, start = finish(context, killed, kills)
    assert starts[-1] <= start < steps == end["step"]
    expected, start = finish(context, alone)
    assert start == 0
    assert same_bits(end, expected)


def test_a_run_killed_three_times_ends_as_one_left_alone(context, tmp_path):
    check_kills(context, tmp_path, "vasso", kills=3, steps=40)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vasso", "rsam", "looksam", "bisam-log"])
def test_a_run_killed_twenty_times_ends_as_one_left_alone(context, tmp_path, method):
    check_kills(context, tmp_path, method, kills=20, steps=130)
