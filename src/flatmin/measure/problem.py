"""The function that is measured: the mean loss of a model over a data set, as a function of selected weights."""

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

from flatmin.measure.checkpoints import unwrapped
from flatmin.measure.counts import CallerWeight, Reduction, WeightRule, candidates, cast_loss, options_of
from flatmin.measure.nested import axis_of, cut, joined, mapped, tensors
from flatmin.measure.nested import first_tensor as first_tensor
from flatmin.measure.terms import EveryBatch, refuse, weigh

Loss = Callable[[Any, Any], Tensor]
Mode = Literal["eval", "train"]
Tensors = list[Tensor]


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """The conditions under which a number was measured. Every result has them as `conventions`.

    Args:
        loss: name of the loss.
        reduction: reduction of the loss over the data; always the mean over its terms. Default "mean".
        weight_decay: c in the added term c/2 ||w||^2 over the selected weights. Default 0.
        split: description of the data, given by the caller. Default "".
        augmentation: description of the augmentation, given by the caller. Default "none".
        examples: number of examples, over all processes.
        terms: number of terms of the loss, such as examples, or tokens that are not ignored.
        batch: number of examples in the largest batch.
        mode: "eval", or "train" (BatchNorm uses the statistics of each batch). Default "eval".
        params: name patterns of the selected weights. Default "*".
        size: number of selected weights.
        dtype: dtype of the weights and products.
        seed: seed of the random numbers; None if none were used. Default None.
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
        """Return a copy with the given seed."""
        return replace(self, seed=seed)


@dataclass(frozen=True, slots=True)
class WeightedBatch:
    """A batch on the model's device.

    Args:
        inputs: inputs of the model.
        targets: targets of the loss.
        share: factor with which the loss of this batch enters L.
        terms: number of terms of the loss in this batch.
    """

    inputs: Any
    targets: Any
    share: float
    terms: float


class Problem:
    """The mean loss of a model over a data set, as a function of selected weights.

        L(w) = (1 / T) sum_t l_t(w) + (c / 2) ||w||^2

    The sum runs over the T terms of the loss, such as examples or tokens. If the loss of a batch is a mean, L is the
    loss of all data as one batch. If it is a sum, L is the sum divided by the number of terms.

    Batches are weighted by their number of terms, so L is exact for an uneven last batch or ignored tokens. What a
    batch counts (examples, entries of the targets, class weights, ...) is determined when the problem is made: for each
    possible weight, losses and gradients of a few examples are compared in float64 with those of two unequal parts of
    them. This takes about a dozen gradients of six examples each. In addition, each batch is evaluated once. If there
    are several batches, the loss of each is also compared with the losses of parts of its outputs, to detect what only
    some examples show. This comparison is skipped if an output does not have one row per example.

    The data are copied to the device once. The model is never modified: the weights are passed as arguments, the
    buffers as copies, and training flags and random states are restored.

    Args:
        model: any module. It is called as model(x), model(*x) or model(**x) if the inputs are a tensor, a tuple or a
            mapping. DataParallel, DistributedDataParallel and torch.compile wrappers are removed.
        loss: (outputs, targets) -> scalar, a mean or a sum over terms. A mean may include a penalty on the weights if
            it reads them from the model at every call.
        data: iterable of pairs (inputs, targets), such as a DataLoader; read once. A single pair of tensors is one
            batch.
        params: shell patterns of parameter names, as a list or separated by commas. Default "*": all parameters that
            require gradients.
        mode: "eval", or "train", in which BatchNorm uses the statistics of each batch and L depends on how the data are
            divided into batches. Default "eval".
        weight_decay: c >= 0. Default 0.
        dtype: dtype of weights, buffers, floating-point inputs and products. Default None: that of the weights.
        autocast: dtype of matrix products under autocast, for a cheap approximation; bf16 is some percent off. Default
            None: no autocast.
        terms: (inputs, targets) -> number of terms of a batch, which is its weight in the mean. Default None:
            determined as described above.
        reduction: "mean" or "sum": how the loss combines its terms. Default None: determined as described above.
        group: process group in which each rank holds a part of the data; results are those of all data. Default None:
            this process only.
        split: description of the data, kept in the conventions. Default "".
        augmentation: description of the augmentation, likewise. Default "none".

    Attributes:
        reduction: how the loss combines its terms.
        ignored: label of targets that the loss ignores.

    Raises:
        ValueError: there are no data or no weights; a pattern matches no parameter; the weights have several dtypes
            and `dtype` is not given; the forward pass writes to selected weights (nn.Embedding(max_norm=...)); the loss
            is not a finite scalar in every batch, does not depend on the weights, differs between evaluations
            (dropout), or, with several batches, is neither a mean nor a sum by any weight that is tried (such as a loss
            that compares the examples of a batch with each other).

    Warns:
        UserWarning: the loss is a sum and does not declare it; the weights of batches cannot be tested; or L depends on
            how the data are divided into batches.

    Examples:
        >>> import torch
        >>> from flatmin.measure import Problem
        >>> net, x, y = torch.nn.Linear(4, 3), torch.randn(20, 4), torch.randint(3, (20,))
        >>> problem = Problem(net, torch.nn.CrossEntropyLoss(), (x, y))
        >>> problem.size
        15
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
        terms: Callable[[Any, Any], float] | None = None,
        reduction: Reduction | None = None,
        group: Any = None,
        split: str = "",
        augmentation: str = "none",
    ) -> None:
        if mode not in ("eval", "train"):
            raise ValueError(f"mode must be 'eval' or 'train', got {mode!r}.")
        if not (weight_decay >= 0 and math.isfinite(weight_decay)):
            raise ValueError(f"weight_decay must be a number >= 0, got {weight_decay!r}.")
        if reduction not in (None, "mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}.")
        if terms is not None and not callable(terms):
            raise ValueError(f"terms must be a function (inputs, targets) -> number of terms, got {terms!r}.")
        if options_of(loss).get("reduction") == "none":
            raise ValueError("the loss must be a mean or a sum, got reduction='none'.")
        model = _measurable(model)
        self.model, self.mode, self.weight_decay = model, mode, float(weight_decay)
        self._autocast, self.group = autocast, group
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError("the model has no parameter with requires_grad=True; set it for those to be measured.")
        patterns = [p.strip() for p in (params.split(",") if isinstance(params, str) else params)]
        self.names = _select(list(named), patterns)
        first = named[self.names[0]]
        self.device, self.dtype = first.device, dtype or _common_dtype(named, self.names)
        self._given = dtype
        places = sorted({str(p.device) for p in model.parameters()})
        if first.is_meta:
            raise ValueError("the model's parameters are on the device 'meta' and have no values; load weights first.")
        if len(places) > 1:
            raise ValueError(f"the model's parameters are on {', '.join(places)}; move them to one device.")
        self.weights = [self._cast(named[n].detach()).requires_grad_() for n in self.names]
        chosen = set(self.names)
        # functional_call also replaces the aliases of tied weights.
        self._rest = {n: self._cast(p.detach()) for n, p in model.named_parameters() if n not in chosen}
        self._buffers = {n: self._cast(b.detach()) for n, b in model.named_buffers()}
        self.size = sum(w.numel() for w in self.weights)
        self.loss: Loss = loss if dtype is None else cast_loss(loss, dtype)
        self._closed = False
        pairs = self._read(data)
        with self.together():
            evaluated = self._check(pairs)
        self.rule = self._weigh(pairs, terms, reduction)
        with self.together():
            values = self._values(pairs, evaluated, taken_on=terms is not None and reduction is None)
            counts = self._counts(pairs, values)
        held = torch.tensor([sum(counts), sum(_length(y) for _, y in pairs)], dtype=torch.float64)
        total = self._sum(held.to(self.device)).tolist()
        if not total[1]:
            raise ValueError("the data contain no examples, so there is nothing to measure.")
        if not total[0]:
            raise ValueError("the loss ignores every term of the data, so there is nothing to measure.")
        self.batches = _shared(pairs, counts, self.reduction, total[0])
        self.conventions = Conventions(
            loss=_name(loss),
            weight_decay=self.weight_decay,
            split=split,
            augmentation=augmentation,
            examples=int(total[1]),
            terms=total[0],
            batch=max((_length(y) for _, y in pairs), default=0),
            mode=mode,
            params=", ".join(patterns),
            size=self.size,
            dtype=str(self.dtype).removeprefix("torch.") + (f", autocast {autocast}" if autocast else ""),
        )

    # -- data ----------------------------------------------------------------------------------------------------
    def _read(self, data: Any) -> list[tuple[Any, Any]]:
        """Read all batches and copy them to the device."""
        pairs = [data] if isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Tensor) else data
        pairs_here: list[tuple[Any, Any]] = []
        for pair in pairs:
            if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
                raise ValueError(f"data must yield pairs (inputs, targets), got {_no_pair(data, pair)}.")
            inputs, targets = (mapped(part, lambda t: self._cast(t.to(self.device), data=True)) for part in pair)
            if not first_tensor(targets).dim():
                raise ValueError("data must yield batches, as a DataLoader does; got a single example.")
            if _length(targets):
                pairs_here.append((inputs, targets))
        return pairs_here

    def _weigh(
        self,
        pairs: Sequence[tuple[Any, Any]],
        terms: Callable[[Any, Any], float] | None = None,
        reduction: Reduction | None = None,
    ) -> WeightRule:
        """Determine how these batches are weighted in L, see `terms.weigh`."""
        return weigh(
            self.loss,
            pairs,
            self._trials(),
            terms=terms,
            reduction=reduction,
            in_eval=self.mode == "eval",
            all_gather=self._all_gather,
        )

    def _trials(self) -> Iterator[_Trial]:
        """Yield the trials that compare losses, the most reliable first."""
        for far in (0.0, 0.5):
            for double in (True, False):
                yield _Trial(self, double, far)

    def _values(
        self, pairs: Sequence[tuple[Any, Any]], evaluated: Mapping[int, float], *, taken_on: bool
    ) -> list[float]:
        """The loss of each batch: taken from `evaluated`, or evaluated and compared with the losses of its parts."""
        every = None if self.rule.trial is None else EveryBatch(pairs, self.rule, self._loss_of)
        values: list[float] = []
        for i, (x, y) in enumerate(pairs):
            if every is None and i in evaluated:
                values.append(evaluated[i])
                continue
            with self.guard(), torch.no_grad():
                outputs, value = self._evaluated(WeightedBatch(x, y, 1.0, 1.0))
                comparison = "" if every is None else every.counterexample(i, outputs, value, self._trials())
            if comparison:
                every = None
                refuse(comparison, taken_on=taken_on)
            values.append(float(value))
        return values

    def _loss_of(self, outputs: Any, targets: Any) -> Tensor:
        """The loss of a batch, not scaled by its share."""
        return self.value_of(WeightedBatch(None, targets, 1.0, 1.0), outputs)

    def _counts(self, pairs: Sequence[tuple[Any, Any]], values: Sequence[float]) -> list[float]:
        """The number of terms of each batch. The loss may be NaN only in a batch without terms."""
        counts = [self.rule.total(pair) for pair in pairs]
        for i, (count, value) in enumerate(zip(counts, values, strict=True), 1):
            if not math.isfinite(value) and (count or not math.isnan(value)):
                raise ValueError(f"the loss of batch {i} of {len(pairs)} is {value}; it must be finite to be measured.")
        return counts

    @property
    def reduction(self) -> Reduction:
        """How the loss combines its terms, "mean" or "sum"."""
        return self.rule.reduction

    @property
    def ignored(self) -> int:
        """The label of targets that the loss ignores."""
        return -100 if self.rule.count.ignored is None else self.rule.count.ignored

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Raise a ValueError of one process in all processes of the group, so that none waits for the others."""
        own: ValueError | None = None
        try:
            yield
        except ValueError as error:
            own = error
        others = [text for text in self._all_gather(None if own is None else str(own)) if text is not None]
        if own is not None:
            raise own
        if others:
            raise ValueError(f"an error in another process: {others[0]}")

    def _all_gather(self, part: Any) -> list[Any]:
        """Gather an object from all ranks of the group."""
        if self.group is None:
            return [part]
        group = None if self.group == "world" else self.group
        parts: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(parts, part, group=group)
        return parts

    def _sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over the ranks of the group, in place."""
        if self.group is not None:
            torch.distributed.all_reduce(values, group=None if self.group == "world" else self.group)
        return values

    def reduced(self, values: Tensor) -> Tensor:
        """Sum a tensor over the ranks of the group with one all-reduce; unchanged without a group."""
        return self._sum(values)

    # -- the function --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Context of every evaluation. Training flags, random states and back-end settings are restored on exit."""
        flags = [(module, module.training) for module in self.model.modules()]
        devices = [self.device] if self.device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices=devices),
            # The fused attention kernels have no second derivative.
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
        self, batch: WeightedBatch, weights: Sequence[Tensor] | None = None, buffers: Mapping[str, Tensor] | None = None
    ) -> Any:
        """Run the model on a batch at the given weights (default: the model's own). Call it inside `guard`.

        `buffers` replaces buffers by name; the forward pass may write to them. All others are copies of the model's.
        """
        chosen = dict(zip(self.names, self.weights if weights is None else weights, strict=True))
        state = {**self._rest, **chosen, **{n: b.clone() for n, b in self._buffers.items()}, **(buffers or {})}
        args, kwargs = _call(batch.inputs)
        with torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None):
            return torch.func.functional_call(self.model, state, args, kwargs)

    def value_of(self, batch: WeightedBatch, outputs: Any, weights: Sequence[Tensor] | None = None) -> Tensor:
        """The contribution of a batch to L, without weight decay, from the model's outputs at these weights."""
        if self._closed:
            chosen = dict(zip(self.names, self.weights if weights is None else weights, strict=True))
            state = {f"model.{n}": t for n, t in {**self._rest, **chosen}.items()}
            within = _Within(self.model, self.loss)
            value: Any = torch.func.functional_call(within, state, (outputs, batch.targets))
        else:
            value = self.loss(outputs, batch.targets)
        if not isinstance(value, Tensor) or value.dim():
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the loss of a batch must be a scalar tensor, got {shape}.")
        return value * batch.share

    def value(
        self,
        weights: Sequence[Tensor] | None = None,
        *,
        buffers: Mapping[str, Tensor] | None = None,
        on_batch: Callable[[WeightedBatch, Any], None] | None = None,
    ) -> float:
        """L at the given weights and buffers (default: the model's own).

        Args:
            weights: one tensor per selected weight. Default None: the model's own.
            buffers: buffers by name. Default None: the model's own.
            on_batch: called with each batch and its outputs. Default None.
        """
        at = self.weights if weights is None else list(weights)
        with self.guard(), torch.no_grad():
            parts = []
            for batch in self.batches:
                outputs = self.outputs(batch, at, {n: b.clone() for n, b in (buffers or {}).items()})
                parts.append(self.value_of(batch, outputs, at).double())
                if on_batch is not None:
                    on_batch(batch, outputs)
            total = torch.stack(parts).sum().reshape(1) if parts else torch.zeros(1, dtype=torch.float64)
            total = self._sum(total.to(self.device))
            return float(total) + self._decay(at)

    def gradient(self, weights: Sequence[Tensor] | None = None) -> tuple[float, Tensor]:
        """L and its gradient of shape (size,), at the given weights (default: the model's own)."""
        at = self.weights if weights is None else [w.detach().requires_grad_() for w in weights]
        flat = torch.zeros(self.size + 1, dtype=torch.float64 if self.dtype == torch.float64 else torch.float32)
        flat = flat.to(self.device)
        with self.guard():
            for batch in self.batches:
                value = self.value_of(batch, self.outputs(batch, at), at)
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
        """Concatenate tensors shaped like the weights into one vector of shape (size,)."""
        return torch.cat([t.detach().reshape(-1) for t in tensors])

    def shaped(self, vector: Tensor) -> Tensors:
        """Split a vector of shape (size,) into tensors shaped like the weights, which share its storage.

        Raises:
            ValueError: the vector has another shape.
        """
        if vector.shape != (self.size,):
            raise ValueError(f"expected a vector of shape ({self.size},), got {tuple(vector.shape)}.")
        pieces = vector.split([w.numel() for w in self.weights])
        return [piece.view_as(w) for piece, w in zip(pieces, self.weights, strict=True)]

    def moved(self, displacement: Tensor) -> Tensors:
        """The weights plus a vector of shape (size,), as tensors shaped like the weights."""
        return [w.detach() + d for w, d in zip(self.weights, self.shaped(displacement.to(self.dtype)), strict=True)]

    def _cast(self, tensor: Tensor, *, data: bool = False) -> Tensor:
        """Cast a tensor of the data to the problem's dtype, or a tensor of the model if `dtype` was given."""
        wanted = self.dtype if data else self._given
        return tensor.to(wanted) if wanted is not None and tensor.is_floating_point() else tensor

    # -- checks --------------------------------------------------------------------------------------------------

    def _check(self, pairs: Sequence[tuple[Any, Any]]) -> dict[int, float]:
        """Raise ValueError for what cannot be measured. Returns the losses of the evaluated batches by number.

        The checks use the first batch with a finite loss. It is evaluated once, and twice more with its graph.
        """
        if self.mode == "train":
            active = [n for n, m in self.model.named_modules() if isinstance(m, _DROPOUT) and m.p > 0]
            if active:
                raise ValueError(
                    f"in mode='train' the dropout in {active[0]!r} makes the loss random; use mode='eval'."
                )
        batches = [WeightedBatch(x, y, 1.0, 1.0) for x, y in pairs]
        if not batches:
            return {}
        values: dict[int, float] = {}
        for i, batch in enumerate(batches):
            with self.guard(), torch.no_grad():
                values[i] = float(self._evaluated(batch)[1] if i else self._first_value(batch))
            if math.isfinite(values[i]):
                break
        else:
            said = candidates(self.loss, pairs, ())[0]
            if not any(said.total(pair) for pair in pairs):
                raise ValueError("the loss ignores every term of the data, so there is nothing to measure.")
            raise ValueError(f"the loss of batch 1 of {len(pairs)} is {values[0]}; it must be finite to be measured.")
        with self.guard():
            first, second = (self._evaluated(batch)[1] for _ in range(2))
            if not self._closed and self._reaches_the_model(first):
                # Such as a penalty on the weights: the loss must use the weights that are passed to the model.
                self._closed = True
                first, second = (self._evaluated(batch)[1] for _ in range(2))
            if self._closed and self._reaches_the_model(first):
                raise ValueError(
                    "the loss uses weights of the model that were stored before the call, so it would not change with "
                    "the weights; read them with model.parameters() inside the loss, or use weight_decay= instead."
                )
        if not first.requires_grad:
            raise ValueError(
                "the loss does not depend on the selected weights (it has no autograd graph); check params= and "
                "whether the loss is detached."
            )
        if not torch.equal(first, second):
            raise ValueError(
                "two evaluations of the same batch give different losses; remove what makes the loss random or "
                "changes the model."
            )
        return values

    def _first_value(self, batch: WeightedBatch) -> Tensor:
        """The loss of a batch. Raises ValueError if the forward pass writes to selected weights.

        If it writes to other weights, these are replaced by copies.
        """
        chosen = [w.detach().clone() for w in self.weights]
        clone = copy.copy(self)
        clone._rest = {n: w.clone() for n, w in self._rest.items()}
        value = clone._evaluated(batch, chosen)[1]
        written = [n for n, w in zip(self.names, chosen, strict=True) if w._version]
        if written:
            raise ValueError(
                f"the forward pass changes the weight {written[0]!r}, as nn.Embedding(max_norm=...) does, so the loss "
                "is not a function of the weights; leave the weight out with params=, or set max_norm = None."
            )
        self._rest |= {n: self._rest[n].clone() for n, w in clone._rest.items() if w._version}
        return value

    def _evaluated(self, batch: WeightedBatch, weights: Sequence[Tensor] | None = None) -> tuple[Any, Tensor]:
        """Outputs and loss of a batch. A dtype mismatch raises a ValueError that says what to do."""
        try:
            outputs = self.outputs(batch, weights)
            return outputs, self.value_of(batch, outputs, weights)
        except RuntimeError as error:
            if not any(word in str(error) for word in ("dtype", "scalar type")):
                raise
            raise ValueError(
                f"the model or the loss mixes tensors of different dtypes ({str(error).splitlines()[0]}). The selected "
                f"weights and floating-point inputs are {_dtype_name(self.dtype)}; pass dtype=, such as "
                "dtype=torch.float32, to cast all weights, buffers and inputs."
            ) from error

    def _reaches_the_model(self, value: Tensor) -> bool:
        """Whether a loss depends on the parameters of the model object, besides the weights passed to it."""
        own = [p for p in self.model.parameters() if p.requires_grad]
        if not value.requires_grad:
            return False
        return any(g is not None for g in torch.autograd.grad(value, own, allow_unused=True, retain_graph=True))

    def not_finite(self) -> str:
        """A sentence that names the first batch whose loss is not finite; "" if all losses are finite."""
        with self.guard(), torch.no_grad():
            values = [float(self.value_of(b, self.outputs(b))) for b in self.batches]
        bad = [i for i, value in enumerate(values, 1) if not math.isfinite(value)]
        if not bad:
            return ""
        return f" The loss of batch {bad[0]} of {len(values)} is {values[bad[0] - 1]}."


