"""How the losses of batches make up the loss of all data: weights that are tried on a few examples and their parts.

A loss is a function of (outputs, targets), and nothing in it says for certain what its mean divides by. So every weight
that a batch could have is a candidate, and is kept if the losses and gradients of two parts of a few examples give
those of the examples together.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Reduction = Literal["mean", "sum"]
Pair = tuple[Any, Any]
Axes = tuple[int, int]
_IGNORED = -100  # of torch's cross-entropy
_VALUES = 24  # labels that are tried as ignored ones
_PROBES = 10  # sets of examples that are compared with their parts
_ROWS = 6  # examples in one of them
# What a loss may raise on examples that it cannot take.
Unfit = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError)


# -- nested data -------------------------------------------------------------------------------------------------------


def tensors(part: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested data, with names."""
    if isinstance(part, Tensor):
        yield name, part
    elif isinstance(part, Mapping):
        for key, value in part.items():
            yield from tensors(value, f"{name}[{key!r}]")
    elif isinstance(part, (tuple, list)):
        for i, value in enumerate(part):
            yield from tensors(value, f"{name}[{i}]")


def first_tensor(part: Any) -> Tensor:
    """The first tensor in targets that may be nested; one with a dimension, if there is any.

    Raises:
        ValueError: there is none.
    """
    found = [tensor for _, tensor in tensors(part)]
    if not found:
        raise ValueError(f"the targets hold no tensor, got {type(part).__name__}.")
    return next((t for t in found if t.dim()), found[0])


