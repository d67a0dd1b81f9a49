"""One update as a state machine: passes are entered and left, then the base takes its step."""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import warnings
from collections.abc import Callable, Generator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flatmin.methods import Eval, Gradients, Need
from flatmin.optim import tensors as ta
from flatmin.optim.amp import Scaling
from flatmin.optim.base_optimizer import known_loss
from flatmin.optim.diagnostics import realised
from flatmin.optim.guards import OtherGradients, lent
from flatmin.optim.program import Outcome, Site, program
from flatmin.optim.second_order import GraphProducts, PooledProducts

if TYPE_CHECKING:
    from flatmin.optim.sam import SAM


_THROUGH_SCALER = "the gradients are scaled: end the update with scaler.step(optimizer)."
# What torch says of a graph that has been used, or whose weights have moved since.
_STALE_GRAPH = ("backward through the graph a second time", "modified by an inplace operation")
_IS_SPARSE = operator.attrgetter("is_sparse")


class Update:
    """Runs the program of one update over an optimizer's weights, in place.

    Invariant: outside `enter` ... `leave` the weights are where the step found them.

    `closed`: nobody sees the gradients between the last pass and the base's step.

    Attributes:
        plain: nothing moves in this update (rho = 0, or a recipe without ascent): it is the base's own step, with
            the gradients as a closure leaves them.
    """

    def __init__(self, optimizer: SAM, site: Site, *, closed: bool = False) -> None:
        self.optimizer, self.site, self.closed = optimizer, site, closed
        self.index = self._added = 0
        self._bracketed = True
        self._began = False  # whether a manual loop's first pass has made gradients
        self.inside = self.resident = self.aborted = False
        self.outcome: Outcome | None = None
        self._ascent_finite = True
        self._criterion_calls = 0
        self._visited: set[int | None] = set()
        self.products: list[tuple[float, GraphProducts]] = []
        self.share = 1.0  # of the running closure in the gradient of the pass
        self._silence = contextlib.ExitStack()
        self._moves = 0
        optimizer._ledger.reseed(optimizer._seed * 1_000_003 + site.step)
        self.scaling = optimizer._scaling
        if self.scaling is not None:
            self.scaling.begin()
        site.keep_gradients = optimizer._diagnostics is not None
        self._program: Generator[Eval, Gradients, Outcome] = program(
            optimizer.recipe, site, optimizer._store, optimizer.eps
        )
        self.request: Eval | None = next(self._program)
        self.plain = not (optimizer.recipe.ascends and any(site.rhos))

    def enter(self, *, bracketed: bool) -> None:
        """Go to the point of the next evaluation, with no gradients left from before."""
        opt, request = self.optimizer, self.request
        assert not self.inside
        self._check_scaled()
        self.inside = True
        self._bracketed = bracketed
        if not (self.plain and self.closed):
            for w in self.site.weights:
                w.grad = None
            for w in opt._layout.frozen:
                w.grad = None
        if opt._others is not None and not self._joins_others():
            self._part_with_others(opt._others)
        if request is not None and request.at is not None:
            opt._layout = opt._layout.refreshed()
            self._displace(request)
        chunk = None if request is None else request.chunk
        seen = chunk in self._visited
        self._visited.add(chunk)
        if request is not None and request.role == "ascent" and opt._replicas.local:
            self._silence.enter_context(opt._replicas.silent())
        # A batch that is new and still at w counts as a first pass: its statistics are those of w.
        later = self.index > 0 and (seen or request is None or request.at is not None)
        (opt._freeze if later else opt._thaw)()
        if opt._state is not None and bracketed and not later:
            opt._state.begin()
        if opt._watch is not None:
            opt._watch.begin_pass(int(seen), bracketed=bracketed)
        if opt._random is not None:
            if bracketed:
                (opt._random.replay if seen else opt._random.capture)(chunk)
            elif seen:
                opt._random.enter()
        if opt.criterion is not None:
            self._criterion_calls = opt.criterion.calls

    def _joins_others(self) -> bool:
        """Whether the other weights' gradients are simply those of the one backward pass that comes."""
        return self.plain and self._bracketed and self.site.services.chunks == 1

    def _part_with_others(self, others: OtherGradients) -> None:
        opt = self.optimizer
        if self._bracketed:
            others.enter()
        elif self.index:
            others.copy()
            climbed = Need.CRITERION in opt.recipe.needs and "others" not in opt._warned
            if climbed and (name := others.first()) is not None:
                opt._warned.add("others")
                warnings.warn(
                    f"{name} is not in this optimizer, and its gradient is that of the loss that {opt.recipe.name} "
                    "climbs; use step(closure) or passes(), where other weights take the gradient of the descent.",
                    stacklevel=6,
                )

    def _join_others(self) -> None:
        """The other weights' gradients, as the pass that ends leaves them."""
        others, request = self.optimizer._others, self.request
        if others is None or self._joins_others():
            return
        if not self._bracketed:
            others.restore()
        elif request is None or request.role == "ascent":
            others.leave(None)
        else:
            pooled = self.optimizer.recipe.points.pooled and request.chunk is not None
            others.leave(1.0 / self.site.services.chunks if pooled else 1.0)

    def _displace(self, request: Eval) -> None:
        opt, at = self.optimizer, request.at
        assert at is not None
        flags = opt._device_flags(at.direction)
        unchecked = opt._unchecked_rounding and any(d.dtype in ta.LOW for d in at.direction)
        record = unchecked or (opt._diagnostics is not None and request.role == "descent")
        moved = opt._ledger.move(opt._layout, at, flags, again=self._moves > 0, record=record)
        self._moves += 1
        self._ascent_finite = self._ascent_finite and moved
        at.clear()
        asked, opt._ledger.asked = opt._ledger.asked, None
        if opt._ledger.away is None or asked is None:
            return
        if opt._diagnostics is not None and request.role == "descent":
            opt._diagnostics.displaced(*opt._ledger.away, asked)
        if unchecked:
            opt._unchecked_rounding = False
            _warn_of_rounding(*opt._ledger.away, asked)

    def leave(self) -> None:
        """Take the gradients of the evaluation, put the weights back and learn what comes next."""
        self._join_others()
        if not self._bracketed:
            self._check_manual()
        if self.request is None:
            # A rule that looked at pass 1 decided against the ascent: u is known, this pass was not needed.
            self._restore()
            return
        self._check_criterion()
        self._check_scaled()
        if self.optimizer._watch is not None:
            self.optimizer._watch.check_second_pass()
        self._silence.close()
        grads: Gradients = [w.grad for w in self.site.weights]
        if all(g is None for g in grads) and not (self.plain and (self._bracketed or not self._began)):
            raise RuntimeError(
                f"no weight received a gradient in pass {self.index + 1}; "
                "the closure must compute the loss from the model and call loss.backward(). (A step() of Lightning's "
                "without a closure gives an empty one: run both passes before it, or give it a closure.)"
            )
        self._restore()
        grads = self._received(grads)
        self._look(grads)
        if self.request.graph:
            if not self.products:
                raise RuntimeError(
                    f"{self.optimizer.recipe.name} needs second derivatives in this pass: call "
                    "optimizer.backward(loss) instead of loss.backward()."
                )
            self.site.products = PooledProducts(self.products)
        try:
            self._advance(grads)
        finally:
            self.site.products, self.products = None, []

    def _check_manual(self) -> None:
        """Warn of what a manual loop did in one pass and not in the other."""
        opt, watch = self.optimizer, self.optimizer._watch
        if not self.index:
            return
        if opt._random is not None:
            opt._random.leave()
        if self.plain or "batches" in opt._warned:
            return
        if watch is not None and opt._random is not None and watch.turns[0] != watch.turns[1] and opt._random.drawn():
            opt._warned.add("batches")
            warnings.warn(
                f"the model ran {watch.turns[0]} times before the weights were perturbed and {watch.turns[1]} times "
                "after it, so the second pass cannot draw the random numbers of the first. Run the same forwards in "
                "both passes, call optimizer.zero_grad() after forwards that are no part of a step, or use a closure.",
                stacklevel=6,
            )
        before, after = self._added, _additions(self.site.weights)
        forwards = (1, 0) if watch is None else watch.forwards
        if before > after and forwards[0] > forwards[1]:
            opt._warned.add("batches")
            warnings.warn(
                f"gradients were added up or changed {before} times before the weights were perturbed and {after} "
                "times after it. To accumulate over micro-batches, run all of them in the second pass too, or use "
                "passes() or a list of closures; clip gradients after the second pass.",
                stacklevel=6,
            )
        elif watch is not None and watch.differs:
            opt._warned.add("batches")
            watch.warn_of_batches()

    def _check_scaled(self) -> None:
        resident = self.resident or self.optimizer._resident
        if self.scaling is not None and not resident and self.scaling.unscaled_early(self.optimizer):
            raise RuntimeError("scaler.unscale_(optimizer) was called between the passes; call it after the last one.")

    def _received(self, grads: Gradients) -> Gradients:
        """The gradients of a pass as the program shall see them."""
        opt, request = self.optimizer, self.request
        assert request is not None
        if self.scaling is not None:
            self.scaling.unscale_(grads)
        if request.role == "ascent":
            grads = opt._replicas.average(grads, self.site.weights)
        if (opt.recipe.remembers or self.site.keep_gradients) and opt._replicas.lends(grads):
            grads = [None if g is None else g.clone() for g in grads]
            for w, g in zip(self.site.weights, grads, strict=True):
                w.grad = g
        return grads

    def _look(self, grads: Gradients) -> None:
        """Show the gradients to the diagnostics."""
        diagnostics, request = self.optimizer._diagnostics, self.request
        if diagnostics is None or request is None:
            return
        if request.role == "descent":
            diagnostics.last(grads, self.site.weights, perturbed=request.at is not None)
        elif request.at is None:
            diagnostics.first(grads)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss; keep its graph if the program asked for it."""
        request, criterion = self.request, self.optimizer.criterion
        if not (self.inside and request is not None and request.graph):
            loss.backward(create_graph=self.optimizer._base_differentiates)
            return
        weights = self.site.weights
        known = self.optimizer._others
        # A weight may have been frozen since the update before.
        asked = [w for w in (*weights, *([] if known is None else known.in_training())) if w.requires_grad]
        found = dict(zip(asked, torch.autograd.grad(loss, asked, create_graph=True, allow_unused=True), strict=True))
        for w, g in found.items():
            if g is not None:
                w.grad = g.detach().clone() if w.grad is None else w.grad + g.detach()
        grads = [found.get(w) for w in weights]
        calls = [] if criterion is None else criterion.take_seen()
        self.products.append((self.share, GraphProducts(weights, grads, calls)))

    def take_first(self) -> None:
        """Use the gradients of a pass that a manual loop has run already at w, as the ascent's."""
        assert self.request is not None
        grads: Gradients = [w.grad for w in self.site.weights]
        if all(g is None for g in grads) and not self.plain:
            raise RuntimeError("no gradients: call loss.backward() on the batch before perturbing the weights.")
        self._added = _additions(self.site.weights)
        self._began = any(g is not None for g in grads)
        self._visited.add(None)
        self._check_scaled()
        if self.request.role == "ascent":
            self._criterion_calls = 0
            self._check_criterion()
            grads = self._received(grads)
            self._look(grads)
            self._advance(grads)
        else:
            self.index += 1

    def take_plain(self) -> None:
        """Use the gradients of a plain loop, for updates that stay at w."""
        self._advance([w.grad for w in self.site.weights])

    def close(self) -> None:
        """Let nobody see the gradients before the base's step."""
        self.closed = True
        if self.scaling is not None and self.scaling.unscaled_early(self.optimizer):
            raise RuntimeError("second_step() unscales the gradients itself; to clip them, give clip_norm=.")

    def hand_over(self) -> None:
        """Expect the gradients of a plain loop that went through the scaler's own step."""
        self.closed = self.resident = True
        if self.scaling is None:
            return
        opt = self.optimizer
        if not hasattr(opt, "found_inf"):
            raise RuntimeError(_THROUGH_SCALER)
        # The update began before the scaler's last update().
        self.scaling.scale = torch.ones_like(self.scaling.scale) if opt.grad_scale is None else opt.grad_scale
        self.scaling.found += opt.found_inf

    def _advance(self, grads: Gradients) -> None:
        self.index += 1
        try:
            self.request = self._program.send(grads)
        except StopIteration as stop:
            self.request, self.outcome = None, stop.value

    def _check_criterion(self) -> None:
        criterion, recipe, request = self.optimizer.criterion, self.optimizer.recipe, self.request
        if criterion is None or request is None or criterion.calls > self._criterion_calls:
            return
        climbs = request.role == "ascent" and recipe.needs & {Need.CRITERION, Need.PER_SAMPLE}
        curved = request.graph and Need.CRITERION in recipe.needs
        if climbs or curved or (request.at is not None and criterion.selects):
            raise RuntimeError(
                f"{recipe.name} works through the loss object, but the pass never called the criterion given to the "
                "optimizer; compute the loss with that flatmin.Criterion object."
            )

    def _restore(self) -> None:
        self.optimizer._ledger.restore()
        self.inside = False

    def abort(self) -> None:
        """Put everything back as the step found it, and forget the update."""
        self.aborted = True
        self._restore()
        self.request = self.outcome = None
        try:
            if self.optimizer._others is not None:
                self.optimizer._others.restore()
                self.optimizer._others.end(keep=False)
            self.optimizer._thaw()
        finally:
            self._program.close()
            self._silence.close()

    def finish(self) -> None:
        """Leave u in the weights' gradients, for the base and for a loop that clips."""
        opt, outcome = self.optimizer, self.outcome
        assert outcome is not None
        opt._thaw()
        if opt._others is not None:
            opt._others.end()
        if not (outcome.untouched and self.index):
            for w, u in zip(self.site.weights, outcome.update, strict=True):
                if w.grad is not u:
                    w.grad = None if u is None else u.to(w.dtype)
        if self.scaling is not None and not self.closed:
            # The scaler's own unscale_() and step() come next, and expect it so.
            self.scaling.rescale_([w.grad for w in self.site.weights])

    def apply(self, *, at_once: bool = False, loss: Any = None) -> None:
        """The base's step, by the rule for gradients that are not finite; then what the parts learned is kept.

        `at_once`: nobody could have changed the gradients since the last pass. `loss`: this update's, for bases whose
        step asks for it.
        """
        opt, outcome = self.optimizer, self.outcome
        assert outcome is not None
        if self.scaling is not None:
            self._settle(self.scaling)
        if opt.clip_norm is not None:
            for w in self.site.weights:
                if w.grad is not None and w.grad.is_sparse:
                    w.grad = w.grad.coalesce()
            ta.clip_([w.grad for w in self.site.weights], opt.clip_norm)
        step: Callable[..., object] = opt.base.step
        if loss is not None and opt._base_takes_closure:
            step = functools.partial(step, known_loss(opt.base, loss, self.site.weights))
        elif opt._base_needs_closure:
            raise RuntimeError(f"the step of {type(opt.base).__name__} asks for the loss: use optimizer.step(closure).")
        stepped, gate = self._base_step(step, outcome, at_once and outcome.untouched)
        if self.scaling is not None and not stepped:
            # The scaler would find what is left infinite once more.
            opt.zero_grad()
        if stepped and self._ascent_finite:
            for kind, (index, new) in outcome.staged.items():
                weights = [self.site.weights[i] for i in index]
                opt._store.commit(kind, weights, new, gate, self.site.layout)
        if stepped and outcome.post is not None:
            index, terms = outcome.post
            torch._foreach_add_([self.site.weights[i] for i in index], terms)
        opt._note(ascent_finite=self._ascent_finite, stepped=stepped)

    def _settle(self, scaling: Scaling) -> None:
        """Unscale what is still scaled, and exchange verdicts with the scaler."""
        opt = self.optimizer
        if not self.closed:
            if not hasattr(opt, "found_inf"):
                raise RuntimeError(_THROUGH_SCALER)
            scale = opt.grad_scale
            if scale is not None:
                scaling.unscale_([w.grad for w in self.site.weights], scale.double().reciprocal().float())
            scaling.found += opt.found_inf
        opt._replicas.agree_(scaling.found)
        scaling.report()

    def _base_step(self, base_step: Callable[[], object], outcome: Outcome, known: bool) -> tuple[bool, Tensor | None]:
        """Whether the host knows of no fault; a 0/1 verdict on staged state where only the device knows."""
        opt = self.optimizer
        flags = opt._device_flags(self.site.weights)
        ascended = flags is not None and outcome.size is not None
        if opt.nonfinite == "propagate" and self.scaling is None:
            base_step()
            if flags is not None and ascended:
                flags.count(ascended=True)
                return True, self._gate(outcome)
            return True, None
        current = outcome.update if known else [w.grad for w in self.site.weights]
        update = [g for g in current if g is not None]
        layout = opt._layout
        if any(map(_IS_SPARSE, update)):
            layout = ta.Layout([])
            update = [g.coalesce().values() if g.is_sparse else g for g in update]
        # A decoupled term reaches the weights past the base, and holds the gradient at w + eps that u may not.
        terms = [] if outcome.post is None else outcome.post[1]
        if flags is None:
            # An ascent on the way may have failed where the last one did not.
            self._ascent_finite &= outcome.size is None or math.isfinite(float(outcome.size))
            finite = ta.all_finite(update, layout) and (not terms or ta.all_finite(terms, ta.Layout([])))
            if (self.scaling is not None and self.scaling.found) or not finite:
                return self._refuse(), None
            base_step()
            return True, None
        if not ascended:
            flags.reset()
        elif self._moves > 1 and outcome.size is not None:
            flags.judge(outcome.size, again=True)
        ta.nonfinite_([*update, *terms], flags.found_inf, flags.one)
        if self.scaling is not None:
            flags.found_inf.logical_or_(self.scaling.found)
        if (
            (opt.nonfinite == "skip" or self.scaling is not None)
            and opt._base_takes_found_inf()
            and outcome.post is None
        ):
            opt.base.found_inf = flags.found_inf  # type: ignore[attr-defined]
            try:
                base_step()
            finally:
                del opt.base.found_inf  # type: ignore[attr-defined]
            flags.count(ascended=ascended)
            return True, self._gate(outcome, flags.found_inf)
        finite, found = flags.read()
        self._ascent_finite = finite or not ascended
        if found:
            return self._refuse(), None
        base_step()
        return True, self._gate(outcome)

    def _gate(self, outcome: Outcome, found_inf: Tensor | None = None) -> Tensor | None:
        """1 where staged state comes from a finite gradient and the step was good; None if nobody need ask."""
        if not outcome.staged:
            return None
        good = None if found_inf is None else 1 - found_inf.to(torch.int32)
        if outcome.size is None:
            return good
        gate = (outcome.size < math.inf).to(torch.int32)
        return gate if good is None else gate * good

    def _refuse(self) -> bool:
        if self.optimizer.nonfinite == "raise" and self.scaling is None:
            raise FloatingPointError(
                "the descent gradient has nan or inf entries; the weights and the base's state are unchanged "
                "(nonfinite='raise')."
            )
        return False


