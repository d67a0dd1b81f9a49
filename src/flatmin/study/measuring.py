"""Measuring trained nets: run folders and files of weights, one after the other or on several processes."""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from flatmin.data.base import Data, Split, check_held
from flatmin.measure.card import Card, CardSettings, card
from flatmin.measure.problem import Mode, Problem
from flatmin.study.measured import Measured, check_doubles
from flatmin.train.config import RunConfig
from flatmin.train.folder import WEIGHTS
from flatmin.train.saved import SavedRun, open_run
from flatmin.train.settings import content_hash
from flatmin.train.sources import check_device, check_fit
from flatmin.words import explained

Part = Literal["train", "val", "test"]
Progress = Callable[[str, float], None]
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.float32}


@dataclass(frozen=True, kw_only=True)
class View:
    """What of a net is measured.

    Args:
        what: sections of the card, see `flatmin.measure.card`.
        settings: how they are measured.
        split: "train" (with the labels that were trained on), "val" or "test".
        examples: how many of them, drawn by the settings' seed; None: all.
        batch: examples per forward pass.
        params: patterns of parameter names.
        mode: "eval", or "train" for BatchNorm by the batch.
        dtype: "float32", "float64", or "bfloat16" for products under autocast: a cheap look, some percent off.
        device: where.
        landscapes: folder in which each net's landscapes are kept, under its name; None: nowhere.

    Raises:
        ValueError: a word or a number out of range.
    """

    what: str = "card"
    settings: CardSettings = dataclasses.field(default_factory=CardSettings)
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
        """A digest of everything in it that landscapes depend on."""
        parts = (self.split, self.examples, self.batch, self.params, self.mode, self.dtype, self.device)
        return content_hash(self.settings, *parts)

    def __post_init__(self) -> None:
        if self.split not in ("train", "val", "test"):
            raise ValueError(f"split must be train, val or test, got {self.split!r}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be {' or '.join(DTYPES)}, got {self.dtype!r}.")
        if self.batch < 1 or (self.examples is not None and self.examples < 1):
            raise ValueError(f"batch and examples must be at least 1, got {self.batch!r} and {self.examples!r}.")


def find(target: Path, *, model: str | None = None, data: str | None = None) -> SavedRun:
    """A run by its folder, or a file of weights with the model and data that it goes with.

    Args:
        target: a run folder, or a file that torch.save wrote: a state dict, alone or under "state_dict" or "model".
        model: for a file: "conv", "mlp", or "package.module:function".
        data: for a file: "digits", or "package.module:function".

    Raises:
        ValueError: neither, or names where they are not wanted or missing.
    """
    if target.is_dir():
        if model is not None or data is not None:
            raise ValueError(f"{target} is a run, which knows its model and data; leave out --model and --data.")
        run = open_run(target)
        run.check()
        return run
    if not target.exists():
        raise ValueError(f"there is no run folder or file of weights {str(target)!r}.")
    if model is None or data is None:
        raise ValueError(f"{target} is a file: name its net and what to measure on with --model and --data.")
    config = RunConfig(method="sgd", model=model, data=data)
    return SavedRun(name=target.stem, label=target.stem, config=config, weights=target)


def measure(run: SavedRun, view: View, *, progress: Progress | None = None) -> Measured:
    """Measure one net.

    Args:
        run: which.
        view: what of it.
        progress: see `flatmin.measure.card`.

    Raises:
        ValueError, ArithmeticError: the net, its data or a measure refuse.
    """
    check_device(view.device)
    data = run.data()
    net = run.model(data)
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
        split=words(data, view),
    )
    folder = None if view.landscapes is None else view.landscapes / run.name / content_hash(view.key, _digest(net))[:8]
    found: Card = card(problem, view.what, settings=view.settings, folder=folder, progress=progress)
    return Measured(name=run.name, group=run.label, seed=run.config.seed, card=found)


def _digest(net: nn.Module) -> str:
    """Of the weights and buffers."""
    state = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            state.update(name.encode())
            state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()


