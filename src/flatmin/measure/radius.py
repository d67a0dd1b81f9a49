"""How far the linear prediction holds along a method's own ascent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

from torch import nn

MULTIPLES = tuple(2.0**k for k in range(-6, 7))
"""Of the param groups' rho; those that are tried by default."""
OFF = 0.5
"""The share by which the linear prediction is off at the radius that is looked for."""
RESOLUTION = 1e-5
"""The share of the loss below which a rise is rounding, in float32."""
LOW_RESOLUTION = 1e-2
"""The same under autocast to 16 bits."""

_WARNING = "This is where the linear prediction ends. Do not train with it: good radii are often much smaller."

Closure = Callable[[], Any]


class _Rise(Protocol):
    @property
    def loss(self) -> float: ...
    @property
    def predicted(self) -> tuple[float, ...]: ...
    @property
    def measured(self) -> tuple[float, ...]: ...


class Ascending(Protocol):
    """What is asked of an optimizer; every `flatmin.SAM` has it."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """With the radius of each group."""

    @property
    def rho_key(self) -> str:
        """Under this key."""

    @property
    def recipe(self) -> Any:
        """What it runs, with its name."""

    def rise(self, closure: Any, multiples: Sequence[float] = (1.0,), *, model: nn.Module | None = None) -> _Rise:
        """The rise of a batch's loss at multiples of the radii, leaving everything as it was."""


@dataclass(frozen=True, kw_only=True)
class FoundRadius:
    """The rise of the loss along a method's ascent over a range of radii, and where the linear prediction breaks.

    Args:
        method: its name.
        rho: the param groups' rho; of several the largest, the others being moved in proportion.
        radii: those that were tried, rising.
        losses: L(w) of each batch.
        predicted: for each batch <grad L(w), eps> at each radius.
        measured: for each batch L(w + eps) - L(w) at each radius.
        off: the share by which the prediction is off at the radius looked for.
        limits: for each batch the least radius at which |measured / predicted - 1| = off, between two radii on a
            straight line; infinity if it lies above all of them, NaN if the ascent does not lead uphill on the batch.
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
        """The limits of the batches on which the ascent leads uphill, rising."""
        return tuple(sorted(limit for limit in self.limits if not math.isnan(limit)))

    @property
    def limit(self) -> float:
        """The median of the limits; infinity above the radii tried, NaN if the ascent leads uphill on no batch."""
        return median(self.uphill) if self.uphill else math.nan

    @property
    def ratios(self) -> tuple[tuple[float, ...], ...]:
        """For each batch measured / predicted at each radius."""
        return tuple(
            tuple(m / p if p else math.nan for m, p in zip(*pair, strict=True))
            for pair in zip(self.measured, self.predicted, strict=True)
        )

    def sentence(self) -> str:
        """What was found, in words."""
        if not any(any(each) for each in self.predicted):
            return "The gradient is zero on every batch."
        count, uphill = len(self.limits), self.uphill
        batches = f"{count} batch{'es' if count > 1 else ''}"
        if not uphill:
            return f"The ascent leads uphill on none of {batches}, so that there is no prediction to hold it against."
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
        """A table of means over the batches, what was found, and what it is not."""
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
    r"""How far the linear prediction of the loss holds along a method's own ascent, over a few batches.

    .. math::
        \frac{L(w + \epsilon) - L(w)}{\langle \nabla L(w), \epsilon \rangle} = 1 \pm \text{off}

    SAM's ascent solves a linear problem, so beyond the radius at which the loss is no longer linear it is an ascent
    along some direction only. With off = 1/2 the quadratic term is then half the linear one: the slope along the way
    has doubled or vanished. Where the loss is a parabola along SAM's way this radius is ||g|| / |h|, h the curvature
    along g, which is also how far away the parabola's minimum lies, downhill. It is a diagnostic and no radius to train
    with: where both were compared, the radius that validation chose was mostly far below it.

    It costs for each batch one gradient, and for each radius those of an ascent and one more: with the defaults 27 for
    SAM. What it changes is put back, see `flatmin.SAM.rise`; memories of the method are as they are, filled or empty.

    Args:
        optimizer: as made by `flatmin.wrap`, before the first loss of a step or after `optimizer.step()`.
        closures: one for each batch, as for `optimizer.step`: it computes the loss, calls backward and returns the
            loss. For methods that want micro-batches a list of closures for each batch.
        multiples: of the param groups' rho, rising; a number or several. Default: 1/64 to 64 in steps of two.
        off: share by which the prediction is off at the radius looked for, > 0. Default 0.5.
        resolution: predicted rises below this share of the loss are not judged, being rounding. Default 1e-5; under
            autocast to 16 bits give 0.01 (`LOW_RESOLUTION`).
        model: whose buffers and other untrained state are put back. Default: the model that the optimizer was given.

    Raises:
        ValueError: no closures, radii that do not rise from above 0, a bad `off`, and what `flatmin.SAM.rise` refuses.
        TypeError: an optimizer that `flatmin.wrap` has not made.
        ArithmeticError: a loss or gradient at w that is not finite.

    Source: our own; the linear problem is Eq. 2 of Foret et al., SAM, ICLR 2021.

    Example:
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
        raise TypeError(f"radius needs the optimizer that flatmin.wrap made, got {type(optimizer).__name__}.")
    try:
        tried = [float(m) for m in multiples] if isinstance(multiples, Iterable) else [float(multiples)]
    except (TypeError, ValueError):
        raise ValueError(f"multiples must be numbers above 0, got {multiples!r}.") from None
    if not given:
        raise ValueError("closures is empty; give one for each of a few batches.")
    if not tried or tried != sorted(set(tried)) or not 0 < tried[0] <= tried[-1] < math.inf:
        raise ValueError(f"multiples must rise from above 0, got {multiples!r}.")
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
    """The least radius at which the prediction is off by this share."""
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
