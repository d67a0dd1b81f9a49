"""The engine: an optimizer and a pure function that run any recipe."""

from flatmin.optim.build import wrap
from flatmin.optim.checkpoint import base_state_dict
from flatmin.optim.criterion import Criterion
from flatmin.optim.functional import value_and_grad
from flatmin.optim.sam import SAM

__all__ = ["SAM", "Criterion", "base_state_dict", "value_and_grad", "wrap"]
