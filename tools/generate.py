"""Write what pages say about methods, settings and files, from the table of names, docstrings and imports.

    python tools/generate.py            # write the pages that are behind the code
    python tools/generate.py --check    # print what would change, and exit 1 if anything would

A generated part stands between `<!-- generated:NAME -->` and `<!-- /generated:NAME -->`. The catalogue of all settings
(`flatmin.cli.catalogue`) is a file of its own.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path

import torch

import flatmin
from flatmin.cli import loops, matrix
from flatmin.cli.catalogue import FILE, as_text, collect, short
from flatmin.methods import ELSEWHERE, METHODS, Method, Need, Recipe
from flatmin.train.keys import Key

ROOT = Path(__file__).resolve().parents[1]
RULES = {"schedule", "radius", "mask"}


def main(words: list[str] | None = None, root: Path = ROOT) -> int:
    """Write the pages, or show what they lack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is behind the code")
    check = parser.parse_args(words).check
    behind = 0
    for name in (*dict.fromkeys(page for page, _ in PARTS), *FILES):
        page = root / name
        before = page.read_text(encoding="utf-8") if page.is_file() else ""
        after = FILES[name]() if name in FILES else refreshed(name, before)
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
        "the length of the training or its samples: `recipe.for_length(epochs * len(loader), len(data))`",
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


def elsewhere(_: Mapping[str, Method]) -> str:
    """A line for each method that is no recipe, with its code and its page."""
    lines = []
    for name, place in ELSEWHERE.items():
        text = re.sub(r"\bflatmin(\.\w+)+", lambda found: f"`{found[0]}`", place)
        lines.append(f"- `{name}`: " + re.sub(r"docs/(\S+\.md)", r"[\1](../\1)", text) + ".")
    return "\n".join(lines)


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(heads)]
    lines += [["---"] * len(lines[0])]
    lines += [[cell.replace("||", "‖").replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(re.sub(r" +\|", " |", f"| {' | '.join(line)} |") for line in lines)


# -- settings ----------------------------------------------------------------------------------------------------------

DEFINED = cache(collect)  # the catalogue, once


def run_settings(_: Mapping[str, Method]) -> str:
    """A table for each group of the settings of a run."""
    groups: dict[str, list[Key]] = {}
    for key in (key for place in ("train", "logging") for key in DEFINED().settings[place].keys):
        groups.setdefault(key.group, []).append(key)
    return "\n\n".join(f"### {title}\n\n{setting_table(keys)}" for title, keys in groups.items())


def settings_of(*places: str) -> Callable[[Mapping[str, Method]], str]:
    """The table of the settings of these places, words of `flatmin.cli.catalogue.TITLES`."""
    return lambda _: "\n\n".join(setting_table(DEFINED().settings[place].keys) for place in places)


def setting_table(keys: Iterable[Key]) -> str:
    """A line for each setting; without columns that would be empty."""
    rows = [(f"`{key.name}`", _code(key.default), _values(key), key.help) for key in keys]
    heads = ("setting", "default", "values", "what it is")
    used = [i for i in range(len(heads)) if any(row[i] for row in rows)]
    return _table([heads[i] for i in used], [[row[i] for i in used] for row in rows])


def _values(key: Key) -> str:
    values = short(key)
    return values if values == key.kind else ", ".join(map(_code, values.split(", ")))


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


# -- the files of the package ------------------------------------------------------------------------------------------

SOURCES = Path(flatmin.__file__).parent
OPEN = ("optim", "methods")  # the packages whose files are shown
SETTINGS = "{wrappingWidth: 120, nodeSpacing: 16, rankSpacing: 28, padding: 8, subGraphTitleMargin: {bottom: 12}}"
Graph = dict[str, set[str]]


def picture(_: Mapping[str, Method]) -> str:
    """The packages, and the files of the open ones, as a Mermaid flowchart in which arrows lead to what is imported.

    Of the engine it shows the files that run in a plain step. Arrows that follow from others are left out, and what has
    the same neighbours shares a box.
    """
    lines = ["```mermaid", "---", f"config: {{flowchart: {SETTINGS}}}", "---", "flowchart TB"]
    ends: dict[str, tuple[str, ...]] = {}  # of an open package: its first boxes, its last boxes
    for folder in (*(SOURCES / name for name in OPEN), SOURCES):
        graph, prefix = imports(folder), "" if folder == SOURCES else f"{folder.name}_"
        if folder.name == "optim":
            ran = stepped()
            graph = {name: below(graph, name) & ran for name in sorted(ran)}
        graph = {name: others.difference(*(below(graph, other) for other in others)) for name, others in graph.items()}
        shared: dict[object, list[str]] = defaultdict(list)
        for name, others in graph.items():
            shared[name in OPEN, frozenset(others), frozenset(x for x in graph if name in graph[x])].append(name)
        box = {name: prefix + names[0] for names in shared.values() for name in names}
        arrows = sorted({(box[name], box[other]) for name, others in graph.items() for other in others})
        nodes = [
            f'{box[names[0]]}["{"<br/>".join(f"<b>{name}</b><br/>{words(folder, name)}" for name in names)}"]'
            for names in shared.values()
            if not set(names) & set(OPEN)
        ]
        if prefix:
            nodes = [f'subgraph {folder.name} ["{folder.name}: {words(SOURCES, folder.name)}"]', *nodes, "end"]
            imported, importing = {b for _, b in arrows}, {a for a, _ in arrows}
            ends[folder.name] = tuple(" & ".join(sorted(set(box.values()) - x)) for x in (imported, importing))
        lines += [*nodes, *(f"{name} --> {other}" for name, other in arrows)]
    # Links that nobody sees put what is imported below what imports it.
    open_arrows = [(a, b) for a, b in arrows if a in OPEN or b in OPEN]
    lines += [f"{ends.get(a, (a, a))[1]} ~~~ {ends.get(b, (b, b))[0]}" for a, b in open_arrows]
    return "\n".join([*lines, "```"])


def imports(folder: Path) -> Graph:
    """Each file and folder of code in a folder, without suffix -> those that it imports, but for type checkers."""
    paths = [*folder.glob("[!_]*.py"), *folder.glob("*/__init__.py")]
    graph: Graph = {name: set() for name in sorted(p.stem if p.parent == folder else p.parent.name for p in paths)}
    inside = ".".join(["flatmin", *folder.relative_to(SOURCES).parts, ""])
    for path in folder.rglob("*.py"):
        name = path.relative_to(folder).with_suffix("").parts[0]
        nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))] if name in graph else []
        for node in nodes:  # grows
            unused = node.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) else []
            inner = [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr)]
            nodes += [child for child in inner if child not in unused]
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                start = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                found = [f"{start}{alias.name}" for alias in node.names]
                graph[name] |= {x.removeprefix(inside).split(".")[0] for x in found if x.startswith(inside)}
    return {name: others & set(graph) - {name} for name, others in graph.items()}


