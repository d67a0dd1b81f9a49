"""Plant faults in a copy of the package, one at a time, and see whether the ordinary tests notice.

    python tools/mutants.py [NAME ...]

The faults are in tools/mutants.toml, each with the tests that must notice it; names choose among them. Two run side by
side, on copies in a temporary folder: the checkout stays as it is. The end is 1 if a fault survives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "flatmin"


@dataclass(frozen=True)
class Fault:
    """One entry of the table; the fields are told there."""

    name: str
    file: str
    find: str
    put: str
    breaks: str
    tests: tuple[str, ...]
    only: str = ""

    def planted(self) -> str:
        """The text of the file with the fault.

        Raises:
            ValueError: the text to replace is not there exactly once.
        """
        text = (PACKAGE / self.file).read_text(encoding="utf-8")
        if (count := text.count(self.find)) != 1:
            raise ValueError(
                f"the planted fault {self.name} does not fit the code any more: its text is {count} times in "
                f"src/flatmin/{self.file}. Correct `find` and `put` in tools/mutants.toml."
            )
        return text.replace(self.find, self.put)

    def words(self) -> list[str]:
        """What pytest is asked for."""
        return [*self.tests, *(["-k", self.only] if self.only else [])]


def faults() -> list[Fault]:
    """The whole table."""
    with (ROOT / "tools" / "mutants.toml").open("rb") as file:
        table = tomllib.load(file)
    return [Fault(name, **{**entry, "tests": tuple(entry["tests"])}) for name, entry in table.items()]


def run(folder: Path, words: Sequence[str]) -> tuple[int, str]:
    """Pytest's exit code and output, with the package in this folder."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def copied(folder: str) -> Path:
    """A copy of the package in a folder."""
    shutil.copytree(PACKAGE, Path(folder) / "flatmin", ignore=shutil.ignore_patterns("__pycache__"))
    return Path(folder)


def verdict(fault: Fault) -> tuple[str, str]:
    """("killed", "SURVIVED" or "ERROR", the test that noticed, or what pytest said)."""
    with tempfile.TemporaryDirectory() as folder:
        (copied(folder) / "flatmin" / fault.file).write_text(fault.planted(), encoding="utf-8")
        code, said = run(Path(folder), fault.words())
    if code == 0:
        return "SURVIVED", f"{fault.breaks} No test noticed: {' '.join(fault.words())}"
    failed = [line.removeprefix("FAILED ").split(" - ")[0] for line in said.splitlines() if line.startswith("FAILED")]
    if code == 1 and failed:
        return "killed", failed[0]
    return "ERROR", said[-2000:]


def unchanged(chosen: Iterable[Fault]) -> None:
    """Run the tests named on a copy without a fault.

    Raises:
        SystemExit: the copy is not what is tested, or a test fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked = "import flatmin; print(flatmin.__file__)"
        env = {**os.environ, "PYTHONPATH": str(copied(folder))}
        found = subprocess.run([sys.executable, "-c", asked], env=env, capture_output=True, text=True, check=True)
        if not found.stdout.startswith(folder):
            raise SystemExit(f"the tests would run on {found.stdout.strip()} and not on the copy in {folder}.")
        code, said = run(Path(folder), sorted({file for fault in chosen for file in fault.tests}))
        if code:
            raise SystemExit(f"without a fault, the tests end with {code}:\n{said[-2000:]}")


def main(names: list[str]) -> int:
    """Plant the faults of these names, or all; 0 if each is noticed."""
    table = {fault.name: fault for fault in faults()}
    if unknown := [name for name in names if name not in table]:
        raise SystemExit(f"unknown fault {unknown[0]!r} (faults: {', '.join(table)}).")
    chosen = [table[name] for name in names or table]
    for fault in chosen:
        fault.planted()
    begun = time.monotonic()
    with ThreadPoolExecutor(2) as lanes:
        clean = lanes.submit(unchanged, chosen)
        found = []
        for fault, (word, detail) in zip(chosen, lanes.map(verdict, chosen), strict=True):
            print(f"{word:8}  {fault.name:32} {detail}", flush=True)
            found.append(word)
        clean.result()
    print(f"{found.count('killed')} of {len(found)} planted faults were noticed, in {time.monotonic() - begun:.0f} s.")
    return int(found.count("killed") < len(found))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
