"""Cards of a study's trained networks, measured once and kept in the runs' folders."""

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


def make_card(folder: Path, view: View) -> Mapping[str, Any]:
    """Measure the network of a finished run on the device that it was trained on, and keep the card.

    Args:
        folder: of a run that keeps its weights.
        view: what is measured; its device does not matter.

    Returns:
        `flatmin.measure.Card.to_dict`.

    Raises:
        ValueError, ArithmeticError: the network or its data refuse. What a single measure cannot give is missing on the
            card, see `lacking`.
    """
    run = find(folder)
    found = measure(run, dataclasses.replace(view, device=run.config.device)).card.to_dict()
    write_json(card_path(folder, view), dict(found))
    return found


def kept_card(folder: Path, view: View) -> Mapping[str, Any] | None:
    """The card of this view that a run keeps; None if there is none that can be read."""
    try:
        found = json.loads(read_text(card_path(folder, view)))
    except (OSError, ValueError):
        return None  # measured again
    return found if isinstance(found, dict) and "sections" in found else None


def lacking(card: Mapping[str, Any]) -> dict[str, str]:
    """What a kept card was to have and has not, and why."""
    found: dict[str, str] = {}
    for section in card["sections"].values():
        found |= section.get("missing", {})
        found |= {name: q.get("note", "") for name, q in section["quantities"].items() if q["value"] is None}
    return found


def card_path(folder: Path, view: View) -> Path:
    """Where a run keeps its card of this view."""
    return folder / f"card-{content_hash(view.key, view.what)[:8]}.json"
