"""Protects the model in later passes: running statistics, and all other state that is not trained."""

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
    """Context in which torch's normalisation layers update no running statistics; re-entrant, free of copies.

    BatchNorm and SyncBatchNorm are told not to track; InstanceNorm, which ignores that, loses its buffers for the
    time. Layers in eval mode go on reading their statistics. Other layers' statistics are `UntrainedState`'s.

    Attributes:
        layers: the modules that it serves.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = [
            m
            for m in model.modules()
            if isinstance(m, _NormBase) and m.running_mean is not None and type(m).forward in _KNOWN_FORWARDS
        ]

    def __enter__(self) -> None:
        for module in self.layers:
            count = module.__dict__.get(COUNT, 0)
            if count == 0:
                module.__dict__[SAVED] = self._hide(module)
            module.__dict__[COUNT] = count + 1

    def __exit__(self, *_: object) -> None:
        for module in self.layers:
            module.__dict__[COUNT] -= 1
            if module.__dict__[COUNT] == 0:
                self._show(module, module.__dict__.pop(SAVED))
                del module.__dict__[COUNT]

    @staticmethod
    def _hide(module: Any) -> Any:
        if isinstance(module, _InstanceNorm):
            if not module.training:
                return None
            saved = {k: module._buffers[k] for k in STATISTICS}
            module._buffers.update(dict.fromkeys(STATISTICS))
            return saved
        saved = module.track_running_stats
        # In eval mode the statistics are read, and read they stay: not tracking only stops updates in training.
        module.track_running_stats = False
        return saved

    @staticmethod
    def _show(module: Any, saved: Any) -> None:
        if isinstance(module, _InstanceNorm):
            if saved is not None:
                module._buffers.update(saved)
        else:
            module.track_running_stats = saved


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass of an update, as the guard sees it.

    Attributes:
        index: 0 for the first pass of the update.
        chunk: which micro-batch it runs on; None: the whole batch.
        repeated: whether an earlier pass of the update ran on the same batch.
        perturbed: whether the weights are away from w.
        bracketed: whether it is entered and left around its forward (a closure, `passes()`), and not only told of.
    """

    index: int
    chunk: int | None
    repeated: bool
    perturbed: bool
    bracketed: bool

    @property
    def later(self) -> bool:
        """Whether it must leave no traces; a batch that is new and still at w counts as a first pass."""
        return self.index > 0 and (self.repeated or self.perturbed)


class ModelGuard:
    """Keeps what a pass changes in the model beside gradients as the first pass of the update leaves it.

    Running statistics (`FrozenStatistics`) and other state that is not trained (`UntrainedState`). A `ModelWatch` tells
    it of the forwards of manual loops.

    Args:
        model: the module being trained.
        trained: the optimizer's weights.
        random: the generators whose draws are repeated in manual loops too; None: none are.
        freeze_batchnorm: whether running statistics are kept out of later passes.
        freeze_state: whether other state that is not trained is put back after later passes.
        others: weights that another optimizer trains are found by it.
        abandoned: called when a forward of a first pass turns out to have been given up.

    Attributes:
        watch: sees the model's training forwards.
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
        """Find what the model has beside these weights."""
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
        """Look again at a model whose layers have been replaced since (SyncBatchNorm, quantisation)."""
        for children, before in self._children:
            if list(children.values()) != before:
                self.look_again(self.watch.weights)
                return

    def enter(self, now: Pass) -> None:
        """A pass begins."""
        self._freeze() if now.later else self._thaw()
        if self._state is not None and now.bracketed and not now.later:
            self._state.begin()
        self.watch.begin_pass(int(now.repeated), bracketed=now.bracketed)

    def finish(self) -> None:
        """The last pass has ended, or the update is given up."""
        self._thaw()

    def end_update(self) -> None:
        """What is seen from here on belongs to the next update."""
        bracketed = self.watch.bracketed
        self.watch.begin_update()
        if self._state is not None and not bracketed:
            self._state.begin()  # a loop that calls parts of the model may show no forward

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
