"""The table of research projects; each one has a file of its own, and a line here."""

from __future__ import annotations

from typing import Any

from flatmin.originals import bisam, empirical, fundamental, vasso
from flatmin.originals.project import Project
from flatmin.words import suggest

PROJECTS: dict[str, Project[Any]] = {
    one.name: one
    for one in (
        bisam.PROJECT,
        empirical.PROJECT,
        fundamental.PROJECT,
        vasso.PROJECT,
    )
}


def find_project(name: str) -> Project[Any]:
    """The project with a name.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in PROJECTS:
        raise ValueError(
            f"unknown project {name!r}{suggest(name, PROJECTS)} (projects: {', '.join(PROJECTS)}; list prints them)"
        )
    return PROJECTS[name]
