"""The front doors: a closure, contexts for manual loops, and the two-call form, on one state machine."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from flatmin.methods import Gradients, Need, Recipe, accumulate
from flatmin.optim.amp import Scaling
from flatmin.optim.containers import detached, loss_in
from flatmin.optim.diagnostics import Diagnostics
from flatmin.optim.distributed import Replicas
from flatmin.optim.guards import OtherGradients
from flatmin.optim.program import StepInputs
from flatmin.optim.step import Evaluation, Update
from flatmin.optim.tensors import Layout
from flatmin.optim.watch import ModelWatch

if TYPE_CHECKING:
    from flatmin.optim.sam import SAM


Closure = Callable[[], Any]


def _due(count: int) -> bool:
    """Whether to look at the graph of a loss: in the first updates, and now and then."""
    return count <= 3 or count % 100 == 0


def _run_all(closures: Sequence[Closure], update: Update) -> Any:
    """Run the closures of all micro-batches; leaves the mean of their gradients and returns the mean of their losses.

    Each may zero the gradients, so they are summed outside of them.
    """
    share = 1.0 / len(closures)
    losses: list[Any] = []
    total: Gradients = []
    others = update.optimizer._others
    for closure in closures:
        for w in update.site.weights:
            w.grad = None
        if others is not None:
            others.restart()
        update.share = share
        losses.append(detached(loss_in(closure())))
        with torch.no_grad():
            total = accumulate(total, [w.grad for w in update.site.weights], share)
            if others is not None:
                others.collect(share)
    for w, g in zip(update.site.weights, total, strict=True):
        w.grad = g
    return _mean(losses)


def _mean(losses: Sequence[Any]) -> Any:
    """The mean of micro-batches' losses; None if one returned none."""
    if any(x is None for x in losses):
        return None
    bad = next((x for x in losses if not isinstance(x, (Tensor, int, float))), None)
    if bad is not None:
        raise TypeError(
            "each closure of a list must return the loss, or a dict, tuple or object that holds it as 'loss' or first; "
            f"got {type(bad).__name__}."
        )
    return sum(losses) / len(losses)


