"""What a tracker's files say, by the reader of its own package where it has one."""

import json
import os
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, field


@dataclass
class Read:
    """Numbers by (name, step), every one in a list; settings and summary by name; the status; the package's run."""

    numbers: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)
    summary: dict = field(default_factory=dict)
    status: str | None = None
    failure: str | None = None
    identity: str | None = None

    def add(self, name, step, value):
        self.numbers.setdefault((name, step), []).append(value)


def tensorboard(folder, project):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata
    from tensorboard.plugins.hparams.api_pb2 import Status

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    found = Read()
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            found.add(name, event.step, event.value)
    plugin = events.PluginTagToContent("hparams")
    start = metadata.parse_session_start_info_plugin_data(plugin[metadata.SESSION_START_INFO_TAG])
    for name, value in start.hparams.items():
        found.settings[name] = getattr(value, value.WhichOneof("kind"))
    if metadata.SESSION_END_INFO_TAG in plugin:
        end = metadata.parse_session_end_info_plugin_data(plugin[metadata.SESSION_END_INFO_TAG])
        found.status = Status.Name(end.status)
    if "failure/text_summary" in events.Tags()["tensors"]:
        found.failure = events.Tensors("failure/text_summary")[0].tensor_proto.string_val[0].decode()
    return found


def wandb(folder, project):
    """All parts of an offline run, in order. The file's frame is LevelDB's log; wandb brings no reader of it."""
    found = Read()
    paths = sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    for path in paths:
        for record in _complete(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                found.identity = record.run.run_id
                assert record.run.project == project
                found.settings |= {one.key: json.loads(one.value_json) for one in record.run.config.update}
            elif kind == "history":
                row = {one.key or one.nested_key[0]: json.loads(one.value_json) for one in record.history.item}
                for name, value in row.items():
                    if not name.startswith("_"):
                        found.add(name, row["_step"], value)
            elif kind == "summary":
                found.summary |= {one.key: json.loads(one.value_json) for one in record.summary.update if one.key}
            elif kind == "exit":
                found.status = record.exit.exit_code
    found.failure = found.summary.get("failure")
    return found


def _complete(path):
    """The records up to that of the end, which wandb's own process may write after `finish` has returned."""
    for _ in range(200):
        found = list(_records(path.read_bytes()))
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.1)
    raise AssertionError(f"{path} was not finished")


def _records(raw):
    from wandb.proto import wandb_internal_pb2

    position, content = 7, b""  # after wandb's own header
    while position + 7 <= len(raw):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, size, kind = struct.unpack("<IHB", raw[position : position + 7])
        if kind == 0:
            return
        content += raw[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(content)
            content = b""


def mlflow(folder, project):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name(project).experiment_id])
    assert run.info.run_name == "run"
    found = Read(settings=run.data.params, status=run.info.status, identity=run.info.run_id)
    for name in run.data.metrics:
        for metric in client.get_metric_history(run.info.run_id, name):
            found.add(name, metric.step, metric.value)
    found.failure = run.data.tags.get("failure")
    return found


_TRACKIO = """
import json, sys, trackio
from trackio.sqlite_storage import SQLiteStorage
(run,) = trackio.Api().runs(sys.argv[1])
logs = SQLiteStorage.get_logs(sys.argv[1], run.name, run_id=run.id)
said = [one["text"] for one in run.alerts()]
print(json.dumps({"name": run.name, "id": run.id, "config": run.config, "logs": logs, "said": said}, default=str))
"""


def trackio(folder, project):
    """In a process of its own, since trackio has one folder in the life of a process."""
    environment = {**os.environ, "TRACKIO_DIR": str(folder / "trackio")}
    command = [sys.executable, "-c", _TRACKIO, project]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert told["name"] == "run"
    found = Read(settings=told["config"], identity=told["id"], failure=told["said"][0] if told["said"] else None)
    for row in told["logs"]:
        for name, value in row.items():
            if name not in ("step", "timestamp"):
                found.add(name, row["step"], value)
    return found


READERS = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow, "trackio": trackio}
