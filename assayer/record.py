"""The noun of an outcome: one evaluation of one checkpoint, as one JSON file. Every path below ``evals/`` is made here.

The record is the memory of "done": a checkpoint whose identity and evaluator's name stand in a record is not evaluated again.
"""

import contextlib
import math
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from assayer.errors import AssayerError
from assayer.files import digest, read_json, remove_left_over, short_name, write_json

__all__ = [
    "OWN_FOLDERS",
    "STATUSES",
    "Place",
    "Record",
    "flatten",
    "hold_folder",
    "hold_key",
    "installed_versions",
    "now_utc",
    "results_folder",
    "run_folder",
]

SCHEMA = 1
STATUSES = ("finished", "failed", "timeout", "superseded", "vanished", "skipped", "cancelled")

# Metrics of one record that are shown outside of it; all of them are in the record.
METRICS_SHOWN = 50

# Folders that assayer makes beside checkpoints; no watch looks into them.
OWN_FOLDERS = frozenset({"evals", "merged"})

# Folders in which a trainer takes every entry for a checkpoint, and what it calls those.
_COUNTED = (("checkpoints", r"checkpoint_\d+|.*\.ckpt|.*--.*=.*"), ("checkpoint", r"step-\d+"))

_LETTERS = str.maketrans("0123456789", "ghijklmnop")

# Bytes kept free after a checkpoint's name for "@<8 digits>.json.tmp-<random>" and the like.
_ROOM = 40


def now_utc() -> str:
    """This moment in UTC, ISO 8601 with microseconds."""
    return datetime.now(UTC).isoformat()


def installed_versions() -> dict[str, str]:
    """The versions of Python, assayer and torch, as far as they are installed here."""
    found = {"python": platform.python_version()}
    for package in ("assayer", "torch"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


@dataclass(frozen=True)
class Record:
    """What one evaluation came to. ``seconds`` holds the time of each station; ``error`` cause, message and the traceback's end."""

    checkpoint: str
    format: str
    step: int | None
    epoch: float | None
    tokens: int | None
    identity: str
    # Of the listing when the identity was read: where it is still the same, the identity need not be read again.
    signature: str = field(kw_only=True, default="")
    weights: str
    evaluator: dict[str, Any]
    status: str
    metrics: dict[str, float | int | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    error: dict[str, Any] | None = None
    attempts: int = 0
    started: str = ""
    ended: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    host: str = ""
    gpus: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    log: str | None = None
    # What the evaluator got in the checkpoint's place (format, bytes, tensors, seconds, notes); None: the checkpoint itself.
    merged: dict[str, Any] | None = None
    # What the evaluator told of itself, such as a fingerprint of the weights that it has loaded.
    details: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def glance(self) -> dict[str, Any]:
        """What boards and job results show of a record: its outcome in a few fields, and no more than ``METRICS_SHOWN`` metrics."""
        return {
            "status": self.status,
            "metrics": dict(list(self.metrics.items())[:METRICS_SHOWN]),
            "attempts": self.attempts,
            "seconds": self.seconds.get("evaluate"),
            "ended": self.ended_at,
            "log": self.log,
            "error": (self.error or {}).get("message"),
        }

    @property
    def settles(self) -> bool:
        """False for an outcome that says only that the weights were away: once they are there, they are to be evaluated."""
        return self.status not in ("superseded", "vanished")

    @property
    def ended_at(self) -> float:
        """Seconds since the epoch; 0 when the record does not say."""
        try:
            return datetime.fromisoformat(self.ended).timestamp()
        except ValueError:
            return 0.0


_FIELDS = {f.name for f in fields(Record)}


# What a record's fields must be for the rest of assayer to rely on.
_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("checkpoint", "format", "identity", "status", "ended"), str),
    **dict.fromkeys(("evaluator", "metrics", "seconds"), dict),
    "error": (dict, type(None)),
    "attempts": int,
}


