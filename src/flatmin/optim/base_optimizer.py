"""The base optimizer: which optimizers are accepted, their options, and how they take their step."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from flatmin.optim import tensors as ta
from flatmin.optim.perturb import FoundInf
from flatmin.optim.tensors import Layout

# Where optimizers keep the first moment of a weight.
_MOMENTA = ("momentum_buffer", "exp_avg")
_IS_SPARSE = operator.attrgetter("is_sparse")
WRAPPED, OWN_RHO, _FILLED = "flatmin.version", "flatmin.rho", "_flatmin_filled"


class BaseOptimizer:
    """The wrapped optimizer, with properties of it that do not change.

    Args:
        optimizer: the base optimizer.

    Attributes:
        rho_key: the option of its param groups that holds the radius: "rho", or "flatmin.rho" if the base optimizer has
            an option rho itself.
        differentiates: whether its step differentiates the gradients again and so needs their graph.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        step = type(optimizer).step
        self.rho_key = rho_key(optimizer)
        self.differentiates = "hessian" in _parameters(step) or hasattr(optimizer, "get_trace")
        asks = any(p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in _parameters(optimizer.step).values())
        # torch's own optimizers only return the closure's result, so they do not need a closure.
        self._takes_closure = asks and not type(optimizer).__module__.startswith("torch.optim.")
        closure = _parameters(step).get("closure")
        self._needs_closure = closure is not None and closure.default is inspect.Parameter.empty
        self._zeroes_as_torch = type(optimizer).zero_grad is Optimizer.zero_grad

    @property
    def name(self) -> str:
        return type(self.optimizer).__name__

    @property
    def weights(self) -> list[Tensor]:
        """The tensors of all groups, in order."""
        return [w for group in self.optimizer.param_groups for w in group["params"]]

    def zero_grad(self, set_to_none: bool = True) -> None:
        if not (set_to_none and self._zeroes_as_torch):
            self.optimizer.zero_grad(set_to_none)
            return
        # Reading .grad first, as torch does, would make an object of every gradient only to drop it.
        for group in self.optimizer.param_groups:
            for w in group["params"]:
                w.grad = None

    def has_momentum(self) -> bool:
        """Whether the options of every group give a momentum under a known name."""
        return all(
            float(g.get("momentum") or 0) > 0 or "betas" in g or "beta1" in g for g in self.optimizer.param_groups
        )

    def other_than_sgd(self, *, bare: bool = False) -> str | None:
        """The kind of optimizer if it is not torch's SGD (`bare`: SGD without momentum and weight decay); else None."""
        if not isinstance(self.optimizer, SGD):
            return self.name
        for group in self.optimizer.param_groups if bare else ():
            if group["momentum"] or group["weight_decay"]:
                return f"SGD with momentum={group['momentum']:g}, weight_decay={group['weight_decay']:g}"
        return None

    def momenta(
        self, weights: Sequence[Tensor], state: Mapping[Tensor, Mapping[str, Any]] | None = None
    ) -> list[Tensor | None]:
        """The base optimizer's momentum of each weight, dense; None where there is none yet.

        Args:
            weights: the weights.
            state: the state of each. Default None: the base optimizer's.

        Raises:
            ValueError: the base optimizer has state for a weight, but no momentum under a known name.
        """
        state = self.optimizer.state if state is None else state
        states = [state.get(w) for w in weights]
        first = next((s for s in states if s), None)
        if first is None:
            return [None] * len(states)
        name = next((n for n in _MOMENTA if n in first), None)
        if name is None:
            raise ValueError(
                f"{self.name} has no momentum under a known name ({' or '.join(_MOMENTA)}); its state holds "
                f"{', '.join(map(str, first))}."
            )
        momenta = [s.get(name) if s else None for s in states]
        return [v.to_dense() if v is not None and v.is_sparse else v for v in momenta]

    def takes_found_inf(self) -> bool:
        """Whether the base optimizer can skip a step by a flag on the device, so that the host need not read it."""
        if not (
            type(self.optimizer).__module__.startswith("torch.optim")
            and all(g.get("fused") for g in self.optimizer.param_groups)
        ):
            return False
        if not isinstance(self.optimizer, SGD):
            return True
        # SGD creates its momentum buffer even in a step that is skipped, and uses it in the next one.
        state = self.optimizer.state
        return all(
            state.get(w, {}).get("momentum_buffer") is not None
            for group in self.optimizer.param_groups
            if group["momentum"]
            for w in group["params"]
            if w.grad is not None
        )

    def step_with(self, loss: Any, weights: Sequence[Tensor]) -> Callable[[], object]:
        """The base optimizer's step as a function without arguments. A base that calls a closure gets this loss.

        Args:
            loss: the loss of this update; None: unknown.
            weights: used to detect a base that moves the weights before it calls the closure.

        Raises:
            RuntimeError: the base needs the loss, but it is unknown. Also when the step is called, if the base moves
                the weights before it calls the closure, since it then needs the loss of another point.
        """
        if loss is not None and self._takes_closure:
            return functools.partial(self.optimizer.step, self._known_loss(loss, weights))
        if self._needs_closure:
            raise RuntimeError(f"the step of {self.name} needs the loss: use optimizer.step(closure).")
        return self.optimizer.step

    def step_if_finite(
        self,
        step: Callable[[], object],
        gradients: Sequence[Tensor],
        layout: Layout,
        *,
        nonfinite: str,
        size: Tensor | None,
        ascents: int,
        flags: FoundInf | None,
        scaled: Tensor | None,
        terms: Sequence[Tensor],
    ) -> tuple[bool, bool, Tensor | None]:
        """Take the base optimizer's step, with the chosen treatment of gradients that are not finite.

        Args:
            step: the result of `step_with`.
            gradients: the gradients that the base optimizer takes.
            layout: the layout of the weights.
            nonfinite: "skip", "raise" or "propagate".
            size: the norm that decided whether the weights were perturbed; None: there was no ascent.
            ascents: number of perturbations in this update.
            flags: the flags on the weights' device; None on the CPU, where reading a value does not synchronise.
            scaled: 1 if unscaling found an inf, else 0; None: no scaler.
            terms: what is added to the weights after the step; it is skipped together with the step.

        Returns:
            Whether the step was taken and whether the ascent was finite, as far as the host knows; and a scalar on the
            device that is 1 if the base optimizer skipped the step itself (None: the host decided).

        Raises:
            FloatingPointError: nonfinite="raise", and the gradients are not finite.
        """
        ascended = flags is not None and size is not None
        if nonfinite == "propagate" and scaled is None:
            step()
            if flags is None or not ascended:
                return True, True, None
            flags.count(ascended=True)
            return True, True, None
        if any(map(_IS_SPARSE, gradients)):
            layout = Layout([])
            gradients = [g.coalesce().values() if g.is_sparse else g for g in gradients]
        if flags is None:
            # An earlier ascent of this update may not have been finite, although the last one was.
            finite = size is None or math.isfinite(float(size))
            good = ta.all_finite(gradients, layout) and (not terms or ta.all_finite(terms, Layout([])))
            if (scaled is not None and scaled) or not good:
                return self._refuse(nonfinite, scaled), finite, None
            step()
            return True, finite, None
        if not ascended:
            flags.reset()
        elif ascents > 1 and size is not None:
            flags.judge(size, again=True)
        ta.nonfinite_([*gradients, *terms], flags.found_inf, flags.one)
        if scaled is not None:
            flags.found_inf.logical_or_(scaled)
        if (nonfinite == "skip" or scaled is not None) and self.takes_found_inf() and not terms:
            self.optimizer.found_inf = flags.found_inf  # type: ignore[attr-defined]
            try:
                step()
            finally:
                del self.optimizer.found_inf  # type: ignore[attr-defined]
            flags.count(ascended=ascended)
            return True, True, flags.found_inf
        finite, found = flags.read()
        finite = finite or not ascended
        if found:
            return self._refuse(nonfinite, scaled), finite, None
        step()
        return True, finite, None

    @staticmethod
    def _refuse(nonfinite: str, scaled: Tensor | None) -> bool:
        if nonfinite == "raise" and scaled is None:
            raise FloatingPointError(
                "the descent gradient has nan or inf entries; the weights and the base optimizer's state are unchanged "
                "(nonfinite='raise')."
            )
        return False

    def _known_loss(self, loss: Any, weights: Sequence[Tensor]) -> Callable[[], Any]:
        probes = (weights[0], weights[-1])
        versions = [w._version for w in probes]

        def closure() -> Any:
            if [w._version for w in probes] != versions:
                raise RuntimeError(
                    f"{self.name} moves the weights before it calls the closure, or calls it again afterwards; a base "
                    "optimizer must step with the gradients that it is given. Use a form of it that calls no closure."
                )
            return loss

        return closure


