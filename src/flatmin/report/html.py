"""Self-contained HTML pages with sortable tables and figures.

A page is one file that works without a network: it contains its style sheet and script, and plotly.js if it has a
figure. The light or dark theme follows the reader's system. Figures name colours as "var:NAME", where NAME is a colour
of `templates/page.css`, so they follow the theme too. The parts of a page are Jinja templates in `templates/`, which
escape every text.

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
from flatmin.words import install

if TYPE_CHECKING:
    from jinja2 import Environment

# A page must not fetch anything from elsewhere, and only its own scripts may run.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src {scripts}; img-src data: blob:; base-uri 'none'; "
    "form-action 'none'"
)

NUM_TONES = 10
_TALL = 30  # tables with more rows scroll in a box of their own
_PROSE, _SHORT = 32, 12  # cells with more characters wrap, on every screen and on a phone
_STACKED = 4  # tables with at most this number of columns show each row as a block on a phone
_HEADLINE = 150  # notes with more characters show only their first sentence until a click
_SEVERAL = 3  # more notes than this get a heading
# Between two sentences, and not after "et al." or before the number in "Fig. 3".
_SENTENCE = re.compile(
    r"(?<=[.!?])(?<!\bal\.)(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\bvs\.)\s+(?=[^\W\d_a-z]|['\"])|(?<=[a-z]{4}\.)\s+(?=\d)"
)


@dataclass(frozen=True)
class Markup:
    """A piece of finished HTML. Only this module makes it from text, which it escapes."""

    text: str
    figures: int = 0  # number of figures; the page embeds plotly.js if there are any

    def __add__(self, other: Markup) -> Markup:
        return Markup(self.text + other.text, self.figures + other.figures)

    def __html__(self) -> str:  # templates do not escape it again
        return self.text


@dataclass(frozen=True)
class Column:
    """A table column: its header, an explanation shown on hover, and whether its cells are text or long text."""

    title: str
    hint: str = ""
    text: bool = False
    prose: bool = False  # long text; the column takes the width that the other columns leave


@dataclass(frozen=True)
class Cell:
    """A table cell: text, number to sort by (None: the text), a less prominent addition, a warning, a colour."""

    text: str
    sort: float | None = None
    minor: str = ""
    flag: str = ""
    tone: str = ""

    @property
    def key(self) -> str:
        """The number to sort by, as text; empty if there is none."""
        return repr(float(self.sort)) if self.sort is not None and math.isfinite(self.sort) else ""


@dataclass(frozen=True)
class Figure:
    """A plotly figure as plain data.

    Args:
        data: traces for plotly.js. `legendgroup` is the key by which the page's legend hides a trace; `points`, if
            present, lists the choices for which it is shown.
        layout: entries that replace those of the default layout (fonts, grid, margins).
        height: height in CSS pixels.
        narrow_margin: margins on a phone, in pixels.
    """

    data: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any] = field(default_factory=dict)
    height: int = 420
    narrow_margin: Mapping[str, int] = field(default_factory=lambda: {"l": 48, "r": 8, "t": 12})


def escape(text: object) -> str:
    """Text escaped for HTML, including quotes."""
    return html.escape(str(text), quote=True)


def plot_text(text: object) -> str:
    """Text for a plotly label, with the HTML and TeX that plotly would interpret escaped."""
    return html.escape(str(text), quote=False).replace("$", "&#36;")


def heading(text: str, caption: str = "") -> Markup:
    """A section's heading with a sentence under it."""
    return _part("heading", text, caption)


def paragraph(text: str, kind: str = "") -> Markup:
    """A paragraph; kind is a class of the style sheet ("lead", "caption")."""
    return _part("paragraph", text, _name(kind) if kind else "")


def verdicts(items: Iterable[str]) -> Markup:
    """A list of conclusions, each with its first sentence emphasised; empty if there are none."""
    told = [_headline(item, long=0) for item in items]
    return _part("sentences", told, "", "verdicts") if told else Markup("")


def notes(items: Iterable[str], title: str | None = None) -> Markup:
    """A list of notes with a bullet each; empty if there are none.

    Args:
        items: notes of one or more sentences. A long note shows its first sentence, and the others on a click.
        title: a small heading. Default: "Notes" for more than three notes, else none.
    """
    told = [_headline(item, long=_HEADLINE) for item in items]
    title = ("Notes" if len(told) > _SEVERAL else "") if title is None else title
    return _part("sentences", told, title, "notes") if told else Markup("")


