"""What a method remembers: its parts' slots, and its random numbers."""

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
    """The slots of a recipe, one tensor per weight ("param") or one in all ("scalar"), and its random numbers.

    Slots are kept outside the base's state, because optimizers initialise a tensor's state where it is empty. Numbers
    that every checkpoint must hold, distributed ones too, lie in the base's first param group, under keys "flatmin.":
    the number of updates, and the state of the generator of recipes that draw.

    What is remembered of a weight belongs to that tensor in that shape. It is forgotten when the weight leaves the
    param groups and when the weight's shape changes (pruning, densification): the tensor then begins anew, as one that
    has had no gradient yet. A change of dtype or device is followed. Scalars stay.

    Args:
        recipe: whose parts remember.
        seed: of the random numbers. Default 0.
        diagnoses: whether the last ascent is remembered as well, for `SAM.diagnostics`. Default False.

    Attributes:
        remembers: whether the recipe itself remembers anything.
        generator: the random numbers that parts draw from.
    """

    def __init__(self, recipe: Recipe, seed: int = 0, diagnoses: bool = False) -> None:
        self.generator = Generators(seed)
        self._seed, self._draws = seed, recipe.is_random
        self.per_weight: dict[str, dict[Tensor, Tensor]] = {}
        self.scalars: dict[str, Tensor | None] = {}
        self._kinds: dict[str, tuple[str, Mapping[str, str]]] = {}
        # The last answer of each slot: weights are the same ones step after step, and hashing each costs.
        self._last: dict[str, tuple[Sequence[Tensor], list[Any], list[Tensor | None]]] = {}
        self._unlike: set[str] = set()  # slots whose tensors are not shaped like their weights
        self.recipe = recipe
        kinds = {kind: part.slots for kind, part in recipe.parts.items()}
        self.remembers = any(kinds.values())
        for kind, slots in (kinds | ({DIAGNOSTICS: {ASCENT: "param"}} if diagnoses else {})).items():
            # Checkpoints have the words of their first version.
            stored = former_word(kind)
            self._kinds[kind] = stored, slots
            for slot, shape in slots.items():
                if shape == "param":
                    self.per_weight[f"{stored}.{slot}"] = {}
                else:
                    self.scalars[f"{stored}.{slot}"] = None

    def __bool__(self) -> bool:
        return bool(self.per_weight or self.scalars)

    # -- what lies in the first param group ----------------------------------------------------------------------

    def note(self, groups: Sequence[dict[str, Any]]) -> None:
        """Keep the state of the generator, and let the radius note what it has learned."""
        if self._draws:
            groups[0][RNG] = self.generator.cpu.get_state()
        radius = self.recipe.radius
        if radius.remembers:
            for group in groups:
                group.update(radius.remember(group))

    def rewind(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Take back the random draws since the last update that ended, or since a checkpoint was loaded."""
        rng = groups[0].get(RNG)
        if isinstance(rng, Tensor):
            self.generator.cpu.set_state(rng.to("cpu", torch.uint8))

    def restart(self, groups: Sequence[dict[str, Any]]) -> None:
        """Draw on from where the groups of a checkpoint say, or from the seed."""
        self.generator = Generators(self._seed)
        self.rewind(groups)

    # -- slots ---------------------------------------------------------------------------------------------------

    def read(self, kind: str, weights: Sequence[Tensor]) -> State:
        found: dict[str, Any] = {}
        stored, slots = self._kinds[kind]
        for slot, shape in slots.items():
            key = f"{stored}.{slot}"
            found[slot] = list(self._slots(key, weights)) if shape == "param" else self.scalars[key]
        return found

    def _slots(self, key: str, weights: Sequence[Tensor]) -> list[Tensor | None]:
        known, sorts, values = self._last.get(key, ((), [], []))
        now = list(map(_SORT, weights))
        if now != sorts or not all(map(operator.is_, known, weights)):
            before = dict(zip(known, sorts, strict=True))
            values = [self._current(key, w, before.get(w)) for w in weights]
            self._last[key] = weights, now, values
        return values

    def _current(self, key: str, weight: Tensor, before: Any) -> Tensor | None:
        """A weight's slot as it fits the weight now; `before`: shape, dtype and device at the last look, if known."""
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
        """Keep staged state, in place where the slot exists; with a gate, only where it is 1, decided on the device."""
        stored, _ = self._kinds[kind]
        for slot, value in new.items():
            key = f"{stored}.{slot}"
            if key in self.scalars:
                old = self.scalars[key]
                self.scalars[key] = value if gate is None or old is None else torch.where(gate.bool(), value, old)
                continue
            slots = self.per_weight[key]
            if len(value) != len(weights):
                raise RuntimeError(f"{key}: {len(value)} tensors returned for {len(weights)} weights.")
            old_ones = self._slots(key, weights)
            # A part may hand back the very tensors that it was given.
            changed = [(s, v) for s, v in zip(old_ones, value, strict=True) if s is not None and s is not v]
            if changed:
                into, source = map(list, zip(*changed, strict=True))
                ta.copy_(into, source) if gate is None else ta.choose_(into, source, gate)
            fresh = [(w, v) for w, s, v in zip(weights, old_ones, value, strict=True) if s is None]
            # A tensor's first state has nothing to fall back on: the verdict is read on the host, once.
            if fresh and (gate is None or bool(gate)):
                if any(v.shape != w.shape for w, v in fresh):
                    self._unlike.add(key)
                slots.update({w: v.detach().clone() for w, v in fresh})
                self._last.pop(key, None)

    def holds(self, weight: Tensor) -> bool:
        """Whether anything is remembered of a weight, which may have been frozen since."""
        return any(weight in slots for slots in self.per_weight.values())

    def of(self, weight: Tensor) -> dict[str, Any]:
        """A weight's slots as checkpoints hold them: unfilled ones appear as zeros with filled = 0."""
        found: dict[str, Any] = {}
        for key in self.per_weight:
            tensor = self._current(key, weight, None)
            found[PREFIX + key] = torch.zeros_like(weight, requires_grad=False) if tensor is None else tensor
            found[PREFIX + key + _FILLED] = torch.tensor(0.0 if tensor is None else 1.0)
        return found

    def put(self, weight: Tensor, entries: Mapping[str, Any], *, moved: bool = False) -> None:
        """Take a weight's slots from a checkpoint, in the dtype they were saved in.

        `moved`: the entries may be those of another weight, whose place this one has taken; what has another shape is
        then left out.
        """
        self._last.clear()
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
        """Forget what is remembered of all other weights; to be called when the param groups have changed."""
        live = set(weights)
        self._last.clear()
        for slots in self.per_weight.values():
            for gone in [w for w in slots if w not in live]:
                del slots[gone]

    def dump(self, weights: Sequence[Tensor]) -> dict[str, Any]:
        """All of it, for copies and pickles; slots by the place of their weight."""
        slots = [self.of(w) for w in weights]
        return {"slots": slots, "scalars": self.scalars, "rng": self.generator.cpu.get_state()}

    def restore(self, weights: Sequence[Tensor], dumped: Mapping[str, Any]) -> None:
        """Take what `dump` gave, for these weights."""
        self.generator.cpu.set_state(dumped["rng"])
        self.scalars.update(dumped["scalars"])
        for w, entries in zip(weights, dumped["slots"], strict=True):
            self.put(w, entries)

    def clear(self) -> None:
        """Forget all slots."""
        self._last.clear()
        for slots in self.per_weight.values():
            slots.clear()
        self.scalars = dict.fromkeys(self.scalars)


def filled_slot(entries: Mapping[str, Any], key: str) -> Tensor | None:
    """A slot among a weight's entries in a checkpoint; None if it is not there or had no value yet."""
    tensor: Tensor | None = entries.get(PREFIX + key)
    return tensor if tensor is not None and float(entries.get(PREFIX + key + _FILLED, 1.0)) else None


class StateView(MutableMapping[Tensor, dict[str, Any]]):
    """Base state and slots as one mapping; writes go to where they belong.

    A weight may be given the entries of the weight that it replaces; slots of another shape are left out, so that the
    recipe's memory of it begins anew.
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
        # Distributed checkpoints initialise an optimizer whose state is false, and the base needs that.
        return bool(self._base.state)

    def __contains__(self, weight: object) -> bool:
        return isinstance(weight, Tensor) and (weight in self._base.state or self._state.holds(weight))


def _writing(change: Callable[..., Any]) -> Callable[..., Any]:
    """A method of dict, after which the entries are written to where they belong."""

    def changing(self: _Entries, *args: Any, **kwargs: Any) -> Any:
        result = change(self, *args, **kwargs)
        # A weight that has been replaced does not come back.
        if self._weight in self._view:
            self._view[self._weight] = self
        return result

    return changing


class _Entries(dict[str, Any]):
    """A weight's entries; a change of them is a change of the optimizer's state, as it is in torch."""

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
