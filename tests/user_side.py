"""What a user would bring: three clouds of points and small nets, as `tests.user_side:...`."""

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


class Deadly(nn.Linear):
    """Ends a worker process as a lack of memory would; harmless in the process that pytest runs in."""

    def forward(self, x):
        if os.environ.get("FLATMIN_TEST_PARENT") != str(os.getpid()):
            os._exit(9)
        return super().forward(x)


def stillborn(connection, out):
    """A worker that ends before it has said a word."""


def deadly():
    return Deadly(6, 3)
