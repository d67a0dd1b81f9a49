"""flatmin: sharpness-aware training for PyTorch.

    >>> import torch, flatmin
    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05, model=model)

Names are imported on first use, so that command lines can answer before torch is imported.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flatmin.methods import METHODS, Method, Recipe, compose, method_table
    from flatmin.optim import SAM, Criterion, base_state_dict, value_and_grad, wrap
    from flatmin.train.saved import load

__version__ = "0.2.0"

_HOME = {
    "SAM": "flatmin.optim",
    "Criterion": "flatmin.optim",
    "base_state_dict": "flatmin.optim",
    "value_and_grad": "flatmin.optim",
    "wrap": "flatmin.optim",
    "METHODS": "flatmin.methods",
    "Method": "flatmin.methods",
    "Recipe": "flatmin.methods",
    "compose": "flatmin.methods",
    "method_table": "flatmin.methods",
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
