"""What a user would bring: three clouds of points and small nets, as `tests.user_side:...`."""

import multiprocessing
import os
import time

import torch
from torch import nn


def data():
    g = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(3, 6, generator=g)
    parts = []
    for n in (50, 20, 30):
        y = torch.arange(n) % 3
        parts.append((centres[y] + torch.randn(n, 6, generator=g), y))
    return tuple(parts)


def net():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def dropping():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


class Slow(nn.Linear):
    def forward(self, x):
        time.sleep(0.02)
        return super().forward(x)


def slow():
    return Slow(6, 3)


class Paced(nn.Linear):
    """Takes the seconds that FLATMIN_TEST_PACE says, so that a kill finds something to interrupt."""

    def forward(self, x):
        time.sleep(float(os.environ.get("FLATMIN_TEST_PACE", "0")))
        return super().forward(x)


def paced():
    return nn.Sequential(Paced(6, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


class Diary(nn.Linear):
    """Adds a line to FLATMIN_TEST_DIARY for every update; the process ends at lines FLATMIN_TEST_ENDS, once each."""

    def forward(self, x):
        if self.training:
            with open(os.environ["FLATMIN_TEST_DIARY"], "a+") as diary:
                diary.write(f"{os.getpid()}\n")
                diary.seek(0)
                count = len(diary.readlines())
            if str(count) in os.environ["FLATMIN_TEST_ENDS"].split():
                os._exit(9)
        return super().forward(x)


def diary():
    return Diary(6, 3)


class Deadly(nn.Linear):
    """Ends a worker process as a lack of memory would; harmless in the process that pytest runs in."""

    def forward(self, x):
        if os.environ.get("FLATMIN_TEST_PARENT") != str(os.getpid()):
            os._exit(9)
        return super().forward(x)


def stillborn(connection, function):
    """A worker that ends before it has said a word."""


def deadly():
    return Deadly(6, 3)


def reading(*arguments, **keywords):
    """Data read by a process of its own, as images in files are."""
    child = multiprocessing.get_context("fork").Process(target=int)
    child.start()
    child.join()
    return data(*arguments, **keywords)
