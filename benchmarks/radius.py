"""What the radius at which the linear prediction breaks says about the radius that validation chooses.

Two networks on the handwritten digits, with and without wrong labels, five methods, five seeds. `flatmin study` trains
at six radii each (benchmarks/radius.toml); beside that every method is trained at its default radius for a quarter of
the epochs, and `flatmin.measure.radius` looks at it before the first update and there. Factors are those of the radius
found. Its test accuracy is that of the nearest radius that was trained with, by its logarithm; it is compared with that
at the default, and at the radius with the best mean validation accuracy.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from benchmarks.results import BenchmarkResult, Table
from flatmin.measure import radius
from flatmin.measure.radius import MULTIPLES, FoundRadius
from flatmin.report import figures
from flatmin.stats import summarise
from flatmin.study.expand import grid_points
from flatmin.study.reading import read_study
from flatmin.train.ascents import ascents
from flatmin.train.config import RunConfig
from flatmin.train.trainer import Trainer, build_recipe

HELP = "the radius found by flatmin.measure.radius beside the one that validation chooses; 40 min on one core"
STUDY = Path(__file__).with_suffix(".toml")
BATCHES = 5
WHEN = ("start", "later")
Key = tuple[str, float, str]  # network, share of wrong labels, method


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of its own."""
    command.add_argument("--out", type=Path, default=Path("flatmin-runs"), metavar="FOLDER", help="of the runs")
    command.add_argument("--archive", type=Path, metavar="FOLDER", help="finished runs to take, see flatmin study")
    command.add_argument(
        "--find-only", action="store_true", help="do not train at the six radii; print nothing of them"
    )
    command.add_argument("--figure", type=Path, metavar="FILE", help="only draw the rise of one case, in a few seconds")


@dataclass(frozen=True)
class Case:
    """A network, data and method, with what was trained and what was found, by seed.

    Args:
        key: which.
        default: the method's radius without a word.
        validation, test: radius -> accuracies in percent, one a seed.
        found: "start" or "later" -> radii found, one a seed; infinite beyond the radii tried.
    """

    key: Key
    default: float
    validation: dict[float, list[float]]
    test: dict[float, list[float]]
    found: dict[str, list[float]]

    @property
    def chosen(self) -> float:
        """The radius with the best mean validation accuracy; of equal ones the smallest."""
        return max(sorted(self.validation), key=lambda rho: fmean(self.validation[rho]))

    @property
    def largest(self) -> float:
        """The largest radius at which the finder looks."""
        return self.default * MULTIPLES[-1]

    def nearest(self, rho: float) -> float:
        """The radius of the grid nearest to this one."""
        return min(sorted(self.test), key=lambda one: abs(math.log(one / rho)))

    def accuracies(self, choice: Callable[[int], float]) -> list[float]:
        """The test accuracy of each seed at the trained radius nearest to the one chosen for it."""
        count = len(next(iter(self.test.values())))
        return [self.test[self.nearest(choice(seed))][seed] for seed in range(count)]

    def choices(self) -> dict[str, Callable[[int], float]]:
        """Ways to choose a radius, by name; those found as they are, or as the largest tried if they lie beyond it."""
        grid = sorted(self.test)
        return {
            "validation": lambda seed: self.chosen,
            "default": lambda seed: self.default,
            **{when: lambda seed, when=when: min(self.found[when][seed], self.largest) for when in WHEN},  # type: ignore[misc]
            **{f"{rho / self.default:g} x default": lambda seed, rho=rho: rho for rho in grid if rho != self.default},  # type: ignore[misc]
        }


def run(options: argparse.Namespace) -> BenchmarkResult:
    """Train, look, compare."""
    if options.figure is not None:
        return _draw(options.figure)
    found = _found(options.out / "radius-found.jsonl")
    result = BenchmarkResult("radius", settings={"study": STUDY.name, "batches": BATCHES})
    if options.find_only:
        result.notes.append(f"{len(found)} radii are in {options.out / 'radius-found.jsonl'}.")
        return result
    _study(options.out, options.archive)
    cases = list(_cases(options.out / "studies" / "radius.seeds.csv", found))
    result.tables = [_radii(cases), _accuracies(cases), _summary(cases)]
    beyond = sum(math.isinf(rho) for case in cases for when in WHEN for rho in case.found[when])
    result.notes += [
        "Accuracies of a radius found are those of the nearest of the six radii that were trained with, of which the "
        "largest is 16 times the default; factors are those of the radius found itself.",
        f"{beyond} radii found lie beyond the largest tried, 64 times the default, and count as that one.",
    ]
    result.raw = {"found": found, "cases": [{**vars(case), "key": list(case.key)} for case in cases]}
    return result


def _study(out: Path, archive: Path | None) -> None:
    command = [sys.executable, "-m", "flatmin", "study", str(STUDY), "--out", str(out), "--workers", "1", "--no-report"]
    subprocess.run([*command, *([] if archive is None else ["--archive", str(archive)])], check=True)


def _found(file: Path) -> list[dict[str, Any]]:
    """What the finder says of every run at the default radius; lines that the file has are not made again."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(line["model"], line["noise"], line["method"], line["seed"]) for line in lines}
    file.parent.mkdir(parents=True, exist_ok=True)
    for config in _configs():
        key = config.model, config.noise, config.method, config.seed
        if key not in done:
            line = dict(zip(("model", "noise", "method", "seed"), key, strict=True)) | _look(config)
            lines.append(line)
            with file.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            print(line, flush=True)
    return lines


def _configs() -> Iterator[RunConfig]:
    """The runs of the study at the methods' default radii."""
    for point in grid_points(read_study(str(STUDY))):
        for config in point.configs.values():
            if config.rho == build_recipe(config).default_rho and config.method != "sgd":
                yield config


