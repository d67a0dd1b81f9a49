"""Arithmetic on lists of tensors: mixed dtypes, several devices, shards. The only file that special-cases DTensor."""

from __future__ import annotations

import functools
import itertools
import operator
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

_PLAIN = {Tensor, torch.nn.Parameter}
_TINY = 1e-30  # squared norms below it are those of a zero vector
_BLOCK = 1 << 22  # elements
LOW = (torch.float16, torch.bfloat16)  # in them w + eps must be rounded at random
_DTYPE, _SHAPE, _DEVICE = map(operator.attrgetter, ("dtype", "shape", "device"))
_TRAINED, _ON_CPU = map(operator.attrgetter, ("requires_grad", "is_cpu"))
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_sharded(t: Tensor) -> bool:
    """Whether t is a DTensor; costs no import where none can exist."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def plain(tensors: Iterable[Tensor]) -> bool:
    """Whether all are ordinary tensors, told from their types in one sweep."""
    return set(map(type, tensors)) <= _PLAIN


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The part of each tensor that lies on this process, sharing storage."""
    if plain(tensors):
        return list(tensors)
    return [cast(Any, t).to_local() if is_sharded(t) else t for t in tensors]


def full_scalar(t: Tensor) -> Tensor:
    """A scalar as a plain tensor; sums over the shards if it is a DTensor."""
    return cast(Tensor, cast(Any, t).full_tensor()) if is_sharded(t) else t


def placed(values: Tensor, w: Tensor) -> Tensor:
    """The same numbers for every entry of w, where w lies: in its dtype, on its device, sharded like it."""
    values = values.to(w.device, w.dtype)
    if not is_sharded(w):
        return values
    sharded = cast(Any, w)
    return torch.distributed.tensor.distribute_tensor(
        values, sharded.device_mesh, sharded.placements, src_data_rank=None
    )


def aligned(tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of the weights' shapes, sharded as these are."""
    if set(map(type, weights)) <= _PLAIN:
        return list(tensors)
    return [
        cast(Any, t).redistribute(placements=cast(Any, w).placements) if is_sharded(w) else t
        for t, w in zip(tensors, weights, strict=True)
    ]


def buckets(tensors: Sequence[Tensor], *keys: Sequence[Any]) -> list[list[int]]:
    """Positions grouped by dtype, device and further keys, so that each group suits one foreach call."""
    found: dict[Any, list[int]] = {}
    for i, t in enumerate(tensors):
        found.setdefault((t.dtype, t.device, *(k[i] for k in keys)), []).append(i)
    return list(found.values())


def uniform(tensors: Sequence[Tensor]) -> bool:
    """Whether one foreach call serves all."""
    return len(set(map(_DTYPE, tensors))) == 1 and len(set(map(_DEVICE, tensors))) == 1


def copy_(into: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """into[i] <- source[i], bit for bit, in place. DTensor has no foreach copy, its shards do."""
    if into:
        torch._foreach_copy_(local(into), local(source))


def _accumulate_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


class Layout:
    """What one look at the param groups tells, kept while they hold the same tensors.

    Attributes:
        weights: the trained tensors of all groups, in order.
        trained: how many of them each group has.
        frozen: the tensors of the groups that are not trained.
        on_cpu: whether all of them lie on the CPU.
        simple: ordinary tensors of one real dtype on the CPU, where a foreach call takes them as they are.
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]]) -> None:
        self._groups = [list(group) for group in groups]
        listed = [w for group in groups for w in group]
        self.frozen = [w for w in listed if not w.requires_grad]
        self.trained = [sum(w.requires_grad for w in group) for group in groups]
        self.weights = weights = [w for w in listed if w.requires_grad]
        self._device = weights[0].device if weights else torch.device("cpu")
        self.on_cpu = all(w.device.type == "cpu" for w in weights)
        self._dtypes, self._shapes = [w.dtype for w in weights], [w.shape for w in weights]
        one = len(set(self._dtypes)) == 1 and not self._dtypes[0].is_complex
        self.simple = one and plain(weights) and {w.device.type for w in weights} == {"cpu"}

    def fits(self, groups: Sequence[Sequence[Tensor]]) -> bool:
        """Whether these are the groups it was made for, the same are trained, and they have the shapes of then."""
        if len(groups) != len(self._groups) or any(map(_TRAINED, self.frozen)):
            return False
        if not all(map(_TRAINED, self.weights)):
            return False
        for group, before in zip(groups, self._groups, strict=True):
            if len(group) != len(before) or not all(map(operator.is_, group, before)):
                return False
        moved = self.weights and self.weights[0].device != self._device
        return not moved and self._shapes == list(map(_SHAPE, self.weights))

    def refreshed(self) -> Layout:
        """Itself, or a new one if a weight has changed its dtype; to be asked before weights are copied."""
        same = self._dtypes == list(map(_DTYPE, self.weights))
        return self if same else Layout(self._groups)


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Global L2 norm in fp32, or fp64 if any tensor is fp64; one scalar on the first tensor's device.

    Squares are summed in that precision, so entries above about 1e19 overflow to inf in fp32.
    """
    tensors = list(tensors)
    groups = [tensors] if uniform(tensors) else [[tensors[i] for i in b] for b in buckets(tensors)]
    parts: list[Tensor] = []
    for group in groups:
        low = group[0].dtype in LOW
        parts.extend(torch._foreach_norm(group, 2.0, dtype=torch.float32) if low else torch._foreach_norm(group, 2.0))
    if len(groups) > 1:
        wide = max((p.dtype for p in parts), key=lambda d: d.itemsize)
        parts = [p.to(device=tensors[0].device, dtype=wide) for p in map(full_scalar, parts)]
    total = parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts))
    return total if type(total) is Tensor else full_scalar(total)


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Global inner product sum_i <a_i, b_i> (real part), in fp32 or better, on the first tensor's device."""
    both = [*a, *b]
    if plain(both) and all(map(_ON_CPU, both)) and set(map(_DTYPE, both)) in ({torch.float32}, {torch.float64}):
        # The loop below without its questions, which cost more than the products of small tensors.
        pairs = zip(map(torch.flatten, a), map(torch.flatten, b), strict=True)
        return functools.reduce(torch.add, itertools.starmap(torch.dot, pairs))
    total: Tensor | None = None
    for x, y in zip(a, b, strict=True):
        wide = _accumulate_in(x.dtype)
        if x.is_complex():
            x, y = torch.view_as_real(x), torch.view_as_real(y)
        if x.dtype == y.dtype == wide and x.device.type == "cpu" and not is_sharded(x):
            part = torch.dot(x.reshape(-1), y.reshape(-1))
        else:
            part = full_scalar((x.to(wide) * y.to(wide)).sum())
        total = part if total is None else total + part.to(total.device)
    assert total is not None
    return total