class _Within(nn.Module):
    """A module that holds the model and calls the loss, so functional_call replaces the weights that the loss reads."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.losses = (loss,)  # in a tuple, so a loss module is not registered as a child

    def forward(self, outputs: Any, targets: Any) -> Any:
        """Call the loss."""
        return self.losses[0](outputs, targets)


class _Trial:
    """Evaluates losses and gradients of a few examples of a problem.

    Args:
        problem: the function.
        double: evaluate in float64, if the model and the loss support it.
        far: distance from the weights, in multiples of each tensor's root mean square. If a network fits its data
            perfectly, or its last layer is zero, all losses at the weights are equal.
    """

    def __init__(self, problem: Problem, double: bool, far: float) -> None:
        self.problem = in_double(problem) if double else problem
        half = self.problem.dtype in (torch.float16, torch.bfloat16) or self.problem._autocast is not None
        self.tol = 1e-6 if self.problem.dtype == torch.float64 else 5e-2 if half else 2e-3
        self.weights = displaced(self.problem, far) if far else self.problem.weights

    def together(
        self, pair: tuple[Any, Any], rows: Sequence[Tensor], count: int, axes: tuple[int, int]
    ) -> list[Tensor] | None:
        """Loss and gradient of each set of rows, from one forward pass; None if an output has no row per example."""
        pair = self._cast(pair)
        every = torch.cat(list(rows[:-1]))
        places = [*torch.arange(len(every)).split([len(r) for r in rows[:-1]]), torch.arange(len(every))]
        inputs, targets = cut(pair, every, count, axes)
        with self.problem.guard():
            outputs = self.problem.outputs(WeightedBatch(inputs, targets, 1.0, 1.0), self.weights)
            if any(axis_of(t, len(every), axes) is None for _, t in tensors(outputs)) or not list(tensors(outputs)):
                return None
            return [
                self._signature(cut(outputs, p, len(every), axes), cut(targets, p, len(every), axes)) for p in places
            ]

    def apart(
        self, pair: tuple[Any, Any], rows: Sequence[Tensor], count: int, axes: tuple[int, int]
    ) -> list[Tensor] | None:
        """Loss and gradient of each set of rows, with a separate forward pass for each, in eval mode."""
        signatures = []
        clone = copy.copy(self.problem)
        clone.mode = "eval"
        with clone.guard():
            for r in rows:
                inputs, targets = cut(self._cast(pair), r, count, axes)
                outputs = clone.outputs(WeightedBatch(inputs, targets, 1.0, 1.0), self.weights)
                signatures.append(self._signature(outputs, targets))
        return signatures

    def _cast(self, pair: tuple[Any, Any]) -> Any:
        return mapped(pair, lambda t: self.problem._cast(t, data=True))

    def _signature(self, outputs: Any, targets: Any) -> Tensor:
        value = self.problem.value_of(WeightedBatch(None, targets, 1.0, 1.0), outputs, self.weights)
        slopes = torch.autograd.grad(value, self.weights, retain_graph=True, materialize_grads=True)
        return torch.cat([value.detach().reshape(1).double(), self.problem.flat(slopes).double()])


def in_double(problem: Problem) -> Problem:
    """The same function in float64, if the device supports it. The batches are not cast."""
    if problem.device.type == "mps":
        return problem
    clone = copy.copy(problem)
    clone.dtype = clone._given = torch.float64
    clone._autocast = None
    clone.weights = [w.detach().double().requires_grad_() for w in problem.weights]
    clone._rest = {n: clone._cast(t) for n, t in problem._rest.items()}
    clone._buffers = {n: clone._cast(t) for n, t in problem._buffers.items()}
    clone.loss = cast_loss(problem.loss, torch.float64)
    return clone


def displaced(problem: Problem, far: float, seed: int = 0) -> Tensors:
    """The weights plus noise of `far` times the root mean square of each tensor (for zeros: its mean over tensors)."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [float(w.detach().double().square().mean().sqrt()) for w in problem.weights]
    usual = sum(sizes) / len(sizes) or 0.1
    moved = []
    for w, size in zip(problem.weights, sizes, strict=True):
        noise = torch.randn(w.shape, generator=generator, dtype=torch.float64).to(w.device)
        moved.append((w.detach() + (far * (size or usual) * noise).to(w.dtype)).requires_grad_())
    return moved


