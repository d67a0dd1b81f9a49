"""What a network asks for, what the device can do, and where the time goes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
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


KINDS = {
    "convolutions": r".*convolution(_backward)?",
    "normalisation": r".*batch_norm(_backward|_stats)?",
    "ReLU": r"relu|threshold(_backward)?|clamp(_min)?",
    "matrix products": r"mm|bmm|addmm|baddbmm|matmul|linear",
    "sums and the optimizer": r"(_foreach_)?(add|mul|lerp|sum|div)",
    "copies and zeros": r"copy|fill|zero|zeros|clone|to|_to_copy",
}
"""Regular expressions of torch's operations, without their namespace and the trailing underscore."""


def shares(run: Callable[[], object]) -> dict[str, float]:
    """The share of each kind of operation in the CPU time of `run`; "others" includes Python and autograd's own."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        run()
    spent: Counter[str] = Counter()
    for event in record.key_averages():
        name = event.key.removeprefix("aten::").rstrip("_")
        kind = next((kind for kind, names in KINDS.items() if re.fullmatch(names, name)), "others")
        spent[kind] += event.self_cpu_time_total
    return {kind: time / spent.total() for kind, time in spent.most_common()}
