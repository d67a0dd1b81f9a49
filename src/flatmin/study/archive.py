"""Archives of finished runs: small text files without weights, from which tables can be made."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatmin.study.store import Run
from flatmin.train.config import RunConfig, differences, identity
from flatmin.train.files import reason, write_text
from flatmin.train.folder import INPUTS, TABLES, RunFolder
from flatmin.train.settings import content_hash
from flatmin.words import read_text

FORMAT = 1
SUMS = "SHA256SUMS"
_CONFIG, _ENVIRONMENT, _RESULT, _EPOCHS = "config.json", "env.json", "result.json", "metrics.jsonl"
_LINES = (_EPOCHS, *TABLES)
_NAMED = 3  # runs that a message names


@dataclass(frozen=True, kw_only=True)
class Packed:
    """The outcome of `pack` or `unpack`.

    Args:
        added, changed, same: number of runs that are new, that have new measurements, and that were there already.
        left: runs that were not packed, with the reason.
    """

    added: int
    changed: int
    same: int
    left: Mapping[str, str]


def pack(folder: Path, archive: Path) -> Packed:
    """Add the finished runs of a study folder to an archive.

    Each run becomes one text file with its configuration, environment, result, epochs, recorded updates and measured
    numbers. A second call with the same runs changes nothing.

    Args:
        folder: the output folder of a study; its runs are in FOLDER/runs.
        archive: a folder; made if it does not exist.

    Raises:
        ValueError: the folder has no runs or no finished run, the archive is damaged, or the archive has a different
            result for a run. Nothing is written then.
        OSError: a file cannot be written.
    """
    runs = folder / "runs"
    if not runs.is_dir():
        raise ValueError(
            f"{folder} has no subfolder 'runs', so it is not the output folder (--out) of a study; nothing was packed."
        )
    found, left = _finished(runs)
    if not found:
        why = "".join(f"; {name}: {text}" for name, text in list(left.items())[:_NAMED])
        raise ValueError(f"{runs} has no finished run of a study; nothing was packed{why}.")
    kept = read(archive, strays=found) if (archive / SUMS).exists() or _files(archive) else {}
    merged = {name: _joined(name, kept[name], content) if name in kept else content for name, content in found.items()}
    texts = {name: _text(content) for name, content in merged.items()}
    (archive / "runs").mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        if name not in kept or kept[name] != merged[name]:
            write_text(archive / "runs" / f"{name}.json", text)
    sums = {name: _digest(texts[name]) if name in texts else _digest(_text(kept[name])) for name in {*texts, *kept}}
    write_text(archive / SUMS, "".join(f"{sums[name]}  runs/{name}.json\n" for name in sorted(sums)))
    added = [name for name in merged if name not in kept]
    changed = [name for name in merged if name in kept and kept[name] != merged[name]]
    return Packed(added=len(added), changed=len(changed), same=len(merged) - len(added) - len(changed), left=left)


def unpack(archive: Path, folder: Path) -> Packed:
    """Write the runs of an archive to FOLDER/runs as run folders; runs that are there already are kept.

    The folders have no weights. `flatmin study` counts them as finished if its code is the one that trained them.

    Args:
        archive: a folder that `pack` wrote.
        folder: made if it does not exist.

    Raises:
        ValueError: the archive is missing or damaged, or the folder has a different result for a run or an unfinished
            run of the same name. Nothing is written then.
        OSError: a file cannot be written.
    """
    kept = read(archive)
    present: dict[str, dict[str, Any]] = {}
    for name, content in kept.items():
        path = folder / "runs" / name
        if not path.exists():
            continue
        try:
            present[name] = _content(path)
        except ValueError as error:
            raise ValueError(
                f"{path} exists and cannot be compared with the archive ({reason(error)}); nothing was unpacked. "
                "Finish that run, or name another folder."
            ) from error
        _joined(name, content, present[name])
    changed = 0
    for name, content in kept.items():
        cards = content["cards"]
        if name in present:
            cards = {file: card for file, card in cards.items() if file not in present[name]["cards"]}
            changed += bool(cards)
            for file, card in cards.items():
                write_text(folder / "runs" / name / file, json.dumps(card, indent=1))
        else:
            _write(folder / "runs" / name, content)
    added = len(kept) - len(present)
    return Packed(added=added, changed=changed, same=len(present) - changed, left={})


def read(archive: Path, *, strays: Sequence[str] | Mapping[str, Any] = ()) -> dict[str, dict[str, Any]]:
    """The runs of an archive by name, in order.

    Args:
        archive: a folder that `pack` wrote.
        strays: names of runs whose files may exist without a line in the list of digests, as an interrupted call of
            `pack` leaves them; they are not read.

    Raises:
        ValueError: the folder is not an archive, or one of its files is missing, not listed, changed, or written by a
            later version.
    """
    try:
        lines = read_text(archive / SUMS).splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"{archive} is not an archive of runs: {SUMS} cannot be read ({reason(error)}).") from error
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        digest, _, place = line.partition("  ")
        name = place.removeprefix("runs/").removesuffix(".json")
        where = archive / "runs" / f"{name}.json"
        if place != f"runs/{name}.json" or "/" in name or "\\" in name or name in found:
            raise ValueError(f"{archive / SUMS} is damaged: {line[:90]!r} does not name a run file; restore it.")
        try:
            text = read_text(where)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{where} is listed in {SUMS} but cannot be read ({reason(error)}); restore it."
            ) from error
        if _digest(text) != digest:
            raise ValueError(f"{where} does not match its digest in {SUMS}: it was truncated or edited; restore it.")
        found[name] = _parsed(text, where)
    for name in _files(archive):
        if name not in found and name not in strays:
            raise ValueError(
                f"{archive / 'runs' / name}.json is not listed in {SUMS}; pack its runs again, or remove it."
            )
    return found


class Archive:
    """Finished runs, looked up by settings and data, whatever code trained them.

    Args:
        path: an archive that `pack` wrote, or the output folder of a study.

    Attributes:
        unrecorded: names of runs that `find` skipped because they did not record what was asked for.

    Raises:
        ValueError: see `read`.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.unrecorded = path, set[str]()
        self._by_config: dict[str, list[str]] = {}
        self._settings: dict[str, dict[str, Any]] = {}
        if (path / SUMS).exists() or not any(path.glob("runs/*/config.json")):
            self._runs = read(path)
            self._folder = Path(tempfile.mkdtemp(prefix="flatmin-archive-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            for name, content in self._runs.items():
                _write(self._folder / name, content)
        else:
            self._folder = path / "runs"
            self._runs = _finished(self._folder)[0]
        for name in self._runs:
            try:
                config, _ = RunFolder(self._folder / name).config()
            except ValueError as error:
                raise ValueError(
                    f"{path / 'runs' / name}.json has settings that this flatmin cannot read: {error}"
                ) from error
            self._settings[name] = identity(config)
            self._by_config.setdefault(_key(config), []).append(name)

    def __len__(self) -> int:
        return len(self._runs)

    def find(self, run: Run) -> Path | None:
        """The folder of the run with the same settings and data that recorded what is asked for; None if there is none.

        If runs of several versions of the code fit, the one with the code of `run` is taken.

        Raises:
            ValueError: several runs fit; they differ in code, or in data that cannot be read here.
        """
        trained = [name for name in self._by_config.get(_key(run.config), ()) if _trained_on(run, self._labels(name))]
        fitting = [name for name in trained if run.record.kept_in({"record": self._labels(name).get("record") or ""})]
        self.unrecorded |= set(trained) - set(fitting)
        same = [name for name in fitting if self._labels(name).get("code") == run.code]
        found = same or fitting
        if len(found) > 1:
            what = "data" if same else "code"
            raise ValueError(
                f"{self.path} has several runs with the same settings but different {what}: {', '.join(found)}; keep "
                "them in separate archives, or remove all but one with `flatmin runs rm`."
            )
        return self._folder / found[0] if found else None

    def nearest(self, runs: Sequence[Run]) -> str:
        """A sentence on the settings in which the most similar run differs from these; "" if it differs in none."""
        pairs = [
            (name, found)
            for name, settings in self._settings.items()
            for run in runs
            if (found := differences(settings, run.config))
        ]
        if not pairs:
            return ""
        name, found = min(pairs, key=lambda pair: len(pair[1]))
        return f"In the most similar run, {name}, {', '.join(found.values())}."

    def _labels(self, name: str) -> Mapping[str, Any]:
        labels: Mapping[str, Any] = self._runs[name][_CONFIG]
        return labels


def _trained_on(run: Run, labels: Mapping[str, Any]) -> bool:
    """Whether an archived run used the same data, as far as the data are known here."""
    return run.content is None or run.content.digest in (labels.get("data_key"), labels.get("content"))


def _key(config: RunConfig) -> str:
    return content_hash(identity(config))


def _finished(runs: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The finished runs in a folder by name, and for each other folder why it is not one."""
    found: dict[str, dict[str, Any]] = {}
    left: dict[str, str] = {}
    for path in sorted(one for one in runs.iterdir() if one.is_dir()):
        try:
            found[path.name] = _content(path)
        except ValueError as error:
            left[path.name] = reason(error)
    return found, left


def _content(path: Path) -> dict[str, Any]:
    """A finished run of a study as plain values.

    Raises:
        ValueError: the folder is not a finished run of a study, or it cannot be read.
    """
    folder = RunFolder(path)
    if not folder.begun:
        raise ValueError("it holds no run")
    if not folder.finished:
        raise ValueError("it is not finished")
    labels = folder.config()[1]
    result = folder.result()
    folder.lines(expected=None if result.failure else result.epochs)
    if "key" not in labels or "code" not in labels:
        raise ValueError("it is a run of `flatmin train`, not of a study")
    found: dict[str, Any] = {"format": FORMAT}
    for name in (_CONFIG, _ENVIRONMENT, INPUTS, _RESULT):
        if (path / name).is_file():
            found[name] = _json(path / name)
    if found[_RESULT].get("key") != labels["key"]:
        raise ValueError("its result belongs to another run")
    for name in _LINES:
        if (path / name).is_file():
            found[name] = [_table_row(line, path / name) for line in read_text(path / name).splitlines()]
    found["cards"] = {card.name: _json(card) for card in sorted(path.glob("card-*.json"))}
    # In the form in which it will be read back.
    parsed: dict[str, Any] = _parsed(_text(found), path)
    return parsed


def _json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} cannot be read: {reason(error)}") from error


def _table_row(line: str, path: Path) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be read: {reason(error)}") from error


def _text(content: Mapping[str, Any]) -> str:
    """A run as JSON, one entry a line. Tables have one row a line and name their columns once."""
    entries: list[str] = []
    for key, value in content.items():
        if key in _LINES:
            columns = list(dict.fromkeys(name for row in value for name in row))
            rows = [[row[name] for name in columns if name in row] for row in value]
            if any(len(row) != len(columns) or list(own) != columns for row, own in zip(rows, value, strict=True)):
                rows, columns = value, []  # rows with different columns are written in full
            body = ",\n".join("  " + _compact(row) for row in rows)
            text = f'{{"columns": {_compact(columns)}, "rows": [' + (f"\n{body}\n ]}}" if rows else "]}")
        elif key == "cards":
            body = ",\n".join(f"  {_compact(name)}: {_compact(card)}" for name, card in sorted(value.items()))
            text = f"{{\n{body}\n }}" if value else "{}"
        else:
            text = _compact(value)
        entries.append(f" {_compact(key)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(", ", ": "))


def _parsed(text: str, where: Path) -> dict[str, Any]:
    """A run from text that `_text` wrote.

    Raises:
        ValueError: the text is not a packed run, or was written by a later version.
    """
    try:
        found: dict[str, Any] = json.loads(text)
        if found["format"] != FORMAT:
            raise ValueError(f"it has format {found['format']!r}, and this flatmin reads {FORMAT}; use a later flatmin")
        for name in _LINES:
            if name in found:
                columns, rows = found[name]["columns"], found[name]["rows"]
                found[name] = [dict(zip(columns, row, strict=True)) if columns else row for row in rows]
        for name in (_CONFIG, _RESULT, "cards", _EPOCHS):
            found[name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} is not a packed run: {reason(error)}.") from error
    return found


def _joined(name: str, kept: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The run with the measurements of both copies.

    Raises:
        ValueError: the two contradict each other.
    """
    parts = [key for key in dict.fromkeys((*kept, *other)) if key != "cards" and kept.get(key) != other.get(key)]
    parts += [key for key in other["cards"] if key in kept["cards"] and kept["cards"][key] != other["cards"][key]]
    if parts:
        raise ValueError(
            f"the run {name} exists already with a different {' and a different '.join(parts)}; nothing was written. "
            "Use a separate archive or folder."
        )
    cards = {**kept["cards"], **other["cards"]}
    return {**kept, "cards": {file: cards[file] for file in sorted(cards)}}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a run folder without weights; the result is written last."""
    path.mkdir(parents=True)
    for name, lines in content.items():
        if name in _LINES:
            (path / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for name, value in _objects(content):
        (path / name).write_text(json.dumps(value, indent=1), encoding="utf-8")


def _objects(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from content["cards"].items()
    for name in (_CONFIG, _ENVIRONMENT, INPUTS, _RESULT):
        if name in content:
            yield name, content[name]


def _files(archive: Path) -> list[str]:
    """Names of the run files in an archive."""
    return sorted(path.stem for path in (archive / "runs").glob("*.json")) if (archive / "runs").is_dir() else []


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
