"""What parts remember between steps, and how it travels in checkpoints."""

from __future__ import annotations

import itertools
import math
import operator
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flatmin.engine import tensors as ta
from flatmin.engine.base import OWN_RHO
from flatmin.parts import KINDS, Adaptive, State
from flatmin.recipe import DEFAULTS, Recipe

PREFIX = "flatmin."
VERSION = 1
BASE = "flatmin.base"  # where a base's checkpoint stands that has a form of its own
DIAGNOSTICS, ASCENT = "diagnostics", "ascent"
_FILLED = ".filled"
_SORT = operator.attrgetter("shape", "dtype", "device")
# What the single-file implementations of SAM put into each weight's state.
_SINGLE_FILE = frozenset({"old_p", "old_g", "e_w"})


class Store:
    """The slots of a recipe: one tensor per weight ("param") or one in all ("scalar").

    Kept outside the base's state, because optimizers initialise a tensor's state where it is empty.

    What is remembered of a weight belongs to that tensor in that shape. It is forgotten when the weight leaves the
    param groups and when the weight's shape changes (pruning, densification): the tensor then begins anew, as one that
    has had no gradient yet. A change of dtype or device is followed. Scalars stay.

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
        self._last: dict[str, tuple[Sequence[Tensor], list[Any], list[Tensor | None]]] = {}
        self._unlike: set[str] = set()  # slots whose tensors are not shaped like their weights
        self._joined: dict[str, ta.Joined] = {}  # the slots that lie in a few large tensors
        self.recipe = recipe
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
            self._joined.pop(key, None)
            return None
        changes: dict[str, Any] = {}
        if slot.dtype == dtype != weight.dtype:
            changes["dtype"] = weight.dtype
        if slot.device == device != weight.device:
            changes["device"] = weight.device
        if changes:
            slots[weight] = slot = slot.to(**changes)
            self._joined.pop(key, None)
        return slot

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
        self._joined.clear()
        for key, slots in self.per_weight.items():
            tensor = _filled(entries, key)
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
        self._joined.clear()
        for slots in self.per_weight.values():
            for gone in [w for w in slots if w not in live]:
                del slots[gone]

    def clear(self) -> None:
        self._last.clear()
        self._joined.clear()
        for slots in self.per_weight.values():
            slots.clear()
        self.scalars = dict.fromkeys(self.scalars)


def _filled(entries: Mapping[str, Any], key: str) -> Tensor | None:
    """A slot among a weight's entries in a checkpoint; None if it is not there or had no value yet."""
    tensor: Tensor | None = entries.get(PREFIX + key)
    return tensor if tensor is not None and float(entries.get(PREFIX + key + _FILLED, 1.0)) else None


class StateView(MutableMapping[Tensor, dict[str, Any]]):
    """Base state and slots as one mapping; writes go to where they belong.

    A weight may be given the entries of the weight that it replaces; slots of another shape are left out, so that the
    recipe's memory of it begins anew.
    """

    def __init__(self, base: torch.optim.Optimizer, store: Store) -> None:
        self._base, self._store = base, store

    def _weights(self) -> dict[Tensor, None]:
        held = dict.fromkeys(w for slots in self._store.per_weight.values() for w in slots)
        return {**dict.fromkeys(self._base.state), **held}

    def __getitem__(self, weight: Tensor) -> dict[str, Any]:
        if weight not in self:
            raise KeyError(weight)
        return _Entries(self, weight, {**self._base.state.get(weight, {}), **self._store.of(weight)})

    def __setitem__(self, weight: Tensor, entries: dict[str, Any]) -> None:
        self._base.state[weight] = {k: v for k, v in entries.items() if not str(k).startswith(PREFIX)}
        self._store.put(weight, entries, moved=True)

    def __delitem__(self, weight: Tensor) -> None:
        if weight not in self:
            raise KeyError(weight)
        self._base.state.pop(weight, None)
        self._store.put(weight, {})

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._weights())

    def __len__(self) -> int:
        return len(self._weights())

    def __bool__(self) -> bool:
        # Distributed checkpoints initialise an optimizer whose state is false, and the base needs that.
        return bool(self._base.state)

    def __contains__(self, weight: object) -> bool:
        return isinstance(weight, Tensor) and (weight in self._base.state or self._store.holds(weight))


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
        {"state", "param_groups"} without rho and without what the recipe remembered; of a base whose `state_dict` has a
        form of its own, just that.
    """
    if BASE in checkpoint:
        return dict(checkpoint[BASE])
    base, _ = split(checkpoint["state"])
    groups = checkpoint["param_groups"]
    # The rho of a base that has one of its own (Adadelta) stays.
    radius = None if any(OWN_RHO in g for g in groups) else "rho"
    groups = [{k: v for k, v in g.items() if k != radius and not k.startswith(PREFIX)} for g in groups]
    return {"state": base, "param_groups": groups}


def save(base: torch.optim.Optimizer, store: Store) -> dict[str, Any]:
    """The base's checkpoint with the slots merged in; beside them, if it has a form of its own."""
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
    """What the wrapper has put into a group."""
    return {k: v for k, v in group.items() if k == "rho" or k.startswith(PREFIX)}