def is_number(x: Any) -> bool:
    """Whether x is a finite real number of Python or numpy, or a CPU tensor with one element."""
    if isinstance(x, Tensor):
        return x.numel() == 1 and x.device.type == "cpu" and x.dtype != torch.bool and bool(x.isfinite())
    return isinstance(x, numbers.Real) and not isinstance(x, bool) and math.isfinite(x)


def check_rho(rho: Any) -> float:
    """Return rho as a float; raise ValueError unless it is a finite number >= 0."""
    if type(rho) is float and 0.0 <= rho < math.inf:
        return rho
    if not is_number(rho) or rho < 0:
        raise ValueError(
            f"rho must be a finite number >= 0, got {rho!r}" + (", a tensor" if isinstance(rho, Tensor) else "") + "."
        )
    return float(rho)


def check_positive(name: str, value: Any) -> float:
    """Return the value as a float; raise ValueError unless it is a finite number > 0."""
    if not is_number(value) or value <= 0:
        raise ValueError(f"{name} must be a positive number or None, got {value!r}.")
    return float(value)


def rho_key(base: Optimizer) -> str:
    """The param group option that holds the radius: "rho", or "flatmin.rho" if the base has an option rho itself."""
    first = base.param_groups[0]
    wrapped = WRAPPED in first or _FILLED in base.__dict__
    return OWN_RHO if OWN_RHO in base.defaults or ("rho" in base.defaults and not wrapped) else "rho"


