"""What a network asks for and what the device can do: operations of a gradient, and the rate of a large product."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import seconds

SIZES = {"cuda": 8192, "cpu": 1024}
PRECISIONS = {"cuda": ("float32", "tf32", "bf16"), "cpu": ("float32", "bf16")}


def operations(model: nn.Module, image: Tensor) -> float:
    """Floating-point operations of one gradient, per image: forward and backward, a multiplication with an addition 2.

    Matrix products and convolutions only, which is what `rate` compares with.
    """
    counter = FlopCounterMode(display=False)
    with counter:
        model(image).sum().backward()
    model.zero_grad()
    return counter.get_total_flops() / len(image)


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Matrix products of float32 in TF32, or not, inside."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def rate(precision: str, device: str) -> float:
    """Operations per second of the product of two large square matrices of random numbers."""
    size, kind = SIZES[device], torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
    with tf32(precision == "tf32"):
        for _ in range(3):
            a @ b
        return 2 * size**3 / seconds(lambda: a @ b, device, 10)
