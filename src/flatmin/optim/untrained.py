"""The untrained state of a model that its forward changes: buffers, queues, averages, counters."""

from __future__ import annotations

import numbers
import operator
import weakref
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from flatmin.optim.tensors import is_sharded
from flatmin.words import warn

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
PLAIN = set(nn.Module().__dict__)
_COMPARED, _AGAIN = 3, 100  # values are compared in the first 3 updates, and in every 100th
_WHOLE = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_SIMPLE = {int, float, bool, str, type(None)}
Place = tuple[dict[str, Any], str]


@dataclass(slots=True)
class _Look:
    """The current state: the tensors with their version counters and addresses, and the numbers."""

    tensors: list[Any]
    versions: list[int]
    addresses: list[int]
    numbers: list[Any]

    def changes(self, before: _Look) -> tuple[set[int], set[int]]:
        """The positions of tensors and of numbers that differ."""
        tensors: set[int] = set()
        same = self.versions == before.versions and self.addresses == before.addresses
        if not (same and all(map(operator.is_, self.tensors, before.tensors))):
            columns = ((x.tensors, x.versions, x.addresses) for x in (self, before))
            rows = (zip(*column, strict=True) for column in columns)
            for i, (a, b) in enumerate(zip(*rows, strict=True)):
                if a[0] is not b[0] or a[1:] != b[1:]:
                    tensors.add(i)
        if self.numbers == before.numbers:
            return tensors, set()
        pairs = enumerate(zip(self.numbers, before.numbers, strict=True))
        return tensors, {i for i, (a, b) in pairs if a is not b and a != b}


