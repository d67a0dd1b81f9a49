"""The collaborators of a step: one set for the life of an optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flatmin.methods import Recipe
from flatmin.optim.amp import GradScaling
from flatmin.optim.base_optimizer import BaseOptimizer
from flatmin.optim.criterion import Criterion
from flatmin.optim.diagnostics import Diagnostics
from flatmin.optim.distributed import Replicas
from flatmin.optim.model_guard import ModelGuard
from flatmin.optim.other_gradients import OtherGradients
from flatmin.optim.perturb import FoundInf, WeightSnapshot
from flatmin.optim.random_state import RandomState
from flatmin.optim.state import MethodState
from flatmin.optim.weights import TrainedWeights


@dataclass(slots=True)
class Counts:
    """What has happened since construction, as far as the host knows."""

    updates: int = 0
    nonfinite_ascents: int = 0
    skipped_steps: int = 0


@dataclass(slots=True)
class Tools:
    """All that updates work with; one set for the life of an optimizer, its parts exchanged between updates.

    Attributes:
        recipe: what is run.
        base: the base optimizer.
        weights: the weights that are trained.
        state: what the method remembers.
        snapshot: copies of the weights while they are displaced.
        others: gradients of weights that another optimizer trains.
        random: the generators whose draws are repeated in later passes; None: none are.
        guard: what later passes must not change in the model; None: no model is known.
        replicas: the other processes.
        criterion: the loop's, if it has given one.
        diagnostics: where the numbers of updates are recorded; None: they are not.
        scaling: the loop's GradScaler; None: there is none.
        flags: verdicts kept on an accelerator, once there are any.
        on_device: whether verdicts are kept on the device even if that is the CPU.
        counts: what has happened so far.
        warned_of_passes: whether a manual loop has been told that its passes differ.
    """

    recipe: Recipe
    base: BaseOptimizer
    weights: TrainedWeights
    state: MethodState
    snapshot: WeightSnapshot
    diagnostics: Diagnostics | None
    replicas: Replicas = field(init=False)
    others: OtherGradients = field(init=False)
    criterion: Criterion | None = None
    random: RandomState | None = None
    guard: ModelGuard | None = None
    scaling: GradScaling | None = None
    flags: FoundInf | None = None
    on_device: bool = False
    counts: Counts = field(default_factory=Counts)
    warned_of_passes: bool = False

    def flags_for(self, tensors: Sequence[Tensor]) -> FoundInf | None:
        """The verdicts kept on these tensors' device; None on the CPU, where reading is free."""
        device = tensors[0].device if tensors else torch.device("cpu")
        if device.type == "cpu" and not self.on_device:
            return None
        if self.flags is None or self.flags.words.device != device:
            self.flags = FoundInf(device)
        return self.flags

    def totals(self) -> dict[str, int]:
        """`counts` with what only the device knows; synchronises."""
        totals = dataclasses.asdict(self.counts)
        if self.flags is not None:
            finite, found = self.flags.totals.tolist()
            totals["nonfinite_ascents"] += self.flags.ascents - finite
            totals["skipped_steps"] += found // FoundInf.ONE
        return totals
