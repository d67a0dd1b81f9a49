"""Numbers of a step: recorded on the device, read on demand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flatmin.methods import Gradients
from flatmin.optim import tensors as ta
from flatmin.optim.state import ASCENT, DIAGNOSTICS, MethodState
from flatmin.words import warn

CLASSES = ("ratio_above_1", "ratio_0_to_1", "ratio_minus_1_to_0", "ratio_below_minus_1")


class Diagnostics:
    """The numbers of the last update; see `SAM.diagnostics`.

    Args:
        state: the method's state, with a slot for the last perturbation.
    """

    def __init__(self, state: MethodState) -> None:
        self._state = state
        self.latest: dict[str, Tensor] = {}
        self._clear()

    def _clear(self) -> None:
        self._values: dict[str, Tensor] = {}
        self._g: Gradients = []
        self._correct: list[Tensor] = []
        self._ascent: tuple[Sequence[Tensor], Sequence[Tensor]] = ((), ())

    def turn_over(self) -> None:
        """End an update: its numbers can be read until the next update ends."""
        self.latest = self._values
        self._clear()

    def loss(self, loss: Any, *, perturbed: bool) -> None:
        """Record the loss of a pass at w, or of the descent pass at w + eps."""
        name = "loss_perturbed" if perturbed else "loss"
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._values[name] = loss.detach()

    def outputs(self, outputs: Any, target: Any, ignored: Any, *, perturbed: bool) -> None:
        """Record which samples are classified correctly: outputs (N, K), targets (N,) without the value `ignored`."""
        if not (isinstance(outputs, Tensor) and isinstance(target, Tensor)):
            return
        if outputs.ndim != 2 or target.ndim != 1 or target.is_floating_point():
            return
        right = outputs.detach().argmax(1) == target
        if ignored is not None:
            # Count ignored targets as correct in both passes: neither misclassified nor flipped.
            right |= target == ignored
        if not perturbed:
            self._correct.append(right)
            return
        self._add("misclassified", (~right).sum())
        if self._correct and self._correct[0].shape == right.shape:
            self._add("flipped", (self._correct.pop(0) & ~right).sum())

    def _add(self, name: str, value: Tensor) -> None:
        self._values[name] = self._values[name] + value if name in self._values else value

    def first(self, grads: Gradients) -> None:
        """Record the gradients of the first pass at w."""
        if not self._g:
            self._g = list(grads)

    def displaced(self, weights: Sequence[Tensor], copies: Sequence[Tensor], asked: Sequence[Tensor]) -> None:
        """Record a perturbation: the weights at w + eps, their copies at w, and eps before rounding."""
        self._values.update(realised(weights, copies, asked))
        self._ascent = weights, asked
        before = self._state.read(DIAGNOSTICS, weights)[ASCENT]
        last = self._state.per_weight[f"{DIAGNOSTICS}.{ASCENT}"]
        if not last:
            return
        both = [(a, b) for a, b in zip(asked, before, strict=True) if b is not None]
        norm = self._values["epsilon_asked"] * ta.norm(list(last.values())).to(asked[0].device)
        inner = ta.dot([a for a, _ in both], [b for _, b in both]).to(norm.device) if both else torch.zeros_like(norm)
        self._values["ascent_cosine"] = torch.where(norm > 0, inner / norm, math.nan)

    def keep(self) -> None:
        """Store the perturbation of this update, for the cosine with the next one.

        It works in place and does not wait for the device, so that a CUDA graph can replay it. A perturbation of length
        zero or of infinite length (after a gradient that is not finite) is not stored; the previous one stays.
        """
        weights, eps = self._ascent
        if not weights:
            return
        size = self._values["epsilon_asked"]
        gate = ((size > 0) & (size < math.inf)).to(torch.int32)
        moved = set(weights)
        still = [e for w, e in self._state.per_weight[f"{DIAGNOSTICS}.{ASCENT}"].items() if w not in moved]
        ta.keep_if_(still, 1 - gate)
        self._state.commit(DIAGNOSTICS, weights, {ASCENT: eps}, gate)

    def last(self, grads: Gradients, weights: Sequence[Tensor], *, perturbed: bool) -> None:
        """Record the gradients of the descent pass."""
        self._values["weight_norm"] = ta.norm([w.detach() for w in weights])
        pairs = [
            (_dense(g), _dense(s)) for g, s in zip(self._g, grads, strict=False) if g is not None and s is not None
        ]
        self._g = []
        size = ta.norm([_dense(s) for s in grads if s is not None])
        self._values["perturbed_gradient_norm" if perturbed else "gradient_norm"] = size
        if not pairs or not perturbed:
            return
        g, s = [a for a, _ in pairs], [b for _, b in pairs]
        g_norm, s_norm = ta.norm(g), ta.norm(s)
        self._values["gradient_norm"] = g_norm
        product = g_norm * s_norm
        self._values["cosine"] = torch.where(product > 0, ta.dot(g, s) / product, torch.zeros_like(product))
        counts = torch.stack([_ratio_counts(a, b).to(g_norm.device) for a, b in pairs]).sum(0)
        for name, count in zip((*CLASSES, "entries", "same_sign"), counts, strict=True):
            self._values[name] = count

    def read(self) -> dict[str, float]:
        """All numbers as Python floats, with one synchronisation."""
        names = list(self.latest)
        if not names:
            return {}
        device = self.latest[names[0]].device
        found = torch.stack([self.latest[n].to(device, torch.float64) for n in names]).tolist()
        values = dict(zip(names, found, strict=True))
        entries = values.pop("entries", 0.0)
        for name in (*CLASSES, "same_sign"):
            if name in values:
                values[name] /= max(entries, 1.0)
        if math.isnan(values.get("ascent_cosine", 0.0)):
            del values["ascent_cosine"]
        if "ratio_above_1" in values:
            values["ratio_larger"] = values["ratio_above_1"] + values["ratio_below_minus_1"]
        return values


def realised(weights: Sequence[Tensor], copies: Sequence[Tensor], asked: Sequence[Tensor]) -> dict[str, Tensor]:
    """How the realised perturbation weights - copies compares with the requested one."""
    wide = [torch.promote_types(w.dtype, torch.float32) for w in weights]
    made = [w.to(d) - c.to(d) for w, c, d in zip(weights, copies, wide, strict=True)]
    norm, wanted = ta.norm(made), ta.norm(asked)
    inner = ta.dot(made, asked)
    still = [ta.full_scalar(((m == 0) & (a != 0)).sum()) for m, a in zip(made, asked, strict=True)]
    entries = sum(m.numel() for m in made)
    one = torch.ones_like(norm)
    return {
        "epsilon_norm": norm,
        "epsilon_asked": wanted,
        "epsilon_projection": torch.where(wanted > 0, inner / wanted**2, one),
        "epsilon_cosine": torch.where((norm > 0) & (wanted > 0), inner / (norm * wanted), one),
        "epsilon_unmoved": torch.stack([s.to(norm.device) for s in still]).sum() / max(entries, 1),
    }


def _dense(g: Tensor) -> Tensor:
    return g.to_dense() if g.is_sparse else g


def _ratio_counts(g: Tensor, s: Tensor) -> Tensor:
    """The numbers of entries of r = s / g in each class, of all entries, and of those with equal signs."""
    if g.is_complex():
        g, s = torch.view_as_real(g), torch.view_as_real(s)
    # Products of small gradients would underflow.
    same, other = ((g > 0) & (s > 0)) | ((g < 0) & (s < 0)), ((g > 0) & (s < 0)) | ((g < 0) & (s > 0))
    larger = s.abs() > g.abs()
    counted = [same & larger, same & ~larger, other & ~larger, other & larger, torch.ones_like(same), same]
    return torch.stack([ta.full_scalar(c.sum()) for c in counted]).to(torch.float64)


def warn_of_rounding(weights: list[Tensor], copies: list[Tensor], asked: list[Tensor]) -> None:
    """Warn if rounding has changed the length of the perturbation by more than a fifth."""
    seen = {k: float(v) for k, v in realised(weights, copies, asked).items()}
    made, wanted = seen["epsilon_norm"], seen["epsilon_asked"]
    if wanted > 0 and abs(made / wanted - 1.0) > 0.2:
        warn(
            f"weights in half precision: the perturbation has norm {made:.3g} instead of {wanted:.3g}, cosine "
            f"{seen['epsilon_cosine']:.2f} with the requested one, and {seen['epsilon_unmoved']:.0%} of the entries "
            "did not move. Its component along the requested direction is right on average; the rest is rounding "
            "noise. Keep the weights in float32 and use autocast, or raise rho."
        )
