"""MLflow: metrics of a run, with the checkpoint's step and the end of its evaluation as their time.

Exactly one point each, whatever breaks off: what is doubtful is looked up in the metric's history by step and time and only what is missing
there is logged. In a database (and so on a server with one) the same metric with the same value, step and time is one row anyway, since all
four are part of its primary key (mlflow/store/tracking/dbmodels/models.py): in a run that is named even a lost ledger doubles nothing. A
run of our own is found by a tag that the ledger knows, so that a lost ledger makes another run.

Without ``run=`` a run of our own is made, called after the folder of the checkpoints, and found again by a tag.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from assayer.errors import TrackerError, UsageError
from assayer.files import digest, printable
from assayer.points import Curve, Point

__all__ = ["EXTRA", "NEEDS", "OPTIONS", "WORD", "publish", "settle"]

OPTIONS = {
    "uri": "the tracking server or store, such as sqlite:///mlflow.db or http://host:5000",
    "experiment": "the name of an experiment; default: the run's own, else Default",
    "run": "the id of a run, or a run's name; {run} stands for the folder's name; default: a run of our own",
}
WORD = None
EXTRA = "mlflow"
NEEDS = ("mlflow",)

# Metrics that a request may hold, and characters that a metric's name may hold (mlflow/utils/validation.py).
_BATCH = 1000
_ALLOWED = re.compile(r"[^\w\-. :/]", re.ASCII)
_NAME_MAX = 250
_TAG = "assayer.results"


def settle(options: Mapping[str, str], cwd: Path) -> dict[str, str]:
    """The options, with the path of a SQLite file or of a folder made absolute."""
    if not options.get("uri"):
        raise UsageError("mlflow needs uri=...: " + OPTIONS["uri"])
    uri = options["uri"]
    if match := re.fullmatch(r"sqlite:///([^/:?].*)", uri):
        uri = f"sqlite:///{(cwd / match[1]).absolute()}"
    elif not re.match(r"[A-Za-z][\w+.-]*:|databricks$", uri):
        uri = (cwd / Path(uri).expanduser()).absolute().as_uri()
    return {**options, "uri": uri}


def publish(points: Sequence[Point], options: Mapping[str, str], curve: Curve) -> list[str]:
    """Logs what the run does not have."""
    # It tells of every table that it makes in a new database.
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

    try:
        client = MlflowClient(tracking_uri=options["uri"])
        run = _run(client, options, curve)
    except ModuleNotFoundError as error:
        # Of a database, which the small package of MLflow does not bring.
        raise TrackerError(f"{options['uri']} needs {error.name}, which is not installed: pip install 'assayer[{EXTRA}]'") from None
    wanted = [
        (point.doubtful, Metric(name, float(number), round(point.wall * 1000), point.step))
        for point in points
        for name, number in _names(point.values).items()
    ]
    known = _known(client, run, sorted({metric.key for is_doubtful, metric in wanted if is_doubtful}), curve)
    metrics = [m for is_doubtful, m in wanted if not (is_doubtful and (m.step, m.timestamp) in known[m.key])]
    for start in range(0, len(metrics), _BATCH):
        client.log_batch(run, metrics=metrics[start : start + _BATCH])
        curve.alive()
    return []


def _known(client: Any, run: str, names: Sequence[str], curve: Curve) -> dict[str, set[tuple[int, int]]]:
    """Steps and moments of all that the run has under these names: a name's history is asked for once, however many points it has."""
    found = {}
    for name in names:
        found[name] = {(metric.step, metric.timestamp) for metric in client.get_metric_history(run, name)}
        curve.alive()
    return found


def _names(values: Mapping[str, float]) -> dict[str, float]:
    """The metrics under names that MLflow takes; two that would become one stay two."""
    found: dict[str, float] = {}
    for name, number in values.items():
        parts = [part if part.strip(".") else "_" for part in _ALLOWED.sub("_", name).split("/")]
        allowed = "/".join(parts)
        if len(allowed) > _NAME_MAX or (allowed in found or (allowed != name and allowed in values)):
            allowed = f"{allowed[: _NAME_MAX - 9]}-{digest(name)[:8]}"
        found[allowed] = number
    return found


def _run(client: Any, options: Mapping[str, str], curve: Curve) -> str:
    """The id of the run that these options mean; made where it is ours to make."""
    given = options.get("run", "").replace("{run}", curve.run)
    if re.fullmatch(r"[0-9a-f]{32}", given):
        return str(client.get_run(given).info.run_id)
    experiment = _experiment(client, options.get("experiment"))
    condition = f"tags.`mlflow.runName` = '{_quoted(given)}'" if given else f"tags.`{_TAG}` = '{curve.uid}'"
    found = client.search_runs([experiment], filter_string=condition, max_results=2)
    if len(found) > 1:
        raise UsageError(f"{len(found)} runs or more are called {printable(given)}; give the id of one, run=<32 hexadecimal digits>")
    if found:
        return str(found[0].info.run_id)
    made = client.create_run(experiment, run_name=given or f"{curve.run}-eval", tags={_TAG: curve.uid}).info.run_id
    # Nobody will ever end it; a run that has ended takes metrics all the same.
    client.set_terminated(made, "FINISHED")
    return str(made)


def _quoted(text: str) -> str:
    if "'" in text:
        raise UsageError(f"the run's name {printable(text)} holds a quote; give its id")
    return text


def _experiment(client: Any, name: str | None) -> str:
    if not name:
        return "0"
    found = client.get_experiment_by_name(name)
    return str(found.experiment_id if found else client.create_experiment(name))
