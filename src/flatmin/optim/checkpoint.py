"""Checkpoints: what is saved in addition to the base optimizer's state, and which checkpoints can be loaded."""

from __future__ import annotations

import itertools
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flatmin.methods import DEFAULTS, FORMER_KINDS, KINDS, Recipe, current_word
from flatmin.optim.base_optimizer import OWN_RHO
from flatmin.optim.state import PREFIX, RNG, STEP, MethodState, filled_slot

VERSION = 1
BASE = "flatmin.base"  # key of the base optimizer's checkpoint if that is not in torch's form
# What single-file implementations of SAM put into each weight's state.
_SINGLE_FILE = frozenset({"old_p", "old_g", "e_w"})


def split(state: Mapping[Any, Any]) -> tuple[dict[Any, Any], dict[Any, dict[str, Any]]]:
    """Split a checkpoint's "state" into the base optimizer's and flatmin's, both by the checkpoint's ids."""
    base: dict[Any, Any] = {}
    own: dict[Any, dict[str, Any]] = {}
    for key, entries in state.items():
        if isinstance(entries, Mapping):
            mine = {k: v for k, v in entries.items() if str(k).startswith(PREFIX)}
            rest = {k: v for k, v in entries.items() if not str(k).startswith(PREFIX)}
            if mine:
                own[key] = mine
            if rest or not mine:
                base[key] = rest
        else:
            base[key] = entries
    return base, own


def base_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a flatmin checkpoint to a checkpoint of the base optimizer alone.

    Args:
        checkpoint: the result of `optimizer.state_dict()`.

    Returns:
        A dict with "state" and "param_groups", without rho and without the recipe's state. For a base optimizer whose
        `state_dict` is not in torch's form, that `state_dict`.

    Raises:
        ValueError: this is not the state dict of an optimizer, but for example a training checkpoint that contains one.
    """
    if BASE in checkpoint:
        return dict(checkpoint[BASE])
    if not {"state", "param_groups"} <= checkpoint.keys():
        raise ValueError(
            f"expected the state dict of an optimizer, with 'state' and 'param_groups', but got the keys "
            f"{', '.join(map(repr, list(checkpoint)[:8]))}; give the optimizer's part of the checkpoint (in one of "
            "Lightning: checkpoint['optimizer_states'][0])."
        )
    base, _ = split(checkpoint["state"])
    groups = checkpoint["param_groups"]
    # Keep the rho of a base optimizer that has one itself (Adadelta).
    radius = None if any(OWN_RHO in g for g in groups) else "rho"
    groups = [{k: v for k, v in g.items() if k != radius and not k.startswith(PREFIX)} for g in groups]
    return {"state": base, "param_groups": groups}


def mark(groups: Sequence[dict[str, Any]], state: MethodState) -> None:
    """Write what checkpoints store about the recipe into the base optimizer's param groups.

    The keys must exist from the start, because flattened distributed checkpoints look for the keys of the live groups.
    `save` fills in the values.
    """
    first, recipe = groups[0], state.recipe
    first[PREFIX + "version"], first[PREFIX + "recipe"] = VERSION, str(recipe)
    first[PREFIX + "parts"] = parts_of(recipe)
    first.setdefault(STEP, 0)
    for key in state.scalars:
        first.setdefault(PREFIX + key, unfilled(first["params"]))
    for group in groups:
        for key, value in recipe.radius.marks.items():
            group.setdefault(key, value)
    if recipe.is_random:
        first[RNG] = state.generator.cpu.get_state()


def save(base: torch.optim.Optimizer, store: MethodState) -> dict[str, Any]:
    """The base optimizer's checkpoint merged with the recipe's slots, or beside them if it is not in torch's form."""
    saved: dict[str, Any] = base.state_dict()
    if not _in_torchs_form(saved):
        numbers = itertools.count()
        groups = [{**_own_options(g), "params": [next(numbers) for _ in g["params"]]} for g in base.param_groups]
        saved = {BASE: saved, "state": {}, "param_groups": groups}
    saved["param_groups"] = [dict(g) for g in saved["param_groups"]]
    weights = [w for g in base.param_groups for w in g["params"]]
    ids = [i for g in saved["param_groups"] for i in g["params"]]
    if store.per_weight:
        saved["state"] = {k: dict(v) for k, v in saved["state"].items()}
        for i, w in zip(ids, weights, strict=True):
            if w.requires_grad or store.holds(w):
                saved["state"].setdefault(i, {}).update(store.of(w))
    for key, scalar in store.scalars.items():
        saved["param_groups"][0][PREFIX + key] = unfilled(weights) if scalar is None else scalar
    return saved


