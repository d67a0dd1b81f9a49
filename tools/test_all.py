"""Run every test, slow ones included, and date the outcome in benchmarks/results/test-all.json.

Words after the script go to pytest; with any, part of the tests may be left out, so nothing is written.
"""

from __future__ import annotations

import datetime
import json
import platform
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

RECORD = Path(__file__).parents[1] / "benchmarks" / "results" / "test-all.json"


class Counts:
    """A pytest plugin that counts outcomes."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test once: its call, or the set-up or tear-down that went wrong or was skipped."""
        if report.when == "call" or not report.passed:
            self.outcomes[report.outcome] += 1


def main(arguments: list[str]) -> int:
    """Run, record, and return pytest's exit code."""
    counts = Counts()
    begun = time.monotonic()
    code = int(pytest.main([*arguments], plugins=[counts]))  # pytest adds its own words to the list
    if not arguments:
        import torch

        record = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "exit_code": code,
            "outcomes": dict(sorted(counts.outcomes.items())),
            "seconds": round(time.monotonic() - begun),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "platform": f"{sys.platform}-{platform.machine()}",
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        }
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
