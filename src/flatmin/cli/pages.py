"""Generated parts of the documentation."""

from __future__ import annotations

from pathlib import Path


def refresh(page: Path, text: str, markers: tuple[str, str]) -> None:
    """Write the text between the markers of a page.

    Raises:
        ValueError: a page without the two markers in their order.
    """
    before = page.read_text(encoding="utf-8")
    head, first, rest = before.partition(markers[0])
    _, last, tail = rest.partition(markers[1])
    if not first or not last:
        raise ValueError(f"{str(page)!r} has no place for this table; add the markers {' and '.join(markers)}.")
    page.write_text(f"{head}{first}\n{text}\n{last}{tail}", encoding="utf-8")
