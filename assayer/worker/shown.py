"""How far an evaluation is, shown in its job's meta while it runs."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import redis
from rq.job import Job

from assayer.progress import has_progress
from assayer.queues.enqueue import note_begun
from assayer.worker.reports import DONE, TOTAL, read_reports

__all__ = ["shown"]

# Seconds between two looks at what was written, and two looks whether there is anything that can be taken up again.
_LOOK = 1.0
_LOOK_FOR_BEGUN = 10.0


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
            now = read_reports(reports)
            if now and now != told:
                told = now
                job.meta.update(now)
                job.save_meta()
