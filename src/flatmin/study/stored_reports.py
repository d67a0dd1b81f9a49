"""Reports of a study's trained networks, measured once and kept in the runs' folders."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flatmin.study.measuring import View, find, measure
from flatmin.train.files import write_json
from flatmin.train.settings import content_hash
from flatmin.words import read_text


def make_report(folder: Path, view: View) -> Mapping[str, Any]:
    """Measure the network of a finished run on the device that it was trained on, and keep the report.

    Args:
        folder: of a run that keeps its weights.
        view: what is measured; its device does not matter.

    Returns:
        `flatmin.measure.Report.to_dict`.

    Raises:
        ValueError, ArithmeticError: the network or its data refuse. What a single measure cannot give is missing on the
            report, see `lacking`.
    """
    run = find(folder)
    report = measure(run, dataclasses.replace(view, device=run.config.device)).report.to_dict()
    write_json(report_path(folder, view), dict(report))
    return report


def stored_report(folder: Path, view: View) -> Mapping[str, Any] | None:
    """The report of this view that a run keeps; None if there is none that can be read."""
    try:
        report = json.loads(read_text(report_path(folder, view)))
    except (OSError, ValueError):
        return None  # measured again
    return report if isinstance(report, dict) and "sections" in report else None


def lacking(report: Mapping[str, Any]) -> dict[str, str]:
    """What a kept report was to have and has not, and why."""
    missing: dict[str, str] = {}
    for section in report["sections"].values():
        missing |= section.get("missing", {})
        missing |= {name: q.get("note", "") for name, q in section["quantities"].items() if q["value"] is None}
    return missing


def report_path(folder: Path, view: View) -> Path:
    """Where a run keeps its report of this view."""
    return folder / f"card-{content_hash(view.key, view.sections_key)[:8]}.json"
