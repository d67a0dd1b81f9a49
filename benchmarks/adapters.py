"""Time and memory of training a transformer's low-rank adapters: plain, LoRA-SAM, Flat-LoRA, beside the whole net.

The adapters are modules of this file, so that nothing but torch is needed. Times are CPU time of one thread or CUDA
events, each sample beside one of the plain step; memory is the most that tensors take at once during a step, weights
and optimizer state included.
"""

from __future__ import annotations

import argparse
import contextlib
import random
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flatmin
from benchmarks.launches import Recorder
from benchmarks.nets import NETS
from benchmarks.results import BenchmarkResult, Table
from benchmarks.timing import seconds
from flatmin.optim import FlatLoRA

HELP = "adapters of a transformer: time and memory of LoRA-SAM and Flat-LoRA beside plain fine-tuning; 2 min"
PLAIN = "adapters, plain"
# label -> (adapters only, method, Flat-LoRA)
STEPS = {
    PLAIN: (True, "base", False),
    "adapters, SAM (LoRA-SAM)": (True, "sam", False),
    "adapters, Flat-LoRA": (True, "base", True),
    "adapters, both": (True, "sam", True),
    "whole net, plain": (False, "base", False),
    "whole net, SAM": (False, "sam", False),
}


class Adapted(nn.Module):
    """A linear layer with a frozen weight and a low-rank adapter: y = W x + b + B A x."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens to tokens."""
        return self.layer(x) + F.linear(F.linear(x, self.a), self.b)

    def lora_weight(self) -> tuple[Tensor, Tensor]:
        """W and B A."""
        return self.layer.weight, self.b @ self.a


def with_adapters(model: nn.Module, rank: int) -> nn.Module:
    """The model, frozen, with an adapter at every linear layer of its blocks."""
    model.requires_grad_(False)
    for block in model.blocks.children():
        for name, layer in list(block.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(block, name, Adapted(layer, rank))
    return model


class Peak(Recorder):
    """Follows the most bytes that tensors take at once."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.most = max(self.most, self.live_bytes())
        return out


def make(label: str, net: str, device: str, batch: int | None, rank: int) -> tuple[nn.Module, Callable[[], object]]:
    """The model and its step."""
    alone, method, noisy = STEPS[label]
    model, x, y = NETS[net].make(device, batch)
    model = with_adapters(model, rank).to(device) if alone else model
    base = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    optimizer = base if method == "base" else flatmin.wrap(base, method, rho=0.05, model=model)
    flat = FlatLoRA(model, total=0) if noisy else contextlib.nullcontext()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    def step() -> None:
        with flat:
            optimizer.step(closure)

    return model, step


def peak(label: str, options: argparse.Namespace) -> int:
    """The most bytes that tensors take at once in a step, after one that has made all state."""
    rest = options.net, options.device, options.batch, options.rank
    if options.device == "cuda":
        _, step = make(label, *rest)
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    with Peak() as recorder:
        _, step = make(label, *rest)
        step()
        recorder.most = 0
        step()
    return recorder.most


def measure(options: argparse.Namespace) -> BenchmarkResult:
    """All steps in turns, each beside the plain one."""
    rest = options.net, options.device, options.batch, options.rank
    made = {label: make(label, *rest) for label in STEPS}
    samples: dict[str, list[float]] = {label: [] for label in STEPS}
    plain: list[float] = []
    draws = random.Random(0)
    for _ in range(options.rounds):
        for label in draws.sample(list(STEPS), len(STEPS)):
            beside = seconds(made[PLAIN][1], options.device, 2)
            samples[label].append(seconds(made[label][1], options.device, 2) / beside)
            plain.append(beside)
    most = {label: peak(label, options) for label in STEPS}
    net = made["whole net, plain"][0]
    trained = {label: sum(p.nbytes for p in m.parameters() if p.requires_grad) for label, (m, _) in made.items()}
    table = Table(
        f"{options.net}, {sum(p.numel() for p in net.parameters())} weights, rank {options.rank}, AdamW",
        ("step", "trained weights", "time / plain", "quartiles", "peak MB", "above the plain step MB"),
    )
    for label, ratios in samples.items():
        low, _, high = quantiles(ratios, n=4)
        reference = PLAIN if STEPS[label][0] else "whole net, plain"
        table.rows.append(
            (
                label,
                str(trained[label] // 4),
                f"{median(ratios):.2f}",
                f"{low:.2f}-{high:.2f}",
                f"{most[label] / 1e6:.2f}",
                f"{(most[label] - most[reference]) / 1e6:+.2f}",
            )
        )
    result = BenchmarkResult("adapters", [table])
    matrices = sum(m.layer.weight.nbytes for m in made[PLAIN][0].modules() if isinstance(m, Adapted))
    result.settings = {k: getattr(options, k) for k in ("net", "device", "batch", "rank", "rounds")}
    result.notes = [
        f"The plain step of the adapters takes {1e3 * median(plain):.1f} ms.",
        f"One copy of the adapters is {trained[PLAIN] / 1e6:.2f} MB, one of the frozen matrices beneath them "
        f"{matrices / 1e6:.2f} MB, one of the whole net {trained['whole net, plain'] / 1e6:.2f} MB.",
        f'"{PLAIN}" beside itself is the control.',
    ]
    result.raw = {"ratios": samples, "peak_bytes": most}
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--net", default="vit-d192", choices=[name for name in NETS if name.startswith("vit")])
    parser.add_argument("--rank", type=int, default=8, help="of the adapters; default 8")
    parser.add_argument("--batch", type=int, help="default: the net's own")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))


def run(options: argparse.Namespace) -> BenchmarkResult:
    """The benchmark as asked for on the command line."""
    return measure(options)
