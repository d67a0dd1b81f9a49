"""What may be a base optimizer, and which options it may carry."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Where optimizers keep the first moment of a weight.
_MOMENTA = ("momentum_buffer", "exp_avg")


def has_momentum(base: Optimizer) -> bool:
    """Whether every group of the base is set up to keep a momentum under a known name."""
    groups = base.param_groups
    return all(float(g.get("momentum") or 0) > 0 or "betas" in g or "beta1" in g for g in groups)


def momenta_of(base: Optimizer, weights: Sequence[Tensor]) -> list[Tensor | None]:
    """The base's momentum of each weight, dense; None where it has none yet.

    Raises:
        ValueError: the base has state for a weight, and no momentum under a known name in it.
    """
    states = [base.state.get(w) for w in weights]
    first = next((s for s in states if s), None)
    if first is None:
        return [None] * len(states)
    name = next((n for n in _MOMENTA if n in first), None)
    if name is None:
        raise ValueError(
            f"{type(base).__name__} keeps no momentum that this library knows ({' or '.join(_MOMENTA)}); it has "
            f"{', '.join(map(str, first))}."
        )
    found = [s.get(name) if s else None for s in states]
    return [v.to_dense() if v is not None and v.is_sparse else v for v in found]


def check_rho(rho: Any) -> float:
    """Rho as a float; ValueError unless it is a finite number >= 0."""
    if isinstance(rho, bool) or not isinstance(rho, (int, float)) or not math.isfinite(rho) or rho < 0:
        raise ValueError(f"rho must be a finite number >= 0, got {rho!r}.")
    return float(rho)


def build_base(params: Any, base_optimizer: Callable[..., Optimizer] | None, kwargs: dict[str, Any]) -> Optimizer:
    """The base from a constructed optimizer, or from its class and parameters; TypeError, ValueError otherwise."""
    if isinstance(params, Optimizer):
        if base_optimizer is not None or kwargs:
            extra = "base_optimizer" if base_optimizer is not None else sorted(kwargs)[0]
            raise TypeError(
                f"got a constructed base optimizer and {extra!r} as well; give its options where it is built."
            )
        base = params
    elif base_optimizer is None:
        raise TypeError(
            "expected a constructed base optimizer, as in SAM(torch.optim.SGD(params, lr=0.1)), or its class as the "
            f"second argument; got {type(params).__name__}."
        )
    else:
        base = base_optimizer(params, **kwargs)
        if not isinstance(base, Optimizer):
            raise TypeError(f"base_optimizer must build a torch.optim.Optimizer, got {type(base).__name__}.")
    if hasattr(base, "recipe") and hasattr(base, "perturbed"):
        raise TypeError("the base is a flatmin optimizer already; compose recipes by name instead, as in 'vasso+asam'.")
    if isinstance(base, torch.optim.LBFGS):
        raise TypeError("LBFGS evaluates the loss inside its own step and cannot be a base.")
    if not any(g["params"] for g in base.param_groups):
        raise ValueError("the base optimizer has no parameters.")
    return base
