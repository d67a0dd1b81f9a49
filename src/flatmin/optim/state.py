"""The state of a method: the slots of its parts, and its random numbers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flatmin.methods import Recipe, State, former_word
from flatmin.optim import tensors as ta
from flatmin.optim.program import Generators

PREFIX = "flatmin."
STEP, RNG = PREFIX + "step", PREFIX + "rng"
DIAGNOSTICS, ASCENT = "diagnostics", "ascent"
_FILLED = ".filled"
_SORT = operator.attrgetter("shape", "dtype", "device")


class MethodState:
    """The slots of a recipe, one tensor for each weight ("param") or one tensor ("scalar"), and its random numbers.

    Slots are stored outside the base optimizer's state, because optimizers initialise the state of a tensor only if it
    is empty. Values that every checkpoint needs, distributed ones too, are in the base optimizer's first param group,
    under keys that begin with "flatmin.": the number of updates, and the random state of recipes that draw.

    The slots of a weight belong to this tensor in this shape. They are dropped if the weight leaves the param groups or
    changes its shape (pruning, densification); the weight is then treated like a new one. If the dtype or device of a
    weight changes, its slots follow. Scalar slots are kept in all these cases.

    Args:
        recipe: the recipe.
        seed: seed of the random numbers. Default 0.
        diagnoses: whether to store the last perturbation too, for `SAM.diagnostics`. Default False.

    Attributes:
        remembers: whether the recipe has any slots.
        generator: the random numbers that parts draw from.
        per_weight: key -> {weight: tensor}, for "param" slots.
        scalars: key -> tensor or None, for "scalar" slots.
        changes: how often the tensor of a slot has been replaced.
    """

    def __init__(self, recipe: Recipe, seed: int = 0, diagnoses: bool = False) -> None:
        self.generator = Generators(seed)
        self._seed, self._draws = seed, recipe.is_random
        self.per_weight: dict[str, dict[Tensor, Tensor]] = {}
        self.scalars: dict[str, Tensor | None] = {}
        self._kinds: dict[str, tuple[str, Mapping[str, str]]] = {}
        # A cache of the last lookup: the weights are usually the same in each step, and hashing them takes time.
        self._last: dict[str, tuple[Sequence[Tensor], list[Any], list[Tensor | None]]] = {}
        self._unlike: set[str] = set()  # slots whose tensors differ in shape from their weights
        self.recipe, self.changes = recipe, 0
        kinds = {kind: part.slots for kind, part in recipe.parts.items()}
        self.remembers = any(kinds.values())
        for kind, slots in (kinds | ({DIAGNOSTICS: {ASCENT: "param"}} if diagnoses else {})).items():
            # Checkpoints use the first names of the kinds.
            stored = former_word(kind)
            self._kinds[kind] = stored, slots
            for slot, shape in slots.items():
                if shape == "param":
                    self.per_weight[f"{stored}.{slot}"] = {}
                else:
                    self.scalars[f"{stored}.{slot}"] = None

    def __bool__(self) -> bool:
        return bool(self.per_weight or self.scalars)

    # -- values in the param groups ------------------------------------------------------------------------------

    def note(self, groups: Sequence[dict[str, Any]]) -> None:
        """Store the random state and the values that the radius rule remembers in the param groups."""
        if self._draws:
            groups[0][RNG] = self.generator.cpu.get_state()
        radius = self.recipe.radius
        if radius.remembers:
            for group in groups:
                group.update(radius.remember(group))

    def rewind(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Reset the random state to that after the last update, or of the loaded checkpoint."""
        rng = groups[0].get(RNG)
        if isinstance(rng, Tensor):
            self.generator.cpu.set_state(rng.to("cpu", torch.uint8))

    def restart(self, groups: Sequence[dict[str, Any]]) -> None:
        """Set the random state to that in a checkpoint's param groups, or start again from the seed."""
        self.generator = Generators(self._seed)
        self.rewind(groups)

    # -- slots ---------------------------------------------------------------------------------------------------

    def read(self, kind: str, weights: Sequence[Tensor]) -> State:
        values: dict[str, Any] = {}
        stored, slots = self._kinds[kind]
        for slot, shape in slots.items():
            key = f"{stored}.{slot}"
            values[slot] = list(self._slots(key, weights)) if shape == "param" else self.scalars[key]
        return values

    def _slots(self, key: str, weights: Sequence[Tensor]) -> list[Tensor | None]:
        cached, sorts, values = self._last.get(key, ((), [], []))
        now = list(map(_SORT, weights))
        if now != sorts or not all(map(operator.is_, cached, weights)):
            before = dict(zip(cached, sorts, strict=True))
            values = [self.current(key, w, before.get(w)) for w in weights]
            self._last[key] = weights, now, values
        return values

    def keys(self, kind: str) -> dict[str, str]:
        """The slots of the part of this kind, with their keys in `per_weight` or `scalars`."""
        stored, slots = self._kinds[kind]
        return {slot: f"{stored}.{slot}" for slot in slots}

    def replace(self, key: str, weights: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        """Let these tensors be a slot of the weights."""
        self.per_weight[key].update(zip(weights, tensors, strict=True))
        self._last.pop(key, None)
        self.changes += 1

    def current(self, key: str, weight: Tensor, before: Any) -> Tensor | None:
        """A weight's slot, adapted to the weight. `before`: its shape, dtype and device at the last lookup, if any."""
        slots = self.per_weight[key]
        slot = slots.get(weight)
        if slot is None:
            return None
        shape, dtype, device = before or _SORT(weight)
        if shape != weight.shape or not (slot.shape == weight.shape or key in self._unlike):
            del slots[weight]
            return None
        changes: dict[str, Any] = {}
        if slot.dtype == dtype != weight.dtype:
            changes["dtype"] = weight.dtype
        if slot.device == device != weight.device:
            changes["device"] = weight.device
        if changes:
            slots[weight] = slot = slot.to(**changes)
        return slot

    def commit(self, kind: str, weights: Sequence[Tensor], new: Mapping[str, Any], gate: Tensor | None) -> None:
        """Store staged state, in place where the slot exists. With a gate, only if it is 1, decided on the device."""
        stored, _ = self._kinds[kind]
        for slot, value in new.items():
            key = f"{stored}.{slot}"
            if key in self.scalars:
                old = self.scalars[key]
                self.scalars[key] = value if gate is None or old is None else torch.where(gate.bool(), value, old)
                continue
            if len(value) != len(weights):
                raise RuntimeError(f"{key}: {len(value)} tensors returned for {len(weights)} weights.")
            if fresh := overwrite(self._slots(key, weights), value, gate):
                if any(value[i].shape != weights[i].shape for i in fresh):
                    self._unlike.add(key)
                self.replace(key, [weights[i] for i in fresh], [value[i].detach().clone() for i in fresh])

    def holds(self, weight: Tensor) -> bool:
        """Whether there is a slot for a weight, which may have been frozen since."""
        return any(weight in slots for slots in self.per_weight.values())

    def of(self, weight: Tensor) -> dict[str, Any]:
        """A weight's slots in the form of checkpoints: slots without a value are zeros with filled = 0."""
        entries: dict[str, Any] = {}
        for key in self.per_weight:
            tensor = self.current(key, weight, None)
            entries[PREFIX + key] = torch.zeros_like(weight, requires_grad=False) if tensor is None else tensor
            entries[PREFIX + key + _FILLED] = torch.tensor(0.0 if tensor is None else 1.0)
        return entries

    def put(self, weight: Tensor, entries: Mapping[str, Any], *, moved: bool = False) -> None:
        """Load a weight's slots from the entries of a checkpoint, in the saved dtype.

        `moved`: the entries may belong to another weight that this one replaces; slots of another shape are then left
        out.
        """
        self._last.clear()
        self.changes += 1
        for key, slots in self.per_weight.items():
            tensor = filled_slot(entries, key)
            if tensor is not None and tensor.shape != weight.shape:
                if moved and key not in self._unlike:
                    tensor = None
                else:
                    self._unlike.add(key)
            if tensor is None:
                slots.pop(weight, None)
            else:
                slots[weight] = tensor.detach().clone().to(weight.device)

    def keep_only(self, weights: Iterable[Tensor]) -> None:
        """Drop the slots of all other weights. Call it when the param groups have changed."""
        live = set(weights)
        self._last.clear()
        self.changes += 1
        for slots in self.per_weight.values():
            for gone in [w for w in slots if w not in live]:
                del slots[gone]

    def dump(self, weights: Sequence[Tensor]) -> dict[str, Any]:
        """The whole state, for copies and pickles; slots in the order of the weights."""
        slots = [self.of(w) for w in weights]
        return {"slots": slots, "scalars": self.scalars, "rng": self.generator.cpu.get_state()}

    def restore(self, weights: Sequence[Tensor], dumped: Mapping[str, Any]) -> None:
        """Load the result of `dump` for these weights."""
        self.generator.cpu.set_state(dumped["rng"])
        self.scalars.update(dumped["scalars"])
        for w, entries in zip(weights, dumped["slots"], strict=True):
            self.put(w, entries)

    def clear(self) -> None:
        """Drop the values of all slots."""
        self._last.clear()
        self.changes += 1
        for slots in self.per_weight.values():
            slots.clear()
        self.scalars = dict.fromkeys(self.scalars)


def overwrite(held: Sequence[Tensor | None], new: Sequence[Tensor], gate: Tensor | None) -> list[int]:
    """Write new values of a slot into the tensors that hold it; with a gate, only if it is 1, decided on the device.

    Returns:
        The positions for which a tensor must be made, because there is none yet.
    """
    # A part may return the tensors that it was given.
    changed = [(s, v) for s, v in zip(held, new, strict=True) if s is not None and s is not v]
    if changed:
        into, source = map(list, zip(*changed, strict=True))
        ta.copy_(into, source) if gate is None else ta.choose_(into, source, gate)
    fresh = [i for i, s in enumerate(held) if s is None]
    # The first value of a slot has no old value to keep, so the gate is read on the host, once.
    return fresh if fresh and (gate is None or bool(gate)) else []


def filled_slot(entries: Mapping[str, Any], key: str) -> Tensor | None:
    """A slot among a weight's entries in a checkpoint; None if it is missing or has no value."""
    tensor: Tensor | None = entries.get(PREFIX + key)
    return tensor if tensor is not None and float(entries.get(PREFIX + key + _FILLED, 1.0)) else None


class StateView(MutableMapping[Tensor, dict[str, Any]]):
    """The base optimizer's state and the slots as one mapping; writes change the one they belong to.

    A weight may be assigned the entries of the weight that it replaces. Slots of another shape are left out, so that
    the recipe treats it like a new weight.
    """

    def __init__(self, base: torch.optim.Optimizer, state: MethodState) -> None:
        self._base, self._state = base, state

    def _weights(self) -> dict[Tensor, None]:
        held = dict.fromkeys(w for slots in self._state.per_weight.values() for w in slots)
        return {**dict.fromkeys(self._base.state), **held}

    def __getitem__(self, weight: Tensor) -> dict[str, Any]:
        if weight not in self:
            raise KeyError(weight)
        return _Entries(self, weight, {**self._base.state.get(weight, {}), **self._state.of(weight)})

    def __setitem__(self, weight: Tensor, entries: dict[str, Any]) -> None:
        self._base.state[weight] = {k: v for k, v in entries.items() if not str(k).startswith(PREFIX)}
        self._state.put(weight, entries, moved=True)

    def __delitem__(self, weight: Tensor) -> None:
        if weight not in self:
            raise KeyError(weight)
        self._base.state.pop(weight, None)
        self._state.put(weight, {})

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._weights())

    def __len__(self) -> int:
        return len(self._weights())

    def __bool__(self) -> bool:
        # Distributed checkpoints initialise an optimizer whose state is empty, which the base optimizer needs.
        return bool(self._base.state)

    def __contains__(self, weight: object) -> bool:
        return isinstance(weight, Tensor) and (weight in self._base.state or self._state.holds(weight))


def _writing(change: Callable[..., Any]) -> Callable[..., Any]:
    """A method of dict that also writes the changed entries to the optimizer's state."""

    def changing(self: _Entries, *args: Any, **kwargs: Any) -> Any:
        result = change(self, *args, **kwargs)
        # Do not add a weight again that has been replaced.
        if self._weight in self._view:
            self._view[self._weight] = self
        return result

    return changing


class _Entries(dict[str, Any]):
    """A weight's entries. Changing them changes the optimizer's state, as in torch."""

    def __init__(self, view: StateView, weight: Tensor, entries: Mapping[str, Any]) -> None:
        super().__init__(entries)
        self._view, self._weight = view, weight

    __setitem__ = _writing(dict.__setitem__)
    __delitem__ = _writing(dict.__delitem__)
    __ior__ = _writing(dict.__ior__)
    update = _writing(dict.update)
    setdefault = _writing(dict.setdefault)
    pop = _writing(dict.pop)
    popitem = _writing(dict.popitem)
    clear = _writing(dict.clear)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)
