"""`flatmin methods`: the table of methods, and what a composed name means part by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from flatmin.cli.console import make_console

if TYPE_CHECKING:
    from rich.table import Table

    from flatmin.recipes import Method, Recipe

QUESTIONS = {
    "objective": "which loss is climbed?",
    "direction": "along what?",
    "geometry": "in which norm?",
    "mask": "which weights move?",
    "radius": "how far?",
    "when": "on which steps?",
    "points": "how many ascents?",
    "samples": "which samples are descended on?",
    "combine": "what goes to the base?",
}


def methods(
    name: Annotated[
        str | None, typer.Argument(help="A method or a composition such as vasso+asam, to see its parts.")
    ] = None,
    plugin: Annotated[
        list[str] | None, typer.Option(help="An importable module that brings methods of its own. Repeatable.")
    ] = None,
) -> None:
    """List every method with its formula, cost, needs, defaults and paper; or show one recipe part by part."""
    from flatmin.recipes import compose, method_table
    from flatmin.train.locate import search_here

    search_here()
    table = method_table(plugin or ())
    console = make_console()
    if name is None:
        console.print(_overview(table))
        console.print(
            "\n[dim]rho: default radius. grads: gradient evaluations a step. copies: of the moved weights, held during "
            "a step beyond the base optimizer's own. parameters: with their defaults.[/dim]\n"
        )
        console.print(_details(table))
        console.print("Names compose if they set different parts: flatmin methods vasso+bisam-log+asam")
        return
    recipe = compose(name, table)
    console.print(_summary(recipe, [table[word.strip()] for word in name.split("+")]))
    console.print()
    console.print(_parts(recipe))


def _needs(recipe: Recipe) -> str:
    return "; ".join(sorted(need.value for need in recipe.needs)) or "-"


def _parameters(recipe: Recipe) -> str:
    return ", ".join(f"{name.partition('.')[2]}={value!r}" for name, value in recipe.parameters().items()) or "-"


def _overview(table: Mapping[str, Method]) -> Table:
    from rich.text import Text

    grid = _grid("method", "rho", "grads", "copies", "parameters", "needs")
    for method in table.values():
        recipe = method.recipe()
        grid.add_row(
            Text(method.name, style="bold cyan"),
            f"{recipe.default_rho:g}" if recipe.ascends else "-",
            f"{recipe.gradient_evaluations:g}",
            str(recipe.extra_copies),
            Text(_parameters(recipe)),
            Text(", ".join(sorted(need.name.lower().replace("_", " ") for need in recipe.needs)) or "-"),
        )
    return grid


def _details(table: Mapping[str, Method]) -> Table:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for method in table.values():
        about = Text.assemble(f"{method.title}. {method.summary}".rstrip(), "\n", (method.formula, "green"), "\n")
        about.append(method.paper + (f"\n{method.url}\n" if method.url else "\n"), style="dim")
        grid.add_row(Text(method.name, style="bold cyan"), about)
    return grid


def _grid(*headers: str) -> Table:
    from rich import box
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    for header in headers:
        number = header in ("rho", "grads", "copies")
        grid.add_column(header, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return grid


def _summary(recipe: Recipe, named: Sequence[Method]) -> Table:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column()
    grid.add_row("recipe", Text(recipe.name, style="bold cyan"))
    for method in named:
        grid.add_row("formula", Text(f"{method.formula}   ({method.title})"))
    copies = recipe.extra_copies
    grid.add_row(
        "cost",
        f"{recipe.gradient_evaluations:g} gradient{'s' * (recipe.gradient_evaluations != 1)} a step, "
        f"{copies} extra cop{'y' if copies == 1 else 'ies'} of the moved weights",
    )
    grid.add_row(
        "rho", f"{recipe.default_rho:g} (the geometry's default)" if recipe.ascends else "none: it never ascends"
    )
    grid.add_row("needs", Text(_needs(recipe)))
    for method in named:
        grid.add_row("paper", Text(f"{method.paper}  {method.url}".rstrip()))
    return grid


def _parts(recipe: Recipe) -> Table:
    from rich.text import Text

    grid = _grid("part", "question", "answer")
    for kind, part in recipe.parts.items():
        described = (type(part).__doc__ or "").strip().partition("\n")[0]
        grid.add_row(kind, Text(QUESTIONS[kind], style="dim"), Text.assemble((str(part), "bold"), f"\n{described}"))
    return grid
