"""What must not differ between the passes of one step: running statistics, other state of the model, random numbers."""

from __future__ import annotations

import ctypes
import functools
import random
import struct
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from flatmin.methods import Gradients, accumulate
from flatmin.optim.containers import leaves
from flatmin.optim.tensors import is_sharded
from flatmin.optim.untrained import STATISTICS

_COUNT, _SAVED = "_flatmin_frozen", "_flatmin_saved"
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
            count = module.__dict__.get(_COUNT, 0)
            if count == 0:
                module.__dict__[_SAVED] = self._hide(module)
            module.__dict__[_COUNT] = count + 1

    def __exit__(self, *_: object) -> None:
        for module in self.layers:
            module.__dict__[_COUNT] -= 1
            if module.__dict__[_COUNT] == 0:
                self._show(module, module.__dict__.pop(_SAVED))
                del module.__dict__[_COUNT]

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


class OtherGradients:
    """Gradients of the model's parameters that another optimizer trains: they come from one pass, not from all.

    In passes that the engine brackets (a closure, `passes()`) they are those of the descent passes: each pass begins
    with what was there before the update, and those of ascents are dropped. In manual loops they are those of the
    backward before the perturbation, because whoever steps next may need them at once.

    Args:
        model: whose parameters; None: none are known before `look`.
        trained: the optimizer's weights.
    """

    def __init__(self, model: nn.Module | None, trained: Iterable[Tensor]) -> None:
        mine = {id(w) for w in trained}
        self._names: list[str] = []
        self._parameters: list[Tensor] = []
        for name, p in () if model is None else model.named_parameters():
            if id(p) not in mine and not is_sharded(p):
                self._names.append(name)
                self._parameters.append(p)
        self._later: list[Tensor] = []
        self._prior: Gradients | None = None
        self._pass: Gradients | None = None
        self._total: Gradients | None = None
        self._last: Gradients | None = None
        self._copies: list[tuple[Tensor, Tensor, int, Tensor]] = []

    def __bool__(self) -> bool:
        return bool(self._parameters or self._later)

    def in_training(self) -> list[Tensor]:
        """Those that another optimizer may train."""
        return [p for p in self._parameters if p.requires_grad]

    def first(self) -> str | None:
        """The name of the first of them that has a gradient."""
        return next((n for n, p in zip(self._names, self._parameters, strict=True) if p.grad is not None), None)

    def look(self, result: Any, trained: Iterable[Tensor]) -> None:
        """Find further ones that what a closure returned depends on; before the first pass of an update ends."""
        known = {id(w) for w in (*trained, *self._parameters)}
        found = [p for p in _leaves(result) if id(p) not in known and p.grad is not None]
        # What had a gradient before this pass as well cannot be told from it now; the next update can.
        fresh = [p for p in found if p.grad is not None and p.grad._version == 0]
        self._add(fresh)
        self._prior = [*(self._prior or []), *[None] * len(fresh)]
        self._later += [p for p in found if p.grad is not None and p.grad._version > 0]

    def _add(self, parameters: Sequence[Tensor]) -> None:
        self._parameters += parameters
        self._names += [f"a weight of shape {tuple(p.shape)}" for p in parameters]

    def enter(self) -> None:
        """A pass begins."""
        if self._prior is None:
            self._prior = [g if g is None or not lent(g) else g.clone() for g in self._now()]
        self._pass = None
        self.restart()

    def restart(self) -> None:
        """One of several backward passes begins whose gradients are averaged."""
        assert self._prior is not None
        self._set([None if g is None else g.clone() for g in self._prior])

    def collect(self, share: float) -> None:
        """It ends, and counts by this share."""
        self._pass = accumulate(self._pass or [], self._now(), share)

    def leave(self, share: float | None) -> None:
        """The pass ends, and counts by this share; None: not at all."""
        found = self._now() if self._pass is None else self._pass
        self._last = found
        if share is not None:
            self._total = found if share == 1.0 and self._total is None else accumulate(self._total or [], found, share)
        self._set(self._total or self._prior or [])

    def end(self, *, keep: bool = True) -> None:
        """The update ends; `keep=False`: with the gradients from before it."""
        if not keep and self._prior is not None:
            self._set(self._prior)
        elif self._total is None and self._last is not None:
            self._set(self._last)  # the base takes the gradient of the ascent
        self._prior = self._pass = self._total = self._last = None
        self._copies = []
        if self._later:
            self._add(self._later)
            self._later = []

    def copy(self) -> None:
        """Remember gradients that a backward in the coming pass would add to."""
        self._copies = [(p, g, g._version, g.clone()) for p in self._parameters if (g := p.grad) is not None]

    def restore(self) -> None:
        """Take back what was added since; a gradient that was cleared meanwhile belongs to whoever cleared it."""
        copies, self._copies = self._copies, []
        for p, gradient, version, copy in copies:
            if p.grad is gradient and gradient._version != version:
                gradient.copy_(copy)

    def _now(self) -> Gradients:
        return [p.grad for p in self._parameters]

    def _set(self, gradients: Gradients) -> None:
        for p, g in zip(self._parameters, gradients, strict=True):
            p.grad = g


