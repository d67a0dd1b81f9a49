"""The function whose curvature is measured: a model's mean loss over a data set, as a function of some weights."""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

Loss = Callable[[Any, Any], Tensor]
Mode = Literal["eval", "train"]
Tensors = list[Tensor]


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """What a number was measured on; every result carries it.

    Args:
        loss: name of the loss.
        reduction: of the loss over the data; always the mean over its terms here.
        weight_decay: c of the added c/2 ||w||^2, over the selected weights.
        split, augmentation: as told by the caller.
        examples: number of them, over all processes.
        terms: number of terms of the loss: examples, or tokens that are not ignored.
        batch: examples in the largest batch.
        mode: "eval", or "train" (BatchNorm by the batch).
        params: patterns of the selected weights.
        size: number of selected weights.
        dtype: of the products.
        seed: of whatever was drawn; None if nothing was.
    """

    loss: str
    reduction: str = "mean"
    weight_decay: float = 0.0
    split: str = ""
    augmentation: str = "none"
    examples: int
    terms: float
    batch: int
    mode: Mode = "eval"
    params: str = "*"
    size: int
    dtype: str
    seed: int | None = None

    def with_seed(self, seed: int) -> Conventions:
        """The same with the seed of a measure that draws."""
        return replace(self, seed=seed)


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs and targets on the model's device, and the share of the loss's terms that they are."""

    inputs: Any
    targets: Any
    share: float


class Problem:
    r"""L(w) = (1/T) sum of the terms of the loss over a data set, plus c/2 ||w||^2, as a function of chosen weights.

    Batches count by their number of terms, so that an uneven last batch, or tokens that are ignored, are exact. The
    data are put on the device once. The model itself is never written to: its weights are passed in from outside, its
    buffers as copies, and training flags and random states are put back.

    Args:
        model: any module; called as model(x), model(*x) or model(**x) as the inputs are a tensor, a tuple or a
            mapping.
        loss: (outputs, targets) -> scalar; a mean over its terms, or a sum if it says reduction="sum".
        data: pairs (inputs, targets), such as a DataLoader; read once. One pair of tensors is one batch.
        params: shell patterns of parameter names, or one of them with commas. Default "*": all that require gradients.
        mode: "eval" (default), or "train", in which BatchNorm takes the statistics of each batch, so that L depends on
            the batches.
        weight_decay: c >= 0. Default 0.
        dtype: of weights, buffers, floating inputs and products. Default: the weights' own.
        autocast: a dtype in which matrix products are taken, for a cheap look; bf16 is some percent off. Default None.
        group: process group whose ranks hold a part of the data each; results are those of all parts. Default None:
            this process alone.
        split, augmentation: what the data are, for the record.

    Raises:
        ValueError: no data, no weights, a pattern that matches none, a loss that is not a finite scalar, that does not
            depend on the weights or that differs from one evaluation to the next (dropout).
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        data: Iterable[tuple[Any, Any]] | tuple[Tensor, Tensor],
        *,
        params: str | Sequence[str] = "*",
        mode: Mode = "eval",
        weight_decay: float = 0.0,
        dtype: torch.dtype | None = None,
        autocast: torch.dtype | None = None,
        group: Any = None,
        split: str = "",
        augmentation: str = "none",
    ) -> None:
        if mode not in ("eval", "train"):
            raise ValueError(f"mode must be 'eval' or 'train', got {mode!r}.")
        if not (weight_decay >= 0 and math.isfinite(weight_decay)):
            raise ValueError(f"weight_decay must be a number >= 0, got {weight_decay!r}.")
        while isinstance(model, DistributedDataParallel):
            model = model.module
        self.model, self.loss, self.mode, self.weight_decay = model, loss, mode, float(weight_decay)
        self._autocast, self.group = autocast, group
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError("the model has no parameter that requires a gradient, so there is nothing to measure.")
        patterns = [p.strip() for p in (params.split(",") if isinstance(params, str) else params)]
        self.names = _select(list(named), patterns)
        first = named[self.names[0]]
        self.device, self.dtype = first.device, dtype or first.dtype
        places = sorted({str(p.device) for p in model.parameters()})
        if first.is_meta:
            raise ValueError("the model's parameters have no values yet: they are on the device 'meta'.")
        if len(places) > 1:
            raise ValueError(f"the model's parameters are on {', '.join(places)}; move them to one device.")
        self.weights = [self._cast(named[n].detach()).requires_grad_() for n in self.names]
        chosen = set(self.names)
        # Aliases of tied weights follow by themselves.
        self._rest = {n: self._cast(p.detach()) for n, p in model.named_parameters() if n not in chosen}
        self._buffers = {n: self._cast(b.detach()) for n, b in model.named_buffers()}
        self.size = sum(w.numel() for w in self.weights)
        self.batches, examples, terms, largest = self._load(data)
        self.conventions = Conventions(
            loss=_name(loss),
            weight_decay=self.weight_decay,
            split=split,
            augmentation=augmentation,
            examples=examples,
            terms=terms,
            batch=largest,
            mode=mode,
            params=", ".join(patterns),
            size=self.size,
            dtype=str(self.dtype).removeprefix("torch.") + (f", autocast {autocast}" if autocast else ""),
        )
        self._check()

    # -- data ----------------------------------------------------------------------------------------------------

    def _load(self, data: Any) -> tuple[list[Batch], int, float, int]:
        """Batches on the device with their shares; examples, terms and the largest batch."""
        if getattr(self.loss, "reduction", "mean") not in ("mean", "sum"):
            raise ValueError(f"the loss must be a mean or a sum, got reduction={self.loss.reduction!r}.")  # type: ignore[attr-defined]
        pairs = [data] if isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Tensor) else data
        found: list[tuple[Any, Any, float, int]] = []
        for pair in pairs:
            if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
                raise ValueError(f"data must give pairs (inputs, targets), got {_no_pair(data, pair)}.")
            inputs, targets = (_to(part, self.device, self.dtype) for part in pair)
            if not first_tensor(targets).dim():
                raise ValueError("data must give batches, as a DataLoader does; got a single example.")
            count = len(first_tensor(targets))
            if count:
                found.append((inputs, targets, count_terms(self.loss, targets), count))
        local = torch.tensor(
            [sum(f[3] for f in found), sum(f[2] for f in found), max((f[3] for f in found), default=0)],
            dtype=torch.float64,
        )
        total = self._sum(local[:2].clone()).tolist() if self.group is not None else local[:2].tolist()
        if not total[0]:
            raise ValueError("the data hold no example, so there is nothing to measure.")
        if not total[1]:
            raise ValueError("every term of the loss is ignored, so there is nothing to measure.")
        # A sum counts each of its terms once, so its batches are not weighted.
        summed = getattr(self.loss, "reduction", "mean") == "sum"
        batches = [Batch(x, y, (1.0 if summed else terms) / total[1]) for x, y, terms, _ in found if terms]
        return batches, int(total[0]), total[1], int(local[2])

    def _sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks of the group, in place."""
        if self.group is not None:
            torch.distributed.all_reduce(values, group=None if self.group == "world" else self.group)
        return values

    def reduced(self, values: Tensor) -> Tensor:
        """The sum of each rank's part, one message; the same tensor where there is one process."""
        return self._sum(values)

    # -- the function --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Context of every evaluation: training flags, random states and back-end choices are put back on leaving."""
        flags = [(module, module.training) for module in self.model.modules()]
        devices = [self.device] if self.device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices=devices),
            # The fused kernels have no second derivative.
            sdpa_kernel(SDPBackend.MATH),
            torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled and not _recurrent(self.model)),
            torch.enable_grad(),
        ):
            try:
                self.model.train(self.mode == "train")
                yield
            finally:
                for module, flag in flags:
                    module.training = flag

    def outputs(
        self, batch: Batch, weights: Sequence[Tensor] | None = None, buffers: Mapping[str, Tensor] | None = None
    ) -> Any:
        """The model's outputs on a batch at these weights (default: the model's own); inside `guard`.

        Buffers given by name stand in for copies of the model's; the forward pass may write to them.
        """
        chosen = dict(zip(self.names, self.weights if weights is None else weights, strict=True))
        state = {**self._rest, **chosen, **{n: b.clone() for n, b in self._buffers.items()}, **(buffers or {})}
        args, kwargs = _call(batch.inputs)
        with torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None):
            return torch.func.functional_call(self.model, state, args, kwargs)

    def value_of(self, batch: Batch, outputs: Any) -> Tensor:
        """The batch's part of L, without weight decay, from the model's outputs."""
        value = self.loss(outputs, batch.targets)
        if not isinstance(value, Tensor) or value.dim():
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the loss must be a scalar over a batch, got {shape}.")
        return value * batch.share

    def value(
        self,
        weights: Sequence[Tensor] | None = None,
        *,
        buffers: Mapping[str, Tensor] | None = None,
        watch: Callable[[Batch, Any], None] | None = None,
    ) -> float:
        """L at these weights and buffers (default: the model's own); `watch` is shown each batch with its outputs."""
        at = self.weights if weights is None else list(weights)
        with self.guard(), torch.no_grad():
            parts = []
            for batch in self.batches:
                outputs = self.outputs(batch, at, {n: b.clone() for n, b in (buffers or {}).items()})
                parts.append(self.value_of(batch, outputs).double())
                if watch is not None:
                    watch(batch, outputs)
            total = torch.stack(parts).sum().reshape(1) if parts else torch.zeros(1, dtype=torch.float64)
            total = self._sum(total.to(self.device))
            return float(total) + self._decay(at)

    def gradient(self, weights: Sequence[Tensor] | None = None) -> tuple[float, Tensor]:
        """L and its gradient, shape (size,)."""
        at = self.weights if weights is None else [w.detach().requires_grad_() for w in weights]
        flat = torch.zeros(self.size + 1, dtype=torch.float64 if self.dtype == torch.float64 else torch.float32)
        flat = flat.to(self.device)
        with self.guard():
            for batch in self.batches:
                value = self.value_of(batch, self.outputs(batch, at))
                grads = torch.autograd.grad(value, at, materialize_grads=True)
                flat[1:] += torch.cat([g.reshape(-1) for g in grads])
                flat[0] += value.detach()
        flat = self._sum(flat)
        grad = flat[1:].to(self.dtype) + self.weight_decay * self.flat(at)
        return float(flat[0]) + self._decay(at), grad.detach()

    def _decay(self, weights: Sequence[Tensor]) -> float:
        if not self.weight_decay:
            return 0.0
        return 0.5 * self.weight_decay * sum(float(w.detach().double().square().sum()) for w in weights)

    # -- vectors -------------------------------------------------------------------------------------------------

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors shaped like the weights as one vector of shape (size,)."""
        return torch.cat([t.detach().reshape(-1) for t in tensors])

    def shaped(self, vector: Tensor) -> Tensors:
        """A vector of shape (size,) as tensors shaped like the weights, sharing its storage.

        Raises:
            ValueError: another shape.
        """
        if vector.shape != (self.size,):
            raise ValueError(f"expected a vector of shape ({self.size},), got {tuple(vector.shape)}.")
        pieces = vector.split([w.numel() for w in self.weights])
        return [piece.view_as(w) for piece, w in zip(pieces, self.weights, strict=True)]

    def moved(self, displacement: Tensor) -> Tensors:
        """The weights displaced by a vector of shape (size,)."""
        return [w.detach() + d for w, d in zip(self.weights, self.shaped(displacement.to(self.dtype)), strict=True)]

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    # -- checks --------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Refuse what cannot be measured, by two evaluations of the first batch."""
        if self.mode == "train":
            active = [n for n, m in self.model.named_modules() if isinstance(m, _DROPOUT) and m.p > 0]
            if active:
                raise ValueError(f"mode='train' with dropout in {active[0]!r} measures a random function; use 'eval'.")
        if not self.batches:
            return
        with self.guard():
            first, second = (self.value_of(b, self.outputs(b)) for b in [self.batches[0]] * 2)
        if not torch.isfinite(first):
            raise ValueError(
                f"the loss of the first batch is {float(first.detach())}; there is nothing to measure here."
            )
        if not first.requires_grad:
            raise ValueError("the loss does not depend on the selected weights (it has no graph).")
        if not torch.equal(first, second):
            raise ValueError(
                "two evaluations of the same batch differ, so the loss is random or changes the model; nothing can be "
                "measured of it."
            )


