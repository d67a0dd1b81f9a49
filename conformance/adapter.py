"""Base classes of adapters, which connect an implementation to the behaviours."""

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
    """The implementation does not offer this; the message says what."""


@dataclass(frozen=True)
class Base:
    """The base optimizer: a class and its options, for implementations that build it or take a built one."""

    cls: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, params: Any) -> Any:
        """Build the base optimizer."""
        return self.cls(params, **self.options)


def sgd(**options: Any) -> Base:
    """SGD with lr 0.1, momentum 0.9 and weight decay 0.01, unless other options are given."""
    return Base(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, **options})


def adamw(**options: Any) -> Base:
    """AdamW with lr 0.02 and weight decay 0.1, unless other options are given."""
    return Base(torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1, **options})


class Subject:
    """An optimizer under test. Subclasses override what their implementation does differently from torch.

    Attributes:
        optimizer: the object that a user of the implementation holds.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self, closure: Closure) -> Any:
        """Take one step as the implementation's documentation describes it.

        The closure clears the gradients, computes the loss, calls backward and returns the loss.
        """
        return self.bare_step(closure)

    def bare_step(self, closure: Closure) -> Any:
        """Call only `optimizer.step(closure)`, as trainers do."""
        return self.optimizer.step(closure)

    def by_hand(self, backward: Closure) -> None:
        """Take one step in a loop that calls backward itself; `backward` adds to the gradients."""
        raise NotOfferedError("no loop without a closure")

    def scaled_step(self, scaler: Any, closure: Closure) -> None:
        """Take one step with the GradScaler that was given to `build`, and update it. The closure scales its loss."""
        raise NotOfferedError("no GradScaler")

    def accumulate(self, closures: list[Closure]) -> None:
        """Take one step on micro-batches. Each closure clears the gradients and returns its samples' mean loss.

        Default: one closure that runs all of them, which works with any implementation that takes closures.
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
        """Load a checkpoint of the plain base optimizer, in the way that the implementation comes closest to."""
        self.load_state_dict(state)

    @property
    def schedulable(self) -> Any:
        """The object that the documentation passes to a learning-rate scheduler."""
        return self.optimizer

    @property
    def param_groups(self) -> list[Any]:
        """The param groups."""
        return self.optimizer.param_groups

    def zero_grad(self) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad()

    def state_dict(self) -> Any:
        """The checkpoint."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Load a checkpoint."""
        self.optimizer.load_state_dict(state)


class Adapter:
    """Builds an implementation. A module for `python -m conformance MODULE` defines one as `ADAPTER`.

    Attributes:
        title: name in the table.
        distribution: the package whose version is printed; "" for code that is not a package.
        forms: the methods that it implements: "sam", "asam".
    """

    title: ClassVar[str]
    distribution: ClassVar[str] = ""
    forms: ClassVar[frozenset[str]] = frozenset({"sam"})

    def version(self) -> str:
        """The version; "" if there is none."""
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
        """Build an optimizer on parameters or param groups (which may set their own "rho").

        Args:
            params: parameters, or param groups.
            base: the base optimizer.
            rho: the radius.
            form: the method; None: any that the implementation has.
            model: the module being trained, for implementations that need it.
            options: `scaler`, a GradScaler; `clip_norm`, the largest norm of the gradient that the base optimizer
                takes; `ascent_sync`, "none" for a perturbation by each replica's own gradient.

        Raises:
            NotOfferedError: an option or a method that the implementation does not have.
        """
        raise NotImplementedError

    def plain(self, params: Iterable[Any], base: Base) -> Any:
        """The plain optimizer that rho = 0 should be equal to."""
        return base.make(params)

    def asked(self, ws: list[Tensor], gs: list[Tensor], rho: float) -> list[Tensor]:
        """The perturbation by the implementation's formula. Default: SAM's."""
        norm = torch.stack([g.double().norm() for g in gs]).norm()
        return [rho * g.double() / norm for g in gs]

    def claims(self, form: Form | None, options: dict[str, Any]) -> None:
        """Raise NotOfferedError for a method or an option that the implementation does not have."""
        if form is not None and form not in self.forms:
            raise NotOfferedError(f"does not offer {form.upper()}")
        for name in options:
            raise NotOfferedError(f"no {name}")


def one_radius(params: Iterable[Any]) -> None:
    """Raise NotOfferedError for groups with their own rho, for implementations that do not support it."""
    if any(isinstance(p, dict) and "rho" in p for p in params):
        raise NotOfferedError("one rho for all groups")


def uses_batchnorm(model: nn.Module | None) -> bool:
    """Whether a model has BatchNorm layers, for implementations that have a helper for them."""
    kind = nn.modules.batchnorm._BatchNorm
    return model is not None and any(isinstance(m, kind) for m in model.modules())
