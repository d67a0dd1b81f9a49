"""Copies and pickles of the wrapper: what travels with it and what is built anew."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn

from flatmin.optim.base_optimizer import rho_key
from flatmin.optim.criterion import Criterion
from flatmin.optim.distributed import AscentSync
from flatmin.optim.doors import Doors
from flatmin.optim.program import Generators
from flatmin.optim.state import Store


class Copies(Doors):
    """How `SAM` is copied and pickled: options, base and the recipe's state, but no hooks and no model.

    Without the model, the names and layers of the weights are known from before.
    """

    criterion: Criterion | None
    ascent_sync: AscentSync
    rho_key: str
    _own_generators: tuple[Any, ...]
    _seed: int
    _diagnoses: bool
    _generators: Generators
    _model: nn.Module | None
    _names: dict[Tensor, str]
    _layers: dict[Tensor, str]
    _store: Store

    if TYPE_CHECKING:

        def _runtime(self, model: nn.Module | None) -> None: ...

    def _copyable(self) -> dict[str, Any]:
        if self._update is not None:
            raise RuntimeError("cannot copy or pickle during an update; finish it with step() or call abort() first.")
        if self.ascent_sync != "all":
            raise RuntimeError("an optimizer with ascent_sync belongs to its processes; copy its state_dict() instead.")
        options = ("recipe", "nonfinite", "eps", "clip_norm", "ascent_sync")
        private = ("_seed", "_freeze_batchnorm", "_freeze_state", "_replay_rng", "_diagnoses")
        return {k: self.__dict__[k] for k in (*options, *private)}

    def __getstate__(self) -> dict[str, Any]:
        weights = [w for g in self.param_groups for w in g["params"]]
        return {
            **self._copyable(),
            "base": self.base,
            "criterion": self.criterion,
            "slots": [self._store.of(w) for w in weights],
            "names": [self._names.get(w) for w in weights],
            "layers": [self._layers.get(w) for w in weights],
            "scalars": self._store.scalars,
            "rng": self._generators.cpu.get_state(),
            "_lost_model": self._model is not None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._revive(dict(state), model=None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        # The model first, or its weights, copied through the base, would not be the copied model's.
        model = copy.deepcopy(self._model, memo)
        state = {k: copy.deepcopy(v, memo) for k, v in self.__getstate__().items() if k != "recipe"}
        new._revive({**state, "recipe": self.recipe}, model=model)
        return new

    def _revive(self, state: dict[str, Any], model: nn.Module | None) -> None:
        slots, scalars, rng = state.pop("slots"), state.pop("scalars"), state.pop("rng")
        names, layers = state.pop("names"), state.pop("layers")
        self.__dict__.update({"_freeze_state": True, "_lost_model": False} | state)
        if not getattr(self.base, "param_groups", None):
            raise RuntimeError(
                f"{type(self.base).__name__} loses what it wraps when it is copied or pickled; copy its state_dict()."
            )
        self.rho_key, self._own_generators = rho_key(self.base), ()
        self._generators = Generators(self._seed)
        self._generators.cpu.set_state(rng)
        self._store = Store(self.recipe, self._diagnoses)
        self._store.scalars.update(scalars)
        for w, entries in zip((w for g in self.param_groups for w in g["params"]), slots, strict=True):
            self._store.put(w, entries)
        self._runtime(model)
        weights = [w for g in self.param_groups for w in g["params"]]
        for w, name, layer in zip(weights, names, layers, strict=True):
            if name is not None:
                self._names.setdefault(w, name)
            if layer is not None:
                self._layers.setdefault(w, layer)
