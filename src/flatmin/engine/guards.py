"""What must not differ between the passes of one step: running statistics, other state of the model, random numbers."""

from __future__ import annotations

import functools
import random
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from flatmin.engine.tensors import is_sharded

_COUNT, _SAVED = "_flatmin_frozen", "_flatmin_saved"
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
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


Mark = tuple[Any, int, int]


class UntrainedState:
    """The state that a model's forward may change and the optimizer does not train: it advances once a step.

    Buffers, untrained parameters, and the numbers and tensors that modules of the user's own hold as attributes. What
    the first pass changed is copied before later passes and put back after them. Changes show in a tensor's version
    counter, its address or its identity, so that nothing is copied, compared or synchronised where nothing changes.

    Args:
        model: whose state.
        trained: the optimizer's weights.
        statistics: layers whose running statistics are kept by `FrozenStatistics`.
        free: whether running statistics may advance in every pass (`freeze_batchnorm=False`).
    """

    def __init__(
        self, model: nn.Module, trained: Iterable[Tensor], statistics: Collection[nn.Module], free: bool
    ) -> None:
        mine = {id(w) for w in trained}
        kept = set(map(id, statistics))
        self._places: list[tuple[dict[str, Any], str]] = []
        self._numbers: list[tuple[dict[str, Any], str]] = []
        self._names: list[str] = []
        for prefix, module in model.named_modules():
            skipped = STATISTICS if id(module) in kept or (free and hasattr(module, "running_mean")) else ()
            own: dict[str, Any] = {} if type(module).__module__.startswith("torch.") else module.__dict__
            self._numbers += [(own, k) for k, v in own.items() if type(v) in (int, float, bool) and k not in _PLAIN]
            tensors = {k: v for k, v in own.items() if isinstance(v, Tensor) and not v.requires_grad}
            for place in (module._buffers, module._parameters, tensors):
                for key, value in place.items():
                    frozen = value is not None and not (isinstance(value, nn.Parameter) and value.requires_grad)
                    if frozen and id(value) not in mine and key not in skipped and not is_sharded(value):
                        self._places.append((own if place is tensors else place, key))
                        self._names.append(f"{prefix}.{key}".lstrip("."))
        self._begun: tuple[list[Mark], list[Any]] | None = None
        self._after: list[Mark] = []
        self._kept: dict[int, tuple[Any, Any]] = {}  # place -> (what stood there, a copy of its values)
        self._kept_numbers: list[Any] | None = None
        self._always: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self._places or self._numbers)

    def _marks(self) -> list[Mark]:
        return [_mark(place.get(key)) for place, key in self._places]

    def begin(self) -> None:
        """Note how things stand before a first pass."""
        self._begun = self._marks(), [place.get(key) for place, key in self._numbers]

    def hold(self) -> None:
        """Keep what has changed since; before a later pass, or put it back if it is kept already."""
        if self._begun is None:
            return
        if self._kept_numbers is not None:
            self._put_back()
            return
        before, _ = self._begun
        now = self._after = self._marks()
        self._kept = {
            i: (a[0], a[0].clone())
            for i, (a, b) in enumerate(zip(now, before, strict=True))
            if (i in self._always or not _same(a, b)) and isinstance(a[0], Tensor)
        }
        self._kept_numbers = [place.get(key) for place, key in self._numbers]

    def release(self) -> None:
        """Put back what later passes have changed."""
        if self._kept_numbers is None:
            return
        self._put_back(last=True)
        self._kept, self._kept_numbers, self._begun = {}, None, None

    @torch.no_grad()
    def _put_back(self, last: bool = False) -> None:
        now, lost = self._marks(), []
        for i, (mark, after) in enumerate(zip(now, self._after, strict=True)):
            if _same(mark, after) or (isinstance(mark[0], nn.Parameter) and mark[0].requires_grad):
                continue  # unchanged, or trained by somebody since
            if i not in self._kept:
                lost.append(i)
                continue
            place, key = self._places[i]
            value, copy = self._kept[i]
            if value._version != after[1] or _address(value) != after[2]:
                value.copy_(copy)
                self._after[i] = _mark(value)
            place[key] = value
        assert self._kept_numbers is not None
        for (place, key), number in zip(self._numbers, self._kept_numbers, strict=True):
            if place.get(key) is not number and key in place:
                place[key] = number
        if lost and last and not self._always.issuperset(lost):
            self._always.update(lost)
            warnings.warn(
                f"{', '.join(self._names[i] for i in lost[:3])} changed in the second forward of a step and not in the "
                "first, so this once it could not be put back; from now on it is copied before every second pass.",
                stacklevel=2,
            )