_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def count_terms(loss: Loss, targets: Any) -> float:
    """How many terms the mean of a loss runs over: entries of the targets that are not ignored, by class weight."""
    target = first_tensor(targets)
    if target.is_floating_point():
        return float(target.numel())
    counted = target != getattr(loss, "ignore_index", -100)
    weight = getattr(loss, "weight", None)
    if isinstance(weight, Tensor):
        return float(weight.to(target.device)[target[counted]].sum())
    return float(counted.sum())


def only(problem: Problem, batches: Sequence[Batch]) -> Problem:
    """The mean over some of a problem's batches, on the same weights; in this process alone.

    Raises:
        ValueError: no batch.
    """
    if not batches:
        raise ValueError("a problem needs at least one batch.")
    counts = [count_terms(problem.loss, batch.targets) for batch in batches]
    summed = getattr(problem.loss, "reduction", "mean") == "sum"
    twin = copy.copy(problem)
    twin.batches = [
        Batch(b.inputs, b.targets, (1.0 if summed else count) / sum(counts))
        for b, count in zip(batches, counts, strict=True)
    ]
    lengths = [len(first_tensor(b.targets)) for b in batches]
    twin.group = None
    twin.conventions = replace(problem.conventions, examples=sum(lengths), terms=sum(counts), batch=max(lengths))
    return twin


