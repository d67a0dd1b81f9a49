"""TensorBoard: event files in FOLDER/tensorboard, written by torch's SummaryWriter."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from flatmin.train.events import Began
from flatmin.train.trackers.content import settings
from flatmin.train.trackers.tracker import Sink, Status

# The numbers that TensorBoard's table of hyperparameters shows.
_METRICS = ("val/acc", "val/loss", "summary/chosen/test_acc")


class TensorBoard(Sink):
    """Logs scalars (in float32, as TensorBoard's files store them), and the configuration as text and hyperparameters.

    A resumed run hides the steps after its checkpoint; a new run in the same folder removes the files of the earlier
    one. The hyperparameters show the status of the first end, also for a run that was resumed later.
    """

    name = "tensorboard"
    _writer: Any = None

    def begin(self, event: Began) -> None:
        where = self.folder / "tensorboard"
        if not self.resume:
            _clear(where)
        self._writer = SummaryWriter(str(where), purge_step=event.step + 1 if self.resume else None)
        table = settings(event)
        rows = "".join(f"| {name} | {value} |\n" for name, value in table.items())
        self._writer.add_text("config", f"| | |\n|---|---|\n{rows}", 0)
        # torch stores true and false as numbers.
        words = {name: str(value).lower() if isinstance(value, bool) else value for name, value in table.items()}
        experiment, start, _ = hparams(words, dict.fromkeys(_METRICS, 0))
        self._add(experiment, 0)
        self._add(start, 0)
        self._writer.flush()

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        if "epoch" in values:
            self._writer.flush()

    def end(self, values: dict[str, float], step: int, failure: str | None) -> None:
        self.log(values, step)
        if failure is not None:
            self._writer.add_text("failure", failure, step)
        self._add(_session_end(failed=failure is not None), step)

    def finish(self, status: Status) -> None:
        if self._writer is not None:
            self._writer.close()

    def _add(self, summary: Any, step: int) -> None:
        self._writer.file_writer.add_summary(summary, step)


SINK = TensorBoard


def _clear(where: Path) -> None:
    for old in where.glob("events.out.tfevents.*"):
        old.unlink()


def _session_end(*, failed: bool) -> Any:
    """The status of the run for the table of hyperparameters; torch's own function always reports success."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata
    from tensorboard.plugins.hparams.api_pb2 import Status as Word
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

    status = Word.Value("STATUS_FAILURE" if failed else "STATUS_SUCCESS")
    data = HParamsPluginData(session_end_info=SessionEndInfo(status=status, end_time_secs=time.time()))
    value = Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=metadata.create_summary_metadata(data))
    return Summary(value=[value])