def set_rho(base: Optimizer, key: str, asked: float | None, default: float) -> None:
    """Set the radius of every param group: the group's own value, else `asked`, else the default.

    A value that an earlier wrapper has filled in counts as the group's own only if `asked` is None.
    """
    filled: set[int] = base.__dict__.setdefault(_FILLED, set())
    if asked is not None or key not in base.defaults:
        base.defaults[key] = default if asked is None else asked
    for k, group in enumerate(base.param_groups):
        if key not in group or (k in filled and asked is not None):
            group[key] = base.defaults[key]
            filled.add(k)
        group[key] = check_rho(group[key])


def build_base(
    params: Any, base_optimizer: Callable[..., Optimizer] | None, kwargs: dict[str, Any], both: Mapping[str, Any]
) -> Optimizer:
    """The base optimizer: `params` itself if it is an optimizer, else built from its class and parameters.

    Args:
        params: a constructed optimizer, or parameters.
        base_optimizer: the class, if `params` are parameters.
        kwargs: options of the class.
        both: options of the wrapper that differ from their defaults, which the class may have too.

    Raises:
        TypeError, ValueError: the arguments do not give a base optimizer, or it is not supported.
    """
    if isinstance(params, Optimizer):
        if is_number(base_optimizer):
            raise TypeError(
                f"the second argument is the base optimizer's class; pass rho by name, as rho={base_optimizer!r}."
            )
        if base_optimizer is not None or kwargs:
            extra = "base_optimizer" if base_optimizer is not None else sorted(kwargs)[0]
            raise TypeError(
                f"got a constructed base optimizer and {extra!r}; set options where the base optimizer is built."
            )
        base = params
    elif isinstance(params, torch.nn.Module):
        raise TypeError(
            f"got the module {type(params).__name__}; pass its parameters, as in SAM(model.parameters(), ...)."
        )
    elif isinstance(base_optimizer, Optimizer):
        raise TypeError(
            f"the second argument is the base optimizer's class, got a constructed {type(base_optimizer).__name__}; "
            f"pass it alone, as in SAM({type(base_optimizer).__name__}(params, lr=0.1), rho=0.05)."
        )
    elif base_optimizer is None or not callable(base_optimizer):
        raise TypeError(
            "expected a constructed base optimizer, as in SAM(torch.optim.SGD(params, lr=0.1)), or its class as "
            f"the second argument; got {type(params if base_optimizer is None else base_optimizer).__name__}, which is "
            "not a torch.optim.Optimizer."
        )
    else:
        taken = _parameters(base_optimizer)
        for name in both:
            if name in taken and name != "eps":
                raise ValueError(
                    f"{name!r} is an option of the base optimizer and of SAM; build the base optimizer first, as in "
                    f"SAM(Base(params, {name}=...), {name}=...)."
                )
        if "eps" in both and "eps" in taken:
            kwargs = {**kwargs, "eps": both["eps"]}
        base = base_optimizer(params, **kwargs)
        if not isinstance(base, Optimizer):
            raise TypeError(f"base_optimizer must build a torch.optim.Optimizer, got {type(base).__name__}.")
    _refuse(base)
    return base


