"""Several methods over several seeds: plan, run what is missing, choose on validation, sum up."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flatmin.data.dataset import Data
from flatmin.methods import Recipe
from flatmin.stats import PERCENT, Stat, summarise
from flatmin.study.arms import Candidate, arms, candidates
from flatmin.study.config import BASE, CompareConfig, recipe_of
from flatmin.study.costs import Counts
from flatmin.study.events import Event, Planned, Timing, Tuned, Warned
from flatmin.study.executors import RunOutcome, execute, finished_and_missing
from flatmin.study.notes import write_notes
from flatmin.study.store import Run, Store
from flatmin.study.summary import Choice, Finding, Ratio, Summary, make_row
from flatmin.study.timing import guess_seconds, measure_speed, time_ratios
from flatmin.train.config import RunConfig
from flatmin.train.files import write_json
from flatmin.train.fingerprint import content_of, environment, external_versions, user_sources
from flatmin.train.package import digest, package_digest
from flatmin.train.settings import content_hash
from flatmin.train.sources import build_model, check_device, check_fit, load_clean
from flatmin.train.trainer import Trainer, build_recipe
from flatmin.words import read_text

OnEvent = Callable[[Event], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a comparison will do.

    Args:
        candidates: configurations, each for all seeds.
        runs: all runs by (candidate index, seed).
        found: outcomes of finished runs by name.
        missing: runs to do, the longest first.
        seconds: a guess of the wall time of the missing runs; None if there are none.
        sizes: samples in train, validation and test.
        steps: of the metrics; see `flatmin.study.costs.Counts.steps`.
        left_out: method -> why this loop or model cannot serve it; only if the settings allow to continue without.
        warnings: about the run folders.
    """

    candidates: list[Candidate]
    runs: dict[tuple[int, int], Run]
    found: dict[str, RunOutcome]
    missing: list[Run]
    seconds: float | None
    sizes: tuple[int, int, int]
    steps: Mapping[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def announcement(self, *, tune: bool = False) -> Planned:
        """The sentence before the work, as an event."""
        return Planned(
            stage="tune" if tune else "compare",
            runs=len({run.name for run in self.runs.values()}),
            reused=len(self.found),
            epochs=sum(run.config.epochs for run in self.missing),
            seconds=self.seconds,
        )


def plan(config: CompareConfig, *, out: Path, workers: int = 2) -> Plan:
    """Check everything, look for finished runs, and guess the time of the others.

    Raises:
        ValueError: a folder that cannot be written, unknown names, data or a model that do not fit.
        ModuleNotFoundError: the built-in data needs scikit-learn.
    """
    store = Store(out)
    check_device(config.device)
    data = load_clean(_base(config))
    left_out: dict[str, str] = {}
    if config.skip_unfit:
        config, left_out = _fitting(config, data.to(config.device))
    points = candidates(config)
    code, content = _code(config, points), content_of(_base(config), data)
    runs = {
        (i, seed): Run(label=point.label, config=point.with_seed(seed), code=code, content=content)
        for i, point in enumerate(points)
        for seed in range(config.seeds)
    }
    warnings = list(data.notes)
    found, missing = finished_and_missing(runs.values(), store, warnings.append)
    seconds = None
    if missing:
        here = data.to(config.device)
        check_fit(build_model(points[0].config, here), here)
        for point in points:
            Trainer(point.config, data=here)  # refuses now what the loop cannot serve
        speed = measure_speed(Trainer(_base(config), data=here))
        seconds = guess_seconds([run.config for run in missing], speed, workers)
        missing.sort(key=lambda run: -run.config.epochs * build_recipe(run.config).gradient_evaluations)
    return Plan(
        candidates=points,
        runs=runs,
        found=found,
        missing=missing,
        seconds=seconds,
        sizes=(len(data.train), len(data.val), len(data.test)),
        steps=Counts.of(data).steps(points[0].config),
        left_out=left_out,
        warnings=warnings,
    )


def compare(
    config: CompareConfig,
    *,
    out: Path,
    workers: int = 2,
    on_event: OnEvent | None = None,
    command: Sequence[str] = (),
    prepared: Plan | None = None,
) -> Summary:
    """Train every arm with every seed, reuse what is finished, and sum up.

    Args:
        config: what is compared.
        out: folder for the runs; made if it does not exist.
        workers: processes with one thread each, started fresh (spawn): a script needs `if __name__ == "__main__":`.
            0 runs everything in this process.
        on_event: called in this process with the events of `flatmin.study.events`.
        command: the arguments of the command line, for the summary.
        prepared: a plan of the same settings. Default: made here.

    Raises:
        ValueError: what `plan` raises, or no run at all had a result.
        flatmin.study.executors.StudyInterrupted: on Ctrl-C; finished runs are kept.
    """
    tell: OnEvent = on_event if on_event is not None else lambda event: None
    todo = plan(config, out=out, workers=workers) if prepared is None else prepared
    for text in (*todo.warnings, *map(_sentence, todo.left_out.items())):
        tell(Warned(text=text))
    tell(todo.announcement(tune=config.tune))
    store = Store(out, weights=config.weights)
    outcomes = todo.found | execute(todo.missing, store, workers=workers, on_event=tell)
    findings = [
        Finding(candidate=point, outcomes={seed: outcomes[todo.runs[i, seed].name] for seed in range(config.seeds)})
        for i, point in enumerate(todo.candidates)
    ]
    if not any(finding.results for finding in findings):
        reasons = [o.error or (o.result.failure if o.result else None) for o in outcomes.values()]
        first = next(filter(None, reasons), "unknown").rstrip(".")
        raise ValueError(f"no run had a result; the first one: {first}.")
    chosen, choices = _select(findings, todo.steps, tell) if config.tune else (findings, {})
    ratios = _ratios(config, chosen, store, todo, tell) if config.timing else {}
    return _sum_up(config, chosen, choices, ratios, todo, outcomes, command)


def _fitting(config: CompareConfig, data: Data) -> tuple[CompareConfig, dict[str, str]]:
    """The settings with the methods that can be run, and the refusals of the others.

    Raises:
        ValueError: no method is left.
    """
    refusals: dict[str, str] = {}
    for method in config.methods:
        alone = dataclasses.replace(config, methods=(method,), baselines=False, axes={}, params={}, tune=False)
        try:
            Trainer(arms(alone)[0].config, data=data)
        except (ValueError, TypeError) as error:
            refusals[method] = str(error)
    kept = tuple(method for method in config.methods if method not in refusals)
    if not kept:
        raise ValueError(f"no method is left to compare; the first refusal: {next(iter(refusals.values()))}")
    axes = {key: values for key, values in config.axes.items() if key.removeprefix("rho.") not in refusals}
    return dataclasses.replace(config, methods=kept, axes=axes), refusals


def _sentence(refusal: tuple[str, str]) -> str:
    method, reason = refusal
    return f"'{method}' is left out: {reason}"


def _base(config: CompareConfig) -> RunConfig:
    """The plain base optimizer under these settings."""
    plain = dataclasses.replace(config, methods=(BASE,), baselines=False, axes={}, params={}, rho={}, tune=False)
    return candidates(plain)[0].config


def _code(config: CompareConfig, points: Sequence[Candidate]) -> str:
    specs = [*config.plugins, *(spec for spec in (config.model, config.data) if ":" in spec)]
    recipes = [recipe_of(method, config.plugins) for method in dict.fromkeys(p.config.method for p in points)]
    return digest(user_sources(specs, recipes), package_digest(), *external_versions(specs))


def _select(
    findings: Sequence[Finding], steps: Mapping[str, float], tell: OnEvent
) -> tuple[list[Finding], dict[str, list[Choice]]]:
    """The best candidate of every arm by mean validation accuracy at the last epoch; every run must have a result."""
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.label, []).append(finding)
    chosen: list[Finding] = []
    choices: dict[str, list[Choice]] = {}
    for label, group in groups.items():
        scores = [_validation(finding, steps.get("val_acc", 0.0)) for finding in group]
        whole = [i for i, finding in enumerate(group) if len(finding.results) == len(finding.outcomes)]
        best = max(whole, key=lambda i: (scores[i][0].mean, -scores[i][1], -i), default=None)
        chosen.append(group[best or 0])
        if len(group) > 1:
            choices[label] = [
                Choice(values=finding.candidate.values, val_acc=scores[i][0], chosen=i == best)
                for i, finding in enumerate(group)
            ]
            if best is not None:
                tell(Tuned(label=label, chosen=dict(group[best].candidate.values)))
    return chosen, choices


