"""A finished run with its records, and the numbers that a table shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flatmin.optim.diagnostics import CLASSES
from flatmin.stats import PERCENT, UNBOUNDED, Ends
from flatmin.train.result import Epoch, Result

_ENDS: Mapping[str, Ends] = {
    **dict.fromkeys(("test_acc", "test_best", "test_top5", "val_acc", "memorised"), PERCENT),
    **dict.fromkeys(("train_ce", "seconds", "misclassified", "flipped"), (0.0, math.inf)),
    **dict.fromkeys((*CLASSES, "ratio_larger", "same_sign", "error_rate"), (0.0, 1.0)),
}
_PART = 10  # NAME@first and NAME@last are means over the first and the last tenth


def ends_of(column: str) -> Ends:
    """The smallest and the largest value that a column can have."""
    return _ENDS.get(column.partition("@")[0], UNBOUNDED)


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A finished run.

    Args:
        result: the result.
        lines: the epochs.
        steps: lines of steps.jsonl, if the study records any.
        measures: lines of measures.jsonl, if the study records any.
        report: measured flatness of the network, as `flatmin.measure.Report.to_dict`; None if it was not measured.
    """

    result: Result
    lines: Sequence[Epoch] = ()
    steps: Sequence[Mapping[str, Any]] = ()
    measures: Sequence[Mapping[str, Any]] = ()
    report: Mapping[str, Any] | None = None

    def number(self, column: str) -> float | None:
        """The value of a column for this run, in the column's unit; None if there is none.

        Args:
            column: see `flatmin.study.spec.StudySpec.columns`.
        """
        value = self._found(column)
        return None if value is None or not math.isfinite(value) else value

    def _found(self, column: str) -> float | None:
        result = self.result
        if column in ("test_acc", "test_top5", "val_acc"):
            value = (result.chosen or {}).get(column)
            return None if value is None else float(value)
        if column == "test_best":
            value = (result.best or {}).get("test_acc")
            return None if value is None else float(value)
        if column == "memorised":
            return None if result.last is None or result.last[column] is None else float(result.last[column])
        if column == "lambda_max":
            return None if result.lambda_max is None else float(result.lambda_max["value"])
        if column in ("train_ce", "seconds"):
            value = result.train_ce if column == "train_ce" else result.seconds
            return None if value is None else float(value)
        name, _, when = column.partition("@")
        return self._diagnostic(name, when) if when else self._measured(name)

    def _diagnostic(self, name: str, when: str) -> float | None:
        values = [float(step[name]) for step in self.steps if step.get(name) is not None]
        count = max(1, len(values) // _PART)
        part = values[:count] if when == "first" else values[-count:]
        return math.fsum(part) / len(part) if part else None

    def _measured(self, name: str) -> float | None:
        for section in (self.report or {}).get("sections", {}).values():
            if name in section["quantities"]:
                value = section["quantities"][name]["value"]
                return None if value is None else float(value)
        return None