_PLAIN = set(nn.Module().__dict__)


def _address(x: Tensor) -> int:
    try:
        return x.data_ptr()
    except RuntimeError:
        return 0  # tensors without memory of their own


def _mark(x: Any) -> Mark:
    if not isinstance(x, Tensor):
        return x, 0, 0
    try:
        return x, x._version, _address(x)
    except RuntimeError:
        return x, 0, 0  # an inference tensor, which nothing can change in place


def _same(a: Mark, b: Mark) -> bool:
    return a[0] is b[0] and a[1] == b[1] and a[2] == b[2]


class OtherGradients:
    """Gradients of the model's parameters that another optimizer trains: they come from one pass, not from all.

    In passes that the engine brackets (a closure, `passes()`) they are those of the descent passes. In manual loops
    they are those of the backward before the perturbation, because whoever steps next may need them at once.

    Args:
        model: whose parameters.
        trained: the optimizer's weights.
    """

    def __init__(self, model: nn.Module, trained: Iterable[Tensor]) -> None:
        mine = {id(w) for w in trained}
        self.parameters: list[Tensor] = [p for p in model.parameters() if id(p) not in mine and not is_sharded(p)]
        self._names = {id(p): n for n, p in model.named_parameters()}
        self._aside: list[tuple[Tensor, Tensor | None]] | None = None
        self._copies: list[tuple[Tensor, Tensor, int, Tensor]] = []

    def __bool__(self) -> bool:
        return bool(self.parameters)

    def first(self) -> str | None:
        """The name of the first of them that has a gradient."""
        return next((self._names[id(p)] for p in self.parameters if p.grad is not None), None)

    def aside(self) -> None:
        """Put their gradients aside, so that the coming pass begins without any."""
        self._aside = [(p, g if g is None or not _lent(g) else g.clone()) for p in self.parameters for g in (p.grad,)]
        for p in self.parameters:
            p.grad = None

    def back(self, share: float | None) -> None:
        """End such a pass: add its gradients, times `share`, to those put aside; None: drop them."""
        aside, self._aside = self._aside or (), None
        for p, before in aside:
            new, p.grad = p.grad, before
            if share is None or new is None:
                continue
            if share != 1.0:
                new = new * share
            p.grad = new if before is None else before + new

    def copy(self) -> None:
        """Remember gradients that a backward in the coming pass would add to."""
        self._copies = [(p, g, g._version, g.clone()) for p in self.parameters if (g := p.grad) is not None]

    def restore(self) -> None:
        """Take back what was added since; a gradient that was cleared meanwhile belongs to whoever cleared it."""
        copies, self._copies = self._copies, []
        for p, gradient, version, copy in copies:
            if p.grad is gradient and gradient._version != version:
                gradient.copy_(copy)


def _lent(gradient: Tensor) -> bool:
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
        if (numpy := sys.modules.get("numpy.random")) is not None:
            yield numpy.get_state, numpy.set_state

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

    def repeat(self) -> None:
        """That forward begins: replay the first pass."""
        self._check("the loop draws random numbers before it calls the model, and those")
        self.replay()

    def leave(self) -> None:
        """That pass ends: draws that nothing replayed are warned of."""
        self._check(
            "the second pass drew random numbers (dropout, augmentation, noise) outside a call of model=, and they"
        )

    def _check(self, what: str) -> None:
        entry, self._entry = self._entry, None
        if entry is not None and not self._warned and not all(map(_equal, entry, self.states())):
            self._warned = True
            warnings.warn(
                f"{what} differ from those of the first pass. Use step(closure) or passes(), which repeat all draws, "
                "or give the module that the loop calls as model= and draw outside the passes. replay_rng=False says "
                "that they may differ.",
                stacklevel=6,
            )

    def forget(self) -> None:
        self._saved = {}


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