def adaptive_recipe(base: Optimizer, recipe: Any, adaptive: bool, rho: float | None) -> Any:
    """The recipe for the option `adaptive`, which param groups may set too."""
    asked = [group.get("adaptive", adaptive) for group in base.param_groups]
    if "adaptive" in base.defaults or not any(asked):
        return recipe
    if not isinstance(recipe, str) or "asam" not in recipe.split("+"):
        if recipe != "sam":
            raise ValueError(f"a param group with adaptive=True needs a recipe with 'asam'; got recipe={recipe!r}.")
        recipe = "asam"
    if not all(asked) and rho is None:
        raise ValueError("param groups differ in adaptive but share one norm: pass rho=.")
    for group, one in zip(base.param_groups, asked, strict=True):
        group["adaptive"] = bool(one)
    return recipe


def hands_on_eps(base_optimizer: Any) -> bool:
    """Whether `eps=` belongs to the base optimizer: it is given as a class that has an option of this name."""
    return callable(base_optimizer) and "eps" in _parameters(base_optimizer)


def _refuse(base: Optimizer) -> None:
    name = type(base).__name__
    if hasattr(base, "recipe") and hasattr(base, "perturbed"):
        raise TypeError("the base is already a flatmin optimizer; compose recipes by name instead, as in 'vasso+asam'.")
    if not getattr(base, "param_groups", None):
        raise TypeError(f"{name} has no param_groups and cannot be a base optimizer; pass the optimizer inside it.")
    if isinstance(base, torch.optim.LBFGS) or name == "LBFGS":
        raise TypeError("LBFGS evaluates the loss inside its own step and cannot be a base optimizer.")
    if any(callable(getattr(base, method, None)) for method in ("first_step", "perturb", "perturb_weights")):
        raise TypeError(f"{name} is a sharpness-aware optimizer itself; pass the base optimizer inside it.")
    if any(hasattr(base, method) for method in ("fused_backward", "fuse_update")):
        raise TypeError(
            f"{name} updates the weights during the backward pass and cannot be a base optimizer, since SAM needs two "
            "backward passes before the update."
        )
    if not any(g["params"] for g in base.param_groups):
        raise ValueError("the base optimizer has no parameters.")


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
