"""Gradients of weights that another optimizer trains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from flatmin.methods import Gradients, accumulate
from flatmin.optim.containers import leaves
from flatmin.optim.distributed import lent
from flatmin.optim.tensors import is_sharded
from flatmin.words import warn


class OtherGradients:
    """Gradients of the model's parameters that another optimizer trains: they come from one pass, not from all.

    In passes that the engine brackets (a closure, `passes()`) they are those of the descent passes: each pass begins
    with what was there before the update, and those of ascents are dropped. In manual loops they are those of the
    backward before the perturbation, because whoever steps next may need them at once.

    Attributes:
        any: whether there are such parameters; without them nothing else need be called.
        updates: in which `look` could be asked, since the beginning or `forget`.
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
        """Begin anew with the parameters of a model that are not among the trained ones."""
        mine = {id(w) for w in trained}
        found = [(n, p) for n, p in model.named_parameters() if id(p) not in mine and not is_sharded(p)]
        self._names, self._parameters = [n for n, _ in found], [p for _, p in found]
        self._later, self.updates = [], 0
        self._prior = self._pass = self._total = self._last = None
        self._copies = []
        self.any = bool(found)

    def forget(self) -> None:
        """Know none; one of them may have become a trained weight."""
        self._names, self._parameters, self._later, self._copies = [], [], [], []
        self._prior = self._pass = self._total = self._last = None
        self.any, self.updates = False, 0

    def in_training(self) -> list[Tensor]:
        """Those that another optimizer may train."""
        return [p for p in self._parameters if p.requires_grad]

    def warn_of_climbed(self, method: str) -> None:
        """Say once that their gradients in a manual loop are those of the loss that this method climbs."""
        named = zip(self._names, self._parameters, strict=True)
        if not self._warned and (name := next((n for n, p in named if p.grad is not None), None)) is not None:
            self._warned = True
            warn(
                f"{name} is not in this optimizer, and its gradient is that of the loss that {method} climbs; use "
                "step(closure) or passes(), where other weights take the gradient of the descent."
            )

    def look(self, result: Any, trained: Iterable[Tensor]) -> None:
        """Find further ones that what a closure returned depends on, before the first pass of an update ends."""
        known = {id(w) for w in (*trained, *self._parameters)}
        new = [p for p in reached(result) if id(p) not in known and p.grad is not None]
        # What had a gradient before this pass as well cannot be told from it now; the next update can.
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
        """A pass begins."""
        if self._prior is None:
            self._prior = [g if g is None or not lent(g) else g.clone() for g in self._now()]
        self._pass = None
        self.restart()

    def restart(self) -> None:
        """One of several backward passes begins whose gradients are averaged."""
        assert self._prior is not None
        self._set([None if g is None else g.clone() for g in self._prior])

    def collect(self, share: float) -> None:
        """It ends, and counts by this share."""
        self._pass = accumulate(self._pass or [], self._now(), share)

    def leave(self, share: float | None) -> None:
        """The pass ends, and counts by this share; None: not at all."""
        found = self._now() if self._pass is None else self._pass
        self._last = found
        if share is not None:
            self._total = found if share == 1.0 and self._total is None else accumulate(self._total or [], found, share)
        self._set(self._total or self._prior or [])

    def end(self, *, keep: bool = True) -> None:
        """The update ends; `keep=False`: with the gradients from before it."""
        if not keep and self._prior is not None:
            self._set(self._prior)
        elif self._total is None and self._last is not None:
            self._set(self._last)  # the base takes the gradient of the ascent
        self._prior = self._pass = self._total = self._last = None
        self._copies = []
        if self._later:
            self._add(self._later)
            self._later = []

    def copy(self) -> None:
        """Remember gradients that a backward in the coming pass would add to."""
        self._copies = [(p, g, g._version, g.clone()) for p in self._parameters if (g := p.grad) is not None]

    def restore(self) -> None:
        """Take back what was added since; a gradient that was cleared meanwhile belongs to whoever cleared it."""
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
    """The parameters at the ends of the graphs behind what a closure returned: a backward pass gives them gradients."""
    waiting: list[Any] = [x.grad_fn for x in leaves(result) if isinstance(x, Tensor)]
    seen: set[Any] = set()
    found: list[Tensor] = []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(leaf := getattr(node, "variable", None), nn.Parameter):  # not an input of its own batch
            found.append(leaf)
        waiting += [following for following, _ in node.next_functions]
    return found


def additions(weights: Sequence[Tensor]) -> int:
    """How often the first gradient there is has been added to, or changed otherwise, since it was made."""
    first = next((g for w in weights if (g := w.grad) is not None), None)
    return 0 if first is None or lent(first) else first._version
