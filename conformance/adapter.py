"""The few lines between an implementation and the behaviours."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

Closure = Callable[[], Any]
Form = Literal["sam", "asam"]


class NotOfferedError(Exception):
    """The implementation does not claim to do this; the words say what."""


@dataclass(frozen=True)
class Base:
    """The optimizer below: by class for implementations that construct it, by instance for those that take one."""

    cls: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, params: Any) -> Any:
        """The plain optimizer."""
        return self.cls(params, **self.options)


def sgd(**options: Any) -> Base:
    """SGD, by default with momentum and weight decay."""
    return Base(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, **options})


def adamw(**options: Any) -> Base:
    """AdamW."""
    return Base(torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1, **options})


class Subject:
    """An optimizer under test. A subclass changes what its implementation does in another way than torch.

    Attributes:
        optimizer: what a user of the implementation holds.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self, closure: Closure) -> Any:
        """One step as the implementation's documentation has it.

        The closure zeroes the gradients, computes the loss, calls backward and returns the loss.
        """
        return self.bare_step(closure)

    def bare_step(self, closure: Closure) -> Any:
        """`optimizer.step(closure)` and nothing else, as trainers call it."""
        return self.optimizer.step(closure)

    def by_hand(self, backward: Closure) -> None:
        """One step in a loop that calls backward itself; `backward` adds to the gradients."""
        raise NotOfferedError("no loop without a closure")

    def scaled_step(self, scaler: Any, closure: Closure) -> None:
        """One step whose closure scales its loss by the GradScaler given to `build`, and the scaler's update."""
        raise NotOfferedError("no GradScaler")

    def accumulate(self, closures: list[Closure]) -> None:
        """One step on micro-batches; each closure zeroes, and returns the mean loss of its own samples.

        By default one closure that runs them all, which any implementation with closures can do.
        """
        params = [p for group in self.param_groups for p in group["params"]]

        def whole() -> Any:
            total: list[Any] = [None] * len(params)
            loss: Any = 0.0
            for closure in closures:
                loss = loss + closure().detach() / len(closures)
                for i, p in enumerate(params):
                    if p.grad is not None:
                        share = p.grad / len(closures)
                        total[i] = share if total[i] is None else total[i] + share
            for p, g in zip(params, total, strict=True):
                p.grad = g
            return loss

        self.step(whole)

    def load_plain(self, state: Any) -> None:
        """Take a checkpoint of the plain base, in the way that is closest to the implementation's own."""
        self.load_state_dict(state)

    @property
    def schedulable(self) -> Any:
        """What the documentation gives to a learning-rate scheduler."""
        return self.optimizer

    @property
    def param_groups(self) -> list[Any]:
        """The groups."""
        return self.optimizer.param_groups

    def zero_grad(self) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad()

    def state_dict(self) -> Any:
        """The checkpoint."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Take a checkpoint."""
        self.optimizer.load_state_dict(state)


class Adapter:
    """How an implementation is built. A module for `python -m conformance MODULE` names one as `ADAPTER`.

    Attributes:
        title: for the table.
        distribution: the package whose version is printed; empty for code that is no package.
        forms: the ascents that it claims to compute: "sam", "asam".
    """

    title: ClassVar[str]
    distribution: ClassVar[str] = ""
    forms: ClassVar[frozenset[str]] = frozenset({"sam"})

    def version(self) -> str:
        """The version, empty if there is none."""
        return importlib.metadata.version(self.distribution) if self.distribution else ""

    def build(
        self,
        params: Iterable[Any],
        base: Base,
        *,
        rho: float,
        form: Form | None = None,
        model: nn.Module | None = None,
        **options: Any,
    ) -> Subject:
        """An optimizer on parameters or groups (which may set their own "rho").

        Args:
            params: parameters, or groups.
            base: the optimizer below.
            rho: the radius.
            form: the ascent; None: any that the implementation has.
            model: the module being trained, for implementations that want it.
            options: `scaler`, a GradScaler; `clip_norm`, of the gradient that the base takes; `ascent_sync`, "none"
                for an ascent on each replica's own gradient.

        Raises:
            NotOfferedError: an option or a form that the implementation does not have.
        """
        raise NotImplementedError

    def plain(self, params: Iterable[Any], base: Base) -> Any:
        """The optimizer that rho = 0 stands for."""
        return base.make(params)

    def asked(self, ws: list[Tensor], gs: list[Tensor], rho: float) -> list[Tensor]:
        """The displacement that the formula asks for, where it is not SAM's."""
        norm = torch.stack([g.double().norm() for g in gs]).norm()
        return [rho * g.double() / norm for g in gs]

    def claims(self, form: Form | None, options: dict[str, Any]) -> None:
        """Refuse what `build` was asked for and the implementation does not have."""
        if form is not None and form not in self.forms:
            raise NotOfferedError(f"does not offer {form.upper()}")
        for name in options:
            raise NotOfferedError(f"no {name}")


def one_radius(params: Iterable[Any]) -> None:
    """Refuse groups, for implementations that say nothing of a radius for each."""
    if any(isinstance(p, dict) and "rho" in p for p in params):
        raise NotOfferedError("one rho for all groups")


def uses_batchnorm(model: nn.Module | None) -> bool:
    """Whether a model has BatchNorm statistics, for implementations that ship a helper for them."""
    kind = nn.modules.batchnorm._BatchNorm
    return model is not None and any(isinstance(m, kind) for m in model.modules())
