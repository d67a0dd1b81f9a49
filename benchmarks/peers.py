"""Other ways to write SAM, for comparison: each optional, none a dependency.

Packages take part where they are installed. Two well-known implementations are single files of other repositories; they
take part if `--peer-file` names a copy:

    --peer-file davda54=sam.py       # github.com/davda54/sam, sam.py
    --peer-file composer=sam.py      # github.com/mosaicml/composer, composer/algorithms/sam/sam.py
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from benchmarks.nets import LR, MOMENTUM, make_base

RHO = 0.05
LOOP = "plain per-tensor loop"
COUNTED = (LOOP, "pytorch_optimizer")  # those that run without values, on the meta device
OWN_BASE = ("torchzero", "heavyball")  # those that step with a base of their own, which has one implementation
FILES = {"davda54": "davda54/sam, sam.py", "composer": "mosaicml/composer, composer/algorithms/sam/sam.py"}
Build = Callable[[nn.Module, str], "Peer"]


class Peer(Protocol):
    """An optimizer of another implementation; `update` runs a whole step with a closure."""

    def zero_grad(self) -> None: ...

    def state_dict(self) -> Any: ...

    def update(self, closure: Callable[[], Any]) -> None: ...


class PlainLoop:
    """SAM as a loop over tensors, the form of the common single-file implementations.

    Per tensor: its norm, a copy of the weight, a scaled gradient added; afterwards the pointer goes back to the copy.
    """

    def __init__(self, params: Any, base: str = "default", rho: float = RHO) -> None:
        self.params = list(params)
        self.base = make_base(self.params, base)
        self.rho = rho
        self.saved: dict[nn.Parameter, torch.Tensor] = {}

    def zero_grad(self) -> None:
        """Clear all gradients."""
        self.base.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The base's checkpoint."""
        return self.base.state_dict()

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Climb to w + eps."""
        norms = [p.grad.norm(p=2) for p in self.params if p.grad is not None]
        scale = self.rho / (torch.stack(norms).norm(p=2) + 1e-12)
        for p in self.params:
            if p.grad is not None:
                self.saved[p] = p.data.clone()
                p.add_(p.grad * scale)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        """Back to w, and the base's step."""
        for p, data in self.saved.items():
            p.data = data
        self.saved.clear()
        self.base.step()


class Adapted:
    """Another implementation as a `Peer`.

    Args:
        optimizer: what clears gradients and makes checkpoints.
        update: runs a step of it with a closure.
    """

    def __init__(self, optimizer: Any, update: Callable[[Any, Callable[[], Any]], object]) -> None:
        self.optimizer, self._update = optimizer, update
        self.zero_grad, self.state_dict = optimizer.zero_grad, optimizer.state_dict

    def update(self, closure: Callable[[], Any]) -> None:
        """Run a step."""
        self._update(self.optimizer, closure)


def _two_calls(optimizer: Any, closure: Callable[[], Any]) -> None:
    closure()
    optimizer.first_step(zero_grad=True)
    closure()
    optimizer.second_step()


def _plain(model: nn.Module, base: str) -> Peer:
    return Adapted(PlainLoop(model.parameters(), base), _two_calls)


def _options(base: str) -> dict[str, Any]:
    return {"lr": LR, "momentum": MOMENTUM, **({} if base == "default" else {base: True})}


def _pytorch_optimizer(model: nn.Module, base: str) -> Peer:
    from pytorch_optimizer import SAM

    return Adapted(SAM(model.parameters(), torch.optim.SGD, rho=RHO, **_options(base)), _two_calls)


def _torchzero(model: nn.Module, base: str) -> Peer:
    import torchzero as tz

    parts = tz.m.SAM(rho=RHO), tz.m.HeavyBall(MOMENTUM, ema_init="zeros"), tz.m.LR(LR)  # its own base
    optimizer = tz.Optimizer(model.parameters(), *parts)
    return Adapted(optimizer, lambda o, closure: o.step(lambda backward=True: closure()))


def _heavyball(model: nn.Module, base: str) -> Peer:
    import heavyball

    weights = list(model.parameters())
    optimizer = heavyball.SAMWrapper(weights, heavyball.SGD(weights, lr=LR, beta=MOMENTUM), ball=RHO)
    return Adapted(optimizer, lambda o, closure: o.step(closure))


def _davda54(module: types.ModuleType) -> Build:
    def build(model: nn.Module, base: str) -> Peer:
        return Adapted(module.SAM(model.parameters(), torch.optim.SGD, rho=RHO, **_options(base)), _two_calls)

    return build


def _composer(module: types.ModuleType) -> Build:
    def build(model: nn.Module, base: str) -> Peer:
        optimizer = module.SAMOptimizer(make_base(model.parameters(), base), rho=RHO)
        return Adapted(optimizer, lambda o, closure: o.step(lambda **_: closure()))

    return build


PACKAGES: dict[str, Build] = {
    "pytorch_optimizer": _pytorch_optimizer,
    "torchzero": _torchzero,
    "heavyball": _heavyball,
}
_OF_FILES = {"davda54": _davda54, "composer": _composer}


@contextlib.contextmanager
def _without_composer() -> Iterator[None]:
    """Empty modules where composer's file imports the rest of its package, which it needs for its trainer only."""
    names = {
        "composer": (),
        "composer.core": ("Algorithm", "Event", "State"),
        "composer.loggers": ("Logger",),
        "composer.trainer": (),
        "composer.trainer._scaler": ("ClosureGradScaler",),
        "composer.utils": ("ensure_tuple",),
    }
    for name, members in names.items():
        module = types.ModuleType(name)
        for member in members:
            setattr(module, member, type(member, (), {}))
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def _load(name: str, path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"peer_{name}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SystemExit(f"--peer-file {name}={path}: no such Python file.")
    module = importlib.util.module_from_spec(spec)
    with _without_composer():
        spec.loader.exec_module(module)
    return module


def found(files: Mapping[str, Path] | None = None, base: str = "default") -> dict[str, Build]:
    """Implementations that can be run here with this kind of base: label -> builder for (model, kind of base)."""
    builders: dict[str, Build] = {LOOP: _plain}
    for name, build in PACKAGES.items():
        if importlib.util.find_spec(name) and (base == "default" or name not in OWN_BASE):
            builders[f"{name} {version(name)}"] = build
    for name, path in (files or {}).items():
        builders[f"{name}'s file"] = _OF_FILES[name](_load(name, path))
    return builders


def missing(files: Mapping[str, Path] | None = None, base: str = "default") -> list[str]:
    """Notes on the implementations that are not compared, and why."""
    notes = [f"{name}: not installed." for name in PACKAGES if not importlib.util.find_spec(name)]
    if base != "default":
        notes += [f"{name}: steps with a base of its own; see it with --base default." for name in OWN_BASE]
    return notes + [
        f"{what}: no copy given (--peer-file {n}=FILE)." for n, what in FILES.items() if n not in (files or {})
    ]


def _named_file(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if name not in FILES or not path:
        raise argparse.ArgumentTypeError(f"expected NAME=FILE with NAME of {', '.join(FILES)}, got {text!r}")
    return name, Path(path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The option that names single files."""
    parser.add_argument(
        "--peer-file",
        action="append",
        default=[],
        type=_named_file,
        metavar="NAME=FILE",
        help=f"a copy of another implementation: {', '.join(FILES)}",
    )
