"""Find a user's own function by "package.module:function"."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from flatmin.words import suggest


def search_here() -> None:
    """Make modules in the working directory importable, as `python -m` does; the console script does not."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)


def find_module(name: str, *, option: str) -> ModuleType:
    """Import a module that an option names.

    Raises:
        ValueError: the module does not exist, or importing it fails.
    """
    search_here()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise ValueError(
                f"{option}: there is no module {error.name!r}, neither in the working directory nor among the "
                "installed packages."
            ) from error
        raise ValueError(f"{option}: importing {name!r} failed: {error}.") from error
    except Exception as error:
        raise ValueError(f"{option}: importing {name!r} failed: {type(error).__name__}: {error}.") from error


def find_function(spec: str, *, option: str) -> Callable[..., Any]:
    """Import the function that "package.module:function" names.

    Raises:
        ValueError: the text has another form, or there is no such module or function.
    """
    module_name, colon, function_name = spec.partition(":")
    if not colon or not module_name or not function_name:
        raise ValueError(f"{option}={spec} does not have the form package.module:function.")
    module = find_module(module_name, option=option)
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [name for name in vars(module) if callable(getattr(module, name)) and not name.startswith("_")]
        raise ValueError(f"{option}: {module_name!r} has no function {function_name!r}{suggest(function_name, names)}")
    return function  # type: ignore[no-any-return]
