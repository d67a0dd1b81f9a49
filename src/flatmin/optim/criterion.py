"""`flatmin.Criterion`: a loss that methods can change in one of the passes, or restrict to some of the samples."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from flatmin.methods import GradientRequest, Need, Recipe
from flatmin.optim.loss_arguments import (
    Loss,
    argument,
    check_classes,
    check_weights,
    class_weight,
    counted_targets,
    ignored_target,
    in_order,
    name_of,
    required,
    unreduced,
)
from flatmin.optim.random_state import RandomState
from flatmin.optim.tensors import LOW


@dataclass(frozen=True, slots=True)
class PassView:
    """The pass in which a criterion is called.

    Attributes:
        role: "ascent" or "descent".
        perturbed: whether the weights are away from w. Default False.
        graph: whether second derivatives will be needed. Default False.
        probe: whether only the recipe uses this pass. Default False.
        under_way: whether an update has begun, to which the loss belongs. Default True.
    """

    role: Literal["ascent", "descent"]
    perturbed: bool = False
    graph: bool = False
    probe: bool = False
    under_way: bool = True


class Callback(Protocol):
    """The methods of the optimizer that a criterion calls."""

    def current_pass(self) -> PassView:
        """The pass that a loss computed now belongs to."""

    def on_loss(self, outputs: Any, target: Any, loss: Tensor, *, perturbed: bool) -> None:
        """Called for every training loss at w, and at w + eps in the descent pass."""


@dataclass(slots=True)
class Seen:
    """Outputs and loss of one call, with graph, for products with second derivatives.

    scores: one loss for each sample that the loss does not ignore; None if they are not needed.
    """

    outputs: Any
    loss: Tensor
    scores: Tensor | None


@dataclass(slots=True)
class _Choice:
    """Samples that were chosen before the network runs on them.

    index: their positions; None: all. count: the size of the batch. outputs, target: those of the whole batch. resume:
    lets draws go on as after the whole batch; None: draws are not repeated.
    """

    index: Tensor | None
    count: int
    outputs: Any
    target: Any
    resume: Callable[[], None] | None = None


class Criterion(nn.Module):
    """A loss that methods can change in one of the passes.

    Wrap your loss in it and pass it to the optimizer as `criterion=`. Nothing else in the training loop changes:

        >>> import torch, flatmin
        >>> model = torch.nn.Linear(4, 3)
        >>> criterion = flatmin.Criterion(torch.nn.CrossEntropyLoss(label_smoothing=0.1))
        >>> optimizer = flatmin.wrap(torch.optim.SGD(model.parameters(), lr=0.1), "bisam-log", criterion=criterion)
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = criterion(model(x), y)
        ...     loss.backward()
        ...     return loss
        >>> optimizer.step(closure).shape
        torch.Size([])

    Call it with the arguments of the wrapped loss. It returns the wrapped loss, except in three cases:

    - In the ascent pass of a method with another ascent loss (`bisam-log`, `bisam-tanh`) the returned tensor has the
      *value* of the wrapped loss and the *gradient* of the ascent loss, so that a training loop always logs the
      training loss. The wrapped loss's `ignore_index`, class `weight` and `reduction` apply to the ascent loss too.
    - In the descent pass of a method that chooses samples (`esam`) it is the wrapped loss of the chosen samples,
      `loss(outputs[chosen], target[chosen])`. See `SAM.select_samples` for loops that run the network on these only.
    - In the descent pass of a method with another descent loss (`functional-sam`) it has the value of the wrapped loss
      and the gradient of the method's descent loss.

    A sample is an entry of dimension 0. The loss of a single sample, used by `esam` and `ssam-f`, is the mean over its
    elements (pixels, tokens) of the loss without reduction, with class weights. Elements with the `ignore_index` and
    elements of classes with weight 0 are ignored. `esam` chooses samples without any other elements last, and `ssam-f`
    leaves them out of its Fisher diagonal.

    Args:
        loss: callable, in most cases of (outputs, target), for example `torch.nn.CrossEntropyLoss()`.
        per_sample: callable (outputs, target) -> one loss for each sample, shape (N,), or for each element, shape
            (N, ...), for `esam` and `ssam-f`. Default None: `loss` with reduction="none", if it has a `reduction`, like
            torch's loss modules and functions (also in `functools.partial`), and your own ones that take it.

    Raises:
        TypeError: loss is not callable.
    """

    # Here too for pickles of earlier versions, which lack them.
    _choosing: bool = False
    _choice: _Choice | None = None

    def __init__(self, loss: Loss, per_sample: Loss | None = None) -> None:
        super().__init__()
        if not callable(loss):
            raise TypeError(f"Criterion needs a callable (outputs, target) -> loss, got {type(loss).__name__}.")
        self.loss = loss
        self._per_sample = per_sample
        self._recipe = Recipe()
        self._callback: weakref.ref[Any] | None = None
        self.forget()

    def bind(self, callback: Callback, recipe: Recipe) -> None:
        """Connect to an optimizer; called by the optimizer. A criterion belongs to the optimizer that was bound last.

        Raises:
            TypeError: the recipe's ascent loss needs class logits, but the wrapped loss takes something else.
        """
        if recipe.objective.by_class:
            check_classes(self.loss, recipe.name)
        self._callback, self._recipe = weakref.ref(callback), recipe

    def forget(self) -> None:
        """Drop everything stored in the passes of an update; called by the optimizer."""
        self.calls = 0
        # What each call of pass 1 stores for the same call of pass 2: one tensor, or none before its backward.
        self._first: list[list[Tensor]] = []
        self._paired = False  # whether a call of pass 2 has used any of it
        self._choosing = False  # whether a call chooses samples for the next call
        self._choice = None
        self.seen: list[Seen] = []

    def give_up(self) -> None:
        """Drop what was stored by losses that have had their backward; called when gradients are cleared."""
        self._first = [place for place in self._first if not place]
        self.calls, self.seen = len(self._first), []

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        args, kwargs = in_order(args, kwargs)
        callback = None if self._callback is None else self._callback()
        if callback is not None and self._choosing:
            return self._choose_first(args, kwargs)
        if callback is None or not torch.is_grad_enabled():
            return self.loss(*args, **kwargs)
        now: PassView = callback.current_pass()
        self.calls += 1
        descent = now.role == "descent"
        by_sample = Need.PER_SAMPLE in self._recipe.needs
        if by_sample or self.selects or self._recipe.objective.by_class:
            self._check_pair(args, kwargs)
        outputs, target = (*args, None, None)[:2]
        choice, self._choice = self._choice, None
        if choice is not None and choice.resume is not None:
            choice.resume()  # the chosen samples have drawn fewer numbers, and further batches may be drawn
        ascent = None if descent else self._ascent(outputs, target)
        if ascent is not None:
            loss = self._climbing(ascent, *args, **kwargs)
        elif choice is not None:
            loss = self._of_chosen(choice, outputs, target)
        elif descent and now.perturbed and self.selects:
            loss = self._chosen(outputs, target)
        elif descent and now.perturbed and self._recipe.objective.keeps:
            loss = self._descending(outputs, *args, **kwargs)
        else:
            loss = self.loss(*args, **kwargs)
        if not descent and self.selects:
            with torch.no_grad():
                self._leave(self._each(outputs, target)[0], loss, now)
        if not descent and self._recipe.objective.keeps:
            self._leave(self._kept(outputs, loss, *args, **kwargs), loss, now)
        if now.graph:
            scores = None
            if by_sample:
                scores, counted = self._each(outputs, target)
                # Samples that are not ignored come first; their number is not read from the device.
                scores = scores if counted is None else scores[(~counted).to(torch.uint8).argsort(stable=True)]
            self.seen.append(Seen(outputs, loss, scores))
        if (descent or not now.perturbed) and not now.probe:
            if choice is not None:
                outputs, target = choice.outputs, choice.target  # of the whole batch, as in pass 1
            callback.on_loss(outputs, target, loss, perturbed=now.perturbed)
        return loss

    def select(self, compute: Callable[[], Any], random: RandomState | None) -> Tensor | None:
        """Choose samples for the next call, which gets these only; called by the optimizer in the descent pass.

        Args:
            compute: runs the network and this criterion on the whole batch.
            random: the generators whose draws are repeated in later passes; None: draws are not repeated.

        Returns:
            The positions of the chosen samples; None: all.

        Raises:
            RuntimeError: `compute` has not called the criterion exactly once, or the next call did not come.
        """
        if self._choosing:
            raise RuntimeError("select_samples() was called inside the function that it got; call it once in a pass.")
        self._refuse_unused()
        self._choosing, first = True, self._first
        try:
            with torch.no_grad():
                compute()
        except BaseException:
            self._choice, self._first = None, first  # the loop may try again
            raise
        finally:
            self._choosing = False
            torch.clear_autocast_cache()  # weights that it has cast without gradients
        if self._choice is None:
            raise RuntimeError(
                "select_samples() got a function that does not call the criterion that was given to the optimizer; "
                "pass one that computes the loss of the whole batch, as in `lambda: criterion(model(x), y)`."
            )
        if random is not None:
            self._choice.resume = functools.partial(random.restore, random.states())
        return self._choice.index

    def _choose_first(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        if self._choice is not None:
            raise RuntimeError(
                "select_samples() got a function that calls the criterion more than once; choose the samples of each "
                "call by itself."
            )
        self._check_pair(args, kwargs)
        index, count = self._choose(*args)
        self._choice = _Choice(index, count, *args)
        return self.loss(*args)

    def _refuse_unused(self) -> None:
        if self._choice is not None:
            raise RuntimeError(
                "select_samples() has chosen samples, but the criterion was not called on them; compute the loss of "
                "the chosen samples with it in the same pass."
            )

    def _of_chosen(self, choice: _Choice, outputs: Any, target: Any) -> Tensor:
        """The loss of a call that gets the chosen samples only."""
        if choice.index is None:
            return self.loss(outputs, target)
        expected = len(choice.index)
        for x in tree_leaves((outputs, target)):
            if isinstance(x, Tensor) and (x.ndim == 0 or len(x) != expected):
                raise ValueError(
                    f"select_samples() has chosen {expected} of {choice.count} samples, so outputs and targets must "
                    f"have {expected} entries in dimension 0; got a tensor of shape {tuple(x.shape)}. Run the network "
                    "on x[chosen] and compare it with y[chosen]."
                )
        return self.loss(outputs, target)

    def check_called(self, before: int, request: GradientRequest, recipe: Recipe) -> None:
        """Raise RuntimeError if a pass that needs the criterion has not called it, or not on the chosen samples.

        Args:
            before: `calls` when the pass began.
            request: the request of the pass.
            recipe: the recipe.
        """
        self._refuse_unused()
        if self.calls > before:
            return
        climbs = request.role == "ascent" and recipe.needs & {Need.CRITERION, Need.PER_SAMPLE}
        curved = request.graph and Need.CRITERION in recipe.needs
        descends = request.at is not None and (self.selects or recipe.objective.keeps)
        if climbs or curved or descends:
            raise RuntimeError(
                f"{recipe.name} needs the criterion that was given to the optimizer, but this pass did not call it; "
                "compute the loss with that flatmin.Criterion object."
            )

    def take_seen(self) -> list[Seen]:
        """Return and drop what the calls since the last backward recorded; called by the optimizer."""
        seen, self.seen = self.seen, []
        return seen

    @property
    def ignored(self) -> int | float | None:
        """The wrapped loss's `ignore_index`; None if it has none."""
        return ignored_target(self.loss)

    @property
    def selects(self) -> bool:
        """Whether the bound recipe chooses samples."""
        return self._recipe.samples.selects

    def _ascent(self, outputs: Any, target: Any) -> Tensor | None:
        """The ascent loss with graph; None: the wrapped loss itself."""
        objective: Any = self._recipe.objective
        if not objective.by_class:
            return objective.ascent(outputs, target)  # type: ignore[no-any-return]
        reduction = argument(self.loss, "reduction")
        try:
            return objective.ascent(  # type: ignore[no-any-return]
                outputs,
                target,
                weight=class_weight(self.loss, outputs),
                ignore_index=-100 if self.ignored is None else self.ignored,
                reduction=reduction if reduction in ("sum", "none") else "mean",
            )
        except (IndexError, RuntimeError) as error:
            if "out of bounds" not in str(error):
                raise
            raise ValueError(
                f"{self._recipe.name} needs class indices from 0 to K - 1 ({error}). If some targets are to be "
                "ignored, wrap a loss that has an ignore_index: torch.nn.CrossEntropyLoss(ignore_index=...) or "
                "functools.partial(F.cross_entropy, ignore_index=...)."
            ) from error

    def _climbing(self, ascent: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The value of the wrapped loss with the gradient of the ascent loss."""
        with torch.no_grad():
            value = self.loss(*args, **kwargs)
        if value.shape != ascent.shape:
            raise ValueError(
                f"the ascent loss of {self._recipe.name} has shape {tuple(ascent.shape)}, but the wrapped loss has "
                f"shape {tuple(value.shape)}; reduce it to a scalar, or give the wrapped loss a `reduction` attribute "
                "or argument."
            )
        return _ValueOf.apply(value, ascent)  # type: ignore[no-untyped-call, no-any-return]

    def _kept(self, outputs: Any, loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the objective stores in pass 1 for pass 2."""
        if not isinstance(outputs, Tensor) or loss.ndim:
            raise TypeError(
                f"{self._recipe.name} needs outputs that are one tensor and a scalar loss; "
                f"got {type(outputs).__name__} and a loss of shape {tuple(loss.shape)}."
            )
        if outputs.dtype in LOW:  # the gradient of a mean over many entries leaves the range of float16
            outputs = outputs.detach().float().requires_grad_()
            loss = self.loss(outputs, *args[1:], **kwargs)
        return self._recipe.objective.keep(outputs, loss).detach()

    def _descending(self, outputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The value of the wrapped loss at w + eps with the gradient of the objective's own descent loss."""
        kept = self._of_pass_1(outputs)
        with torch.no_grad():
            value = self.loss(*args, **kwargs)
        return _ValueOf.apply(value, self._recipe.objective.descent(outputs, kept))  # type: ignore[no-untyped-call, no-any-return]

    def _leave(self, first: Tensor, loss: Tensor, now: PassView) -> None:
        """Store a tensor of pass 1 for pass 2. For a call between updates, only when its backward runs."""
        place = [first] if now.under_way or not loss.requires_grad else []
        self._first.append(place)
        if not place:
            loss.register_hook(lambda _: place.append(first) if not place else None)

    def _of_pass_1(self, like: Tensor) -> Tensor:
        """What the corresponding call of pass 1 has stored; its shape must be that of `like`."""
        self._first, self._paired = [place for place in self._first if place], True
        first = self._first.pop(0)[0] if self._first else None
        if first is None or first.shape != like.shape:
            raise self._unpaired()
        return first

    def _unpaired(self) -> RuntimeError:
        return RuntimeError(
            f"{self._recipe.name} compares the passes at w and at w + eps; call the criterion equally often and on the "
            "same batches in both passes, and call optimizer.abort() if you discard a first pass."
        )

    def check_paired(self) -> None:
        """Raise RuntimeError if pass 2 has used only a part of what pass 1 stored; called by the optimizer."""
        if self._paired and any(self._first):
            raise self._unpaired()

    def _chosen(self, outputs: Any, target: Any) -> Tensor:
        """The loss at w + eps of the chosen samples, from the outputs of all."""
        index, count = self._choose(outputs, target)
        if index is None:
            return self.loss(outputs, target)
        return self.loss(*tree_map_only(Tensor, functools.partial(_taken, index=index, count=count), (outputs, target)))

    def _choose(self, outputs: Any, target: Any) -> tuple[Tensor | None, int]:
        """The positions of the chosen samples (None: all), and the number of all."""
        with torch.no_grad():
            second, counted = self._each(outputs, target)
        first = self._of_pass_1(second)
        if counted is not None:
            second = second.where(counted, -math.inf)
        index = self._recipe.samples(first, second)
        if index is not None:
            check_weights(self.loss, target, self._recipe.name)
        return index, len(second)

    def per_sample(self, outputs: Any, target: Any) -> Tensor:
        """One loss for each sample, shape (N,): the mean over its elements that are not ignored, or 0.

        Raises:
            TypeError: the wrapped loss has no per-sample form, and no `per_sample` was given.
            ValueError: the number of losses differs from that of the samples.
        """
        self.check_per_sample()
        return self._each(outputs, target)[0]

    def _each(self, outputs: Any, target: Any) -> tuple[Tensor, Tensor | None]:
        """One loss for each sample, and which samples are not ignored (None: all)."""
        each = self._per_sample or unreduced(self.loss)
        assert each is not None, "checked at construction"
        losses = each(outputs, target)
        batch = len(outputs) if isinstance(outputs, Tensor) and outputs.ndim else None
        if losses.ndim == 0 or batch not in (None, len(losses)):
            source = "per_sample=" if self._per_sample else f"{name_of(self.loss)} with reduction='none'"
            raise ValueError(
                f"expected one loss for each of {batch} samples, got shape {tuple(losses.shape)} from {source}; pass "
                "Criterion a function per_sample= of (outputs, target) that returns one loss for each sample."
            )
        counted = counted_targets(self.loss, outputs, target, len(losses))
        some = counted if counted is None or counted.ndim == 1 else counted.flatten(1).any(1)
        if losses.ndim > 1 and counted is not None and counted.shape == losses.shape:
            losses = losses.where(counted, 0).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)
        elif losses.ndim > 1:
            losses = losses.flatten(1).mean(1)
        return losses, some

    def check_per_sample(self) -> None:
        """Raise TypeError if per-sample losses cannot be computed."""
        name, arguments = name_of(self.loss), required(self.loss)
        if len(arguments) > 2:
            raise TypeError(
                f"{name} takes {', '.join(arguments)}, but this method separates the samples of (outputs, target). "
                "Pass Criterion a loss of your own whose target is a tuple with the further tensors, each with one "
                "entry per sample in dimension 0, and per_sample=."
            )
        if self._per_sample is None and unreduced(self.loss) is None:
            raise TypeError(
                f"{name} has no per-sample losses, because it has no `reduction` that could be 'none'; pass "
                "Criterion(loss, per_sample=function of (outputs, target))."
            )

    def _check_pair(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise TypeError for further arguments, which the method's own loss would ignore."""
        if len(args) != 2 or kwargs:
            named = f" and {', '.join(kwargs)} by name" if kwargs else ""
            raise TypeError(
                f"with {self._recipe.name} the criterion takes outputs and target only; got {len(args)} arguments by "
                f"position{named}. Bind options to the loss, as in functools.partial(F.cross_entropy, weight=...). "
                "Pass further tensors of the batch in a tuple, as the target of a loss of your own."
            )

    def __getstate__(self) -> dict[str, Any]:
        fresh = {"calls": 0, "_first": [], "_choice": None, "seen": []}
        return {**self.__dict__, **fresh, "_callback": None, "_recipe": Recipe()}

    def extra_repr(self) -> str:
        return "" if isinstance(self.loss, nn.Module) else repr(self.loss)


class _ValueOf(torch.autograd.Function):
    """The value of one tensor with the gradient of another, exact also where either is not finite."""

    @staticmethod
    def forward(value: Tensor, source: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def _taken(x: Tensor, index: Tensor, count: int) -> Tensor:
    """The entries of the chosen samples in dimension 0."""
    if x.ndim == 0 or len(x) != count:
        raise ValueError(
            f"this method selects some of the {count} samples, so outputs and targets must have one entry per sample "
            f"in dimension 0; got a tensor of shape {tuple(x.shape)}."
        )
    return x[index.to(x.device)]
