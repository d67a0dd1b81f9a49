"""`flatmin.wrap`: wraps a base optimizer with a method by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from flatmin.methods import Method, Recipe, compose
from flatmin.optim.criterion import Criterion
from flatmin.optim.distributed import AscentSync
from flatmin.optim.sam import SAM, NonFinite


def wrap(
    base: Optimizer,
    method: str | Recipe = "sam",
    *,
    rho: float | None = None,
    model: nn.Module | None = None,
    criterion: Criterion | None = None,
    table: Mapping[str, Method] | None = None,
    nonfinite: NonFinite = "skip",
    freeze_batchnorm: bool = True,
    freeze_state: bool = True,
    replay_rng: bool = True,
    generators: Sequence[Any] = (),
    eps: float | None = None,
    seed: int = 0,
    diagnostics: bool = False,
    scaler: Any = None,
    clip_norm: float | None = None,
    ascent_sync: AscentSync = "all",
    flat: bool = False,
    **params: Any,
) -> SAM:
    """Wrap a base optimizer with a method, given by name, with the parameters of its parts as keywords.

        >>> import torch, flatmin
        >>> model = torch.nn.Linear(4, 3)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> criterion = flatmin.Criterion(torch.nn.CrossEntropyLoss())
        >>> optimizer = flatmin.wrap(base, "vasso+bisam-log", rho=0.1, theta=0.8, criterion=criterion)
        >>> optimizer.recipe.name
        'vasso+bisam-log'

    Args:
        base: a constructed torch optimizer.
        method: a name, names joined by "+", or a `Recipe`. Default "sam".
        rho: radius of the perturbation. Default: that of the method (`recipe.default_rho`).
        table: the methods to choose from; see `flatmin.compose`. Default: all.
        params: parameters of the method's parts; see `flatmin.compose`.
        model: see `SAM`.
        criterion: see `SAM`.
        nonfinite: see `SAM`.
        freeze_batchnorm: see `SAM`.
        freeze_state: see `SAM`.
        replay_rng: see `SAM`.
        generators: see `SAM`.
        eps: see `SAM`.
        seed: see `SAM`.
        diagnostics: see `SAM`.
        scaler: see `SAM`.
        clip_norm: see `SAM`.
        ascent_sync: see `SAM`.
        flat: see `SAM`.

    Returns:
        The optimizer. Use it in place of the base optimizer.

    Raises:
        ValueError, TypeError: the errors of `SAM` and `flatmin.compose`.
    """
    if isinstance(method, str):
        method = compose(method, table, **params)
    elif params:
        raise ValueError(f"a Recipe has its own parameters, but {sorted(params)[0]!r} was given too; set it there.")
    return SAM(
        base,
        rho=rho,
        recipe=method,
        model=model,
        criterion=criterion,
        nonfinite=nonfinite,
        freeze_batchnorm=freeze_batchnorm,
        freeze_state=freeze_state,
        replay_rng=replay_rng,
        generators=generators,
        eps=eps,
        seed=seed,
        diagnostics=diagnostics,
        scaler=scaler,
        clip_norm=clip_norm,
        ascent_sync=ascent_sync,
        flat=flat,
    )
