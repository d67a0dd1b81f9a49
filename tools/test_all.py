"""Run every test in every environment, slow ones included, and date the outcome in benchmarks/results/test-all.json.

    python tools/test_all.py [NAME=PYTHON ...]

runs the tests of this environment in two processes, and beside them with each further interpreter those of the folder
tests/NAME, one thread each. Then it plants faults and runs the tests that must notice them (tools/mutants.py). What
pytest says is printed when a suite has ended.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "test-all.json"
OUTCOMES = ("failures", "errors", "skipped")


def suite(name: str, python: str, words: list[str]) -> dict[str, int]:
    """Run pytest with these words; its exit code, the tests by outcome, and the seconds."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        done = subprocess.run(
            [python, "-m", "pytest", "-q", "--durations=15", f"--junitxml={report}", *words],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        counts = dict.fromkeys(("tests", *OUTCOMES), 0)
        if report.is_file():
            for one in ElementTree.parse(report).getroot().iter("testsuite"):
                counts = {key: value + int(one.get(key, 0)) for key, value in counts.items()}
    print(f"=== {name}\n{done.stdout}", flush=True)
    passed = counts.pop("tests") - sum(counts.values())
    return {"exit_code": done.returncode, "passed": passed, **counts, "seconds": round(time.monotonic() - begun)}


def mutants() -> dict[str, int]:
    """Plant the faults; the exit code, how many there are and were noticed, and the seconds."""
    begun = time.monotonic()
    words = [sys.executable, str(ROOT / "tools" / "mutants.py")]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(f"=== mutants\n{done.stdout}", flush=True)
    verdicts = [
        line.split()[0] for line in done.stdout.splitlines() if line.startswith(("killed", "SURVIVED", "ERROR"))
    ]
    return {
        "exit_code": done.returncode,
        "planted": len(verdicts),
        "noticed": verdicts.count("killed"),
        "seconds": round(time.monotonic() - begun),
    }


def main(arguments: list[str]) -> int:
    """Run, record, and return 0 if all passed."""
    import torch

    if any("=" not in word for word in arguments):
        raise SystemExit(f"expected NAME=PYTHON words, got {' '.join(arguments)}")
    others = dict(word.split("=", 1) for word in arguments)
    with ThreadPoolExecutor(2) as lanes:
        # What has an environment of its own is not run twice.
        shared = ["-n", "2", "--dist", "worksteal", *(f"--ignore=tests/{name}" for name in others)]
        here = lanes.submit(suite, "here", sys.executable, shared)
        there = lanes.submit(lambda: {name: suite(name, others[name], [f"tests/{name}"]) for name in others})
        suites = {"here": here.result(), **there.result()}
    suites["mutants"] = mutants()
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "suites": suites,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{sys.platform}-{platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(any(suite["exit_code"] for suite in suites.values()))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
