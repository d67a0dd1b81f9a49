"""Self-contained HTML pages: a shell, sortable tables and themed figures, the parts of every report.

A page is one file that works without a network: style and script are inside, and so is plotly.js if there is a
figure. Light and dark follow the reader's system; figures name their colours as "var:<name>" from
`templates/page.css` and follow too. The pieces are templates of Jinja, in `templates/`, which escape every text.

    >>> columns = [Column("arm"), Column("accuracy")]
    >>> html = page("A <title>", [heading("Results"), table(columns, [[Cell("sam"), Cell("95.1", sort=95.1)]])])
    >>> "<title>A &lt;title&gt;</title>" in html
    True
"""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.util
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatmin.train.files import as_utf8

if TYPE_CHECKING:
    from jinja2 import Environment

# Nothing may be fetched: a page that is opened from a mail or a share must not call anywhere. Only the page's own
# scripts run.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src {scripts}; img-src data: blob:; base-uri 'none'; "
    "form-action 'none'"
)

NUM_TONES = 10
_TALL = 30  # tables of more rows scroll in a box of their own
_PROSE, _SHORT = 32, 12  # cells of more characters wrap; those of more than the second do on a phone
_STACKED = 4  # tables of so many columns stand a row in a block on a phone
_HEADLINE = 150  # characters of a note that stand without a click
_SEVERAL = 3  # more notes than these get a heading
# Between two sentences, and not after "et al." or before the number in "Fig. 3".
_SENTENCE = re.compile(
    r"(?<=[.!?])(?<!\bal\.)(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\bvs\.)\s+(?=[^\W\d_a-z]|['\"])|(?<=[a-z]{4}\.)\s+(?=\d)"
)


@dataclass(frozen=True)
class Markup:
    """A piece of finished HTML. Only this module makes it from text, and escapes while it does."""

    text: str
    figures: int = 0  # how many figures it holds; the page embeds plotly.js if any does

    def __add__(self, other: Markup) -> Markup:
        return Markup(self.text + other.text, self.figures + other.figures)

    def __html__(self) -> str:  # templates take it as it is
        return self.text


@dataclass(frozen=True)
class Column:
    """A table column: its header, a longer explanation shown on hover, and whether its cells are text, or prose."""

    title: str
    hint: str = ""
    text: bool = False
    prose: bool = False  # text that takes the room that the other columns leave


@dataclass(frozen=True)
class Cell:
    """A table cell: its text, the number it sorts by (None: by its text), a weaker second part, a warning, a tone."""

    text: str
    sort: float | None = None
    minor: str = ""
    flag: str = ""
    tone: str = ""

    @property
    def key(self) -> str:
        """The number that it sorts by, as text; empty if there is none."""
        return repr(float(self.sort)) if self.sort is not None and math.isfinite(self.sort) else ""


@dataclass(frozen=True)
class Figure:
    """A plotly figure as plain data.

    Args:
        data: traces, as plotly.js takes them. `legendgroup` is the key by which the page's legend hides them, and
            `points`, if there, the keys of the choices that show them.
        layout: laid over the house layout (fonts, grid, margins), key by key.
        height: in CSS pixels.
        narrow_margin: margins on a phone.
    """

    data: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any] = field(default_factory=dict)
    height: int = 420
    narrow_margin: Mapping[str, int] = field(default_factory=lambda: {"l": 48, "r": 8, "t": 12})


def escape(text: object) -> str:
    """Text for HTML, quotes included."""
    return html.escape(str(text), quote=True)


def plot_text(text: object) -> str:
    """Text for a plotly label, which understands a little HTML and TeX of its own: both lose their meaning."""
    return html.escape(str(text), quote=False).replace("$", "&#36;")


def heading(text: str, caption: str = "") -> Markup:
    """A section's heading with a sentence under it."""
    return _part("heading", text, caption)


def paragraph(text: str, kind: str = "") -> Markup:
    """A paragraph; kind is a class of the style sheet ("lead", "caption")."""
    return _part("paragraph", text, _name(kind) if kind else "")