def read(path: Path) -> Record | None:
    """The record in ``path``; None when there is none, or it is not one.

    Raises:
        OSError: it cannot be read.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        return None
    if any(not isinstance(value[key], kind) for key, kind in _TYPES.items() if key in value):
        return None
    with contextlib.suppress(TypeError):
        return Record(**{key: value[key] for key in _FIELDS & value.keys()})
    return None


def run_folder(checkpoint: Path) -> Path:
    """The folder beside whose checkpoints ours may stand.

    accelerate counts whatever lies in ``checkpoints/`` as checkpoints and stops training over a name without a digit
    (accelerator.py, save_state), and so do earlier versions of torchtitan in ``checkpoint/`` (checkpoint.py, 0.1.0); NeMo looks through all
    of its ``checkpoints/`` for the last one (exp_manager.py), which Lightning's loggers call so, too. There the folder is one level higher.
    """
    run = checkpoint.parent
    is_counted = any(run.name == folder and re.fullmatch(name, checkpoint.name) for folder, name in _COUNTED)
    return run.parent if is_counted else run


def hold_folder(checkpoint: Path, results_dir: str | None = None) -> Path:
    """The hidden folder in which checkpoints of this one's directory are protected from deletion: beside the evaluators' folders."""
    return results_folder(checkpoint, results_dir) / ".hold"


def results_folder(checkpoint: Path, results_dir: str | None = None) -> Path:
    """``<folder of the checkpoint>/evals``, or ``<results_dir>/<run name>-<digest of its path>``."""
    run = run_folder(checkpoint)
    return run / "evals" if results_dir is None else Path(results_dir) / f"{short_name(run.name, _ROOM)}-{digest(str(run))[:8]}"


def hold_key(checkpoint: str, identity: str) -> str:
    """The name of a hold: a digest of the checkpoint's path and its weights' identity; letters alone, so that no step is read from it."""
    return digest(checkpoint, identity)[:16].translate(_LETTERS)


@dataclass(frozen=True)
class Place:
    """Where the results of one checkpoint under one evaluator lie."""

    root: Path
    parts: tuple[str, ...]
    name: str

    @property
    def folder(self) -> Path:
        return self.root.joinpath(*self.parts)

    @classmethod
    def of(cls, checkpoint: str, evaluator: str, results_dir: str | None = None, weights: str = "regular") -> "Place":
        """``<folder of the checkpoint>/evals/<evaluator>/``, or ``<results_dir>/<run name>-<digest of its path>/<evaluator>/``.

        What belongs to EMA weights is called ``<checkpoint>@ema``.
        """
        path = Path(checkpoint)
        name = short_name(path.name + ("" if weights == "regular" else f"@{weights}"), _ROOM)
        folder = results_folder(path, results_dir)
        return cls(folder.parent, (folder.name, evaluator), name)

    @classmethod
    def of_job(cls, job: str, evaluator: str, checkpoint: str | None, results_dir: str | None, weights: str = "regular") -> "Place":
        """Where the results of one job of a server lie, which no watch takes for its own: ``<checkpoint>@job-<first 8 of the job's id>``
        among those of its checkpoint, or ``<results_dir>/<evaluator>/job-<id>`` where there is none."""
        if checkpoint is None:
            return cls(Path(results_dir or "."), (evaluator,), f"job-{job}")
        place = cls.of(checkpoint, evaluator, results_dir, weights)
        return cls(place.root, place.parts, short_name(f"{place.name}@job-{job[:8]}", _ROOM))

    def make_folder(self) -> None:
        """Makes the folder of the results below the run's own (or ``results_dir``), which must be there: a directory that is away, such as
        an unmounted file system, is not made anew.

        Raises:
            OSError: the root is not there, or cannot be written.
        """
        folder = self.root
        folder.stat()
        for part in self.parts:
            folder = folder / part
            with contextlib.suppress(FileExistsError):
                folder.mkdir()

    @property
    def record(self) -> Path:
        return self.folder / f"{self.name}.json"

    def earlier(self, identity: str) -> Path:
        """Where the record of an identity lies that is no longer (or was never) the one under the checkpoint's name."""
        return self.folder / f"{self.name}@{identity[:8]}.json"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def output(self) -> Path:
        """The folder for an evaluator's own files."""
        return self.folder / f"{self.name}.files"

    @property
    def samples(self) -> Path:
        """The file for single samples and their answers."""
        return self.folder / f"{self.name}.samples.jsonl"

    def progress(self, identity: str) -> Path:
        """The folder of what an evaluation of these weights has finished so far."""
        return self.folder / f"{self.name}@{identity[:8]}.progress"

    def find(self, identity: str) -> Record | None:
        """The record of these weights, wherever it lies; None when they were not evaluated."""
        for path in (self.record, self.earlier(identity)):
            record = read(path)
            if record and record.identity == identity:
                return record
        return None

    def write(self, record: Record, is_current: bool = True) -> Path:
        """Writes the record, whole or not at all, and returns its path. Another identity's record under this name is kept beside it.

        Args:
            record: the outcome.
            is_current: False when the path holds other weights by now: then the checkpoint's name is left to their record.

        Raises:
            OSError: the folder is read-only or full.
        """
        self.make_folder()
        # Of a name that nobody writes again, too: the weights may have been saved anew since.
        remove_left_over(self.folder)
        if record.status == "superseded" or not is_current:
            path = self.earlier(record.identity)
        else:
            path = self.record
            present = read(path)
            if present and present.identity != record.identity:
                _keep(path, self.earlier(present.identity))
        write_json(path, record.to_json())
        other = self.earlier(record.identity) if path == self.record else self.record
        present = read(other)
        if present and present.identity == record.identity:
            # An earlier word of the same weights, such as that they were away: one record is enough.
            other.unlink(missing_ok=True)
        return path