def unfilled(weights: Sequence[Tensor]) -> Tensor:
    """How a scalar that has no value yet stands in a checkpoint: distributed ones load tensors into tensors."""
    wide = {torch.float64, torch.complex128} & {w.dtype for w in weights}
    return torch.full((), math.nan, dtype=torch.float64 if wide else torch.float32, device=weights[0].device)


def load(base: torch.optim.Optimizer, store: Store, checkpoint: Mapping[str, Any]) -> None:
    """Load what `save` returned, or a plain checkpoint of the base, which leaves the slots empty and rho as it is.

    Ids may be numbers or names: weights are matched by their place in the groups.
    """
    if not _in_torchs_form(checkpoint):
        # A plain checkpoint of a base with a form of its own, or nothing that anybody could load.
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
    state = checkpoint["state"]
    if PREFIX + "version" in head:
        _check_origin(head, store.recipe, store.remembers)
    elif "adaptive" in head and "adaptive" not in base.param_groups[0]:
        state = _of_single_file(groups, state, store.recipe)
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


def parts_of(recipe: Recipe) -> str:
    """The classes of a recipe's parts, those of SAM left out, as checkpoints tell them."""
    return ", ".join(f"{k}={type(part).__name__}" for k, part in recipe.parts.items() if part != DEFAULTS[k])


def _check_origin(head: Mapping[str, Any], recipe: Recipe, remembers: bool) -> None:
    """Refuse a checkpoint of another recipe, or one whose memory was made with other parameters."""
    version = int(head[PREFIX + "version"])
    if version > VERSION:
        raise ValueError(f"the checkpoint is of version {version}; this flatmin reads up to {VERSION}: upgrade it.")
    origin = str(head.get(PREFIX + "recipe"))
    name, given = _read_recipe(origin)
    changed = _changed(given, recipe)
    named = sorted(name.split("+")) == sorted(recipe.name.split("+"))
    parts = head.get(PREFIX + "parts")
    other = not named if parts is None else parts != parts_of(recipe)
    if other or (changed and (remembers or not named)) or given.keys() - recipe.parameters().keys():
        raise ValueError(
            f"the checkpoint is of recipe {origin}, this optimizer runs {recipe}; "
            "load flatmin.base_state_dict(checkpoint) to keep the base's state only: rho is then the one given here, "
            "and the recipe begins anew."
        )
    if changed:
        warnings.warn(
            f"the checkpoint of {name} was made with {', '.join(f'{k}={given[k]}' for k in changed)}; this optimizer "
            f"goes on with {', '.join(f'{k}={recipe.parameters()[k]!r}' for k in changed)}.",
            stacklevel=5,
        )


def _read_recipe(text: str) -> tuple[str, dict[str, str]]:
    """The name and the parameters, each as it was printed, of a recipe printed by `Recipe.__str__`."""
    name, _, inner = text.partition("(")
    found = re.split(rf"(?:^|, )((?:{'|'.join(KINDS)})\.\w+)=", inner.removesuffix(")"))
    return name, dict(zip(found[1::2], found[2::2], strict=True))


def _changed(given: Mapping[str, str], recipe: Recipe) -> list[str]:
    """The parameters that a checkpoint tells otherwise; functions are told by their address, which says nothing."""
    own = recipe.parameters()
    return [k for k, text in given.items() if k in own and text != repr(own[k]) and not re.search(r" at 0x", text)]


def _check_shapes(store: Store, weights: Mapping[Any, Tensor], own: Mapping[Any, Mapping[str, Any]]) -> None:
    for place, (i, w) in enumerate(weights.items()):
        for key in store.per_weight:
            slot = _filled(own.get(i, {}), key)
            if (
                slot is None
                or slot.ndim != w.ndim
                or all(n in (1, m) for n, m in zip(slot.shape, w.shape, strict=True))
            ):
                continue
            raise ValueError(
                f"the checkpoint's {PREFIX}{key} of parameter {i if isinstance(i, str) else place} has shape "
                f"{tuple(slot.shape)}, the parameter {tuple(w.shape)}: it was saved for another model, or before the "
                "parameter was pruned or grown. Build the model as it was saved, or load "
                "flatmin.base_state_dict(checkpoint)."
            )


def _of_single_file(groups: list[dict[str, Any]], state: Mapping[Any, Any], recipe: Recipe) -> Mapping[Any, Any]:
    """The state of a checkpoint of a single-file SAM, without its copies of weights and gradients."""
    adaptive = {bool(g.pop("adaptive", False)) for g in groups}
    if adaptive != {isinstance(recipe.geometry, Adaptive)}:
        raise ValueError(
            f"the checkpoint is of a single-file SAM with adaptive={True in adaptive}, this optimizer runs {recipe}; "
            f"build it with recipe={'asam' if True in adaptive else 'sam'!r}, or take 'adaptive' out of the "
            "checkpoint's groups."
        )
    rest = {}
    for i, entries in state.items():
        kept = {k: v for k, v in entries.items() if k not in _SINGLE_FILE} if isinstance(entries, Mapping) else entries
        if kept or not entries:
            rest[i] = kept
    if state and not rest:
        warnings.warn(
            "the checkpoint is of a single-file SAM, which saves no state of the base optimizer (momentum, moments): "
            "the base begins anew, with the learning rate and rho of the checkpoint.",
            stacklevel=5,
        )
    return rest
