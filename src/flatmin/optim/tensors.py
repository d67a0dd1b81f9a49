"""Arithmetic on lists of tensors: mixed dtypes, several devices, shards. Only this file has code for DTensor."""

from __future__ import annotations

import functools
import itertools
import math
import operator
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

_PLAIN = {Tensor, torch.nn.Parameter}
_TINY = 1e-30  # vectors with a smaller squared norm count as zero
_BLOCK = 1 << 22  # elements
_PIECE = 1 << 16  # entries
_FEW = 8  # tensors for which one call each is faster than one for all that also writes
LOW = (torch.float16, torch.bfloat16)  # dtypes in which w + eps is rounded at random
_DTYPE, _SHAPE, _DEVICE = map(operator.attrgetter, ("dtype", "shape", "device"))
_TRAINED, _ON_CPU = map(operator.attrgetter, ("requires_grad", "is_cpu"))
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_sharded(t: Tensor) -> bool:
    """Whether t is a DTensor. Does not import torch.distributed.tensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def plain(tensors: Iterable[Tensor]) -> bool:
    """Whether all are ordinary tensors or parameters, by their types."""
    return set(map(type, tensors)) <= _PLAIN


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The part of each tensor on this process, with shared storage."""
    if plain(tensors):
        return list(tensors)
    return [cast(Any, t).to_local() if is_sharded(t) else t for t in tensors]


def full_scalar(t: Tensor) -> Tensor:
    """A scalar as a plain tensor; sums over the shards if it is a DTensor."""
    return cast(Tensor, cast(Any, t).full_tensor()) if is_sharded(t) else t


def placed(values: Tensor, w: Tensor) -> Tensor:
    """The values in the dtype and on the device of w, and sharded like w."""
    values = values.to(w.device, w.dtype)
    if not is_sharded(w):
        return values
    sharded = cast(Any, w)
    return torch.distributed.tensor.distribute_tensor(
        values, sharded.device_mesh, sharded.placements, src_data_rank=None
    )