def under(problem: Problem, loss: Loss) -> Problem:
    """The same data and weights under another loss that counts the same terms, such as a loss of normalised logits.

    Raises:
        ValueError: a loss with another reduction or other terms.
    """
    kinds = [getattr(one, "reduction", "mean") for one in (problem.loss, loss)]
    counts = [[count_terms(one, batch.targets) for batch in problem.batches] for one in (problem.loss, loss)]
    if kinds[0] != kinds[1] or counts[0] != counts[1]:
        raise ValueError(
            f"{_name(loss)} counts other terms than {problem.conventions.loss}; make a Problem of its own."
        )
    twin = copy.copy(problem)
    twin.loss = loss
    twin.conventions = replace(problem.conventions, loss=_name(loss))
    return twin


def restricted(problem: Problem, params: str | Sequence[str]) -> Problem:
    """The same function of fewer weights: the others of the problem become constants, and their weight decay falls out.

    Args:
        problem: the function.
        params: patterns of parameter names; those that the problem has not selected stay out.

    Raises:
        ValueError: a pattern that matches none of the problem's weights.
    """
    patterns = [p.strip() for p in (params.split(",") if isinstance(params, str) else params)]
    at = dict(zip(problem.names, problem.weights, strict=True))
    twin = copy.copy(problem)
    twin.names = _select(problem.names, patterns)
    twin.weights = [at.pop(name) for name in twin.names]
    twin._rest = problem._rest | {name: w.detach() for name, w in at.items()}
    twin.size = sum(w.numel() for w in twin.weights)
    twin.conventions = replace(problem.conventions, params=", ".join(patterns), size=twin.size)
    return twin


