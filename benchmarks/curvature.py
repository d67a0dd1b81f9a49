"""What curvature costs, at an error that is verified: eigenvalues, trace and density of a ResNet-8 on real digits.

Peers run beside ours where they are installed (PyHessian, hessian-eigenthings, curvlinops with scipy); the reference is
a run in float64 to a residual of 1e-6. Times are CPU seconds of one thread, medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import curvature_peers as peers
from benchmarks.nets import ResNet8
from benchmarks.results import BenchmarkResult, Gate, Table
from flatmin.measure.curvature import Hessian
from flatmin.measure.krylov import spectrum
from flatmin.measure.problem import Problem
from flatmin.measure.trace import density, trace

HELP = "products and time of eigenvalues, trace and density, against peers"
EXAMPLES, BATCH = 517, 256  # an uneven last batch, on purpose
GOOD = 1e-3  # relative error that counts as the same answer


@dataclass
class Case:
    """A trained net and its data."""

    model: nn.Module
    x: Tensor
    y: Tensor
    batches: list[tuple[Tensor, Tensor]]

    def problem(self, dtype: torch.dtype | None = None) -> Problem:
        """The mean cross-entropy of the examples."""
        return Problem(self.model, nn.CrossEntropyLoss(), self.batches, dtype=dtype)


def trained(epochs: int) -> Case:
    """ResNet-8 after some epochs on the digits, which scikit-learn carries with it."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    torch.manual_seed(0)
    model = ResNet8()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(base, epochs)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(64):
            base.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            base.step()
        schedule.step()
    x, y = x[:EXAMPLES], y[:EXAMPLES]
    return Case(model.eval(), x, y, list(zip(x.split(BATCH), y.split(BATCH), strict=True)))


Run = Callable[[int], tuple[Any, int]]  # seed -> (what was found, products)


def ours(case: Case) -> dict[str, dict[str, Run]]:
    """The questions, and how this library answers them."""

    def top(k: int, memory: int | None) -> Run:
        def run(seed: int) -> tuple[Any, int]:
            estimate = spectrum(Hessian(case.problem(), memory=memory), top=k, seed=seed)
            return estimate.top.tolist(), estimate.products

        return run

    def tr(seed: int) -> tuple[Any, int]:
        operator = Hessian(case.problem())
        krylov = spectrum(operator, top=5, bottom=1, min_steps=30, seed=seed)
        return [trace(operator, krylov, seed=seed).value], operator.products

    def plain(seed: int) -> tuple[Any, int]:
        """Probes without a basis: too many to run, so their number is told from the spread of 60."""
        estimate = trace(Hessian(case.problem()), seed=seed, max_probes=60)
        return [estimate.value], round(60 * (estimate.error / (0.01 * estimate.value)) ** 2)

    def report(runs: int) -> Run:
        def run(seed: int) -> tuple[Any, int]:
            operator = Hessian(case.problem())
            krylov = spectrum(operator, top=5, bottom=1, min_steps=30, seed=seed)
            trace(operator, krylov, seed=seed)
            density(operator, krylov, runs=runs, steps=100, seed=seed)
            return [*krylov.top.tolist(), *krylov.bottom.tolist()], operator.products

        return run

    return {
        "top-1": {"flatmin": top(1, None), "flatmin, recomputed": top(1, 0)},
        "top-5": {"flatmin": top(5, None), "flatmin, recomputed": top(5, 0)},
        "trace to 1 %": {"flatmin": tr, "flatmin, no basis (extrapolated)": plain},
        "report: top-5, lambda_min, trace to 1 %, density": {
            "flatmin": report(0),
            "flatmin, density 4 x 100": report(4),
        },
    }


