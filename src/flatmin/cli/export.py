"""`flatmin export`: write the weights of a run to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flatmin.cli.options import Run
from flatmin.cli.targets import run_folder


def export(
    run: Run,
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="File to write; it ends in .pt or .pth (state dict), or in .safetensors."),
    ],
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Export the weights of a run as a state dict, or as safetensors with the run's settings in the metadata.

    Examples:
        flatmin export first weights.pt
        flatmin export first weights.safetensors --force
    """
    from flatmin.train.export import export as write
    from flatmin.train.saved import open_run

    path = write(open_run(run_folder(run)), file, force=force)
    typer.echo(f"Written: {path} ({path.stat().st_size / 1e6:.1f} MB)")