def below(graph: Graph, name: str) -> set[str]:
    """All that a file or folder imports, itself or through others."""
    found, todo = set(graph[name]), list(graph[name])
    for other in todo:  # grows
        todo += graph[other] - found
        found |= graph[other]
    return found


def stepped() -> set[str]:
    """The files of the engine that run in `SAM.step(closure)`, around SGD and without options."""
    w = torch.ones(2, requires_grad=True)
    optimizer = flatmin.SAM(torch.optim.SGD([w], 0.1))
    found: set[str] = set()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    for _ in range(4):  # the first updates also look for weights that another optimizer trains
        found.clear()
        sys.setprofile(lambda frame, event, argument: found.add(frame.f_code.co_filename))
        try:
            optimizer.step(closure)
        finally:
            sys.setprofile(None)
    home = Path(flatmin.__file__).parent / "optim"
    return {path.stem for path in map(Path, found) if path.parent == home}


def sentence(folder: Path, name: str) -> str:
    """The first sentence of a module's docstring."""
    path = folder / name / "__init__.py" if (folder / name).is_dir() else folder / f"{name}.py"
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return re.split(r"(?<=[.?])\s", text)[0]


def words(folder: Path, name: str) -> str:
    """The first clause of a module's docstring."""
    return re.split(r"[:,]|\.$", sentence(folder, name))[0].replace("`", "")


def files(_: Mapping[str, Method]) -> str:
    """One line for each file of the open packages."""
    paths = [path for name in OPEN for path in sorted((SOURCES / name).glob("[!_]*.py"))]
    rows = [(f"`{p.parent.name}/{p.name}`", sentence(p.parent, p.stem).removesuffix(".")) for p in paths]
    return _table(("file", "what it is for"), rows)


# Page and name of a part -> what is written there.
PARTS: dict[tuple[str, str], Callable[[Mapping[str, Method]], str]] = {
    ("README.md", "methods"): readme,
    ("docs/methods/index.md", "tables"): overview,
    ("docs/methods/index.md", "elsewhere"): elsewhere,
    ("docs/methods/index.md", "needs"): needs,
    ("docs/methods/index.md", "matrix"): matrix.as_markdown,
    ("docs/loops/index.md", "loops"): loops.as_markdown,
    ("docs/contributing/design.md", "picture"): picture,
    ("docs/contributing/design.md", "files"): files,
    ("docs/train/index.md", "settings"): run_settings,
    ("docs/measure/settings.md", "settings"): settings_of("measure"),
    ("docs/studies/index.md", "entries"): settings_of("study"),
    ("docs/studies/index.md", "measure"): settings_of("view"),
    ("docs/studies/index.md", "ray"): settings_of("ray"),
    ("docs/studies/index.md", "slurm"): settings_of("slurm"),
}
FILES: dict[str, Callable[[], str]] = {f"src/flatmin/cli/{FILE}": lambda: as_text(DEFINED())}

if __name__ == "__main__":
    raise SystemExit(main())