def _headline(text: str, *, long: int) -> tuple[str, str]:
    """The first sentence of a text of more than `long` characters, and the rest of it."""
    first, *rest = _SENTENCE.split(text, maxsplit=1)
    return (first, "".join(rest)) if len(text) > long and len(first) <= 2 * _HEADLINE else (text, "")


def code(text: str) -> Markup:
    """Text in a fixed-width font, as typed in a terminal."""
    return _part("code", text)


def facts(pairs: Mapping[str, object]) -> Markup:
    """A list of names and values; empty if there are none."""
    return _part("facts", dict(pairs)) if pairs else Markup("")


def folded(title: str, content: Markup) -> Markup:
    """Content that opens on a click. It must have no figure, because a hidden figure cannot be drawn.

    Raises:
        ValueError: the content has a figure.
    """
    if content.figures:
        raise ValueError("a figure cannot be folded.")
    return _part("folded", title, content)


def flat(environment: Mapping[str, object]) -> dict[str, object]:
    """The entries of a nested mapping, with inner mappings joined to one line and empty entries left out."""
    nested = {
        key: ", ".join(f"{k} {v}" for k, v in value.items() if v is not None) if isinstance(value, Mapping) else value
        for key, value in environment.items()
    }
    return {key.replace("_", " "): value for key, value in nested.items() if value not in (None, "")}


def table(columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> Markup:
    """A table whose columns sort on a click; the first column names the row.

    A table that is wider than the page scrolls sideways, with its first column fixed. On a phone, a table with few
    columns, or with text only, shows each row as a block.

    Raises:
        ValueError: the number of cells in a row differs from the number of columns.
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
    """CSS classes of a column's cells; none for numbers."""
    if i and not column.text and not column.prose:
        return ""
    longest = max((len(row[i].text) + len(row[i].minor) + len(row[i].flag) for row in rows), default=0)
    if column.prose or longest > _PROSE:
        return "text prose"
    return "text mid" if longest > _SHORT else "text"


def legend(entries: Mapping[str, tuple[str, str]], points: Mapping[str, str] | None = None, *, at: str = "") -> Markup:
    """Check boxes that show and hide traces in all figures of the page, and a list to choose a point from.

    Args:
        entries: {legendgroup: (text, tone)}.
        points: {key: text}; a trace with a list `points` is shown only for these keys. The key "" shows all traces.
        at: the key that is chosen initially.
    """
    return _part("legend", dict(entries), dict(points or {}), at)


def panels(figures: Mapping[str, Figure]) -> Markup:
    """Figures with their names as headings, side by side if the page is wide enough."""
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
    """A figure of the page; `description` is its text for screen readers."""
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
    """Text with the line ends that a browser uses when it computes the digest of a script."""
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
    """The result of a macro of templates/parts.html."""
    return Markup(str(getattr(_templates().get_template("parts.html").module, macro)(*args)))


def _name(text: str) -> str:
    """A checked name of the style sheet.

    Raises:
        ValueError: the name has characters other than small letters, digits and hyphens.
    """
    if not re.fullmatch("[a-z0-9-]+", text):
        raise ValueError(f"{text!r} is not a name of the style sheet.")
    return text


def write(text: str, path: str | os.PathLike[str]) -> Path:
    """Write a page through a temporary file, so that no reader sees an incomplete page; creates the folder."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.write_bytes(as_utf8(text))
    partial.replace(target)
    return target


def _asset(name: str) -> str:
    return resources.files("flatmin.report").joinpath("templates", name).read_text(encoding="utf-8")


def require_figures() -> None:
    """Check, before a long job starts, that figures can be embedded.

    Raises:
        ModuleNotFoundError: plotly or jinja2 is not installed (extra "report").
    """
    for name in ("plotly", "jinja2"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(
                f"the report's figures need {name}, which is not installed; run: {install('report')}"
            )


def _plotly_js() -> str:
    require_figures()
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def _embed(value: object) -> str:
    """JSON that is safe inside a script element: without "<", and with null for numbers that are not finite."""
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
