"""Runs one update: its passes, then the base optimizer's step. Does not depend on `SAM`."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from flatmin.methods import GradientRequest, Need
from flatmin.optim import tensors as ta
from flatmin.optim.amp import GradScaling
from flatmin.optim.closures import Closure, Probe, mean_loss, run_all
from flatmin.optim.containers import detached, loss_in
from flatmin.optim.diagnostics import warn_of_rounding
from flatmin.optim.flat import FlatWeights
from flatmin.optim.model_guard import Pass
from flatmin.optim.other_gradients import additions, hides_weights
from flatmin.optim.program import Outcome, PassGradients, program
from flatmin.optim.second_order import GraphProducts, PooledProducts, backward_with_graph
from flatmin.optim.support import in_group
from flatmin.optim.tools import Tools
from flatmin.optim.watch import warn_of_other_passes

_DTYPE, _GRAD, _LOW, _NONE = operator.attrgetter("dtype"), operator.attrgetter("grad"), set(ta.LOW), {type(None)}
# Parts of torch's errors for a graph that has been used, or whose weights have been changed since.
_STALE_GRAPH = ("backward through the graph a second time", "modified by an inplace operation")


class Step:
    """Runs the program of one update on the weights, in place.

    Invariant: outside `enter` ... `leave` the weights are unperturbed.

    The methods are called in this order:

    - closures: `run`, which enters and leaves each pass; then `apply`;
    - `passes()`: `enter` and `leave` for each pass; then `apply`;
    - `perturbed()`, `first_step()`: `take_first`, `enter`, `leave`; then `apply`;
    - `train()`: `enter`; in the loop's next step `hand_over`, `leave`, `apply`;
    - a plain step without perturbation: `take_plain`, `apply`;
    - after an error: `abort`.

    Args:
        tools: the collaborators.
        chunks: number of micro-batches. Default 1.
        eps: added to every norm that divides. Default 1e-12.
        closed: whether no other code reads the gradients between the last pass and the base optimizer's step. Default
            False.
        resident: whether the weights are at w + eps between updates, so that the loop's next plain step ends this
            update. Default False.

    Attributes:
        request: the next request of the program; None: all passes are done.
        outcome: the result of the program, once all passes are done.
        index: number of passes that have ended.
        inside: whether a pass is under way.
        over: whether the update has ended, with or without a step.
        plain: whether this update is the base optimizer's own step (rho = 0, or a recipe without ascent).
        share: weight of the running closure in the gradient of the pass.
    """

    def __init__(
        self,
        tools: Tools,
        chunks: int = 1,
        *,
        eps: float = 1e-12,
        closed: bool = False,
        resident: bool = False,
    ) -> None:
        self.tools, self.resident, self._unseen = tools, resident, closed
        self.closed = closed  # whether no scaler's step lies between the last pass and the base's
        self.weights = tools.weights.layout.weights
        flat = tools.flat
        # Ranks that share an ascent send one message, in which each weight has its place.
        self._joined = flat if flat is not None and flat.joins and not tools.replicas.local else None
        self._store = tools.state if self._joined is None else self._joined.slots
        self.inputs = inputs = tools.weights.inputs(tools.state, chunks, self._joined)
        self._eps = eps
        self._gradient: PassGradients | None = None  # of the blocks at w, to begin again on the weights
        self.index = 0
        self.inside = self.over = False
        self.share = 1.0
        self._pass = _BEFORE
        self._sums = False  # whether the gradients of several closures are added up outside of them
        self._whole = False  # whether the gradients of all weights are looked at in this pass
        self._partial = False  # whether only those of some weights were computed in it
        self._adds = False  # whether this pass adds its gradients to the buffers of `FlatWeights`
        self._additions = 0  # to the gradients of a manual loop's first pass
        self._began = False  # whether that pass has made gradients
        self._ascent_finite = True
        self._ascents = self._criterion_calls = 0
        self._visited: set[int | None] = set()
        self._products: list[tuple[float, GraphProducts]] = []
        self._silence: contextlib.AbstractContextManager[None] | None = None
        tools.snapshot.begin_update(inputs.step)
        if tools.scaling is not None:
            tools.scaling.begin()
        self._last: PassGradients | None = None  # the gradients of the weights, as the program has got them
        self._program: Generator[GradientRequest, PassGradients, Outcome] = program(
            tools.recipe, inputs, self._store, eps
        )
        self.request: GradientRequest | None = next(self._program)
        self.outcome: Outcome | None = None
        # On the CPU reading a flag does not synchronise.
        self._on_host = tools.weights.layout.on_cpu and not tools.on_device
        acts = tools.recipe.combine.always or any(inputs.rhos) if inputs.weights else tools.weights.act()
        self.plain = not (tools.recipe.ascends and acts)

    # -- closures ------------------------------------------------------------------------------------------------

    def run(self, closures: Sequence[Closure], probe: Probe | None = None) -> tuple[Any, bool]:
        """Run all passes with closures.

        Args:
            closures: one for each micro-batch.
            probe: finds out in the first pass whether the closure clears gradients. Default None.

        Returns:
            The closure's result in the first pass, detached (for several micro-batches: the mean of their losses), and
            whether the weights were perturbed in that pass.
        """
        diagnostics, single = self.tools.diagnostics, len(closures) == 1
        self._sums = not single
        results: list[Any] = []
        seen: set[int | None] = set()
        first_moved = False
        # Search for further parameters of the loss in the first updates, and then from time to time.
        others = self.tools.others
        others.updates += 1
        look = not self.plain and (others.updates <= 3 or others.updates % 100 == 0)
        while (request := self.request) is not None:
            moved, chunk, first = request.at is not None, request.chunk, self.index == 0
            try:
                self.enter(bracketed=True)
                self._whole = first and (look or probe is not None)
                with torch.enable_grad():
                    if first and probe is not None:
                        probe.put()
                    if chunk is not None or single:
                        result = closures[chunk or 0]()
                    else:
                        self.share = 1.0 / len(closures)
                        result = run_all(closures, self.weights, others)
                    if first and probe is not None:
                        probe.judge()
                    if first and look and (chunk is not None or single):
                        others.look(result, self.weights)
                if self.over:
                    raise RuntimeError("the closure called abort(), so no step was taken.")
                if diagnostics is not None and not (moved and request.role == "ascent") and not request.probe:
                    diagnostics.loss(loss_in(result), perturbed=moved)
                self.leave()
            except BaseException as error:
                self.fail(error)
                raise
            if first:
                first_moved = moved
            if first or (not moved and chunk not in seen):
                results.append(result.detach() if isinstance(result, Tensor) else detached(result))
            seen.add(chunk)
            # Free the graph of this pass before the next one.
            del result
        return results[0] if len(results) == 1 else mean_loss([loss_in(x) for x in results]), first_moved

    # -- passes --------------------------------------------------------------------------------------------------

    def enter(self, *, bracketed: bool) -> None:
        """Begin the next pass: move the weights to its point and clear the gradients.

        Args:
            bracketed: whether only the forward and backward of the pass come between this call and `leave`.
        """
        tools, request, chunk = self.tools, self.request, None
        if self.inside or self.over:
            raise RuntimeError("this pass was entered before, or its update has ended; enter each pass once.")
        if tools.scaling is not None:
            self._refuse_unscaled(tools.scaling)
        self.inside, self._last, self._partial = True, None, False
        clears = bool(self.index) or not (self.plain and self.closed)
        self._adds = clears and bracketed and not self._sums and self._joined is not None and self._joined.adds
        if clears:
            for w in () if self._adds else self.weights:
                w.grad = None
            for w in tools.weights.layout.frozen:
                w.grad = None
        perturbed = True  # a pass that is no longer needed counts as one at w + eps
        if request is not None:
            chunk, perturbed = request.chunk, request.at is not None
            if perturbed:
                self._displace(request)
            if self._joined is not None and self._adds:
                self._joined.clear()  # the perturbation may have been made from these gradients
            if tools.replicas.local and request.role == "ascent":
                self._silence = tools.replicas.silent()
                self._silence.__enter__()
        repeated = chunk in self._visited
        self._visited.add(chunk)
        self._pass = now = Pass(self.index, chunk, repeated, perturbed, bracketed)
        if tools.others.any and not self._joins_others(now):
            self._enter_others(now)
        if tools.guard is not None:
            tools.guard.enter(now)
        if tools.random is not None:
            if bracketed:
                (tools.random.replay if repeated else tools.random.capture)(chunk)
            elif repeated:
                tools.random.enter()
        if tools.criterion is not None:
            if bracketed and not repeated and len(self._visited) == 1:
                tools.criterion.forget()  # losses that were computed before the update
            self._criterion_calls = tools.criterion.calls

    def _displace(self, request: GradientRequest) -> None:
        tools, at = self.tools, request.at
        assert at is not None
        weights, snapshot = tools.weights, tools.snapshot
        if self._joined is None:
            layout = weights.layout = weights.layout.refreshed()
        else:
            layout = self._joined.layout
        flags = None if self._on_host else tools.flags_for(at.direction)
        unchecked = snapshot.unchecked and not _LOW.isdisjoint(map(_DTYPE, at.direction))
        recorded = None if request.role == "ascent" else tools.diagnostics
        if recorded is not None and request.probe:
            recorded = None
        moved = snapshot.move(layout, at, flags, again=self._ascents > 0, record=unchecked or recorded is not None)
        if self._joined is not None:
            self._joined.touch()
        self._ascents += 1
        self._ascent_finite = self._ascent_finite and moved
        at.direction, at.factors = [], []  # frees memory before the pass
        asked, snapshot.asked = snapshot.asked, None
        if snapshot.away is None or asked is None:
            return
        if recorded is not None:
            recorded.displaced(*snapshot.away, asked)
        if unchecked:
            snapshot.unchecked = False
            warn_of_rounding(*snapshot.away, asked)

    def leave(self) -> None:
        """End the pass: take its gradients, restore the weights, and get the next request."""
        tools, request, now = self.tools, self.request, self._pass
        if tools.others.any and not self._joins_others(now):
            self._leave_others(now, request)
        if not now.bracketed and self.index:
            if tools.random is not None:
                tools.random.leave()
            if not (self.plain or tools.warned_of_passes):
                watch = None if tools.guard is None else tools.guard.watch
                tools.warned_of_passes = warn_of_other_passes(watch, self._additions, additions(self.weights))
        if request is None:
            # The schedule decided against the ascent after pass 1: u is known and this pass was not needed.
            self._last = None
            self._restore()
            if self.outcome is not None:
                self._finish(self.outcome)
            return
        if tools.criterion is not None:
            tools.criterion.check_called(self._criterion_calls, request, tools.recipe)
        if tools.scaling is not None:
            self._refuse_unscaled(tools.scaling)
        if tools.guard is not None:
            tools.guard.watch.check_second_pass()
        if self._silence is not None:
            self._speak(self._silence)
        gradients = PassGradients(map(_GRAD, self.weights))
        if self._joined is not None and self._adds:
            gradients, self._adds = self._joined.made(gradients), False
        empty = self._partial or (self.plain and (now.bracketed or not self._began))
        if not empty and set(map(type, gradients)) <= _NONE:
            raise RuntimeError(
                f"no weight received a gradient in pass {self.index + 1}; "
                "the closure must compute the loss from the model and call loss.backward(). (In Lightning, step() "
                "without a closure passes an empty one: run both passes before it, or pass a closure.)"
            )
        self._restore()
        if self._joined is not None:
            gradients = self._joined_gradients(self._joined, request, gradients)
        gradients = self._received(request, gradients)
        if request.graph:
            if not self._products:
                raise RuntimeError(
                    f"{tools.recipe.name} needs second derivatives in this pass: call optimizer.backward(loss) instead "
                    "of loss.backward()."
                )
            self.inputs.products = PooledProducts(self._products)
        try:
            self._advance(gradients)
        finally:
            self.inputs.products, self._products = None, []
        if self.outcome is not None:
            self._finish(self.outcome)

    def _joins_others(self, now: Pass) -> bool:
        """Whether parameters of other optimizers simply keep the gradients of the only pass."""
        return self.plain and now.bracketed and self.inputs.chunks == 1

    def _enter_others(self, now: Pass) -> None:
        others, recipe = self.tools.others, self.tools.recipe
        if now.bracketed:
            others.enter()
        elif now.index:
            others.copy()
            if Need.CRITERION in recipe.needs:
                others.warn_of_climbed(recipe.name)

    def _leave_others(self, now: Pass, request: GradientRequest | None) -> None:
        others = self.tools.others
        if not now.bracketed:
            others.restore()
        elif request is None or request.role == "ascent":
            others.leave(None)
        else:
            others.leave(request.share or None)

    def _joined_gradients(self, flat: FlatWeights, request: GradientRequest, gradients: PassGradients) -> PassGradients:
        """The gradients of a pass for the blocks; those of the weights if the update cannot go on with blocks."""
        recipe = self.tools.recipe
        mixes = recipe.combine.mixes or recipe.direction.observes
        kept = recipe.remembers and request.role == "ascent"
        joined = flat.gather(gradients, copy=kept, partly=self.index > 0 and not mixes)
        if joined is None:
            for w, g in zip(self.weights, gradients, strict=True):
                w.grad = g
            self._separate(flat)
            return gradients
        if kept and recipe.combine.uses_gradient:
            self._gradient = joined
        return joined

    def _separate(self, flat: FlatWeights) -> None:
        """Begin again on the weights themselves: other weights have a gradient in this pass than those in blocks."""
        tools = self.tools
        self._program.close()
        self._joined, self._store = None, tools.state
        self.inputs = tools.weights.inputs(tools.state, self.inputs.chunks)
        self._program = program(tools.recipe, self.inputs, tools.state, self._eps)
        self.request = next(self._program)
        if self._gradient is not None:
            self.request = self._program.send(flat.separate(self._gradient))
            self._gradient = None

    def _received(self, request: GradientRequest, gradients: PassGradients) -> PassGradients:
        """The gradients of a pass in the form that the program needs: unscaled, averaged, not shared."""
        tools, weights = self.tools, self.inputs.weights
        if tools.scaling is not None:
            tools.scaling.unscale_(gradients)
        self._last = gradients
        if request.role == "ascent" and tools.replicas.local:
            gradients, self._last = PassGradients(tools.replicas.average(gradients, weights)), None
        keeps = self._joined is None and (tools.recipe.remembers or tools.diagnostics is not None)
        if keeps and tools.replicas.lends(gradients):
            self._last = gradients = PassGradients([None if g is None else g.clone() for g in gradients])
            for w, g in zip(weights, gradients, strict=True):
                w.grad = g
        if tools.diagnostics is not None:
            if request.role == "descent" and not request.probe:
                tools.diagnostics.last(gradients, weights, perturbed=request.at is not None)
            elif request.at is None:
                tools.diagnostics.first(gradients)
        gradients.owned = tools.diagnostics is None
        return gradients

    def _advance(self, gradients: PassGradients) -> None:
        self.index += 1
        try:
            self.request = self._program.send(gradients)
        except StopIteration as stop:
            self.request, self.outcome = None, stop.value

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss; keep its graph if the program has requested it."""
        tools, request = self.tools, self.request
        if not (self.inside and request is not None and request.graph):
            loss.backward(create_graph=tools.base.differentiates, inputs=self._needed(loss))
            return
        weights = self.weights
        gradients = backward_with_graph(loss, weights, tools.others.in_training())
        calls = [] if tools.criterion is None else tools.criterion.take_seen()
        self._products.append((self.share, GraphProducts(weights, gradients, calls)))

    def _needed(self, loss: Tensor) -> list[Tensor] | None:
        """The weights whose gradients this pass needs, if it need not compute those of the others; None: all."""
        request, tools = self.request, self.tools
        if not self.inside or request is None or request.weights is None or self._whole or self._joined is not None:
            return None
        # Processes that train together expect a gradient of every weight.
        if tools.diagnostics is not None or in_group():
            return None
        if hides_weights(loss):
            return None
        needed = [w for w in (self.weights[i] for i in request.weights) if w.requires_grad]
        self._partial = bool(needed)
        return needed or None

    def clear(self) -> bool:
        """Clear the gradients in a pass that adds them to buffers. Whether it is such a pass."""
        if self._joined is None or not self._adds:
            return False
        self._joined.clear_again()
        return True

    def select_samples(self, compute: Callable[[], Any]) -> Tensor | None:
        """The samples that the running pass is to be computed on, see `SAM.select_samples`; None: all."""
        request, criterion = self.request, self.tools.criterion
        descends = self.inside and request is not None and request.at is not None and request.role == "descent"
        if not descends or criterion is None or not criterion.selects:
            return None
        if not self._pass.bracketed:
            raise RuntimeError(
                "select_samples() works in step(closure) and passes(); in perturbed() and after first_step() run the "
                f"pass on the whole batch: the criterion applies the choice of {self.tools.recipe.name} there too."
            )
        if self.tools.guard is not None:
            self.tools.guard.watch.expect_other_batch()
        return criterion.select(compute, self.tools.random)

    # -- gradients that a loop has computed outside of passes -----------------------------------------------------

    def take_first(self) -> None:
        """Use the current gradients, from a pass that a manual loop has run at w, as those of pass 1."""
        tools, request = self.tools, self.request
        assert request is not None
        gradients = PassGradients([w.grad for w in self.weights])
        self._began = any(g is not None for g in gradients)
        if not (self._began or self.plain):
            raise RuntimeError("no gradients: call loss.backward() on the batch before perturbing the weights.")
        self._additions = additions(self.weights)
        self._visited.add(None)
        if tools.scaling is not None:
            self._refuse_unscaled(tools.scaling)
        if request.role == "ascent":
            self._criterion_calls = 0
            if tools.criterion is not None:
                tools.criterion.check_called(self._criterion_calls, request, tools.recipe)
            if self._joined is not None:
                gradients = self._joined_gradients(self._joined, request, gradients)
            self._advance(self._received(request, gradients))
        else:
            self.index += 1

    def take_plain(self) -> None:
        """Use the current gradients, for updates without perturbation."""
        gradients = PassGradients([w.grad for w in self.weights])
        if self._joined is not None and self.request is not None:
            gradients = self._joined_gradients(self._joined, self.request, gradients)
        self._advance(gradients)

    def close(self) -> None:
        """Declare that no other code reads the gradients before the base optimizer's step."""
        self.closed = True
        if self.tools.scaling is not None and self.tools.scaling.unscaled_early():
            raise RuntimeError("second_step() unscales the gradients itself; to clip them, pass clip_norm=.")

    def hand_over(self) -> None:
        """Prepare for the gradients of a plain loop, which the scaler's step has handled already."""
        self.closed = True
        if self.tools.scaling is not None:
            # The update began before the scaler's last update().
            self.tools.scaling.begin_again()

    # -- checks --------------------------------------------------------------------------------------------------

    def _refuse_unscaled(self, scaling: GradScaling) -> None:
        if not self.resident and scaling.unscaled_early():
            raise RuntimeError("scaler.unscale_(optimizer) was called between the passes; call it after the last one.")

    # -- the end -------------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        if self.tools.snapshot.away is not None:
            self.tools.snapshot.restore()
            if self._joined is not None:
                self._joined.touch()
        self.inside = False

    def _speak(self, silence: contextlib.AbstractContextManager[None]) -> None:
        """End the context without communication."""
        self._silence = None
        silence.__exit__(None, None, None)

    def fail(self, error: BaseException) -> None:
        """Abort the update after an error in a pass; raise a clearer error if the cause is known."""
        self.abort()
        if self.index and isinstance(error, RuntimeError) and any(text in str(error) for text in _STALE_GRAPH):
            raise RuntimeError(
                "backward used the graph of an earlier pass, because the loss was cached. Compute the loss again from "
                "the batch in every pass."
            ) from error

    @torch.no_grad()
    def abort(self) -> None:
        """End the update without a step. Weights, statistics and state are restored to those before it."""
        if self.over:
            return
        tools = self.tools
        self._restore()
        try:
            tools.others.restore()
            tools.others.end(keep=False)
            if tools.guard is not None:
                tools.guard.finish()
        finally:
            self._program.close()
            if self._silence is not None:
                self._speak(self._silence)
            self._end(taken=False)

    def _end(self, *, taken: bool) -> None:
        """End the update; reset the random numbers of the parts unless the step was taken."""
        self.over = True
        self.request = self.outcome = self._last = None
        self.inputs.products, self._products = None, []
        if not taken:
            self.tools.state.rewind(self.tools.base.optimizer.param_groups)
        end_update(self.tools)

    def _finish(self, outcome: Outcome) -> None:
        """Put u into the gradients of the weights, for the base optimizer and for loops that clip gradients."""
        tools, scaling = self.tools, self.tools.scaling
        if tools.guard is not None:
            tools.guard.finish()
        if tools.others.any:
            tools.others.end()
        if self._joined is not None:
            self._joined.publish(outcome.update, [new for _, new in outcome.staged.values()])
        elif outcome.update is not self._last:
            self._last = None
            for w, u in zip(self.weights, outcome.update, strict=True):
                if w.grad is not u:
                    w.grad = None if u is None else u.to(w.dtype)
        if scaling is not None and not self.closed:
            # The scaler's unscale_() and step() come next, and expect scaled gradients.
            scaling.rescale_([w.grad for w in self.weights])

    def apply(self, nonfinite: str = "skip", clip_norm: float | None = None, loss: Any = None) -> None:
        """Let the base optimizer step, then store the new state of the parts.

        Args:
            nonfinite: "skip" (default), "raise" or "propagate", see `SAM`.
            clip_norm: largest global norm of u. Default None: no clipping.
            loss: the loss of this update, for base optimizers that need it. Default None.

        Raises:
            FloatingPointError: nonfinite="raise", and u is not finite.
            RuntimeError: the base optimizer needs a loss that is not known, or the scaler's step is missing.
        """
        try:
            self._apply(nonfinite, clip_norm, loss)
        except BaseException:
            self._end(taken=False)
            raise
        self._end(taken=True)

    def _apply(self, nonfinite: str, clip_norm: float | None, loss: Any) -> None:
        tools, outcome, weights, scaling = self.tools, self.outcome, self.weights, self.tools.scaling
        assert outcome is not None
        if tools.criterion is not None:
            tools.criterion.check_paired()
        if scaling is not None:
            if not self.closed:
                scaling.finish_manual([w.grad for w in weights])
            tools.replicas.agree_(scaling.found)
            scaling.report()
        if clip_norm is not None and self._joined is not None and self._steps_on_blocks():
            ta.clip_(self._joined.gradients, clip_norm)
        elif clip_norm is not None:
            for w in weights:
                if w.grad is not None and w.grad.is_sparse:
                    w.grad = w.grad.coalesce()
            ta.clip_([w.grad for w in weights], clip_norm)
        flags = None if self._on_host else tools.flags_for(weights)
        step: Callable[[], object]
        if tools.flat is not None and (flat := self._block_step(tools.flat)) is not None:
            step, present, layout = flat.base.step, flat.gradients, flat.layout
        else:
            unseen = self._unseen and self._joined is None and outcome.update is self._last
            current = outcome.update if unseen else [w.grad for w in weights]
            step, layout = tools.base.step_with(loss, weights), tools.weights.layout
            present = [g for g in current if g is not None]
        stepped, finite, left_out = tools.base.step_if_finite(
            step,
            present,
            layout,
            nonfinite=nonfinite,
            size=outcome.size,
            ascents=self._ascents,
            flags=flags,
            scaled=None if scaling is None else scaling.found,
            terms=() if outcome.post is None else outcome.post[1],
        )
        finite = finite and self._ascent_finite
        beside = outcome.remembered
        keeps = stepped and finite and (beside is None or flags is not None or math.isfinite(float(beside)))
        if scaling is not None and not stepped:
            # The scaler would find an inf again in the remaining gradients.
            tools.base.zero_grad()
            if tools.guard is not None:
                tools.guard.watch.clear()
        if keeps:
            gate = None if flags is None or not outcome.staged else _gate([outcome.size, beside], left_out)
            for kind, (index, new) in outcome.staged.items():
                self._store.commit(kind, [self.inputs.weights[i] for i in index], new, gate)
        if stepped and outcome.post is not None:
            index, terms = outcome.post
            torch._foreach_add_([self.inputs.weights[i] for i in index], terms)
            if self._joined is not None:
                self._joined.touch()
        tools.weights.count_update(tools.state)
        if tools.diagnostics is not None:
            tools.diagnostics.keep()
        counts = tools.counts
        counts.updates += 1
        counts.nonfinite_ascents += not finite
        counts.skipped_steps += not stepped

    def _steps_on_blocks(self) -> bool:
        """Whether the gradients of the blocks are those that the base optimizer takes."""
        flat = self._joined
        return flat is not None and flat.complete and (self._unseen or flat.points())

    def _block_step(self, flat: FlatWeights) -> FlatWeights | None:
        """The blocks with their gradients, if the base optimizer can step on them; None: it steps on the weights."""
        if not flat.base.possible or flat.base.hooked():
            return None
        if self._joined is None:
            return None if flat.gather([w.grad for w in self.weights]) is None else flat
        return flat if self._steps_on_blocks() else None


def _gate(sizes: Sequence[Tensor | None], left_out: Tensor | None) -> Tensor | None:
    """A scalar that is 1 if these norms are finite and the base took its step; None if that is certain."""
    gate = None if left_out is None else 1 - left_out.to(torch.int32)
    for size in sizes:
        if size is not None:
            finite = (size < math.inf).to(torch.int32)
            gate = finite if gate is None else gate * finite
    return gate


def end_update(tools: Tools) -> None:
    """Tell all collaborators that the update has ended."""
    if tools.guard is not None:
        tools.guard.end_update()
    if tools.random is not None:
        tools.random.forget()
    tools.weights.leave_gradients()
    if tools.criterion is not None:
        tools.criterion.forget()
    if tools.diagnostics is not None:
        tools.diagnostics.turn_over()


_BEFORE = Pass(0, None, repeated=False, perturbed=False, bracketed=False)
