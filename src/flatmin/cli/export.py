"""`flatmin export`: a run's weights as a file for others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flatmin.cli.targets import run_folder


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or its name in flatmin-runs/runs.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Ends in .pt (a state dict) or .safetensors.")],
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Write the weights that a run kept as a plain state dict, or as safetensors with its settings beside them."""
    from flatmin.train.export import export as write
    from flatmin.train.saved import open_run

    path = write(open_run(run_folder(run)), file, force=force)
    typer.echo(f"Written: {path} ({path.stat().st_size / 1e6:.1f} MB)")
