"""Find the weights of a model in a saved object: state dicts, nested checkpoints, modules, and prefixed names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

# Name parts that DataParallel, torch.compile, FSDP and activation checkpointing add to the names of parameters.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_COUNTERS = ("n_averaged",)  # stored by torch's AveragedModel besides the weights
_OPTIONAL = ("num_batches_tracked", "_extra_state")  # not required by load_state_dict
_AVERAGED = re.compile(r"(?:^|[_.])(?:ema|swa|avg|averaged?|shadow|teacher|target)\d*(?:$|[_.])", re.IGNORECASE)
_DEEPEST = 4


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Result of `find_weights`: a state dict that fits the model.

    Args:
        name: where it was found: the keys that lead to it and the prefix of its names, joined by dots. Empty at the
            top.
        state: its entries by the model's own names.
        aside: names of entries without the prefix, which do not belong to the model.
        others: names of other state dicts that also fit.
    """

    name: str
    state: dict[str, Any]
    aside: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def remarks(self) -> list[str]:
        """Sentences about the choice that should be shown to the user."""
        remarks = []
        if self.others:
            remarks.append(
                f"the weights under {self.name!r} are used; those under {listed(self.others)} fit too (choose them "
                "with key=, or --key on the command line)."
            )
        if self.aside:
            remarks.append(
                f"the weights under {self.name!r} are used; other entries are ignored: {listed(self.aside)}."
            )
        return remarks


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside DataParallel, DistributedDataParallel and torch.compile wrappers."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def find_weights(
    own: Mapping[str, Tensor], saved: Any, *, needed: Collection[str] | None = None, key: str | None = None
) -> Weights | None:
    """Find the weights of a model in a saved object.

    The object may be a state dict, a mapping that contains state dicts (nested up to four levels), or a module. Names
    may have a prefix, such as "model." in a Lightning checkpoint, and may contain the name parts that wrappers add.

    Args:
        own: the model's tensors by name, with tied tensors under each of their names.
        saved: the object that was read.
        needed: names that must be present. Default None: all that `load_state_dict` requires.
        key: name, or a part of the name, of the weights to use if several fit. Default None: those that are not a
            moving average over training.

    Returns:
        The weights; None if no state dict in the object has the model's names.

    Raises:
        ValueError: several state dicts fit, or none has this key.
    """
    fits = [fit for place, state in state_dicts(saved) for fit in _fits(own, place, state, needed)]
    if len(fits) > 1 and (shaped := [fit for fit in fits if not misshapen(own, fit.state)]):
        fits = shaped
    if key is not None and fits:
        chosen = [fit for fit in fits if f".{key}." in f".{fit.name}."]
        if not chosen:
            raise ValueError(
                f"no weights of the model were found under {key!r}; weights were found "
                f"{_under([fit.name for fit in fits])}."
            )
        fits = chosen
    unlike: list[Weights] = []
    for fit in fits:
        if not any(_equal(fit.state, other.state) for other in unlike):
            unlike.append(fit)
    if len(unlike) < 2:
        return unlike[0] if unlike else None
    plain = [fit for fit in unlike if not _AVERAGED.search(fit.name)]
    if len(plain) != 1:
        raise ValueError(
            f"several weights fit the model, {_under([fit.name for fit in unlike])}; choose one with key= "
            "(--key on the command line)."
        )
    others = tuple(fit.name for fit in unlike if fit is not plain[0])
    return Weights(name=plain[0].name, state=plain[0].state, aside=plain[0].aside, others=others)