class Doors(Optimizer):
    """How a training loop drives an update; `SAM` adds what holds the weights and the state.

    Attributes:
        loss_point: where the loss that `step(closure)` returned was taken: "w", or "w + eps" for recipes that skip or
            move pass 1.
    """

    base: Optimizer
    recipe: Recipe
    loss_point: str
    _update: Update | None
    _resident: bool
    _diagnostics: Diagnostics | None
    _watch: ModelWatch | None
    clip_norm: float | None
    _scaling: Scaling | None
    _replicas: Replicas
    _layout: Layout
    _left: tuple[weakref.ref[Tensor], int] | None
    _warned: set[str]
    _base_differentiates: bool
    _others: OtherGradients | None
    _looks: int
    _lost_model: bool

    if TYPE_CHECKING:

        def _site(self, chunks: int = 1) -> StepInputs: ...

        def _between_updates(self) -> None: ...

        def _rewind(self) -> None: ...

        def _moves(self) -> bool: ...

        def _refuse_second_order_base(self) -> None: ...

        def _follow_model(self) -> None: ...

    @torch.no_grad()
    def step(self, closure: Closure | Sequence[Closure] | None = None) -> Any:
        """One update.

        With a closure (torch's convention: it zeroes the gradients, computes the loss, calls backward, returns the
        loss) all passes run here. Without one it ends an update whose passes a manual loop has run.

        A list of closures stands for the micro-batches of one batch: each returns the mean loss of its own samples, and
        gradients and losses are averaged over them, all counting alike. Methods with an ascent for every micro-batch
        need it.

        Returns:
            What the closure returned in the first pass, detached: its loss at w unless the recipe skips or moves pass 1
            (see `loss_point`). Of a list of closures: the mean of their losses. A closure may return the loss, or a
            dict, tuple or object that holds it as "loss" or first.

        Raises:
            RuntimeError: no gradients, a loss without forward pass, or no passes run and no closure.
            FloatingPointError: see `nonfinite`.
        """
        try:
            if "found_inf" in self.__dict__ and self._scaling is None:
                raise RuntimeError(
                    "scaler.step() on an optimizer that does not know the scaler: give it as scaler= when building the "
                    "optimizer, or set optimizer.scaler."
                )
            return self._step(closure)
        except BaseException:
            # The scaler leaves its marks behind when a step raises.
            for mark in ("grad_scale", "found_inf"):
                self.__dict__.pop(mark, None)
            raise

    # torch would fire the step hooks here as well as in the base.
    step.hooked = True  # type: ignore[attr-defined]
    # A GradScaler then calls step() in any case, also with a closure, and leaves scaling and skipping to it.
    _step_supports_amp_scaling = True

    def _step(self, closure: Closure | Sequence[Closure] | None) -> Any:
        if closure is not None:
            listed = isinstance(closure, (list, tuple))
            closures: list[Any] = list(closure) if isinstance(closure, (list, tuple)) else [closure]
            for one in closures:
                if not callable(one):
                    raise TypeError(f"closure must be callable, got {type(one).__name__}.")
            if not closures:
                raise ValueError("step() got an empty list of closures.")
            if self._resident or (self._update is not None and self._update.outcome is not None):
                return self._step_late(closures)
            return self._step_closures(closures, listed=listed)
        if self._resident:
            self._step_resident()
            return None
        update = self._update
        if update is None:
            self._plain_step()
            return None
        if update.outcome is None:
            raise RuntimeError(
                "step() called before the passes of this update are done; leave perturbed(), or use second_step()."
            )
        self._apply(update)
        return None

    def _step_late(self, closures: list[Closure]) -> Any:
        """A step with closures where w + eps is the place between steps, or where the loop has run the passes already.

        Frameworks whose step() always has a closure (Lightning's) give one that computes nothing if the loop gave none.
        """
        update = self._update
        assert update is not None
        if self._resident and self._scaling is not None:
            raise RuntimeError(
                "between train() and eval() a GradScaler looks at the gradients before it calls step(): run backward "
                "before scaler.step(optimizer), and give it no closure."
            )
        with torch.enable_grad():
            loss = closures[0]() if len(closures) == 1 else _run_all(closures, update)
        if self._resident:
            self.loss_point = "w + eps"
            if self._diagnostics is not None:
                self._diagnostics.loss(loss_in(loss), perturbed=True)
            self._step_resident(loss_in(loss))
        elif loss is None:
            self._apply(update)
        else:
            self.abort()
            raise RuntimeError(
                "step() got a closure that computes a loss, and the passes of this update are done; call step() "
                "without one after perturbed() and passes()."
            )
        return detached(loss)

    def _apply(self, update: Update, *, at_once: bool = False, loss: Any = None) -> None:
        try:
            update.apply(at_once=at_once, loss=loss)
        except BaseException:
            self._rewind()
            raise
        finally:
            self._update = None
            self._between_updates()

    def _step_closures(self, closures: list[Closure], *, listed: bool) -> Any:
        if Need.MICRO_BATCHES in self.recipe.needs and not listed:
            raise RuntimeError(f"{self.recipe.name} needs {Need.MICRO_BATCHES.value}; got one closure.")
        update = self._begin(len(closures), closed=True)
        unused = None if update.plain else self._unused_gradient()
        self._looks += 1
        firsts: list[Any] = []
        visited: set[int | None] = set()
        while update.request is not None:
            moved = update.request.at is not None
            with Evaluation(update) as evaluation, torch.enable_grad():
                chosen = closures if evaluation.chunk is None else [closures[evaluation.chunk]]
                probe = unused if evaluation.index == 0 else None
                if probe is not None:
                    probe.grad = torch.zeros_like(probe)
                    cleared = probe.grad
                result = chosen[0]() if len(chosen) == 1 else _run_all(chosen, update)
                if probe is not None and probe.grad is cleared:
                    self._judge_closure(probe)
                if evaluation.index == 0 and not update.plain and len(chosen) == 1 and _due(self._looks):
                    others = self._others or OtherGradients(None, ())
                    others.look(result, update.site.weights)
                    self._others = others or None
                if self._diagnostics is not None and not (moved and evaluation.role == "ascent"):
                    self._diagnostics.loss(loss_in(result), perturbed=moved)
                if evaluation.index == 0:
                    self.loss_point = "w + eps" if moved else "w"
                if evaluation.index == 0 or (not moved and evaluation.chunk not in visited):
                    firsts.append(detached(result))
                visited.add(evaluation.chunk)
                # The graph of this pass must not live through the next one.
                del result
        first = firsts[0] if len(firsts) == 1 else _mean([loss_in(x) for x in firsts])
        self._apply(update, at_once=True, loss=loss_in(first))
        if self._scaling is not None:
            # What is left would be checked, and found infinite, by the next scaler.step().
            self.zero_grad()
        return first

    def _unused_gradient(self) -> Tensor | None:
        """A weight whose gradient the loop has made since the last update, which a closure's passes would drop.

        None where it was another loss's, or where the model tells, and the warning is given at once.
        """
        found = next((w for w in self._layout.weights if w.grad is not None), None)
        if found is None or "dropped" in self._warned:
            return None
        g = found.grad
        if self._left is not None and self._left[0]() is g and g is not None and self._left[1] == g._version:
            return None
        if g is None or g.is_sparse:
            return None
        if self._watch is None:
            return found
        if self._others is not None and self._others.in_training():
            return found  # the forward may have been another optimizer's
        if self._watch.own_forwards and self._watch.alone:
            self._warn_of_drop("; to accumulate over micro-batches, give step() a list of closures, or use passes()")
        return None

    def _judge_closure(self, probe: Tensor) -> None:
        """The closure cleared no gradients: was it written to go on from those at hand?"""
        g = probe.grad
        if g is not None and g._version == 0:
            probe.grad = None
        elif g is not None and g._version == 1:
            self._warn_of_drop(
                " (here the closure runs in every pass). To accumulate over micro-batches, give step() a list of "
                "closures, or use passes(); a loop that calls backward() itself needs first_step() and second_step()"
            )

    def _warn_of_drop(self, way_out: str) -> None:
        self._warned.add("dropped")
        warnings.warn(
            f"step(closure) runs all passes itself and drops the gradients of the forward before it{way_out}.",
            stacklevel=6,
        )

    def backward(self, loss: Tensor) -> None:
        """`loss.backward()`, keeping the graph in the passes of methods that need second derivatives.

        Loops that call it in place of `loss.backward()` can run every method; its cost is that of `loss.backward()`
        wherever no graph is needed.

        Args:
            loss: scalar, with graph.
        """
        if self._update is None:
            loss.backward(create_graph=self._base_differentiates)
        else:
            self._update.backward(loss)

    @torch.no_grad()
    def train(self) -> None:
        """Tell a base that has `train()`, as schedule-free ones have; and stay at w + eps between steps (Momentum-SAM).

            optimizer.train()
            for x, y in loader:
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                optimizer.step()
            optimizer.eval()   # before evaluation and checkpoints

        Methods that know w + eps without a gradient at w (momentum-sam, stale-sam) stay there; the others need their
        passes. Trainers may call it on any optimizer: a base without `train()` is told nothing. Gradients are cleared
        on entering and after each step. The next eps is made inside step(), so a radius that a scheduler sets after it
        acts one step later than in step(closure).

        Raises:
            RuntimeError: an update under way.
        """
        if self._resident:
            return
        self._refuse_second_update("train()")
        if callable(told := getattr(self.base, "train", None)):
            told()
        if self.recipe.one_pass:
            self._stay()

    @torch.no_grad()
    def eval(self) -> None:
        """Return to w and stay there, and tell a base that has `eval()`; see `train`."""
        if self._resident:
            self.abort()
        self._refuse_second_update("eval()")
        if callable(told := getattr(self.base, "eval", None)):
            told()

    def _leave(self, update: Update) -> None:
        """End the pass that the loop has run at w + eps; a fault ends the update."""
        try:
            update.leave()
            update.finish()
        except BaseException:
            self.abort()
            raise

    def _stay(self) -> None:
        self._resident = True
        Evaluation(self._begin(), bracketed=False).__enter__()

    def _step_resident(self, loss: Any = None) -> None:
        update = self._update
        assert update is not None
        update.hand_over()
        self._leave(update)
        self._resident = False
        self._apply(update, loss=loss)
        self._stay()

    @contextlib.contextmanager
    def perturbed(self) -> Iterator[None]:
        """Context for manual loops: inside, the weights are at w + eps.

            loss_fn(model(x), y).backward()
            with optimizer.perturbed():
                loss_fn(model(x), y).backward()
            optimizer.step()

        Gradients are cleared on entering; after it they hold what the base will take, so clip there. Weights are
        restored on leaving, also by an exception, which ends the update.

        Raises:
            RuntimeError: no gradients before it, an update under way, or a recipe whose step is not two passes.
        """
        with Evaluation(self._begin_manual("perturbed()"), bracketed=False):
            yield

    def passes(self, chunks: int = 1) -> Iterator[Evaluation]:
        """The passes of one update, for manual loops with any recipe.

            for evaluation in optimizer.passes():
                with evaluation:
                    loss_fn(model(x), y).backward()
            optimizer.step()

        Args:
            chunks: into how many micro-batches the loop divides the batch, for methods that need them; each pass then
                says in `chunk` on which of them it runs. Default 1.

        Yields:
            Contexts with `role`, `index` and `chunk`; each must be entered. Gradients are cleared on entering.

        Raises:
            RuntimeError: an update under way, or a context that was not entered.
            ValueError: chunks below 1.
        """
        if chunks < 1:
            raise ValueError(f"chunks must be at least 1, got {chunks}.")
        update = self._begin(chunks)
        while update.request is not None:
            evaluation = Evaluation(update)
            yield evaluation
            if not evaluation.entered:
                self.abort()
                raise RuntimeError("each pass must be run inside `with evaluation:`.")
            if self._update is not update:
                return

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Climb to w + eps with the gradients at hand; the two-call form of `perturbed()`.

        Gradients are cleared in any case: they are spent.

        Raises:
            RuntimeError: no gradients, an update under way, or a recipe whose step is not two passes.
        """
        Evaluation(self._begin_manual("first_step()"), bracketed=False).__enter__()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Return to w and let the base step with the gradients taken at w + eps.

        With a scaler it unscales and skips by itself; `scaler.update()` comes after it.

        Args:
            zero_grad: clear the gradients afterwards. Default False.

        Raises:
            RuntimeError: without a first_step before it, or no gradients.
        """
        update = self._update
        if update is None or not update.inside:
            raise RuntimeError("second_step() needs first_step() and a backward pass before it.")
        update.close()
        self._leave(update)
        self.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def abort(self) -> None:
        """End an update without a step: weights, statistics and state are as the step found them."""
        update, self._update = self._update, None
        self._resident = False
        if update is not None:
            update.abort()
            self._rewind()
        self._between_updates()

    @torch.no_grad()
    def _begin(self, chunks: int = 1, *, door: str = "a new update", closed: bool = False) -> Update:
        self._refuse_second_update(door)
        if self._lost_model:
            self._lost_model = False
            warnings.warn(
                "this optimizer was unpickled, and its model is not known any more: set optimizer.model, or BatchNorm "
                "statistics and other state of the model advance in every pass.",
                stacklevel=5,
            )
        self._refuse_second_order_base()
        self._follow_model()
        self._update = Update(cast("SAM", self), self._site(chunks), closed=closed)
        return self._update

    def _refuse_second_update(self, what: str) -> None:
        if self._update is not None:
            raise RuntimeError(
                f"{what}: an update is under way; finish it with step(), or call "
                f"{'eval()' if self._resident else 'abort()'} to restore the weights."
            )

    def _begin_manual(self, door: str) -> Update:
        if self._replicas.local:
            raise RuntimeError(f"{door} takes a gradient that is averaged already; ascent_sync needs passes().")
        if not self.recipe.two_pass:
            raise RuntimeError(
                f"{door} serves recipes of one pass at w and one at w + eps; {self.recipe.name} needs passes() or "
                "step(closure)."
            )
        update = self._begin(door=door)
        try:
            with torch.no_grad():
                update.take_first()
        except BaseException:
            self.abort()
            raise
        return update

    def _plain_step(self) -> None:
        groups = self.param_groups
        idle = not (self.recipe.ascends and self._moves())
        # Distributed checkpoints make a base's state so, past any scaler.
        if "found_inf" not in self.__dict__ and all(g.get("lr") is not None and float(g["lr"]) == 0.0 for g in groups):
            self.base.step()
            return
        if idle and (self._scaling is not None or self.clip_norm is not None):
            update = self._begin()
            update.take_plain()
            self._apply(update)
            return
        if idle:
            self.base.step()
            return
        raise RuntimeError(
            f"step() needs a closure, or both passes before it: {self.recipe.name} takes a second gradient at w + eps. "
            "Pass a closure that zeroes, computes the loss and calls backward, or run the second pass in "
            "`with optimizer.perturbed():`."
            + (" Lightning's precision '16-mixed' keeps a closure to itself." if "found_inf" in self.__dict__ else "")
        )
