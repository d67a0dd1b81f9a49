"""Lightning: a mixin that runs all passes over all batches of a step, with every precision."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from flatmin.methods import Need
from flatmin.optim import SAM
from flatmin.optim.model_guard import FrozenStatistics
from flatmin.optim.random_state import RandomState
from flatmin.optim.support import check_divided
from flatmin.words import install

try:
    from lightning.pytorch.plugins.precision import Precision
    from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"flatmin.integrations.lightning needs lightning; run: {install('lightning')}") from error


class SharpnessAware:
    """Mixin for a `LightningModule` whose `configure_optimizers` returns a flatmin optimizer.

        class Net(SharpnessAware, L.LightningModule):
            def configure_optimizers(self):
                return flatmin.wrap(torch.optim.SGD(self.parameters(), lr=0.1), "sam", rho=0.05, model=self)

    Lightning runs the first pass like any training step. The mixin runs the other passes over all accumulated batches,
    and then Lightning clips and steps. So `accumulate_grad_batches`, `gradient_clip_val` and `precision` work as with
    any optimizer; the gradient that the base optimizer takes is clipped. `self.log` and the outputs that callbacks get
    are those of the first pass. With any other optimizer the mixin has no effect.

    If your module overrides `on_train_batch_start`, `optimizer_step`, `backward` or `log`, call `super()` in it.

    With `automatic_optimization = False`, write the passes in `training_step`. The mixin then only passes the scaler of
    the precision plugin to the optimizers, and makes `self.manual_backward(loss)` work with methods that need second
    derivatives.

    Raises:
        TypeError: a subclass names the mixin to the right of `LightningModule`, where it would have no effect.
    """

    trainer: Any
    automatic_optimization: bool
    _window: _Window | None = None
    _repeats: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = [parent.__name__ for parent in cls.__mro__]
        if "LightningModule" in order[: order.index("SharpnessAware")]:
            raise TypeError(
                f"{cls.__name__}: SharpnessAware is to the right of LightningModule, so that its methods are never "
                f"called; write class {cls.__name__}(SharpnessAware, LightningModule)."
            )

    @property
    def first_pass(self) -> bool:
        """Whether this is the first pass of a step. Update metrics only then: later passes repeat the batches."""
        return not self._repeats

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Call `LightningModule.log` in the first pass only."""
        parent: Any = super()
        if self.first_pass:
            parent.log(*args, **kwargs)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Call the optimizer's `backward(loss)`, which also works for methods that need second derivatives."""
        parent: Any = super()
        sam = self._sam()
        if sam is None or args or kwargs:
            parent.backward(loss, *args, **kwargs)
        else:
            sam.backward(loss)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Store the batch until its step is done."""
        parent: Any = super()
        answer: int | None = parent.on_train_batch_start(batch, batch_idx)
        self._share_scaler()
        sam = self._sam()
        if sam is not None and self.automatic_optimization:
            if self._window is None or self._window.last != batch_idx - 1:
                self._window = _Window(sam, self.trainer.accumulate_grad_batches > 1)
            self._window.hold(batch, batch_idx)
        return answer

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Run one update: Lightning's pass, the other passes, clipping, and the base optimizer's step.

        Args:
            epoch: from Lightning.
            batch_idx: from Lightning.
            optimizer: from Lightning.
            optimizer_closure: from Lightning.

        Raises:
            RuntimeError: a strategy that takes the steps itself, or an `on_train_batch_start` without `super()`.
        """
        parent: Any = super()
        sam = self._sam()
        if sam is None or optimizer_closure is None:
            parent.optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            return
        strategy, plugin = self.trainer.strategy, self.trainer.precision_plugin
        if strategy.handles_gradient_accumulation:
            raise RuntimeError(
                f"{type(strategy).__name__} is not supported, because it takes the steps itself, without a second "
                "gradient; choose another strategy."
            )
        window, self._window = self._window, None
        if window is None or window.last != batch_idx:
            raise RuntimeError(
                f"{type(self).__name__}.on_train_batch_start(batch, batch_idx) must call super(), which stores the "
                "batches of a step."
            )
        scaler = getattr(plugin, "scaler", None)
        stepper = _Stepper(sam, scaler)

        def passes() -> Any:
            loss = self._run(sam, window, optimizer_closure)
            stepper.ready = any(w.grad is not None for w in window.weights)
            if scaler is not None and stepper.ready:
                scaler.unscale_(sam)
            return loss

        if scaler is None:
            strategy.optimizer_step(stepper, passes)
        else:
            # The plugin's own method supports only one pass.
            Precision.optimizer_step(plugin, stepper, model=self, closure=passes)

    def _sam(self) -> SAM | None:
        optimizers = self.trainer.optimizers
        return optimizers[0] if len(optimizers) == 1 and isinstance(optimizers[0], SAM) else None

    def _share_scaler(self) -> None:
        """Pass the scaler of the precision plugin to every flatmin optimizer."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        for sam in self.trainer.optimizers if scaler is not None else ():
            if isinstance(sam, SAM) and sam.scaler is not scaler:
                sam.scaler = scaler

    def _run(self, sam: SAM, window: _Window, closure: Callable[[], Any]) -> Any:
        """Run all passes of an update, the first by Lightning's closure; leaves u in the gradients of the weights."""
        check_divided(sam.recipe)
        if len(window.batches) == 1:
            for evaluation in sam.passes():
                with evaluation:
                    if evaluation.index:
                        self._repeat(window)
                    elif (loss := closure()) is None:
                        sam.abort()  # training_step returned None
            return loss
        loss = closure()
        at_hand = [w.grad for w in window.weights]
        if all(g is None for g in at_hand):
            return loss
        if not window.usable:
            # Lightning's pass is not one of this method's passes, but it has updated the running statistics already.
            chunks = len(window.batches) if Need.MICRO_BATCHES in sam.recipe.needs else 1
            with FrozenStatistics(self):  # type: ignore[arg-type]
                for evaluation in sam.passes(chunks):
                    with evaluation:
                        self._repeat(window, evaluation.chunk)
        elif window.ascends:
            with sam.perturbed():
                # The schedule may have decided against the ascent after looking at the gradient.
                if sam.current_pass().perturbed:
                    self._repeat(window)
        else:
            for evaluation in sam.passes():
                with evaluation:
                    for w, g in zip(window.weights, at_hand, strict=True):
                        w.grad = g
        return loss

    def _repeat(self, window: _Window, chunk: int | None = None) -> None:
        """Run forward and backward again on all batches (with a chunk: on one of them), at the current weights."""
        trainer, strategy = self.trainer, self.trainer.strategy
        count = len(window.batches)
        chosen = range(count) if chunk is None else [chunk]
        # The loss of a chunk is the mean of its own samples; without chunks, each batch has its share of the mean.
        share = (1 if chunk is None else count) / trainer.accumulate_grad_batches
        with_index = is_param_in_hook_signature(getattr(self, "training_step"), "batch_idx", min_args=2)  # noqa: B009
        self._repeats = True
        try:
            for i in chosen:
                batch, batch_idx = window.batches[i]
                window.replay(i)
                silent = getattr(strategy, "block_backward_sync", None) if i != chosen[-1] else None
                with contextlib.nullcontext() if silent is None else silent():
                    output = strategy.training_step(*((batch, batch_idx) if with_index else (batch,)))
                    loss = output.get("loss") if isinstance(output, Mapping) else output
                    if loss is not None:
                        strategy.backward(loss * share, None)
        finally:
            self._repeats = False


