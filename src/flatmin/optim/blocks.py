"""Blocks: several weights as one tensor, with the base optimizer's state and the method's state of them."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from flatmin.methods import State
from flatmin.optim.base_optimizer import BaseOptimizer
from flatmin.optim.state import MethodState, overwrite

# Optimizers that treat every entry by itself: one step on joined weights is the step on each of them.
_ENTRYWISE = frozenset(
    {
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Adamax,
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        torch.optim.Adadelta,
        torch.optim.ASGD,
        torch.optim.Rprop,
    }
)
# Entries of their state that are one number for each weight; all others are like the weight.
_NUMBERS = ("step", "eta", "mu", "mu_product")


@dataclass(slots=True, eq=False)
class Block:
    """Weights of one param group that lie one after the other, as one tensor.

    Args:
        weight: this part of the buffer of weights.
        gradient: this part of the buffer of gradients.
        group: position of the param group.
        members: the weights.
        places: size, strides and offset in the block of each.

    Attributes:
        state: the base optimizer's state of the block.
        shared: those entries of `state` of which the members' entries are parts.
        numbers: those entries that are one number for each weight, repeated for all members.
    """

    weight: Tensor
    gradient: Tensor
    group: int
    members: list[Tensor]
    places: list[tuple[torch.Size, tuple[int, ...], int]]
    state: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, Tensor] = field(default_factory=dict)

    def split(self, joined: Tensor) -> list[Tensor]:
        """The members' parts of a tensor like the block."""
        first = joined.storage_offset()
        return [joined.as_strided(size, stride, first + offset) for size, stride, offset in self.places]

    def join(self, parts: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """A new tensor like the block that holds these tensors, one for each member; and its parts."""
        joined = torch.zeros_like(self.gradient, dtype=parts[0].dtype, device=parts[0].device)
        views = self.split(joined)
        torch._foreach_copy_(views, list(parts))
        return joined, views


class BlockBase:
    """The base optimizer with blocks as weights. The members' state is parts of the blocks' state.

    Args:
        base: the base optimizer.

    Attributes:
        possible: whether it can step on blocks: it is one of torch's entrywise optimizers, with the usual state.
    """

    def __init__(self, base: BaseOptimizer) -> None:
        self._base, self.possible = base, False
        self._blocks: Sequence[Block] = []
        self._members: list[Tensor] = []
        # What is compared to find out whether somebody else has replaced the state.
        self._owners: list[Any] = []
        self._entries: dict[str, tuple[list[dict[str, Any]], list[Any]]] = {}
        self._versions: list[tuple[Tensor, int]] = []

    def kinds(self, weights: Sequence[Tensor]) -> list[tuple[Any, ...]]:
        """What the state of weights in one block has in common; decides whether a step on blocks is possible."""
        optimizer = self._base.optimizer
        # With eps = 0 the zeros between the weights would become 0 / 0.
        unusual = any(group.get("differentiable") or group.get("eps") == 0 for group in optimizer.param_groups)
        self.possible = type(optimizer) in _ENTRYWISE and not unusual
        states: list[Mapping[str, Any]] = [optimizer.state.get(w) or {} for w in weights]
        told: list[tuple[Any, ...]] = [tuple((k, v is None) for k, v in s.items()) for s in states]
        for w, s in zip(weights, states, strict=True):
            for k, v in s.items():
                right = isinstance(v, Tensor) and (v.numel() == 1 if k in _NUMBERS else v.shape == w.shape)
                self.possible = self.possible and (v is None or right)
        for key in _NUMBERS if self.possible else ():
            held = [i for i, s in enumerate(states) if s.get(key) is not None]
            if held:
                values = torch.stack([states[i][key].detach().reshape(()).to("cpu", torch.float64) for i in held])
                for i, value in zip(held, values.tolist(), strict=True):
                    told[i] = (*told[i], value)
        return told

    def join(self, blocks: Sequence[Block]) -> None:
        """Join the state of the blocks' members, and share it with them."""
        self._blocks = blocks if self.possible else []
        self._members = [w for block in self._blocks for w in block.members]
        state = self._base.optimizer.state
        for block in self._blocks:
            for key, value in (state.get(block.members[0]) or {}).items():
                if value is None or key in _NUMBERS:
                    block.state[key] = value
                else:
                    block.state[key], views = block.join([state[w][key] for w in block.members])
                    self._share(block, key, views)
        self._share_new()
        self._remember()

    def _share(self, block: Block, key: str, parts: Sequence[Any]) -> None:
        state = self._base.optimizer.state
        for w, part in zip(block.members, parts, strict=True):
            state[w][key] = part
        block.shared[key] = block.state[key]

    def _share_new(self) -> bool:
        """Give the members their parts of entries that the base optimizer has created. Whether there were any."""
        found = False
        for block in self._blocks:
            for key, value in block.state.items():
                if key in block.shared and value is block.shared[key]:
                    continue
                found, parts = True, [value] * len(block.members)
                if key in _NUMBERS and value is not None:
                    block.numbers[key] = numbers = value.detach().reshape(1).repeat(len(block.members))
                    parts = [numbers[i] for i in range(len(block.members))]
                    block.state[key] = parts[0]
                elif value is not None:
                    parts = block.split(value)
                self._share(block, key, parts)
        return found

    def _remember(self) -> None:
        state = self._base.optimizer.state
        self._owners, self._entries = list(state.values()), {}
        for block in self._blocks:
            mine = [state[w] for w in block.members] if block.state else []
            for key in block.state:
                owners, entries = self._entries.setdefault(key, ([], []))
                owners += mine
                entries += [owner[key] for owner in mine]
        self._note_versions()

    def _note_versions(self) -> None:
        self._versions = [(x, x._version) for block in self._blocks for x in block.numbers.values()]

    def is_own(self) -> bool:
        """Whether nobody has replaced the base optimizer's state, or stepped with it, since the last step on blocks."""
        state = self._base.optimizer.state
        if not self.possible:
            return True
        if len(state) != len(self._owners) or not all(map(operator.is_, state.values(), self._owners)):
            return False
        for key, (owners, entries) in self._entries.items():
            if not all(map(operator.is_, [owner.get(key) for owner in owners], entries)):
                return False
        return all(x._version == version for x, version in self._versions)

    def momenta(self, weights: Sequence[Tensor]) -> list[Tensor | None]:
        """The base optimizer's momentum of these blocks; None where there is none yet."""
        states = {block.weight: block.state for block in self._blocks}
        return self._base.momenta(weights, states)

    def hooked(self) -> bool:
        """Whether hooks of the base optimizer's step expect the weights in its param groups."""
        optimizer = self._base.optimizer
        own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
        return bool(own or _global_optimizer_pre_hooks or _global_optimizer_post_hooks)

    def step(self) -> None:
        """Take the base optimizer's step on the blocks, with their gradients."""
        optimizer = self._base.optimizer
        groups, state = optimizer.param_groups, optimizer.state
        params = [group["params"] for group in groups]
        try:
            for g, group in enumerate(groups):
                group["params"] = [block.weight for block in self._blocks if block.group == g]
            for block in self._blocks:
                state[block.weight] = block.state
            optimizer.step()
        finally:
            for block in self._blocks:
                state.pop(block.weight, None)
            for group, held in zip(groups, params, strict=True):
                group["params"] = held
            torch.autograd.graph.increment_version(self._members)
        new = self._share_new()
        for block in self._blocks:
            for numbers in block.numbers.values():
                if len(numbers) > 1:
                    numbers[1:].copy_(numbers[0])
        if new:
            self._remember()
        self._note_versions()


class BlockSlots:
    """The slots of a method with blocks as weights. Those of the members in `MethodState` are parts of the blocks'.

    Args:
        state: the state of the method.
    """

    def __init__(self, state: MethodState) -> None:
        self._state, self._changes = state, -1
        self._blocks: Sequence[Block] = []
        self._slots: dict[str, dict[int, Tensor | None]] = {}
        self._sorts: dict[Tensor, Any] = {}  # shape, dtype and device of the weights when they were joined

    def kinds(self, weights: Sequence[Tensor]) -> list[tuple[str, ...]]:
        """The slots that each of these weights has."""
        state, before = self._state, self._sorts
        self._sorts = {w: (w.shape, w.dtype, w.device) for w in weights}
        return [tuple(k for k in state.per_weight if state.current(k, w, before.get(w)) is not None) for w in weights]

    def join(self, blocks: Sequence[Block]) -> None:
        """Join the slots of the blocks' members, and share them."""
        self._blocks, self._slots = blocks, {}
        for key, of in self._state.per_weight.items():
            joined: dict[int, Tensor | None] = {}
            self._slots[key] = joined
            for block in blocks:
                joined[id(block.weight)] = None
                if block.members[0] in of:
                    joined[id(block.weight)], views = block.join([of[w] for w in block.members])
                    self._state.replace(key, block.members, views)
        self._changes = self._state.changes

    def is_own(self) -> bool:
        """Whether nobody else has replaced a slot."""
        return self._changes == self._state.changes

    def read(self, kind: str, weights: Sequence[Tensor]) -> State:
        """The slots of the part of this kind, with one entry for each of these blocks."""
        state: dict[str, Any] = {}
        for slot, key in self._state.keys(kind).items():
            joined = self._slots.get(key)
            state[slot] = self._state.scalars[key] if joined is None else [joined[id(w)] for w in weights]
        return state

    def commit(self, kind: str, weights: Sequence[Tensor], new: Mapping[str, Any], gate: Tensor | None) -> None:
        """Store staged state of these blocks; with a gate, only if it is 1. See `MethodState.commit`."""
        keys = self._state.keys(kind)
        blocks = {id(block.weight): block for block in self._blocks}
        for slot, value in new.items():
            joined = self._slots.get(keys[slot])
            if joined is None:
                self._state.commit(kind, [], {slot: value}, gate)
                continue
            if fresh := overwrite([joined[id(w)] for w in weights], value, gate):
                for i in fresh:
                    block = blocks[id(weights[i])]
                    joined[id(block.weight)] = whole = value[i].detach().clone()
                    self._state.replace(keys[slot], block.members, block.split(whole))
                self._changes = self._state.changes
