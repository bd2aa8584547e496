"""The jobs of one training <-> one file below its ``evals/``: what is out, what came, and what was logged."""

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from assayer.checkpoint import list_path
from assayer.errors import StateError
from assayer.files import lock_file, read_json, try_lock, write_whole
from assayer.record import run_folder

__all__ = ["Job", "PendingFile", "signature_of"]

logger = logging.getLogger(__name__)

SCHEMA = 1

# new: to be submitted. submitted: its job is out. done: its metrics came, nobody took them yet. logged: they were taken.
# ended: it came to nothing (failed, cancelled, refused, forgotten).
STATES = ("new", "submitted", "done", "logged", "ended")


@dataclass(frozen=True)
class Job:
    """One evaluation of one checkpoint's weights.

    ``sent_as`` is its Idempotency-Key, ``path`` the name under which the checkpoint is submitted (empty: not decided yet); ``forgotten``
    counts how often the server lost it.
    """

    key: str
    checkpoint: str
    step: int
    weights: str
    signature: str = ""
    state: str = "new"
    job_id: str | None = None
    sent_as: str = ""
    path: str = ""
    forgotten: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    note: str | None = None

    @property
    def is_out(self) -> bool:
        return self.state in ("new", "submitted")

    @property
    def place(self) -> tuple[str, int, str]:
        """The same for the same place in the training."""
        return self.checkpoint, self.step, self.weights


_DEFAULTS = {f.name: f.default for f in fields(Job) if f.default is not MISSING and f.name != "state"}
_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("key", "checkpoint", "weights", "signature", "state", "sent_as", "path"), str),
    **dict.fromkeys(("step", "forgotten"), int),
    **dict.fromkeys(("job_id", "note"), (str, type(None))),
    "metrics": dict,
}

# Files of further trainings of one run at one time.
_BESIDE_MAX = 9

# Locks that this process has, and that its children are not to have.
_locks: set[int] = set()


def _close_locks() -> None:
    """In a child of a fork, such as a worker of a DataLoader: else a lock would live as long as the child does."""
    for descriptor in _locks:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _locks.clear()


os.register_at_fork(after_in_child=_close_locks)


class PendingFile:
    """``<output_dir>/evals/pending-<name>``, whole or absent, and the lock beside it that keeps a second training out.

    Where strangers beside checkpoints stop a trainer, ``evals/`` is one level higher, as for results (``record.run_folder``).
    """

    def __init__(self, output_dir: Path, name: str) -> None:
        # Asked with the names that such a folder's checkpoints have.
        runs = {run_folder(output_dir / checkpoint) for checkpoint in ("checkpoint_1", "step-1")}
        run = next((run for run in runs if run != output_dir), output_dir)
        self.path = run / "evals" / f"pending-{name}"
        self._lock: int | None = None

    def beside(self) -> bool:
        """Takes another file, where another training has this one; True when one is free, which this process then has for itself."""
        first = self.path
        for number in range(2, _BESIDE_MAX + 1):
            self.path = first.with_name(f"{first.name}-{number}")
            with contextlib.suppress(OSError):
                if self.try_lock():
                    return True
        self.path = first
        return False

    def try_lock(self) -> bool:
        """True when this process has the file for itself; also where the file system knows no locks, or nothing lies there yet.

        Raises:
            OSError: the folder cannot be written.
        """
        if self._lock is not None or not self.path.parent.is_dir():
            return True
        path = self.path.with_name(self.path.name + ".lock")
        descriptor = lock_file(path)
        try:
            if not try_lock(descriptor, path):
                os.close(descriptor)
                return False
        except StateError as error:
            logger.info("%s", error)
        self._lock = descriptor
        _locks.add(descriptor)
        return True

    def unlock(self) -> None:
        """Gives the file to the next training."""
        if self._lock is not None:
            # A child that was forked without being told may have it still.
            with contextlib.suppress(OSError):
                fcntl.flock(self._lock, fcntl.LOCK_UN)
            _locks.discard(self._lock)
            os.close(self._lock)
            self._lock = None

    def read(self) -> list[Job]:
        """The jobs that an earlier training left; what is none is passed over.

        Raises:
            OSError: the file cannot be read.
        """
        value = read_json(self.path)
        entries = value.get("jobs") if isinstance(value, dict) else None
        if not isinstance(entries, list):
            if self.path.is_file():
                logger.warning("%s is no file of pending evaluations: what it held is lost", self.path)
            return []
        return [job for entry in entries if (job := _job(entry))]

    def write(self, jobs: Iterable[Job]) -> None:
        """Writes all jobs, whole or not at all.

        Raises:
            OSError: the output directory is not there, or cannot be written.
        """
        self.path.parent.mkdir(exist_ok=True)
        # In one line, without what is the default: there may be thousands, and this is written at every change.
        content = {"schema": SCHEMA, "jobs": [{k: v for k, v in vars(job).items() if v != _DEFAULTS.get(k, MISSING)} for job in jobs]}
        write_whole(self.path, json.dumps(content).encode())


def _job(entry: Any) -> Job | None:
    if not isinstance(entry, dict):
        return None
    found = {**_DEFAULTS, "state": None, "metrics": {}, **{name: value for name, value in entry.items() if name in _TYPES}}
    if any(not isinstance(found.get(name), kind) for name, kind in _TYPES.items()) or found["state"] not in STATES:
        return None
    return Job(**found)


def signature_of(checkpoint: str) -> str:
    """A digest of a checkpoint's file names, sizes and times: another one where it was saved anew; "" where it cannot be listed."""
    try:
        return list_path(checkpoint).signature()
    except (OSError, ValueError):
        return ""
