"""The writer process of `flatmin.train.trackers.trackio`: reads JSON lines from standard input and logs to Trackio.

It runs as a script, without flatmin. The first line has the arguments of `trackio.init`; the others have values, step
and optionally failure.
"""

from __future__ import annotations

import json
import sys
import warnings


def main() -> None:
    """Log until standard input ends.

    Raises:
        RuntimeError: trackio warned that it lost data.
    """
    import trackio

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run = trackio.init(**json.loads(sys.stdin.readline()), embed=False)
        for line in sys.stdin:
            message = json.loads(line)
            run.log(message["values"], step=message["step"])
            if message.get("failure"):
                run.alert("the run failed", message["failure"], level=trackio.AlertLevel.ERROR, step=message["step"])
        run.finish()
    for one in said:
        print(one.message)
    lost = [str(one.message) for one in said if "trackio" in str(one.message).lower()]
    if lost:
        raise RuntimeError(lost[0])


if __name__ == "__main__":
    main()
