"""The recipe of one evaluation: check the weights, call the evaluator, check the weights again, record."""

import logging
import os
from dataclasses import asdict, replace
from typing import Any

from rq import Retry, get_current_job
from rq.job import Job

from assayer.errors import StateError
from assayer.files import printable
from assayer.progress import remove as remove_progress
from assayer.queues import Connection
from assayer.queues.enqueue import LOST_MAX, Task, is_wanted, note_of, note_served
from assayer.record import Place, Record, now_utc
from assayer.worker import hold
from assayer.worker.attempt import attempt, count_run, keep, make_folder, only_here, record_of, tries_again
from assayer.worker.call import Outcome
from assayer.worker.merging import REFUSED, UNREADABLE, scratch_of
from assayer.worker.weights import changed, changed_for_good, hold_of, is_current, source_of

__all__ = ["evaluate"]

logger = logging.getLogger(__name__)

# RQ's own count of retries never decides: an attempt counts only when the evaluator itself ended badly.
_AGAIN = 1_000_000


def evaluate(**arguments: Any) -> Any:
    """The eval job: its record's main fields, or RQ's order to try again. ``arguments`` are those of ``Task``."""
    job = get_current_job()
    assert job is not None
    task = Task.from_json(arguments)
    try:
        with only_here(task):
            value = _evaluate(job, task)
        if not isinstance(value, Retry):
            _put_away(job, task, value["status"])
        return value
    except BaseException:
        # RQ's retries are for lost workers: what raises here, such as a full disk, would raise again at once. The watch tries it later.
        job.retries_left = None
        raise


def _put_away(job: Job, task: Task, status: str) -> None:
    """Releases the hold, and the merge, unless another evaluation needs them; and what would be taken up again, unless it may still be."""
    if status not in ("failed", "timeout"):
        remove_progress(Place.of(task.checkpoint, task.evaluator.name, task.results_dir, task.weights).progress(task.identity))
    held = hold_of(task)
    if not is_wanted(job.connection, task.hold_id, done=job.id) and held:
        hold.release(held)
    if task.merges:
        is_wanted(job.connection, task.merge_id, done=job.id)
        scratch_of(job, task).release(task.merge_id)


def _evaluate(job: Job, task: Task) -> Any:
    place = Place.of(task.checkpoint, task.evaluator.name, task.results_dir, task.weights)
    present = place.find(task.identity)
    if present and present.settles and present.ended_at >= task.not_before:
        return present.glance()
    make_folder(place)
    source = source_of(task)
    kept = Record(**job.meta.pop("outcome")) if "outcome" in job.meta else None
    if kept and kept.ended_at >= task.not_before:
        return _finish(job, place, task, source, kept)
    note_served(job.connection, task)
    runs = count_run(job, place.progress(task.identity))
    base = record_of(task, place, job)
    if _is_overtaken(job, task):
        return _deliver(
            job, place, task, replace(base, status="skipped", notes=["a newer checkpoint waits (--latest_only)"], ended=now_utc())
        )
    if runs > LOST_MAX:
        cause = {"cause": "workers lost", "message": f"{LOST_MAX} workers in a row were lost while they evaluated this checkpoint"}
        return _deliver(job, place, task, replace(base, status="failed", error=cause, ended=now_utc()))
    gone = changed(task, source)
    if gone and gone.status == "vanished":
        gone.error["message"] += note_of(job)
    if gone:
        return _deliver(job, place, task, replace(base, status=gone.status, error=gone.error, ended=now_utc()))
    logger.info("-> %s %s running", printable(os.path.basename(task.checkpoint)), task.evaluator.name)
    base = replace(base, attempts=base.attempts + 1)
    scratch = scratch_of(job, task) if task.merges else None
    ending, base, further = attempt(job, task, place, base, source, scratch)
    if ending.cause is None:
        told = Outcome(**ending.value)
        outcome = replace(
            base, status="finished", metrics=told.metrics, notes=base.notes + told.notes, details=told.details, ended=now_utc()
        )
        return _finish(job, place, task, source, outcome)
    error: dict[str, Any] = {"cause": ending.cause, "message": ending.message, "traceback": ending.traceback}
    if ending.cause in (REFUSED, UNREADABLE):
        # It may have been deleted, or saved again, while it was merged.
        gone = changed(task, source)
        if gone:
            return _deliver(job, place, task, replace(base, status=gone.status, error=gone.error, ended=now_utc()))
        if ending.cause == REFUSED:
            # No attempt changes what a checkpoint holds.
            return _deliver(job, place, task, replace(base, status="failed", error=error, ended=now_utc()))
    if tries_again(job, task, base, error, further):
        logger.warning("<- %s attempt %d ended badly: %s", printable(os.path.basename(task.checkpoint)), base.attempts, ending.message)
        return Retry(max=_AGAIN)
    status = "timeout" if ending.cause == "timeout" else "failed"
    return _deliver(job, place, task, replace(base, status=status, error=error, ended=now_utc()))


def _finish(job: Job, place: Place, task: Task, source: str, outcome: Record) -> dict[str, Any]:
    """Delivers an outcome, unless the weights changed meanwhile; while the run is away (an unmounted file system), it waits in the job."""
    try:
        gone = changed_for_good(task, source)
    except StateError:
        keep(job, outcome=asdict(outcome), runs=0)
        raise
    if outcome.status == "finished" and gone and gone.status == "superseded":
        outcome = replace(outcome, status="superseded", metrics={}, notes=[], error=gone.error)
    return _deliver(job, place, task, outcome)


def _is_overtaken(job: Job, task: Task) -> bool:
    """True when a newer checkpoint of the same watch waits or runs, and only the latest is asked for."""
    connection: Connection = job.connection
    newest = connection.hget(*task.newest) if task.newest else None
    return newest is not None and newest.decode() != job.id


def _deliver(job: Job, place: Place, task: Task, record: Record) -> dict[str, Any]:
    """Writes the record. Where that fails, the outcome waits in the job, and the job's next run delivers it without evaluating again."""
    try:
        # Whoever was faster, on another host, has recorded it.
        present = place.find(task.identity)
        if present and present.settles and present.ended_at >= task.not_before:
            return present.glance()
        place.write(record, is_current(task))
    except OSError as error:
        keep(job, outcome=asdict(record), runs=0)
        raise StateError(f"cannot write {printable(str(place.record))}: {error.strerror}; the outcome is kept and tried again") from None
    keep(job, runs=0)
    shown = " ".join(f"{name}={value:.6g}" for name, value in list(record.metrics.items())[:4] if value is not None)
    detail = shown or (record.error or {}).get("message", "")
    logger.info("<- %s %s %s %s", printable(os.path.basename(record.checkpoint)), record.evaluator["name"], record.status, detail)
    return record.glance()