class UntrainedState:
    """Makes sure that the untrained state of a model changes only once in each step.

    This state is buffers, parameters that this optimizer does not train, and the numbers, strings and tensors that are
    attributes of the user's own modules. Everything that the forward of a later pass changes, or that changed in both
    passes, is restored to the state after the first pass. Changes that a loop makes once, outside a forward, are kept.

    Changes are detected by a tensor's version counter, its address or its identity, so that nothing is copied, compared
    or synchronised if nothing changes. On the CPU, values are compared too in the first updates and in every hundredth,
    to detect writes through `.data`, unless the state is more than twice as large as the weights.

    Args:
        model: the model.
        trained: the weights that the optimizer trains.
        statistics: layers whose running statistics are protected by `FrozenStatistics`.
        free: whether every pass may update running statistics (`freeze_batchnorm=False`).
    """

    def __init__(
        self, model: nn.Module, trained: Iterable[Tensor], statistics: Collection[nn.Module], free: bool
    ) -> None:
        self._model, self._free = weakref.ref(model), free
        self._trained = {id(w): w for w in trained if w.requires_grad}
        self._statistics = set(map(id, statistics))
        self._own = [m for m in model.modules() if not type(m).__module__.startswith("torch.")]
        self._updates = 0
        self._silent: set[str] = set()  # tensors whose changes show only in their values
        self._late: set[str] = set()  # tensors that a second forward has changed, but not the first
        self._before: _Look | None = None
        self._held: _Look | None = None
        self._copies: dict[int, Tensor] = {}
        self._aliases: set[int] = set()
        self._scan(model)

    def __bool__(self) -> bool:
        return bool(self._places or self._numbers or self._own)

    # -- where state is ------------------------------------------------------------------------------------------

    def _extent(self) -> int:
        return sum(len(m.__dict__) + len(m._buffers) for m in self._own)

    def _scan(self, model: nn.Module) -> None:
        self._scanned = self._extent()
        self._places: list[Place] = []
        self._numbers: list[Place] = []
        self._names: list[str] = []
        own = set(map(id, self._own))
        for prefix, module in model.named_modules():
            prefix = f"{prefix}." if prefix else ""
            held = module.__dict__ if id(module) in own else {}
            skipped = id(module) in self._statistics or (self._free and hasattr(module, "running_mean"))
            for key, value in held.items():
                if key in PLAIN:
                    continue
                if value is None or isinstance(value, (numbers.Number, str)):
                    self._numbers.append((held, key))
                elif isinstance(value, Tensor) and not value.requires_grad and has_values(value):
                    self._places.append((held, key))
                    self._names.append(prefix + key)
            for table in (module._buffers, module._parameters):
                for key, value in table.items():
                    if id(value) in self._trained or (skipped and key in STATISTICS) or not has_values(value):
                        continue
                    self._places.append((table, key))
                    self._names.append(prefix + key)
                    if type(module).__module__.startswith("torch.ao."):
                        self._silent.add(prefix + key)  # kernels write to observers without counting a version

    def _look(self) -> _Look:
        # Most places are empty, such as the bias of layers without one.
        tensors = [None if (x := place.get(key)) is None else _kept(x) for place, key in self._places]
        values = [place.get(key) for place, key in self._numbers]
        return _Look(
            tensors,
            [0 if x is None else version(x) for x in tensors],
            [0 if x is None else address(x) for x in tensors],
            [v if type(v) in _SIMPLE or isinstance(v, (numbers.Number, str)) else _Other(id(v)) for v in values],
        )

    def _changed_shape(self) -> bool:
        """Whether there are new attributes or buffers, or tensors in places that had none at the last scan."""
        return self._extent() != self._scanned or any(
            isinstance(_kept(place.get(key)), Tensor) for place, key in self._numbers
        )

    # -- the passes of an update ---------------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin a first pass."""
        model = self._model()
        if model is not None and self._changed_shape():
            self._scan(model)
        self._before = self._look()

    def hold(self) -> None:
        """Begin a later pass: record the state after the first pass, or restore it after another later pass."""
        if self._held is not None:
            self._put_back()
        else:
            self._note()
        self._inside: tuple[set[int], set[int]] = set(), set()
        self._written: set[int] = set()  # tensors whose changes by a forward show only in their values
        self._forward: _Look | None = None
        self._unwritten: set[int] = set()
        self._forwards = 0

    def _note(self) -> None:
        before, model = self._before, self._model()
        if model is not None and (before is None or self._changed_shape()):
            # The first forward has created attributes or buffers: in this update everything counts as changed.
            self._scan(model)
            self._held = held = self._look()
            self._first = set(range(len(self._places))), set(range(len(self._numbers)))
        else:
            self._held = held = self._look()
            self._first = (set(), set()) if before is None else held.changes(before)
        self._updates += 1
        present = [x for x in held.tensors if isinstance(x, Tensor)]
        self._compares = (
            (self._updates <= _COMPARED or self._updates % _AGAIN == 0)
            and sum(x.numel() for x in present) <= 2 * sum(w.numel() for w in self._trained.values())
            # On other devices a comparison would synchronise.
            and all(x.device.type == "cpu" and x.layout is torch.strided for x in present)
        )
        always = self._silent | self._late
        copied = self._first[0] | {i for i, n in enumerate(self._names) if self._compares or n in always}
        # Tensors that share memory with a weight change with it.
        weights = {memory(w) for w in self._trained.values()} - {0} if copied else set()
        self._aliases = {i for i in copied if memory(held.tensors[i]) in weights}
        copied -= self._aliases
        self._copies = {i: x.clone() for i in copied if isinstance(x := held.tensors[i], Tensor)}

    def enter_forward(self) -> None:
        """Begin a forward of the model."""
        if self._held is None:
            self._forward = None
            return
        self._forward = self._look()
        silent = {i for i in self._copies if self._compares or self._names[i] in self._silent}
        self._unwritten = silent - self._differing(silent)

    def leave_forward(self) -> None:
        """End it, and record what it has changed."""
        if self._forward is not None:
            for seen, new in zip(self._inside, self._look().changes(self._forward), strict=True):
                seen |= new
            self._written |= self._differing(self._unwritten)
            self._forwards += 1

    def _differing(self, places: set[int]) -> set[int]:
        """Those whose values differ from those after the first pass."""
        held = self._held
        assert held is not None
        return {i for i in places if held.tensors[i].is_cpu and not _equal(held.tensors[i], self._copies[i])}

    def release(self) -> None:
        """End the last pass."""
        if self._held is not None:
            self._put_back()
        self._held = self._before = None
        self._copies = {}

    @torch.no_grad()
    def _put_back(self) -> None:
        held = self._held
        assert held is not None
        tensors, counters = self._look().changes(held)
        for i in counters:
            if isinstance(held.numbers[i], _Other):
                continue
            if i in self._first[1] or i in self._inside[1] or not self._forwards:
                place, key = self._numbers[i]
                place[key] = held.numbers[i]
        lost = []
        for i in tensors - self._aliases:
            value = held.tensors[i]
            trained = isinstance(value, nn.Parameter) and value.requires_grad  # by another optimizer
            ours = i in self._inside[0] or (not trained and (i in self._first[0] or not self._forwards))
            if not ours:
                continue
            if isinstance(value, Tensor) and i not in self._copies:
                if value._version == held.versions[i] and address(value) == held.addresses[i]:
                    self._places[i][0][self._places[i][1]] = value  # it had been replaced by another tensor
                    continue
                lost.append(self._names[i])
                continue
            self._restore(i, held)
        silent = {i for i in self._copies.keys() - tensors if self._compares or self._names[i] in self._silent}
        written = self._written - tensors if self._forwards else self._differing(silent)
        for i in written | {i for i in silent if not held.tensors[i].is_cpu}:
            self._silent.add(self._names[i])
            held.tensors[i].copy_(self._copies[i])
        if new := [name for name in lost if name not in self._late]:
            self._late.update(new)
            warn(
                f"{', '.join(new[:3])} changed in the second forward of a step but not in the first, so this change "
                "could not be undone; from now on it is copied before every second pass."
            )

    def _restore(self, i: int, held: _Look) -> None:
        place, key = self._places[i]
        value = held.tensors[i]
        if isinstance(value, Tensor):
            if value.shape != self._copies[i].shape:
                value.resize_(self._copies[i].shape)
            value.copy_(self._copies[i])
            held.versions[i], held.addresses[i] = version(value), address(value)
        place[key] = value


