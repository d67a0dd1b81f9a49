"""`flatmin export`: write the weights of a run to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flatmin.cli.options import Run
from flatmin.cli.targets import run_folder


def export(
    run: Run,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that ends in .pt (state dict) or .safetensors.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write the weights of a run as a plain state dict, or as safetensors with the settings beside them.

    Examples:
        flatmin export RUN weights.pt
        flatmin export RUN weights.safetensors --force
    """
    from flatmin.train.export import export as write
    from flatmin.train.saved import open_run

    path = write(open_run(run_folder(run)), file, force=force)
    typer.echo(f"Written: {path} ({path.stat().st_size / 1e6:.1f} MB)")
