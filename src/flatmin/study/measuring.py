"""Measure trained networks from run folders or files of weights, in one process or several."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from flatmin.data.dataset import Data, Split, check_held
from flatmin.measure.checkpoints import unwrapped
from flatmin.measure.losses import logits_of
from flatmin.measure.problem import Mode, Problem
from flatmin.measure.report import Report, ReportSettings, report
from flatmin.study.measured import NetReport, Unmeasured, check_doubles
from flatmin.study.pool import Lost, Pool, Worker
from flatmin.train.ascents import saved_ascents
from flatmin.train.config import RunConfig
from flatmin.train.config import identity as identity_of
from flatmin.train.saved import SavedRun, open_run
from flatmin.train.settings import content_hash
from flatmin.train.sources import check_device, check_fit
from flatmin.words import explained, reason

Part = Literal["train", "val", "test"]
Progress = Callable[[str, float], None]
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.float32}


@dataclass(frozen=True, kw_only=True)
class View:
    """What to measure of a network, and on which examples.

    Args:
        what: sections of the report, see `flatmin.measure.report`.
        settings: settings of the sections.
        split: "train" (with the labels that were trained on), "val" or "test".
        examples: number of examples, drawn with the settings' seed; None for all.
        batch: examples per forward pass.
        params: patterns of parameter names.
        mode: "eval", or "train" for BatchNorm with the statistics of the batch.
        dtype: "float32", "float64", or "bfloat16" for products under autocast, which are cheaper and accurate to a few
            percent.
        device: the torch device.
        landscapes: folder in which the landscapes of each network are kept, under its name; None to keep none.

    Raises:
        ValueError: an invalid value.
    """

    what: str = "report"
    settings: ReportSettings = dataclasses.field(default_factory=ReportSettings)
    split: Part = "train"
    examples: int | None = None
    batch: int = 150
    params: str = "*"
    mode: Mode = "eval"
    dtype: str = "float32"
    device: str = "cpu"
    landscapes: Path | None = None

    @property
    def key(self) -> str:
        """A digest of everything that landscapes depend on."""
        parts = (self.split, self.examples, self.batch, self.params, self.mode, self.dtype, self.device)
        return content_hash(self.settings, *parts)

    @property
    def sections_key(self) -> str:
        """`what` as it is spelled in digests and names of recorded files, where "report" is "card"."""
        return self.what.replace("report", "card")

    def __post_init__(self) -> None:
        if self.split not in ("train", "val", "test"):
            raise ValueError(f"split must be train, val or test, got {self.split!r}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be {' or '.join(DTYPES)}, got {self.dtype!r}.")
        if self.batch < 1 or (self.examples is not None and self.examples < 1):
            raise ValueError(f"batch and examples must be at least 1, got {self.batch!r} and {self.examples!r}.")


def find(target: Path, *, model: str | None = None, data: str | None = None, key: str | None = None) -> SavedRun:
    """A run given by its folder, or by a file of weights with its model and data.

    Args:
        target: a run folder, or a file of weights; see `flatmin.train.saved.weights_for`. The name of a file gives its
            arm and seed: "sam-s2.pt" is seed 2 of the arm "sam"; other names are arms of their own.
        model: only for a file of weights: "conv", "mlp", or "package.module:function".
        data: only for a file of weights: "digits", or "package.module:function".
        key: only for a file of weights: which weights to take if it holds several that fit.

    Raises:
        ValueError: the target does not exist, or `model`, `data` or `key` is missing for a file or given for a run.
    """
    if target.is_dir():
        if model is not None or data is not None or key is not None:
            raise ValueError(
                f"{target} is a run folder, which defines its model and data; leave out --model, --data and --key."
            )
        run = open_run(target)
        run.check()
        return run
    if not target.exists():
        raise ValueError(f"there is no run folder or file of weights {str(target)!r}.")
    if model is None or data is None:
        raise ValueError(
            f"{target} is a file: name its network and data with --model and --data, or name a run folder instead."
        )
    arm, seed = _arm_and_seed(target.stem)
    config = RunConfig(method="sgd", model=model, data=data, seed=seed)
    return SavedRun(name=target.stem, label=arm, config=config, weights=target, key=key)


def _arm_and_seed(name: str) -> tuple[str, int]:
    """The arm and seed of a file of weights by its name, as in names of runs: ("sam", 2) for "sam-s2"."""
    match = re.fullmatch(r"(.+)-s(\d+)", name)
    return (match[1], int(match[2])) if match else (name, 0)


def measure(
    run: SavedRun,
    view: View,
    *,
    progress: Progress | None = None,
    on_part: Callable[[NetReport], None] | None = None,
) -> NetReport:
    """Measure one network.

    Args:
        run: the network.
        view: what to measure.
        progress: see `flatmin.measure.report`.
        on_part: called after each section with the results so far, see `on_section` of `flatmin.measure.report`.

    Raises:
        ValueError, ArithmeticError: the network or its data cannot be measured.
    """
    check_device(view.device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = run.data()
        net = unwrapped(run.model(data))
    remarks = (*run.remarks, *dict.fromkeys(str(one.message) for one in caught))
    net.register_forward_hook(_logits)
    check_fit(net, data)
    net = net.to(view.device)
    problem = Problem(
        net,
        F.cross_entropy,
        list(batches(data, view)),
        params=view.params,
        mode=view.mode,
        dtype=DTYPES[view.dtype],
        autocast=torch.bfloat16 if view.dtype == "bfloat16" else None,
        split=split_of(data, view),
    )
    known = view.split == "train" and run.trained
    ascents = partial(saved_ascents, run, data, chosen(data, view)) if known else None
    folder = None if view.landscapes is None else view.landscapes / run.name / content_hash(view.key, _digest(net))[:8]

    def named(report: Report) -> NetReport:
        return NetReport(name=run.name, group=run.label, seed=run.config.seed, report=report, remarks=remarks)

    def part(report: Report) -> None:
        if on_part is not None:
            on_part(named(report))

    found = report(
        problem,
        view.what,
        settings=view.settings,
        folder=folder,
        progress=progress,
        on_section=part,
        ascents=ascents,
    )
    return named(found)


def _logits(net: nn.Module, inputs: object, outputs: object) -> torch.Tensor:
    """A forward hook for models that return more than their logits."""
    return logits_of(outputs)


def _digest(net: nn.Module) -> str:
    """A digest of the weights and buffers."""
    state = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            state.update(name.encode())
            state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()


def find_all(
    targets: Sequence[Path], *, model: str | None = None, data: str | None = None, key: str | None = None
) -> list[SavedRun]:
    """`find` for each distinct target. Files of the same name are named with as many parent folders as needed.

    Raises:
        ValueError: see `find`.
    """
    once: dict[Path, Path] = {}
    for target in targets:
        once.setdefault(target.resolve(), target)
    runs = {path: find(target, model=model, data=data, key=key) for path, target in once.items()}
    names = {path: run.name for path, run in runs.items()}
    for path, run in runs.items():
        if like := [other for other in names if names[other] == names[path] and other != path]:
            depth = next((k for k in range(1, len(path.parts)) if _tail(path, k) not in [_tail(o, k) for o in like]), 0)
            # Files that differ only in the suffix are named with the suffix.
            name = _tail(path, depth) if depth else f"{_tail(path, 1)}{path.suffix}"
            label = run.label if path.is_dir() else _arm_and_seed(name)[0]
            runs[path] = dataclasses.replace(run, name=name, label=label)
    return list(runs.values())


def _tail(path: Path, folders: int) -> str:
    """The name of a run folder, or of a file without its suffix, after the given number of parent folders."""
    return "-".join([*path.parts[:-1][-folders:], path.name if path.is_dir() else path.stem])


def identity(run: SavedRun, view: View) -> str:
    """A digest of a measurement: the file of weights with its content, and the view."""
    content = ""
    if run.weights.is_file():
        with run.weights.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    about = (run.config.model, run.config.data, run.key, str(run.weights.resolve()), content)
    return content_hash(view.key, view.sections_key, *map(str, about))


def batches(data: Data, view: View) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The chosen examples, in batches.

    Raises:
        ValueError: more examples than there are, or than may be read from files at once.
    """
    part: Split = getattr(data, view.split)
    index_of = chosen(data, view)
    check_held(part.x, len(index_of))
    for index in index_of.split(view.batch):
        yield data.inputs(part.x[index]), part.y[index]