def some_of(batch: Batch, count: int) -> Batch:
    """The first examples of a batch, where every tensor of it has one row an example; else the batch."""
    total = len(first_tensor(batch.targets))
    if total <= count or not all(len(t) == total for t in _tensors((batch.inputs, batch.targets))):
        return batch
    inputs, targets = (_cut(part, count) for part in (batch.inputs, batch.targets))
    return Batch(inputs, targets, batch.share * count / total)


def _tensors(part: Any) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        yield part.reshape(1) if part.dim() == 0 else part
    values = part.values() if isinstance(part, Mapping) else part if isinstance(part, (tuple, list)) else ()
    for value in values:
        yield from _tensors(value)


def _cut(part: Any, count: int) -> Any:
    if isinstance(part, Tensor):
        return part[:count]
    if isinstance(part, Mapping):
        return {k: _cut(v, count) for k, v in part.items()}
    return tuple(_cut(v, count) for v in part) if isinstance(part, (tuple, list)) else part


def _select(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    if not patterns:
        raise ValueError('params holds no pattern; "*" selects all weights.')
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"no parameter matches {pattern!r}; there are {', '.join(names[:8])}{', ...' * (len(names) > 8)}."
            )
    return [n for n in names if any(fnmatch.fnmatchcase(n, p) for p in patterns)]


def _no_pair(data: Any, pair: Any) -> str:
    """What the data gave instead of a pair, and how to make one."""
    if isinstance(given := data if isinstance(data, Mapping) else pair, Mapping):
        keys = ", ".join(repr(key) for key in list(given)[:4])
        return f"{type(given).__name__} with {keys}; make it a pair, such as (batch, batch['labels'])"
    if isinstance(pair, Tensor):
        return "Tensor; a single batch is a tuple (inputs, targets)"
    return type(pair).__name__


def _recurrent(model: nn.Module) -> bool:
    return any(isinstance(m, nn.RNNBase) for m in model.modules())


def _name(loss: Loss) -> str:
    return getattr(loss, "__name__", type(loss).__name__)


def _to(part: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(part, Tensor):
        return part.to(device, dtype if part.is_floating_point() else None)
    if isinstance(part, Mapping):
        return {k: _to(v, device, dtype) for k, v in part.items()}
    if isinstance(part, (tuple, list)):
        return tuple(_to(v, device, dtype) for v in part)
    return part


def first_tensor(part: Any) -> Tensor:
    """The first tensor in targets that may be nested.

    Raises:
        ValueError: there is none.
    """
    if isinstance(part, Tensor):
        return part
    values = part.values() if isinstance(part, Mapping) else part if isinstance(part, (tuple, list)) else ()
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise ValueError(f"the targets hold no tensor, got {type(part).__name__}.")


def _call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}
