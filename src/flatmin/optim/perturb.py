"""Perturbs weights in place and restores them exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flatmin.methods import Perturbation
from flatmin.optim import tensors as ta


class FoundInf:
    """Two flags of an update on the device: [the ascent was finite, the descent gradient was not finite].

    Both are words of one buffer. Comparing the ascent's norm with (inf, -inf) sets the first flag (an integer) and
    clears the second (a float32: the bit pattern of 0 is 0.0) in one kernel launch. Another launch adds both to the
    totals, where an inf counts as the bit pattern of 1.0.
    """

    ONE = 0x3F800000

    def __init__(self, device: torch.device) -> None:
        self.words = torch.zeros(2, dtype=torch.int32, device=device)
        self.limits = torch.tensor([math.inf, -math.inf], dtype=torch.float32, device=device)
        self.one = torch.ones((), dtype=torch.float32, device=device)
        self.gate = self.words[0]
        self.found_inf = self.words.view(torch.float32)[1]
        self.totals = torch.zeros(2, dtype=torch.int64, device=device)
        self.ascents = 0

    def judge(self, size: Tensor, *, again: bool = False) -> None:
        """Set the ascent's flag and clear the descent's. With `again`: all ascents of the update must be finite."""
        if again:
            self.gate.mul_((size.to(torch.float32) < math.inf).to(torch.int32))
            return
        torch.lt(size.to(torch.float32), self.limits, out=self.words)

    def reset(self) -> None:
        """Clear both flags, for an update without ascent."""
        self.words.zero_()

    def count(self, *, ascended: bool) -> None:
        """Add this update's flags to the totals, on the device."""
        self.totals.add_(self.words)
        self.ascents += ascended

    def read(self) -> tuple[bool, bool]:
        """Read both flags, with one synchronisation: (ascent was finite, descent gradient was not finite)."""
        finite, found = self.words.tolist()
        return bool(finite), bool(found)


