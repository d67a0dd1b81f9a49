"""Radius finder: how far the linear prediction of the loss holds along the ascent of a method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

from torch import nn

MULTIPLES = tuple(2.0**k for k in range(-6, 7))
"""Default radii, in multiples of the param groups' rho: 1/64 to 64 in factors of two."""
OFF = 0.5
"""Default relative error of the linear prediction at the radius to find."""
RESOLUTION = 1e-5
"""A rise below this share of the loss is rounding error in float32."""
LOW_RESOLUTION = 1e-2
"""A rise below this share of the loss is rounding error under autocast to 16 bits."""

_WARNING = (
    "This is where the linear prediction fails. It is not a radius to train with: good radii are often much smaller."
)

Closure = Callable[[], Any]


class _Rise(Protocol):
    @property
    def loss(self) -> float: ...
    @property
    def predicted(self) -> tuple[float, ...]: ...
    @property
    def measured(self) -> tuple[float, ...]: ...


class Ascending(Protocol):
    """Interface of the optimizer that `radius` needs. Every `flatmin.SAM` provides it."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The param groups, with the radius of each."""

    @property
    def rho_key(self) -> str:
        """The key of the radius in a param group."""

    @property
    def recipe(self) -> Any:
        """The recipe of the method, with its name."""

    def rise(self, closure: Any, multiples: Sequence[float] = (1.0,), *, model: nn.Module | None = None) -> _Rise:
        """Measure the rise of a batch's loss at multiples of the radii, without changing anything."""


