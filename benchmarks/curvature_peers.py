"""Other packages on the same questions, as their documentation has it; each only where it is installed."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

PACKAGES = {"pyhessian": "PyHessian", "hessian_eigenthings": "hessian-eigenthings", "curvlinops": "curvlinops"}
Run = Callable[[int], tuple[Any, int]]


def missing() -> list[str]:
    """The packages that are not installed."""
    return [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]


def available(case: Any) -> dict[str, dict[str, Run]]:
    """Question -> name -> run, of the packages that are installed."""
    peers: dict[str, dict[str, Run]] = {}
    for module, answers in (
        ("pyhessian", _pyhessian),
        ("hessian_eigenthings", _eigenthings),
        ("curvlinops", _curvlinops),
    ):
        if importlib.util.find_spec(module) is not None:
            for question, runs in answers(case).items():
                peers.setdefault(question, {}).update(runs)
    if importlib.util.find_spec("hessian_eigenthings") is not None:
        peers.update(_report(case))
    return peers


def _seeded(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)


class _Counting:
    """Counts the products of an operator with a `matvec`."""

    def __init__(self, operator: Any, *, inside: bool = False) -> None:
        self.operator, self.count, self._real = operator, 0, operator.matvec
        if inside:
            operator.matvec = self.product

    def product(self, vector: Any) -> Any:
        """The operator's product."""
        self.count += 1
        return self._real(vector)


def _pyhessian(case: Any) -> dict[str, dict[str, Run]]:
    import sys

    import pyhessian

    module: Any = sys.modules["pyhessian.hessian"]  # the package has a class of the same name

    def top(k: int, **options: Any) -> Run:
        def run(seed: int) -> tuple[Any, int]:
            _seeded(seed)
            count = 0
            real = module.hessian_vector_product

            def product(*args: Any) -> Any:
                nonlocal count
                count += 1
                return real(*args)

            module.hessian_vector_product = product
            try:
                operator = pyhessian.hessian(case.model, nn.CrossEntropyLoss(), data=(case.x, case.y), cuda=False)
                values, _ = operator.eigenvalues(top_n=k, **options)
            finally:
                module.hessian_vector_product = real
                for p in case.model.parameters():
                    p.grad = None
            return [float(v) for v in values], count

        return run

    tight = {"tol": 1e-5, "maxIter": 1000}
    return {f"top-{k}": {"PyHessian, default": top(k), "PyHessian, tol 1e-5": top(k, **tight)} for k in (1, 5)}


def _operator(case: Any) -> Any:
    import hessian_eigenthings as he

    # It weighs batches equally, so it gets all examples as one.
    return he.HessianOperator(case.model, [(case.x, case.y)], he.supervised_loss(nn.CrossEntropyLoss()))


def _eigenthings(case: Any) -> dict[str, dict[str, Run]]:
    import hessian_eigenthings as he

    def top(k: int, steps: int | None) -> Run:
        def run(seed: int) -> tuple[Any, int]:
            counted = _Counting(_operator(case), inside=True)
            returned = he.lanczos(counted.operator, k=k, max_iter=steps, which="LA", seed=seed)
            return sorted((float(v) for v in returned.eigenvalues), reverse=True), counted.count

        return run

    def tr(seed: int) -> tuple[Any, int]:
        counted = _Counting(_operator(case), inside=True)
        returned = he.hutch_plus_plus(counted.operator, num_matvecs=159, seed=seed)
        return [float(returned.estimate)], counted.count

    return {
        "top-1": {"hessian-eigenthings, default": top(1, None), "hessian-eigenthings, 8 steps by hand": top(1, 8)},
        "top-5": {"hessian-eigenthings, default": top(5, None), "hessian-eigenthings, 18 steps by hand": top(5, 18)},
        "trace to 1 %": {"hessian-eigenthings, Hutch++ of 159": tr},
    }


def _curvlinops(case: Any) -> dict[str, dict[str, Run]]:
    import curvlinops
    from scipy.sparse.linalg import LinearOperator, eigsh

    def top(k: int, **options: Any) -> Run:
        def run(seed: int) -> tuple[Any, int]:
            params = [p for p in case.model.parameters() if p.requires_grad]
            operator = curvlinops.HessianLinearOperator(
                case.model, nn.CrossEntropyLoss(), params, case.batches, check_deterministic=False
            ).to_scipy()
            counted = _Counting(operator)
            product = LinearOperator(operator.shape, matvec=counted.product, dtype=operator.dtype)
            start = torch.randn(operator.shape[0], generator=torch.Generator().manual_seed(seed)).numpy()
            values = eigsh(product, k=k, which="LA", v0=start, return_eigenvectors=False, **options)
            return sorted(map(float, values), reverse=True), counted.count

        return run

    return {
        "top-1": {
            "curvlinops + eigsh, tol 1e-3": top(1, tol=1e-3),
            "curvlinops + eigsh, ncv 8 by hand": top(1, tol=1e-2, ncv=8),
        },
        "top-5": {
            "curvlinops + eigsh, tol 1e-3": top(5, tol=1e-3),
            "curvlinops + eigsh, ncv 16 by hand": top(5, tol=1e-2, ncv=16),
        },
    }


def _report(case: Any) -> dict[str, dict[str, Run]]:
    """The cheapest of the peers for each answer: all four are hessian-eigenthings'."""
    import hessian_eigenthings as he

    def report(runs: int, steps: int) -> Run:
        def run(seed: int) -> tuple[Any, int]:
            counted = _Counting(_operator(case), inside=True)
            top = he.lanczos(counted.operator, k=5, max_iter=18, which="LA", seed=seed)
            low = he.lanczos(counted.operator, k=1, max_iter=40, which="SA", seed=seed)
            he.hutch_plus_plus(counted.operator, num_matvecs=159, seed=seed)
            he.spectral_density(counted.operator, num_runs=runs, lanczos_steps=steps, seed=seed)
            values = sorted((float(v) for v in top.eigenvalues), reverse=True)
            return [*values, float(low.eigenvalues[0])], counted.count

        return run

    return {
        "report: top-5, lambda_min, trace to 1 %, density": {
            "cheapest mix of peers, density 4 x 100": report(4, 100),
            "cheapest mix of peers, density 1 x 30": report(1, 30),
        }
    }
