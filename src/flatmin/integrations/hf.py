"""Hugging Face Trainer: a mixin that runs all passes of a step before the Trainer clips and steps."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flatmin.methods import Need, Recipe
from flatmin.optim import SAM, wrap
from flatmin.optim.support import check_divided
from flatmin.words import install

try:
    from transformers import Trainer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"flatmin.integrations.hf needs transformers and accelerate; run: {install('hf')}"
    ) from error


class SharpnessAware:
    """Mixin for `transformers.Trainer` and its subclasses. `SAMTrainer` is `Trainer` with this mixin.

        class SAMSeq2SeqTrainer(SharpnessAware, Seq2SeqTrainer): ...

    It wraps the optimizer that the Trainer builds, or the one from `optimizers=` unless that is a flatmin optimizer.
    The micro-batches of a step are stored, and with the last one all passes run over all of them. Then the Trainer
    clips and steps: clipping and `grad_norm` apply to the gradient that the base optimizer takes, `num_items_in_batch`
    is that of the whole step, and the logged loss is that of the first pass.

    To use your own loss, override `compute_loss` or pass `compute_loss_func`. A `training_step` that overrides this one
    runs once for each micro-batch, not once for each pass.

    Args:
        args: arguments of the Trainer.
        recipe: a method by name, or a `Recipe`. Default "sam".
        rho: radius of the perturbation. Default: that of the recipe.
        options: further keywords of `flatmin.wrap`, including parameters of the method's parts. Default: none.
        kwargs: keywords of the Trainer.

    Raises:
        ValueError: DeepSpeed is used, or the recipe needs second derivatives or closures that are not micro-batches.
    """

    accelerator: Any
    args: Any
    model: Any
    optimizer: Any

    def __init__(
        self,
        *args: Any,
        recipe: str | Recipe = "sam",
        rho: float | None = None,
        options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.recipe, self.rho, self.sam_options = recipe, rho, dict(options or {})
        self._held_inputs: list[Any] = []
        parent: Any = super()
        parent.__init__(*args, **kwargs)
        if getattr(self, "is_deepspeed_enabled", False):
            raise ValueError(
                "DeepSpeed is not supported, because it takes the steps itself, without a second gradient; train with "
                "DDP or FSDP."
            )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Create the Trainer's optimizer and wrap it.

        Args:
            args: arguments of the Trainer's method.
            kwargs: keywords of the Trainer's method.

        Raises:
            ValueError: the recipe needs second derivatives, or closures that are not micro-batches.
        """
        parent: Any = super()
        base = parent.create_optimizer(*args, **kwargs)
        self._held_inputs = []  # drop inputs of an interrupted training
        if _sam_in(base) is None:
            self.optimizer = wrap(base, self.recipe, rho=self.rho, **{"model": self.model, **self.sam_options})
        sam = _sam_in(self.optimizer)
        if sam is not None and Need.SECOND_ORDER in sam.recipe.needs:
            raise ValueError(
                f"{sam.recipe.name} needs second derivatives, but the Trainer's accelerator.backward(loss) does not "
                "keep the graph; choose another method."
            )
        if sam is not None:
            check_divided(sam.recipe)
        return self.optimizer

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Store a micro-batch; with the last one of a step, run all passes over all of them.

        Args:
            model: the model, from the Trainer.
            inputs: the micro-batch, from the Trainer.
            args: further arguments from the Trainer.
            kwargs: further keywords from the Trainer.

        Returns:
            The loss of the first pass over all micro-batches; 0 for a micro-batch that is only stored.

        Raises:
            RuntimeError: the optimizer is not the one that `create_optimizer` has built.
        """
        self._held_inputs.append(inputs)
        loss = torch.zeros((), device=self.args.device)
        if not self.accelerator.sync_gradients:
            return loss
        held, self._held_inputs = self._held_inputs, []
        sam = _sam_in(self.optimizer)
        if sam is None:
            raise RuntimeError(
                f"the optimizer is a {type(self.optimizer).__name__}, not the flatmin optimizer of create_optimizer()."
            )
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and sam.scaler is not scaler:
            sam.scaler = scaler
        # Base optimizers with modes (schedule-free ones) move the weights when they switch: do it before the passes.
        getattr(sam.base, "train", lambda: None)()
        parent: Any = super()
        visited: set[int | None] = set()
        for evaluation in sam.passes(len(held) if Need.MICRO_BATCHES in sam.recipe.needs else 1):
            chunk = evaluation.chunk
            chosen = held if chunk is None else [held[chunk]]
            with evaluation, self._without_passes(sam):
                for i, part in enumerate(chosen):
                    last = i == len(chosen) - 1
                    with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                        seen = parent.training_step(model, part, *args, **kwargs)
                    if evaluation.index == 0 or chunk not in visited:
                        loss = loss + seen
                if chunk is not None:
                    # The Trainer's loss is the chunk's share of the step, but the method averages over chunks.
                    _multiply(sam, len(held))
            visited.add(chunk)
        return loss

    @contextlib.contextmanager
    def _without_passes(self, sam: SAM) -> Any:
        """A context in which the Trainer uses the base optimizer, because it calls `train()` in each training step."""
        optimizer, self.optimizer = self.optimizer, sam.base
        try:
            yield
        finally:
            self.optimizer = optimizer


class SAMTrainer(SharpnessAware, Trainer):  # type: ignore[misc]
    """`transformers.Trainer` with any flatmin method.

        trainer = SAMTrainer(model=model, args=args, train_dataset=data, recipe="sam", rho=0.05)
        trainer.train()

    Further arguments: see `SharpnessAware`.
    """


def _sam_in(optimizer: Any) -> SAM | None:
    """The flatmin optimizer inside accelerate's wrapper; None if there is none."""
    while optimizer is not None and not isinstance(optimizer, SAM):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def _multiply(sam: SAM, factor: int) -> None:
    for group in sam.param_groups:
        for w in group["params"]:
            if w.grad is not None:
                w.grad.mul_(factor)
