"""The front doors: a closure, contexts for manual loops, and the two-call form, on one state machine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from flatmin.engine.program import Site
from flatmin.engine.update import Evaluation, Update
from flatmin.recipes import Recipe

if TYPE_CHECKING:
    from flatmin.engine.optimizer import SAM


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

    if TYPE_CHECKING:

        def _site(self) -> Site: ...

        def _between_updates(self) -> None: ...

        def _rewind(self) -> None: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update.

        With a closure (torch's convention: it zeroes the gradients, computes the loss, calls backward, returns the
        loss) all passes run here. Without one it ends an update whose passes a manual loop has run.

        Returns:
            The loss of the first pass, detached: at w unless the recipe skips or moves pass 1 (see `loss_point`).

        Raises:
            RuntimeError: no gradients, a loss without forward pass, or no passes run and no closure.
            FloatingPointError: see `nonfinite`.
        """
        if closure is not None:
            if not callable(closure):
                raise TypeError(f"closure must be callable, got {type(closure).__name__}.")
            return self._step_closure(closure)
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

    # torch would fire the step hooks here as well as in the base.
    step.hooked = True  # type: ignore[attr-defined]

    def _apply(self, update: Update, *, at_once: bool = False) -> None:
        try:
            update.apply(at_once=at_once)
        except BaseException:
            self._rewind()
            raise
        finally:
            self._update = None
            self._between_updates()

    def _step_closure(self, closure: Callable[[], Any]) -> Any:
        update = self._begin()
        first: Any = None
        while update.request is not None:
            moved = update.request.at is not None
            with Evaluation(update) as evaluation, torch.enable_grad():
                loss = closure()
                if evaluation.index == 0:
                    first = loss.detach() if isinstance(loss, Tensor) else loss
                    self.loss_point = "w + eps" if moved else "w"
                # The graph of this pass must not live through the next one.
                del loss
        self._apply(update, at_once=True)
        return first

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

    def passes(self) -> Iterator[Evaluation]:
        """The passes of one update, for manual loops with any recipe.

            for evaluation in optimizer.passes():
                with evaluation:
                    loss_fn(model(x), y).backward()
            optimizer.step()

        Yields:
            Contexts with `role` and `index`; each must be entered. Gradients are cleared on entering.

        Raises:
            RuntimeError: an update under way, or a context that was not entered.
        """
        update = self._begin()
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

        Args:
            zero_grad: clear the gradients afterwards. Default False.

        Raises:
            RuntimeError: without a first_step before it, or no gradients.
        """
        update = self._update
        if update is None or not update.inside:
            raise RuntimeError("second_step() needs first_step() and a backward pass before it.")
        try:
            update.leave()
            update.finish()
        except BaseException:
            self.abort()
            raise
        self.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def abort(self) -> None:
        """End an update without a step: weights, statistics and state are as the step found them."""
        update, self._update = self._update, None
        if update is not None:
            update.abort()
            self._rewind()
        self._between_updates()

    def _begin(self) -> Update:
        self._refuse_second_update("a new update")
        self._update = Update(cast("SAM", self), self._site())
        return self._update

    def _refuse_second_update(self, what: str) -> None:
        if self._update is not None:
            raise RuntimeError(
                f"{what}: an update is under way; finish it with step(), or call abort() to restore the weights."
            )

    def _begin_manual(self, door: str) -> Update:
        if not self.recipe.two_pass:
            raise RuntimeError(
                f"{door} serves recipes of one pass at w and one at w + eps; {self.recipe.name} needs passes() or "
                "step(closure)."
            )
        self._refuse_second_update(door)
        update = self._update = Update(cast("SAM", self), self._site())
        try:
            with torch.no_grad():
                update.take_first()
        except BaseException:
            self.abort()
            raise
        return update

    def _plain_step(self) -> None:
        groups = self.param_groups
        idle = not self.recipe.ascends or all(g["rho"] == 0 for g in groups)
        if idle or all(float(g.get("lr", 1.0)) == 0.0 for g in groups):
            self.base.step()
            return
        raise RuntimeError(
            f"step() needs a closure, or both passes before it: {self.recipe.name} takes a second gradient at w + eps. "
            "Pass a closure that zeroes, computes the loss and calls backward, or run the second pass in "
            "`with optimizer.perturbed():`."
        )
