"""Which watch commands stand in the foreground on this host: a file each, locked as long as its process lives."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from assayer.files import is_locked, lock_file, private_directory, read_json, try_lock
from assayer.plan import host_name

__all__ = ["Session", "held_plans"]

# Seconds after which an entry that nobody holds counts as left by a command that was killed.
LEFT_OVER = 60.0


def _folder(state: Path) -> Path:
    return private_directory(private_directory(state / "sessions") / host_name())


class Session:
    """This command's own entry, while the ``with`` block runs."""

    def __init__(self, state: Path, plan_ids: list[str]) -> None:
        self.path = _folder(state) / f"{os.getpid()}.json"
        self._plan_ids = plan_ids

    def __enter__(self) -> Self:
        self._descriptor = lock_file(self.path)
        try_lock(self._descriptor, self.path)
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, json.dumps(self._plan_ids).encode())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)


def held_plans(state: Path, but: int | None = None) -> set[str]:
    """The plans that some foreground command of this host stands for; ``but``: the process left out."""
    return {plan_id for path in _live(state) if path.stem != str(but) for plan_id in read_json(path) or []}


def _live(state: Path) -> Iterator[Path]:
    for path in _folder(state).glob("*.json"):
        if is_locked(path):
            yield path
        elif _age(path) > LEFT_OVER:
            path.unlink(missing_ok=True)


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
