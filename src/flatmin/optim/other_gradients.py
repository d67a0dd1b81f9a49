"""Gradients of parameters that another optimizer trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from flatmin.methods import Gradients, accumulate
from flatmin.optim.containers import leaves
from flatmin.optim.distributed import lent
from flatmin.optim.tensors import is_sharded
from flatmin.words import warn


class OtherGradients:
    """Gradients of the model's parameters that another optimizer trains. Each comes from one pass, not from all passes.

    In a closure and in `passes()` they are those of the descent passes: each pass starts with the gradients from before
    the update, and gradients of ascent passes are dropped. In other manual loops they are those of the backward before
    the perturbation, because the other optimizer may step at any time after it.

    Attributes:
        any: whether there are such parameters. If not, no other method needs to be called.
        updates: number of updates since the start or the last `forget`.
    """

    def __init__(self) -> None:
        self.any, self.updates = False, 0
        self._names: list[str] = []
        self._parameters: list[Tensor] = []
        self._later: list[Tensor] = []
        self._prior: Gradients | None = None
        self._pass: Gradients | None = None
        self._total: Gradients | None = None
        self._last: Gradients | None = None
        self._copies: list[tuple[Tensor, Tensor, int, Tensor]] = []
        self._warned = False

    def scan(self, model: nn.Module, trained: Iterable[Tensor]) -> None:
        """Start again with the parameters of a model that are not among the trained ones."""
        mine = {id(w) for w in trained}
        others = [(n, p) for n, p in model.named_parameters() if id(p) not in mine and not is_sharded(p)]
        self._names, self._parameters = [n for n, _ in others], [p for _, p in others]
        self._later, self.updates = [], 0
        self._prior = self._pass = self._total = self._last = None
        self._copies = []
        self.any = bool(others)

    def forget(self) -> None:
        """Forget all of them, since one may have become a trained weight."""
        self._names, self._parameters, self._later, self._copies = [], [], [], []
        self._prior = self._pass = self._total = self._last = None
        self.any, self.updates = False, 0

    def in_training(self) -> list[Tensor]:
        """The parameters that another optimizer may train: those that require gradients."""
        return [p for p in self._parameters if p.requires_grad]

    def warn_of_climbed(self, method: str) -> None:
        """Warn once that in a manual loop their gradients are those of the method's ascent loss."""
        named = zip(self._names, self._parameters, strict=True)
        if not self._warned and (name := next((n for n, p in named if p.grad is not None), None)) is not None:
            self._warned = True
            warn(
                f"{name} is not in this optimizer, and its gradient is that of the ascent loss of {method}; use "
                "step(closure) or passes(), which give parameters of other optimizers the gradient of the training "
                "loss."
            )

    def look(self, result: Any, trained: Iterable[Tensor]) -> None:
        """Find further parameters that a closure's result depends on, before the first pass of an update ends."""
        seen = {id(w) for w in (*trained, *self._parameters)}
        new = [p for p in reached(result) if id(p) not in seen and p.grad is not None]
        # If a parameter had a gradient before this pass, both have been added up; it is handled from the next update.
        fresh = [p for p in new if p.grad is not None and p.grad._version == 0]
        if fresh:
            self._add(fresh)
            self._prior = [*(self._prior or []), *[None] * len(fresh)]
        self._later += [p for p in new if p.grad is not None and p.grad._version > 0]
        self.any = bool(self._parameters or self._later)

    def _add(self, parameters: Sequence[Tensor]) -> None:
        self._parameters += parameters
        self._names += [f"a weight of shape {tuple(p.shape)}" for p in parameters]

    def enter(self) -> None:
        """Begin a pass."""
        if self._prior is None:
            self._prior = [g if g is None or not lent(g) else g.clone() for g in self._now()]
        self._pass = None
        self.restart()

    def restart(self) -> None:
        """Begin one of several backward passes whose gradients are averaged."""
        assert self._prior is not None
        self._set([None if g is None else g.clone() for g in self._prior])

    def collect(self, share: float) -> None:
        """End it; its gradients are added with the weight `share`."""
        self._pass = accumulate(self._pass or [], self._now(), share)

    def leave(self, share: float | None) -> None:
        """End a pass; its gradients are added with the weight `share`. None: they are dropped."""
        made = self._now() if self._pass is None else self._pass
        self._last = made
        if share is not None:
            self._total = made if share == 1.0 and self._total is None else accumulate(self._total or [], made, share)
        self._set(self._total or self._prior or [])

    def end(self, *, keep: bool = True) -> None:
        """End the update. With `keep=False` the gradients from before the update are restored."""
        if not keep and self._prior is not None:
            self._set(self._prior)
        elif self._total is None and self._last is not None:
            self._set(self._last)  # the base optimizer takes the gradient of the ascent pass
        self._prior = self._pass = self._total = self._last = None
        self._copies = []
        if self._later:
            self._add(self._later)
            self._later = []

    def copy(self) -> None:
        """Copy the gradients, since a backward in the coming pass would add to them."""
        self._copies = [(p, g, g._version, g.clone()) for p in self._parameters if (g := p.grad) is not None]

    def restore(self) -> None:
        """Restore the copied gradients, except those that the loop has cleared or replaced since."""
        copies, self._copies = self._copies, []
        for p, gradient, version, copy in copies:
            if p.grad is gradient and gradient._version != version:
                gradient.copy_(copy)

    def _now(self) -> Gradients:
        return [p.grad for p in self._parameters]

    def _set(self, gradients: Gradients) -> None:
        for p, g in zip(self._parameters, gradients, strict=True):
            p.grad = g


def reached(result: Any) -> list[Tensor]:
    """The parameters that a closure's result depends on, that is, to which its backward pass gives gradients."""
    reached = (getattr(node, "variable", None) for node in _graph(result))
    return [leaf for leaf in reached if isinstance(leaf, nn.Parameter)]  # not inputs that require gradients


def hides_weights(result: Any) -> bool:
    """Whether a function written in Python may hide weights from the graph, as reentrant checkpoints do."""
    return any(isinstance(node, BackwardCFunction) for node in _graph(result))


def _graph(result: Any) -> Iterator[Any]:
    """The nodes of the graph of a closure's result."""
    waiting: list[Any] = [x.grad_fn for x in leaves(result) if isinstance(x, Tensor)]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [following for following, _ in node.next_functions]


def additions(weights: Sequence[Tensor]) -> int:
    """How often the first existing gradient has been changed in place since it was created."""
    first = next((g for w in weights if (g := w.grad) is not None), None)
    return 0 if first is None or lent(first) else first._version
