"""Reads what may be hostile in a child process whose memory is limited, and takes back nothing but JSON."""

import json
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from assayer.errors import AssayerError, CheckpointError, UnreadableError

__all__ = ["sealed"]

# No honest metadata takes so long (half a million pieces: 4 s).
_CPU_SECONDS = 600


def sealed(function: Callable[[], Iterator[Any]], memory: int, seconds: int = _CPU_SECONDS) -> Iterator[Any]:
    """What ``function`` yields (JSON values), called in a forked child that may take ``memory`` bytes more than this process has,
    and so many ``seconds`` of a processor.

    Raises:
        CheckpointError: it needed more memory, died, or raised an error of ours, whose text is kept.
    """
    read_end, write_end = os.pipe()
    with warnings.catch_warnings():
        # The child runs Python alone, and takes no lock that another thread could hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
    if pid == 0:
        os.close(read_end)
        _child(function, write_end, memory, seconds)
    os.close(write_end)
    answer: dict[str, Any] | None = None
    try:
        with os.fdopen(read_end, "rb") as lines:
            for line in lines:
                value = json.loads(line)
                if isinstance(value, dict):
                    answer = value
                    break
                yield value
    finally:
        # Also when the caller stops half-way: then the child's next write fails.
        _, status = os.waitpid(pid, 0)
    if answer is None and os.waitstatus_to_exitcode(status) == -signal.SIGXCPU:
        raise CheckpointError(f"needs more than {seconds} s of a processor to be read, which no honest one does")
    if answer is None:
        raise UnreadableError(f"the process that read it died (status {os.waitstatus_to_exitcode(status)})")
    if "error" in answer:
        raise CheckpointError(answer["error"])


def _child(function: Callable[[], Iterator[Any]], write_end: int, memory: int, seconds: int) -> None:
    code = 1
    try:
        with os.fdopen(write_end, "w") as answer:
            try:
                _limit(memory, seconds)
                for value in function():
                    answer.write(json.dumps(value, separators=(",", ":")) + "\n")
                last: dict[str, Any] = {"end": True}
            except AssayerError as error:
                last = {"error": str(error)}
            except MemoryError:
                last = {"error": f"needs more than {memory >> 20} MiB of memory to be read, which no honest one does"}
            except Exception as error:
                last = {"error": f"cannot be read ({type(error).__name__}: {error})"}
            answer.write(json.dumps(last) + "\n")
        code = 0
    finally:
        os._exit(code)


def _limit(memory: int, seconds: int) -> None:
    try:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        taken = 0
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = taken + memory
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
