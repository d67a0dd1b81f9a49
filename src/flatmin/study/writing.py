"""Write the result of a search as a study that can be run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from flatmin.study.dimensions import Dimension
from flatmin.study.search import SearchResult
from flatmin.study.spec import StudySpec

FRESH = 5  # number of seeds of the written study


def best_study(spec: StudySpec, dimensions: Sequence[Dimension], results: Sequence[SearchResult], budget: float) -> str:
    """The study with the best settings of each arm, on seeds that the search did not use, as TOML.

    Args:
        spec: the study that was searched.
        dimensions: the settings that were searched.
        results: results of the search.
        budget: gradient evaluations for each row, in epochs of plain training.
    """
    first = max(spec.seeds) + 1
    ranges = ", ".join(_range(dimension) for dimension in dimensions)
    keys = {dimension.key for dimension in dimensions}
    best = next(one.grid_point.label for one in results if one.grid_point.arm == spec.baseline)
    lines = [
        f"title = {_text(f'{spec.title}, searched')}",
        f"source = {_text(spec.source)}",
        f"train = {_text(spec.train)}",
        f"seeds = {list(range(first, first + FRESH))}",
        f"baseline = {_text(best)}",
        f"notes = {_texts((_note(ranges, budget, spec.seeds), *spec.notes))}",
        *_table("settings", {key: value for key, value in spec.settings.items() if key not in keys}),
    ]
    arms = {arm.label: arm for arm in spec.arms}
    for one in results:
        trial = one.best
        own = {key: value for key, value in arms[one.grid_point.arm].settings.items() if key not in keys}
        # Axes of one value override the entries of `given`.
        point = {**one.grid_point.axes, **(trial.settings if trial is not None else {})}
        axes = ", ".join(f"{_key(key)} = {_texts([value])}" for key, value in point.items())
        lines += ["", "[[arms]]", f"label = {_text(one.grid_point.label)}", *_entries(own), f"axes = {{ {axes} }}"]
    for given in spec.given:
        settings = {key: value for key, value in given.settings.items() if key not in keys}
        if settings:
            lines += ["", "[[given]]", *(f"{_key(key)} = {_texts(values)}" for key, values in given.when.items())]
            lines.append(f"set = {{ {', '.join(_entries(settings))} }}")
    return "\n".join(lines) + "\n"


def _note(ranges: str, budget: float, seeds: Sequence[int]) -> str:
    return (
        f"Settings were searched on validation data over {ranges}. The budget of each arm was {budget:g} epochs of "
        f"plain training, in gradient evaluations. The search used seed {', '.join(map(str, seeds))}; this study uses "
        "different seeds."
    )


def _range(dimension: Dimension) -> str:
    ends = ",".join(dimension.values) or f"{dimension.low:g}..{dimension.high:g}"
    return f"{dimension.key}={ends}"


def _table(name: str, settings: Mapping[str, str]) -> list[str]:
    return ["", f"[{name}]", *_entries(settings)] if settings else []


def _entries(settings: Mapping[str, str]) -> list[str]:
    return [f"{_key(key)} = {_text(value)}" for key, value in settings.items()]


def _key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() else _text(key)


def _texts(values: Sequence[str]) -> str:
    return f"[{', '.join(map(_text, values))}]"


def _text(value: str) -> str:
    """A basic string of TOML, which has the escapes of JSON."""
    return json.dumps(value, ensure_ascii=False)
