"""A model's weights in what people save: state dicts, containers of them, whole modules, prefixes of wrappers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

# Names that DataParallel, torch.compile, FSDP and activation checkpointing put into the names of parameters.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_COUNTERS = ("n_averaged",)  # what torch's AveragedModel keeps beside the weights
_OPTIONAL = ("num_batches_tracked", "_extra_state")  # what load_state_dict can do without
_AVERAGED = re.compile(r"(?:^|[_.])(?:ema|swa|avg|averaged?|shadow|teacher|target)\d*(?:$|[_.])", re.IGNORECASE)
_DEEPEST = 4


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A state dict that was found.

    Args:
        name: where: the keys that lead to it and the prefix of its names, joined by dots; empty at the top.
        state: its entries by the model's own names.
        aside: names of entries beside the prefix that do not belong to the model.
        others: names of other state dicts there that fit as well.
    """

    name: str
    state: dict[str, Any]
    aside: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def remarks(self) -> list[str]:
        """What a reader must know of the choice, in sentences."""
        remarks = []
        if self.others:
            remarks.append(
                f"the weights under {self.name!r} are taken; those under {listed(self.others)} fit as well "
                "(key= names them, --key on the command line)."
            )
        if self.aside:
            remarks.append(
                f"the weights under {self.name!r} are taken, and what is beside them left out: {listed(self.aside)}."
            )
        return remarks


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel and torch.compile."""
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
    """The weights of a model in something that was saved.

    That is a state dict, a mapping that holds some, however deep, or a module. Names may begin with a prefix, such as
    "model." in a checkpoint of Lightning, and hold the words that wrappers add.

    Args:
        own: the model's tensors by name, tied ones by each of their names.
        saved: what was read.
        needed: names that must be there. Default: all that `load_state_dict` asks for.
        key: which, where several fit: a name or a part of one. Default: those that are no average over training.

    Returns:
        None if no state dict there has the model's names.

    Raises:
        ValueError: several that fit, or none of this key.
    """
    fits = [fit for place, state in state_dicts(saved) for fit in _fits(own, place, state, needed)]
    if len(fits) > 1 and (shaped := [fit for fit in fits if not misshapen(own, fit.state)]):
        fits = shaped
    if key is not None and fits:
        chosen = [fit for fit in fits if f".{key}." in f".{fit.name}."]
        if not chosen:
            raise ValueError(
                f"no weights of the model are under {key!r}; there are weights {_under([fit.name for fit in fits])}."
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
    """Every state dict in something that was saved, with the keys that lead to it, joined by dots."""
    if isinstance(saved, nn.Module):
        yield place, dict(saved.state_dict())
    elif "_parameters" in (parts := getattr(saved, "__dict__", {})) and "_modules" in parts:
        yield place, dict(_of_module(saved))
    elif isinstance(saved, Mapping):
        named = {k: v for k, v in saved.items() if isinstance(k, str)}
        # Modules may add state of any kind under a name of their own.
        state = {k: v for k, v in named.items() if isinstance(v, Tensor) or k.endswith("_extra_state")}
        if state or (not saved and not depth):
            yield place, state
        for name, value in named.items():
            if depth < _DEEPEST and name not in state:
                yield from state_dicts(value, f"{place}.{name}" if place else name, depth + 1)


def misfit(own: Mapping[str, Tensor], saved: Any) -> str:
    """In words, how the state dict that is nearest to the model differs from it; empty if there is no state dict."""
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
    """The entries whose shape is another than the model's, in words."""
    return [
        f"{name!r}, {tuple(other.shape)} in the file and {tuple(tensor.shape)} in the model"
        for name, tensor in own.items()
        if isinstance(other := state.get(name), Tensor)
        and isinstance(tensor, Tensor)
        and not is_lazy(tensor)
        and other.shape != tensor.shape
        and not (tensor.dim() == 0 and other.shape == (1,))  # as load_state_dict takes it
    ]


def listed(names: Collection[str], most: int = 4) -> str:
    """Some of the names, and how many more there are."""
    shown = ", ".join(repr(name) for name in list(names)[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _fits(
    own: Mapping[str, Tensor], place: str, state: Mapping[str, Any], needed: Collection[str] | None
) -> Iterator[Weights]:
    """The ways in which a state dict holds all that is needed and, under its prefix, nothing that is unknown."""
    names, entries = _bare(own), _bare(state)
    if len(set(names.values())) < len(names) or len(set(entries.values())) < len(entries):
        names, entries = {n: n for n in own}, {n: n for n in state}  # the words of wrappers tell names apart here
    own_of = {short: name for name, short in names.items()}
    same: dict[int, list[str]] = {}
    for name, tensor in own.items():
        same.setdefault(id(tensor), []).append(name)
    wanted = [n for n in own if not n.endswith(_OPTIONAL)] if needed is None else list(needed)
    shorts = {short: state[name] for name, short in entries.items()}

    def whole(state: Mapping[str, Any]) -> dict[str, Any] | None:
        """By the model's own names, with those that are tied to one that is there."""
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
    # The other way round: weights of the module inside a model that does nothing but hold it.
    for outer in _shared(list(own_of)):
        if shorts and (made := whole({outer + k: v for k, v in shorts.items()})) is not None:
            yield Weights(name=place, state=made)


def _prefixes(own: Collection[str], state: Collection[str]) -> list[str]:
    """What may stand before the model's names in those of a state dict; the empty prefix first."""
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
    """Names without the words of wrappers."""
    return {name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in names}


def _of_module(module: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The entries of a state dict of a module of which only the attributes were read."""
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
