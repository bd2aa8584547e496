"""Which commands stand in the foreground on this host, watches and servers: a file each, locked as long as its process lives."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from assayer.files import is_locked, lock_file, private_directory, read_json, try_lock
from assayer.plan import host_name

__all__ = ["Serving", "Session", "held_plans", "servers"]

# Seconds after which an entry that nobody holds counts as left by a command that was killed.
LEFT_OVER = 60.0


def _folder(state: Path, kind: str = "sessions") -> Path:
    return private_directory(private_directory(state / kind) / host_name())


class _Entry:
    """This command's own entry, while the ``with`` block runs."""

    def __init__(self, folder: Path, content: object) -> None:
        self.path = folder / f"{os.getpid()}.json"
        self._content = content

    def __enter__(self) -> Self:
        self._descriptor = lock_file(self.path)
        try_lock(self._descriptor, self.path)
        self.write(self._content)
        return self

    def write(self, content: object) -> None:
        """Writes another content in the first one's place."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(content).encode(), 0)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)


class Session(_Entry):
    """A watch command's entry: the plans that it stands for."""

    def __init__(self, state: Path, plan_ids: list[str]) -> None:
        super().__init__(_folder(state), plan_ids)


class Serving(_Entry):
    """A server's entry: the Redis and the queue whose workers it needs, and where it listens (None: not yet)."""

    def __init__(self, state: Path, redis: str, queue: str, url: str | None = None) -> None:
        super().__init__(_folder(state, "servers"), {"pid": os.getpid(), "redis": redis, "queue": queue, "url": url})


def servers(state: Path, redis: str) -> list[dict[str, Any]]:
    """The servers of this host that live and work on the Redis of this name: ``pid``, ``queue``, ``url``."""
    if not (state / "servers" / host_name()).is_dir():
        return []
    found = [read_json(path) for path in _live(_folder(state, "servers"))]
    return [entry for entry in found if isinstance(entry, dict) and entry.get("redis") == redis]


def held_plans(state: Path, but: int | None = None) -> set[str]:
    """The plans that some foreground command of this host stands for; ``but``: the process left out."""
    return {plan_id for path in _live(_folder(state)) if path.stem != str(but) for plan_id in read_json(path) or []}


def _live(folder: Path) -> Iterator[Path]:
    for path in folder.glob("*.json"):
        if is_locked(path):
            yield path
        elif _age(path) > LEFT_OVER:
            path.unlink(missing_ok=True)


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
