"""Which loops can serve which recipe: the one place that knows, for the refusals and for the table in the docs."""

from __future__ import annotations

import enum

from flatmin.methods import Need, Recipe


class Loop(enum.Enum):
    """Loops that do not serve every recipe; the value heads a column of the table."""

    TWO_PASSES = "perturbed(), first_step()"
    PLAIN = "train(), eval()"
    FUNCTIONAL = "value_and_grad"
    SCALER = "GradScaler"
    DDP = "DDP"
    LOCAL = "DDP, ascent_sync"
    SHARDED = "fully_shard"


PURE = {
    Need.PER_SAMPLE: "it sees a scalar loss only",
    Need.MICRO_BATCHES: "it sees one batch only",
    Need.SECOND_ORDER: "it keeps no graph",
    Need.BASE_MOMENTUM: "it knows no base optimizer",
    Need.LAYERS: "it knows no module",
    Need.LR: "it knows no base optimizer",
}
_SILENT = "needs second derivatives, which bypass the communication of DistributedDataParallel and fully_shard"


def capture_refusal(recipe: Recipe) -> str | None:
    """Why a CUDA graph of one update cannot stand for all, as what follows the recipe's name; None if it can."""
    repeated = ", and a graph repeats the update that it captured"
    if any(part.step_dependent for part in recipe.parts.values()):
        return f"depends on the number of the update{repeated}"
    if any("scalar" in part.slots.values() for part in recipe.parts.values()):
        return "remembers a number that each update replaces, and a graph reads the one that it captured"
    if recipe.inner_loop.two_batches:
        return f"climbs on the batch before{repeated}"
    for need in (Need.RANDOM, Need.DECIDES_BY_VALUE, Need.LR):
        if need in recipe.demands:
            return f"needs {need.value}{repeated}"
    return None


def refusal(recipe: Recipe, loop: Loop) -> str | None:
    """Why a loop cannot serve a recipe, as what follows its name in a sentence; None if it can."""
    needs = recipe.needs
    if loop is Loop.TWO_PASSES and not recipe.two_pass:
        return "does not take one pass at w and one at w + eps"
    if loop is Loop.PLAIN and not recipe.one_pass:
        return "does not know w + eps before a gradient" if recipe.moves else "stays at w in any loop"
    if loop is Loop.FUNCTIONAL:
        for need in sorted(recipe.demands & PURE.keys(), key=lambda n: n.name):
            return f"needs {need.value}, which a pure function cannot serve: {PURE[need]}"
    if Need.SECOND_ORDER in needs:
        if loop is Loop.SCALER:
            return "needs second derivatives, which a GradScaler's scale would not leave finite"
        if loop in (Loop.DDP, Loop.LOCAL, Loop.SHARDED):
            return _SILENT
    if loop is Loop.LOCAL and recipe.combine.uses_gradient:
        return "hands the gradient of pass 1 to the base, so it must be the same on every replica"
    if loop is Loop.LOCAL and Need.DECIDES_BY_VALUE in needs:
        return "decides by the gradient of pass 1, so it must be the same on every replica"
    if loop is Loop.SHARDED and Need.GLOBAL_ORDER in needs:
        return f"needs {Need.GLOBAL_ORDER.value}"
    return None