def _validation(finding: Finding, step: float) -> tuple[Stat, float]:
    """Validation accuracy and mean validation loss at the last epoch."""
    losses = [outcome.lines[-1].val_loss for outcome in finding.outcomes.values() if outcome.lines]
    accuracy = summarise(list(finding.last("val_acc").values()), step=step, ends=PERCENT)
    return accuracy, math.fsum(losses) / max(1, len(losses))


def _ratios(
    config: CompareConfig, chosen: Sequence[Finding], store: Store, todo: Plan, tell: OnEvent
) -> dict[str, Ratio]:
    """Time ratios by label, measured or kept from a call with the same code and settings."""
    timed: dict[str, RunConfig] = {}
    same: dict[str, str] = {}
    for finding in chosen:
        run = finding.candidate.config
        identity = content_hash(run.method, run.params, run.batch_size, bool(run.rho))
        same[finding.label] = identity
        timed.setdefault(identity, run)
    base = _base(config)
    first = next(iter(todo.runs.values()))
    data = "" if first.content is None else first.content.digest
    key = content_hash(sorted(timed), dataclasses.replace(base, epochs=1), first.code, data)
    path = store.out / "timing.json"
    kept = _kept_ratios(path, key)
    if kept is None:
        tell(Timing(methods=len(timed)))
        kept = time_ratios(timed, base)
        write_json(path, {"key": key, "ratios": {name: dataclasses.asdict(r) for name, r in kept.items()}})
    return {label: kept[identity] for label, identity in same.items()}