class WeightSnapshot:
    """Copies of the tensors that an ascent perturbs. The buffers are reused, so their addresses stay the same.

    Args:
        seed: seed of the random rounding of weights in half precision. Default 0.

    Attributes:
        away: the perturbed tensors and their copies; None if no tensor is perturbed.
        asked: the last perturbation without rounding, if it was recorded.
        unchecked: whether the effect of rounding has not been checked yet.
    """

    def __init__(self, seed: int = 0) -> None:
        self._layout: ta.Layout | None = None
        self._buffers: dict[int, Tensor] = {}
        self._whole: tuple[list[Tensor], list[Tensor]] | None = None  # all weights and their copies
        self._away: tuple[list[Tensor], list[Tensor]] | None = None
        self.away: tuple[list[Tensor], list[Tensor]] | None = None
        self._generators: dict[torch.device, torch.Generator] = {}
        self._seed, self._rounding = seed, 0
        self.unchecked = True
        self.asked: list[Tensor] | None = None

    def begin_update(self, step: int) -> None:
        """Seed the random rounding of update number `step`."""
        self._generators.clear()
        self._rounding = self._seed * 1_000_003 + step

    def move(
        self,
        layout: ta.Layout,
        offset: Perturbation,
        flags: FoundInf | None,
        *,
        again: bool = False,
        record: bool = False,
    ) -> bool:
        """Perturb the weights at the positions `offset.index`.

        Without flags the size is read on the host (CPU tensors). With flags nothing synchronises, and a direction that
        is not finite gives a perturbation of exactly zero.

        Args:
            layout: the layout of the weights.
            offset: the perturbation.
            flags: the flags on the device; None: decide on the host.
            again: whether this update has been perturbed before, so that the flags are combined. Default False.
            record: whether to store the perturbation without rounding in `asked`. Default False.

        Returns:
            False if the host has found that the perturbation is not finite, and the weights have not been moved.
        """
        weights, index = layout.weights, offset.index
        ws = weights if len(index) == len(weights) else [weights[i] for i in index]
        if flags is None and not math.isfinite(float(offset.size)):
            return False
        self._save(layout, ws, index)
        self.asked = [torch.empty(0)] * len(ws) if record else None
        if flags is None:
            self._add_on_host(ws, offset, layout)
        else:
            self._add_on_device(ws, offset, flags, again=again)
        return True

    def _add_on_host(self, ws: list[Tensor], offset: Perturbation, layout: ta.Layout) -> None:
        scale = 1.0 if offset.norm is None else 1.0 / (float(offset.norm) + offset.eps)
        for group, factor in _by_factor(ws, offset, alike=layout.simple):
            d, some = offset.direction, ws
            if len(group) < len(ws):
                d, some = [d[i] for i in group], [ws[i] for i in group]
            self._add(some, d, float(factor) * scale, group)

    def _add_on_device(self, ws: list[Tensor], offset: Perturbation, flags: FoundInf, *, again: bool) -> None:
        flags.judge(offset.size, again=again)
        divisor = None if offset.norm is None else offset.norm + offset.eps
        for group, factor in _by_factor(ws, offset, alike=False):
            d = [offset.direction[i] for i in group]
            # In half precision the quotient could under- or overflow.
            low = d[0].dtype in ta.LOW
            d = [x.float() for x in d] if low else d
            scratch = offset.scratch or low
            if divisor is None:
                d = d if scratch else list(torch._foreach_mul(d, 1.0))
            else:
                # With another dtype, foreach division would launch one kernel per tensor.
                real = torch.view_as_real(d[0]).dtype if d[0].is_complex() else d[0].dtype
                by = divisor.to(d[0].device, real)
                if scratch:
                    torch._foreach_div_(d, by)
                else:
                    d = list(torch._foreach_div(d, by))
            alpha = 1.0
            if isinstance(factor, Tensor):
                torch._foreach_mul_(d, factor.to(d[0].device, d[0].dtype))
            else:
                alpha = factor
            ta.keep_if_(d, flags.gate)
            self._add([ws[i] for i in group], d, alpha, group)

    def _add(self, ws: list[Tensor], d: list[Tensor], alpha: float, group: Sequence[int]) -> None:
        """Add alpha * d to ws in place. `group` holds the positions of ws in the list of all perturbed weights."""
        d = ta.aligned(d, ws)
        if self.asked is not None:
            for i, x in zip(group, d, strict=True):
                self.asked[i] = x.to(torch.promote_types(x.dtype, torch.float32)) * alpha
        if ws[0].dtype not in ta.LOW:
            torch._foreach_add_(ws, d, alpha=alpha)
            return
        device = ws[0].device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
            self._generators[device].manual_seed(self._rounding)
        ta.add_rounded_(ta.local(ws), ta.local(d), alpha, self._generators[device])

    def _save(self, layout: ta.Layout, ws: list[Tensor], index: Sequence[int]) -> None:
        assert self._away is None, "weights are already displaced"
        if layout is not self._layout:
            self._layout, self._buffers, self._whole = layout, {}, None
        if len(index) < len(layout.weights) or not layout.simple:
            self.away = (ws, self._copies(layout, index))
            self._away = (ta.local(ws), ta.local(self.away[1]))
        else:
            if self._whole is None:
                self._whole = (ws, self._copies(layout, index))
            self._away = self.away = self._whole
        torch._foreach_copy_(self._away[1], self._away[0])

    def _copies(self, layout: ta.Layout, index: Sequence[int]) -> list[Tensor]:
        for i in index:
            if i not in self._buffers:
                self._buffers[i] = torch.empty_like(layout.weights[i], requires_grad=False)
        return [self._buffers[i] for i in index]

    def restore(self) -> None:
        """Restore the weights, bit for bit; do nothing if they are not perturbed."""
        if self._away is not None:
            weights, copies = self._away
            torch._foreach_copy_(weights, copies)
            self._away = self.away = None


def _by_factor(ws: list[Tensor], offset: Perturbation, *, alike: bool) -> list[tuple[Sequence[int], float | Tensor]]:
    """Group positions by factor, dtype and device, for one foreach call each. `alike`: dtype and device are equal."""
    factors, first = offset.factors, offset.factors[0]
    equal = factors.count(first) == len(factors) if isinstance(first, float) else all(f is first for f in factors)
    if equal and (alike or ta.uniform(ws)):
        return [(range(len(ws)), first)]
    keys = [id(f) if isinstance(f, Tensor) else f for f in factors]
    return [(group, factors[group[0]]) for group in ta.buckets(ws, keys)]
