"""How far an evaluation is: written by the evaluator's own process to a file, and read by whoever waits for it."""

import json
import os
from pathlib import Path

__all__ = ["DONE", "TOTAL", "Reports", "read_reports"]

# The names of the two numbers.
DONE, TOTAL = "done", "total"
# Bytes of one report.
_LENGTH = 80


class Reports:
    """Takes how many of how many items are done (None: nobody knows), and writes that over the last, in one small write without a flush."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def __call__(self, done: int, total: int | None) -> None:
        os.pwrite(self._file, json.dumps([int(done), None if total is None else int(total)]).ljust(_LENGTH).encode(), 0)


def read_reports(path: Path) -> dict[str, int]:
    """What was reported last; empty when nothing was, and without a total where nobody knows it."""
    try:
        done, total = json.loads(path.read_bytes()[:_LENGTH])
    except (OSError, ValueError, TypeError):
        return {}
    return {DONE: done} if total is None else {DONE: done, TOTAL: total}
