"""The engine: one optimizer wrapper and one functional door that run every recipe."""

from flatmin.engine.build import wrap
from flatmin.engine.checkpoint import base_state_dict
from flatmin.engine.criterion import Criterion
from flatmin.engine.functional import value_and_grad
from flatmin.engine.optimizer import SAM

__all__ = ["SAM", "Criterion", "base_state_dict", "value_and_grad", "wrap"]
