"""How far an evaluation is: written by the evaluator's own process to a file, read by its worker, shown in the job's meta."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import redis
from rq.job import Job

from assayer.progress import has_progress
from assayer.queues.enqueue import note_begun

__all__ = ["DONE", "TOTAL", "Reports", "shown"]

# The fields of a job's meta.
DONE, TOTAL = "done", "total"
# Bytes of one report.
_LENGTH = 80
# Seconds between two looks at what was written, and two looks whether there is anything that can be taken up again.
_LOOK = 1.0
_LOOK_FOR_BEGUN = 10.0


class Reports:
    """Takes how many of how many items are done (None: nobody knows), and writes that over the last, in one small write without a flush."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def __call__(self, done: int, total: int | None) -> None:
        os.pwrite(self._file, json.dumps([int(done), None if total is None else int(total)]).ljust(_LENGTH).encode(), 0)


@contextlib.contextmanager
def shown(job: Job, progress: Path, reports: Path) -> Iterator[None]:
    """While it lasts, what is reported in the file ``reports`` stands in the job's meta, flat; and once something is saved in the folder
    ``progress``, the job counts as begun. A Redis that does not answer is no matter."""
    over = threading.Event()
    thread = threading.Thread(target=_show, args=(job, progress, reports, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        for key in (DONE, TOTAL):
            job.meta.pop(key, None)


def _show(job: Job, progress: Path, reports: Path, over: threading.Event) -> None:
    began, begun = time.monotonic(), False
    told: dict[str, int] = {}
    while not over.wait(_LOOK):
        with contextlib.suppress(redis.RedisError):
            if not begun and time.monotonic() - began > _LOOK_FOR_BEGUN:
                began, begun = time.monotonic(), has_progress(progress)
                if begun:
                    note_begun(job)
            now = _read(reports)
            if now and now != told:
                told = now
                job.meta.update(now)
                job.save_meta()


def _read(path: Path) -> dict[str, int]:
    try:
        done, total = json.loads(path.read_bytes()[:_LENGTH])
    except (OSError, ValueError, TypeError):
        return {}
    return {DONE: done} if total is None else {DONE: done, TOTAL: total}
