"""What a benchmark returns, and how it is printed, kept as JSON lines and written as a dated page."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


@dataclass
class Table:
    """A titled table of strings; the first column is aligned left, the others right."""

    title: str
    headers: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    def text(self) -> str:
        """The table for a terminal."""
        lines = [list(self.headers), *map(list, self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.headers))]

        def render(line: Sequence[str]) -> str:
            cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
            return "  ".join(cells).rstrip()

        return "\n".join([self.title, render(lines[0]), "  ".join("-" * w for w in widths), *map(render, lines[1:])])

    def markdown(self) -> str:
        """The table for a page."""
        rule = ["---", *["---:"] * (len(self.headers) - 1)]
        lines = [self.headers, rule, *self.rows]
        return "\n".join([f"**{self.title}**", "", *("| " + " | ".join(line) + " |" for line in lines)])


@dataclass
class Gate:
    """A limit that must hold: passed if `value` is within it."""

    name: str
    value: str
    limit: str
    passed: bool


@dataclass
class BenchmarkResult:
    """Everything a benchmark has to say.

    Args:
        name: of the benchmark.
        tables: in the order they are printed.
        gates: limits that the exit code answers for.
        notes: sentences under the tables.
        settings: what was asked for.
        raw: samples and counts behind the tables.
    """

    name: str
    tables: list[Table] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every gate holds."""
        return all(g.passed for g in self.gates)

    def all_tables(self) -> list[Table]:
        """The tables, with the gates as the last one."""
        if not self.gates:
            return self.tables
        rows = [(g.name, g.value, g.limit, "pass" if g.passed else "FAIL") for g in self.gates]
        return [*self.tables, Table("Gates", ("gate", "value", "limit", "verdict"), list(rows))]

    def text(self) -> str:
        """The result for a terminal."""
        return "\n\n".join([f"== {self.name}", *(t.text() for t in self.all_tables()), *self.notes])

    def markdown(self) -> str:
        """The result for a page."""
        asked = ", ".join(f"{k} {v}" for k, v in self.settings.items())
        parts = [f"## {self.name}", asked, *(t.markdown() for t in self.all_tables()), *self.notes]
        return "\n\n".join(p for p in parts if p)


def environment() -> dict[str, Any]:
    """Versions, processor, load and commit; no names of machines or folders."""
    versions: dict[str, Any] = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": _commit(),
        "flatmin": _flatmin_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    if torch.cuda.is_available():
        versions |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return versions


def _commit() -> str | None:
    """The commit of the source tree, with "+" if it was changed since; None where git cannot say."""
    try:
        head = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"], cwd=HERE, capture_output=True, text=True
        )
    except OSError:
        return None
    return head.stdout.strip() if head.returncode == 0 else None


def _flatmin_version() -> str:
    import flatmin

    return flatmin.__version__


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "unknown")


def append_json(path: Path, result: BenchmarkResult, env: dict[str, Any]) -> None:
    """Add the run to a file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({"environment": env, **asdict(result)}) + "\n")


def write_page(path: Path, results: Sequence[BenchmarkResult], env: dict[str, Any], command: str) -> None:
    """Write results as one Markdown page."""
    where = f"{env['cores']} cores, shared, CPU time of one thread" if "gpu" not in env else str(env["gpu"])
    facts = [f"- {k}: {v}" for k, v in env.items() if v is not None]
    head = [f"# Benchmarks of flatmin, {env['date'][:10]} ({where})", f"Written by `{command}`.", "\n".join(facts)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join([*head, *(r.markdown() for r in results)]) + "\n")


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and 10 % quantile of samples."""

    median: float
    q25: float
    q75: float
    p10: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """The spread of at least two samples."""
        q = quantiles(samples, n=20, method="inclusive")
        return cls(median(samples), q[4], q[14], q[1])

    @property
    def relative_iqr(self) -> float:
        """Distance of the quartiles in units of the median."""
        return (self.q75 - self.q25) / self.median

    def ratio(self) -> str:
        """Median and quartiles of a ratio, e.g. 1.034 [1.02-1.05]."""
        return f"{self.median:.3f} [{self.q25:.2f}-{self.q75:.2f}]"
