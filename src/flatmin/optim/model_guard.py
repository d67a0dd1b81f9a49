"""Protects running statistics and other untrained state of the model in later passes of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from flatmin.optim.other_gradients import OtherGradients
from flatmin.optim.random_state import RandomState
from flatmin.optim.untrained import STATISTICS, UntrainedState
from flatmin.optim.watch import ModelWatch

COUNT, SAVED = "_flatmin_frozen", "_flatmin_saved"
_KNOWN_FORWARDS = {_BatchNorm.forward, _InstanceNorm.forward, nn.SyncBatchNorm.forward}


class FrozenStatistics:
    """Context in which torch's normalisation layers do not update running statistics. Re-entrant, without copies.

    It sets `track_running_stats` to False for BatchNorm and SyncBatchNorm, and removes the buffers of InstanceNorm,
    which ignores this attribute. Layers in eval mode continue to use their statistics. `UntrainedState` protects the
    statistics of other layers.

    Attributes:
        layers: the modules that are protected.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = [
            m
            for m in model.modules()
            if isinstance(m, _NormBase) and m.running_mean is not None and type(m).forward in _KNOWN_FORWARDS
        ]

    def __enter__(self) -> None:
        for module in self.layers:
            own = module.__dict__
            count = own.get(COUNT, 0)
            if count == 0:
                own[SAVED] = self._hide(module)
            own[COUNT] = count + 1

    def __exit__(self, *_: object) -> None:
        for module in self.layers:
            own = module.__dict__
            own[COUNT] -= 1
            if own[COUNT] == 0:
                self._show(module, own.pop(SAVED))
                del own[COUNT]

    @staticmethod
    def _hide(module: Any) -> Any:
        if isinstance(module, _InstanceNorm):
            if not module.training:
                return None
            saved = {k: module._buffers[k] for k in STATISTICS}
            module._buffers.update(dict.fromkeys(STATISTICS))
            return saved
        saved = module.track_running_stats
        # In eval mode the layer still reads its statistics: the attribute only stops updates in train mode. The setter
        # of `nn.Module` would first look for a parameter, buffer or module of this name, in every layer and pass.
        object.__setattr__(module, "track_running_stats", False)
        return saved

    @staticmethod
    def _show(module: Any, saved: Any) -> None:
        if isinstance(module, _InstanceNorm):
            if saved is not None:
                module._buffers.update(saved)
        else:
            object.__setattr__(module, "track_running_stats", saved)


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass of an update.

    Attributes:
        index: number of the pass in the update, counted from 0.
        chunk: the micro-batch; None: the whole batch.
        repeated: whether an earlier pass of the update ran on the same batch.
        perturbed: whether the weights are away from w.
        bracketed: whether the engine is called directly before and after its forward and backward (a closure,
            `passes()`).
    """

    index: int
    chunk: int | None
    repeated: bool
    perturbed: bool
    bracketed: bool

    @property
    def later(self) -> bool:
        """Whether the pass must not change the model. A new batch at w counts as a first pass."""
        return self.index > 0 and (self.repeated or self.perturbed)


class ModelGuard:
    """Keeps the untrained state of the model as the first pass of an update leaves it.

    This is the running statistics (`FrozenStatistics`) and all other state that is not trained (`UntrainedState`). A
    `ModelWatch` observes the forwards of manual loops.

    Args:
        model: the module being trained.
        trained: the optimizer's weights.
        random: the generators whose draws are repeated in later passes; None: draws are not repeated.
        freeze_batchnorm: whether later passes must not update running statistics.
        freeze_state: whether other untrained state is restored after later passes.
        others: finds the weights that another optimizer trains.
        abandoned: called when it turns out that the forward of a first pass was discarded.

    Attributes:
        watch: observes the model's training forwards.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: Sequence[Tensor],
        random: RandomState | None,
        others: OtherGradients,
        *,
        freeze_batchnorm: bool,
        freeze_state: bool,
        abandoned: Callable[[], None] | None,
    ) -> None:
        self._model, self._freeze_batchnorm, self._freeze_state = model, freeze_batchnorm, freeze_state
        self._others, self._frozen = others, False
        self._statistics: FrozenStatistics | None = None
        self._state: UntrainedState | None = None
        self.watch = ModelWatch(model, random, trained, self.follow, abandoned)
        self.look_again(trained)

    def look_again(self, trained: Sequence[Tensor]) -> None:
        """Search the model again for everything besides these weights."""
        self.watch.weights = trained
        self._children = [(m._modules, list(m._modules.values())) for m in self._model.modules() if m._modules]
        self._others.scan(self._model, trained)
        if self._freeze_batchnorm and not self._frozen:
            statistics = FrozenStatistics(self._model)
            self._statistics = statistics if statistics.layers else None
        if self._freeze_state:
            layers = () if self._statistics is None else self._statistics.layers
            self._state = UntrainedState(self._model, trained, layers, not self._freeze_batchnorm) or None
            self.watch.state = self._state
            if self._state is not None:
                self._state.begin()

    def follow(self) -> None:
        """Search the model again if its layers have been replaced (SyncBatchNorm, quantisation)."""
        for children, before in self._children:
            if list(children.values()) != before:
                self.look_again(self.watch.weights)
                return

    def enter(self, now: Pass) -> None:
        """Begin a pass."""
        self._freeze() if now.later else self._thaw()
        if self._state is not None and now.bracketed and not now.later:
            self._state.begin()
        self.watch.begin_pass(int(now.repeated), bracketed=now.bracketed)

    def finish(self) -> None:
        """End the last pass, or abort the update."""
        self._thaw()

    def end_update(self) -> None:
        """End the update: the next forward belongs to the next one."""
        bracketed = self.watch.bracketed
        self.watch.begin_update()
        if self._state is not None and not bracketed:
            self._state.begin()  # a loop that calls only parts of the model may run no forward of the model

    def _freeze(self) -> None:
        if self._statistics is not None and not self._frozen:
            self._statistics.__enter__()
            self._frozen = True
        if self._state is not None:
            self._state.hold()

    def _thaw(self) -> None:
        if self._statistics is not None and self._frozen:
            self._frozen = False
            self._statistics.__exit__(None, None, None)
        if self._state is not None:
            self._state.release()
