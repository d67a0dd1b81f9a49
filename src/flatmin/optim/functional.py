"""The functional form: the gradient that a recipe hands to its base, as a pure function for `torch.func` users."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flatmin.methods import Need, Recipe, compose, current_word
from flatmin.methods import State as PartState
from flatmin.optim.base_optimizer import check_rho
from flatmin.optim.program import Generators, PassGradients, StepInputs, program
from flatmin.optim.support import Loop, refusal

Params = Mapping[str, Tensor]
FunctionalState = dict[str, Any]


class _Frozen:
    """Part state held in a plain dict {"kind.slot": {name: tensor}}."""

    def __init__(self, recipe: Recipe, state: FunctionalState, names: Mapping[int, str]) -> None:
        self._recipe, self._state, self._names = recipe, state, names

    def read(self, kind: str, weights: Sequence[Tensor]) -> PartState:
        found: dict[str, Any] = {}
        for slot, shape in self._recipe.parts[kind].slots.items():
            value = self._state.get(f"{kind}.{slot}")
            if shape == "param":
                found[slot] = [(value or {}).get(self._names[id(w)]) for w in weights]
            else:
                found[slot] = value
        return found


def value_and_grad(
    loss_fn: Callable[[Params], Tensor],
    params: Params,
    *,
    recipe: str | Recipe = "sam",
    rho: float | Mapping[str, float] | None = None,
    ascent_fn: Callable[[Params], Tensor] | None = None,
    state: FunctionalState | None = None,
    eps: float = 1e-12,
    seed: int = 0,
) -> tuple[Tensor, dict[str, Tensor], FunctionalState]:
    """One step's loss at w, gradient u for a base optimizer, and new recipe state; nothing is changed in place.

        >>> import torch, flatmin
        >>> params = {"w": torch.tensor([3.0, 4.0])}
        >>> loss, grads, state = flatmin.value_and_grad(lambda p: 0.5 * p["w"].square().sum(), params, rho=1.0)
        >>> loss, grads["w"]
        (tensor(12.5000), tensor([3.6000, 4.8000]))

    Args:
        loss_fn: params -> scalar loss, pure; it is differentiated by `torch.func`.
        params: name -> tensor.
        recipe: a name or a `Recipe`. Default "sam".
        rho: radius, or name -> radius. Default: the method's own (`recipe.default_rho`).
        ascent_fn: params -> the loss that is climbed, for recipes with their own (they do not see logits here).
        state: what the previous call returned. Default: a fresh start.
        eps: added to the norm. Default 1e-12.
        seed: of the random draws of recipes that draw; advances with the state.

    Returns:
        (loss at the first pass's point, name -> u, new state). A direction that is not finite means eps = 0; whether
        to use a u that is not finite is the caller's choice, as is whether to keep the new state.

    Raises:
        ValueError: bad rho, unknown recipe, or needs that a pure function cannot serve.
        RuntimeError: inside `torch.vmap`.
    """
    if _inside_vmap():
        raise RuntimeError(
            "value_and_grad cannot run inside torch.vmap: kernels over lists of tensors have no batching rule. Call it "
            "in a Python loop over the members, each with parameters of its own; vmap inside loss_fn works."
        )
    recipe = compose(recipe) if isinstance(recipe, str) else recipe
    if why := refusal(recipe, Loop.FUNCTIONAL):
        raise ValueError(f"{recipe.name} {why}.")
    for part in recipe.parts.values():
        part.validate()
    if Need.CRITERION in recipe.needs and ascent_fn is None:
        raise ValueError(f"{recipe.name} climbs another loss than it descends; pass it as ascent_fn.")
    if not params:
        raise ValueError("params is empty.")
    radius = recipe.default_rho if rho is None else rho
    names = list(params)
    if isinstance(radius, Mapping) and (missing := [n for n in names if n not in radius]):
        raise ValueError(f"rho has no value for {missing[0]!r}.")
    # Views, so that each has its own identity also if one tensor stands under two names.
    weights = [params[n].detach().view_as(params[n]) for n in names]
    groups = [{"rho": check_rho(radius[n] if isinstance(radius, Mapping) else radius)} for n in names]
    old = {current_word(key): value for key, value in (state or {}).items()}
    step = int(old.get("step", 0))
    inputs = StepInputs(weights, groups, [g["rho"] for g in groups], names, step, Generators(seed + step))
    run = program(recipe, inputs, _Frozen(recipe, old, {id(w): n for w, n in zip(weights, names, strict=True)}), eps)
    loss: Tensor | None = None
    request = next(run)
    while True:
        point = dict(zip(names, weights, strict=True))
        if request.at is not None:
            for i, e in zip(request.at.index, request.at.tensors(), strict=True):
                point[names[i]] = weights[i] + e
        fn = ascent_fn if ascent_fn is not None and request.role == "ascent" else loss_fn
        grads, value = torch.func.grad_and_value(fn)(point)
        if loss is None:
            loss = loss_fn(point) if fn is not loss_fn else value
        try:
            request = run.send(PassGradients([grads[n] for n in names]))
        except StopIteration as stop:
            outcome = stop.value
            break
    new = {k: dict(v) if isinstance(v, dict) else v for k, v in old.items()}
    new["step"] = step + 1
    for kind, (index, slots) in outcome.staged.items():
        for slot, value in slots.items():
            key = f"{kind}.{slot}"
            if isinstance(value, list):
                new[key] = {**new.get(key, {}), **{names[i]: v for i, v in zip(index, value, strict=True)}}
            else:
                new[key] = value
    return loss, dict(zip(names, outcome.update, strict=True)), new


def _inside_vmap() -> bool:
    stack = torch._C._functorch.get_interpreter_stack()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in stack or ())
