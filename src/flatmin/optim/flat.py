"""`SAM(flat=True)`: weights, gradients and state lie one after the other in few large tensors."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flatmin.methods import Gradients, Need, Recipe
from flatmin.optim import tensors as ta
from flatmin.optim.base_optimizer import BaseOptimizer
from flatmin.optim.blocks import Block, BlockBase, BlockSlots
from flatmin.optim.program import PassGradients
from flatmin.optim.state import MethodState
from flatmin.optim.tensors import Layout
from flatmin.optim.untrained import memory

_ALIGNMENT = 64  # bytes; kernels are slower on weights that begin at other addresses
_SMALL = 1024  # average entries of weights whose gradients are better added to the buffer than copied to it
_GRAD, _IS_SPARSE, _VERSION = map(operator.attrgetter, ("grad", "is_sparse", "_version"))


@dataclass(slots=True)
class _Place:
    """Where a weight is stored.

    Attributes:
        buffer: position of the buffer.
        number: how many weights come before it in the buffer.
        offset: index of its first entry in the buffer.
        pointer: its address.
        gradient: its part of the buffer of gradients.
    """

    buffer: int
    number: int
    offset: int
    pointer: int
    gradient: Tensor


class FlatWeights:
    """The trained weights in buffers, one for each dtype and device. Each weight is a view of its buffer.

    An update of a recipe that permits it (`Recipe.joins`) treats every block of a buffer as one weight. So does the
    step of torch's entrywise optimizers. Everything else works on the weights themselves, which share memory with the
    blocks; so does an update in which other weights get a gradient than in the update before.

    Args:
        base: the base optimizer.
        state: the state of the method.
        recipe: the recipe.
        diagnoses: whether numbers about single weights are recorded.

    Attributes:
        blocks: the blocks, in the order of the param groups.
        layout: facts about the blocks, like those about the weights.
        base: the base optimizer's step on blocks.
        slots: the state of the method, of blocks.
        model: the model, if it is known.
    """

    def __init__(self, base: BaseOptimizer, state: MethodState, recipe: Recipe, *, diagnoses: bool) -> None:
        self.base, self.slots, self._recipe = BlockBase(base), BlockSlots(state), recipe
        self._permitted = recipe.joins and not diagnoses and not base.differentiates
        self.blocks: list[Block] = []
        self.layout, self._trained = Layout([]), Layout([])
        self.model: nn.Module | None = None
        self._buffers: list[tuple[Tensor, Tensor]] = []  # values and gradients
        self._places: dict[Tensor, _Place] = {}
        self._pointers: list[int] = []
        # Of all trained weights, and of those in blocks.
        self._gradients: list[Tensor] = []
        self._whole = PassGradients()  # the same list, if a pass has added to all of them
        self._members: list[Tensor] = []
        self._views: list[Tensor] = []
        self._present: list[bool] = []  # which weights are in blocks
        self._seen: list[bool] = []  # which had a gradient in the last pass
        self._before: list[bool] = []  # in the update before
        self._full = self._small = self._steady = False
        self._noted: list[int] = []  # versions of the gradients at the start of a pass

    @property
    def joins(self) -> bool:
        """Whether an update can treat blocks as weights."""
        return self._permitted and (self.base.possible or Need.BASE_MOMENTUM not in self._recipe.demands)

    # -- the buffers ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def follow(self, layout: Layout) -> None:
        """Join the weights, and again after somebody has replaced weights, their memory or their state.

        Raises:
            ValueError: weights that cannot be views of a buffer.
        """
        pointers = list(map(Tensor.data_ptr, layout.weights))
        if layout is not self._trained:
            known = [self._places.get(w) for w in layout.weights]
            if not all(p is not None and p.pointer == at for p, at in zip(known, pointers, strict=True)):
                self._store(layout.weights)
            self._trained, self._pointers = layout, list(map(Tensor.data_ptr, layout.weights))
            self._gradients = [self._places[w].gradient for w in layout.weights]
            self._whole = PassGradients(self._gradients)
            self._arrange([True] * len(layout.weights))
        elif pointers != self._pointers:
            self._trained = Layout([])
            self.follow(layout)
            return
        # Other weights than before get gradients. For a single update new blocks are not worth it. A direction that
        # needs no gradient also moves weights without one, so its blocks hold all weights.
        again = self._seen is not self._before and self._seen == self._before and any(self._seen)
        lasting = again and self._seen != self._present and self._recipe.direction.evaluates
        self._before = self._seen
        if lasting or not (self.base.is_own() and (self.slots.is_own() or not self._permitted)):
            self._arrange(self._seen if lasting else self._present)

    def _store(self, weights: Sequence[Tensor]) -> None:
        """Copy the weights to new buffers and make them views of these."""
        check_joinable(weights, self.model)
        self._buffers, self._places = [], {}
        for index in ta.buckets(weights):
            chosen = [weights[i] for i in index]
            unit = max(1, _ALIGNMENT // chosen[0].element_size())
            starts = [0, *itertools.accumulate(-(-w.numel() // unit) * unit for w in chosen)]
            values = torch.zeros(starts[-1], dtype=chosen[0].dtype, device=chosen[0].device)
            gradients = torch.zeros_like(values)
            views = [_part(values, w, start) for w, start in zip(chosen, starts, strict=False)]
            torch._foreach_copy_(views, [w.detach() for w in chosen])
            for number, (w, view, start) in enumerate(zip(chosen, views, starts, strict=False)):
                w.data = view
                # `data`: with a common version counter, a change of one gradient would count as a change of all.
                gradient = _part(gradients, w, start).data
                self._places[w] = _Place(len(self._buffers), number, start, w.data_ptr(), gradient)
            self._buffers.append((values, gradients))

    def _arrange(self, present: list[bool]) -> None:
        """Divide the buffers into blocks of equal weights, and join their state.

        Args:
            present: which of the trained weights shall be in blocks.
        """
        layout = self._trained
        self._present = self._seen = self._before = present
        self._steady = False
        entries = sum(w.numel() for w in layout.weights)
        self._full = all(present)
        self._small = self._permitted and layout.on_cpu and entries <= _SMALL * len(layout.weights)
        groups = [g for g, count in enumerate(layout.trained) for _ in range(count)]
        slots = self.slots.kinds(layout.weights) if self._permitted else [()] * len(groups)
        kinds = list(zip(groups, self.base.kinds(layout.weights), slots, strict=True))
        runs: list[list[int]] = []
        order = sorted(range(len(present)), key=lambda i: self._order(layout.weights[i]))
        for i in itertools.compress(order, [present[i] for i in order]):
            if runs and self._adjacent(runs[-1][-1], i) and kinds[runs[-1][-1]] == kinds[i]:
                runs[-1].append(i)
            else:
                runs.append([i])
        self.blocks = sorted((self._block(run, kinds[run[0]][0]) for run in runs), key=lambda block: block.group)
        count = len(layout.trained)
        self.layout = Layout([[b.weight for b in self.blocks if b.group == g] for g in range(count)])
        self._members = [w for block in self.blocks for w in block.members]
        self._views = [self._places[w].gradient for w in self._members]
        self.base.join(self.blocks)
        if self._permitted:
            self.slots.join(self.blocks)

    def _order(self, weight: Tensor) -> tuple[int, int]:
        place = self._places[weight]
        return place.buffer, place.number

    def _adjacent(self, before: int, after: int) -> bool:
        one, other = (self._order(self._trained.weights[i]) for i in (before, after))
        return one[0] == other[0] and one[1] + 1 == other[1]

    def _block(self, run: list[int], group: int) -> Block:
        members = [self._trained.weights[i] for i in run]
        first, last = self._places[members[0]], self._places[members[-1]]
        values, gradients = self._buffers[first.buffer]
        part = slice(first.offset, last.offset + members[-1].numel())
        places = [(w.shape, w.stride(), self._places[w].offset - first.offset) for w in members]
        block = Block(values[part].requires_grad_(), gradients[part], group, members, places)
        block.weight.grad = block.gradient
        return block

    # -- gradients -----------------------------------------------------------------------------------------------

    @property
    def adds(self) -> bool:
        """Whether passes add their gradients to the buffer, rather than make tensors that are copied to it.

        For small weights on the CPU it is faster. On an accelerator it would take a launch for each weight. It needs to
        be known which weights get a gradient: those without one must have None, which optimizers do not treat as zeros.
        """
        return self._small and self._steady

    def clear(self) -> None:
        """Begin a pass that adds its gradients to the buffer."""
        for _, gradients in self._buffers:
            gradients.zero_()
        if not self.points():
            self._point()
        self._noted = list(map(_VERSION, self._gradients))

    def clear_again(self) -> None:
        """Clear the gradients within such a pass."""
        if not self.points() or self._noted != list(map(_VERSION, self._gradients)):
            self.clear()

    def points(self) -> bool:
        """Whether the weights in blocks have their parts of the buffer as gradients, and the others none."""
        return all(map(operator.is_, map(_GRAD, self._members), self._views)) and (
            len(self._members) == len(self._gradients)
            or [w.grad is not None for w in self._trained.weights] == self._present
        )

    def _point(self) -> None:
        for w, view in zip(self._members, self._views, strict=True):
            w.grad = view
        if len(self._members) < len(self._gradients):
            for w, present in zip(self._trained.weights, self._present, strict=True):
                if not present:
                    w.grad = None

    def made(self, gradients: Gradients) -> PassGradients:
        """The gradients of a pass that began with `clear`; None for weights without one."""
        noted, self._noted = self._noted, []
        now = list(map(_VERSION, self._gradients))
        same = all(map(operator.is_, gradients, self._gradients))
        if same and len(set(now)) == len(set(noted)) == 1 and now[0] > noted[0]:
            return self._whole
        changes = list(map(operator.sub, now, noted))
        usual = max(changes, default=0)
        if min(changes, default=0) == usual and same:
            return PassGradients(gradients if usual else [None] * len(gradients))
        found: Gradients = []
        for g, view, change in zip(gradients, self._gradients, changes, strict=True):
            # A loop that clips gradients changes those of all weights, also zeros of weights without a gradient.
            added = change == usual if usual else g is not view
            found.append(g if g is not None and (added or bool(g.any())) else None)
        return PassGradients(found)

    def gather(self, gradients: Gradients, *, copy: bool = False, partly: bool = False) -> PassGradients | None:
        """The gradients of the weights as one tensor for each block; None if others have one than those in blocks.

        Args:
            gradients: one for each trained weight.
            copy: whether to return copies, which the next call does not overwrite. Default False.
            partly: whether missing gradients count as zeros. Default False.

        Raises:
            RuntimeError: a sparse gradient.
        """
        if gradients is self._whole and self._full:
            self._seen, self._steady = self._present, True  # the pass has added them to the buffer
        elif self._full and all(map(operator.is_not, gradients, itertools.repeat(None))):
            self._seen, self._steady = self._present, True
            self._copy(self._gradients, gradients)
        else:
            self._seen = [g is not None for g in gradients]
            self._steady = self._seen == self._present
            if not (self._steady or partly):
                return None
            given = list(itertools.compress(gradients, self._seen))
            if not self._steady:
                # Those that are in the buffer already would be lost.
                given = [g.clone() if g is view else g for g, view in zip(given, self._seen_views(), strict=True)]
                for _, joined in self._buffers:
                    joined.zero_()
            self._copy(self._seen_views(), given)
        return PassGradients([b.gradient.clone() if copy else b.gradient for b in self.blocks])

    def _seen_views(self) -> list[Tensor]:
        return list(itertools.compress(self._gradients, self._seen))

    def _copy(self, views: Sequence[Tensor], gradients: Sequence[Any]) -> None:
        if any(map(_IS_SPARSE, gradients)):
            raise RuntimeError(
                "flat=True keeps gradients in dense buffers, but the loss gave a sparse one: build the embedding with "
                "sparse=False, or the optimizer without flat=True."
            )
        if all(map(operator.is_, views, gradients)):
            return  # the pass has added them to the buffer
        for index in [range(len(views))] if len(self._buffers) == 1 else ta.buckets(views):
            whole = len(index) == len(views)
            into, source = (views, gradients) if whole else ([v[i] for i in index] for v in (views, gradients))
            torch._foreach_copy_(into, source)  # type: ignore[arg-type]

    def separate(self, joined: Gradients) -> PassGradients:
        """The parts of all trained weights in gradients of the blocks; None for weights in no block."""
        parts: dict[Tensor, Tensor] = {}
        for block, g in zip(self.blocks, joined, strict=True):
            if g is not None:
                parts.update(zip(block.members, block.split(g), strict=True))
        return PassGradients([parts.get(w) for w in self._trained.weights])

    def publish(self, update: Gradients, staged: Sequence[Mapping[str, Any]]) -> None:
        """Let the gradient of each weight be its part of u.

        Args:
            update: u for each block.
            staged: state that will be stored later, and may be the tensors that are overwritten here.
        """
        for block, u in zip(self.blocks, update, strict=True):
            if u is None or u is block.gradient:
                continue
            for values in itertools.chain.from_iterable(new.values() for new in staged):
                if isinstance(values, list):
                    values[:] = [x.clone() if x is block.gradient else x for x in values]
            block.gradient.copy_(u)
        if self.complete:
            if not self.points():
                self._point()
            return
        for w, view, present in zip(self._trained.weights, self._gradients, self._seen, strict=True):
            w.grad = view if present else None

    @property
    def complete(self) -> bool:
        """Whether exactly the weights in blocks had a gradient in the last pass."""
        return self._steady

    @property
    def gradients(self) -> list[Tensor]:
        """The gradient of each block."""
        return [block.gradient for block in self.blocks]

    def touch(self) -> None:
        """Tell autograd that the weights have changed."""
        torch.autograd.graph.increment_version(self._members)


def check_joinable(weights: Sequence[Tensor], model: nn.Module | None = None) -> None:
    """Raise ValueError for weights that cannot become views of one buffer.

    Args:
        weights: the weights.
        model: whose buffers may be views of weights. Default None: not known.
    """
    for w in weights:
        if ta.is_sharded(w) or getattr(w, "_fsdp_flattened", False) or getattr(w, "_is_flat_param", False):
            raise ValueError(
                "flat=True needs whole weights, but these are sharded (fully_shard, FSDP), which keeps them in buffers "
                "of its own; leave out flat=True."
            )
        if not ta.plain([w]):
            raise ValueError(
                f"flat=True needs ordinary tensors as weights, got {type(w).__name__}; leave out flat=True."
            )
    spans = sorted((str(w.device), w.data_ptr(), w.data_ptr() + _extent(w)) for w in weights if not w.is_meta)
    for (device, _, end), (other, start, _) in itertools.pairwise(spans):
        if device == other and start < end:
            raise ValueError(
                "flat=True needs weights in memory of their own, but two of them share memory; tie them as one "
                "parameter, or leave out flat=True."
            )
    own = {w.untyped_storage().data_ptr() for w in weights if not w.is_meta}
    for name, buffer in () if model is None else model.named_buffers():
        if not buffer.is_meta and memory(buffer) in own:
            raise ValueError(
                f"flat=True needs weights in memory of their own, but the buffer {name} of the model shares memory "
                "with a weight, which it would no longer follow; leave out flat=True."
            )


def _extent(w: Tensor) -> int:
    """The bytes from the first entry to the end of the last."""
    last = sum((n - 1) * stride for n, stride in zip(w.shape, w.stride(), strict=True)) if w.numel() else -1
    return (last + 1) * w.element_size()


def _part(buffer: Tensor, weight: Tensor, start: int) -> Tensor:
    """A part of the buffer of the size of a weight, with its strides if they leave no gaps."""
    return buffer.as_strided(weight.shape, torch.empty_like(weight, device="meta").stride(), start)
