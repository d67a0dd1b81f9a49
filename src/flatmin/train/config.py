"""The resolved configuration of one run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from flatmin.train.settings import at_least

Scalar = bool | int | float | str


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides the outcome of one run.

    Args:
        method: composed name, e.g. "vasso+asam".
        rho: radius, or the factor of a method that has one in its place (sgdhess); None for the plain base.
        params: parameters of the method's parts by qualified name, e.g. {"direction.theta": 0.8}.
        seed: of initialisation, label noise and batch order. Two methods with one seed see the same of all three.
        epochs: length of training and of the cosine schedule.
        batch_size: the last batch of an epoch may be smaller.
        micro_batches: equal parts of a batch, for methods with an ascent for each; a batch of fewer samples has
            one part a sample.
        lr: at the start. SGD; the cosine falls once an epoch to lr (1 + cos(pi (E - 1) / E)) / 2 in the last.
        momentum: of SGD.
        weight_decay: of SGD; not part of any loss that is climbed or measured.
        noise: share of training labels replaced by wrong ones.
        model: a name of `flatmin.models.zoo.MODELS`, such as "conv" or "resnet18", or "pkg:function".
        data: "digits", or "pkg:function".
        split_seed: of the split of the built-in data; the same for all runs.
        plugins: modules that bring methods.
        measure: whether lambda_max is measured at the end.
        device: "cpu" or "cuda".

    Raises:
        ValueError: a value out of range.
    """

    method: str
    rho: float | None = None
    params: Mapping[str, Scalar] = field(default_factory=dict)
    seed: int = 0
    epochs: int = 30
    batch_size: int = 64
    micro_batches: int = 4
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    noise: float = 0.0
    model: str = "conv"
    data: str = "digits"
    split_seed: int = 0
    plugins: tuple[str, ...] = ()
    measure: bool = True
    device: str = "cpu"

    def __post_init__(self) -> None:
        at_least(self, "epochs", 1)
        at_least(self, "batch_size", 1)
        at_least(self, "micro_batches", 1)
        at_least(self, "lr", 0)
        at_least(self, "momentum", 0)
        at_least(self, "weight_decay", 0)
        at_least(self, "noise", 0, high=1)
        at_least(self, "seed", 0)
        if self.rho is not None:
            at_least(self, "rho", 0)


def stream(seed: int, purpose: str) -> int:
    """A seed for one purpose, unrelated to the same seed for another.

    Example:
        >>> stream(0, "noise") == stream(0, "noise") != stream(0, "order")
        True
    """
    return int.from_bytes(hashlib.sha256(f"{purpose}:{seed}".encode()).digest()[:7], "big")
