"""Hugging Face Trainer: a mixin that takes every gradient of a step before the Trainer clips and steps."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flatmin.methods import Need, Recipe
from flatmin.optim import SAM, wrap
from flatmin.optim.support import check_divided

try:
    from transformers import Trainer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "flatmin.integrations.hf needs transformers and accelerate; run: pip install '.[hf]' in a clone of flatmin"
    ) from error


class SharpnessAware:
    """Mixin for `transformers.Trainer` and its subclasses; `SAMTrainer` is the two together.

        class SAMSeq2SeqTrainer(SharpnessAware, Seq2SeqTrainer): ...

    It wraps the optimizer that the Trainer builds, or that `optimizers=` brings unless that is one of flatmin's. The
    micro-batches of a step are held, and the last of them runs every pass over all of them. What follows is the
    Trainer's own: clipping and `grad_norm` are of what the base takes, `num_items_in_batch` is that of the step, and
    the logged loss that of the first pass.

    A loss of one's own goes into `compute_loss` or `compute_loss_func`. A `training_step` that overrides this one runs
    once for each micro-batch, not once for each pass.

    Args:
        args: of the Trainer.
        recipe: a method by name, or a `Recipe`. Default "sam".
        rho: ascent radius. Default: that of the recipe.
        options: further keywords of `flatmin.wrap`, parameters of the parts among them. Default none.
        kwargs: of the Trainer.

    Raises:
        ValueError: DeepSpeed, or a recipe that needs second derivatives or closures that are not micro-batches.
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
                "DeepSpeed takes the steps itself and leaves no room for a second gradient; train with DDP or FSDP."
            )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's optimizer, wrapped.

        Args:
            args: of the Trainer's method.
            kwargs: of the Trainer's method.

        Raises:
            ValueError: a recipe that needs second derivatives, or closures that are not micro-batches.
        """
        parent: Any = super()
        base = parent.create_optimizer(*args, **kwargs)
        self._held_inputs = []  # of a training that was broken off
        if _sam_in(base) is None:
            self.optimizer = wrap(base, self.recipe, rho=self.rho, **{"model": self.model, **self.sam_options})
        sam = _sam_in(self.optimizer)
        if sam is not None and Need.SECOND_ORDER in sam.recipe.needs:
            raise ValueError(
                f"{sam.recipe.name} needs second derivatives, for which the Trainer's accelerator.backward(loss) keeps "
                "no graph; choose another method."
            )
        if sam is not None:
            check_divided(sam.recipe)
        return self.optimizer

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Hold a micro-batch; with the last one of a step, run all passes over all of them.

        Args:
            model: as the Trainer gives it.
            inputs: as the Trainer gives it.
            args: as the Trainer gives them.
            kwargs: as the Trainer gives them.

        Returns:
            The loss of the first pass over all of them; 0 for a micro-batch that is only held.
        """
        self._held_inputs.append(inputs)
        loss = torch.zeros((), device=self.args.device)
        if not self.accelerator.sync_gradients:
            return loss
        held, self._held_inputs = self._held_inputs, []
        sam = _sam_in(self.optimizer)
        if sam is None:
            raise RuntimeError(f"the optimizer is {type(self.optimizer).__name__}, not the one of create_optimizer().")
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and sam.scaler is not scaler:
            sam.scaler = scaler
        # A base that has modes (schedule-free ones) moves the weights when it is switched: before the passes.
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
                    # The loss is the chunk's share of the step; its method averages over chunks.
                    _multiply(sam, len(held))
            visited.add(chunk)
        return loss

    @contextlib.contextmanager
    def _without_passes(self, sam: SAM) -> Any:
        """Inside, the Trainer sees the base: it calls `train()`, which is for loops that know no passes."""
        optimizer, self.optimizer = self.optimizer, sam.base
        try:
            yield
        finally:
            self.optimizer = optimizer


class SAMTrainer(SharpnessAware, Trainer):  # type: ignore[misc]
    """`transformers.Trainer` with any flatmin method.

        trainer = SAMTrainer(model=model, args=args, train_dataset=data, recipe="sam", rho=0.05)
        trainer.train()

    Its own arguments are those of `SharpnessAware`.
    """


def _sam_in(optimizer: Any) -> SAM | None:
    """The flatmin optimizer, out of what accelerate has wrapped around it."""
    while optimizer is not None and not isinstance(optimizer, SAM):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def _multiply(sam: SAM, factor: int) -> None:
    for group in sam.param_groups:
        for w in group["params"]:
            if w.grad is not None:
                w.grad.mul_(factor)