def _leaves(result: Any) -> list[Tensor]:
    """The tensors at the ends of the graphs behind what a closure returned: a backward pass gives them gradients."""
    waiting: list[Any] = [x.grad_fn for x in leaves(result) if isinstance(x, Tensor)]
    seen: set[Any] = set()
    found: list[Tensor] = []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(leaf := getattr(node, "variable", None), nn.Parameter):  # not an input of its own batch
            found.append(leaf)
        waiting += [following for following, _ in node.next_functions]
    return found


def lent(gradient: Tensor) -> bool:
    """Whether it is a view of a DistributedDataParallel bucket, which the next backward overwrites."""
    if gradient.is_sparse:
        return False
    return gradient.untyped_storage().nbytes() > gradient.numel() * gradient.element_size()


class RandomState:
    """The random number generators that a forward pass may draw from.

    torch's on the CPU and the weights' devices, the global ones of Python and (where it is imported) numpy, and
    generators of the user's own.

    Args:
        devices: of the weights.
        own: `torch.Generator`, `numpy.random.Generator`, `numpy.random.RandomState` or `random.Random` objects.

    Raises:
        TypeError: an object of another kind in `own`.
    """

    def __init__(self, devices: Iterable[torch.device], own: Iterable[Any] = ()) -> None:
        kinds = sorted({d for d in devices if d.type not in ("cpu", "meta")}, key=str)
        self._devices = [(d, m) for d in kinds if (m := getattr(torch, d.type, None)) is not None]
        self._own = [_access(g) for g in own]
        self._numpy = _NumpyGlobal()
        self._saved: dict[int | None, list[Any]] = {}
        self._entry: list[Any] | None = None
        self._warned = False

    def _accesses(self) -> Iterator[tuple[Callable[[], Any], Callable[[Any], Any]]]:
        yield torch.get_rng_state, torch.set_rng_state
        for device, module in self._devices:
            yield functools.partial(module.get_rng_state, device), functools.partial(_put_device, module, device)
        yield random.getstate, random.setstate
        yield from self._own
        # Last, because it may be imported between two calls.
        if "numpy.random" in sys.modules:
            yield self._numpy.get, self._numpy.put

    def states(self) -> list[Any]:
        """All of them as they are now."""
        return [get() for get, _ in self._accesses()]

    def capture(self, chunk: int | None = None) -> None:
        """Remember the states with which a micro-batch (None: the batch) is first run."""
        self._saved[chunk] = self.states()

    def replay(self, chunk: int | None = None) -> None:
        """Set the states back to those."""
        for (_, put), state in zip(self._accesses(), self._saved.get(chunk, ()), strict=False):
            put(state)

    def captured(self, chunk: int | None = None) -> bool:
        """Whether there is something to replay."""
        return chunk in self._saved

    def enter(self) -> None:
        """A later pass of a manual loop begins: its draws are repeated from its first forward on."""
        self._entry = None if self._warned else self.states()

    def evaluated(self) -> None:
        """What was drawn so far was an evaluation's, which is no part of the pass."""
        if self._entry is not None:
            self._entry = self.states()

    def repeat(self) -> bool:
        """That forward begins: replay the first pass; whether the loop has drawn before."""
        drawn = self._check("the loop draws random numbers before it calls the model, and those")
        self.replay()
        return drawn

    def leave(self) -> None:
        """That pass ends: draws that nothing replayed are warned of."""
        self._check(
            "the second pass drew random numbers (dropout, augmentation, noise) outside a call of model=, and they"
        )

    def _check(self, what: str) -> bool:
        entry, self._entry = self._entry, None
        if entry is None:
            return False
        # Another optimizer of the same loop may have replayed them already.
        now, first = self.states(), self._saved.get(None)
        if all(map(_equal, entry, now)) or (first is not None and all(map(_equal, first, now))):
            return False
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{what} differ from those of the first pass. Use step(closure) or passes(), which repeat all draws, "
                "or give the module that the loop calls as model= and draw outside the passes. replay_rng=False says "
                "that they may differ.",
                stacklevel=6,
            )
        return True

    def drawn(self) -> bool:
        """Whether anything has been drawn since the states of the first pass were set again."""
        first = self._saved.get(None)
        return first is not None and not all(map(_equal, first, self.states()))

    def forget(self) -> None:
        self._saved = {}


