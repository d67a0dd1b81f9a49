"""The engine: the optimizer and the pure function that run any recipe."""

from flatmin.optim.average import WeightAverage
from flatmin.optim.build import wrap
from flatmin.optim.checkpoint import base_state_dict
from flatmin.optim.criterion import Criterion
from flatmin.optim.functional import value_and_grad
from flatmin.optim.lora import FlatLoRA
from flatmin.optim.recorded import RecordedLogits
from flatmin.optim.sam import SAM

__all__ = [
    "SAM",
    "Criterion",
    "FlatLoRA",
    "RecordedLogits",
    "WeightAverage",
    "base_state_dict",
    "value_and_grad",
    "wrap",
]