def _measurable(model: nn.Module) -> nn.Module:
    """Unwrap the model (replicas and compiled models have no second derivatives), and check that it can be measured."""
    model = unwrapped(model)
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ValueError(
            "a TorchScript model cannot be measured, because weights cannot be passed to it; measure the Python model "
            "with the same weights (load_state_dict(scripted.state_dict()))."
        )
    sharded = [n for n, p in model.named_parameters() if type(p).__name__ in ("DTensor", "FlatParameter")]
    if sharded:
        raise ValueError(
            f"the weights are sharded over processes ({sharded[0]!r}); measure a model with unsharded weights, such as "
            "one loaded from a full state dict."
        )
    return model


def _common_dtype(named: Mapping[str, Tensor], names: Sequence[str]) -> torch.dtype:
    """The dtype of the selected weights."""
    first = named[names[0]].dtype
    other = next((n for n in names if named[n].dtype != first), None)
    if other is not None:
        raise ValueError(
            f"the selected weights have several dtypes: {names[0]!r} is {_dtype_name(first)}, {other!r} is "
            f"{_dtype_name(named[other].dtype)}; pass dtype=, such as dtype=torch.float32."
        )
    return first


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _length(targets: Any) -> int:
    return len(first_tensor(targets))


def _shared(
    pairs: Sequence[tuple[Any, Any]], counts: Sequence[float], reduction: Reduction, total: float
) -> list[WeightedBatch]:
    """Batches with their shares of the mean over `total` terms. Batches without terms are left out.

    If the loss is a sum, each term already counts once, so the batches are not weighted by their terms.
    """
    return [
        WeightedBatch(x, y, (1.0 if reduction == "sum" else count) / total, count)
        for (x, y), count in zip(pairs, counts, strict=True)
        if count
    ]


