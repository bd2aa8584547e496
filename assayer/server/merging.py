"""A merge that a client asks for, in a process of its own: the server answers others meanwhile, and what breaks there breaks there."""

import asyncio
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from assayer.checkpoint import Found
from assayer.errors import AssayerError, CheckpointError, ProtocolError, StateError
from assayer.files import printable
from assayer.merge.output import default_output
from assayer.merge.run import Options, find_checkpoint, run
from assayer.plan import Merging
from assayer.protocol import MergeRequest
from assayer.refs import PACKAGE_PARENT
from assayer.server.paths import Roots, why_not_into, within
from assayer.worker.child import die_with_parent

__all__ = ["Merger"]

T = TypeVar("T")


class Merger:
    """Merges for clients, a few at a time; others wait."""

    def __init__(self, roots: Roots, merging: Merging, at_once: int = 2) -> None:
        self._roots = roots
        self._merging = merging
        self._room = asyncio.Semaphore(at_once)
        self._threads = ThreadPoolExecutor(4)

    async def _apart(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    async def merge(self, request: MergeRequest) -> str:
        """The path of the merged checkpoint.

        Raises:
            ProtocolError: the path is not there (404), is no checkpoint or cannot be merged (400), is refused (403), or the merge failed
                (500).
        """
        found = await self._apart(self._found, request)
        target = await self._apart(self._target, request, found)
        how = self._merging
        orders = {
            "parent": os.getpid(),
            "source": found.checkpoint.path,
            "target": target,
            "options": {
                "checkpoint_type": request.checkpoint_type,
                "dtype": how.dtype,
                "hf_config": how.hf_config,
                "tokenizer": how.tokenizer,
                "key_map": how.key_map,
            },
        }
        async with self._room:
            told = await _in_process(orders)
        if "path" in told:
            return str(told["path"])
        raise ProtocolError(str(told["detail"]), status=int(told["status"]))

    def _found(self, request: MergeRequest) -> Found:
        path = self._roots.resolve(request.checkpoint_path)
        if not os.path.lexists(path):
            raise ProtocolError(f"{printable(path)[:500]} does not exist", status=404)
        try:
            return within(find_checkpoint(Path(path)), self._roots)
        except CheckpointError as error:
            raise ProtocolError(str(error), status=400) from None

    def _target(self, request: MergeRequest, found: Found) -> str:
        """Where the merge goes; the default place is beside the checkpoint, which may be outside of the roots."""
        if request.output_path is None:
            return self._roots.resolve(str(default_output(found, request.checkpoint_type)))
        target = self._roots.resolve(request.output_path)
        if why := why_not_into(target, found.checkpoint.path):
            raise ProtocolError(why, status=400)
        return target


async def _in_process(orders: dict[str, Any]) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "assayer.server.merging",
        cwd=PACKAGE_PARENT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        output, errors = await process.communicate(json.dumps(orders).encode())
    except asyncio.CancelledError:
        process.kill()
        raise
    try:
        told: dict[str, Any] = json.loads(output)
        return told
    except ValueError:
        lines = errors.decode(errors="replace").strip().splitlines()
        why = printable(lines[-1])[:500] if lines else f"it ended with code {process.returncode}"
        return {"status": 500, "detail": f"Merge failed: {why}"}


def _merged(orders: dict[str, Any]) -> dict[str, Any]:
    """What the process tells: the path, or a status and a sentence."""
    try:
        found = find_checkpoint(Path(orders["source"]))
        options = Options(**orders["options"])
        return {"path": str(run(found, Path(orders["target"]), options).path)}
    except StateError as error:
        return {"status": 500, "detail": f"Merge failed: {error}"}
    except AssayerError as error:
        return {"status": 400, "detail": str(error)}


if __name__ == "__main__":
    given = json.load(sys.stdin)
    die_with_parent(given["parent"])
    # A training run on this machine goes first.
    os.nice(5)
    print(json.dumps(_merged(given)))
