"""The trained weights: the param group, radius, name and layer of each."""

from __future__ import annotations

import math
import weakref
from typing import Any

from torch import Tensor, nn

from flatmin.methods import Recipe
from flatmin.optim.base_optimizer import BaseOptimizer, check_rho
from flatmin.optim.flat import FlatWeights
from flatmin.optim.program import StepInputs
from flatmin.optim.state import STEP, MethodState
from flatmin.optim.tensors import Layout


def wrong_way(recipe: Recipe) -> ValueError:
    """The error for a base optimizer with maximize=True."""
    return ValueError(
        f"{recipe.name} perturbs the weights towards a higher loss, but the base optimizer has maximize=True; minimise "
        "the negated objective instead."
    )


class TrainedWeights:
    """The weights in the base optimizer's param groups.

    Args:
        base: the base optimizer.
        recipe: the recipe.

    Attributes:
        layout: facts about the groups, see `Layout`.
        names: weight -> its name in the user's module.
        layers: weight -> the class name of the module that holds it.
    """

    def __init__(self, base: BaseOptimizer, recipe: Recipe) -> None:
        self._base, self._recipe = base, recipe
        self._model: nn.Module | None = None
        self._left: tuple[weakref.ref[Tensor], int] | None = None
        self.layout = Layout([])
        self.names: dict[Tensor, str] = {}
        self.layers: dict[Tensor, str] = {}

    def attach(self, model: nn.Module | None) -> None:
        """Look up names and layers in this model, and forget all others. None: no model."""
        self._model = model
        self.names.clear()
        self.layers.clear()
        self._look_up()

    def _look_up(self) -> None:
        model = self._model
        self.find_names()
        for module in () if model is None else model.modules():
            self.layers.update(dict.fromkeys(module.parameters(recurse=False), type(module).__name__))

    def find_names(self) -> None:
        """Look up the names in the model and in the param groups; those of the groups take precedence."""
        if self._model is not None:
            self.names.update(plain_names(self._model))
        given = {
            w: _plain_name(n)
            for group in self._base.optimizer.param_groups
            for w, n in zip(group["params"], group.get("param_names", ()), strict=False)
        }
        while given and all(n.startswith(_MODULE) for n in given.values()):
            given = {w: n.removeprefix(_MODULE) for w, n in given.items()}
        self.names.update(given)

    def changed(self) -> bool:
        """Whether the weights in the groups or their shapes have changed since the last call; updates the layout."""
        listed = [group["params"] for group in self._base.optimizer.param_groups]
        if self.layout.fits(listed):
            return False
        had_weights = bool(self.layout.weights)
        self.layout = Layout(listed)
        if had_weights:
            self.leave_gradients()  # gradients of new weights do not count as computed since the last update
        return True

    def regroup(self) -> None:
        """Follow a change of the groups: forget removed weights and look up new ones in the model."""
        weights = self._base.weights
        for table in (self.names, self.layers):
            remaining = {w: table[w] for w in weights if w in table}
            table.clear()
            table.update(remaining)
        self._look_up()

    def dump(self) -> list[tuple[str | None, str | None]]:
        """Name and layer of each weight, for copies and pickles."""
        return [(self.names.get(w), self.layers.get(w)) for w in self._base.weights]

    def restore(self, dumped: list[tuple[str | None, str | None]]) -> None:
        """Load the result of `dump`, for weights whose name or layer is not known."""
        for w, (name, layer) in zip(self._base.weights, dumped, strict=True):
            if name is not None:
                self.names.setdefault(w, name)
            if layer is not None:
                self.layers.setdefault(w, layer)

    def rho(self, group: dict[str, Any]) -> float:
        """The radius of a group; raises ValueError if it is not a finite number >= 0."""
        key = self._base.rho_key
        if key not in group:  # a checkpoint was loaded into the base optimizer directly
            group[key] = self._base.optimizer.defaults[key]
        return check_rho(group[key])

    def act(self) -> bool:
        """Whether an update differs from the base optimizer's step: some rho > 0, or the method acts at rho = 0 too."""
        if not self._recipe.ascends:
            return False
        return self._recipe.combine.always or any(self.rho(g) > 0 for g in self._base.optimizer.param_groups)

    def inputs(self, state: MethodState, chunks: int = 1, flat: FlatWeights | None = None) -> StepInputs:
        """The inputs of an update.

        Args:
            state: the state of the method.
            chunks: number of micro-batches of the update. Default 1.
            flat: whose blocks the update treats as weights. Default None: none.
        """
        layout = self.layout if flat is None else flat.layout
        groups: list[dict[str, Any]] = []
        rhos: list[float] = []
        key = self._base.rho_key
        for group, count in zip(self._base.optimizer.param_groups, layout.trained, strict=True):
            rho = group.get(key)
            if not (type(rho) is float and 0.0 <= rho < math.inf):
                rho = self.rho(group)
            if rho > 0.0 and "maximize" in group and group["maximize"] and self._recipe.moves:
                raise wrong_way(self._recipe)
            groups += [group] * count
            rhos += [rho] * count
        weights, recipe = layout.weights, self._recipe
        momenta = self._base.momenta if flat is None else flat.base.momenta
        names = [self.names.get(w, "") for w in weights] if recipe.needs_names else []
        layers = [self.layers.get(w, "") for w in weights] if recipe.needs_layers else []
        step = int(self._base.optimizer.param_groups[0][STEP])
        return StepInputs(weights, groups, rhos, names, step, state.generator, layout, layers, momenta, chunks)

    def count_update(self, state: MethodState) -> None:
        """Count an update that has ended, and store what the method needs in the groups."""
        groups = self._base.optimizer.param_groups
        groups[0][STEP] = int(groups[0][STEP]) + 1
        if self._recipe.is_random or self._recipe.radius.remembers:
            state.note(groups)

    # -- gradients that an update leaves behind -------------------------------------------------------------------

    def leave_gradients(self) -> None:
        """End an update: remember the current gradients, to recognise gradients that the loop computes later."""
        self._left = None
        for w in self.layout.weights:
            if (g := w.grad) is not None:
                self._left = weakref.ref(g), g._version
                return

    def new_gradient(self) -> Tensor | None:
        """A weight whose gradient the loop has computed since the last update ended; None if there is none."""
        for w in self.layout.weights:
            if (g := w.grad) is not None:
                old = self._left is not None and self._left[0]() is g and self._left[1] == g._version
                return None if old or g.is_sparse else w
        return None


_MODULE = "module."
# Levels that compilation, checkpointing, sharding and Fabric add to names.
_LEVELS = frozenset(
    {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module", "_original_module"}
)
# Modules that hold the user's module as `module`.
_WRAPPERS = frozenset(
    {
        "AveragedModel",
        "DataParallel",
        "DeepSpeedEngine",
        "DistributedDataParallel",
        "FullyShardedDataParallel",
        "ShardedDataParallel",
    }
)


def plain_names(model: nn.Module) -> dict[Tensor, str]:
    """The names of the parameters in the user's module, without the levels that wrappers add."""
    wrappers = {n for n, m in model.named_modules() if any(c.__name__ in _WRAPPERS for c in type(m).__mro__)}
    names: dict[Tensor, str] = {}
    for name, parameter in model.named_parameters():
        levels = name.split(".")
        own = [x for i, x in enumerate(levels) if not (x == "module" and ".".join(levels[:i]) in wrappers)]
        names[parameter] = _plain_name(".".join(own))
    return names


def _plain_name(name: str) -> str:
    return ".".join(level for level in name.split(".") if level not in _LEVELS)