def _kept_ratios(path: Path, key: str) -> dict[str, Ratio] | None:
    """Ratios of an earlier call, or None if there are none for this key."""
    try:
        found = json.loads(read_text(path))
        return {name: Ratio(**one) for name, one in found["ratios"].items()} if found["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # measuring again costs seconds


def _sum_up(
    config: CompareConfig,
    chosen: Sequence[Finding],
    choices: Mapping[str, list[Choice]],
    ratios: Mapping[str, Ratio],
    todo: Plan,
    outcomes: Mapping[str, RunOutcome],
    command: Sequence[str],
) -> Summary:
    recipes = {finding.label: build_recipe(finding.candidate.config) for finding in chosen}
    base = next((finding for finding in chosen if finding.label == BASE), None)
    rows = [
        make_row(
            finding,
            base,
            gradient_evaluations=_evaluations(finding, recipes[finding.label]),
            time_ratio=ratios.get(finding.label),
            steps=todo.steps,
        )
        for finding in chosen
    ]
    ascends = {label: recipe.moves for label, recipe in recipes.items()}
    noise = f", {config.noise_share:.0%} of the training labels wrong" if config.noise_share else ""
    return Summary(
        title=config.title + noise,
        rows=rows,
        curves={finding.label: finding.curves() for finding in chosen},
        notes=[
            *write_notes(config, todo.sizes, rows, chosen, choices, ascends),
            *map(_sentence, todo.left_out.items()),
        ],
        tuning=_rho_curves(choices),
        choices=dict(choices),
        command=shlex.join(command),
        environment=environment(config.device, 1),
        errors=_errors(todo, outcomes),
    )


def _evaluations(finding: Finding, recipe: Recipe) -> float:
    """Gradients a step: the mean over the runs, which know the length of the training and what was decided in it."""
    found = [result.gradient_evaluations for result in finding.results.values()]
    return float(f"{math.fsum(found) / len(found):.3g}") if found else recipe.gradient_evaluations


def _rho_curves(choices: Mapping[str, Sequence[Choice]]) -> dict[str, list[tuple[float, Stat]]]:
    """Validation accuracy over rho; other axes stay at the chosen values."""
    curves: dict[str, list[tuple[float, Stat]]] = {}
    for label, tried in choices.items():
        best = next((choice for choice in tried if choice.chosen), None)
        if best is None or "rho" not in best.values:
            continue
        rest = {key: value for key, value in best.values.items() if key != "rho"}
        curves[label] = [
            (float(choice.values["rho"]), choice.val_acc)
            for choice in tried
            if {key: value for key, value in choice.values.items() if key != "rho"} == rest
        ]
    return curves


def _errors(todo: Plan, outcomes: Mapping[str, RunOutcome]) -> dict[str, str]:
    told: dict[str, str] = {}
    for run in todo.runs.values():
        outcome = outcomes[run.name]
        text = outcome.error or (outcome.result.failure if outcome.result is not None else None)
        if text:
            told[run.name] = text
    return told
