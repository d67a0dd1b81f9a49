"""`flatmin theory`: demonstrations of the convergence theory, and a checker of its conditions."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from flatmin.cli.console import make_console
from flatmin.cli.options import Out
from flatmin.report.terminal import print_table

if TYPE_CHECKING:
    from rich.console import Console

    from flatmin.theory.demonstrations.demonstration import Claim, Demonstration, DemonstrationResult
    from flatmin.theory.verdict import Verdict

HOME = Path("flatmin-theory")
WORDS = ("list", "all", "check", "rules")

Png = Annotated[bool, typer.Option("--png", help="Write figures as PNG (the default).")]
Svg = Annotated[bool, typer.Option("--svg", help="Write figures as SVG; with --png in both formats.")]
NoFigure = Annotated[bool, typer.Option("--no-figure", help="Draw no figures.")]


class _Names(TyperGroup):
    """A command group that reads other names as demonstrations."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        is_own = not args or args[0] in self.commands or args[0].startswith("-")
        return super().resolve_command(ctx, args if is_own else ["one", *args])


theory = typer.Typer(
    cls=_Names,
    help="Demonstrate the convergence theory of SAM: `flatmin theory NAME` prints a table, draws a figure and checks "
    "its claims (exit code 1 if one fails). Names: flatmin theory list.",
    no_args_is_help=True,
)


@theory.command("list")
def list_demonstrations() -> None:
    """List the demonstrations.

    Examples:
        flatmin theory list
        flatmin theory descent
    """
    from flatmin.theory.demonstrations import DEMONSTRATIONS
    from flatmin.theory.demonstrations.demonstration import PAPER

    console = make_console()
    rows = [(d.name, d.title, d.source.removeprefix(f"{PAPER}, ")) for d in DEMONSTRATIONS.values()]
    print_table([("name", "what it shows", "of the paper"), *rows], console)
    console.print(f"\nThe paper: {PAPER}.", markup=False)


@theory.command("all")
def show_all(out: Out = HOME, png: Png = False, svg: Svg = False, no_figure: NoFigure = False) -> None:
    """Run every demonstration; less than a minute on two cores.

    Examples:
        flatmin theory all
        flatmin theory all --svg --out figures
    """
    from flatmin.theory.demonstrations import DEMONSTRATIONS

    _show(list(DEMONSTRATIONS.values()), out, () if no_figure else _kinds(png, svg))


@theory.command("one", hidden=True)
def show_one(
    names: Annotated[list[str], typer.Argument(metavar="NAME...")],
    out: Out = HOME,
    png: Png = False,
    svg: Svg = False,
    no_figure: NoFigure = False,
) -> None:
    """Run demonstrations by name: print the table, draw the figure, check the claims of each."""
    from flatmin.theory.demonstrations import find

    _show([find(name, WORDS) for name in names], out, () if no_figure else _kinds(png, svg))


@theory.command(context_settings={"ignore_unknown_options": True})
def check(
    step: Annotated[str, typer.Argument(help="The step size t_n, such as 0.1, diminish1 or power:c=0.5,p=0.6.")],
    radius: Annotated[str, typer.Argument(help="The radius rho_n, likewise, or tied:0.5 for half of the step size.")],
    on: Annotated[str | None, typer.Option(metavar="F", help="A function, e.g. quadratic:1,4.")] = None,
    functions: Annotated[
        str | None, typer.Option("--class", metavar="CLASS", help="A class of functions, e.g. 'convex, L=4, unique'.")
    ] = None,
    method: Annotated[str, typer.Option(help="Any method, or igd, igdr, extragradient.")] = "sam",
) -> None:
    """Print which theorem applies to a step size and a radius, and its conclusions. Syntax: flatmin theory rules.

    Examples:
        flatmin theory check diminish1 tied:0.5 --on quadratic:1,4
        flatmin theory check 0.1 0.05 --class "convex, L=4"
    """
    from flatmin.theory.checker import check as judge
    from flatmin.theory.classes import FunctionClass
    from flatmin.theory.named import read_function

    if (on is None) == (functions is None):
        raise ValueError("name a function with --on quadratic:1,4, or a class with --class 'convex, L=4'.")
    what = FunctionClass.read(functions or "") if on is None else read_function(on)
    verdict = judge(step, radius, what, method)
    console = make_console()
    console.print(str(verdict), markup=False, soft_wrap=True)
    if hint := _without_L(verdict):
        console.print(hint, markup=False, soft_wrap=True)


