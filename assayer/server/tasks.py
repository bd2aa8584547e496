"""The names of the tasks that lm-eval and lmms-eval have: asked for once, in a process of its own."""

import asyncio
import contextlib
import json
import logging
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from assayer.errors import ProtocolError
from assayer.files import digest, read_json, write_json

__all__ = ["Tasks"]

logger = logging.getLogger(__name__)

# To import either package takes seconds, so it is not done here; the names are on the last line.
_ASK = """
import contextlib, importlib.util, io, json, os, sys
os.nice(10)
names, broken = set(), []
for package in ("lm_eval", "lmms_eval"):
    if importlib.util.find_spec(package) is None:
        continue
    broken.append(package)
    with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
        tasks = __import__(package + ".tasks", fromlist=["TaskManager"])
        names |= set(map(str, tasks.TaskManager().all_tasks))
        if package == "lm_eval" and sys.argv[1]:
            names |= set(map(str, tasks.TaskManager(include_path=sys.argv[1], include_defaults=False).all_tasks))
        broken.remove(package)
print("\\n" + json.dumps([sorted(names), broken]))
"""


class Tasks:
    """The names. ``path`` is a file in the state directory that keeps them for the next server of the same versions and folder of tasks."""

    def __init__(self, state: Path, include_path: str | None) -> None:
        self._include_path = include_path
        self.path = state / f"tasks-{_version_of_all(include_path)}.json"
        self._asked: asyncio.Task[list[str]] | None = None

    async def names(self) -> list[str]:
        """All names; whoever gives up waiting for them does not keep them from the next one who asks."""
        if self._asked is None or (self._asked.done() and self._asked.exception() is not None):
            self._asked = asyncio.create_task(self._read())
        return await asyncio.shield(self._asked)

    async def _read(self) -> list[str]:
        known = await asyncio.to_thread(read_json, self.path)
        if isinstance(known, list):
            return [str(name) for name in known]
        command = [sys.executable, "-c", _ASK, self._include_path or ""]
        none = asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(*command, stdin=none, stdout=asyncio.subprocess.PIPE, stderr=none)
        try:
            output, _ = await process.communicate()
        except asyncio.CancelledError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            raise
        try:
            told, broken = json.loads(output.strip().splitlines()[-1])
            names = [str(name) for name in told]
        except (ValueError, IndexError):
            raise ProtocolError("the names of the tasks could not be read", status=503) from None
        if broken:
            # Asked again by the next server: what is broken now may be whole then.
            logger.warning("the names of the tasks of %s could not be read", " and ".join(broken))
            return names
        try:
            await asyncio.to_thread(write_json, self.path, names, 0o600)
        except OSError as error:
            logger.warning("the names of the tasks could not be kept: %s", error)
        return names


def _version_of_all(include_path: str | None) -> str:
    told = []
    for package in ("lm_eval", "lmms_eval"):
        try:
            told.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            told.append(f"{package} {find_spec(package) is not None}")
    changed = [str(os.stat(folder).st_mtime_ns) for folder, _, _ in os.walk(include_path)] if include_path else []
    return digest(*told, include_path or "", *changed)[:16]
