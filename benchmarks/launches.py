"""Counts what a training step would launch on a CUDA device, without one: ops by dispatch, launches by a model.

The step runs on torch's meta device: it takes every path that an accelerator would take, computes nothing, and no value
exists that could be read unnoticed. Reads are answered here as if all were well: a float is 0.0, an integer 1, and a
pair of integers (1, 0), the engine's two verdicts (the ascent was finite, the descent was not).

The model
    * Views, `empty`-like allocations and metadata launch nothing.
    * An op that brings a value to the host (`item`, `nonzero`, `equal`, a copy to the CPU, ...) counts as one launch
      and one synchronisation.
    * `_foreach_*`, `_amp_foreach_*` and `_fused_*` ops launch as torch's multi_tensor_apply does: a launch is full at
      110, 64, 48, 36 or 30 tensors for 1 to 5 lists (inputs and outputs) or at 320 blocks of 65536 elements, whichever
      comes first. Recent CUDA builds have limits seven times larger, so this counts too many rather than too few.
    * They leave that route, and launch once per tensor, where the lists mix dtypes or layouts, or where a scalar tensor
      has another dtype than the list.
    * Every other op counts as one launch.

What it leaves out: convolutions and reductions of several launches, equally many in the floor and in the step under
test; two launches inside `_foreach_norm`, which clears and collects its results, and one more per 128 tensors of a
`stack`: so a step that takes one norm over n tensors has 2 + n // 128 launches more than printed. `kernels` measures.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

TENSORS = (110, 64, 48, 36, 30)
BLOCKS, CHUNK = 320, 65536
_FREE = {
    *("_unsafe_view", "_reshape_alias", "lift", "lift_fresh", "record_stream", "set_", "resize_"),
    *("promote_types", "result_type", "is_pinned"),
}
_READS = {
    *("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "allclose"),
    *("unique_dim", "_unique", "_unique2", "unique_consecutive"),
}
# In-place and without a kernel for the meta device.
_NO_META = {"_fused_sgd_", "_amp_foreach_non_finite_check_and_unscale_"}
# Answered here (as is addmm) where all shapes are equal: torch works out shapes on the meta device in Python, slowly.
_ELEMENTWISE = {"add", "mul", "relu", "threshold_backward"}
# Lists that the kernels address apart from the tensor lists.
_ASIDE = {"state_steps"}


def multi_tensor_launches(sizes: Sequence[int], depth: int) -> int:
    """Launches of multi_tensor_apply over tensors with `sizes` elements in `depth` lists.

    >>> multi_tensor_launches([32] * 402, depth=1), multi_tensor_launches([32] * 402, depth=2)
    (4, 7)
    >>> multi_tensor_launches([65536 * 321], depth=1)
    2
    """
    limit = TENSORS[min(depth, len(TENSORS)) - 1]
    launches = tensors = blocks = 0
    for size in sizes:
        chunks = math.ceil(size / CHUNK)
        tensors += chunks > 0
        for chunk in range(chunks):
            blocks += 1
            last = chunk == chunks - 1
            if (tensors == limit and last) or blocks == BLOCKS:
                launches, blocks, tensors = launches + 1, 0, int(not last)
    return launches + (blocks > 0)


def _same_route(lists: Sequence[Sequence[Tensor]], scalars: Sequence[Tensor], copies: bool) -> bool:
    """Whether one kernel serves the lists: one dtype (copies may convert) and one layout at each position."""
    for position in zip(*lists, strict=True):
        head = position[0]
        if any(t.stride() != head.stride() or t.shape != head.shape for t in position[1:]):
            return False
    dtypes = [{t.dtype for t in tensors} for tensors in lists]
    if copies:
        return all(len(d) == 1 for d in dtypes)
    return len(set().union(*dtypes, {s.dtype for s in scalars})) == 1


def _foreach_launches(name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
    lists = [v for k, v in given.items() if k not in _ASIDE and isinstance(v, (list, tuple)) and v]
    lists = [v for v in lists if isinstance(v[0], Tensor)]
    if not lists:
        return 0
    norm = name.startswith("_foreach_norm")
    if isinstance(out, (list, tuple)) and out and not norm and not name.endswith("_"):
        lists.append(out)
    plain = name.startswith("_foreach_")
    scalars = [v for k, v in given.items() if plain and isinstance(v, Tensor)]
    if plain and not _same_route(lists, scalars, name.startswith("_foreach_copy")):
        return len(lists[0])
    return multi_tensor_launches([t.numel() for t in lists[0]], len(lists))


@functools.cache
def is_view(func: Any) -> bool:
    """Whether an op only gives another look at its input."""
    returns = func._schema.returns
    return bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write


class Recorder(TorchDispatchMode):
    """Counts launches and synchronisations, and follows the storages that ops make.

    Attributes:
        launches: modelled launches since `reset()`.
        syncs: reads of values by the host since `reset()`.
        by_op: launches by the op's name.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.reset()

    def reset(self) -> None:
        """Start counting from nothing; storages are followed on."""
        self.launches = self.syncs = 0
        self.by_op: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        out = self._run(name, func, args, kwargs)
        launches = self._launches(name, func, args, kwargs, out)
        if launches:
            self.launches += launches
            self.by_op[name] += launches
        self.syncs += name in _READS or _leaves_device(name, args, kwargs, out)
        self._follow(out)
        return out

    @staticmethod
    def _run(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        on_meta = bool(args) and isinstance(args[0], Tensor) and args[0].is_meta
        if on_meta and name in ("_local_scalar_dense", "item"):
            return 0.0 if args[0].is_floating_point() else 1
        if on_meta and name in ("is_nonzero", "equal"):
            return False
        if name == "_to_copy" and on_meta and kwargs.get("device") == torch.device("cpu"):
            output = torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            if output.numel() == 2 and not output.is_floating_point():
                output[0] = 1
            return output
        if on_meta and name in _ELEMENTWISE and _alike(args):
            return torch.empty_like(args[0])
        if on_meta and name == "addmm":
            return args[1].new_empty(args[1].shape[0], args[2].shape[1])
        if name in _NO_META and args[0][0].is_meta:
            return None
        return func(*args, **kwargs)

    def _launches(self, name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
        if is_view(func) or name in _FREE or "empty" in name:
            return 0
        if name.startswith(("_foreach_", "_amp_foreach_", "_fused_sgd", "_fused_adam", "_fused_adagrad")):
            return _foreach_launches(name, func, args, kwargs, out)
        return 1

    def _follow(self, out: Any) -> None:
        for t in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                key = storage._cdata
                entry = self._storages.get(key)
                if entry is None or entry[0].expired():
                    self._storages[key] = StorageWeakRef(storage), storage.nbytes()

    def live_bytes(self) -> int:
        """Bytes of the storages made under this recorder that something still holds."""
        self._storages = {k: v for k, v in self._storages.items() if not v[0].expired()}
        return sum(size for _, size in self._storages.values())


def _alike(args: Sequence[Any]) -> bool:
    head = args[0]
    return all(t.shape == head.shape and t.dtype == head.dtype for t in args if isinstance(t, Tensor))


def _leaves_device(name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> bool:
    """Whether an op copies from a device to the CPU."""
    if name == "copy_":
        return args[0].device.type == "cpu" and args[1].device.type != "cpu"
    return name == "_to_copy" and args[0].device.type != "cpu" and out.device == torch.device("cpu")
