"""What may be a base optimizer, and which options it may carry."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Where optimizers keep the first moment of a weight.
_MOMENTA = ("momentum_buffer", "exp_avg")
WRAPPED, OWN_RHO, _FILLED = "flatmin.version", "flatmin.rho", "_flatmin_filled"


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


def is_number(x: Any) -> bool:
    """Whether it is a finite real number: Python's, numpy's, or a tensor of one element on the CPU."""
    if isinstance(x, Tensor):
        return x.numel() == 1 and x.device.type == "cpu" and x.dtype != torch.bool and bool(x.isfinite())
    return isinstance(x, numbers.Real) and not isinstance(x, bool) and math.isfinite(x)


def check_rho(rho: Any) -> float:
    """Rho as a float; ValueError unless it is a finite number >= 0."""
    if type(rho) is float and 0.0 <= rho < math.inf:
        return rho
    if not is_number(rho) or rho < 0:
        raise ValueError(
            f"rho must be a finite number >= 0, got {rho!r}" + (", a tensor" if isinstance(rho, Tensor) else "") + "."
        )
    return float(rho)


def check_positive(name: str, value: Any) -> float:
    """A positive finite number as a float; ValueError otherwise."""
    if not is_number(value) or value <= 0:
        raise ValueError(f"{name} must be a positive number or None, got {value!r}.")
    return float(value)


def rho_key(base: Optimizer) -> str:
    """The option of its param groups that holds the radius: "rho", or "flatmin.rho" where the base has its own rho."""
    first = base.param_groups[0]
    wrapped = WRAPPED in first or _FILLED in base.__dict__
    return OWN_RHO if OWN_RHO in base.defaults or ("rho" in base.defaults and not wrapped) else "rho"


def set_rho(base: Optimizer, key: str, asked: float | None, default: float) -> None:
    """Give every group of the base its radius: the group's own, else the asked one, else the default.

    What an earlier wrapper has filled in counts as a group's own only where nothing is asked.
    """
    filled: set[int] = base.__dict__.setdefault(_FILLED, set())
    if asked is not None or key not in base.defaults:
        base.defaults[key] = default if asked is None else asked
    for k, group in enumerate(base.param_groups):
        if key not in group or (k in filled and asked is not None):
            group[key] = base.defaults[key]
            filled.add(k)
        group[key] = check_rho(group[key])


def differentiates_gradients(base: Optimizer) -> bool:
    """Whether the base's step differentiates the gradients once more, and so needs their graph."""
    return "hessian" in _parameters(type(base).step) or hasattr(base, "get_trace")


def takes_closure(base: Optimizer) -> bool:
    """Whether the base's step can be given a closure."""
    return any(p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in _parameters(base.step).values())


def needs_closure(base: Optimizer) -> bool:
    """Whether the base's step cannot be called without a closure."""
    closure = _parameters(type(base).step).get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def known_loss(base: Optimizer, loss: Any, weights: Sequence[Tensor]) -> Callable[[], Any]:
    """A closure for the base's step that returns the loss of this update without computing it again.

    Raises (when it is called):
        RuntimeError: the base has moved the weights before, so that it wants the loss of another point.
    """
    probes = (weights[0], weights[-1])
    versions = [w._version for w in probes]

    def closure() -> Any:
        if [w._version for w in probes] != versions:
            raise RuntimeError(
                f"{type(base).__name__} moves the weights before it asks for the loss, or asks again after it; a base "
                "must step with the gradients that it finds. Use its form without such a closure."
            )
        return loss

    return closure


def build_base(
    params: Any, base_optimizer: Callable[..., Optimizer] | None, kwargs: dict[str, Any], both: Mapping[str, Any]
) -> Optimizer:
    """The base from a constructed optimizer, or from its class and parameters; TypeError, ValueError otherwise.

    `both`: options of the wrapper that differ from their defaults, and that a base's class may have too.
    """
    if isinstance(params, Optimizer):
        if is_number(base_optimizer):
            raise TypeError(f"the second argument is the base's class; write rho={base_optimizer!r} by its name.")
        if base_optimizer is not None or kwargs:
            extra = "base_optimizer" if base_optimizer is not None else sorted(kwargs)[0]
            raise TypeError(
                f"got a constructed base optimizer and {extra!r} as well; give its options where it is built."
            )
        base = params
    elif isinstance(params, torch.nn.Module):
        raise TypeError(
            f"got the module {type(params).__name__}; give its weights, as in SAM(model.parameters(), ...)."
        )
    elif isinstance(base_optimizer, Optimizer):
        raise TypeError(
            f"the second argument is the base's class, got a constructed {type(base_optimizer).__name__}; give it "
            f"alone, as in SAM({type(base_optimizer).__name__}(params, lr=0.1), rho=0.05)."
        )
    elif base_optimizer is None or not callable(base_optimizer):
        raise TypeError(
            "expected a constructed base optimizer, as in SAM(torch.optim.SGD(params, lr=0.1)), or its class as "
            f"the second argument; got {type(params if base_optimizer is None else base_optimizer).__name__}, which is "
            "no torch.optim.Optimizer."
        )
    else:
        taken = _parameters(base_optimizer)
        for name in both:
            if name in taken and name != "eps":
                raise ValueError(
                    f"{name!r} is an option of the base and of the wrapper; build the base first, as in "
                    f"SAM(Base(params, {name}=...), {name}=...)."
                )
        if "eps" in both and "eps" in taken:
            kwargs = {**kwargs, "eps": both["eps"]}
        base = base_optimizer(params, **kwargs)
        if not isinstance(base, Optimizer):
            raise TypeError(f"base_optimizer must build a torch.optim.Optimizer, got {type(base).__name__}.")
    _refuse(base)
    return base


def hands_on_eps(base_optimizer: Any) -> bool:
    """Whether `eps=` is the base's: it is given by its class, which has an option of this name."""
    return callable(base_optimizer) and "eps" in _parameters(base_optimizer)


def _refuse(base: Optimizer) -> None:
    name = type(base).__name__
    if hasattr(base, "recipe") and hasattr(base, "perturbed"):
        raise TypeError("the base is a flatmin optimizer already; compose recipes by name instead, as in 'vasso+asam'.")
    if not getattr(base, "param_groups", None):
        raise TypeError(f"{name} has no param_groups of its own and cannot be a base; give the optimizer inside it.")
    if isinstance(base, torch.optim.LBFGS) or name == "LBFGS":
        raise TypeError("LBFGS evaluates the loss inside its own step and cannot be a base.")
    if any(callable(getattr(base, method, None)) for method in ("first_step", "perturb", "perturb_weights")):
        raise TypeError(f"{name} is a sharpness-aware optimizer itself; give the base optimizer inside it.")
    if any(hasattr(base, method) for method in ("fused_backward", "fuse_update")):
        raise TypeError(
            f"{name} moves the weights during the backward pass and cannot be a base: no pass would be left."
        )
    if not any(g["params"] for g in base.param_groups):
        raise ValueError("the base optimizer has no parameters.")


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