@dataclass(frozen=True, slots=True)
class _Other:
    """Stands for an object that is not a number; holds only its id."""

    identity: int


def _kept(x: Any) -> Any:
    """Return x if it is a tensor without a graph (a graph must not be kept alive), else None."""
    return x if isinstance(x, Tensor) and x.grad_fn is None else None


def memory(x: Any) -> int:
    """The address of a tensor's storage; 0 for anything else."""
    try:
        return x.untyped_storage().data_ptr() if isinstance(x, Tensor) else 0
    except (RuntimeError, NotImplementedError):
        return 0  # tensors without memory of their own


def has_values(x: Any) -> bool:
    """Whether it can be copied and compared; quantised and nested tensors cannot."""
    if x is None:
        return True
    odd = is_sharded(x) or is_lazy(x) or x.is_quantized or x.is_nested
    return not odd and (x.is_floating_point() or x.is_complex() or x.dtype in _WHOLE)


def address(x: Any) -> int:
    """The address of a tensor's first entry; 0 for anything else."""
    try:
        return x.data_ptr() if isinstance(x, Tensor) else 0
    except RuntimeError:
        return 0  # tensors without memory of their own


def version(x: Any) -> int:
    """A tensor's version counter; 0 for anything else."""
    try:
        return x._version if isinstance(x, Tensor) else 0
    except RuntimeError:
        return 0  # an inference tensor, which cannot be changed in place


def _equal(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape:
        return False
    same = x == y
    return bool(same.all()) or bool((same | ((x != x) & (y != y))).all())
