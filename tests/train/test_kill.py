"""Runs that are killed at random moments, and the command is given again: the same end, bit for bit."""

import itertools
import os
import random
import re
import signal
import time
from dataclasses import replace

import pytest

from tests.dist.pool import forkserver
from tests.helpers import same_bits
from tests.train.kills import PATIENCE, Command, Forked, Plan
from tests.train.runs import HERE, outcome, saved_steps

EVERY = 3  # updates between checkpoints
WORDS = (
    *(f"data={HERE}:images", f"model={HERE}:image_net", "method=vasso", "rho=0.05", "batch_size=16", "log_every=1"),
    *(f"checkpoint_steps={EVERY}", "noise=0.2", "test_every=1"),
)
PACE = 0.01


@pytest.fixture(scope="module")
def context():
    return forkserver()


def until(condition, launch):
    """Wait for something, or the end of the processes."""
    deadline = time.monotonic() + PATIENCE
    while not condition() and launch.alive:
        assert time.monotonic() < deadline
        time.sleep(0.002)


class Killer:
    """Starts a run again and again, and kills it."""

    def __init__(self, start, context, plan, kills, updates):
        self._start, self._context, self.plan = start, context, plan
        self._kills, self._updates, self._draw = kills, updates, random.Random(kills)

    def __call__(self):
        kinds = itertools.cycle(("update", "write", "start"))
        victims = itertools.cycle(([0, 1], [1], [0])) if self.plan.ranks > 1 else itertools.repeat([0])
        for number, kind, whom in zip(range(self._kills), kinds, victims, strict=False):
            begin = (saved_steps(self.plan.path) or [0])[0]
            launch = self._start(self._context, self.plan)
            try:
                self._wait(kind, launch, max(begin, int(self._updates * number / (self._kills + 1))))
                reached = self.plan.reached
                assert launch.alive, f"it ended before it was killed: {self.plan.said}"
            finally:
                launch.kill(whom)
            self._check(begin, reached)

    def _wait(self, kind, launch, update):
        """For the moment: somewhere after an update, in the write after it, or at any time since the start."""
        if kind == "start":
            time.sleep(self._draw.uniform(0, 0.3))
            return
        until(lambda: self.plan.reached > update, launch)
        if kind == "write":
            until(lambda: any((self.plan.path / "checkpoints").glob(".step.*")), launch)
        time.sleep(self._draw.uniform(0, 4 * PACE))

    def _check(self, begin, reached):
        """It continued from where the last one was, and nothing before the last checkpoint is lost."""
        assert "Traceback" not in self.plan.said or self.plan.ranks > 1, self.plan.said
        if (found := re.search(r"Continuing after update (\d+) of", self.plan.said)) is not None:
            assert int(found[1]) == begin
        assert (saved_steps(self.plan.path) or [0])[0] >= max(begin, EVERY * ((reached - 1) // EVERY))
        assert not (self.plan.path / "result.json").exists()


def check(start, context, folder, kills, epochs, ranks=1, words=()):
    """Kill a run so often, let it end, and compare it with another that was left alone."""
    updates = 4 * epochs
    alone = Plan(folder / "alone", (*WORDS, f"epochs={epochs}", *words), ranks)
    killed = replace(alone, folder=folder / "killed", pace=PACE)
    Killer(start, context, killed, kills, updates)()
    assert 0 < saved_steps(killed.path)[0] < updates
    for plan in (replace(killed, pace=0.0), alone):
        launch = start(context, plan)
        assert set(launch.wait()) == {0}, plan.said
    found, wanted = outcome(killed.path), outcome(alone.path)
    for part in wanted:
        assert same_bits(found[part], wanted[part]), part
    assert len(wanted["steps"]) == updates


def check_asked(start, context, folder, signal, epochs):
    """Ask a run to end, let it go on, and compare it with another that was left alone."""
    alone = Plan(folder / "alone", (*WORDS, f"epochs={epochs}"))
    asked = replace(alone, folder=folder / "asked", pace=PACE)
    launch = start(context, asked)
    until(lambda: asked.reached > 6, launch)
    os.kill(launch.pid, signal)
    assert launch.wait() == [130]
    sentence = rf"Interrupted after (\d+) of {4 * epochs} updates\. A checkpoint was saved; to continue"
    said = re.search(sentence, asked.said)
    assert said is not None and saved_steps(asked.path)[0] == int(said[1]) >= asked.reached
    for plan in (replace(asked, pace=0.0), alone):
        assert Forked(context, plan).wait() == [0]
    assert same_bits(outcome(asked.path), outcome(alone.path))


def test_a_run_that_is_asked_to_end_says_how_to_go_on(context, tmp_path):
    check_asked(Forked, context, tmp_path, signal.SIGTERM, epochs=8)


TWO = [["parallel=ddp", "ema=0.8"], ["parallel=fsdp"]]


def test_one_process_killed_three_times(context, tmp_path):
    check(Forked, context, tmp_path, kills=3, epochs=4, words=["ema=0.8"])


@pytest.mark.slow  # tests/dist has one
@pytest.mark.dist
@pytest.mark.parametrize("words", TWO, ids=["ddp", "fsdp"])
def test_two_processes_killed_three_times(context, tmp_path, words):
    check(Forked, context, tmp_path, kills=3, epochs=4, ranks=2, words=words)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", ["vasso", "rsam", "looksam", "sam-db"])
def test_one_process_killed_twenty_times(context, tmp_path, method):
    check(Forked, context, tmp_path, kills=20, epochs=16, words=[f"method={method}", "ema=0.8"])


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(900)
@pytest.mark.parametrize("words", TWO, ids=["ddp", "fsdp"])
def test_two_processes_killed_twenty_times(context, tmp_path, words):
    check(Forked, context, tmp_path, kills=20, epochs=16, ranks=2, words=words)


class TestTheCommandItself:
    """Interpreters and torchrun of their own, which take seconds to start."""

    @pytest.mark.slow
    @pytest.mark.timeout(900)
    @pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.dist)])
    def test_killed_three_times(self, tmp_path, ranks):
        check(Command, None, tmp_path, kills=3, epochs=100, ranks=ranks)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
    def test_asked_to_end_it_says_how_to_go_on(self, context, tmp_path, name):
        check_asked(Command, context, tmp_path, getattr(signal, name), epochs=25)
