"""Everything for a machine with a GPU in one command: GPU tests, benchmarks, a study, training runs, each with a limit.

Needs no installation and no network: the package is found in `src`. Writes into FOLDER: gpu.md (what ran, how it ended,
the benchmark tables), results.jsonl (the benchmarks with raw samples), log.txt (all output), study.tar.gz, and
train.tar.gz: the folders of training runs without checkpoints and weights.
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

HELP = "tests, benchmarks, a study and training runs on a machine with a GPU, into a folder"
ROOT = Path(__file__).resolve().parents[1]
PARTS = (
    *("tests", "counts", "kernels", "step", "step-bf16", "perturb"),
    *("train", "train-small", "train-compile", "compiled"),
)
LIMIT, LIMITS = 180.0, {"train": 240.0, "train-small": 120.0, "train-compile": 240.0}
FOLDERS = ("study", "train")
LARGE = frozenset({"checkpoints", "weights.pt"})


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
    parser.add_argument("--study", metavar="ARGS", help="also run `flatmin study ARGS`, e.g. 'bisam-cifar10 seed=0'")
    parser.add_argument(
        "--train",
        action="append",
        default=[],
        metavar="ARGS",
        help="also run `flatmin train ARGS`, e.g. 'cifar100-resnet18 data_dir=DIR device=cuda'; may be given again",
    )
    parser.add_argument(
        "--limit", type=float, help="seconds for each part (default 180; train and train-compile 240, train-small 120)"
    )
    parser.add_argument("--study-limit", type=float, default=300, help="seconds for the study (default 300)")
    parser.add_argument("--train-limit", type=float, default=420, help="seconds for each training run (default 420)")


def jobs(options: argparse.Namespace) -> list[Job]:
    """The commands asked for, in order."""
    folder = options.folder.resolve()
    bench = [sys.executable, "-m", "benchmarks"]
    keep = ["--json", str(folder / "results.jsonl"), "--page"]
    step = [*bench, "step", "--device", "cuda", "--methods", "sam", "asam", "vasso"]
    train = [*bench, "train", "--device", "cuda", "--seconds"]
    limits = {name: options.limit or LIMITS.get(name, LIMIT) for name in PARTS}
    commands = {
        "tests": [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"],
        "counts": [*bench, "counts"],
        "kernels": [*bench, "kernels"],
        "step": step,
        "step-bf16": [*step, "--autocast", "--nets", "vit-d192", "resnet18-w64"],
        "perturb": [*bench, "perturb", "--device", "cuda"],
        # They stop by themselves, a little before they would be stopped.
        "train": [*train, f"{0.85 * limits['train']:g}"],
        "train-small": [*train, f"{0.85 * limits['train-small']:g}", "--parts", "epoch", "--net", "resnet20"],
        "train-compile": [
            *(*train, f"{0.95 * limits['train-compile']:g}", "--parts", "epoch", "--whole", "0", "--compile"),
            *("--arms", "compile", "graph", "original, 2"),
        ],
        "compiled": [*bench, "compiled", "--device", "cuda", "--nets", "mlp20", "resnet18-w64"],
    }
    jobs_ = []
    for name in PARTS:
        if name in options.parts:
            page = None if name == "tests" else folder / f".{name}.md"
            more = [] if page is None else [*keep, str(page)]
            jobs_.append(Job(name, [*commands[name], *more], limits[name], page))
    flatmin = [sys.executable, "-m", "flatmin"]
    if options.study is not None:
        study = [*flatmin, "study", *shlex.split(options.study), "--out", str(folder / "study")]
        jobs_.append(Job("study", study, options.study_limit))
    for number, arguments in enumerate(options.train, start=1):
        run = [*flatmin, "train", *shlex.split(arguments), "--out", str(folder / "train")]
        jobs_.append(Job(f"run {number}", run, options.train_limit))
    return jobs_


def pack(folder: Path) -> None:
    """Pack what the study and the training runs have left so far, without what is too large to carry."""
    for name in FOLDERS:
        if (folder / name).is_dir():
            with tarfile.open(folder / f"{name}.tar.gz", "w:gz") as archive:
                archive.add(folder / name, name, filter=_small)


def _small(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if LARGE.intersection(Path(entry.name).parts) else entry


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
        pack(options.folder)
    return 0 if good else 1
