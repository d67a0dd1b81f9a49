"""A snapshot of everything in a model that is not trained, to restore it later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatmin.optim.model_guard import COUNT, SAVED
from flatmin.optim.tensors import bits
from flatmin.optim.untrained import PLAIN, address, has_values, memory, version
from flatmin.optim.watch import SLOT

_OWN = PLAIN - {"training"} | {SLOT, COUNT, SAVED}  # attributes of a module that belong to torch or to the engine
_LARGE = 2  # times as many entries as the trained weights


class ModelSnapshot:
    """A snapshot of everything in a model besides its trained weights.

    It holds buffers, untrained parameters, and the attributes of the user's own modules, including the entries of lists
    and dicts among these. Attributes are stored by reference. Tensors are copied, and written back only if they have
    changed. Untrained parameters are copied only if all of them together are at most twice as large as the trained
    weights (a teacher, but not the frozen base model of an adapter); for larger ones `written` reports changes. Tensors
    that share memory with a trained weight are left out.

    Args:
        model: the model.
        trained: the weights that the optimizer trains.

    Attributes:
        parameters: all parameters of the model.
    """

    def __init__(self, model: nn.Module, trained: Sequence[Tensor]) -> None:
        self.parameters = list(model.parameters())
        own, moving = set(map(id, trained)), {memory(w) for w in trained} - {0}
        untrained = {id(p) for p in self.parameters if id(p) not in own}
        counts = [p.numel() if has_values(p) else 0 for p in self.parameters if id(p) in untrained]
        copied = sum(counts) <= _LARGE * sum(w.numel() for w in trained)
        self._tables: list[tuple[Any, dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: list[_Kept] = []
        for prefix, module in model.named_modules():
            for table in (module._buffers, module._parameters, _attributes(module)):
                entries = {key: value for key, value in table.items() if key not in _OWN}
                self._tables.append((table, entries))
                for key, value in entries.items():
                    if type(value) in (list, dict):
                        self._containers.append((value, value.copy()))
                    elif isinstance(value, Tensor) and id(value) not in own and _copyable(value, moving):
                        name = f"{prefix}.{key}" if prefix else key
                        self._tensors.append(_Kept(name, value, copy=copied or id(value) not in untrained))

    @torch.no_grad()
    def restore(self) -> None:
        """Restore everything that has changed."""
        for table, entries in self._tables:
            now = dict(table.items())
            for key in now.keys() - entries.keys() - _OWN:
                del table[key]
            for key, value in entries.items():
                if key not in now or now[key] is not value:
                    table[key] = value
        for value, entries in self._containers:
            if isinstance(value, list):
                if len(value) != len(entries) or any(a is not b for a, b in zip(value, entries, strict=True)):
                    value[:] = entries
            elif list(map(id, value.values())) != list(map(id, entries.values())) or value.keys() != entries.keys():
                value.clear()
                value.update(entries)
        for kept in self._tensors:
            kept.restore()

    def written(self) -> str | None:
        """The name of a parameter that was not copied but has been written to; None if there is none."""
        return next((kept.name for kept in self._tensors if kept.written()), None)


class _Kept:
    """A tensor of the snapshot.

    Args:
        name: its name in the model.
        tensor: the tensor.
        copy: whether its values are copied.
    """

    def __init__(self, name: str, tensor: Tensor, *, copy: bool) -> None:
        self.name, self._tensor, self._alias = name, tensor, tensor.detach()
        self._address, self._version = address(tensor), version(tensor)
        self._copy = self._alias.clone() if copy else None

    def restore(self) -> None:
        tensor = self._tensor
        if address(tensor) != self._address or tensor.shape != self._alias.shape:
            tensor.data = self._alias  # its memory was replaced through `.data` or by a resize
        if self._copy is not None and not self._same(self._copy):
            tensor.copy_(self._copy)

    def _same(self, copy: Tensor) -> bool:
        """Whether the values equal the copy; if they cannot be compared, whether the version counter is the same."""
        tensor = self._tensor
        if tensor.layout is not torch.strided or tensor.is_meta:
            return version(tensor) == self._version
        return torch.equal(*bits([tensor, copy]))

    def written(self) -> bool:
        return self._copy is None and version(self._tensor) != self._version


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {} if type(module).__module__.startswith("torch.") else module.__dict__


def _copyable(x: Tensor, moving: set[int]) -> bool:
    return x.grad_fn is None and has_values(x) and memory(x) not in moving