@dataclass(frozen=True, kw_only=True)
class FoundRadius:
    """Result of `radius`: the rise of the loss along a method's ascent, and where its linear prediction fails.

    Args:
        method: name of the method.
        rho: the param groups' rho. With several values it is the largest, and the others are scaled with it.
        radii: the radii that were tried, ascending.
        losses: L(w) of each batch.
        predicted: for each batch, <grad L(w), eps> at each radius.
        measured: for each batch, L(w + eps) - L(w) at each radius.
        off: relative error of the prediction at the radius to find.
        limits: for each batch, the smallest radius at which |measured / predicted - 1| = off, by linear interpolation
            between the radii tried. Infinity if it lies above all of them; NaN if the predicted rise is not positive,
            or too small to judge at all radii.
    """

    method: str
    rho: float
    radii: tuple[float, ...]
    losses: tuple[float, ...]
    predicted: tuple[tuple[float, ...], ...]
    measured: tuple[tuple[float, ...], ...]
    off: float
    limits: tuple[float, ...]

    @property
    def uphill(self) -> tuple[float, ...]:
        """The limits of the batches on which the ascent leads uphill, ascending."""
        return tuple(sorted(limit for limit in self.limits if not math.isnan(limit)))

    @property
    def limit(self) -> float:
        """The median of `uphill`; infinity if above the radii tried, NaN if the ascent leads uphill on no batch."""
        return median(self.uphill) if self.uphill else math.nan

    @property
    def ratios(self) -> tuple[tuple[float, ...], ...]:
        """For each batch, measured / predicted at each radius."""
        return tuple(
            tuple(m / p if p else math.nan for m, p in zip(*pair, strict=True))
            for pair in zip(self.measured, self.predicted, strict=True)
        )

    def sentence(self) -> str:
        """The result in words."""
        if not any(any(each) for each in self.predicted):
            return "The gradient is zero on every batch."
        count, uphill = len(self.limits), self.uphill
        batches = f"{count} batch{'es' if count > 1 else ''}"
        if not uphill:
            return f"The ascent leads uphill on none of {batches}, so there is no prediction to compare with."
        left = f" On {count - len(uphill)} of {batches} the ascent does not lead uphill." if len(uphill) < count else ""
        if math.isinf(self.limit):
            broken = sum(map(math.isfinite, uphill))
            some = f"On {len(uphill) - broken} of {batches} the" if broken else "The"
            others = "the others" if len(uphill) == count else f"{broken} of them"
            rest = f"; on {others} from rho = {uphill[0]:.3g}" if broken else ""
            return (
                f"{some} linear prediction is off by less than {self.off:.0%} up to rho = {self.radii[-1]:.3g}, the "
                f"largest radius tried{rest}.{left}"
            )
        ends = "" if count == 1 else f" ({_number(uphill[0])} to {_number(uphill[-1])} over {batches})"
        return (
            f"The linear prediction is off by {self.off:.0%} at rho = {self.limit:.3g}{ends}, "
            f"{self.limit / self.rho:.2g} times the param groups' rho.{left}"
        )

    def __str__(self) -> str:
        """A table of means over the batches, the result, and a warning against training with this radius."""
        count = len(self.losses)
        head = f"{self.method}, rho = {self.rho:.3g}, loss {_mean(self.losses):.4g} on {count} batch"
        head += "es" if count > 1 else ""
        if not any(any(each) for each in self.predicted):
            return f"{head}\n\n{self.sentence()}"
        rows = [("rho", "predicted rise", "measured rise", "measured / predicted")]
        for i, radius in enumerate(self.radii):
            ratios = [each[i] for each in self.ratios if not math.isnan(each[i])] or [math.nan]
            rows.append(
                (
                    f"{radius:.3g}",
                    f"{_mean([p[i] for p in self.predicted]):.3g}",
                    f"{_mean([m[i] for m in self.measured]):.3g}",
                    f"{median(ratios):.3g} ({min(ratios):.3g} to {max(ratios):.3g})",
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([head, "", *lines, "", self.sentence(), _WARNING])


def radius(
    optimizer: Ascending,
    closures: Sequence[Closure | Sequence[Closure]],
    *,
    multiples: float | Sequence[float] = MULTIPLES,
    off: float = OFF,
    resolution: float = RESOLUTION,
    model: nn.Module | None = None,
) -> FoundRadius:
    """Find the radius at which the linear prediction of the loss fails along the ascent of a method.

        (L(w + eps) - L(w)) / <grad L(w), eps> = 1 +- off

    SAM's ascent solves a linearised problem. Beyond the radius at which the loss is no longer linear, it is only an
    ascent along some direction. With off = 1/2, the quadratic term is half the linear term there: the slope along the
    ascent has doubled or vanished. If the loss is a parabola along SAM's ascent, this radius is ||g|| / |h|, where h is
    the curvature along g; it is also the distance to the minimum of the parabola, in the downhill direction.

    This is a diagnostic, not a radius to train with: where both were compared, the radius chosen on validation data was
    mostly far smaller.

    The cost per batch is one gradient, and for each radius the gradients of an ascent plus one: 27 gradients for SAM
    with the defaults. Everything that is changed is restored, see `flatmin.SAM.rise`. The state of the method (such as
    a moving average) is used as it is, filled or empty.

    Args:
        optimizer: an optimizer made by `flatmin.wrap`, before the first loss of a step or after `optimizer.step()`.
        closures: one closure per batch, as for `optimizer.step`: it computes the loss, calls backward and returns the
            loss. For methods that use micro-batches: a list of closures per batch.
        multiples: radii in multiples of the param groups' rho, ascending; a number or a sequence. Default: 1/64 to 64
            in factors of two.
        off: relative error of the prediction at the radius to find, > 0. Default 0.5.
        resolution: predicted rises below this share of the loss are ignored as rounding error. Default 1e-5; use 0.01
            (`LOW_RESOLUTION`) under autocast to 16 bits.
        model: model whose buffers and other untrained state are restored. Default None: the model that was passed to
            the optimizer.

    Returns:
        The rises at all radii, and the radius found for each batch.

    Raises:
        ValueError: there are no closures, `multiples` is not ascending from above 0, `off` or `resolution` is not
            above 0, or as in `flatmin.SAM.rise`.
        TypeError: the optimizer was not made by `flatmin.wrap`.
        ArithmeticError: the loss or gradient at w is not finite.

    Source: this package; the linear problem is Eq. 2 of Foret et al., SAM, ICLR 2021.

    Examples:
        >>> import torch, flatmin
        >>> from flatmin.measure import radius
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 0.0]))
        >>> optimizer = flatmin.wrap(torch.optim.SGD([w], lr=0.1), rho=0.5)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = w.square().sum()
        ...     loss.backward()
        ...     return loss
        >>> print(radius(optimizer, [closure]).sentence())
        The linear prediction is off by 50% at rho = 3, 6 times the param groups' rho.
    """
    given = [closures] if callable(closures) else list(closures)
    if not hasattr(optimizer, "rise"):
        raise TypeError(f"radius needs an optimizer made by flatmin.wrap, got {type(optimizer).__name__}.")
    try:
        tried = [float(m) for m in multiples] if isinstance(multiples, Iterable) else [float(multiples)]
    except (TypeError, ValueError):
        raise ValueError(f"multiples must be numbers above 0, got {multiples!r}.") from None
    if not given:
        raise ValueError("closures is empty; pass one closure for each of a few batches.")
    if not tried or tried != sorted(set(tried)) or not 0 < tried[0] <= tried[-1] < math.inf:
        raise ValueError(f"multiples must be finite, ascending and above 0, got {multiples!r}.")
    for name, value in (("off", off), ("resolution", resolution)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be above 0, got {value!r}.")
    rises = [optimizer.rise(closure, tried, model=model) for closure in given]
    rho = max(float(group[optimizer.rho_key]) for group in optimizer.param_groups)
    radii = tuple(rho * multiple for multiple in tried)
    return FoundRadius(
        method=optimizer.recipe.name,
        rho=rho,
        radii=radii,
        losses=tuple(rise.loss for rise in rises),
        predicted=tuple(rise.predicted for rise in rises),
        measured=tuple(rise.measured for rise in rises),
        off=off,
        limits=tuple(_limit(radii, rise, off, resolution * abs(rise.loss)) for rise in rises),
    )


def _limit(radii: Sequence[float], rise: _Rise, off: float, floor: float) -> float:
    """The smallest radius at which the relative error of the prediction is `off`."""
    before, was = 0.0, 0.0
    judged = False
    for radius, predicted, measured in zip(radii, rise.predicted, rise.measured, strict=True):
        if abs(predicted) < floor:
            continue
        if predicted <= 0 and not judged:
            return math.nan
        judged = True
        now = measured / predicted - 1
        if not math.isfinite(now):
            return math.sqrt(before * radius) if before else radius
        if abs(now) >= off:
            return before + (radius - before) * (math.copysign(off, now) - was) / (now - was)
        before, was = radius, now
    return math.inf if judged else math.nan


def _number(value: float) -> str:
    return "beyond the radii tried" if math.isinf(value) else f"{value:.3g}"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
