"""`flatmin methods`: list the methods, show the parts of a composition, and show which methods compose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from flatmin.cli import completion as complete
from flatmin.cli.console import make_console
from flatmin.cli.options import Plugin
from flatmin.report.terminal import print_table

if TYPE_CHECKING:
    from rich.console import Console

    from flatmin.methods import Method, Recipe

RULES = ("schedule", "radius", "mask")


def methods(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="METHOD",
            help="A method or a composition such as vasso+asam, to show its parts.",
            autocompletion=complete.methods,
        ),
    ] = None,
    plugin: Plugin = None,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Print which pairs of methods compose, and why others do not.")
    ] = False,
    loops: Annotated[
        bool, typer.Option("--loops", help="Print which training loops support each method, and why others do not.")
    ] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the matrix, or the table of --loops, as Markdown.")
    ] = False,
) -> None:
    """List all methods with formula, cost, requirements, defaults and paper; or show the parts of one method.

    Examples:
        flatmin methods
        flatmin methods vasso+bisam-log+asam
        flatmin methods --matrix
    """
    from flatmin.cli import loops as served
    from flatmin.cli import matrix as pairs
    from flatmin.methods import ELSEWHERE, compose, method_table
    from flatmin.methods.names import elsewhere
    from flatmin.train.locate import search_here

    search_here()
    table = method_table(plugin or ())
    console = make_console()
    if name is not None and (matrix or loops or markdown):
        raise ValueError(f"{'--loops' if loops else '--matrix'} shows all methods; leave out {name!r}.")
    if matrix and loops:
        raise ValueError("--matrix and --loops cannot be combined; leave out one of them.")
    if matrix or loops or markdown:
        table_of = served if loops else pairs
        text = table_of.as_markdown(table) if markdown else table_of.as_text(table, console.width)
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        return
    if name is None:
        for title, group in _groups(table):
            console.print(f"[bold]{title}[/bold]\n")
            print_table(_overview(group), console)
            console.print()
        console.print(
            "[dim]rho: default radius. grads: gradient evaluations per step. copies: additional copies of the "
            "perturbed weights during a step, beyond the state of the base optimizer. sets: parts that the method "
            "sets; methods that set different parts compose, such as vasso+bisam-log+asam. All pairs: flatmin methods "
            "--matrix. "
            f"Not methods of this table, but in flatmin: {', '.join(ELSEWHERE)}; flatmin methods NAME says "
            "where.[/dim]\n"
        )
        _print_details(table, console)
        return
    if name not in table and (place := elsewhere(name)):
        console.print(f"{name} is not a method of the table but {place}.", markup=False, highlight=False)
        return
    recipe = compose(name, table)
    print_table(_summary(recipe, [table[word] for word in recipe.name.split("+")]), console, header=False)
    console.print()
    print_table(_parts(recipe), console)


def _needs(recipe: Recipe) -> str:
    return "; ".join(sorted(need.value for need in recipe.needs)) or "-"


def _groups(table: Mapping[str, Method]) -> list[tuple[str, dict[str, Method]]]:
    """The methods, then the rules for the schedule, the radius and the mask."""
    rules = {
        name: method
        for name, method in table.items()
        if method.parts and method.recipe().ascends and all(part.kind in RULES for part in method.parts)
    }
    methods = {name: method for name, method in table.items() if name not in rules}
    return [
        ("Methods", methods),
        ("Rules for steps, radius or weights. A rule alone means SAM with this rule.", rules),
    ]


def _overview(table: Mapping[str, Method]) -> list[list[str]]:
    rows = [["method", "rho", "grads", "copies", "sets", "needs"]]
    for method in table.values():
        recipe = method.recipe()
        rows.append(
            [
                method.name,
                f"{recipe.default_rho:g}" if recipe.ascends else "-",
                f"{recipe.gradient_evaluations:.3g}",
                str(recipe.extra_copies),
                ", ".join(part.kind for part in method.parts) or "-",
                ", ".join(sorted(need.word for need in recipe.needs)) or "-",
            ]
        )
    return rows


def _print_details(table: Mapping[str, Method], console: Console) -> None:
    from rich.padding import Padding
    from rich.text import Text

    for method in table.values():
        head = Text.assemble((method.name, "bold cyan"), f"  {method.title}. {method.summary}".rstrip())
        console.print(head)
        lines = Text(method.formula, style="green")
        parameters = ", ".join(
            f"{name}={value!r}" for part in method.parts for name, value in part.parameters().items()
        )
        if parameters:
            lines.append(f"\n{parameters}", style="not green")
        lines.append(f"\n{method.paper}", style="not green dim")
        if method.url:
            lines.append(f"\n{method.url}", style="not green dim")
        console.print(Padding(lines, (0, 0, 1, 4), expand=False))


def _summary(recipe: Recipe, named: Sequence[Method]) -> list[list[str]]:
    copies = recipe.extra_copies
    cost = (
        f"{recipe.gradient_evaluations:.3g} gradient{'s' * (recipe.gradient_evaluations != 1)} per step, "
        f"{copies} additional cop{'y' if copies == 1 else 'ies'} of the perturbed weights"
    )
    rho = f"{recipe.default_rho:g} (the method's default)" if recipe.ascends else "none: there is no ascent"
    return [
        ["recipe", recipe.name],
        *(["formula", f"{method.formula}   ({method.title})"] for method in named),
        ["cost", cost],
        ["rho", rho],
        ["needs", _needs(recipe)],
        *(["paper", f"{method.paper}  {method.url}".rstrip()] for method in named),
    ]


def _parts(recipe: Recipe) -> list[list[str]]:
    rows = [["part", "question", "this method"]]
    for kind, part in recipe.parts.items():
        described = (type(part).__doc__ or "").strip().partition("\n")[0]
        rows.append([kind, part.question, f"{part}\n{described}"])
    return rows