class _NumpyGlobal:
    """numpy's global generator; reading its whole state is slow, so its memory is compared until it first draws."""

    SIZE = 2500  # of the Mersenne twister: 624 words and a position

    def __init__(self) -> None:
        self.draws = False

    def get(self) -> Any:
        numpy = sys.modules["numpy.random"]
        bits: Any = numpy.get_bit_generator() if hasattr(numpy, "get_bit_generator") else None
        if self.draws or type(bits).__name__ != "MT19937":
            return numpy.get_state()
        return ctypes.string_at(bits.ctypes.state_address, self.SIZE)

    def put(self, state: Any) -> None:
        numpy = sys.modules["numpy.random"]
        if isinstance(state, bytes):
            if self.get() == state:
                return
            self.draws = True
            *key, position = struct.unpack("=624Ii", state)
            state = ("MT19937", key, position, 0, 0.0)
        numpy.set_state(state)


def _put_device(module: Any, device: torch.device, state: Tensor) -> None:
    module.set_rng_state(state, device)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and (a == b if len(a) == 3 else all(map(_equal, a, b)))
    return bool((a == b).all()) if hasattr(a, "all") else bool(a == b)


def _access(generator: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """How to read and write the state of one generator."""
    for get, put in (("get_state", "set_state"), ("getstate", "setstate")):
        if hasattr(generator, get) and hasattr(generator, put):
            return getattr(generator, get), getattr(generator, put)
    if hasattr(generator, "bit_generator"):
        bits = generator.bit_generator
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    raise TypeError(
        "generators= takes torch.Generator, numpy.random.Generator, numpy.random.RandomState and random.Random "
        f"objects; got {type(generator).__name__}."
    )


def generators_of(model: nn.Module) -> list[Any]:
    """The random number generators that the modules of a model hold as attributes, also in lists and dicts."""
    found: dict[int, Any] = {}
    for module in model.modules():
        if type(module).__module__.startswith("torch."):
            continue
        for value in module.__dict__.values():
            inner = (
                value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
            )
            found.update((id(v), v) for v in inner if isinstance(v, _kinds()))
    return list(found.values())


def _kinds() -> tuple[type, ...]:
    numpy = sys.modules.get("numpy.random")
    return (torch.Generator, random.Random, *(() if numpy is None else (numpy.Generator, numpy.RandomState)))