def _additions(weights: Sequence[Tensor]) -> int:
    """How often the first gradient there is has been added to, or changed otherwise, since it was made."""
    first = next((g for w in weights if (g := w.grad) is not None), None)
    return 0 if first is None or lent(first) else first._version


def _warn_of_rounding(weights: list[Tensor], copies: list[Tensor], asked: list[Tensor]) -> None:
    """Say once how far rounding has made another perturbation than was asked for."""
    seen = {k: float(v) for k, v in realised(weights, copies, asked).items()}
    made, wanted = seen["epsilon_norm"], seen["epsilon_asked"]
    if wanted > 0 and abs(made / wanted - 1.0) > 0.2:
        warnings.warn(
            f"weights in half precision: the perturbation has norm {made:.3g} where {wanted:.3g} was asked for, cosine "
            f"{seen['epsilon_cosine']:.2f} with it, and {seen['epsilon_unmoved']:.0%} of the entries did not move. Its "
            "part along the asked direction is right on average, the rest is rounding noise. Keep the weights in "
            "float32 and use autocast, or raise rho.",
            stacklevel=2,
        )


class Evaluation:
    """One pass of a manual loop, from `optimizer.passes()`: a context around forward and backward.

    Attributes:
        role: "ascent" or "descent".
        index: 0 for the first pass of the step.
        chunk: which micro-batch it runs on; None: the whole batch.
    """

    def __init__(self, update: Update, *, bracketed: bool = True) -> None:
        self._update, self._bracketed = update, bracketed
        self.role = "descent" if update.request is None else update.request.role
        self.index = update.index
        self.chunk = None if update.request is None else update.request.chunk
        self.entered = False

    def __enter__(self) -> Evaluation:
        self.entered = True
        try:
            with torch.no_grad():
                self._update.enter(bracketed=self._bracketed)
        except BaseException:
            self._update.optimizer.abort()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None:
            self._update.optimizer.abort()
            if self.index and isinstance(value, RuntimeError) and any(text in str(value) for text in _STALE_GRAPH):
                raise RuntimeError(
                    "this pass went backward through a graph of the pass before: the loss is cached. Compute it again "
                    "from the batch in every pass."
                ) from value
            return
        if self._update.aborted:
            return
        try:
            with torch.no_grad():
                self._update.leave()
                if self._update.outcome is not None:
                    self._update.finish()
        except BaseException:
            self._update.optimizer.abort()
            raise
