"""What must not differ between the passes of one step: BatchNorm statistics, random masks, the batch."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

_COUNT, _SAVED = "_flatmin_frozen", "_flatmin_saved"
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class FrozenStatistics:
    """Context in which no normalisation layer updates its running statistics; re-entrant, free for torch's layers.

    BatchNorm and SyncBatchNorm are told not to track; InstanceNorm, which ignores that, loses its buffers for the
    time; any other module with a `running_mean` has its statistics copied back on leaving. Layers in eval mode go
    on reading their statistics.
    """

    def __init__(self, model: nn.Module) -> None:
        self._toggled: list[nn.Module] = []
        self._hidden: list[nn.Module] = []
        self._copied: list[nn.Module] = []
        for module in model.modules():
            if getattr(module, "running_mean", None) is None:
                continue
            own_forward = type(module).forward not in _KNOWN_FORWARDS
            if own_forward or not isinstance(module, _NormBase):
                self._copied.append(module)
            elif isinstance(module, _InstanceNorm):
                self._hidden.append(module)
            else:
                self._toggled.append(module)
        self._backup: list[list[tuple[Tensor, Tensor]]] = []

    def __enter__(self) -> None:
        for module in (*self._toggled, *self._hidden):
            count = module.__dict__.get(_COUNT, 0)
            if count == 0:
                module.__dict__[_SAVED] = self._hide(module)
            module.__dict__[_COUNT] = count + 1
        self._backup.append(
            [(b, b.clone()) for m in self._copied for k in _STATISTICS if (b := getattr(m, k, None)) is not None]
        )

    def __exit__(self, *_: object) -> None:
        for module in (*self._toggled, *self._hidden):
            module.__dict__[_COUNT] -= 1
            if module.__dict__[_COUNT] == 0:
                self._show(module, module.__dict__.pop(_SAVED))
                del module.__dict__[_COUNT]
        for buffer, copy in self._backup.pop():
            buffer.copy_(copy)

    @staticmethod
    def _hide(module: Any) -> Any:
        if isinstance(module, _InstanceNorm):
            if not module.training:
                return None
            saved = {k: module._buffers[k] for k in _STATISTICS}
            module._buffers.update(dict.fromkeys(_STATISTICS))
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


_KNOWN_FORWARDS = {_BatchNorm.forward, _InstanceNorm.forward, nn.SyncBatchNorm.forward}


class RandomState:
    """The random number generators that a forward pass may draw from: the CPU's and those of the weights' devices."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        kinds = sorted({d for d in devices if d.type not in ("cpu", "meta")}, key=str)
        self._modules = [(d, getattr(torch, d.type, None)) for d in kinds]
        self._saved: dict[int | None, list[Tensor]] = {}

    def capture(self, chunk: int | None = None) -> None:
        """Remember the states with which a micro-batch (None: the batch) is first run."""
        self._saved[chunk] = [
            torch.get_rng_state(),
            *(m.get_rng_state(d) for d, m in self._modules if m is not None),
        ]

    def replay(self, chunk: int | None = None) -> None:
        """Set the states back to those."""
        if chunk not in self._saved:
            return
        torch.set_rng_state(self._saved[chunk][0])
        rest = iter(self._saved[chunk][1:])
        for device, module in self._modules:
            if module is not None:
                module.set_rng_state(next(rest), device)

    def forget(self) -> None:
        self._saved = {}


