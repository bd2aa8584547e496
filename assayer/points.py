"""The noun of a curve: what one record gives to a tracker, and under which names.

A record gives at most one point: a step, a moment, and its finite metrics by name. Two records are the same point when evaluator, weights,
identity and step are the same: so a checkpoint that is evaluated anew gives no second point, a path that is saved again with other weights
gives one more, and two steps whose weights are equal give two. The path does not count: a run that is moved stays what it was. What a
client has asked a server for is a point of its own, job by job, since its arguments may be others.

A metric is called ``eval/<metric>``, of EMA weights ``eval_ema/<metric>``; one that begins with ``eval/`` already gets no second prefix. A
name belongs to the evaluator that was the first to use it in its results folder; another evaluator's metric of that name is called
``eval/<evaluator>/<metric>``, and so is every one with ``names=evaluator``.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from assayer.checkpoint import numbers_called_after
from assayer.files import digest
from assayer.record import Record

__all__ = ["Curve", "Point", "is_of_job", "is_of_one", "point_of", "run_name", "why_none"]

_PREFIX = "eval/"


@dataclass(frozen=True)
class Point:
    """One point of every curve of one record.

    ``key`` says which point it is, ``id`` which evaluation it came from, ``wall`` when that ended (seconds since the epoch). ``doubtful``:
    an earlier publication broke off, so that the tracker may have it already.
    """

    key: str
    id: str
    step: int
    wall: float
    values: dict[str, float]
    evaluator: str
    record: str
    doubtful: bool = False

    def to_json(self) -> dict[str, Any]:
        value = asdict(self)
        del value["doubtful"]
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Point":
        return cls(**value)

    def without(self, names: set[str]) -> "Point":
        """The same point without these metrics."""
        return replace(self, values={name: number for name, number in self.values.items() if name not in names})


@dataclass
class Curve:
    """What one results folder is to one tracker's target: the place that its points are of.

    ``uid`` is a random name of 16 hexadecimal digits that stays with the folder, ``facts`` what a tracker has found out about its target.
    ``alive`` is called whenever the tracker has answered, so that nobody takes a long publication for one that hangs.
    """

    results: Path
    uid: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    remember: Callable[[dict[str, Any]], None] = lambda facts: None
    alive: Callable[[], None] = lambda: None

    @property
    def run(self) -> str:
        return run_name(self.results)


def run_name(results: Path) -> str:
    """The name of the run whose results lie in this folder: ``<run>/evals``, or ``<results_dir>/<run>-<digest>``."""
    return results.parent.name if results.name == "evals" else results.name


def why_none(record: Record) -> str | None:
    """Why this record gives no point; None when it gives one."""
    if record.status != "finished":
        return f"its status is {record.status}"
    if _step(record) is None:
        return "it has neither a step nor a whole number of epochs"
    if all(_finite(value) is None for value in record.metrics.values()):
        return "no metric of it is a finite number"
    return None


def is_of_one(name: str, record: Record) -> bool:
    """True when a folder of this name is called after the one checkpoint that lies there, such as ``step_500``."""
    return _step(record) in numbers_called_after(name)


def is_of_job(record: Record) -> bool:
    """True of what a client has asked a server for: no watch takes it for its own."""
    return "job" in record.details


def _finite(value: object) -> float | int | None:
    """The number itself; None where it is none, or beyond what a tracker can show."""
    try:
        return value if isinstance(value, int | float) and math.isfinite(value) else None
    except OverflowError:
        return None


def _step(record: Record) -> int | None:
    """The step; where a trainer counts epochs alone, the epoch."""
    if isinstance(record.step, int):
        return record.step
    if isinstance(record.epoch, int | float) and math.isfinite(record.epoch) and record.epoch == int(record.epoch):
        return int(record.epoch)
    return None


def point_of(record: Record, path: Path, owners: Mapping[str, str], names: str = "metric") -> tuple[Point, list[str]]:
    """The point of a record for which ``why_none`` says None, and a note for each name that belongs to another evaluator.

    Args:
        record: the outcome of an evaluation.
        path: where it lies.
        owners: which evaluator uses which name already.
        names: ``metric``, or ``evaluator``: then the evaluator's name is always a part.
    """
    step = _step(record)
    if step is None:
        raise ValueError(f"{path} gives no point")
    evaluator = str(record.evaluator.get("name") or path.parent.name)
    values, notes = _named(record, evaluator, owners, names == "evaluator")
    job = [str(record.details["job"])] if is_of_job(record) else []
    key = digest(evaluator, record.weights, record.identity, str(step), *job)
    return Point(key, digest(key, record.ended), step, record.ended_at, values, evaluator, str(path)), notes


def _named(record: Record, evaluator: str, owners: Mapping[str, str], always: bool) -> tuple[dict[str, float], list[str]]:
    prefix = _PREFIX if record.weights in ("regular", "raw") else f"eval_{record.weights}/"
    values: dict[str, float] = {}
    taken: set[str] = set()
    notes = []
    # Names that are complete as they are come first: of "loss" and "eval/loss" in one record, the second keeps its name. So it does where
    # it is no finite number: no other metric moves onto its curve.
    for metric in sorted(record.metrics, key=lambda name: (not name.startswith(_PREFIX), name)):
        number, rest = _finite(record.metrics[metric]), metric.removeprefix(_PREFIX)
        name = f"{prefix}{evaluator}/{rest}" if always else f"{prefix}{rest}"
        while name in taken or owners.get(name, evaluator) != evaluator:
            other, rest = name, f"{evaluator}/{rest}"
            name = f"{prefix}{rest}"
            # Said of the first point under that name alone.
            if other not in taken and name not in owners:
                notes.append(f"{other} belongs to the evaluator {owners[other]}: that of {evaluator} is called {name}")
        taken.add(name)
        if number is not None:
            values[name] = number
    return values, notes
