"""Support for framework wrappers that derive from the optimizer's class: Lightning's and Fabric's."""

from __future__ import annotations

import operator
from typing import Any

from torch.optim import Optimizer

# Ends in step(), which must be the wrapper's own, since the framework counts steps and calls its hooks there.
_ON_THE_WRAPPER = frozenset({"second_step"})


def reach_through(cls: type) -> None:
    """Make a class that a framework derives from its wrapper and the optimizer's class use the optimizer inside.

    Such a wrapper forwards reads to its attribute `optimizer` but inherits methods from the optimizer's class. These
    would run on the wrapper and set attributes there. This function makes everything that the wrapper does not define
    itself be read and set on the optimizer inside. Other classes are not changed.

    Args:
        cls: the new class.
    """
    wrapper, *imitated = cls.__mro__[1:]
    if issubclass(wrapper, Optimizer) or not isinstance(getattr(wrapper, "optimizer", None), property):
        return
    for owner in imitated[: imitated.index(Optimizer)]:
        for name in vars(owner):
            taken = name.startswith("__") and name != "__deepcopy__"
            if not (taken or hasattr(wrapper, name) or name in _ON_THE_WRAPPER):
                setattr(cls, name, property(operator.attrgetter(f"optimizer.{name}")))

    def own(self: Any, name: str) -> bool:
        return name in self.__dict__ or hasattr(wrapper, name)

    def __setattr__(self: Any, name: str, value: Any) -> None:  # noqa: N807
        object.__setattr__(self, name, value) if own(self, name) else setattr(self.optimizer, name, value)

    def __delattr__(self: Any, name: str) -> None:  # noqa: N807
        object.__delattr__(self, name) if own(self, name) else delattr(self.optimizer, name)

    setattr(cls, "__setattr__", __setattr__)  # noqa: B010
    setattr(cls, "__delattr__", __delattr__)  # noqa: B010
