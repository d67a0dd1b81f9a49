"""Cards of a study's trained networks, measured once and kept in the runs' folders."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flatmin.study.events import CardDone, Event, Measuring
from flatmin.study.measured import Measured
from flatmin.study.measuring import View, find, measure_all
from flatmin.study.store import Run, Store
from flatmin.train.files import write_json
from flatmin.train.settings import content_hash


def cards_of(
    runs: Sequence[Run], store: Store, view: View, *, workers: int, on_event: Callable[[Event], None]
) -> tuple[dict[str, Mapping[str, Any]], dict[str, str]]:
    """The card of each finished run by name, measured now where it is not kept.

    That is done on this machine, whoever trained them, and on the device that they name.

    Args:
        runs: finished ones that keep their weights.
        store: where they are.
        view: what is measured.
        workers: processes of one thread each; 0: this one.
        on_event: told of `Measuring` before the work, and of `CardDone` after each.

    Returns:
        The cards, and why the others have none, by the run's name.

    Raises:
        ValueError: a process ended while it measured.
    """
    places = {run.name: card_path(store.folder(run), view) for run in runs}
    found = {name: kept for name, path in places.items() if (kept := _kept(path)) is not None}
    todo = [run for run in runs if run.name not in found]
    if not todo:
        return found, {}
    refused: dict[str, str] = {}
    on_event(Measuring(nets=len(todo)))

    def keep(one: Measured) -> None:
        found[one.name] = one.card.to_dict()
        write_json(places[one.name], dict(found[one.name]))
        on_event(CardDone(run=one.name))

    for device in dict.fromkeys(run.config.device for run in todo):
        nets = []
        for run in todo:
            if run.config.device != device:
                continue
            try:
                # Arms may share a method and a seed; here each run is a group of its own.
                nets.append(dataclasses.replace(find(store.folder(run)), name=run.name, label=run.name))
            except ValueError as error:
                refused[run.name] = str(error)
        measure_all(
            nets,
            dataclasses.replace(view, device=device),
            workers=min(workers, len(nets)),
            on_done=keep,
            on_refusal=lambda net, text: refused.update({net.name: text}),
        )
    return found, refused


def card_path(folder: Path, view: View) -> Path:
    """Where a run keeps its card of this view."""
    return folder / f"card-{content_hash(view.key, view.what)[:8]}.json"


def _kept(path: Path) -> Mapping[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # measured again
    return found if isinstance(found, dict) and "sections" in found else None