def find_all(targets: Sequence[Path], *, model: str | None = None, data: str | None = None) -> list[SavedRun]:
    """`find` for each, once; files of one name go by that of their folder too.

    Raises:
        ValueError: see `find`.
    """
    runs = [find(target, model=model, data=data) for target in dict.fromkeys(targets)]
    names = [run.name for run in runs]
    found = []
    for run in runs:
        if names.count(run.name) > 1 and run.weights.name != WEIGHTS:
            name = f"{run.weights.resolve().parent.name}-{run.name}"
            run = dataclasses.replace(run, name=name, label=name)
        found.append(run)
    return found


def batches(data: Data, view: View) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The chosen examples, in batches.

    Raises:
        ValueError: more examples than there are, or than should be read from files at once.
    """
    part: Split = getattr(data, view.split)
    index_of = chosen(data, view)
    check_held(part.x, len(index_of))
    for index in index_of.split(view.batch):
        yield data.inputs(part.x[index]), part.y[index]


def chosen(data: Data, view: View) -> torch.Tensor:
    """Positions of the chosen examples in their part, in its order."""
    part: Split = getattr(data, view.split)
    if view.examples is None:
        return torch.arange(len(part))
    if view.examples > len(part):
        raise ValueError(f"the {view.split} part has {len(part)} examples, fewer than {view.examples}.")
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(view.settings.seed))
    return order[: view.examples].sort().values


def words(data: Data, view: View) -> str:
    """The part for the record, with the share of wrong labels among the chosen examples if there are any."""
    if view.split != "train" or not bool(data.wrong.any()):
        return view.split
    return f"train, {float(data.wrong[chosen(data, view)].double().mean()):.0%} of the labels wrong"


def measure_all(
    runs: Sequence[SavedRun],
    view: View,
    *,
    workers: int = 0,
    progress: Progress | None = None,
    on_done: Callable[[Measured], None] | None = None,
) -> list[Measured]:
    """Measure several nets.

    Args:
        runs: which.
        view: what of them.
        workers: processes of one thread each, started fresh (spawn); 0 measures here.
        progress: for measuring here, see `flatmin.measure.card`.
        on_done: called here with each net as it is done.

    Returns:
        In the order of the runs.

    Raises:
        ValueError: two runs of one arm and seed.
        ValueError, ArithmeticError: what the first net that refuses says, with its name.
    """
    check_doubles((run.label, run.config.seed) for run in runs)
    done: dict[int, Measured] = {}
    tell = on_done or (lambda net: None)
    if not workers:
        for i, run in enumerate(runs):
            done[i] = _named(run, view, progress)
            tell(done[i])
        return list(done.values())
    others = multiprocessing.active_children()
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,))
    try:
        waiting = {pool.submit(_served, run, view): i for i, run in enumerate(runs)}
        while waiting:
            ready, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in ready:
                i = waiting.pop(future)
                found = future.result()
                if isinstance(found, _Refusal):
                    raise found.kind(found.text)
                done[i] = found
                tell(found)
    except BrokenProcessPool:
        left = ", ".join(runs[i].name for i in range(len(runs)) if i not in done)
        raise ValueError(
            "a process ended while it measured, often because memory ran out; use fewer --workers. Not measured: "
            f"{left}."
        ) from None
    except BaseException:
        # Nobody waits for what is under way: a net can take minutes.
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            if child not in others:
                child.terminate()
        raise
    pool.shutdown()
    return [done[i] for i in range(len(runs)) if i in done]


def _named(run: SavedRun, view: View, progress: Progress | None) -> Measured:
    try:
        return measure(run, view, progress=progress)
    except Exception as error:
        error.add_note(f"(while {run.name} was measured)")
        raise


@dataclass(frozen=True)
class _Refusal:
    """What flatmin refused in another process: an exception loses on its way where it was raised."""

    kind: type[Exception]
    text: str


def _served(run: SavedRun, view: View) -> Measured | _Refusal:
    try:
        return _named(run, view, None)
    except Exception as error:
        if not explained(error):
            raise
        kind = ArithmeticError if isinstance(error, ArithmeticError) else ValueError
        return _Refusal(kind, " ".join([str(error), *error.__notes__]))
