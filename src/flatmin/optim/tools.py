"""The collaborators of a step; an optimizer has one set of them."""

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
from flatmin.optim.flat import FlatWeights
from flatmin.optim.model_guard import ModelGuard
from flatmin.optim.other_gradients import OtherGradients
from flatmin.optim.perturb import FoundInf, WeightSnapshot
from flatmin.optim.random_state import RandomState
from flatmin.optim.state import MethodState
from flatmin.optim.weights import TrainedWeights


@dataclass(slots=True)
class Counts:
    """What has happened since construction, as far as it is known on the host."""

    updates: int = 0
    nonfinite_ascents: int = 0
    skipped_steps: int = 0


@dataclass(slots=True)
class Tools:
    """Everything that updates work with. Some entries may be replaced between updates.

    Attributes:
        recipe: the recipe.
        base: the base optimizer.
        weights: the trained weights.
        state: the state of the method.
        snapshot: copies of the weights while they are perturbed.
        others: gradients of parameters that another optimizer trains.
        random: the generators whose draws are repeated in later passes; None: draws are not repeated.
        guard: protects the model's untrained state in later passes; None: no model is known.
        replicas: the other processes.
        criterion: the criterion; None: there is none.
        flat: the buffers that hold the weights; None: they are not joined.
        diagnostics: records the numbers of updates; None: they are not recorded.
        scaling: the GradScaler; None: there is none.
        flags: the flags on an accelerator, once they are needed.
        on_device: whether to store flags on the device even if it is the CPU.
        counts: counts of updates so far.
        warned_of_passes: whether the warning that the passes of a manual loop differ has been given.
    """

    recipe: Recipe
    base: BaseOptimizer
    weights: TrainedWeights
    state: MethodState
    snapshot: WeightSnapshot
    diagnostics: Diagnostics | None
    flat: FlatWeights | None
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
        """The flags on the device of these tensors; None on the CPU, where reading does not synchronise."""
        device = tensors[0].device if tensors else torch.device("cpu")
        if device.type == "cpu" and not self.on_device:
            return None
        if self.flags is None or self.flags.words.device != device:
            self.flags = FoundInf(device)
        return self.flags

    def totals(self) -> dict[str, int]:
        """`counts` together with the counts on the device; synchronises."""
        totals = dataclasses.asdict(self.counts)
        if self.flags is not None:
            finite, found = self.flags.totals.tolist()
            totals["nonfinite_ascents"] += self.flags.ascents - finite
            totals["skipped_steps"] += found // FoundInf.ONE
        return totals