def state_dicts(saved: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every state dict in a saved object, with the keys that lead to it, joined by dots."""
    if isinstance(saved, nn.Module):
        yield place, dict(saved.state_dict())
    elif "_parameters" in (parts := getattr(saved, "__dict__", {})) and "_modules" in parts:
        yield place, dict(_of_module(saved))
    elif isinstance(saved, Mapping):
        named = {k: v for k, v in saved.items() if isinstance(k, str)}
        # Modules may add any kind of state under a name that ends in _extra_state.
        state = {k: v for k, v in named.items() if isinstance(v, Tensor) or k.endswith("_extra_state")}
        if state or (not saved and not depth):
            yield place, state
        for name, value in named.items():
            if depth < _DEEPEST and name not in state:
                yield from state_dicts(value, f"{place}.{name}" if place else name, depth + 1)


def misfit(own: Mapping[str, Tensor], saved: Any) -> str:
    """Describe how the best matching state dict differs from the model; empty if there is no state dict."""
    best: tuple[int, str, dict[str, Any]] | None = None
    for place, state in state_dicts(saved):
        for prefix in {"", *_prefixes(own, state)}:
            inside = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
            count = len(own.keys() & inside.keys())
            if best is None or count > best[0]:
                best = (count, _joined(place, prefix), inside if prefix else state)
    if best is None:
        return ""
    _, name, state = best
    missing = [k for k in own if k not in state and not k.endswith(_OPTIONAL)]
    more = [k for k in state if k not in own and k not in _COUNTERS]
    parts = [f"missing in the file: {listed(missing)}"] if missing else []
    parts += [f"unexpected in the file: {listed(more)}"] if more else []
    parts += [f"of another shape: {bad}" for bad in misshapen(own, state)[:3]]
    return (f"under {name!r}, " if name else "") + "; ".join(parts)


def misshapen(own: Mapping[str, Tensor], state: Mapping[str, Any]) -> list[str]:
    """Describe the entries whose shape differs from that in the model."""
    return [
        f"{name!r}, {tuple(other.shape)} in the file and {tuple(tensor.shape)} in the model"
        for name, tensor in own.items()
        if isinstance(other := state.get(name), Tensor)
        and isinstance(tensor, Tensor)
        and not is_lazy(tensor)
        and other.shape != tensor.shape
        and not (tensor.dim() == 0 and other.shape == (1,))  # load_state_dict accepts this
    ]


def listed(names: Collection[str], most: int = 4) -> str:
    """List the first names, and how many more there are."""
    shown = ", ".join(repr(name) for name in list(names)[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _fits(
    own: Mapping[str, Tensor], place: str, state: Mapping[str, Any], needed: Collection[str] | None
) -> Iterator[Weights]:
    """Yield each way in which a state dict has all needed names and, under its prefix, no unknown ones."""
    names, entries = _bare(own), _bare(state)
    if len(set(names.values())) < len(names) or len(set(entries.values())) < len(entries):
        # Without the parts that wrappers add, names would collide.
        names, entries = {n: n for n in own}, {n: n for n in state}
    own_of = {short: name for name, short in names.items()}
    same: dict[int, list[str]] = {}
    for name, tensor in own.items():
        same.setdefault(id(tensor), []).append(name)
    wanted = [n for n in own if not n.endswith(_OPTIONAL)] if needed is None else list(needed)
    shorts = {short: state[name] for name, short in entries.items()}

    def whole(state: Mapping[str, Any]) -> dict[str, Any] | None:
        """The state by the model's own names, with missing tied tensors added; None if it does not fit."""
        if any(short not in own_of for short in state):
            return None
        made = {own_of[short]: value for short, value in state.items()}
        for name in wanted:
            if name not in made:
                alias = next((n for n in same[id(own[name])] if n in made), None)
                if alias is None:
                    return None
                made[name] = made[alias]
        return made

    for prefix in _prefixes(own_of, shorts):
        inside = {k[len(prefix) :]: v for k, v in shorts.items() if k.startswith(prefix)}
        if not prefix:
            inside = {k: v for k, v in inside.items() if k in own_of or k not in _COUNTERS}
        if (made := whole(inside)) is not None:
            aside = tuple(k for k in shorts if not k.startswith(prefix) and k not in _COUNTERS)
            yield Weights(name=_joined(place, prefix), state=made, aside=aside)
    # The reverse case: weights of an inner module, for a model that only wraps it.
    for outer in _shared(list(own_of)):
        if shorts and (made := whole({outer + k: v for k, v in shorts.items()})) is not None:
            yield Weights(name=place, state=made)


def _prefixes(own: Collection[str], state: Collection[str]) -> list[str]:
    """The possible prefixes of the model's names in a state dict, the empty prefix first."""
    pivot = max(own, key=lambda name: (not name.endswith(_OPTIONAL), name.count("."), len(name)), default="")
    prefixes = {k[: len(k) - len(pivot)] for k in state if pivot and f".{k}".endswith(f".{pivot}")}
    return ["", *sorted(prefixes - {""})]


def _shared(names: list[str]) -> list[str]:
    """The prefixes that all names share, each with its dot."""
    if not names:
        return []
    parts = [name.split(".")[:-1] for name in names]
    prefixes, k = [], 0
    while all(len(p) > k and p[k] == parts[0][k] for p in parts):
        k += 1
        prefixes.append(".".join(parts[0][:k]) + ".")
    return prefixes


def _bare(names: Collection[str]) -> dict[str, str]:
    """Names without the parts that wrappers add."""
    return {name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in names}


def _of_module(module: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The state dict entries of a module object that was read as plain attributes."""
    parts = module.__dict__
    left_out = parts.get("_non_persistent_buffers_set") or ()
    for kind in ("_parameters", "_buffers"):
        for name, tensor in (parts.get(kind) or {}).items():
            if tensor is not None and not (kind == "_buffers" and name in left_out):
                yield prefix + name, tensor
    for name, child in (parts.get("_modules") or {}).items():
        if "_modules" in getattr(child, "__dict__", {}):
            yield from _of_module(child, f"{prefix}{name}.")


def _equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        v is other[k] or (isinstance(v, Tensor) and isinstance(other[k], Tensor) and torch.equal(v, other[k]))
        for k, v in one.items()
    )


def _joined(place: str, prefix: str) -> str:
    return ".".join(part for part in (place, prefix.removesuffix(".")) if part)


def _under(names: list[str]) -> str:
    return ", ".join(f"under {name!r}" if name else "at the top" for name in names)
