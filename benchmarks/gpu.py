"""Everything for a machine with a GPU in one command: GPU tests, benchmarks, a study; each under its own time limit.

Needs no installation and no network: the package is found in `src`. Writes into FOLDER: gpu.md (what ran, how it ended,
the benchmark tables), results.jsonl (the benchmarks with raw samples), log.txt (all output), and study.tar.gz.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.results import environment

HELP = "tests, benchmarks and a study on a machine with a GPU, into a folder"
ROOT = Path(__file__).resolve().parents[1]
PARTS = ("tests", "counts", "kernels", "step", "step-bf16", "perturb")


@dataclass(frozen=True)
class Job:
    """A command with a time limit in seconds; `page` is the table page it writes, if any."""

    name: str
    command: list[str]
    limit: float
    page: Path | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the results go; made if missing")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--study", metavar="ARGS", help="also run `flatmin compare ARGS`, e.g. 'device=cuda'")
    parser.add_argument("--limit", type=float, default=180, help="seconds for each part (default 180)")
    parser.add_argument("--study-limit", type=float, default=300, help="seconds for the study (default 300)")


def jobs(options: argparse.Namespace) -> list[Job]:
    """The commands asked for, in order."""
    folder = options.folder.resolve()
    bench = [sys.executable, "-m", "benchmarks"]
    keep = ["--json", str(folder / "results.jsonl"), "--page"]
    step = [*bench, "step", "--device", "cuda", "--methods", "sam", "asam", "vasso"]
    commands = {
        "tests": [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"],
        "counts": [*bench, "counts"],
        "kernels": [*bench, "kernels"],
        "step": step,
        "step-bf16": [*step, "--autocast", "--nets", "vit-d192", "resnet18-w64"],
        "perturb": [*bench, "perturb", "--device", "cuda"],
    }
    found = []
    for name in PARTS:
        if name in options.parts:
            page = None if name == "tests" else folder / f".{name}.md"
            more = [] if page is None else [*keep, str(page)]
            found.append(Job(name, [*commands[name], *more], options.limit, page))
    if options.study is not None:
        study = [sys.executable, "-m", "flatmin.cli.main", "compare", *shlex.split(options.study)]
        found.append(Job("study", [*study, "--out", str(folder / "study")], options.study_limit))
    return found


def run_job(job: Job, log: Path) -> tuple[str, float]:
    """(how it ended, seconds). Output goes to the log; past its limit the job and its children are ended."""
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    start = time.monotonic()
    with log.open("a") as out:
        out.write(f"\n=== {job.name}: {shlex.join(job.command[1:])}\n")
        out.flush()
        process = subprocess.Popen(
            job.command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(job.limit)
            ended = "done" if code == 0 else f"exit code {code}"
            if job.name == "tests" and code == 5:
                ended = "no GPU tests found"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            ended = f"stopped at its limit of {job.limit:g} s"
    return ended, time.monotonic() - start


def run(options: argparse.Namespace) -> int:
    """Run the jobs.

    Returns:
        0 if every part is done, 1 if one is not, 2 without a GPU.
    """
    if not torch.cuda.is_available():
        print("This machine has no CUDA device, so there is nothing to measure here.", file=sys.stderr)
        return 2
    options.folder.mkdir(parents=True, exist_ok=True)
    log = options.folder / "log.txt"
    env = environment()
    lines = [f"# flatmin on {env['gpu']}, {env['date'][:10]}", ""]
    lines += [f"- {k}: {v}" for k, v in env.items() if v is not None] + [
        "",
        "| part | ended | s |",
        "| --- | --- | ---: |",
    ]
    tables: list[str] = []
    good = True
    for job in jobs(options):
        ended, took = run_job(job, log)
        good = good and ended == "done"
        print(f"{job.name}: {ended} ({took:.0f} s)", flush=True)
        lines.append(f"| {job.name} | {ended} | {took:.0f} |")
        if job.page is not None and job.page.exists():
            text = job.page.read_text()
            tables.append(text[text.index("\n## ") + 1 :] if "\n## " in text else text)
            job.page.unlink()
        # Written after every part, so that an interrupted run keeps what it has.
        (options.folder / "gpu.md").write_text("\n".join([*lines, "", *tables]))
    study = options.folder / "study"
    if study.is_dir():
        with tarfile.open(options.folder / "study.tar.gz", "w:gz") as archive:
            archive.add(study, "study")
    return 0 if good else 1
