"""Climbing to w + eps and coming back, without the passes between: where an implementation spends its own time."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks import peers
from benchmarks.loops import Setting, ours
from benchmarks.nets import NETS
from benchmarks.results import BenchmarkResult, Spread, Table
from benchmarks.timing import seconds

HELP = "time of the perturbation and of the way back alone"
DEFAULT_NETS = ("mlp200", "vit-d192", "resnet18-w64")
# Words a parameter must at least cross the memory: read for the norm 1, save and add 4, restore 2.
WORDS = 7


def _sample(
    optimizer: Any, leave: Any, grads: list[torch.Tensor], places: list[torch.Tensor] | None, device: str
) -> tuple[float, float]:
    """(seconds to climb, seconds to come back) with copies of the gradients, in these places or (None) new ones."""
    weights = [w for group in optimizer.base.param_groups for w in group["params"]]
    for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
        w.grad = g.clone() if places is None else places[i].copy_(g)
    return seconds(optimizer.first_step, device, 1, warm=False), seconds(leave, device, 1, warm=False)


def measure(nets: list[str], rounds: int, device: str) -> BenchmarkResult:
    """Sample ours and the loop over tensors in turn."""
    result = BenchmarkResult("perturb", settings={"device": device, "rounds": str(rounds)})
    for name in nets:
        setting = Setting(NETS[name], device=device, batch=2)
        loop, flat = ours(setting, "sam"), ours(setting, "sam", flat=True)
        weights = [w for g in loop.optimizer.param_groups for w in g["params"]]
        plain = peers.PlainLoop(setting.net.make(device, 2)[0].parameters())
        plain.base.param_groups[0]["lr"] = 0.0
        grads = [torch.randn_like(w) * 1e-3 for w in weights]

        def back(of: peers.PlainLoop = plain) -> None:
            for p, data in of.saved.items():
                p.data = data
            of.saved.clear()

        for _ in range(3):
            flat.step()
        buffer = [w.grad for g in flat.optimizer.base.param_groups for w in g["params"]]
        runs = {
            "flatmin sam": (loop.optimizer, loop.optimizer.abort, None),
            "flatmin sam, flat=True": (flat.optimizer, flat.optimizer.abort, None),
            "flatmin sam, flat=True, gradients in its buffer": (flat.optimizer, flat.optimizer.abort, buffer),
            "plain per-tensor loop": (plain, back, None),
        }
        samples: dict[str, list[tuple[float, float]]] = {label: [] for label in runs}
        for i in range(rounds + 3):
            for label, (optimizer, leave, places) in runs.items():
                one = _sample(optimizer, leave, grads, places, device)
                if i >= 3:
                    samples[label].append(one)
        bytes_ = WORDS * sum(w.nbytes for w in weights)
        title = f"{name}: {len(weights)} tensors, {sum(w.numel() for w in weights) / 1e6:.2f} M parameters"
        table = Table(title, ("", "climb us", "back us", "both, median [IQR] us", "us/tensor", "GB/s of 7 words"))
        for label, rows in samples.items():
            climb, home = (Spread.of([r[i] for r in rows]).median * 1e6 for i in (0, 1))
            both = Spread.of([sum(r) for r in rows])
            spread = f"{both.median * 1e6:.0f} [{both.q25 * 1e6:.0f}-{both.q75 * 1e6:.0f}]"
            per = f"{both.median * 1e6 / len(weights):.1f}"
            table.rows.append((label, f"{climb:.0f}", f"{home:.0f}", spread, per, f"{bytes_ / both.median / 1e9:.1f}"))
        result.tables.append(table)
        result.raw[name] = samples
    result.notes.append(
        "Back of the plain loop swaps pointers: free, but the addresses of the weights change in every step. In "
        "step(closure) with flat=True, the passes of networks with small weights add their gradients to the buffer."
    )
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--nets", nargs="+", default=list(DEFAULT_NETS), choices=list(NETS), metavar="NET")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")


def run(options: argparse.Namespace) -> BenchmarkResult:
    """The benchmark as asked for on the command line."""
    return measure(options.nets, options.rounds, options.device)
