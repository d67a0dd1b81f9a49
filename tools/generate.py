"""Write what pages say about the methods, from the table of names: tables, costs, needs, compositions.

    python tools/generate.py            # write the pages that are behind the code
    python tools/generate.py --check    # print what would change, and exit 1 if anything would

A generated part stands between `<!-- generated:NAME -->` and `<!-- /generated:NAME -->`.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from flatmin.cli import loops, matrix
from flatmin.methods import METHODS, Method, Need, Recipe

ROOT = Path(__file__).resolve().parents[1]
RULES = {"schedule", "radius", "mask"}


def main(words: list[str] | None = None, root: Path = ROOT) -> int:
    """Write the pages, or show what they lack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is behind the code")
    check = parser.parse_args(words).check
    behind = 0
    for name in dict.fromkeys(page for page, _ in PARTS):
        page = root / name
        before = page.read_text(encoding="utf-8")
        after = refreshed(name, before)
        if before == after:
            continue
        behind += 1
        if check:
            lines = before.splitlines(), after.splitlines()
            print("\n".join(difflib.unified_diff(*lines, f"{name} as it is", f"{name} as generated", lineterm="")))
        else:
            page.write_text(after, encoding="utf-8")
            print(f"wrote {name}")
    if behind and check:
        print(f"\n{behind} page(s) are behind the code; run: python tools/generate.py")
    return int(bool(behind) and check)


def refreshed(page: str, text: str) -> str:
    """A page's text with its generated parts made anew.

    Raises:
        ValueError: the page has no markers for a part.
    """
    for (of, part), render in PARTS.items():
        if of != page:
            continue
        pattern = re.compile(rf"(<!-- generated:{part} -->\n).*?(<!-- /generated:{part} -->)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(
                f"{page} needs one pair of markers <!-- generated:{part} --> ... <!-- /generated:{part} -->."
            )
        new = render(METHODS)
        text = pattern.sub(lambda found, new=new: f"{found[1]}{new}\n{found[2]}", text)
    return text


def readme(table: Mapping[str, Method]) -> str:
    """One line for each method: what it does, where it is from, what it costs."""
    rows = []
    for name, method in table.items():
        recipe = method.recipe()
        cells = (f"`{name}`", method.summary.removesuffix("."), cited(method.paper), cost(recipe), rho(recipe))
        rows.append(cells)
    return _table(("name", "what it does", "source", "gradients a step", "rho"), rows)


def cited(paper: str) -> str:
    """A source in a few words: "Foret et al., ICLR 2021"; nothing for what comes from no paper."""
    if not paper[:1].isupper():
        return ""
    short = []
    for source in paper.split("; "):
        several = re.match(r"(.+?) & [\w-]+", source)
        first = source.partition(",")[0]
        if several:
            names = re.split(", | & ", several[0])
            first = f"{names[0]} et al." if len(names) > 2 else several[0]
        venues = re.findall(r"(?:[A-Z]\w+ )?\b(?:19|20)\d\d\b", source)
        short.append(", ".join([first, *venues[-1:]]))
    return "; ".join(short)


SECTIONS = ("Direction, norm and ascent loss", "Points, samples and batches", "What the base optimizer gets", "Rules")


def section(method: Method) -> str:
    """Under which heading a method stands: by what it sets."""
    kinds = {part.kind for part in method.parts}
    if "combine" in kinds:
        return SECTIONS[2]
    if kinds & {"inner_loop", "samples"}:
        return SECTIONS[1]
    return SECTIONS[3] if kinds and kinds <= RULES and method.recipe().ascends else SECTIONS[0]


def overview(table: Mapping[str, Method]) -> str:
    """A table for each section, one line for each method."""
    pieces = []
    for title in SECTIONS:
        rows = []
        for name, method in table.items():
            if section(method) == title:
                recipe = method.recipe()
                needs = ", ".join(need.word for need in Need if need in recipe.needs)
                formula = re.sub(" +", " ", method.formula)
                cells = (f"`{name}`", formula, cost(recipe), str(recipe.extra_copies), rho(recipe), needs, method.note)
                rows.append(cells)
        heads = ("name", "formula", "grads", "copies", "rho", "needs", "differs, or note")
        pieces.append(f"### {title}\n\n{_table(heads, rows)}")
    return "\n\n".join(pieces)


def needs(table: Mapping[str, Method]) -> str:
    """What each need means for the loop, and which methods have it."""
    recipes = {name: method.recipe() for name, method in table.items()}
    rows = []
    for need in Need:
        if asking := [name for name, recipe in recipes.items() if need in recipe.needs]:
            rows.append((need.word, _listed(asking), need.value))
    single = {name: recipe for name, recipe in recipes.items() if Need.MICRO_BATCHES not in recipe.needs}
    rows.append((
        "own passes",
        _listed(name for name, recipe in single.items() if not recipe.two_pass),
        "`step(closure)` or `passes()`: the step is not one pass at w and one at w + eps",
    ))  # fmt: skip
    rows.append((
        "",
        _listed(name for name, recipe in single.items() if recipe.one_pass),
        "or `optimizer.train()` ... `optimizer.eval()` around loops without passes",
    ))  # fmt: skip
    rows.append((
        "length",
        _listed(name for name, recipe in recipes.items() if recipe.for_length(1) != recipe),
        "the length of the training: `recipe.for_length(epochs * len(loader))`",
    ))  # fmt: skip
    return _table(("needs", "methods", "what that is, and what to write"), rows)


def cost(recipe: Recipe) -> str:
    """Gradient evaluations a step."""
    return f"{recipe.gradient_evaluations:.3g}"


def rho(recipe: Recipe) -> str:
    """The default radius; nothing for a method that has none."""
    return f"{recipe.default_rho:g}" if recipe.ascends else ""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(heads)]
    lines += [["---"] * len(lines[0])]
    lines += [[cell.replace("||", "‖").replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(re.sub(r" +\|", " |", f"| {' | '.join(line)} |") for line in lines)


# Page and name of a part -> what is written there.
PARTS: dict[tuple[str, str], Callable[[Mapping[str, Method]], str]] = {
    ("README.md", "methods"): readme,
    ("docs/methods.md", "tables"): overview,
    ("docs/methods.md", "needs"): needs,
    ("docs/methods.md", "matrix"): matrix.as_markdown,
    ("docs/loops.md", "loops"): loops.as_markdown,
}

if __name__ == "__main__":
    raise SystemExit(main())
