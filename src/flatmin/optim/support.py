"""Which loops serve which recipe: errors and the table in the docs are made from it."""

from __future__ import annotations

import enum
from collections.abc import Sequence

from torch import Tensor, distributed, nn

from flatmin.methods import Need, Recipe, learning_rate
from flatmin.optim.base_optimizer import BaseOptimizer
from flatmin.optim.criterion import Criterion
from flatmin.optim.tensors import is_sharded
from flatmin.optim.weights import TrainedWeights, wrong_way


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
    Need.SGD: "it knows no base optimizer",
    Need.BARE_SGD: "it knows no base optimizer",
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
        if recipe.objective.keeps:
            return "descends a loss of the outputs, which a pure function does not show"
        for need in sorted(recipe.demands & PURE.keys(), key=lambda n: n.name):
            return f"needs {need.value}, which a pure function cannot serve: {PURE[need]}"
    if Need.SECOND_ORDER in needs:
        if loop is Loop.SCALER:
            return "needs second derivatives, which a GradScaler's scale would not leave finite"
        if loop in (Loop.DDP, Loop.LOCAL, Loop.SHARDED):
            return _SILENT
    if loop is Loop.LOCAL and (recipe.combine.uses_gradient or recipe.inner_loop.uses_gradient):
        return "hands the gradient of pass 1 to the base, so it must be the same on every replica"
    if loop is Loop.LOCAL and Need.DECIDES_BY_VALUE in needs:
        return "decides by the gradient of pass 1, so it must be the same on every replica"
    if loop is Loop.SHARDED and Need.GLOBAL_ORDER in needs:
        return f"needs {Need.GLOBAL_ORDER.value}"
    return None


def processes() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def check_criterion(recipe: Recipe, criterion: Criterion | None) -> None:
    """Refuse a recipe that needs the loss object, or per-sample losses, and is given none.

    Raises:
        ValueError, TypeError: with what is missing and how to give it.
    """
    name, needs = recipe.name, recipe.needs
    if Need.CRITERION in needs and criterion is None:
        raise ValueError(f"{name} needs {Need.CRITERION.value}, because it does more with it than descend.")
    if Need.PER_SAMPLE in needs:
        if criterion is None:
            raise ValueError(f"{name} needs {Need.PER_SAMPLE.value}.")
        criterion.check_per_sample()


def check_divided(recipe: Recipe) -> None:
    """Refuse, for a loop that divides batches by itself, a recipe whose closures are not equal parts of a batch.

    Raises:
        ValueError: what the closures are, and what to do.
    """
    if what := recipe.inner_loop.closures_for:
        raise ValueError(
            f"{recipe.name} takes one closure each for {what}, which this loop cannot tell apart; write a loop of your "
            "own with optimizer.step([closure, closure])."
        )


def check_recipe(
    recipe: Recipe,
    base: BaseOptimizer,
    weights: TrainedWeights,
    model: nn.Module | None,
) -> None:
    """Refuse a recipe that the base, the model, or the processes that train cannot serve.

    Raises:
        ValueError, TypeError: with what is missing and how to give it.
    """
    name, needs, trained = recipe.name, recipe.needs, base.weights
    for part in recipe.parts.values():
        part.validate()
        if Need.LR in part.demands():
            for group in base.optimizer.param_groups:
                learning_rate(group, part)
    if Need.BASE_MOMENTUM in needs and not base.has_momentum():
        raise ValueError(
            f"{name} needs {Need.BASE_MOMENTUM.value}, and {base.name} is set up without: give it momentum > 0 or "
            "betas."
        )
    check_options(recipe, base, weights)
    if Need.LAYERS in needs and (model is None or any(w not in weights.layers for w in trained)):
        raise ValueError(f"{name} needs {Need.LAYERS.value}.")
    if Need.NAMES in needs and any(w not in weights.names for w in trained):
        raise ValueError(f"{name} needs {Need.NAMES.value}.")
    _check_processes(recipe, trained)


def check_options(recipe: Recipe, base: BaseOptimizer, weights: TrainedWeights) -> None:
    """Raise ValueError for options of the base's groups, which may change, that the recipe cannot serve."""
    for need in recipe.needs & {Need.SGD, Need.BARE_SGD}:
        if other := base.other_than_sgd(bare=need is Need.BARE_SGD):
            raise ValueError(f"{recipe.name} needs {need.value}, got {other}.")
    if recipe.moves and any(group.get("maximize") for group in base.optimizer.param_groups) and weights.act():
        raise wrong_way(recipe)


def _check_processes(recipe: Recipe, weights: Sequence[Tensor]) -> None:
    """Raise ValueError for needs that several processes cannot serve."""
    meshes = {t.device_mesh if is_sharded(t) else None for t in weights}  # type: ignore[attr-defined]
    if len(meshes) > 1:
        raise ValueError(
            "some weights are sharded and some are not, or they lie on different meshes; shard the whole model over "
            "one mesh, or give each part an optimizer of its own."
        )
    sharded = any(map(is_sharded, weights))
    if (processes() > 1 or sharded) and (why := refusal(recipe, Loop.DDP)):
        raise ValueError(f"{recipe.name} {why}: run it in one process.")
    if sharded and (why := refusal(recipe, Loop.SHARDED)):
        raise ValueError(f"{recipe.name} {why}.")
