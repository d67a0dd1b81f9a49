"""A process that tests behaviours on one adapter and prints each outcome at once; started by `runner`."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from dataclasses import asdict

import torch

from conformance import adapters, behaviours
from conformance.verdict import FAIL, BehaviourOutcome


def main(arguments: list[str]) -> int:
    """Test the named behaviours; print one JSON line before and one after each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("adapter")
    parser.add_argument("names", nargs="+")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--store", default="")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    # Keep the output of implementations apart from the outcomes.
    out, sys.stdout = sys.stdout, sys.stderr
    if options.ranks > 1:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{options.store}",
            rank=options.rank,
            world_size=options.ranks,
            timeout=datetime.timedelta(seconds=60),
        )
    try:
        adapter = adapters.load(options.adapter)
    except Exception as error:
        for name in options.names:
            _say(out, asdict(BehaviourOutcome(name, FAIL, f"{type(error).__name__}: {error}".splitlines()[0])))
        return 0
    for name in options.names:
        _say(out, {"begins": name})
        _say(out, asdict(behaviours.BY_NAME[name].run(adapter)))
    if options.ranks > 1:
        torch.distributed.destroy_process_group()
    return 0


def _say(out: object, what: dict[str, object]) -> None:
    print(json.dumps(what), file=out, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
