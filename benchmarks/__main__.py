"""`python -m benchmarks NAME`: run a benchmark, print it, keep it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import (
    adapters,
    calls,
    compiled,
    cost,
    counts,
    curvature,
    equiv,
    gpu,
    kernels,
    perturb,
    radius,
    step,
    train,
)
from benchmarks.results import RESULTS, BenchmarkResult, append_json, environment, write_page

BENCHMARKS = {
    "counts": counts,
    "calls": calls,
    "equiv": equiv,
    "perturb": perturb,
    "step": step,
    "cost": cost,
    "compiled": compiled,
    "curvature": curvature,
    "train": train,
    "adapters": adapters,
    "radius": radius,
    "kernels": kernels,
}
DATED = Path()
CPU_PAGE = ("counts", "calls", "equiv", "perturb", "step")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 if done, 1 if a gate failed under --gate, 2 if the machine cannot run it.
    """
    options = _parser().parse_args(arguments)
    if options.benchmark == "gpu":
        return gpu.run(options)
    needs_gpu = options.benchmark == "kernels" or getattr(options, "device", "cpu") == "cuda"
    if needs_gpu and not torch.cuda.is_available():
        print("This machine has no CUDA device.", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    # Training of the toy networks drives some values to denormals, which cost many times more on a CPU.
    torch.set_flush_denormal(True)
    env = environment()
    print(", ".join(f"{k} {v}" for k, v in env.items() if v is not None))
    results: list[BenchmarkResult] = []
    for name in CPU_PAGE if options.benchmark == "all" else (options.benchmark,):
        chosen = _parser().parse_args([name]) if options.benchmark == "all" else options
        results.append(BENCHMARKS[name].run(chosen))
        print("\n" + results[-1].text(), flush=True)
        if options.json:
            append_json(options.json, results[-1], env)
    if options.page is not None:
        dated = RESULTS / f"{env['date'][:10]}-{'gpu' if 'gpu' in env else 'cpu'}.md"
        page = dated if options.page == DATED else options.page
        write_page(page, results, env, f"python -m benchmarks {options.benchmark} --page")
    failed = [g.name for r in results for g in r.gates if not g.passed]
    if failed:
        print("\nfailed: " + "; ".join(failed), file=sys.stderr)
    return int(options.gate and bool(failed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What flatmin costs.")
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="NAME")
    for name, module in BENCHMARKS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(command)
        _common(command)
    _common(commands.add_parser("all", help="everything that needs no GPU, with its defaults: about three minutes"))
    gpu.add_arguments(commands.add_parser("gpu", help=gpu.HELP, description=gpu.__doc__))
    return parser


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gate", action="store_true", help="exit with 1 if a limit is exceeded")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the run to FILE as one JSON line")
    parser.add_argument(
        "--page", nargs="?", type=Path, const=DATED, metavar="FILE", help="write a page; default results/DATE-cpu.md"
    )


if __name__ == "__main__":
    sys.exit(main())
