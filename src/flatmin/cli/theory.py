"""`flatmin theory`: demonstrate the convergence theory of SAM, and check its conditions."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from flatmin.cli import completion as complete
from flatmin.cli.console import make_console
from flatmin.cli.options import Out
from flatmin.report.terminal import print_table
from flatmin.words import elapsed

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
    """A command group that treats the names of demonstrations as commands."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        is_own = not args or args[0] in self.commands or args[0].startswith("-")
        return super().resolve_command(ctx, args if is_own else ["one", *args])

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Complete commands, and demonstrations."""
        names = next(param for param in self.commands["one"].params if param.name == "names")
        return [*super().shell_complete(ctx, incomplete), *names.shell_complete(ctx, incomplete)]


theory = typer.Typer(
    cls=_Names,
    help="Demonstrate the convergence theory of SAM. `flatmin theory NAME` runs a demonstration: it prints a table, "
    "draws a figure and checks claims (exit code 1 if one fails). `flatmin theory list` lists the names.",
    epilog="Examples:\n  flatmin theory list\n  flatmin theory orbit --no-figure",
    no_args_is_help=True,
)


@theory.command("list")
def list_demonstrations() -> None:
    """List the demonstrations.

    Examples:
        flatmin theory list
        flatmin theory quadratic
    """
    from flatmin.theory.demonstrations import DEMONSTRATIONS
    from flatmin.theory.demonstrations.demonstration import PAPER

    console = make_console()
    rows = [(d.name, d.title, d.source.removeprefix(f"{PAPER}, ")) for d in DEMONSTRATIONS.values()]
    print_table([("name", "what it shows", "in the paper"), *rows], console)
    console.print(f"\nThe paper: {PAPER}.", markup=False)


@theory.command("all")
def show_all(out: Out = HOME, png: Png = False, svg: Svg = False, no_figure: NoFigure = False) -> None:
    """Run all demonstrations, in less than a minute on two cores.

    Examples:
        flatmin theory all
        flatmin theory all --svg --out figures
    """
    from flatmin.theory.demonstrations import DEMONSTRATIONS

    _show(list(DEMONSTRATIONS.values()), out, () if no_figure else _kinds(png, svg))


@theory.command("one", hidden=True)
def show_one(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...",
            help="Demonstrations; `flatmin theory list` lists them.",
            autocompletion=complete.demonstrations,
        ),
    ],
    out: Out = HOME,
    png: Png = False,
    svg: Svg = False,
    no_figure: NoFigure = False,
) -> None:
    """Run demonstrations by name: print the table, draw the figure and check the claims of each.

    Examples:
        flatmin theory orbit
        flatmin theory quadratic usam --svg
    """
    from flatmin.theory.demonstrations import find

    _show([find(name, WORDS) for name in names], out, () if no_figure else _kinds(png, svg))


@theory.command(context_settings={"ignore_unknown_options": True})
def check(
    step: Annotated[
        str, typer.Argument(metavar="STEP", help="Step size t_n, such as 0.1, diminish1 or power:c=0.5,p=0.6.")
    ],
    radius: Annotated[
        str,
        typer.Argument(metavar="RADIUS", help="Radius rho_n, in the same syntax; tied:0.5 is half of the step size."),
    ],
    on: Annotated[str | None, typer.Option(metavar="F", help="Function to minimise, such as quadratic:1,4.")] = None,
    functions: Annotated[
        str | None,
        typer.Option("--class", metavar="CLASS", help="Class of functions, such as 'convex, L=4, unique'."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="METHOD", help="Any method, or igd, igdr, extragradient.", autocompletion=complete.methods
        ),
    ] = "sam",
) -> None:
    """Print which convergence theorem applies to a step size and a radius, and its conclusions.

    Give either --on or --class. `flatmin theory rules` prints the syntax.

    Examples:
        flatmin theory check diminish1 tied:0.5 --on quadratic:1,4
        flatmin theory check 0.1 0.05 --class "convex, L=4"
    """
    from flatmin.theory.checker import check as judge
    from flatmin.theory.classes import FunctionClass
    from flatmin.theory.named import read_function

    if (on is None) == (functions is None):
        raise ValueError("give either a function, as in --on quadratic:1,4, or a class, as in --class 'convex, L=4'.")
    what = FunctionClass.read(functions or "") if on is None else read_function(on)
    verdict = judge(step, radius, what, method)
    console = make_console()
    console.print(str(verdict), markup=False, soft_wrap=True)
    if hint := _without_L(verdict):
        console.print(hint, markup=False, soft_wrap=True)


@theory.command()
def rules() -> None:
    """Print the syntax of step sizes, radii, functions, and classes of functions for `flatmin theory check`.

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
    console.print("* joins the factors of a product.\n", markup=False)
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
    """Run demonstrations, print them, draw figures and check claims; exit code 1 if a claim fails."""
    from flatmin.theory import draw

    if kinds:
        draw.require()  # before the runs, because matplotlib may be missing
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
    shown_count = f"{len(wanted)} demonstration{'s' * (len(wanted) != 1)}"
    console.print(f"{shown_count}, {count} claims, {summary}; {elapsed(seconds)}", markup=False)
    if failed:
        for name, claim in failed:
            typer.echo(f"flatmin theory: {name}: a claim does not hold: {claim}", err=True)
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
        return "The theorems need the Lipschitz constant L: add it to the class, as in --class 'L=4'."
    return ""