def add_scaled(
    a: Sequence[Tensor], b: Sequence[Tensor], factor: Tensor, layout: Layout, *, spent: bool
) -> list[Tensor]:
    """a_i + factor b_i for a scalar tensor, in the dtype of a, in place if `spent`; no synchronisation off the CPU."""
    if layout.simple:
        if spent:
            torch._foreach_add_(list(a), list(b), alpha=float(factor))
            return list(a)
        return list(torch._foreach_add(list(a), list(b), alpha=float(factor)))
    total = list(a) if spent else [x.clone() for x in a]
    for group in buckets(total):
        head = total[group[0]]
        scaled = torch._foreach_mul([b[i] for i in group], factor.to(head.device, head.dtype))
        torch._foreach_add_([total[i] for i in group], scaled)
    return total


def share(a: Sequence[Tensor], along: Sequence[Tensor]) -> Tensor:
    """K such that k along is the projection of a; 0 for a zero vector."""
    square = dot(along, along)
    return torch.where(square > _TINY, dot(a, along) / square, torch.zeros_like(square))


def bits(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Integer views of the local storage. Multiplying by 0 or 1 selects exactly, also over nan and inf."""
    views = [torch.view_as_real(t) if t.is_complex() else t for t in local(tensors)]
    return [v.view(_BITS[v.element_size()]) for v in views]


def keep_if_(tensors: Sequence[Tensor], gate: Tensor) -> None:
    """Set every tensor to exactly 0 where the integer scalar `gate` is 0, in place, without synchronisation."""
    for group in buckets(views := bits(tensors)):
        head = views[group[0]]
        torch._foreach_mul_([views[i] for i in group], gate.to(device=head.device, dtype=head.dtype))


def choose_(into: Sequence[Tensor], new: Sequence[Tensor], gate: Tensor) -> None:
    """Into <- new where the integer scalar `gate` is 1, else unchanged, in place; `new` is overwritten."""
    keep_if_(new, gate)
    keep_if_(into, 1 - gate)
    old_bits, new_bits = bits(into), bits(new)
    for group in buckets(old_bits):
        torch._foreach_add_([old_bits[i] for i in group], [new_bits[i] for i in group])


def nonfinite_(tensors: Sequence[Tensor], found: Tensor, factor: Tensor) -> None:
    """Set `found` (a zero fp32 scalar) to 1 if any entry is nan or inf; one launch per foreach chunk, no sync.

    `factor` is an fp32 scalar on the device of `found` by which the entries are multiplied in place, normally 1.
    Tensors on another device add a copy of a scalar each way. All processes that share a tensor find the same.
    """
    shards = local(tensors)
    for group in buckets(shards):
        chosen = [shards[i] for i in group]
        if chosen[0].is_complex():
            chosen = [torch.view_as_real(t) for t in chosen]
        device = chosen[0].device
        if device == found.device:
            torch._amp_foreach_non_finite_check_and_unscale_(chosen, found, factor)
        else:
            there = torch.zeros_like(found, device=device)
            torch._amp_foreach_non_finite_check_and_unscale_(chosen, there, factor.to(device))
            torch.maximum(found, there.to(found.device), out=found)
    agree_(found, tensors)


def agree_(flag: Tensor, tensors: Sequence[Tensor]) -> None:
    """Set a scalar to its maximum over all processes that hold a part of one of these tensors."""
    if plain(tensors):
        return
    # In the order of the tensors, which is the same on every process.
    for mesh in dict.fromkeys(cast(Any, t).device_mesh for t in tensors if is_sharded(t)):
        for group in mesh.get_all_groups():
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=group)


def all_finite(tensors: Sequence[Tensor], layout: Layout) -> bool:
    """Whether no entry of these CPU tensors, gradients of the layout's weights, is nan or inf."""
    found, one = torch.zeros((), dtype=torch.float32), torch.ones((), dtype=torch.float32)
    if layout.simple and tensors:
        torch._amp_foreach_non_finite_check_and_unscale_(list(tensors), found, one)
    else:
        nonfinite_(tensors, found, one)
    return not float(found)


def values(grads: Sequence[Tensor | None]) -> list[Tensor]:
    """The dense tensors that hold the entries of the gradients that are there, sharing their storage."""
    return [g._values() if g.is_sparse else g for g in grads if g is not None]


def clip_(grads: Sequence[Tensor | None], limit: float) -> None:
    """Scale in place so that the global norm is at most `limit`; no synchronisation off the CPU."""
    entries = values(grads)
    if not entries:
        return
    factor = (limit / (norm(entries) + 1e-6)).clamp(max=1.0)
    entries = local(entries)
    for group in buckets(entries):
        torch._foreach_mul_([entries[i] for i in group], factor.to(entries[group[0]].device))


def add_rounded_(
    weights: Sequence[Tensor], directions: Sequence[Tensor], alpha: float, generator: torch.Generator
) -> None:
    """Weights += alpha directions for weights in bf16 or fp16, rounded at random to one of the two neighbours.

    The neighbour above is taken with the probability that makes the mean of the rounded sum the exact sum, so that
    changes far below the spacing of the weights survive on average. `generator` is on the weights' device.
    """
    for block in _blocks(weights):
        flat = torch.cat([weights[i].reshape(-1) for i in block])
        asked = torch.cat([directions[i].reshape(-1) for i in block]).float().mul_(alpha).add_(flat)
        asked = _round_at_random(asked, flat.dtype, generator)
        parts = asked.split([weights[i].numel() for i in block])
        torch._foreach_copy_(
            [weights[i] for i in block], [p.view_as(weights[i]) for i, p in zip(block, parts, strict=True)]
        )


def _round_at_random(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    near = x.to(dtype)
    error = x - near
    # Neighbours of a number differ by 1 as integers; towards zero the integer shrinks, whatever the sign.
    code = near.view(torch.int16)
    away = torch.where(near == 0, error, near.float()).sign() * error.sign()
    code = torch.where(near == 0, (error < 0).short() * -0x8000 + 1, code + away.short())
    other = torch.where(error == 0, near, code.view(dtype))
    # error / spacing; 0 / 0 where the sum is exact, nan where it overflows: both stay.
    chance = error / (other.float() - near.float())
    return torch.where(torch.rand(x.shape, generator=generator, device=x.device) < chance, other, near)


def _blocks(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Positions in runs of at most `_BLOCK` elements, or of one larger tensor."""
    run: list[int] = []
    size = 0
    for i, t in enumerate(tensors):
        if run and size + t.numel() > _BLOCK:
            yield run
            run, size = [], 0
        run.append(i)
        size += t.numel()
    if run:
        yield run
