"""flatmin: sharpness-aware training for PyTorch.

    >>> import torch, flatmin
    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05, model=model)

Names are loaded on first use, so that command lines answer before torch is imported.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flatmin.engine import SAM, Criterion, base_state_dict, value_and_grad, wrap
    from flatmin.recipes import METHODS, Method, Recipe, compose, method_table
    from flatmin.train.saved import load

__version__ = "0.1.0"

_HOME = {
    "SAM": "flatmin.engine",
    "Criterion": "flatmin.engine",
    "base_state_dict": "flatmin.engine",
    "value_and_grad": "flatmin.engine",
    "wrap": "flatmin.engine",
    "METHODS": "flatmin.recipes",
    "Method": "flatmin.recipes",
    "Recipe": "flatmin.recipes",
    "compose": "flatmin.recipes",
    "method_table": "flatmin.recipes",
    "load": "flatmin.train.saved",
}

__all__ = [
    "METHODS",
    "SAM",
    "Criterion",
    "Method",
    "Recipe",
    "__version__",
    "base_state_dict",
    "compose",
    "load",
    "method_table",
    "value_and_grad",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'flatmin' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