def verdicts(items: Iterable[str]) -> Markup:
    """What follows from the numbers: one or a few sentences each, the first of them emphasised; nothing if none."""
    told = [_headline(item, long=0) for item in items]
    return _part("sentences", told, "", "verdicts") if told else Markup("")


def notes(items: Iterable[str], title: str | None = None) -> Markup:
    """What a reader must know of the numbers, a bullet each; nothing if there are none.

    Args:
        items: sentences. Of a long one the first sentence is shown, and the others on a click.
        title: a small heading. Default: "Notes" above more than three, else none.
    """
    told = [_headline(item, long=_HEADLINE) for item in items]
    title = ("Notes" if len(told) > _SEVERAL else "") if title is None else title
    return _part("sentences", told, title, "notes") if told else Markup("")


def _headline(text: str, *, long: int) -> tuple[str, str]:
    """The first sentence of a text of more than `long` characters, and the rest of it."""
    first, *rest = _SENTENCE.split(text, maxsplit=1)
    return (first, "".join(rest)) if len(text) > long and len(first) <= 2 * _HEADLINE else (text, "")


def code(text: str) -> Markup:
    """Text as it is typed in a terminal."""
    return _part("code", text)


def facts(pairs: Mapping[str, object]) -> Markup:
    """A list of names and values; nothing if there are none."""
    return _part("facts", dict(pairs)) if pairs else Markup("")


def folded(title: str, content: Markup) -> Markup:
    """Content that opens on a click; without figures, which cannot be drawn where nobody sees them.

    Raises:
        ValueError: it holds a figure.
    """
    if content.figures:
        raise ValueError("a figure cannot be folded away.")
    return _part("folded", title, content)


def flat(environment: Mapping[str, object]) -> dict[str, object]:
    """Facts of a nested table: its own tables as one line each, and no line for what is absent."""
    nested = {
        key: ", ".join(f"{k} {v}" for k, v in value.items() if v is not None) if isinstance(value, Mapping) else value
        for key, value in environment.items()
    }
    return {key.replace("_", " "): value for key, value in nested.items() if value not in (None, "")}