def _in_torchs_form(checkpoint: Mapping[str, Any]) -> bool:
    return "state" in checkpoint and "param_groups" in checkpoint


def _own_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a param group that flatmin has added."""
    return {k: v for k, v in group.items() if k == "rho" or k.startswith(PREFIX)}


def unfilled(weights: Sequence[Tensor]) -> Tensor:
    """NaN: stands in checkpoints for a scalar without a value, since distributed checkpoints need a tensor."""
    wide = {torch.float64, torch.complex128} & {w.dtype for w in weights}
    return torch.full((), math.nan, dtype=torch.float64 if wide else torch.float32, device=weights[0].device)


def load(base: torch.optim.Optimizer, store: MethodState, checkpoint: Mapping[str, Any]) -> None:
    """Load the result of `save`, or a plain checkpoint of the base, which clears the slots and leaves rho as it is.

    Ids may be numbers or names; weights are matched by their position in the groups.
    """
    if not _in_torchs_form(checkpoint):
        # A plain checkpoint of a base optimizer that is not in torch's form, or not a checkpoint at all.
        options = list(map(_own_options, base.param_groups))
        base.load_state_dict(dict(checkpoint))
        for group, kept in zip(base.param_groups, options, strict=True):
            group.update(kept)
        store.clear()
        return
    groups = [dict(g) for g in checkpoint["param_groups"]]
    if not groups:
        raise ValueError("the checkpoint has no param groups.")
    head = groups[0]
    state: Mapping[Any, Any] = checkpoint["state"]
    if PREFIX + "version" in head:
        _check_origin(head, store.recipe, store.remembers)
    else:
        state = _without_single_file(groups, state, base, store.recipe)
    base_state, own = split(state)
    ids = [i for g in groups for i in g["params"]]
    _check_shapes(store, dict(zip(ids, (w for g in base.param_groups for w in g["params"]), strict=False)), own)
    for new, old in zip(groups, base.param_groups, strict=False):
        for key in ("rho", OWN_RHO):
            if key in old:
                new.setdefault(key, old[key])
    scalars = {k: head.pop(PREFIX + k, None) for k in store.scalars}
    if BASE in checkpoint:
        base.load_state_dict(checkpoint[BASE])
        for new, group in zip(groups, base.param_groups, strict=True):
            group.update(_own_options(new))
    else:
        # The base optimizer casts floating-point state to each weight's dtype; flatmin's keeps the saved dtype.
        base.load_state_dict({**checkpoint, "state": base_state, "param_groups": groups})
    store.clear()
    weights = [w for g in base.param_groups for w in g["params"]]
    for i, w in zip(ids, weights, strict=True):
        if i in own:
            store.put(w, own[i])
    store.scalars.update(
        {k: v.clone() if isinstance(v, Tensor) and not v.isnan() else None for k, v in scalars.items()}
    )


def parts_of(recipe: Recipe) -> str:
    """The classes of all parts that differ from SAM's, as stored in checkpoints."""
    return ", ".join(f"{k}={type(part).__name__}" for k, part in recipe.parts.items() if part != DEFAULTS[k])


def _are_parts_of(text: str, recipe: Recipe) -> bool:
    """Whether this text is the result of `parts_of` for such a recipe, in this version or an earlier one."""
    classes = dict(one.partition("=")[::2] for one in text.split(", ") if one)
    classes = {current_word(kind): name for kind, name in classes.items()}
    parts = {kind: part for kind, part in recipe.parts.items() if part != DEFAULTS[kind]}
    return classes.keys() == parts.keys() and all(
        classes[kind] in (type(part).__name__, *part.former_names) for kind, part in parts.items()
    )


