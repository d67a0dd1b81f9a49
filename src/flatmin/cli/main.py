"""The `flatmin` command. Commands import torch only when they run, so that `flatmin --help` is fast."""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.models import CommandInfo

from flatmin.cli.compare import compare
from flatmin.cli.doctor import doctor
from flatmin.cli.evaluate import evaluate
from flatmin.cli.export import export
from flatmin.cli.measure import measure
from flatmin.cli.methods import methods
from flatmin.cli.original import original
from flatmin.cli.runs import runs
from flatmin.cli.search import search
from flatmin.cli.settings import settings
from flatmin.cli.show import show
from flatmin.cli.study import study
from flatmin.cli.theory import theory
from flatmin.cli.train import train
from flatmin.streams import settle_streams, unwritten
from flatmin.words import explained


class _Root(TyperGroup):
    """The command group; the epilog describes the options for shell completion, so that they are not listed."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)
        for param in params:
            if param.name in ("install_completion", "show_completion"):
                param.hidden = True
        return params


app = typer.Typer(
    name="flatmin",
    cls=_Root,
    help="""Sharpness-aware training for PyTorch: train, compare methods, measure flatness.

    First steps:
      flatmin doctor                      check the installation
      flatmin compare                     compare SGD, SAM and VaSSO (minutes)
      flatmin train digits method=vasso   train one network (seconds)
      flatmin runs list                   list the trained networks by name
      flatmin measure NAME                measure how flat a network is
    """,
    epilog="Help on a command: flatmin COMMAND --help\n"
    "Settings of training: flatmin settings\n"
    "Shell completion: flatmin --install-completion (bash, zsh, fish or PowerShell); it completes commands, presets, "
    "studies, methods, runs, and settings with their values. To print the script instead: flatmin --show-completion",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(train)
app.command()(compare)
app.command()(study)
app.command()(search)
app.command(context_settings={"ignore_unknown_options": True})(original)
app.command()(measure)
app.command()(show)
app.command("eval")(evaluate)
app.command()(export)
app.add_typer(runs, name="runs")
app.command()(settings)
app.command()(methods)
app.add_typer(theory, name="theory")
app.command()(doctor)


def _describe(commands: Iterable[CommandInfo]) -> None:
    """Set the help of commands from their docstrings: the text above the options, and the examples below them."""
    for command in commands:
        text, _, examples = inspect.cleandoc(getattr(command.callback, "__doc__", None) or "").partition(
            "\nExamples:\n"
        )
        paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
        command.help = "\n\n".join(paragraphs)
        lines = [line.strip() for line in examples.splitlines() if line.strip()]
        command.epilog = "\n  ".join(["Examples:", *lines]) if lines else None


for group in (app, runs, theory):
    _describe(group.registered_commands)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"flatmin {version('flatmin')}")
        raise typer.Exit


@app.callback()
def _options(
    _debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error. Accepted anywhere on the command line.")
    ] = False,
    _show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit.

    Exit codes: 0: success. 1: a bug, with its traceback, or a claim of `flatmin theory` that does not hold. 2: a
    mistake in the command or its environment, with a message. 3: `flatmin measure` could not measure everything, with
    the reasons. 130: interrupted.

    Args:
        arguments: the arguments after `flatmin`. Default: those of the process.
    """
    words = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in words
    settle_streams()
    try:
        # `python -m flatmin` has another name by default, and shell completion works for one word only.
        app([word for word in words if word != "--debug"], prog_name="flatmin")
    except SystemExit as end:
        if not end.code and (problem := _unprinted()):
            typer.echo(f"flatmin: {problem}", err=True)
            raise SystemExit(2) from None
        raise
    except Exception as error:
        if debug or not explained(error):
            traceback.print_exc()
            if not debug:
                typer.echo(
                    "flatmin: this is a bug in flatmin or in your code; the traceback above shows where.", err=True
                )
            raise SystemExit(2 if explained(error) else 1) from None
        typer.echo(f"flatmin: {' '.join([str(error), *getattr(error, '__notes__', [])])}", err=True)
        raise SystemExit(2) from None


def _unprinted() -> str:
    """Why the output is incomplete; empty if it is complete, or if the program that reads it has closed it."""
    if sys.stdout is not None:
        sys.stdout.flush()
    problem = unwritten()
    return "" if problem is None else f"the output could not be printed ({problem.strerror}); all files are complete."


if __name__ == "__main__":
    main()
