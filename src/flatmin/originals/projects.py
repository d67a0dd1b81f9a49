"""The table of the papers' command lines: one file each, and one line here."""

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
    """The project of a name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in PROJECTS:
        raise ValueError(
            f"unknown project {name!r}{suggest(name, PROJECTS)} (projects: {', '.join(PROJECTS)}, or list)"
        )
    return PROJECTS[name]
