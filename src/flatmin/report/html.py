"""Self-contained HTML pages: a shell, sortable tables and themed figures, the parts of every report.

A page is one file that works without a network: style and script are inside, and so is plotly.js if there is a
figure. Light and dark follow the reader's system; figures name their colours as "var:<name>" from `assets/page.css`
and follow too. Every text that comes from outside is escaped here, in one place.

    >>> columns = [Column("arm"), Column("accuracy")]
    >>> html = page("A <title>", [heading("Results"), table(columns, [[Cell("sam"), Cell("95.1", sort=95.1)]])])
    >>> "<title>A &lt;title&gt;</title>" in html
    True
"""

from __future__ import annotations

import html
import importlib.util
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from flatmin.train.files import as_utf8

# Nothing may be fetched: a page that is opened from a mail or a share must not call anywhere.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"

NUM_TONES = 10
_TALL = 30  # tables of more rows scroll in a box of their own


@dataclass(frozen=True)
class Markup:
    """A piece of finished HTML. Only this module makes it from text, and escapes while it does."""

    text: str
    figures: int = 0  # how many figures it holds; the page embeds plotly.js if any does

    def __add__(self, other: Markup) -> Markup:
        return Markup(self.text + other.text, self.figures + other.figures)


@dataclass(frozen=True)
class Column:
    """A table column: its header, a longer explanation shown on hover, and whether its cells are text."""

    title: str
    hint: str = ""
    text: bool = False


@dataclass(frozen=True)
class Cell:
    """A table cell: its text, the number it sorts by (None: by its text), a weaker second part, a warning, a tone."""

    text: str
    sort: float | None = None
    minor: str = ""
    flag: str = ""
    tone: str = ""


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
    below = f'<p class="caption">{escape(caption)}</p>' if caption else ""
    return Markup(f"<h2>{escape(text)}</h2>{below}")


def paragraph(text: str, kind: str = "") -> Markup:
    """A paragraph; kind is a class of the style sheet ("lead", "caption")."""
    return Markup(f'<p class="{escape(kind)}">{escape(text)}</p>')


def notes(items: Iterable[str]) -> Markup:
    """A bulleted list of sentences; nothing if there are none."""
    inner = "".join(f"<li>{escape(item)}</li>" for item in items)
    return Markup(f'<ul class="notes">{inner}</ul>' if inner else "")


def code(text: str) -> Markup:
    """Text as it is typed in a terminal."""
    return Markup(f"<pre>{escape(text)}</pre>")


def facts(pairs: Mapping[str, object]) -> Markup:
    """A list of names and values."""
    inner = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in pairs.items())
    return Markup(f"<dl>{inner}</dl>")


def flat(environment: Mapping[str, object]) -> dict[str, object]:
    """Facts of a nested table: its own tables as one line each, and no line for what is absent."""
    nested = {
        key: ", ".join(f"{k} {v}" for k, v in value.items() if v is not None) if isinstance(value, Mapping) else value
        for key, value in environment.items()
    }
    return {key.replace("_", " "): value for key, value in nested.items() if value not in (None, "")}


def table(columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> Markup:
    """A table that sorts on a click; the first column names the row.

    Raises:
        ValueError: a row with another number of cells than there are columns.
    """
    head = "".join(
        f'<th scope="col" class="{"text" if c.text else ""}" title="{escape(c.hint)}">'
        f'<button type="button">{escape(c.title)}</button></th>'
        for c in columns
    )
    body = []
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row has {len(row)} cells, but the table has {len(columns)} columns.")
        cells = [
            _cell("td" if i else "th", cell, column) for i, (cell, column) in enumerate(zip(row, columns, strict=True))
        ]
        body.append(f"<tr>{''.join(cells)}</tr>")
    kind = "scroll tall" if len(rows) > _TALL else "scroll"
    return Markup(
        f'<div class="{kind}" tabindex="0"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _cell(tag: str, cell: Cell, column: Column) -> str:
    attributes = ' scope="row"' if tag == "th" else ""
    if column.text or tag == "th":
        attributes += ' class="text"'
    else:
        finite = cell.sort is not None and math.isfinite(cell.sort)
        attributes += f' data-sort="{float(cell.sort or 0.0)!r}"' if finite else ' data-sort=""'
    swatch = f'<span class="swatch" style="background: var(--{escape(cell.tone)})"></span>' if cell.tone else ""
    minor = f' <span class="minor">{escape(cell.minor)}</span>' if cell.minor else ""
    flag = f' <span class="flag">{escape(cell.flag)}</span>' if cell.flag else ""
    return f"<{tag}{attributes}>{swatch}{escape(cell.text)}{minor}{flag}</{tag}>"


def legend(entries: Mapping[str, tuple[str, str]], points: Mapping[str, str] | None = None, *, at: str = "") -> Markup:
    """Check boxes that show and hide traces in all figures of the page, and a list of points to choose one from.

    Args:
        entries: {legendgroup: (text, tone)}.
        points: {key: text}; a trace that has a list "points" is shown at those of them only. The key "" shows all.
        at: the key that is chosen at first.
    """
    inner = "".join(
        f'<label><input type="checkbox" value="{escape(key)}" checked>'
        f'<span class="swatch" style="background: var(--{escape(tone)})"></span><span>{escape(text)}</span></label>'
        for key, (text, tone) in entries.items()
    )
    if points:
        options = "".join(
            f'<option value="{escape(key)}"{" selected" if key == at else ""}>{escape(text)}</option>'
            for key, text in points.items()
        )
        inner = f'<label class="choice"><span>figures show</span><select>{options}</select></label>{inner}'
    return Markup(f'<div class="legend" role="group" aria-label="shown in the figures">{inner}</div>')


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
    content = sum(body, Markup(""))
    foot_content = sum(foot, Markup(""))
    library = f"<script>{_plotly_js()}</script>" if content.figures + foot_content.figures else ""
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(title)}</title><style>{_asset('page.css')}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n{content.text}\n<footer>{foot_content.text}</footer>\n"
        f"{library}<script>{_asset('page.js')}</script></body></html>\n"
    )


def write(text: str, path: str | os.PathLike[str]) -> Path:
    """Write a page by a temporary file and a rename, so that readers see complete pages only; creates its folder."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.write_bytes(as_utf8(text))
    partial.replace(target)
    return target


def _asset(name: str) -> str:
    return resources.files("flatmin.report").joinpath("assets", name).read_text(encoding="utf-8")


def require_figures() -> None:
    """Check that figures can be embedded, before a long job starts.

    Raises:
        ModuleNotFoundError: plotly is not installed (extra "report").
    """
    if importlib.util.find_spec("plotly") is None:
        raise ModuleNotFoundError(
            "the report's figures need plotly, which is not installed; run: pip install 'flatmin[report]'"
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