def _check_origin(head: Mapping[str, Any], recipe: Recipe, remembers: bool) -> None:
    """Raise ValueError for a checkpoint of another recipe, or one whose state was made with other parameters."""
    version = int(head[PREFIX + "version"])
    if version > VERSION:
        raise ValueError(
            f"the checkpoint has version {version}, but this flatmin reads versions up to {VERSION}; upgrade flatmin."
        )
    origin = str(head.get(PREFIX + "recipe"))
    name, given = _read_recipe(origin)
    changed = _changed(given, recipe)
    named = sorted(name.split("+")) == sorted(recipe.name.split("+"))
    parts = head.get(PREFIX + "parts")
    other = not named if parts is None else not _are_parts_of(parts, recipe)
    if other or (changed and (remembers or not named)) or given.keys() - recipe.parameters().keys():
        raise ValueError(
            f"the checkpoint is of recipe {origin}, but this optimizer runs {recipe}. Load "
            "flatmin.base_state_dict(checkpoint) to use the base optimizer's state only; rho is then this optimizer's, "
            "and the recipe starts without state."
        )
    if changed:
        warnings.warn(
            f"the checkpoint of {name} was made with {', '.join(f'{k}={given[k]}' for k in changed)}; this optimizer "
            f"continues with {', '.join(f'{k}={recipe.parameters()[k]!r}' for k in changed)}.",
            stacklevel=5,
        )


def _read_recipe(text: str) -> tuple[str, dict[str, str]]:
    """The name and the parameters (as text) of a recipe that was printed by `Recipe.__str__`."""
    name, _, inner = text.partition("(")
    words = re.split(rf"(?:^|, )((?:{'|'.join((*KINDS, *FORMER_KINDS))})\.\w+)=", inner.removesuffix(")"))
    return name, dict(zip(map(current_word, words[1::2]), words[2::2], strict=True))


def _changed(given: Mapping[str, str], recipe: Recipe) -> list[str]:
    """The parameters with other values in the checkpoint. Functions are ignored: they are printed by address."""
    own = recipe.parameters()
    return [k for k, text in given.items() if k in own and text != repr(own[k]) and not re.search(r" at 0x", text)]


def _check_shapes(store: MethodState, weights: Mapping[Any, Tensor], own: Mapping[Any, Mapping[str, Any]]) -> None:
    for place, (i, w) in enumerate(weights.items()):
        for key in store.per_weight:
            slot = filled_slot(own.get(i, {}), key)
            if (
                slot is None
                or slot.ndim != w.ndim
                or all(n in (1, m) for n, m in zip(slot.shape, w.shape, strict=True))
            ):
                continue
            raise ValueError(
                f"the checkpoint's {PREFIX}{key} of parameter {i if isinstance(i, str) else place} has shape "
                f"{tuple(slot.shape)}, but the parameter has {tuple(w.shape)}: it was saved for another model, or "
                "before the parameter was pruned or grown. Build the model as it was saved, or load "
                "flatmin.base_state_dict(checkpoint)."
            )


def _without_single_file(
    groups: list[dict[str, Any]], state: Mapping[Any, Any], base: torch.optim.Optimizer, recipe: Recipe
) -> Mapping[Any, Any]:
    """The state of a plain checkpoint without the entries of a single-file SAM; those in the groups are removed too."""
    adaptive = {bool(g.pop("adaptive")) for g in groups if "adaptive" in g and "adaptive" not in base.defaults}
    if adaptive and adaptive != {recipe.geometry.adaptive}:
        raise ValueError(
            f"the checkpoint is of a single-file SAM with adaptive={True in adaptive}, but this optimizer runs "
            f"{recipe}; build it with recipe={'asam' if True in adaptive else 'sam'!r}, or remove 'adaptive' from the "
            "checkpoint's groups."
        )
    if not any(isinstance(entries, Mapping) and _SINGLE_FILE & entries.keys() for entries in state.values()):
        return state
    kept = {i: {k: v for k, v in entries.items() if k not in _SINGLE_FILE} for i, entries in state.items()}
    rest = {i: entries for i, entries in kept.items() if entries}
    if not rest:
        warnings.warn(
            "the checkpoint is of a single-file SAM, which does not save the base optimizer's state (momentum, "
            "moments): the base optimizer starts without state, with the learning rate and rho of the checkpoint.",
            stacklevel=5,
        )
    return rest
