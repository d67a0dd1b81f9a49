"""Determine how the losses of batches are combined into the loss of all data.

A loss is a function of (outputs, targets), and nothing declares reliably what its mean divides by. So every possible
weight of a batch is a candidate. It is kept if the losses and gradients of two parts of a few examples, combined with
that weight, give those of all these examples. To cover what other examples show, the loss of every batch is then
compared with the losses of parts of its outputs.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from flatmin.measure.counts import (
    BatchWeight,
    CallerWeight,
    Reduction,
    WeightRule,
    candidates,
    is_of_torch,
    labels_of,
    may_be_ignored,
    options_of,
)
from flatmin.measure.nested import Axes, Pair, axis_of, cut, first_tensor, joined, tensors

_PROBES = 10  # number of further comparisons, after the first few
_ROWS = 6  # examples of one batch in a comparison
# Exceptions that a loss may raise on examples that it does not support.
Unfit = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError)


class LossTrial(Protocol):
    """Interface of an object that evaluates losses and gradients for comparison."""

    tol: float

    def together(self, pair: Pair, rows: Sequence[Tensor], count: int, axes: Axes) -> list[Tensor] | None:
        """[loss, gradient] of each set of rows, from one forward pass; None if the outputs have no row per example."""

    def apart(self, pair: Pair, rows: Sequence[Tensor], count: int, axes: Axes) -> list[Tensor] | None:
        """[loss, gradient] of each set of rows, with a separate forward pass for each."""


@dataclass
class TrialOutcome:
    """Result of the comparisons.

    Args:
        names: texts of the weights that passed all comparisons.
        summed: whether the sum passed all comparisons.
        probes: number of comparisons.
        coupled: whether the outputs of an example depend on the other examples.
        comparison: description of one comparison.
        trial: see `WeightRule`.
    """

    names: list[str]
    summed: bool
    probes: int = 0
    coupled: bool = False
    comparison: str = ""
    trial: tuple[str, Axes] | None = None

    @property
    def failed(self) -> bool:
        """Whether there were comparisons and nothing passed them."""
        return self.probes > 0 and not self.names and not self.summed


def compare(
    trial: LossTrial, pairs: Sequence[Pair], counts: Sequence[BatchWeight | CallerWeight], *, in_eval: bool
) -> TrialOutcome:
    """Find the weights for which the losses of parts, combined, give the loss of the whole.

    Args:
        trial: evaluates losses and gradients.
        pairs: the batches.
        counts: candidate weights.
        in_eval: whether the examples are presumably independent of each other in the model. If so, the model runs on
            each part separately first; otherwise its outputs for the whole are split first.
    """
    shapes = [first_tensor(targets).shape for _, targets in pairs]
    ways = ("apart", "together") if in_eval else ("together", "apart")
    tries: list[tuple[str, Axes]] = [(way, (0, 1)) for way in ways]
    if all(len(s) > 1 for s in shapes):
        # Outputs could be split along any dimension. Dimension 1 is tried as the examples only if it alone differs
        # between batches, or if the model runs on parts of it.
        second = len({s[:1] for s in shapes}) == 1 < len({s[1:2] for s in shapes})
        tries += [(way, (1, 0)) for way in (ways if second else ways[:1] if in_eval else ())]
    first: TrialOutcome | None = None
    for way, along in tries:
        outcome = _Comparison(getattr(trial, way), trial.tol, pairs, counts, along).run()
        if outcome.probes and not outcome.failed:
            outcome.coupled = in_eval and way == "together"
            outcome.trial = way, along
            return outcome
        first = outcome if first is None or (outcome.probes and not first.probes) else first
    assert first is not None
    return first


Row = tuple[int, int]  # number of a batch, and of an example in it


def _layout(part: Any, count: int, axes: Axes) -> tuple[int | None, ...]:
    """The dimension of the examples in each tensor of nested data."""
    return tuple(axis_of(t, count, axes) for _, t in tensors(part))


def _units(pairs: Sequence[Pair], axes: Axes) -> list[tuple[Pair, int]]:
    """Batches with their numbers of examples; empty if the sizes do not show which dimension indexes the examples."""
    units = [(pair, first_tensor(pair[1]).shape[axes[0]]) for pair in pairs]
    return units if len({_layout(pair, n, axes) for pair, n in units}) == 1 else []


def _mean(weights: Sequence[float], parts: Sequence[Tensor]) -> Tensor | None:
    """The weighted mean of the losses of two parts; None if both weights are zero."""
    total = sum(weights)
    counted = [(w / total) * p for w, p in zip(weights, parts, strict=True) if w and total]
    return torch.stack(counted).sum(0) if counted else None


def _empty(weights: Sequence[float], parts: Sequence[Tensor]) -> bool:
    """Whether a part is a mean over no term: it is not finite, and shows nothing about the divisor."""
    return any(w == 0 and not p.isfinite().all() for w, p in zip(weights, parts, strict=True))


class _Comparison:
    """Comparisons with one way of separating examples, along one dimension."""

    def __init__(
        self,
        evaluate: Callable[[Pair, Sequence[Tensor], int, Axes], list[Tensor] | None],
        tol: float,
        pairs: Sequence[Pair],
        counts: Sequence[BatchWeight | CallerWeight],
        axes: Axes,
    ) -> None:
        self.evaluate, self.tol, self.axes = evaluate, tol, axes
        self.units = _units(pairs, axes)
        self.generator = torch.Generator().manual_seed(0)
        self.alive: dict[str, BatchWeight | CallerWeight] = {c.text: c for c in reversed(counts)}
        self.alive = {c.text: self.alive[c.text] for c in counts}  # in the given order, the first of each text
        self.rows: dict[str, Tensor | None] = {}
        self.summed, self.probes, self.comparison = True, 0, ""

    def run(self) -> TrialOutcome:
        """Run all comparisons."""
        for rows in (*self._mixed(), *self._within()):
            first = 2 if len(rows) > 4 else 1
            self._try(rows[:first], rows[first:])
        tried: set[tuple[str, str]] = set()
        for _ in range(_PROBES if self.probes else 0):
            chosen = self._apart(tried)
            if chosen is None:
                break
            self._try(*chosen)
        return TrialOutcome(list(self.alive), self.summed, self.probes, comparison=self.comparison)

    def _within(self) -> Iterator[list[Row]]:
        """Examples of the first and of the last batch, each batch separately."""
        for unit in sorted({0, len(self.units) - 1} if self.units else ()):
            yield [(unit, i) for i in self._drawn(self.units[unit][1], _ROWS)]

    def _mixed(self) -> Iterator[list[Row]]:
        """Examples of several batches, twice, including examples with different labels."""
        for _ in range(2 if len(self.units) > 1 else 0):
            some = [self._one(unit) for _ in range(2) for unit in self._drawn(len(self.units), _ROWS)]
            some = list(dict.fromkeys([*some[: 2 * _ROWS - 4], *self._unlike()]))
            yield [some[i] for i in self._drawn(len(some), len(some))]

    def _unlike(self) -> list[Row]:
        """One example for each of up to four labels."""
        rows: dict[float, Row] = {}
        for unit, (pair, n) in enumerate(self.units):
            first = first_tensor(pair[1])
            axis = axis_of(first, n, self.axes)
            if first.is_floating_point() or first.is_complex() or axis is None or not first.numel():
                break
            labels = first.movedim(axis, 0).reshape(n, -1)[:, -1].tolist()
            for i, label in enumerate(labels):
                rows.setdefault(label, (unit, i))
            if len(rows) >= 4:
                break
        return list(rows.values())[:4]

    def _drawn(self, count: int, most: int) -> list[int]:
        numbers: list[int] = torch.randperm(count, generator=self.generator)[:most].tolist()
        return numbers

    def _one(self, unit: int) -> Row:
        return unit, int(torch.randint(self.units[unit][1], (), generator=self.generator))

    def _apart(self, tried: set[tuple[str, str]]) -> tuple[list[Row], list[Row]] | None:
        """Two parts that distinguish two of the remaining weights; None if all are proportional on all examples."""
        for name in self.alive.keys() - self.rows.keys():
            self.rows[name] = self._rows(self.alive[name])
        rows = {name: self.rows[name] for name in self.alive}
        shares_of = {name: r / r.sum() for name, r in rows.items() if r is not None and float(r.sum()) > 0}
        for (a, x), (b, y) in itertools.combinations(shares_of.items(), 2):
            far = x - y
            if (a, b) in tried or float(far.abs().max()) <= 1e-9 * float(torch.maximum(x, y).max()):
                continue
            tried.add((a, b))
            most, least = self._place(int(far.argmax())), self._place(int(far.argmin()))
            if self._pair([most, least]) is not None:
                return [most], [least]
            # The batches cannot be concatenated: use the best pair within one batch.
            best: tuple[float, list[Row], list[Row]] = (-1.0, [], [])
            start = 0
            for unit, (_, n) in enumerate(self.units):
                part = slice(start, start + n)
                if n > 1:
                    high, low = int(far[part].argmax()), int(far[part].argmin())
                    shares = [float(v[part][high] / (v[part][high] + v[part][low]).clamp(min=1e-300)) for v in (x, y)]
                    best = max(best, (abs(shares[0] - shares[1]), [(unit, high)], [(unit, low)]))
                start += n
            if best[0] > 0:
                return best[1:]
        return None

    def _place(self, row: int) -> Row:
        for unit, (_, n) in enumerate(self.units):
            if row < n:
                return unit, row
            row -= n
        raise IndexError("a row beyond the last")

    def _rows(self, count: BatchWeight | CallerWeight) -> Tensor | None:
        rows = [count.rows(pair, n, self.axes) for pair, n in self.units]
        present = [r for r in rows if r is not None]
        return torch.cat(present) if len(present) == len(rows) and rows else None

    def _pair(self, rows: Sequence[Row]) -> Pair | None:
        """These examples as one batch; None if they cannot be concatenated."""
        parts = []
        for unit, group in itertools.groupby(rows, key=lambda row: row[0]):
            pair, n = self.units[unit]
            places = torch.tensor([i for _, i in group])
            parts.append((cut(pair, places, n, self.axes), len(places)))
        return parts[0][0] if len(parts) == 1 else joined(parts, self.axes)

    def refuted(self, a: Sequence[Row], b: Sequence[Row], reduction: Reduction) -> bool:
        """Whether these parts contradict all weights or, for a sum, the sum."""
        self._try(a, b)
        return not (self.summed if reduction == "sum" else self.alive)

    def _try(self, a: Sequence[Row], b: Sequence[Row]) -> None:
        """Compare two parts with the whole, and drop the weights that fail."""
        pair = self._pair([*a, *b]) if a and b else None
        if pair is None:
            return
        n = len(a) + len(b)
        parts = [torch.arange(len(a)), torch.arange(len(a), n), torch.arange(n)]
        try:
            evaluated = self.evaluate(pair, parts, n, self.axes)
        except torch.OutOfMemoryError:
            raise
        except Unfit:
            evaluated = None
        if evaluated is None:
            return
        one, two, whole = evaluated
        if not torch.isfinite(whole).all():
            return  # for example, the loss ignores every term of these examples
        self.probes += bool(one.isfinite().all() and two.isfinite().all())
        pieces = [cut(pair, rows, n, self.axes) for rows in parts]
        self.summed = self.summed and self._alike(one + two, whole, one, two)
        for name, count in list(self.alive.items()):
            weights = [count.total(piece) for piece in pieces[:2]]
            mean = _mean(weights, (one, two))
            if mean is not None and self._alike(mean, whole, one, two):
                continue
            if not _empty(weights, (one, two)):
                del self.alive[name]
        self.comparison = (
            f"the loss of {n} examples is {float(whole[0]):.4g}, that of {len(a)} of them {float(one[0]):.4g} and that "
            f"of the other {len(b)} {float(two[0]):.4g}"
        )

    def _alike(self, combined: Tensor, whole: Tensor, *parts: Tensor) -> bool:
        """Whether loss and gradient agree up to round-off."""
        for rows in (slice(0, 1), slice(1, None)):
            size = max(float(v[rows].norm()) for v in (whole, *(p for p in parts if torch.isfinite(p).all())))
            if not float((combined[rows] - whole[rows]).norm()) <= self.tol * size:
                return False
        return True


# -- every batch -------------------------------------------------------------------------------------------------------

_LAST, _FIRST = 3, 5  # examples on either side of the border between two batches
# Round-off of a loss, to be multiplied by the root of its number of terms. Larger differences are evaluated again.
_ROUND_OFF = {torch.float64: 1e-12, torch.float32: 1e-6}


class EveryBatch:
    """Checks a rule on every batch, with the losses of parts of its outputs.

    A batch is split into a third and the rest. In addition, the last few examples of the previous batch are combined
    with the first few of this one.

    Args:
        pairs: the batches.
        rule: how they are combined into the loss of all data; it must have a trial.
        value: (outputs, targets) -> loss.
    """

    def __init__(self, pairs: Sequence[Pair], rule: WeightRule, value: Callable[[Any, Any], Tensor]) -> None:
        self.pairs, self.rule, self.value = pairs, rule, value
        self.way, self.axes = rule.trial or ("", (0, 1))
        self.units = _units(pairs, self.axes)
        self.last: tuple[Any, int, list[Row]] | None = None

    def counterexample(self, unit: int, outputs: Any, whole: Tensor, trials: Iterable[LossTrial]) -> str:
        """Describe a comparison that contradicts the rule in a batch; "" if there is none.

        Args:
            unit: number of the batch.
            outputs: outputs of the model on the batch.
            whole: loss of the batch.
            trials: evaluate doubtful comparisons again, with gradients and as precisely as in the first trial.
        """
        for a, b in list(self._doubted(unit, outputs, whole)):
            for trial in trials:
                again = _Comparison(getattr(trial, self.way), trial.tol, self.pairs, [self.rule.count], self.axes)
                if again.refuted(a, b, self.rule.reduction):
                    return again.comparison
                if again.probes:
                    break
        return ""

    def _doubted(self, unit: int, outputs: Any, whole: Tensor) -> Iterator[tuple[list[Row], list[Row]]]:
        """Yield pairs of parts whose losses, combined by the rule, do not give the loss of both."""
        before, self.last = self.last, None
        if not self.units or not all(axis is not None for axis in self._outputs(outputs, self.units[unit][1])):
            return
        pair, n = self.units[unit]
        held, rows = (pair, outputs), [(unit, i) for i in range(n)]

        def cut_to(start: int, stop: int) -> tuple[Any, int, list[Row]]:
            return cut(held, slice(start, stop), n, self.axes), stop - start, rows[start:stop]

        third = max(1, n // 3)
        if n > 1 and not self._stands(_layout(held, n, self.axes), cut_to(0, third), cut_to(third, n), whole):
            yield rows[:third], rows[third:]
        if before is not None:
            first = cut_to(0, min(n, _FIRST))
            if not self._stands(_layout(held, n, self.axes), before, first, None):
                yield before[2], first[2]
        last_rows = torch.arange(max(0, n - _LAST), n)  # indexing copies: a view would keep the whole batch
        self.last = cut(held, last_rows, n, self.axes), len(last_rows), rows[-len(last_rows) :]

    def _outputs(self, outputs: Any, count: int) -> tuple[int | None, ...]:
        return _layout(outputs, count, self.axes) or (None,)

    def _stands(
        self,
        layout: tuple[int | None, ...],
        a: tuple[Any, int, list[Row]],
        b: tuple[Any, int, list[Row]],
        whole: Tensor | None,
    ) -> bool:
        """Whether the rule gives the loss of both parts together; True if it cannot be checked."""
        if any(_layout(part, n, self.axes) != layout for part, n, _ in (a, b)):
            return True
        both: Any = None
        if whole is None:
            both = joined([(a[0], a[1]), (b[0], b[1])], self.axes)
            if both is None or _layout(both, a[1] + b[1], self.axes) != layout:
                return True
        try:
            one, two = (self.value(outputs, pair[1]) for (pair, outputs), _, _ in (a, b))
            if whole is None:
                whole = self.value(both[1], both[0][1])
        except torch.OutOfMemoryError:
            raise
        except Unfit:
            return True
        if not torch.isfinite(whole):
            return True
        parts = [one.double(), two.double()]
        if self.rule.reduction == "sum":
            combined: Tensor | None = parts[0] + parts[1]
        else:
            weights = [self.rule.count.total(part[0]) for part, _, _ in (a, b)]
            if _empty(weights, parts):
                return True
            combined = _mean(weights, parts)
        size = max(float(v.abs()) for v in (whole, *parts) if v.isfinite())
        terms = sum(first_tensor(part[0][1]).numel() for part, _, _ in (a, b))
        tol = min(2e-2, _ROUND_OFF.get(whole.dtype, 2e-3) * math.sqrt(terms))
        return combined is not None and float((combined - whole).abs()) <= tol * size


# -- the verdict -------------------------------------------------------------------------------------------------------


def weigh(
    loss: Any,
    pairs: Sequence[Pair],
    trials: Iterable[LossTrial],
    *,
    terms: Callable[[Any, Any], float] | None,
    reduction: Reduction | None,
    in_eval: bool,
    all_gather: Callable[[Any], list[Any]],
) -> WeightRule:
    """Determine how the losses of batches are combined into the loss of all data.

    Args:
        loss: (outputs, targets) -> scalar.
        pairs: the batches of this process with a finite loss.
        trials: evaluate losses and gradients. The next trial is used if nothing passes the previous one.
        terms: the caller's function for the weights, or None.
        reduction: the caller's reduction, or None.
        in_eval: see `compare`.
        all_gather: (object) -> list of the objects of all processes.

    Raises:
        ValueError: no weight that is tried gives the loss of a batch from the losses of its parts.

    Warns:
        UserWarning: see `Problem`.
    """
    seen = may_be_ignored(set().union(*all_gather(labels_of(pairs))))
    counts: list[BatchWeight | CallerWeight] = []
    if pairs:
        counts += [CallerWeight(terms)] if terms is not None else candidates(loss, pairs, seen)
    outcome = TrialOutcome([], False)
    for trial in trials if pairs else ():
        trial_outcome = compare(trial, pairs, counts, in_eval=in_eval)
        outcome = outcome if outcome.probes and (trial_outcome.failed or not trial_outcome.probes) else trial_outcome
        if outcome.probes and not outcome.failed:
            break
    every = all_gather((outcome, len(pairs)))
    tried = [one for one, _ in every if one.probes]
    batches = sum(count for _, count in every)
    names = [name for name in outcome.names if all(name in one.names for one in tried)] if outcome.probes else []
    names = names if outcome.probes else [c.text for c in counts if all(c.text in one.names for one in tried)]
    means = bool(tried) and bool(set(tried[0].names).intersection(*(one.names for one in tried)))
    sums = bool(tried) and all(one.summed for one in tried)
    said = options_of(loss).get("reduction")
    chosen: Reduction = reduction or ("sum" if said == "sum" else "mean")
    if not tried:
        if batches > 1 and terms is None and reduction is None and not is_of_torch(loss):
            _warn(
                "the loss could not be evaluated on parts of a batch, so it is unknown what its mean divides by; "
                f"batches are weighted by their {counts[0].text if counts else 'examples'}. To set the weights, pass "
                "terms=, a function (inputs, targets) -> number of terms of a batch."
            )
    elif reduction is None and (means or sums):
        chosen = "sum" if sums and (said == "sum" or not means) else "mean"
        if chosen == "sum" and said != "sum":
            _warn(
                "the loss of a batch is the sum over its terms, not their mean; the sum divided by the number of terms "
                f"({counts[0].text if counts else 'examples'}) is measured. Pass reduction='sum' if this is intended, "
                "and terms= to count other terms."
            )
    elif not (means if chosen == "mean" else sums):
        _refuse(batches, tried, chosen, terms, reduction, sums, means)
    if batches > 1 and any(one.coupled for one in tried):
        _warn(
            "in eval mode the outputs of an example depend on the other examples of its batch (for example through "
            "batch statistics), or the first dimension of the targets is not the examples; so the results depend on "
            "how the data are divided into batches. Pass the data as one batch to avoid this."
        )
    by_name = {c.text: c for c in reversed(counts)}
    count = by_name[names[0]] if chosen == "mean" and names else counts[0] if counts else BatchWeight("examples")
    stands = batches > 1 and (means if chosen == "mean" else sums)
    return WeightRule(count, chosen, outcome.trial if stands else None)


def _refuse(
    batches: int,
    tried: Sequence[TrialOutcome],
    chosen: Reduction,
    terms: Any,
    reduction: Reduction | None,
    sums: bool,
    means: bool,
) -> None:
    """Raise ValueError if no weight passed, unless there is only one batch."""
    comparison = next(one.comparison for one in tried if one.failed or one.comparison)
    if batches == 1 and chosen == "mean":
        return  # one batch: no weights are needed
    if reduction == "mean" and sums:
        raise ValueError(f"reduction='mean' was given, but the loss of a batch is the sum of its terms: {comparison}.")
    if reduction == "sum" and means:
        raise ValueError(f"reduction='sum' was given, but the loss of a batch is the mean of its terms: {comparison}.")
    refuse(comparison, taken_on=terms is not None and reduction is None)


def refuse(comparison: str, *, taken_on: bool) -> None:
    """Raise ValueError because a comparison contradicts the rule, or warn if the caller set the weights by terms=.

    Args:
        comparison: description of the comparison.
        taken_on: whether to warn instead of raising.
    """
    if taken_on:
        _warn(
            f"the loss of a batch is not the mean of its parts' losses weighted by terms=: {comparison}. The results "
            "depend on how the data are divided into batches."
        )
        return
    raise ValueError(
        f"the loss of a batch is neither a mean nor a sum over its examples, by any weight that was tried: "
        f"{comparison}. So the loss of all data cannot be computed from the losses of batches. If the loss compares "
        "the examples of a batch with each other, pass the data as one batch. If it is a mean that divides by "
        "something else, pass terms=, a function (inputs, targets) -> weight of a batch. If it is a sum plus a penalty "
        "on the weights, remove the penalty (weight_decay=) or use a mean (reduction)."
    )


def _warn(text: str) -> None:
    """Warn at the line that makes the problem."""
    warnings.warn(text, UserWarning, stacklevel=5)
