"""All behaviours, by theme, in the order of the table."""

from __future__ import annotations

from conformance.behaviours import contract, loops, numerics, precision, replicas, state, tensors, trajectory
from conformance.verdict import Behaviour

THEMES = (trajectory, contract, tensors, numerics, state, loops, precision, replicas)
ALL: tuple[Behaviour, ...] = tuple(b for theme in THEMES for b in theme.BEHAVIOURS)
BY_NAME: dict[str, Behaviour] = {b.name: b for b in ALL}
TITLES: dict[str, str] = {theme.__name__.rpartition(".")[2]: (theme.__doc__ or "").strip() for theme in THEMES}