def _clock(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.thread_time()
    returned = run()
    return time.thread_time() - start, returned


def _in_gradientss(case: Case, rounds: int) -> Table:
    """A product in gradients, for each form."""
    problem = case.problem()
    vector = torch.randn(problem.size, generator=torch.Generator().manual_seed(0))
    forms = {
        "graph kept": Hessian(problem, form="reverse"),
        "recomputed": Hessian(problem, form="reverse", memory=0),
        "forward over reverse": Hessian(problem, form="forward"),
    }
    samples: dict[str, list[float]] = {"gradient": [], **{name: [] for name in forms}}
    for operator in forms.values():
        operator.matvec(vector)
    for _ in range(rounds * 3):
        samples["gradient"].append(_clock(problem.gradient)[0])
        for name, operator in forms.items():
            samples[name].append(_clock(lambda o=operator: o.matvec(vector))[0])
    base = median(samples["gradient"])
    rows = [(n, f"{median(v) * 1e3:.1f}", f"{median(v) / base:.2f}") for n, v in samples.items()]
    return Table("One product with the Hessian", ("form", "ms", "gradients"), rows)


def measure(rounds: int, epochs: int, about: str = "") -> BenchmarkResult:
    """Run every question that begins so in turn, all who answer it interleaved."""
    case = trained(epochs)
    settings = {"rounds": str(rounds), "examples": str(EXAMPLES), "net": "ResNet-8", "about": about or "everything"}
    result = BenchmarkResult("curvature", settings=settings)
    cost = _in_gradientss(case, rounds)
    result.tables.append(cost)
    in_gradients = float(cost.rows[1][2])
    result.gates.append(
        Gate("a product with the graph kept, in gradients", f"{in_gradients:.2f}", "<= 2.3", in_gradients <= 2.3)
    )
    exact = spectrum(Hessian(case.problem(torch.float64)), top=5, bottom=1, tol=1e-6)
    want = [*exact.top.tolist(), *exact.bottom.tolist()]
    own, others = ours(case), peers.available(case)
    for question, runs in own.items():
        if not question.startswith(about):
            continue
        runs = {**runs, **others.get(question, {})}
        seconds: dict[str, list[float]] = {n: [] for n in runs}
        products: dict[str, list[int]] = {n: [] for n in runs}
        errors: dict[str, list[float]] = {n: [] for n in runs}
        for seed in range(rounds):
            for name, run in runs.items():
                taken, (values, spent) = _clock(lambda r=run, s=seed: r(s))
                seconds[name].append(taken)
                products[name].append(spent)
                errors[name].append(_error(question, values, want))
        base = median(seconds["flatmin"])
        rows = []
        for name in runs:
            off = max(errors[name])
            shown = "-" if math.isnan(off) else f"{off:.0e}{'' if off <= GOOD else ' (misses 1e-3)'}"
            extrapolated = "extrapolated" in name
            time_ = median(seconds[name]) * (median(products[name]) / 60 if extrapolated else 1.0)
            rows.append((name, f"{median(products[name]):.0f}", f"{time_:.2f}", f"{time_ / base:.2f}", shown))
        result.tables.append(Table(question, ("", "products", "CPU s", "x flatmin", "largest relative error"), rows))
        result.raw[question] = {"seconds": seconds, "products": products, "errors": errors}
        result.gates += _gates(question, seconds, products, errors)
    if missing := peers.missing():
        result.notes.append(f"Not installed: {', '.join(missing)}.")
    result.notes.append(
        "Products of the trace and the report include those of the Krylov run. PyHessian and hessian-eigenthings get "
        "all examples as one batch, the others batches of 256. The peers' steps are tuned by hand to the least that "
        "meets 1e-3, where the row says so; ours stop by themselves. The density of the report is that of one start "
        "vector: ours of the Krylov run that found the eigenvalues, the cheapest peer's of 30 steps of its own."
    )
    return result


def _error(question: str, values: list[float], want: list[float]) -> float:
    if question.startswith("trace"):
        return math.nan  # its error is stated by the estimate itself
    wanted = want if question.startswith("report") else want[: len(values)]
    return max(abs(f - w) / abs(w) for f, w in zip(values, wanted, strict=False))


LIMITS = {"top-1": 9, "top-5": 18}
FASTER = {
    "top-5": {"PyHessian": 2.5, "hessian-eigenthings": 1.3, "curvlinops": 2.0},
    "report: top-5, lambda_min, trace to 1 %, density": {"cheapest": 4.0},
}


def _gates(
    question: str,
    seconds: dict[str, list[float]],
    products: dict[str, list[int]],
    errors: dict[str, list[float]],
) -> list[Gate]:
    gates = []
    if question in LIMITS:
        most = max(products["flatmin"])
        gates.append(Gate(f"{question}: products", str(most), f"<= {LIMITS[question]}", most <= LIMITS[question]))
        off = max(errors["flatmin"])
        gates.append(Gate(f"{question}: relative error", f"{off:.0e}", f"<= {GOOD:g}", off <= GOOD))
    if question.startswith("trace"):
        ratio = median(products["flatmin, no basis (extrapolated)"]) / median(products["flatmin"])
        gates.append(Gate("trace: products of plain probes over ours", f"{ratio:.1f}", ">= 8", ratio >= 8))
    base = median(seconds["flatmin"])
    for who, limit in FASTER.get(question, {}).items():
        rows = [n for n in seconds if n.startswith(who)]
        # The cheapest way that gives the same answer, else the cheapest.
        good = [n for n in rows if max(errors[n]) <= GOOD] or rows
        if good:
            ratio = min(median(seconds[n]) for n in good) / base
            gates.append(Gate(f"{question}: {who} over ours", f"{ratio:.2f}", f">= {limit}", ratio >= limit))
    return gates


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds, each with its own seed (default 3)")
    parser.add_argument("--epochs", type=int, default=15, help="epochs of the net's training (default 15)")
    parser.add_argument(
        "--about", default="", choices=("", "top-1", "top-5", "trace", "report"), help="one question only"
    )


def run(options: argparse.Namespace) -> BenchmarkResult:
    """Measure what was asked for."""
    return measure(options.rounds, options.epochs, options.about)
