"""What has been published: one file a tracker's target beside the records, ``evals/<tracker>-<digest>.ledger``.

Each line is a JSON object that counts whole or not at all: before a tracker is asked, the points that it is to get (``intend``); after it
has taken them, their ids (``done``). What is intended and not done when a ledger is opened was broken off at some moment, so it is
doubtful: the tracker may have it. Only trackers can say, and each does it in its own way.

The file is its own lock and is never replaced: on NFS, taking a lock is what makes the client read a file anew, and a file that another
host has put in its place would be seen late.
"""

import contextlib
import json
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from assayer.errors import StateError
from assayer.files import is_open_as, printable, try_lock
from assayer.points import Point

__all__ = ["Ledger", "opened"]

# Seconds between two tries to get a lock that another publisher holds.
_STEP = 0.05


class Ledger:
    """The open, locked ledger of one target.

    ``pending``: points intended and not done, by id; ``refused``: the ids of those that the tracker would not take by themselves; ``keys``
    and ``ids``: what was intended ever; ``owners``: the evaluator of each name.
    """

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor = descriptor
        self._path = path
        self.pending: dict[str, Point] = {}
        self.refused: set[str] = set()
        self.keys: set[str] = set()
        self.ids: set[str] = set()
        self.owners: dict[str, str] = {}
        self.facts: dict[str, Any] = {}
        data = _read(descriptor)
        self._is_torn = bool(data) and not data.endswith(b"\n")
        for line in data.split(b"\n"):
            with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
                self._take(json.loads(line))
        if "uid" not in self.facts:
            self.remember({"uid": secrets.token_hex(8)})

    @property
    def uid(self) -> str:
        return str(self.facts["uid"])

    def _take(self, line: dict[str, Any]) -> None:
        for value in line.get("intend", ()):
            self._intend(Point.from_json(value))
        for name in line.get("done", ()):
            self.pending.pop(name, None)
        self.refused.update(line.get("refused", ()))
        self.facts.update(line.get("facts", {}))

    def _intend(self, point: Point) -> None:
        self.pending[point.id] = replace(point, doubtful=True)
        self.keys.add(point.key)
        self.ids.add(point.id)
        for name in point.values:
            self.owners.setdefault(name, point.evaluator)

    def intend(self, points: Iterable[Point]) -> None:
        """Notes that these points are to be published from now on.

        Raises:
            StateError: the file cannot be written; nothing is intended then.
        """
        chosen = list(points)
        if chosen:
            self._append({"intend": [point.to_json() for point in chosen]})
            for point in chosen:
                self._intend(point)

    def done(self, points: Iterable[Point]) -> None:
        """Notes that the tracker has these points.

        Raises:
            StateError: the file cannot be written; they are doubtful then.
        """
        names = [point.id for point in points]
        if names:
            self._append({"done": names})
            for name in names:
                self.pending.pop(name, None)

    def refuse(self, points: Iterable[Point]) -> None:
        """Notes that the tracker has refused these points, each by itself; they stay doubtful.

        Raises:
            StateError: the file cannot be written.
        """
        names = [point.id for point in points if point.id not in self.refused]
        if names:
            self._append({"refused": names})
            self.refused.update(names)

    def remember(self, facts: dict[str, Any]) -> None:
        """Keeps what a tracker has found out about its target.

        Raises:
            StateError: the file cannot be written.
        """
        self._append({"facts": facts})
        self.facts.update(facts)

    def _append(self, line: dict[str, Any]) -> None:
        # What a torn line was does not count; the line after it must.
        data = b"\n" * self._is_torn + json.dumps(line, allow_nan=False).encode() + b"\n"
        self._is_torn = True
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
            os.fsync(self._descriptor)
        except OSError as error:
            raise StateError(f"cannot write {printable(str(self._path))}: {error.strerror}") from None
        self._is_torn = False


def _read(descriptor: int) -> bytes:
    os.lseek(descriptor, 0, os.SEEK_SET)
    parts = []
    while part := os.read(descriptor, 1 << 20):
        parts.append(part)
    return b"".join(parts)


@contextmanager
def opened(path: Path, seconds: float) -> Iterator[Ledger]:
    """The ledger of this path, made when missing, and nobody else's while the block runs.

    Args:
        path: its folder must be there.
        seconds: how long to wait for another publisher.

    Raises:
        StateError: it cannot be opened or locked, or somebody publishes for longer than that.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise StateError(f"cannot open {printable(str(path))}: {error.strerror}") from None
        try:
            _lock(descriptor, path, deadline)
            if is_open_as(descriptor, path):
                yield Ledger(descriptor, path)
                return
        finally:
            os.close(descriptor)


def _lock(descriptor: int, path: Path, deadline: float) -> None:
    while True:
        try:
            if try_lock(descriptor, path):
                return
        except StateError:
            raise StateError(f"{printable(str(path))} cannot be locked; give results a file system with locks, by --results_dir") from None
        if time.monotonic() > deadline:
            raise StateError(f"{printable(str(path))} is held by another publisher; publish again later")
        time.sleep(_STEP)