class ForwardHook:
    """The hook on the model's forward. Copies and pickles of a model carry an unbound one, which does nothing."""

    def __init__(self, watch: ModelWatch | None = None) -> None:
        self.watch = None if watch is None else weakref.ref(watch)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        # Under compilation the hook is traced away, so that phases cause no recompilation.
        if self.watch is None or torch.compiler.is_compiling():
            return
        watch = self.watch()
        if watch is not None and module.training and torch.is_grad_enabled():
            watch.seen(args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardHook:
        return ForwardHook()

    def __reduce__(self) -> tuple[type[ForwardHook], tuple[()]]:
        return ForwardHook, ()


class ModelWatch:
    """Sees the model's training forwards.

    Captures and replays random states around them in manual loops, and notices a second pass that ran no forward or
    ran on another batch.
    """

    def __init__(
        self,
        model: nn.Module,
        random: RandomState | None,
        weights: Sequence[Tensor],
        abandoned: Callable[[], None] | None = None,
    ) -> None:
        self.model, self.random, self._weights, self._abandoned = model, random, weights, abandoned
        self.cleared = False
        self.hook = ForwardHook(self)
        self.handle = model.register_forward_pre_hook(self.hook, with_kwargs=True)
        self.pass_index = 0
        self.bracketed = False  # a closure or `passes()` brackets each pass, so random states are handled there
        self.forwards = [0, 0]
        self._batch: list[tuple[Tensor, int]] | None = None
        self._left: tuple[weakref.ref[Tensor], int] | None = None  # the gradients that the last update left behind
        self._warned = self._warned_of_drop = False
        self._before_replay: Tensor | None = None

    def remove(self) -> None:
        self.handle.remove()

    def begin_update(self) -> None:
        """The next training forward opens a new update."""
        self.pass_index, self.forwards, self._batch, self.bracketed = 0, [0, 0], None, False
        first = self._gradient()
        self._left = None if first is None else (weakref.ref(first), first._version)

    def _gradient(self) -> Tensor | None:
        """The first gradient there is."""
        return next((w.grad for w in self._weights if w.grad is not None), None)

    def _untouched(self) -> bool:
        """Whether the gradients are those that the last update left behind, or none."""
        first = self._gradient()
        return first is None or (
            self._left is not None and self._left[0]() is first and self._left[1] == first._version
        )

    def begin_pass(self, index: int, *, bracketed: bool) -> None:
        self.pass_index, self.bracketed = index, bracketed
        self.forwards[min(index, 1)] = 0
        self._before_replay = None

    def seen(self, args: Any, kwargs: Any) -> None:
        if torch._C._current_graph_task_id() != -1:
            self._recomputed()
            return
        later = min(self.pass_index, 1)
        if not later and self.forwards[0] and self.cleared and not self.bracketed and self._gradient() is None:
            # Gradients were cleared since the last forward and none has come: that one was given up.
            self.begin_update()
            if self._abandoned is not None:
                self._abandoned()
        self.cleared = False
        if self.forwards[later] == 0:
            if self.random is not None and not self.bracketed:
                if later:
                    self._before_replay = torch.get_rng_state()
                    self.random.replay()
                else:
                    self.random.capture()
            batch = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            if not later:
                self._batch = [(x, x._version) for x in batch]
            elif self._batch is not None and not self._warned and not self._same(batch):
                self._warned = True
                warnings.warn(
                    "the passes of one step saw different batches; both must use the same one "
                    "(fetch the batch outside the closure).",
                    stacklevel=4,
                )
        self.forwards[later] += 1

    def _recomputed(self) -> None:
        """A forward inside a backward: checkpointing runs it again, from the state before its hook had replayed."""
        if self._before_replay is not None and torch.equal(self._before_replay, torch.get_rng_state()):
            assert self.random is not None
            self.random.replay()

    def _same(self, batch: list[Tensor]) -> bool:
        known = self._batch or []
        return len(known) == len(batch) and all(
            x._version == version and (x is y or _fingerprint(x) == _fingerprint(y))
            for (x, version), y in zip(known, batch, strict=True)
        )

    def warn_of_dropped_gradients(self) -> None:
        """Say once that gradients which a loop has accumulated will not be used."""
        hooks = [h for h in self.model._forward_pre_hooks.values() if isinstance(h, ForwardHook)]
        if sum(h.watch is not None and h.watch() is not None for h in hooks) > 1:
            return  # the forward may have been another optimizer's
        if self.forwards[0] and not self._warned_of_drop and not self._untouched():
            self._warned_of_drop = True
            warnings.warn(
                "step(closure) runs all passes itself and drops the gradients of the forward before it. To accumulate "
                "over micro-batches, give step() a list of closures, or use passes().",
                stacklevel=5,
            )

    def check_second_pass(self) -> None:
        if self.forwards[0] and self.pass_index and not self.forwards[1]:
            raise RuntimeError(
                "no forward pass of the model ran at w + eps; the loss is detached or cached: "
                "compute it again from the batch in every pass."
            )


def _fingerprint(x: Tensor) -> Any:
    """Shape and dtype, and for CPU tensors a few values; never a synchronisation."""
    if x.device.type != "cpu" or x.numel() == 0 or x.layout is not torch.strided:
        return tuple(x.shape), x.dtype
    flat = x.detach().reshape(-1) if x.is_contiguous() else x.detach()[0].reshape(-1)
    return tuple(x.shape), x.dtype, tuple(map(repr, flat[:: max(1, flat.numel() // 8)][:8].tolist()))
