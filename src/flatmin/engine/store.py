"""What parts remember between steps, and how it travels in checkpoints."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flatmin.engine import tensors as ta
from flatmin.engine.base import OWN_RHO
from flatmin.parts import State
from flatmin.recipes import Recipe

PREFIX = "flatmin."
VERSION = 1
DIAGNOSTICS, ASCENT = "diagnostics", "ascent"
_FILLED = ".filled"


class Store:
    """The slots of a recipe: one tensor per weight ("param") or one in all ("scalar").

    Kept outside the base's state, because optimizers initialise a tensor's state where it is empty.

    Args:
        recipe: whose parts remember.
        diagnoses: whether the last ascent is remembered as well, for `SAM.diagnostics`. Default False.

    Attributes:
        remembers: whether the recipe itself remembers anything.
    """

    def __init__(self, recipe: Recipe, diagnoses: bool = False) -> None:
        self.per_weight: dict[str, dict[Tensor, Tensor]] = {}
        self.scalars: dict[str, Tensor | None] = {}
        self._kinds: dict[str, Mapping[str, str]] = {}
        # The last answer of each slot: weights are the same ones step after step, and hashing each costs.
        self._last: dict[str, tuple[Sequence[Tensor], list[Tensor | None]]] = {}
        self._joined: dict[str, ta.Joined] = {}  # the slots that lie in a few large tensors
        kinds = {kind: part.slots for kind, part in recipe.parts.items()}
        self.remembers = any(kinds.values())
        for kind, slots in (kinds | ({DIAGNOSTICS: {ASCENT: "param"}} if diagnoses else {})).items():
            self._kinds[kind] = slots
            for slot, shape in slots.items():
                if shape == "param":
                    self.per_weight[f"{kind}.{slot}"] = {}
                else:
                    self.scalars[f"{kind}.{slot}"] = None

    def __bool__(self) -> bool:
        return bool(self.per_weight or self.scalars)

    def read(self, kind: str, weights: Sequence[Tensor]) -> State:
        found: dict[str, Any] = {}
        for slot, shape in self._kinds[kind].items():
            key = f"{kind}.{slot}"
            found[slot] = list(self._slots(key, weights)) if shape == "param" else self.scalars[key]
        return found

    def _slots(self, key: str, weights: Sequence[Tensor]) -> list[Tensor | None]:
        known, values = self._last.get(key, ((), []))
        if len(known) != len(weights) or not all(map(operator.is_, known, weights)):
            tensors = self.per_weight[key]
            known, values = weights, [tensors.get(w) for w in weights]
            self._last[key] = known, values
        return values

    def commit(
        self,
        kind: str,
        weights: Sequence[Tensor],
        new: Mapping[str, Any],
        gate: Tensor | None,
        layout: ta.Layout | None = None,
    ) -> None:
        """Keep staged state, in place where the slot exists; with a gate, only where it is 1, decided on the device.

        `layout`: that of the weights; state of all of them then lies in a few large tensors where that pays.
        """
        for slot, value in new.items():
            key = f"{kind}.{slot}"
            if key in self.scalars:
                old = self.scalars[key]
                self.scalars[key] = value if gate is None or old is None else torch.where(gate.bool(), value, old)
                continue
            slots = self.per_weight[key]
            if len(value) != len(weights):
                raise RuntimeError(f"{key}: {len(value)} tensors returned for {len(weights)} weights.")
            if layout is not None and gate is None and len(value) == len(layout.weights):
                mine = self._joined.get(key)
                if mine is not None and mine.layout is layout:
                    if any(map(operator.is_, value, mine)):
                        ta.copy_(mine, value)  # a part gave back what it had been shown
                    else:
                        layout.join_into(mine.whole, value)
                    continue
                alike = all(v.shape == w.shape for v, w in zip(value, weights, strict=True))
                if alike and (whole := layout.joined(value)) is not None:
                    self._joined[key] = mine = ta.Joined(layout, whole)
                    slots.update(zip(weights, mine, strict=True))
                    self._last.pop(key, None)
                    continue
            old_ones = self._slots(key, weights)
            into = [s for s in old_ones if s is not None]
            if into:
                source = [v for s, v in zip(old_ones, value, strict=True) if s is not None]
                ta.copy_(into, source) if gate is None else ta.choose_(into, source, gate)
            fresh = [(w, v) for w, s, v in zip(weights, old_ones, value, strict=True) if s is None]
            # A tensor's first state has nothing to fall back on: the verdict is read on the host, once.
            if fresh and (gate is None or bool(gate)):
                slots.update({w: v.detach().clone() for w, v in fresh})
                self._last.pop(key, None)

    def holds(self, weight: Tensor) -> bool:
        """Whether anything is remembered of a weight, which may have been frozen since."""
        return any(weight in slots for slots in self.per_weight.values())

    def of(self, weight: Tensor) -> dict[str, Any]:
        """A weight's slots as checkpoints hold them: unfilled ones appear as zeros with filled = 0."""
        found: dict[str, Any] = {}
        for key, slots in self.per_weight.items():
            tensor = slots.get(weight)
            found[PREFIX + key] = torch.zeros_like(weight, requires_grad=False) if tensor is None else tensor
            found[PREFIX + key + _FILLED] = torch.tensor(0.0 if tensor is None else 1.0)
        return found

    def put(self, weight: Tensor, entries: Mapping[str, Any]) -> None:
        """Take a weight's slots from a checkpoint, in the dtype they were saved in."""
        self._last.clear()
        self._joined.clear()
        for key, slots in self.per_weight.items():
            tensor = entries.get(PREFIX + key)
            if tensor is None or not float(entries.get(PREFIX + key + _FILLED, 1.0)):
                slots.pop(weight, None)
            else:
                slots[weight] = tensor.detach().clone().to(weight.device)

    def clear(self) -> None:
        self._last.clear()
        self._joined.clear()
        for slots in self.per_weight.values():
            slots.clear()
        self.scalars = dict.fromkeys(self.scalars)


