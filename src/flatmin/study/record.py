"""What the runs of a study record besides their result."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from flatmin.train.options import Options, Recording
from flatmin.train.settings import fill


@dataclass(frozen=True, kw_only=True)
class Record(Recording):
    """What runs of a study record while they train; it does not change their outcome.

    Raises:
        ValueError: see `Recording`; or diagnostics without log_every.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.diagnostics and not self.log_every:
            raise ValueError("diagnostics=true needs log_every, the number of updates between recorded lines.")

    @property
    def word(self) -> str:
        """The record as text for config.json; empty if nothing is recorded."""
        if not (self.log_every or self.measure_every):
            return ""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    def kept_in(self, labels: Mapping[str, str]) -> bool:
        """Whether a run with these labels recorded at least what this record asks for."""
        theirs = Record.of(labels)
        logged = not self.log_every or (theirs.log_every and self.log_every % theirs.log_every == 0)
        if self.log_every and self.diagnostics and not theirs.diagnostics:
            return False
        measured = not self.measure_every or self._measures == theirs._measures
        return bool(logged and measured)

    @property
    def _measures(self) -> tuple[object, ...]:
        return self.measure_every, self.measures, self.measure_examples, self.measure_m, self.measure_rho

    @classmethod
    def of(cls, labels: Mapping[str, str]) -> Record:
        """What a run with these labels recorded; an empty record if the label cannot be read."""
        try:
            return fill(cls, json.loads(labels.get("record") or "{}"), origin="record")
        except ValueError:
            return cls()

    def with_also(self, other: Record) -> Record:
        """A record that covers both; if both measure while training, the measurements of this one are taken."""
        often = math.gcd(self.log_every, other.log_every)
        measured = self if self.measure_every else other
        return dataclasses.replace(measured, log_every=often, diagnostics=self.diagnostics or other.diagnostics)

    def options(self, **others: bool | int | float) -> Options:
        """The record as options of a run, together with other options."""
        return Options(**dataclasses.asdict(self), **others)  # type: ignore[arg-type]
