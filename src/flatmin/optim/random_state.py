"""Random number generators: lets later passes draw the same numbers as the first."""

from __future__ import annotations

import ctypes
import functools
import random
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flatmin.words import warn


class RandomState:
    """The random number generators that a forward pass may use.

    These are torch's generators on the CPU and on the weights' devices, the global generators of Python and (if it is
    imported) numpy, and the user's own generators.

    Args:
        devices: the devices of the weights.
        own: `torch.Generator`, `numpy.random.Generator`, `numpy.random.RandomState` or `random.Random` objects. Default
            ().

    Raises:
        TypeError: an object of another type in `own`.
    """

    def __init__(self, devices: Iterable[torch.device], own: Iterable[Any] = ()) -> None:
        kinds = sorted({d for d in devices if d.type not in ("cpu", "meta")}, key=str)
        self._accesses: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
            (torch.get_rng_state, torch.set_rng_state),
            (random.getstate, random.setstate),
        ]
        for device in kinds:
            if (module := getattr(torch, device.type, None)) is not None:
                get = functools.partial(module.get_rng_state, device)
                self._accesses.append((get, functools.partial(_put_device, module, device)))
        self._accesses += map(_access, own)
        self._numpy = _NumpyGlobal()
        self._saved: dict[int | None, list[Any]] = {}
        self._entry: list[Any] | None = None
        self._warned = False

    def states(self) -> list[Any]:
        """The current states of all generators; numpy's is last, because numpy may be imported between two calls."""
        states = [get() for get, _ in self._accesses]
        if "numpy.random" in sys.modules:
            states.append(self._numpy.get())
        return states

    def capture(self, chunk: int | None = None) -> None:
        """Store the states before a micro-batch (None: the batch) is run for the first time."""
        self._saved[chunk] = self.states()

    def replay(self, chunk: int | None = None) -> None:
        """Restore the states that `capture` has stored."""
        self.restore(self._saved.get(chunk, []))

    def restore(self, states: list[Any]) -> None:
        """Restore what `states` has returned."""
        for (_, put), state in zip(self._accesses, states, strict=False):
            put(state)
        if len(states) > len(self._accesses):
            self._numpy.put(states[-1])

    def captured(self, chunk: int | None = None) -> bool:
        """Whether states are stored for this micro-batch."""
        return chunk in self._saved

    def enter(self) -> None:
        """Begin a later pass of a manual loop, whose draws are repeated from its first forward on."""
        self._entry = None if self._warned else self.states()

    def evaluated(self) -> None:
        """Ignore all draws so far: they belong to an evaluation, not to the pass."""
        if self._entry is not None:
            self._entry = self.states()

    def repeat(self) -> bool:
        """Begin that forward: restore the states of the first pass. Returns whether the loop has drawn before it."""
        drawn = self._check("the loop draws random numbers before it calls the model, and those")
        self.replay()
        return drawn

    def leave(self) -> None:
        """End that pass: warn if numbers were drawn that were not repeated."""
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
            warn(
                f"{what} differ from those of the first pass. Use step(closure) or passes(), which repeat all draws, "
                "or pass the module that the loop calls as model= and draw outside the passes. If they may differ, "
                "pass replay_rng=False."
            )
        return True

    def drawn(self) -> bool:
        """Whether anything has been drawn since the states of the first pass were restored."""
        first = self._saved.get(None)
        return first is not None and not all(map(_equal, first, self.states()))

    def forget(self) -> None:
        self._saved = {}


class _NumpyGlobal:
    """numpy's global generator. Reading its state is slow, so its raw memory is compared until it has been used."""

    SIZE = 2500  # bytes of the Mersenne twister: 624 words and a position

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
    """The functions that read and write the state of a generator."""
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
    """The random number generators among the attributes of a model's modules, also inside lists and dicts."""
    generators: dict[int, Any] = {}
    for module in model.modules():
        if type(module).__module__.startswith("torch."):
            continue
        for value in module.__dict__.values():
            inner = (
                value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
            )
            generators.update((id(v), v) for v in inner if isinstance(v, _kinds()))
    return list(generators.values())


def _kinds() -> tuple[type, ...]:
    numpy = sys.modules.get("numpy.random")
    return (torch.Generator, random.Random, *(() if numpy is None else (numpy.Generator, numpy.RandomState)))
