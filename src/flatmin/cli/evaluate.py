"""`flatmin eval`: evaluate the weights of a run on its own data or on other data."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer

from flatmin.cli import completion as complete
from flatmin.cli.console import make_console
from flatmin.cli.options import AsJson, Run, Split
from flatmin.cli.targets import run_folder

if TYPE_CHECKING:
    from rich.console import Console

    from flatmin.train.reevaluate import Reevaluation
    from flatmin.train.saved import SavedRun


def evaluate(
    run: Run,
    data: Annotated[
        str | None,
        typer.Option(
            help="Another data set: a name, or your own function as package.module:function (default: that of the "
            "run).",
            autocompletion=complete.data,
        ),
    ] = None,
    data_dir: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Folder of the data files (default: that of the run).")
    ] = None,
    split: Split = "test",
    flip_tta: Annotated[
        bool | None,
        typer.Option(
            "--flip-tta/--no-flip-tta",
            help="Average the logits over each image and its mirror image (default: as in the run).",
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Samples per forward pass (default: 300 on a CPU, 2000 on a GPU)."),
    ] = None,
    classes: Annotated[bool, typer.Option("--classes", help="Also print the accuracy of every class.")] = False,
    device: Annotated[
        str,
        typer.Option(
            help="Device: auto (the GPU if there is one), cpu or cuda.",
            autocompletion=complete.one_of("auto", "cpu", "cuda"),
        ),
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Evaluate the weights of a run: loss and accuracy, with a 95 % interval.

    Images are normalised with the statistics of the run's training data, also those of another data set.

    Examples:
        flatmin eval first
        flatmin eval first --split val --classes
    """
    import torch

    from flatmin.train.reevaluate import Asked, reevaluate
    from flatmin.train.saved import open_run

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    asked = Asked(
        data=data, data_dir=data_dir, split=split, flip_tta=flip_tta, batch=batch, device=device, classes=classes
    )
    saved = open_run(run_folder(run))
    evaluation = reevaluate(saved, asked)
    if as_json:
        typer.echo(json.dumps({"run": str(saved.weights.parent), **dataclasses.asdict(evaluation)}, indent=1))
        return
    _print(saved, evaluation, make_console())


def _print(saved: SavedRun, evaluation: Reevaluation, console: Console) -> None:
    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    precision = "" if evaluation.precision == "float32" else f", {evaluation.precision}"
    mirrored = ", averaged over each image and its mirror image" if evaluation.flip_tta else ""
    say(f"{saved.name}: {saved.config.method}, {saved.config.model} trained on {saved.config.data}")
    where = f"on {evaluation.device}{precision}{mirrored}"
    say(f"{evaluation.split} part of {evaluation.data}, {evaluation.samples:,} samples, {where}")
    if evaluation.normalised_with is not None:
        mean, std = (" ".join(f"{value:.4f}" for value in values) for values in evaluation.normalised_with)
        say(f"normalised with the statistics of the run's training data: mean {mean}, std {std}")
    if evaluation.wrong:
        say(f"{evaluation.wrong:.0f} % of these labels are wrong (label noise), as in training")
    say(f"\nloss   {evaluation.loss:8.4f}")
    interval = f"(95 % interval over the samples: {evaluation.acc_low:.2f} to {evaluation.acc_high:.2f})"
    say(f"top-1  {evaluation.acc:8.2f} %  {interval}")
    if evaluation.top5 is not None:
        say(f"top-5  {evaluation.top5:8.2f} %")
    if evaluation.classes:
        say("\nclass  samples  accuracy")
    for number, share in enumerate(evaluation.classes):
        say(f"{number:>5}  {share.samples:>7,}  " + ("       -" if share.acc is None else f"{share.acc:6.2f} %"))