@dataclass
class _Window:
    """The batches of one step, and the random states before their first runs."""

    sam: SAM
    several: bool
    batches: list[tuple[Any, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        sam = self.sam
        self.weights: Sequence[Tensor] = [w for group in sam.param_groups for w in group["params"]]
        # With a single batch the optimizer itself restores random states.
        self.random = RandomState({w.device for w in self.weights}) if self.several and sam._replay_rng else None
        # Whether the gradients that Lightning accumulates can be used as those of the method's first pass.
        self.usable = sam.recipe.two_pass and sam.ascent_sync == "all"
        sam.abort()
        if self.several and self.usable:
            self.ascends = next(sam.passes()).role == "ascent"
            sam.abort()
            # Before an update, a criterion returns the ascent loss, which is wrong if this step does not ascend.
            self.usable = self.ascends or Need.CRITERION not in sam.recipe.needs

    @property
    def last(self) -> int:
        """The index of the last batch."""
        return self.batches[-1][1]

    def hold(self, batch: Any, batch_idx: int) -> None:
        if self.random is not None:
            self.random.capture(len(self.batches))
        self.batches.append((batch, batch_idx))

    def replay(self, i: int) -> None:
        if self.random is not None:
            self.random.replay(i)


class _Stepper:
    """Replaces the optimizer in Lightning's precision plugins: its step runs the closure and then ends the update.

    Attributes:
        ready: whether the closure has left gradients for a step.
    """

    _step_supports_amp_scaling = False  # hooks and clipping get unscaled gradients

    def __init__(self, sam: SAM, scaler: Any) -> None:
        self.sam, self.scaler = sam, scaler
        self.ready = False

    def step(self, closure: Callable[[], Any]) -> Any:
        result = closure()
        if self.ready and self.scaler is not None:
            self.scaler.step(self.sam)
            self.scaler.update()
        elif self.ready:
            self.sam.step()
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sam, name)