def chosen(data: Data, view: View) -> torch.Tensor:
    """Indices of the chosen examples in their part, in ascending order."""
    part: Split = getattr(data, view.split)
    if view.examples is None:
        return torch.arange(len(part))
    if view.examples > len(part):
        raise ValueError(f"the {view.split} part has {len(part)} examples, fewer than {view.examples}.")
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(view.settings.seed))
    return order[: view.examples].sort().values


def split_of(data: Data, view: View) -> str:
    """The name of the part, with the share of wrong labels among the chosen examples if there are any."""
    if view.split != "train" or not bool(data.wrong.any()):
        return view.split
    return f"train, {float(data.wrong[chosen(data, view)].double().mean()):.0%} of the labels wrong"


def measure_all(
    runs: Sequence[SavedRun],
    view: View,
    *,
    workers: int = 0,
    progress: Progress | None = None,
    on_done: Callable[[NetReport], None] | None = None,
    on_part: Callable[[NetReport], None] | None = None,
    on_failed: Callable[[Unmeasured], None] | None = None,
) -> list[NetReport]:
    """Measure several networks.

    Args:
        runs: the networks.
        view: what to measure.
        workers: number of spawned processes with one thread each; 0 to measure in this process.
        progress: without workers, see `flatmin.measure.report`.
        on_done: called in this process with each network when it has been measured.
        on_part: see `measure`. It is called in the process that measures, so it must be picklable if there are workers.
        on_failed: called in this process with each network that could not be measured. Default: the first such network
            raises its error.

    Returns:
        The reports, in the order of the runs.

    Raises:
        ValueError: two runs have the same arm and seed.
        Exception: without `on_failed`, the error of the first network that could not be measured, with its name.
    """
    check_doubles(((run.label, run.config.seed) for run in runs), lambda i, k: _apart(runs[i], runs[k]))
    done: dict[int, NetReport] = {}

    def end(i: int, measured: NetReport | Unmeasured) -> None:
        if isinstance(measured, NetReport):
            done[i] = measured
            if on_done is not None:
                on_done(measured)
        elif on_failed is not None:
            on_failed(measured)
        else:
            kind = ValueError if measured.refused else RuntimeError
            raise kind(f"{measured.why} (while {measured.name} was measured)")

    if not workers:
        for i, run in enumerate(runs):
            try:
                measured: NetReport | Unmeasured = measure(run, view, progress=progress, on_part=on_part)
            except Exception as error:
                if on_failed is None:
                    error.add_note(f"(while {run.name} was measured)")
                    raise
                measured = _unmeasured(run, error)
            end(i, measured)
        return list(done.values())
    waiting, busy = list(reversed(list(enumerate(runs)))), dict[int, Worker]()
    with Pool(_served) as pool:
        while waiting or busy:
            while waiting and len(busy) < workers:
                i, run = waiting.pop()
                busy[i] = pool.submit(run, view, on_part)
            pool.wait(busy.values())
            for i, worker in list(busy.items()):
                found = pool.poll(worker)
                if found is None:
                    continue
                del busy[i]
                if isinstance(found, Lost):
                    why = (
                        "its process ended during the measurement, often because memory ran out; use fewer --workers, "
                        "smaller batches or fewer examples."
                    )
                    found = Unmeasured(name=runs[i].name, why=why)
                end(i, found)
    return [done[i] for i in range(len(runs)) if i in done]


_SAME = "their settings are the same, so one is a copy, or was trained with different code or data"


def _apart(one: SavedRun, other: SavedRun) -> str:
    """How two runs of one arm and seed differ, and how to choose."""
    old, new = identity_of(one.config), identity_of(other.config)
    keys = [key for key in old if old[key] != new[key]]
    how = f"they differ by {_words(old, keys)} and {_words(new, keys)}" if keys else _SAME
    return (
        f" They are {one.name} and {other.name}; {how}. To measure the values that a study has chosen, name the study "
        "instead of its runs: flatmin measure STUDY."
    )


def _words(settings: Mapping[str, object], keys: Sequence[str]) -> str:
    return " ".join(f"{key}={settings[key]}" for key in keys)


def _served(run: SavedRun, view: View, on_part: Callable[[NetReport], None] | None) -> NetReport | Unmeasured:
    """`measure` in a worker. Errors are returned, because not every exception can be pickled."""
    try:
        return measure(run, view, on_part=on_part)
    except Exception as error:
        return _unmeasured(run, error)


def _unmeasured(run: SavedRun, error: Exception) -> Unmeasured:
    return Unmeasured(name=run.name, why=reason(error), refused=explained(error))
