"""Adapters by name; each is imported only when it is needed."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

from conformance.adapter import Adapter

NAMES = (
    "flatmin",
    "single_file",
    "pytorch_optimizer",
    "torchzero",
    "heavyball",
    "temperon",
    "zij",
    "infty",
    "unifiedsam",
    "sam_sps",
)


def load(name: str) -> Adapter:
    """Load an adapter by its name, by the dotted name of a module, or by a file; the module defines `ADAPTER`.

    Raises:
        ImportError: the adapter or its implementation is not installed.
    """
    if name in NAMES:
        module = importlib.import_module(f"conformance.adapters.{name}")
    elif name.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(name).stem, name)
        if spec is None or spec.loader is None or not Path(name).exists():
            raise ImportError(f"no file {name}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(name)
    adapter = module.ADAPTER
    return adapter() if isinstance(adapter, type) else adapter


def missing(name: str) -> str:
    """Why an adapter cannot be loaded; "" if it can."""
    try:
        load(name).version()
    except ImportError as error:
        return str(error)
    return ""
