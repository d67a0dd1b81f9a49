"""Launches and synchronisations of a step as a CUDA device saw them, beside what the model of `counts` says."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.counts import MODES, count
from benchmarks.loops import Loop, Setting, floor, ours
from benchmarks.nets import NETS
from benchmarks.results import BenchmarkResult, Table

HELP = "measured launches and synchronisations (needs a CUDA device)"
DEFAULT_NETS = ("mlp200", "vit-d192", "resnet18-w64")
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchCooperativeKernel")


def observe(make: Callable[[], Loop]) -> dict[str, int]:
    """Launch calls, kernels, memory operations, synchronisations and peak bytes of one step after three others."""
    loop = make()
    for _ in range(3):
        loop.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            loop.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        loop.step()
        torch.cuda.synchronize()
    events = profiler.events() or []
    on_device = [e.name for e in events if e.device_type == DeviceType.CUDA]
    memory = sum(name.startswith(("Memcpy", "Memset")) for name in on_device)
    return {
        "launch calls": sum(e.name.startswith(_LAUNCHES) for e in events if e.device_type == DeviceType.CPU),
        "kernels": len(on_device) - memory,
        "memory operations": memory,
        "syncs": sum("called a synchronizing" in str(w.message) for w in caught),
        "peak bytes": peak,
    }


def measure(nets: list[str]) -> BenchmarkResult:
    """The floor and SAM in its three modes."""
    result = BenchmarkResult("kernels", settings={"nets": ", ".join(nets)})
    headers = (
        "step",
        "launch calls",
        "above floor",
        "kernels",
        "memory operations",
        "syncs",
        "peak MiB",
        "modelled above floor",
    )
    for name in nets:
        table = Table(name, headers)
        for mode, (nonfinite, base, flat, _) in MODES.items():
            real = Setting(NETS[name], base, "cuda")
            model = Setting(NETS[name], base, "meta")
            modelled = count(lambda s=model, n=nonfinite, f=flat: ours(s, "sam", n, flat=f)).launches
            modelled -= count(lambda s=model: floor(s)).launches
            seen = {
                f"floor, {base} SGD": observe(lambda s=real: floor(s)),
                f"sam, {mode}": observe(lambda s=real, n=nonfinite, f=flat: ours(s, "sam", n, flat=f)),
            }
            reference = next(iter(seen.values()))["launch calls"]
            for label, counted in seen.items():
                table.rows.append(
                    (
                        label,
                        str(counted["launch calls"]),
                        f"{counted['launch calls'] - reference:+d}",
                        str(counted["kernels"]),
                        str(counted["memory operations"]),
                        str(counted["syncs"]),
                        f"{counted['peak bytes'] / 2**20:.1f}",
                        f"{modelled:+d}" if label.startswith("sam") else "+0",
                    )
                )
            result.raw[f"{name}, {mode}"] = seen
        result.tables.append(table)
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--nets", nargs="+", default=list(DEFAULT_NETS), choices=list(NETS), metavar="NET")


def run(options: argparse.Namespace) -> BenchmarkResult:
    """The benchmark as asked for on the command line."""
    return measure(options.nets)
