"""`flatmin.value_and_grad`: the gradient of a recipe as a pure function, for users of `torch.func`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flatmin.methods import METHODS, Need, Recipe, compose, current_word
from flatmin.methods import State as PartState
from flatmin.optim.base_optimizer import check_rho
from flatmin.optim.program import Generators, PassGradients, StepInputs, program
from flatmin.optim.support import Loop, refusal

Params = Mapping[str, Tensor]
FunctionalState = dict[str, Any]


# torch.compile reads them, but can neither compose a recipe nor make a generator.
_RECIPES = {name: compose(name) for name in METHODS}
_UNUSED = Generators(0)  # for recipes that draw nothing


class _Frozen:
    """The state of the parts, read from a plain dict {"kind.slot": {name: tensor}}."""

    def __init__(self, recipe: Recipe, state: FunctionalState, names: Mapping[int, str]) -> None:
        self._recipe, self._state, self._names = recipe, state, names

    def read(self, kind: str, weights: Sequence[Tensor]) -> PartState:
        slots: dict[str, Any] = {}
        for slot, shape in self._recipe.parts[kind].slots.items():
            value = self._state.get(f"{kind}.{slot}")
            if shape == "param":
                slots[slot] = [(value or {}).get(self._names[id(w)]) for w in weights]
            else:
                slots[slot] = value
        return slots


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
    """Compute one step's loss at w, the gradient u for a base optimizer, and the recipe's new state.

    Nothing is changed in place.

        >>> import torch, flatmin
        >>> params = {"w": torch.tensor([3.0, 4.0])}
        >>> loss, grads, state = flatmin.value_and_grad(lambda p: 0.5 * p["w"].square().sum(), params, rho=1.0)
        >>> loss, grads["w"]
        (tensor(12.5000), tensor([3.6000, 4.8000]))

    With `torch.compile`, methods of at most two gradients that draw no random numbers become one graph.

    Args:
        loss_fn: pure function params -> scalar loss. It is differentiated by `torch.func`, and called once for each
            pass. Random numbers that it draws (dropout) differ between the passes, unlike in all other loops.
        params: name -> tensor.
        recipe: a name or a `Recipe`. Default "sam".
        rho: radius, or name -> radius. Default: that of the method (`recipe.default_rho`).
        ascent_fn: function params -> the loss that the ascent maximises, for recipes with another ascent loss (here
            they cannot compute it from logits). Default None.
        state: the state that the previous call returned. Default None: start without state.
        eps: added to the norm. Default 1e-12.
        seed: seed of the random numbers of recipes that draw. They change with the state from step to step. Default 0.

    Returns:
        (loss, grads, state): the loss at the point of the first pass, name -> u, and the new state. If the direction is
        not finite, the weights are not perturbed. If u is not finite, the caller decides whether to use it and whether
        to keep the new state.

    Raises:
        ValueError: a bad rho, an unknown recipe, or a recipe with needs that a pure function cannot meet.
        RuntimeError: it is called inside `torch.vmap`.
    """
    # Not a function of its own, which torch.compile would try to compile.
    levels = () if torch.compiler.is_compiling() else torch._C._functorch.get_interpreter_stack() or ()
    if any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels):
        raise RuntimeError(
            "value_and_grad cannot run inside torch.vmap, because operations on lists of tensors have no batching "
            "rule. Call it in a Python loop over the members, each with its own parameters; vmap inside loss_fn works."
        )
    if isinstance(recipe, str):
        recipe = _RECIPES[recipe] if recipe in _RECIPES else compose(recipe)
    if why := refusal(recipe, Loop.FUNCTIONAL):
        raise ValueError(f"{recipe.name} {why}.")
    for part in recipe.parts.values():
        part.validate()
    if Need.CRITERION in recipe.needs and ascent_fn is None:
        raise ValueError(f"{recipe.name} needs its ascent loss; pass it as ascent_fn=.")
    if not params:
        raise ValueError("params is empty.")
    radius = recipe.default_rho if rho is None else rho
    names = list(params)
    if isinstance(radius, Mapping) and (missing := [n for n in names if n not in radius]):
        raise ValueError(f"rho has no value for {missing[0]!r}.")
    # Views, so that a tensor with two names gives two objects.
    weights = [params[n].detach().view_as(params[n]) for n in names]
    groups = [{"rho": check_rho(radius[n] if isinstance(radius, Mapping) else radius)} for n in names]
    old = {current_word(key): value for key, value in (state or {}).items()}
    step = int(old.get("step", 0))
    generator = Generators(seed + step) if recipe.is_random else _UNUSED
    inputs = StepInputs(weights, groups, [g["rho"] for g in groups], names, step, generator)
    run = program(recipe, inputs, _Frozen(recipe, old, {id(w): n for w, n in zip(weights, names, strict=True)}), eps)
    loss: Tensor | None = None
    request = next(run)
    while True:
        point = dict(zip(names, weights, strict=True))
        if request.at is not None:
            for i, e in zip(request.at.index, request.at.tensors(), strict=True):
                point[names[i]] = weights[i] + e
        other = ascent_fn if request.role == "ascent" else None
        grads, value = torch.func.grad_and_value(loss_fn if other is None else other)(point)
        if loss is None:
            loss = value if other is None else loss_fn(point)
        try:
            request = run.send(PassGradients([grads[n] for n in names]))
        except StopIteration as stop:
            outcome = stop.args[0]
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
