"""Which training loops support which recipe. Error messages and a table in the docs are generated from it."""

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
    """Training loops that do not support every recipe. The value is the heading of a column in the docs."""

    TWO_PASSES = "perturbed(), first_step()"
    PLAIN = "train(), eval()"
    FUNCTIONAL = "value_and_grad"
    SCALER = "GradScaler"
    DDP = "DDP"
    LOCAL = "DDP, ascent_sync"
    SHARDED = "fully_shard"


PURE = {
    Need.PER_SAMPLE: "it has a scalar loss only",
    Need.MICRO_BATCHES: "it has one batch only",
    Need.SECOND_ORDER: "it keeps no graph",
    Need.BASE_MOMENTUM: "it has no base optimizer",
    Need.LAYERS: "it has no module",
    Need.LR: "it has no base optimizer",
    Need.SGD: "it has no base optimizer",
    Need.BARE_SGD: "it has no base optimizer",
}
_SILENT = "needs second derivatives, which bypass the communication of DistributedDataParallel and fully_shard"


def capture_refusal(recipe: Recipe) -> str | None:
    """Why updates of a recipe cannot be replayed by a CUDA graph (follows the recipe's name); None if they can."""
    repeated = ", and a graph repeats the update that it captured"
    if any(part.step_dependent for part in recipe.parts.values()):
        return f"depends on the number of the update{repeated}"
    if any("scalar" in part.slots.values() for part in recipe.parts.values()):
        return "stores a number that each update replaces, and a graph reads the one that it captured"
    if recipe.inner_loop.two_batches:
        return f"ascends on the previous batch{repeated}"
    for need in (Need.RANDOM, Need.DECIDES_BY_VALUE, Need.LR):
        if need in recipe.demands:
            return f"needs {need.value}{repeated}"
    return None


def refusal(recipe: Recipe, loop: Loop) -> str | None:
    """Why a loop does not support a recipe, as the rest of a sentence after its name; None if it does."""
    needs = recipe.needs
    if loop is Loop.TWO_PASSES and not recipe.two_pass:
        return "does not take one pass at w and one at w + eps"
    if loop is Loop.PLAIN and not recipe.one_pass:
        return "needs a gradient at w to compute w + eps" if recipe.moves else "does not perturb the weights"
    if loop is Loop.FUNCTIONAL:
        if recipe.objective.keeps:
            return "needs the outputs of the model, which a pure function does not return"
        for need in sorted(recipe.demands & PURE.keys(), key=lambda n: n.name):
            return f"needs {need.value}, which a pure function does not provide: {PURE[need]}"
    if Need.SECOND_ORDER in needs:
        if loop is Loop.SCALER:
            return "needs second derivatives, which would overflow with the scale of a GradScaler"
        if loop in (Loop.DDP, Loop.LOCAL, Loop.SHARDED):
            return _SILENT
    if loop is Loop.LOCAL and (recipe.combine.uses_gradient or recipe.inner_loop.uses_gradient):
        return "uses the gradient of pass 1 in the update, so it must be the same on every replica"
    if loop is Loop.LOCAL and Need.DECIDES_BY_VALUE in needs:
        return "decides by the gradient of pass 1, so it must be the same on every replica"
    if loop is Loop.SHARDED and Need.GLOBAL_ORDER in needs:
        return f"needs {Need.GLOBAL_ORDER.value}"
    return None


def in_group() -> bool:
    """Whether this process is in a process group, alone or not."""
    return distributed.is_available() and distributed.is_initialized()


def processes() -> int:
    """The number of processes that train together."""
    return distributed.get_world_size() if in_group() else 1


def check_criterion(recipe: Recipe, criterion: Criterion | None) -> None:
    """Raise an error for a recipe that needs the criterion, or per-sample losses, if there are none.

    Raises:
        ValueError, TypeError: what is missing, and how to pass it.
    """
    name, needs = recipe.name, recipe.needs
    if Need.CRITERION in needs and criterion is None:
        raise ValueError(f"{name} needs {Need.CRITERION.value}, because it changes the loss in one of its passes.")
    if Need.PER_SAMPLE in needs:
        if criterion is None:
            raise ValueError(f"{name} needs {Need.PER_SAMPLE.value}.")
        criterion.check_per_sample()


def check_divided(recipe: Recipe) -> None:
    """For loops that split batches themselves: raise an error if the closures are not equal parts of a batch.

    Raises:
        ValueError: what the closures stand for, and what to do.
    """
    if what := recipe.inner_loop.closures_for:
        raise ValueError(
            f"{recipe.name} takes one closure each for {what}, which this loop cannot separate; write your own loop "
            "with optimizer.step([closure, closure])."
        )


def check_recipe(
    recipe: Recipe,
    base: BaseOptimizer,
    weights: TrainedWeights,
    model: nn.Module | None,
) -> None:
    """Raise an error for a recipe that the base optimizer, the model or the processes do not support.

    Raises:
        ValueError, TypeError: what is missing, and how to pass it.
    """
    name, needs, trained = recipe.name, recipe.needs, base.weights
    for part in recipe.parts.values():
        part.validate()
        if Need.LR in part.demands():
            for group in base.optimizer.param_groups:
                learning_rate(group, part)
    if Need.BASE_MOMENTUM in needs and not base.has_momentum():
        raise ValueError(
            f"{name} needs {Need.BASE_MOMENTUM.value}, but {base.name} has none: set momentum > 0 or betas."
        )
    check_options(recipe, base, weights)
    if Need.LAYERS in needs and (model is None or any(w not in weights.layers for w in trained)):
        raise ValueError(f"{name} needs {Need.LAYERS.value}.")
    if Need.NAMES in needs and any(w not in weights.names for w in trained):
        raise ValueError(f"{name} needs {Need.NAMES.value}.")
    _check_processes(recipe, trained)


def check_options(recipe: Recipe, base: BaseOptimizer, weights: TrainedWeights) -> None:
    """Raise ValueError for options of the base optimizer's groups that the recipe does not support."""
    for need in recipe.needs & {Need.SGD, Need.BARE_SGD}:
        if other := base.other_than_sgd(bare=need is Need.BARE_SGD):
            raise ValueError(f"{recipe.name} needs {need.value}, got {other}.")
    if recipe.moves and any(group.get("maximize") for group in base.optimizer.param_groups) and weights.act():
        raise wrong_way(recipe)


def _check_processes(recipe: Recipe, weights: Sequence[Tensor]) -> None:
    """Raise ValueError for needs that several processes cannot meet."""
    meshes = {t.device_mesh if is_sharded(t) else None for t in weights}  # type: ignore[attr-defined]
    if len(meshes) > 1:
        raise ValueError(
            "some weights are sharded and some are not, or they are on different meshes; shard the whole model over "
            "one mesh, or use a separate optimizer for each part."
        )
    sharded = any(map(is_sharded, weights))
    if (processes() > 1 or sharded) and (why := refusal(recipe, Loop.DDP)):
        raise ValueError(f"{recipe.name} {why}: run it in one process.")
    if sharded and (why := refusal(recipe, Loop.SHARDED)):
        raise ValueError(f"{recipe.name} {why}.")
