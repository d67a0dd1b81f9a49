"""Clocks: CPU time of one thread, or CUDA events."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def seconds(run: Callable[[], object], device: str, repeats: int, *, warm: bool = True) -> float:
    """Seconds of one `run`.

    On the CPU: thread CPU time, the fastest of `repeats` (other programs can only add to it). On a GPU: the mean over
    `repeats` between two CUDA events, which includes the time in which the device waits for launches. If `warm`, one
    more run goes before them, so that what ran last has no say in what the caches hold.
    """
    if warm:
        run()
    if device == "cpu":
        return min(_thread_seconds(run) for _ in range(repeats))
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def _thread_seconds(run: Callable[[], object]) -> float:
    start = time.thread_time()
    run()
    return time.thread_time() - start