def mapped(part: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested data of the same kind with every tensor changed."""
    if isinstance(part, Tensor):
        return change(part)
    if isinstance(part, Mapping):
        changed = {k: mapped(v, change) for k, v in part.items()}
        if type(part) is dict:
            return changed
        twin: Any = copy.copy(part)  # such as the outputs of a language model, which have attributes as well
        for key, value in changed.items():
            twin[key] = value
        return twin
    if isinstance(part, tuple) and hasattr(part, "_make"):
        return part._make(mapped(v, change) for v in part)
    return type(part)(mapped(v, change) for v in part) if isinstance(part, (tuple, list)) else part


def axis_of(tensor: Tensor, count: int, axes: Sequence[int] = (0, 1)) -> int | None:
    """The first of these dimensions that runs over `count` examples; None if there is none."""
    return next((d for d in axes if d < tensor.dim() and tensor.shape[d] == count), None)


def cut(part: Any, rows: slice | Tensor, count: int, axes: Sequence[int] = (0, 1)) -> Any:
    """Some of `count` examples: views for a slice, copies for indices. Tensors without such a dimension stay."""

    def of_tensor(tensor: Tensor) -> Tensor:
        axis = axis_of(tensor, count, axes)
        if axis is None:
            return tensor
        if isinstance(rows, slice):
            return tensor.narrow(axis, rows.start, rows.stop - rows.start)
        return tensor.index_select(axis, rows.to(tensor.device))

    return mapped(part, of_tensor)


def _joined(parts: Sequence[tuple[Pair, int]], axes: Axes) -> Pair | None:
    """Examples of several batches, with their numbers, as one batch; None if they do not fit together."""
    lists = [[t for _, t in tensors(pair)] for pair, _ in parts]
    if any(len(one) != len(lists[0]) for one in lists):
        return None
    found: list[Tensor] = []
    for row in zip(*lists, strict=True):
        along = {axis_of(t, n, axes) for t, (_, n) in zip(row, parts, strict=True)}
        axis = along.pop()
        if along or (axis is None and not all(torch.equal(t, row[0]) for t in row)):
            return None
        others = [t.shape if axis is None else (*t.shape[:axis], *t.shape[axis + 1 :]) for t in row]
        if any(shape != others[0] for shape in others):
            return None
        found.append(row[0] if axis is None else torch.cat(row, axis))
    left = iter(found)
    joined: Pair = mapped(parts[0][0], lambda _: next(left))
    return joined


# -- candidates --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Count:
    """A weight that a batch could have in the mean.

    Args:
        text: what is counted, in words; two counts with one text are the same.
        of: (tensor) -> weight of each entry; None counts examples.
        where: name of the tensor, as `tensors` gives it for (inputs, targets).
        ignored: label that is left out, if any.
    """

    text: str
    of: Callable[[Tensor], Tensor] | None = None
    where: str = ""
    ignored: int | None = None

    def _tensor(self, pair: Pair) -> Tensor:
        return first_tensor(pair[1]) if not self.where else dict(tensors(pair))[self.where]

    def rows(self, pair: Pair, count: int, axes: Axes) -> Tensor | None:
        """The weight of each example, shape (count,); None if they cannot be told apart."""
        if self.of is None:
            return torch.ones(count, dtype=torch.float64)
        tensor = self._tensor(pair)
        axis = axis_of(tensor, count, axes)
        if axis is None:
            return None
        weights = self.of(tensor)
        if axis >= weights.dim() or weights.shape[axis] != count:
            return None  # examples and positions are one dimension
        return weights.double().movedim(axis, 0).reshape(count, -1).sum(1).cpu()

    def total(self, pair: Pair) -> float:
        """The weight of a batch."""
        if self.of is None:
            return float(len(first_tensor(pair[1])))
        return float(self.of(self._tensor(pair)).double().sum())


@dataclass(frozen=True, eq=False)
class Given:
    """Weights by a function of the caller."""

    terms: Callable[[Any, Any], float]
    text: str = "terms="
    ignored: int | None = None

    def rows(self, pair: Pair, count: int, axes: Axes) -> Tensor | None:
        """Unknown for single examples."""
        return None

    def total(self, pair: Pair) -> float:
        """The weight of a batch.

        Raises:
            ValueError: what it returns is no weight.
        """
        value: Any = self.terms(*pair)
        try:
            weight = float(value)
        except (TypeError, ValueError, RuntimeError):
            weight = math.nan
        if not (weight >= 0 and math.isfinite(weight)):
            raise ValueError(f"terms= must return the number of terms of a batch, a number >= 0; got {value!r}.")
        return weight


@dataclass(frozen=True)
class Rule:
    """How batches make up the loss of all data.

    Args:
        count: the weight of a batch.
        reduction: whether the loss of a batch is the mean or the sum of its terms.
    """

    count: Count | Given
    reduction: Reduction

    def total(self, pair: Pair) -> float:
        """The weight of a batch."""
        return self.count.total(pair)


def options_of(loss: Any) -> dict[str, Any]:
    """What a loss says of itself: its attributes, and the keywords of a functools.partial."""
    found: dict[str, Any] = {}
    while isinstance(loss, functools.partial):
        found = {**loss.keywords, **found}
        loss = loss.func
    for name in ("ignore_index", "weight", "reduction"):
        if hasattr(loss, name):
            found.setdefault(name, getattr(loss, name))
    return found


def is_of_torch(loss: Any) -> bool:
    """Whether it is one of torch's own losses, or a `LogitNormalised` one."""
    loss = getattr(loss, "inner", loss)
    while isinstance(loss, functools.partial):
        loss = loss.func
    return type(loss).__module__ == "torch.nn.modules.loss" or getattr(loss, "__module__", "") == "torch.nn.functional"


def _vectors(loss: Any) -> Iterator[tuple[str, Tensor]]:
    """Vectors that a loss holds, which may be class weights: attributes, buffers, keywords, variables of a closure."""
    options = options_of(loss)
    while isinstance(loss, functools.partial):
        loss = loss.func
    closed = getattr(loss, "__closure__", None) or ()
    names = getattr(getattr(loss, "__code__", None), "co_freevars", ())
    inside = {n: c.cell_contents for n, c in zip(names, closed, strict=False) if _is_filled(c)}
    known = getattr(loss, "__globals__", {})
    inside |= {n: known[n] for n in getattr(getattr(loss, "__code__", None), "co_names", ()) if n in known}
    held = dict(loss.named_buffers()) if isinstance(loss, nn.Module) else {}
    for name, value in {**inside, **getattr(loss, "__dict__", {}), **held, **options}.items():
        if isinstance(value, Tensor) and value.dim() == 1 and value.is_floating_point():
            yield name, value.detach()


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _unlike(value: int) -> Callable[[Tensor], Tensor]:
    return lambda t: t != value


def _like(value: int) -> Callable[[Tensor], Tensor]:
    return lambda t: t == value


def _weighted(weight: Tensor, ignored: int) -> Callable[[Tensor], Tensor]:
    def of(t: Tensor) -> Tensor:
        counted = (t != ignored) & (t >= 0) & (t < len(weight))
        return torch.where(counted, weight.to(t.device)[t.clamp(0, len(weight) - 1).long()], 0.0)

    return of


def _shifted(of: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda t: of(t)[..., 1:] if t.dim() > 1 else of(t)


def _positions(t: Tensor) -> Tensor:
    """One for each distribution over classes, which are dimension 1."""
    return torch.full_like(t, 1.0 / (t.shape[1] if t.dim() > 1 else 1))


def candidates(loss: Any, pairs: Sequence[Pair], labels: Sequence[int]) -> list[Count]:
    """Every weight that is tried, what the loss says of itself first; of `labels` each may be one that is ignored."""
    options = options_of(loss)
    first = first_tensor(pairs[0][1])
    examples = Count("examples")
    entries = Count("entries of the targets", torch.ones_like)
    found: list[Count] = []
    if first.is_floating_point() or first.is_complex():
        soft = loss is F.cross_entropy or isinstance(getattr(loss, "inner", loss), nn.CrossEntropyLoss)
        soft = soft or (isinstance(loss, functools.partial) and loss.func is F.cross_entropy)
        found += [Count("distributions over classes", _positions)] if soft else []
        found += [entries, examples, Count("finite entries of the targets", torch.isfinite)]
        found += [Count("sum of the targets", lambda t: t), Count("targets that are not zero", lambda t: t != 0)]
    else:
        given = options.get("ignore_index")
        said = given if isinstance(given, int) else _IGNORED
        weighted = [
            Count(f"class weights {name} of the targets", _weighted(vector, said), ignored=said)
            for name, vector in _vectors(loss)
        ]
        # Only labels that are there make a difference.
        other = [v for v in labels if v != said]
        found += sorted(weighted, key=lambda c: c.text != "class weights weight of the targets")
        for v in (said, *other):
            text = f"targets other than {v}"
            found += [Count(text, _unlike(v), ignored=v)]
            found += [Count(f"{text} but the first", _shifted(_unlike(v)), ignored=v)] if first.dim() > 1 else []
            found += [Count(f"targets that are {v}", _like(v))]
            found += [examples, entries] if v == said else []
        found += [Count("entries of the targets but the first", _shifted(torch.ones_like))] if first.dim() > 1 else []
    for name, tensor in tensors(pairs[0]):
        if tensor is first or not tensor.dim():
            continue
        whole = f"entries of (inputs, targets){name}"
        kinds: list[tuple[str, Callable[[Tensor], Tensor]]] = []
        if not tensor.is_floating_point():
            kinds += [(f"{whole} other than {_IGNORED}", _unlike(_IGNORED)), (f"{whole} other than 0", _unlike(0))]
            kinds += [(f"{whole} that are 0", lambda t: t == 0)]  # a mask of what is padding
        elif name.startswith("[1]"):
            kinds += [(f"sum of {whole}", lambda t: t), (whole, torch.ones_like)]
        for text, of in kinds:
            found.append(Count(text, of, name))
            if tensor.dim() > 1:
                found.append(Count(f"{text} but the first", _shifted(of), name))
    return found


def _labels(pairs: Sequence[Pair]) -> list[int]:
    """The labels that there are, if targets are labels."""
    firsts = [first_tensor(targets) for _, targets in pairs]
    seen = [set(t.unique().tolist()) for t in firsts if not (t.is_floating_point() or t.is_complex())]
    return sorted(set().union(*seen))


def _may_be_ignored(seen: set[int]) -> list[int]:
    """Some labels: the outermost and the usual ones first."""
    order = sorted(seen)
    usual = [v for v in (-1, 0, 255) if v in seen]
    return list(dict.fromkeys([*order[:1], *order[-1:], *usual, *order]))[:_VALUES]


# -- trials ------------------------------------------------------------------------------------------------------------


class Trial(Protocol):
    """Losses with gradients, to be compared."""

    tol: float

    def together(self, pair: Pair, rows: Sequence[Tensor], count: int, axes: Axes) -> list[Tensor] | None:
        """[loss, gradient] of each set of rows, the outputs cut; None if the outputs have no rows."""

    def apart(self, pair: Pair, rows: Sequence[Tensor], count: int, axes: Axes) -> list[Tensor] | None:
        """The same, the model run on each set of rows by itself."""


@dataclass
class Outcome:
    """What trials say.

    Args:
        names: texts of the counts that stood all of them.
        summed: whether the sum did.
        probes: sets of examples that were compared.
        coupled: whether the outputs of an example depend on the others.
        told: one comparison, in words.
    """

    names: list[str]
    summed: bool
    probes: int = 0
    coupled: bool = False
    told: str = ""

    @property
    def failed(self) -> bool:
        """Whether nothing stood the trials."""
        return self.probes > 0 and not self.names and not self.summed


def compare(trial: Trial, pairs: Sequence[Pair], counts: Sequence[Count | Given], *, in_eval: bool) -> Outcome:
    """Which of the counts make the losses of parts the loss of the whole.

    Args:
        trial: evaluates.
        pairs: the batches.
        counts: candidates.
        in_eval: whether examples are independent of each other in the model, as far as is known; then the model runs on
            the parts, otherwise its outputs for the whole are cut.
    """
    shapes = [first_tensor(targets).shape for _, targets in pairs]
    ways = ("apart", "together") if in_eval else ("together", "apart")
    tries: list[tuple[str, Axes]] = [(way, (0, 1)) for way in ways]
    if all(len(s) > 1 for s in shapes):
        # Outputs may fall into parts along any dimension. That examples are dimension 1 is seen where it alone differs
        # between batches, or where the model runs on parts of it.
        second = len({s[:1] for s in shapes}) == 1 < len({s[1:2] for s in shapes})
        tries += [(way, (1, 0)) for way in (ways if second else ways[:1] if in_eval else ())]
    first: Outcome | None = None
    for way, along in tries:
        outcome = _Comparison(getattr(trial, way), trial.tol, pairs, counts, along).run()
        if outcome.probes and not outcome.failed:
            outcome.coupled = in_eval and way == "together"
            return outcome
        first = outcome if first is None or (outcome.probes and not first.probes) else first
    assert first is not None
    return first


Row = tuple[int, int]  # number of a batch, and of an example in it


class _Comparison:
    """Comparisons in one way, along one dimension."""

    def __init__(
        self,
        evaluate: Callable[[Pair, Sequence[Tensor], int, Axes], list[Tensor] | None],
        tol: float,
        pairs: Sequence[Pair],
        counts: Sequence[Count | Given],
        axes: Axes,
    ) -> None:
        self.evaluate, self.tol, self.axes = evaluate, tol, axes
        self.units = [(pair, first_tensor(pair[1]).shape[axes[0]]) for pair in pairs]
        layouts = {tuple(axis_of(t, n, axes) for _, t in tensors(pair)) for pair, n in self.units}
        if len(layouts) > 1:
            self.units = []  # by their sizes alone it cannot be seen where a tensor has its examples
        self.generator = torch.Generator().manual_seed(0)
        self.alive: dict[str, Count | Given] = {c.text: c for c in reversed(counts)}
        self.alive = {c.text: self.alive[c.text] for c in counts}  # in their order, the first of each text
        self.rows: dict[str, Tensor | None] = {}
        self.summed, self.probes, self.told = True, 0, ""

    def run(self) -> Outcome:
        """All of them."""
        for rows in (*self._mixed(), *self._within()):
            first = 2 if len(rows) > 4 else 1
            self._try(rows[:first], rows[first:])
        tried: set[tuple[str, str]] = set()
        for _ in range(_PROBES if self.probes else 0):
            chosen = self._apart(tried)
            if chosen is None:
                break
            self._try(*chosen)
        return Outcome(list(self.alive), self.summed, self.probes, told=self.told)

    def _within(self) -> Iterator[list[Row]]:
        """Examples of one batch, the first and the last."""
        for unit in sorted({0, len(self.units) - 1} if self.units else ()):
            yield [(unit, i) for i in self._drawn(self.units[unit][1], _ROWS)]

    def _mixed(self) -> Iterator[list[Row]]:
        """Examples of several batches, twice, with unlike labels among them."""
        for _ in range(2 if len(self.units) > 1 else 0):
            some = [self._one(unit) for _ in range(2) for unit in self._drawn(len(self.units), _ROWS)]
            some = list(dict.fromkeys([*some[: 2 * _ROWS - 4], *self._unlike()]))
            yield [some[i] for i in self._drawn(len(some), len(some))]

    def _unlike(self) -> list[Row]:
        """Examples of up to four labels."""
        found: dict[float, Row] = {}
        for unit, (pair, n) in enumerate(self.units):
            first = first_tensor(pair[1])
            axis = axis_of(first, n, self.axes)
            if first.is_floating_point() or first.is_complex() or axis is None or not first.numel():
                break
            labels = first.movedim(axis, 0).reshape(n, -1)[:, -1].tolist()
            for i, label in enumerate(labels):
                found.setdefault(label, (unit, i))
            if len(found) >= 4:
                break
        return list(found.values())[:4]

    def _drawn(self, count: int, most: int) -> list[int]:
        found: list[int] = torch.randperm(count, generator=self.generator)[:most].tolist()
        return found

    def _one(self, unit: int) -> Row:
        return unit, int(torch.randint(self.units[unit][1], (), generator=self.generator))

    def _apart(self, tried: set[tuple[str, str]]) -> tuple[list[Row], list[Row]] | None:
        """Two parts that tell apart two of the counts that are left; None if they are proportional on all examples."""
        for name in self.alive.keys() - self.rows.keys():
            self.rows[name] = self._rows(self.alive[name])
        rows = {name: self.rows[name] for name in self.alive}
        known = {name: r / r.sum() for name, r in rows.items() if r is not None and float(r.sum()) > 0}
        for (a, x), (b, y) in itertools.combinations(known.items(), 2):
            far = x - y
            if (a, b) in tried or float(far.abs().max()) <= 1e-9 * float(torch.maximum(x, y).max()):
                continue
            tried.add((a, b))
            most, least = self._place(int(far.argmax())), self._place(int(far.argmin()))
            if self._pair([most, least]) is not None:
                return [most], [least]
            # Batches that do not fit together: the best within one.
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

    def _rows(self, count: Count | Given) -> Tensor | None:
        found = [count.rows(pair, n, self.axes) for pair, n in self.units]
        known = [r for r in found if r is not None]
        return torch.cat(known) if len(known) == len(found) and found else None

    def _pair(self, rows: Sequence[Row]) -> Pair | None:
        """These examples as one batch."""
        parts = []
        for unit, group in itertools.groupby(rows, key=lambda row: row[0]):
            pair, n = self.units[unit]
            places = torch.tensor([i for _, i in group])
            parts.append((cut(pair, places, n, self.axes), len(places)))
        return parts[0][0] if len(parts) == 1 else _joined(parts, self.axes)

    def _try(self, a: Sequence[Row], b: Sequence[Row]) -> None:
        """Compare, and drop what does not stand."""
        pair = self._pair([*a, *b]) if a and b else None
        if pair is None:
            return
        n = len(a) + len(b)
        parts = [torch.arange(len(a)), torch.arange(len(a), n), torch.arange(n)]
        try:
            found = self.evaluate(pair, parts, n, self.axes)
        except torch.OutOfMemoryError:
            raise
        except Unfit:
            found = None
        if found is None:
            return
        one, two, whole = found
        if not torch.isfinite(whole).all():
            return  # every term of these examples is ignored, say
        self.probes += bool(one.isfinite().all() and two.isfinite().all())
        pieces = [cut(pair, rows, n, self.axes) for rows in parts]
        self.summed = self.summed and self._alike(one + two, whole, one, two)
        for name, count in list(self.alive.items()):
            weights = [count.total(piece) for piece in pieces[:2]]
            total = sum(weights)
            counted = [(w / total) * p for w, p in zip(weights, (one, two), strict=True) if w and total]
            if counted and self._alike(torch.stack(counted).sum(0), whole, one, two):
                continue
            # The mean over no term is not finite, and says nothing of what it divides.
            if not any(w == 0 and not p.isfinite().all() for w, p in zip(weights, (one, two), strict=True)):
                del self.alive[name]
        self.told = (
            f"{n} examples have a loss of {float(whole[0]):.4g}, {len(a)} of them {float(one[0]):.4g} and the other "
            f"{len(b)} {float(two[0]):.4g}"
        )

    def _alike(self, found: Tensor, whole: Tensor, *parts: Tensor) -> bool:
        """Whether loss and gradient are the same up to round-off."""
        for rows in (slice(0, 1), slice(1, None)):
            size = max(float(v[rows].norm()) for v in (whole, *(p for p in parts if torch.isfinite(p).all())))
            if not float((found[rows] - whole[rows]).norm()) <= self.tol * size:
                return False
        return True


# -- the verdict -------------------------------------------------------------------------------------------------------


def weigh(
    loss: Any,
    pairs: Sequence[Pair],
    trials: Iterable[Trial],
    *,
    terms: Callable[[Any, Any], float] | None,
    reduction: Reduction | None,
    in_eval: bool,
    gathered: Callable[[Any], list[Any]],
) -> Rule:
    """How batches make up the loss of all data.

    Args:
        loss: (outputs, targets) -> scalar.
        pairs: the batches of this process with a finite loss.
        trials: evaluate; the next one is asked where nothing stands the one before.
        terms: given weights, or None.
        reduction: given, or None.
        in_eval: see `compare`.
        gathered: (object) -> those of all processes.

    Raises:
        ValueError: nothing that is tried gives the loss of a batch from its parts'.

    Warns:
        UserWarning: see `Problem`.
    """
    seen = _may_be_ignored(set().union(*gathered(_labels(pairs))))
    counts: list[Count | Given] = []
    if pairs:
        counts += [Given(terms)] if terms is not None else candidates(loss, pairs, seen)
    outcome = Outcome([], False)
    for trial in trials if pairs else ():
        found = compare(trial, pairs, counts, in_eval=in_eval)
        outcome = outcome if outcome.probes and (found.failed or not found.probes) else found
        if outcome.probes and not outcome.failed:
            break
    every = gathered((outcome, len(pairs)))
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
                "the loss could not be taken of parts of a batch, so it is not known what its mean divides by; batches "
                f"count by their {counts[0].text if counts else 'examples'}. Pass terms=, a function (inputs, targets) "
                "-> number of terms of a batch, to say so."
            )
    elif reduction is None and (means or sums):
        chosen = "sum" if sums and (said == "sum" or not means) else "mean"
        if chosen == "sum" and said != "sum":
            _warn(
                "the loss of a batch is the sum over its terms, not their mean; what is measured is the sum divided by "
                f"the number of terms ({counts[0].text if counts else 'examples'}). Pass reduction='sum' if it is "
                "meant so, and terms= to count otherwise."
            )
    elif not (means if chosen == "mean" else sums):
        _refuse(batches, tried, chosen, terms, reduction, sums)
    if batches > 1 and any(one.coupled for one in tried):
        _warn(
            "in eval mode the outputs of an example depend on the others of its batch (such as by batch statistics), "
            "or examples are not the first dimension of the targets; so what is measured depends on the batches. Give "
            "the data as one batch to be free of it."
        )
    by_name = {c.text: c for c in reversed(counts)}
    count = by_name[names[0]] if chosen == "mean" and names else counts[0] if counts else Count("examples")
    return Rule(count, chosen)


def _refuse(
    batches: int, tried: Sequence[Outcome], chosen: Reduction, terms: Any, reduction: Reduction | None, sums: bool
) -> None:
    """Raise, or warn where the caller has taken it on, what no weights make right."""
    told = next(one.told for one in tried if one.failed or one.told)
    if batches == 1 and chosen == "mean":
        return  # the batch is the whole
    if reduction == "mean" and sums:
        raise ValueError(f"reduction='mean' was given, but the loss of a batch is the sum over its terms: {told}.")
    if terms is not None and reduction is None:
        _warn(
            f"the loss of a batch is not the mean of its parts' losses weighted by terms=: {told}. What is measured "
            "depends on how the data are divided into batches."
        )
        return
    raise ValueError(
        f"the loss of a batch is neither a mean nor a sum over its examples, by any weight that was tried: {told}. "
        "So the loss of all data cannot be had from those of batches. If the loss compares the examples of a batch "
        "with each other, give the data as one batch. If it is a mean that divides by something else, pass terms=, a "
        "function (inputs, targets) -> weight of a batch. If it is a sum with a penalty of the weights added, take the "
        "penalty out (weight_decay=) or make it a mean (reduction)."
    )


def _warn(text: str) -> None:
    """At the line that makes the problem."""
    warnings.warn(text, UserWarning, stacklevel=4)


def cast_loss(loss: Any, dtype: torch.dtype) -> Any:
    """A loss module whose buffers have another dtype, as a copy; others as they are."""
    if not isinstance(loss, nn.Module) or next(loss.parameters(), None) is not None:
        return loss
    if all(b.dtype == dtype for b in loss.buffers() if b.is_floating_point()):
        return loss
    return copy.deepcopy(loss).to(dtype)