def aligned(tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, sharded like the weights."""
    if set(map(type, weights)) <= _PLAIN:
        return list(tensors)
    return [
        cast(Any, t).redistribute(placements=cast(Any, w).placements) if is_sharded(w) else t
        for t, w in zip(tensors, weights, strict=True)
    ]


def buckets(tensors: Sequence[Tensor], *keys: Sequence[Any]) -> list[list[int]]:
    """Positions grouped by dtype, device and further keys, so that each group can use one foreach call."""
    groups: dict[Any, list[int]] = {}
    for i, t in enumerate(tensors):
        groups.setdefault((t.dtype, t.device, *(k[i] for k in keys)), []).append(i)
    return list(groups.values())


def uniform(tensors: Sequence[Tensor]) -> bool:
    """Whether all tensors can use one foreach call: equal dtypes and devices."""
    return len({t.dtype for t in tensors}) == 1 and len({t.device for t in tensors}) == 1


def copy_(into: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """Copy source[i] into into[i], bit for bit. DTensor has no foreach copy, but its shards have."""
    if into:
        torch._foreach_copy_(local(into), local(source))


def _accumulate_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


class Layout:
    """Facts about the param groups, cached while they hold the same tensors.

    Attributes:
        weights: the trained tensors of all groups, in order.
        trained: number of trained tensors in each group.
        frozen: the tensors in the groups that do not require gradients.
        on_cpu: whether all trained tensors are on the CPU.
        simple: whether they are ordinary CPU tensors of one real dtype, so that foreach calls can use them directly.
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
        """Whether these are still the same groups, with the same trained tensors, shapes and device."""
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
        """This layout, or a new one if a weight has changed its dtype. Call it before weights are copied."""
        same = self._dtypes == list(map(_DTYPE, self.weights))
        return self if same else Layout(self._groups)


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all tensors as one vector, in float32 (float64 if any tensor is): a scalar on the first device.

    Squares are summed in that precision, so entries above about 1e19 overflow to inf in float32.
    """
    tensors = _pieces(tensors) if any([t.numel() > _PIECE for t in tensors]) else list(tensors)
    groups = [tensors] if uniform(tensors) else [[tensors[i] for i in b] for b in buckets(tensors)]
    parts: list[Tensor] = []
    for group in groups:
        low = group[0].dtype in LOW
        parts.extend(torch._foreach_norm(group, 2.0, dtype=torch.float32) if low else torch._foreach_norm(group, 2.0))
    if len(groups) > 1:
        wide = torch.float64 if any([p.dtype == torch.float64 for p in parts]) else torch.float32
        parts = [p.to(device=tensors[0].device, dtype=wide) for p in map(full_scalar, parts)]
    total = parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts))
    return total if type(total) is Tensor else full_scalar(total)


def _pieces(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, with large ones on the CPU in pieces: over 10^8 entries its float32 norm would be wrong by 1 %."""
    pieces: list[Tensor] = []
    for t in tensors:
        whole = t.numel() <= _PIECE or t.device.type != "cpu" or is_sharded(t) or not t.is_contiguous()
        pieces += [t] if whole else t.view(-1).split(_PIECE)
    return pieces


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The inner product sum_i <a_i, b_i> (real part), in float32 or better, on the first tensor's device."""
    both = [*a, *b]
    if plain(both) and all([t.is_cpu for t in both]) and {t.dtype for t in both} in ({torch.float32}, {torch.float64}):
        # The loop below without its checks, which take longer than the products of small tensors.
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
    """a_i + factor * b_i for a scalar factor, in the dtypes of a; in place if `spent`. Synchronises only on the CPU."""
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
    """The scalar k = <a, along> / ||along||^2; 0 if `along` is zero."""
    square = dot(along, along)
    return torch.where(square > _TINY, dot(a, along) / square, torch.zeros_like(square))


def bits(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Integer views of the local storage. Multiplying them by 0 or 1 is an exact selection, also for nan and inf."""
    views = [torch.view_as_real(t) if t.is_complex() else t for t in local(tensors)]
    return [v.view(_BITS[v.element_size()]) for v in views]


def keep_if_(tensors: Sequence[Tensor], gate: Tensor) -> None:
    """Set every tensor to exactly 0 where the integer scalar `gate` is 0, in place, without synchronisation."""
    for group in buckets(views := bits(tensors)):
        head = views[group[0]]
        torch._foreach_mul_([views[i] for i in group], gate.to(device=head.device, dtype=head.dtype))


def choose_(into: Sequence[Tensor], new: Sequence[Tensor], gate: Tensor) -> None:
    """Copy `new` into `into` if the integer scalar `gate` is 1. Overwrites `new`."""
    keep_if_(new, gate)
    keep_if_(into, 1 - gate)
    old_bits, new_bits = bits(into), bits(new)
    for group in buckets(old_bits):
        torch._foreach_add_([old_bits[i] for i in group], [new_bits[i] for i in group])


def nonfinite_(tensors: Sequence[Tensor], found: Tensor, factor: Tensor) -> None:
    """Set `found` (a float32 scalar with value 0) to 1 if any entry is nan or inf. Does not synchronise.

    The entries are multiplied in place by `factor`, a float32 scalar on the device of `found`, normally 1. Tensors on
    another device need a copy of a scalar each way. All processes that share a tensor get the same result.
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
    # The order of the tensors is the same on every process.
    for mesh in dict.fromkeys(cast(Any, t).device_mesh for t in tensors if is_sharded(t)):
        for group in mesh.get_all_groups():
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=group)


def all_finite(tensors: Sequence[Tensor], layout: Layout) -> bool:
    """Whether all entries of these CPU tensors (gradients of the layout's weights) are finite."""
    if layout.simple and 0 < len(tensors) <= _FEW and math.isfinite(sum([float(t.sum()) for t in tensors])):
        return True  # an entry that is not finite would make the sum so; a sum may also overflow
    found, one = torch.zeros((), dtype=torch.float32), torch.ones((), dtype=torch.float32)
    if layout.simple and tensors:
        torch._amp_foreach_non_finite_check_and_unscale_(list(tensors), found, one)
    else:
        nonfinite_(tensors, found, one)
    return not float(found)


def values(grads: Sequence[Tensor | None]) -> list[Tensor]:
    """The existing gradients as dense tensors with shared storage; for sparse gradients, their values."""
    return [g._values() if g.is_sparse else g for g in grads if g is not None]


def clip_(grads: Sequence[Tensor | None], limit: float) -> None:
    """Scale in place so that the global norm is at most `limit`. Does not synchronise on accelerators."""
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
    """Add alpha * directions to weights in bf16 or fp16, rounded at random to one of the two neighbouring numbers.

    The probabilities make the mean of the rounded sum equal to the exact sum, so that changes far below the spacing of
    the numbers survive on average. `generator` must be on the weights' device.
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
    # The bit patterns of neighbours differ by 1 as integers; towards zero the integer becomes smaller.
    code = near.view(torch.int16)
    away = torch.where(near == 0, error, near.float()).sign() * error.sign()
    code = torch.where(near == 0, (error < 0).short() * -0x8000 + 1, code + away.short())
    other = torch.where(error == 0, near, code.view(dtype))
    # error / spacing; it is nan if the sum is exact (0 / 0) or overflows, and x is then kept.
    chance = error / (other.float() - near.float())
    return torch.where(torch.rand(x.shape, generator=generator, device=x.device) < chance, other, near)


def _blocks(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Positions in runs of at most `_BLOCK` elements; a larger tensor is a run of its own."""
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