def table(columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> Markup:
    """A table that sorts on a click; the first column names the row.

    A table that is wider than the page scrolls under its first column. On a phone, one of few columns or of text stands
    a row in a block.

    Raises:
        ValueError: a row with another number of cells than there are columns.
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row has {len(row)} cells, but the table has {len(columns)} columns.")
    kinds = [_kind(column, rows, i) for i, column in enumerate(columns)]
    stack = len(columns) <= _STACKED or all(kinds)
    prose = ["prose" in kind for kind in kinds[1:]]
    pairs = stack and prose.count(False) == 1 and any(prose)
    box = " ".join(name for name, wanted in (("tall", len(rows) > _TALL), ("stack", stack), ("pairs", pairs)) if wanted)
    return _part("table", list(zip(columns, kinds, strict=True)), rows, box)


def _kind(column: Column, rows: Sequence[Sequence[Cell]], i: int) -> str:
    """Classes of a column's cells; none for numbers."""
    if i and not column.text and not column.prose:
        return ""
    longest = max((len(row[i].text) + len(row[i].minor) + len(row[i].flag) for row in rows), default=0)
    if column.prose or longest > _PROSE:
        return "text prose"
    return "text mid" if longest > _SHORT else "text"


def legend(entries: Mapping[str, tuple[str, str]], points: Mapping[str, str] | None = None, *, at: str = "") -> Markup:
    """Check boxes that show and hide traces in all figures of the page, and a list of points to choose one from.

    Args:
        entries: {legendgroup: (text, tone)}.
        points: {key: text}; a trace that has a list "points" is shown at those of them only. The key "" shows all.
        at: the key that is chosen at first.
    """
    return _part("legend", dict(entries), dict(points or {}), at)


def panels(figures: Mapping[str, Figure]) -> Markup:
    """Figures under their names, side by side where the page is wide enough."""
    inner = [
        Markup('<div class="panel">')
        + Markup(f"<h3>{escape(name)}</h3>" if len(figures) > 1 else "")
        + figure(fig, name)
        + Markup("</div>")
        for name, fig in figures.items()
    ]
    kind = "panels" if len(figures) > 1 else "panels one"
    return Markup(f'<div class="{kind}">') + sum(inner, Markup("")) + Markup("</div>")


def figure(fig: Figure, description: str) -> Markup:
    """A figure of the page; `description` is what a screen reader says of it."""
    spec = {
        "data": [dict(trace) for trace in fig.data],
        "layout": _merge(_house_layout(fig.height), fig.layout),
        "narrow": {"margin": dict(fig.narrow_margin)},
    }
    return Markup(
        f'<div class="figure"><script type="application/json">{_embed(spec)}</script>'
        f'<div class="plot" role="img" aria-label="{escape(description)}" style="height: {fig.height}px"></div></div>',
        figures=1,
    )


def page(title: str, body: Sequence[Markup], foot: Sequence[Markup] = ()) -> str:
    """The finished page.

    Raises:
        ModuleNotFoundError: there are figures and plotly is not installed (extra "report").
    """
    content, foot_content = sum(body, Markup("")), sum(foot, Markup(""))
    scripts = [_plotly_js()] if content.figures + foot_content.figures else []
    scripts = [_one_newline(script) for script in (*scripts, _asset("page.js"))]
    text = (
        _templates()
        .get_template("page.html")
        .render(
            title=title,
            policy=_POLICY.format(scripts=" ".join(map(_digest, scripts))),
            style=Markup(_asset("page.css")),
            body=content,
            foot=foot_content,
            scripts=[Markup(script) for script in scripts],
        )
    )
    return str(text)


def _one_newline(text: str) -> str:
    """As a browser reads it, so that the policy's digest fits."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(as_utf8(script)).digest()).decode()}'"


@cache
def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("flatmin.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    made.filters["name"] = _name
    return made


def _part(macro: str, *args: object) -> Markup:
    """What a macro of templates/parts.html makes."""
    return Markup(str(getattr(_templates().get_template("parts.html").module, macro)(*args)))


def _name(text: str) -> str:
    """A name of the style sheet.

    Raises:
        ValueError: other characters, which would mean something else there.
    """
    if not re.fullmatch("[a-z0-9-]+", text):
        raise ValueError(f"{text!r} is no name of the style sheet.")
    return text


def write(text: str, path: str | os.PathLike[str]) -> Path:
    """Write a page by a temporary file and a rename, so that readers see complete pages only; creates its folder."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.write_bytes(as_utf8(text))
    partial.replace(target)
    return target


def _asset(name: str) -> str:
    return resources.files("flatmin.report").joinpath("templates", name).read_text(encoding="utf-8")


def require_figures() -> None:
    """Check that figures can be embedded, before a long job starts.

    Raises:
        ModuleNotFoundError: plotly or jinja2 is not installed (extra "report").
    """
    for name in ("plotly", "jinja2"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(
                f"the report's figures need {name}, which is not installed; run: pip install '.[report]' in a clone of "
                "flatmin"
            )


def _plotly_js() -> str:
    require_figures()
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def _embed(value: object) -> str:
    """JSON that is safe inside a script element: no "<" in it, and null for numbers that JSON does not know."""
    text = json.dumps(_finite(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _house_layout(height: int) -> dict[str, Any]:
    axis = {
        "gridcolor": "var:grid",
        "linecolor": "var:line",
        "zerolinecolor": "var:line",
        "zeroline": False,
        "automargin": True,
        "fixedrange": False,
    }
    return {
        "height": height,
        "paper_bgcolor": "var:paper",
        "plot_bgcolor": "var:paper",
        "font": {"color": "var:ink", "size": 13, "family": "system-ui, sans-serif"},
        "margin": {"l": 64, "r": 16, "t": 16, "b": 48},
        "showlegend": False,
        "hovermode": "closest",
        "hoverlabel": {
            "bgcolor": "var:panel",
            "bordercolor": "var:line",
            "font": {"color": "var:ink"},
            "align": "left",
        },
        "xaxis": dict(axis),
        "yaxis": dict(axis),
    }