class StateView(MutableMapping[Tensor, dict[str, Any]]):
    """Base state and slots as one mapping; writes go to where they belong."""

    def __init__(self, base: torch.optim.Optimizer, store: Store) -> None:
        self._base, self._store = base, store

    def _weights(self) -> dict[Tensor, None]:
        weights = (w for g in self._base.param_groups for w in g["params"])
        listed = {w: None for w in weights if w.requires_grad or self._store.holds(w)}
        return {**dict.fromkeys(self._base.state), **(listed if self._store.per_weight else {})}

    def __getitem__(self, weight: Tensor) -> dict[str, Any]:
        return {**self._base.state.get(weight, {}), **self._store.of(weight)}

    def __setitem__(self, weight: Tensor, entries: dict[str, Any]) -> None:
        self._base.state[weight] = {k: v for k, v in entries.items() if not str(k).startswith(PREFIX)}
        self._store.put(weight, entries)

    def __delitem__(self, weight: Tensor) -> None:
        del self._base.state[weight]
        self._store.put(weight, {})

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._weights())

    def __len__(self) -> int:
        return len(self._weights())

    def __bool__(self) -> bool:
        # Distributed checkpoints initialise an optimizer whose state is false, and the base needs that.
        return bool(self._base.state)

    def __contains__(self, weight: object) -> bool:
        return weight in self._weights()


def split(state: Mapping[Any, Any]) -> tuple[dict[Any, Any], dict[Any, dict[str, Any]]]:
    """A checkpoint's "state" as (the base's, ours), both by the checkpoint's own ids."""
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
    """A checkpoint of this library as a plain checkpoint of the base optimizer.

    Args:
        checkpoint: what `optimizer.state_dict()` returned.

    Returns:
        {"state", "param_groups"} without rho and without what the recipe remembered.
    """
    base, _ = split(checkpoint["state"])
    groups = checkpoint["param_groups"]
    # The rho of a base that has one of its own (Adadelta) stays.
    radius = None if any(OWN_RHO in g for g in groups) else "rho"
    groups = [{k: v for k, v in g.items() if k != radius and not k.startswith(PREFIX)} for g in groups]
    return {"state": base, "param_groups": groups}


def save(base: torch.optim.Optimizer, store: Store) -> dict[str, Any]:
    """The base's checkpoint with the slots merged in."""
    saved: dict[str, Any] = base.state_dict()
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


def unfilled(weights: Sequence[Tensor]) -> Tensor:
    """How a scalar that has no value yet stands in a checkpoint: distributed ones load tensors into tensors."""
    wide = {torch.float64, torch.complex128} & {w.dtype for w in weights}
    return torch.full((), math.nan, dtype=torch.float64 if wide else torch.float32, device=weights[0].device)


def load(base: torch.optim.Optimizer, store: Store, recipe: str, checkpoint: Mapping[str, Any]) -> None:
    """Load what `save` returned, or a plain checkpoint of the base, which leaves the slots empty and rho as it is.

    Ids may be numbers or names: weights are matched by their place in the groups.
    """
    groups = [dict(g) for g in checkpoint["param_groups"]]
    if not groups:
        raise ValueError("the checkpoint has no param groups.")
    head = groups[0]
    if PREFIX + "version" in head:
        _check_origin(head, store, recipe)
    base_state, own = split(checkpoint["state"])
    for new, old in zip(groups, base.param_groups, strict=False):
        for key in ("rho", OWN_RHO):
            if key in old:
                new.setdefault(key, old[key])
    scalars = {k: head.pop(PREFIX + k, None) for k in store.scalars}
    ids = [i for g in groups for i in g["params"]]
    # The base casts floating state to each weight's dtype; ours keeps the dtype it was saved in.
    base.load_state_dict({**checkpoint, "state": base_state, "param_groups": groups})
    store.clear()
    weights = [w for g in base.param_groups for w in g["params"]]
    for i, w in zip(ids, weights, strict=True):
        if i in own:
            store.put(w, own[i])
    store.scalars.update(
        {k: v.clone() if isinstance(v, Tensor) and not v.isnan() else None for k, v in scalars.items()}
    )


def _check_origin(head: Mapping[str, Any], store: Store, recipe: str) -> None:
    version, origin = int(head[PREFIX + "version"]), head.get(PREFIX + "recipe")
    if version > VERSION:
        raise ValueError(f"the checkpoint is of version {version}; this flatmin reads up to {VERSION}: upgrade it.")
    if origin != recipe and store.remembers:
        raise ValueError(
            f"the checkpoint is of recipe {origin}, this optimizer runs {recipe}; "
            "load flatmin.base_state_dict(checkpoint) to keep the base's state only."
        )
