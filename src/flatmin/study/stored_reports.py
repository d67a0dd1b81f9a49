"""Measured reports of a study's trained networks, stored in the run folders."""

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
    """Measure the network of a finished run on the device on which it was trained, and store the report.

    Args:
        folder: folder of a run with weights.
        view: what to measure; its device is ignored.

    Returns:
        `flatmin.measure.Report.to_dict`.

    Raises:
        ValueError, ArithmeticError: the network or its data cannot be measured. Single measures that fail are missing
            in the report, see `lacking`.
    """
    run = find(folder)
    report = measure(run, dataclasses.replace(view, device=run.config.device)).report.to_dict()
    write_json(report_path(folder, view), dict(report))
    return report


def stored_report(folder: Path, view: View) -> Mapping[str, Any] | None:
    """The stored report of a run for a view; None if there is none or it cannot be read."""
    try:
        report = json.loads(read_text(report_path(folder, view)))
    except (OSError, ValueError):
        return None  # the network is measured again
    return report if isinstance(report, dict) and "sections" in report else None


def lacking(report: Mapping[str, Any]) -> dict[str, str]:
    """Quantities that are missing in a stored report, with the reason."""
    missing: dict[str, str] = {}
    for section in report["sections"].values():
        missing |= section.get("missing", {})
        missing |= {name: q.get("note", "") for name, q in section["quantities"].items() if q["value"] is None}
    return missing


def report_path(folder: Path, view: View) -> Path:
    """The path of the report of a run for a view."""
    return folder / f"card-{content_hash(view.key, view.sections_key)[:8]}.json"
