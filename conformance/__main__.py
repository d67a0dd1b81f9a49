"""Test the behaviours on implementations of SAM, and print which implementation passes which behaviour."""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from conformance import adapters, runner, table
from conformance.behaviours import ALL
from conformance.verdict import BehaviourOutcome


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 1 if flatmin fails a behaviour; 2 if there is nothing to run.
    """
    options = _parser().parse_args(arguments)
    chosen = [b for b in ALL if not options.only or any(_fits(b.name, b.theme, p) for p in options.only)]
    if not chosen:
        print(f"no behaviour is called {' or '.join(options.only)}; --list shows all.", file=sys.stderr)
        return 2
    if options.list:
        for b in chosen:
            print(f"{b.theme}: {b.name}\n    {b.demand}\n    {b.why}")
        return 0
    columns: list[table.AdapterColumn] = []
    absent: dict[str, str] = {}
    for name in options.adapters or adapters.NAMES:
        if reason := adapters.missing(name):
            absent[name] = reason
            continue
        adapter = adapters.load(name)
        outcomes = runner.run(name, chosen, _progress if options.verbose else lambda *_: None)
        columns.append(table.AdapterColumn(adapter.title, adapter.version(), {o.behaviour: o for o in outcomes}))
        summary = f"{adapter.title}: {len(columns[-1].failures)} failures, {sum(o.seconds for o in outcomes):.0f} s"
        print(summary, file=sys.stderr, flush=True)
    for name, reason in absent.items():
        print(f"{name}: not installed ({reason})", file=sys.stderr)
    if not columns:
        return 2
    print(table.text(columns))
    environment = _environment()
    if options.json:
        record = {"environment": environment, "columns": [{**asdict(c)} for c in columns]}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if options.into:
        table.insert(options.into, table.page(columns, environment))
    return int(any(c.title == "flatmin" and c.failures for c in columns))


def _fits(name: str, theme: str, pattern: str) -> bool:
    return fnmatch.fnmatch(name, f"*{pattern}*") or theme == pattern


def _progress(adapter: str, outcome: BehaviourOutcome) -> None:
    shown = f": {outcome.figure}" if outcome.figure else ""
    print(f"{adapter}: {outcome.behaviour}: {outcome.status}{shown} ({outcome.seconds:.2f} s)", file=sys.stderr)


def _environment() -> str:
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return f"{date}, torch {torch.__version__.split('+')[0]} on the CPU, Python {platform.python_version()}."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m conformance", description=__doc__)
    parser.add_argument(
        "adapters",
        nargs="*",
        metavar="ADAPTER",
        help=f"one of {', '.join(adapters.NAMES)}, or your own module or file (default: all that are installed)",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="test only behaviours whose name contains PATTERN, or of the theme PATTERN; may be repeated",
    )
    parser.add_argument("--list", action="store_true", help="print each behaviour with its reason, and test nothing")
    parser.add_argument(
        "--verbose", action="store_true", help="print each outcome with its figure as soon as it is known"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all outcomes to FILE")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="write the table between the markers in PAGE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