def _keep(path: Path, name: Path) -> None:
    """Gives the file a second name, or, where the file system has no hard links, its new one."""
    try:
        os.link(path, name)
    except FileExistsError:
        pass
    except OSError:
        os.replace(path, name)


def flatten(result: object) -> tuple[dict[str, float | int | None], list[str]]:
    """An evaluator's return value as metric names and finite numbers, with a note for each NaN or infinity (stored as null).

    Nested mappings are joined with ``/``; numpy and torch scalars count as numbers.

    Raises:
        AssayerError: it is no mapping, it is empty, or a value is no number.
    """
    if not isinstance(result, Mapping):
        raise AssayerError(f"the evaluator returned {_kind(result)}; it must return a mapping of metric names to numbers")
    metrics: dict[str, float | int | None] = {}
    notes: list[str] = []
    for name, value in _leaves(result, ""):
        if name in metrics:
            raise AssayerError(f"the evaluator returned the metric {name!r} twice")
        number = _number(name, value)
        metrics[name] = number if _is_finite(number) else None
        if metrics[name] is None:
            notes.append(f"{name} is {number}" if isinstance(number, float) else f"{name} is too large for a number of 64 bits")
    if not metrics:
        raise AssayerError("the evaluator returned an empty mapping; it must return at least one metric")
    return metrics, notes


def _is_finite(number: float | int) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def _leaves(mapping: Mapping[Any, Any], prefix: str) -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for key, value in mapping.items():
        found += _leaves(value, f"{prefix}{key}/") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return found


def _number(name: str, value: object) -> float | int:
    if not isinstance(value, int | float | str | bytes) and hasattr(value, "item"):
        try:
            value = value.item()
        except (ValueError, RuntimeError, TypeError):
            shape = tuple(getattr(value, "shape", ()))
            raise AssayerError(f"the metric {name!r} has the shape {shape}; it must be one number") from None
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    raise AssayerError(f"the metric {name!r} is {_kind(value)}, not a number")


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
