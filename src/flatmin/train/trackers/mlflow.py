"""MLflow: a SQLite database in FOLDER/mlflow.db, or the server that MLFLOW_TRACKING_URI names."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from flatmin.train.events import Began
from flatmin.train.trackers.content import settings
from flatmin.train.trackers.tracker import Sink, Status

_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
_OTHER = re.compile(r"[^\w\-. :/]")
_MOST = 100  # parameters in one call


class MLflow(Sink):
    """Logs metrics and parameters of a run with a separate client; the program's active run is not affected.

    Characters that MLflow does not allow in names become "_". A resumed run has the steps after its checkpoint twice,
    because metrics cannot be deleted. Infinity becomes the largest number of MLflow's database.
    """

    name = "mlflow"

    def begin(self, event: Began) -> None:
        with _quiet():
            self._client = MlflowClient(tracking_uri=self._uri())
            self._id = self._known()
            if self._id is not None:
                self._client.update_run(self._id, status="RUNNING")
                return
            self._id = self._client.create_run(self._experiment(), run_name=self.run).info.run_id
        params = [Param(_OTHER.sub("_", name), str(value)) for name, value in settings(event).items()]
        for first in range(0, len(params), _MOST):
            self._client.log_batch(self._id, params=params[first : first + _MOST])
        self.keep_identity(self._id)

    def log(self, values: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [Metric(_OTHER.sub("_", name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def end(self, values: dict[str, float], step: int, failure: str | None) -> None:
        self.log(values, step)
        if failure is not None:
            self._client.set_tag(self._id, "failure", failure)

    def finish(self, status: Status) -> None:
        # If the server is not available, another call would wait for minutes.
        if status != "broken":
            self._client.set_terminated(self._id, _STATUS[status])

    def _uri(self) -> str | None:
        if mlflow.is_tracking_uri_set():
            return None
        path = self.folder / "mlflow.db"
        if set("?%") & set(str(path)):
            raise ValueError(
                f"MLflow cannot write its database below {self.folder}, because the path contains ? or %; use another "
                "folder."
            )
        return f"sqlite:///{path.as_posix()}"

    def _known(self) -> str | None:
        """The run to continue, if it still exists."""
        identity = self.identity
        if identity is not None:
            try:
                self._client.get_run(identity)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return None
        return identity

    def _experiment(self) -> Any:
        experiment = self._client.get_experiment_by_name(self.project)
        if experiment is not None:
            return experiment.experiment_id
        # Without a location here, files would go to ./mlruns of the process that reads the database.
        place = None if mlflow.is_tracking_uri_set() else (self.folder / "mlflow").as_uri()
        try:
            return self._client.create_experiment(self.project, artifact_location=place)
        except MlflowException:
            # Another process may have created it in the meantime.
            experiment = self._client.get_experiment_by_name(self.project)
            if experiment is None:
                raise
            return experiment.experiment_id


SINK = MLflow


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the lines that MLflow logs while it creates a database."""
    logger = logging.getLogger("mlflow.store.db.utils")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)
