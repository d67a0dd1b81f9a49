"""Do we compute the update that the papers write? Float64 steps against a reference of fifteen lines."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flatmin
from benchmarks import peers
from benchmarks.nets import LR, MOMENTUM
from benchmarks.peers import RHO
from benchmarks.results import BenchmarkResult, Gate, Table

HELP = "float64 steps against a reference written from the formula"
STEPS = (1, 5)
OURS, PEERS = 1e-10, 1e-6
RHOS = {"sam": RHO, "asam": 0.5}


def _problem() -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(288, 16), nn.Tanh(), nn.Linear(16, 10)
        )
        x, y = torch.randn(16, 3, 8, 8), torch.randint(10, (16,))
    return model.double(), x.double(), y


def reference(method: str, steps: int) -> list[Tensor]:
    """Weights after `steps` of SAM or ASAM (T = |w|) with momentum SGD, written from the formula."""
    model, x, y = _problem()
    w = [p.detach().clone() for p in model.parameters()]
    v = [torch.zeros_like(p) for p in w]
    names = [n for n, _ in model.named_parameters()]

    def gradient(at: Sequence[Tensor]) -> list[Tensor]:
        at = [p.clone().requires_grad_() for p in at]
        out = torch.func.functional_call(model, dict(zip(names, at, strict=True)), (x,))
        return list(torch.autograd.grad(F.cross_entropy(out, y), at))

    for _ in range(steps):
        g = gradient(w)
        t = [p.abs() if method == "asam" else torch.ones_like(p) for p in w]
        size = torch.sqrt(sum(((a * b) ** 2).sum() for a, b in zip(t, g, strict=True)))
        g = gradient([p + RHOS[method] * a**2 * b / size for p, a, b in zip(w, t, g, strict=True)])
        v = [MOMENTUM * a + b for a, b in zip(v, g, strict=True)]
        w = [p - LR * a for p, a in zip(w, v, strict=True)]
    return w


def _trained(steps: int, build: Callable[[nn.Module], Any], *, closure_form: bool) -> list[Tensor]:
    model, x, y = _problem()
    optimizer = build(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(steps):
        (optimizer.step if closure_form else optimizer.update)(closure)
    return [p.detach() for p in model.parameters()]


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Largest difference of an element, in units of the largest way that any has gone."""
    start = [p.detach() for p in _problem()[0].parameters()]
    gone = max(float((x - y).abs().max()) for x, y in zip(b, start, strict=True))
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)) / gone


def _ours(method: str) -> Callable[[nn.Module], Any]:
    def build(model: nn.Module) -> Any:
        base = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
        return flatmin.wrap(base, method, rho=RHOS[method], model=model)

    return build


def measure(files: Mapping[str, Path] | None = None) -> BenchmarkResult:
    """Distances for our SAM and ASAM (gated) and for other implementations of SAM (reported)."""
    result = BenchmarkResult("equiv", settings={"rho": str(RHOS)})
    table = Table(
        "Largest difference to the reference over the largest displacement, float64",
        ("implementation", "1 step", "5 steps", "same?"),
    )
    for method in RHOS:
        distances = [_distance(_trained(n, _ours(method), closure_form=True), reference(method, n)) for n in STEPS]
        worst = max(distances)
        table.rows.append((f"flatmin {method}", *(f"{d:.1e}" for d in distances), "yes" if worst <= OURS else "NO"))
        result.gates.append(Gate(f"flatmin {method}", f"{worst:.1e}", f"<= {OURS:.0e}", worst <= OURS))
        result.raw[method] = distances
    for label, build in peers.found(files).items():
        distances = [
            _distance(_trained(n, lambda m, b=build: b(m, "default"), closure_form=False), reference("sam", n))
            for n in STEPS
        ]
        same = "yes" if max(distances) <= PEERS else "no: another algorithm"
        table.rows.append((label, *(f"{d:.1e}" for d in distances), same))
        result.raw[label] = distances
    result.notes += peers.missing(files)
    result.tables.append(table)
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    peers.add_arguments(parser)


def run(options: argparse.Namespace) -> BenchmarkResult:
    """The benchmark as asked for on the command line."""
    return measure(dict(options.peer_file))