@theory.command()
def rules() -> None:
    """Print the syntax of step sizes and radii, functions, and classes of functions.

    Examples:
        flatmin theory rules
        flatmin theory check power:c=0.5,p=0.6 0.1 --class "L=4"
    """
    from flatmin.theory import classes
    from flatmin.theory.named import FUNCTIONS
    from flatmin.theory.parse import FORMS

    console = make_console()
    forms = [
        (name, ", ".join(key if key != form.lone else f"{key} (alone)" for key in form.keys), form.formula)
        for name, form in FORMS.items()
    ]
    console.print(
        "Step sizes t_n and radii rho_n, n = 1, 2, ...: a number, name:number or name:key=number,...;", end=" "
    )
    console.print("a product is joined by *.\n", markup=False)
    print_table([("rule", "keys", "value at n; e = floor((n - 1) / epoch)"), *forms], console)
    console.print("\nFunctions for --on, with numbers after a colon:\n", markup=False)
    print_table([("function", "what it is"), *((name, p.summary) for name, p in FUNCTIONS.items())], console)
    console.print("\nWords for --class, joined by commas:\n", markup=False)
    words = [(word, meaning) for word, (_, meaning) in classes.WORDS.items()]
    words += [("L=4", "the Lipschitz constant of the gradient"), ("kl=0.5", "the KL exponent q, phi(s) = M s^q")]
    print_table([("word", "meaning"), *words], console)


def _kinds(png: bool, svg: bool) -> tuple[str, ...]:
    return tuple(kind for kind, wanted in (("png", png or not svg), ("svg", svg)) if wanted)


def _show(wanted: list[Demonstration], out: Path, kinds: tuple[str, ...]) -> None:
    """Run, print, draw and check; exit code 1 if a claim fails."""
    from flatmin.theory import draw

    if kinds:
        draw.require()  # before the runs: matplotlib may be missing
    console = make_console()
    failed: list[tuple[str, Claim]] = []
    begun, count = time.perf_counter(), 0
    for demonstration in wanted:
        shown = demonstration.run()
        _print(demonstration, shown, console)
        for kind in kinds:
            path = draw.save(draw.figure(shown), out / f"{demonstration.name}.{kind}", dpi=96)
            console.print(f"figure: {path}", markup=False, soft_wrap=True)
        console.print()
        count += len(shown.claims)
        failed += [(demonstration.name, claim) for claim in shown.claims if not claim.holds]
    seconds = time.perf_counter() - begun
    summary = "all hold" if not failed else f"{len(failed)} of them fail{'s' * (len(failed) == 1)}"
    console.print(f"{len(wanted)} shown, {count} claims, {summary}; {seconds:.0f} s", markup=False)
    if failed:
        for name, claim in failed:
            typer.echo(f"flatmin theory: {name}: this claim fails: {claim}", err=True)
        raise typer.Exit(1)


def _print(demonstration: Demonstration, shown: DemonstrationResult, console: Console) -> None:
    from flatmin.theory.demonstrations.demonstration import shown as cell

    console.print(f"[bold]{demonstration.name}[/bold]  ", end="")
    console.print(f"{shown.title}\n{shown.statement}\n{demonstration.source}.\n", markup=False)
    print_table([shown.columns, *([cell(value) for value in row] for row in shown.rows)], console)
    console.print()
    for claim in shown.claims:
        console.print(f"{'ok  ' if claim.holds else 'FAIL'}  {claim}", markup=False, soft_wrap=True)


def _without_L(verdict: Verdict) -> str:
    undecided = any(c.holds is None for theorem in verdict.theorems for c in theorem.conditions)
    if verdict.theorem is None and verdict.functions.L is None and undecided:
        return "the theorems need L: add it to the class, as in --class 'L=4'."
    return ""