_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def over(problem: Problem, pairs: Sequence[tuple[Any, Any]]) -> Problem:
    """Make a problem with the same weights over the given batches, in this process only.

    Raises:
        ValueError: the loss ignores every term of these batches.
    """
    counts = [problem.rule.total(pair) for pair in pairs]
    if not sum(counts):
        raise ValueError("the loss ignores every term of the data, so there is nothing to measure.")
    lengths = [_length(targets) for _, targets in pairs]
    clone = copy.copy(problem)
    clone.batches, clone.group = _shared(pairs, counts, problem.reduction, sum(counts)), None
    clone.conventions = replace(problem.conventions, examples=sum(lengths), terms=sum(counts), batch=max(lengths))
    return clone


def only(problem: Problem, batches: Sequence[WeightedBatch]) -> Problem:
    """Make a problem with the same weights over some of the batches, in this process only.

    Raises:
        ValueError: `batches` is empty.
    """
    if not batches:
        raise ValueError("a problem needs at least one batch.")
    return over(problem, [(batch.inputs, batch.targets) for batch in batches])


def under(problem: Problem, loss: Loss) -> Problem:
    """Make a problem with the same data and weights and another loss, such as a loss of normalised logits.

    Args:
        problem: the function.
        loss: (outputs, targets) -> scalar, with the same reduction and the same terms.

    Raises:
        ValueError: `loss` has another reduction or other terms.
    """
    clone = copy.copy(problem)
    clone.loss = loss if problem._given is None else cast_loss(loss, problem._given)
    pairs = [(batch.inputs, batch.targets) for batch in problem.batches]
    given = problem.rule.count
    clone.rule = clone._weigh(pairs, given.terms if isinstance(given, CallerWeight) else None)
    if clone.reduction != problem.reduction or [clone.rule.total(p) for p in pairs] != [
        b.terms for b in problem.batches
    ]:
        raise ValueError(
            f"{_name(loss)} has other terms than {problem.conventions.loss}; make a separate Problem for it."
        )
    clone.conventions = replace(problem.conventions, loss=_name(loss))
    return clone


