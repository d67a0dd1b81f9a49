"""List algebra that knows mixed dtypes, several devices and shards. The only file that special-cases DTensor."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

_PLAIN = {Tensor, torch.nn.Parameter}
_SMALL = 1 << 14  # elements
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


def buckets(tensors: Sequence[Tensor], *keys: Sequence[Any]) -> list[list[int]]:
    """Positions grouped by dtype, device and further keys, so that each group suits one foreach call."""
    found: dict[Any, list[int]] = {}
    for i, t in enumerate(tensors):
        found.setdefault((t.dtype, t.device, *(k[i] for k in keys)), []).append(i)
    return list(found.values())


def uniform(tensors: Sequence[Tensor]) -> bool:
    """Whether one foreach call serves all."""
    return len({t.dtype for t in tensors}) == 1 and len({t.device for t in tensors}) == 1


def copy_(into: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """into[i] <- source[i], bit for bit, in place. DTensor has no foreach copy, its shards do."""
    if into:
        torch._foreach_copy_(local(into), local(source))


def _accumulate_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


class Layout:
    """What one sweep over the weights tells, kept while they are the same tensors of the same dtypes.

    Attributes:
        simple: ordinary tensors of one real dtype on the CPU, where a foreach call takes them as they are.
        small: simple, and each so small that a call per tensor costs more than a copy of all.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = list(weights)
        self._dtypes = [w.dtype for w in weights]
        device = weights[0].device if weights else torch.device("cpu")
        self._device = device
        one = len(set(self._dtypes)) == 1 and not self._dtypes[0].is_complex
        self.simple = one and plain(weights) and {w.device.type for w in weights} == {"cpu"}
        self.small = self.simple and len(weights) > 1 and max(w.numel() for w in weights) <= _SMALL

    def fits(self, weights: Sequence[Tensor]) -> bool:
        """Whether these are the weights it was made for."""
        known = self.weights
        return (
            len(known) == len(weights)
            and all(map(operator.is_, known, weights))
            and self._dtypes == [w.dtype for w in weights]
            and (not known or known[0].device == self._device)
        )


def norm(tensors: Sequence[Tensor], layout: Layout | None = None) -> Tensor:
    """Global L2 norm in fp32, or fp64 if any tensor is fp64; one scalar on the first tensor's device.

    Squares are summed in that precision, so entries above about 1e19 overflow to inf in fp32.
    """
    tensors = list(tensors)
    if layout is not None and layout.small and len(tensors) > 1:
        tensors = [torch._C._nn.flatten_dense_tensors(tensors)]
    groups = [tensors] if uniform(tensors) else [[tensors[i] for i in b] for b in buckets(tensors)]
    parts: list[Tensor] = []
    for group in groups:
        low = group[0].dtype in (torch.float16, torch.bfloat16)
        parts.extend(torch._foreach_norm(group, 2.0, dtype=torch.float32) if low else torch._foreach_norm(group, 2.0))
    if len(groups) > 1:
        wide = max((p.dtype for p in parts), key=lambda d: d.itemsize)
        parts = [p.to(device=tensors[0].device, dtype=wide) for p in map(full_scalar, parts)]
    return full_scalar(parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts)))


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Global inner product sum_i <a_i, b_i> (real part), in fp32 or better, on the first tensor's device."""
    total: Tensor | None = None
    for x, y in zip(a, b, strict=True):
        wide = _accumulate_in(x.dtype)
        if x.is_complex():
            x, y = torch.view_as_real(x), torch.view_as_real(y)
        part = full_scalar((x.to(wide) * y.to(wide)).sum())
        total = part if total is None else total + part.to(total.device)
    assert total is not None
    return total


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


def nonfinite_(tensors: Sequence[Tensor], found: Tensor, one: Tensor) -> None:
    """Set `found` (a zero fp32 scalar) to 1 if any entry is nan or inf; one launch per foreach chunk, no sync.

    `one` is an fp32 scalar 1 on the device of `found`. Tensors on another device add a copy of a scalar each way.
    """
    for group in buckets(tensors):
        chosen = [tensors[i] for i in group]
        if chosen[0].is_complex():
            chosen = [torch.view_as_real(t) for t in chosen]
        device = chosen[0].device
        if device == found.device:
            torch._amp_foreach_non_finite_check_and_unscale_(chosen, found, one)
        else:
            there = torch.zeros_like(found, device=device)
            torch._amp_foreach_non_finite_check_and_unscale_(chosen, there, one.to(device))
            torch.maximum(found, there.to(found.device), out=found)


def all_finite(tensors: Sequence[Tensor], layout: Layout) -> bool:
    """Whether no entry of these CPU tensors, gradients of the layout's weights, is nan or inf."""
    found, one = torch.zeros((), dtype=torch.float32), torch.ones((), dtype=torch.float32)
    if layout.simple and tensors:
        torch._amp_foreach_non_finite_check_and_unscale_(list(tensors), found, one)
    else:
        nonfinite_(tensors, found, one)
    return not float(found)