def _draw(file: Path) -> BenchmarkResult:
    """The rise at the start and later, of one case."""
    one = ("conv", 0.0, "sam", 0)
    config = next(c for c in _configs() if (c.model, c.noise, c.method, c.seed) == one)
    looks = _looks(config)
    figures.save(figures.rise({"at the start": looks["start"], "after three epochs": looks["later"]}), file, width=6.0)
    notes = [f"{when}: {found.sentence()}" for when, found in looks.items()]
    return BenchmarkResult("radius", settings={"figure": str(file)}, notes=notes)


def _look(config: RunConfig) -> dict[str, Any]:
    """The radii found at the start and after a quarter of the training."""
    line: dict[str, Any] = {}
    for when, found in _looks(config).items():
        line |= {when: found.limit, f"{when}_batches": list(found.limits)}
    return line


def _looks(config: RunConfig) -> dict[str, FoundRadius]:
    """What is found at the start and after a quarter of the training."""
    trainer = Trainer(config)
    order = torch.randperm(len(trainer.data.train), generator=torch.Generator().manual_seed(config.seed))
    index = order[: BATCHES * config.batch_size]
    looks: dict[str, FoundRadius] = {}
    for when in WHEN:
        with ascents(trainer, index) as (optimizer, closures, resolution):
            looks[when] = radius(optimizer, closures, resolution=resolution)
        if when == "start":
            for _ in range(config.epochs // 4):
                for batch in trainer.batches():
                    trainer.step(batch)
    return looks


def _cases(file: Path, found: Sequence[dict[str, Any]]) -> Iterator[Case]:
    """What the study and the finder have come to, from the study's numbers by seed."""
    numbers: dict[tuple[Key, str], dict[float, dict[int, float]]] = {}
    with file.open(newline="") as stream:
        for row in csv.DictReader(stream):
            if row["metric"] in ("val_acc", "test_acc") and row["method"] != "sgd":
                of = numbers.setdefault(((row["model"], float(row["noise"]), row["method"]), row["metric"]), {})
                of.setdefault(float(row["rho"]), {})[int(row["seed"])] = float(row["value"])
    by_case: dict[Key, dict[int, dict[str, Any]]] = {}
    for line in found:
        by_case.setdefault((line["model"], line["noise"], line["method"]), {})[line["seed"]] = line
    for key, lines in by_case.items():
        seeds = sorted(lines)
        config = next(c for c in _configs() if c.method == key[2])
        yield Case(
            key=key,
            default=float(config.rho or 0.0),
            **{
                name: {rho: [one[seed] for seed in seeds] for rho, one in sorted(numbers[key, metric].items())}
                for name, metric in (("validation", "val_acc"), ("test", "test_acc"))
            },  # type: ignore[arg-type]
            found={when: [lines[seed][when] for seed in seeds] for when in WHEN},
        )


def _named(case: Case) -> str:
    model, noise, method = case.key
    return f"{method}, {model}, {noise:.0%} wrong"


def _radii(cases: Sequence[Case]) -> Table:
    table = Table(
        "Radii: chosen on validation, and found (median over the seeds, least to greatest)",
        ("method, network, labels", "default", "validation", "at the start", "after a quarter"),
    )
    for case in cases:
        found = [f"{median(r):.3g} ({min(r):.3g} to {max(r):.3g})" for r in (case.found[when] for when in WHEN)]
        table.rows.append((_named(case), f"{case.default:g}", f"{case.chosen:g}", *found))
    return table


def _accuracies(cases: Sequence[Case]) -> Table:
    """The test accuracy at the radius of validation, and what other choices lose, paired by seed."""
    table = Table(
        "Test accuracy at the radius of validation, and what the others lose to it, in points (95 % t interval)",
        ("method, network, labels", "at validation's", "default", "found at the start", "found after a quarter"),
    )
    for case in cases:
        ways = case.choices()
        best = case.accuracies(ways["validation"])
        lost = [summarise(_lost(case, ways[name])).text("+.1f") for name in ("default", *WHEN)]
        table.rows.append((_named(case), summarise(best).text(), *lost))
    return table


def _summary(cases: Sequence[Case]) -> Table:
    """Each way to choose over all cases: how far from validation's radius, and what it loses."""
    table = Table(
        "Over all networks, labels and methods",
        (
            "choice",
            "typical factor from validation's",
            "within a factor of 2",
            "points lost at the nearest trained radius, mean",
            "worst case",
        ),
    )
    for name in cases[0].choices():
        factors, lost, worst = [], [], []
        for case in cases:
            choice = case.choices()[name]
            seeds = range(len(next(iter(case.test.values()))))
            factors += [abs(math.log(choice(seed) / case.chosen)) for seed in seeds]
            mine = _lost(case, choice)
            lost += mine
            worst.append(fmean(mine))
        near = fmean(factor <= math.log(2) + 1e-9 for factor in factors)
        typical = f"{math.exp(fmean(factors)):.2f}"
        table.rows.append((name, typical, f"{near:.0%}", f"{fmean(lost):.2f}", f"{max(worst):.1f}"))
    return table


def _lost(case: Case, choice: Callable[[int], float]) -> list[float]:
    """The test accuracy that each seed loses to the radius of validation."""
    best = case.accuracies(case.choices()["validation"])
    return [a - b for a, b in zip(best, case.accuracies(choice), strict=True)]