def restricted(problem: Problem, params: str | Sequence[str]) -> Problem:
    """Make a problem over fewer weights. The other weights become constants without weight decay.

    Args:
        problem: the function.
        params: shell patterns of parameter names, as a list or separated by commas. They select among the weights of
            `problem`.

    Raises:
        ValueError: a pattern matches none of the problem's weights.
    """
    patterns = [p.strip() for p in (params.split(",") if isinstance(params, str) else params)]
    at = dict(zip(problem.names, problem.weights, strict=True))
    clone = copy.copy(problem)
    clone.names = _select(problem.names, patterns)
    clone.weights = [at.pop(name) for name in clone.names]
    clone._rest = problem._rest | {name: w.detach() for name, w in at.items()}
    clone.size = sum(w.numel() for w in clone.weights)
    clone.conventions = replace(problem.conventions, params=", ".join(patterns), size=clone.size)
    return clone


def some_of(problem: Problem, count: int) -> WeightedBatch:
    """Draw a few examples with at least one term from all batches.

    If examples of different batches cannot be concatenated, the examples come from the first batch. If a tensor does
    not have one row per example, the whole first batch is returned.
    """
    batch = problem.batches[0]
    counted = []
    for pair in ((b.inputs, b.targets) for b in problem.batches):
        total = _length(pair[1])
        if any(axis_of(t, total, (0,)) is None for _, t in tensors(pair)):
            return batch
        weights = problem.rule.count.rows(pair, total, (0, 1))
        counted.append((pair, torch.arange(total) if weights is None else weights.nonzero()[:, 0]))
    order = torch.randperm(sum(len(rows) for _, rows in counted), generator=torch.Generator().manual_seed(0))[:count]
    ends = torch.tensor([len(rows) for _, rows in counted]).cumsum(0)
    parts = []
    for (pair, rows), end in zip(counted, ends.tolist(), strict=True):
        drawn = order[(order < end) & (order >= end - len(rows))].sort().values - (end - len(rows))
        if len(drawn):
            parts.append((cut(pair, rows[drawn], _length(pair[1]), (0,)), len(drawn)))
    pair_of_some = joined(parts, (0, 0))
    if pair_of_some is None:
        pair, rows = counted[0]
        pair_of_some = cut(pair, rows[:count], _length(pair[1]), (0,))
    inputs, targets = pair_of_some
    terms = problem.rule.total(pair_of_some)
    return WeightedBatch(
        inputs, targets, batch.share * (terms / batch.terms if problem.reduction == "mean" else 1.0), terms
    )


def _select(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    if not patterns:
        raise ValueError('params contains no pattern; use "*" to select all weights.')
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"no parameter matches {pattern!r}; the parameters are {', '.join(names[:8])}"
                f"{', ...' * (len(names) > 8)}."
            )
    return [n for n in names if any(fnmatch.fnmatchcase(n, p) for p in patterns)]


def _no_pair(data: Any, pair: Any) -> str:
    """Describe what the data yielded instead of a pair, and how to make a pair of it."""
    if isinstance(given := data if isinstance(data, Mapping) else pair, Mapping):
        keys = ", ".join(repr(key) for key in list(given)[:4])
        return f"{type(given).__name__} with keys {keys}; make it a pair, such as (batch, batch['labels'])"
    if isinstance(pair, Tensor):
        return "Tensor; pass a single batch as a tuple (inputs, targets)"
    return type(pair).__name__


def _recurrent(model: nn.Module) -> bool:
    return any(isinstance(m, nn.RNNBase) for m in model.modules())


def _name(loss: Loss) -> str:
    return getattr(loss, "__name__", type(loss).__name__)


def _call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}
