"""The eval job of a client's request: the recipe of a watched checkpoint's, with an answer for whoever asked."""

import contextlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import redis
from rq import Retry, get_current_job
from rq.job import Job

from assayer import kept
from assayer.errors import StateError
from assayer.files import printable, write_json
from assayer.merge.output import part_folder
from assayer.progress import remove as remove_progress
from assayer.queues.enqueue import LOST_MAX, is_wanted, note_of, note_served
from assayer.queues.served import Served, ServedJobs, answer, is_cancelled, note_undelivered
from assayer.record import Place, Record, now_utc, read
from assayer.refs import PACKAGE_PARENT, Reference
from assayer.worker import child, hold
from assayer.worker.answer import ANSWER
from assayer.worker.attempt import attempt, count_run, keep, make_folder, only_here, record_of, tries_again
from assayer.worker.call import Call, Outcome
from assayer.worker.merging import REFUSED, UNREADABLE, NotMerged, scratch_of
from assayer.worker.weights import changed, changed_for_good, hold_of, source_of

__all__ = ["cancel", "evaluate", "place_of"]

logger = logging.getLogger(__name__)

_AGAIN = 1_000_000
# Seconds between two looks whether the job was cancelled.
_LOOK = 1.0
# What every served evaluation is called through.
_WRAPPER = Reference("assayer.worker.answer", "evaluate", PACKAGE_PARENT)


def evaluate(**arguments: Any) -> Any:
    """The served job: its record's main fields, or RQ's order to try again. ``arguments`` are those of ``Served``."""
    job = get_current_job()
    assert job is not None
    task = Served.from_json(arguments)
    try:
        with only_here(task):
            value = _evaluate(job, task)
        if not isinstance(value, Retry):
            _put_away(job, task)
        return value
    except BaseException:
        # RQ's retries are for lost workers: what raises here, such as a full disk, would raise again at once.
        job.retries_left = None
        raise


def place_of(task: Served) -> Place:
    """Where the record of a served job lies, and its other files."""
    return Place.of_job(task.job, task.evaluator.name, task.checkpoint or None, task.results_dir, task.weights)


def cancel(jobs: ServedJobs, job_id: str, force: bool) -> str:
    """``cancelled``: it waited, and is taken off the queue and recorded; ``running``: it runs (with ``force`` it is told to end);
    ``ended``; ``missing``."""
    told = jobs.cancel(job_id, force, {"status": "cancelled", "completed_at": now_utc()})
    if told == "cancelled":
        (job,) = Job.fetch_many([job_id], connection=jobs.connection, serializer=jobs.queue.serializer)
        try:
            if job is not None:
                _put_down(job, Served.from_json(job.kwargs))
        except StateError as error:
            # It is cancelled all the same; what is missing is its record.
            logger.warning("%s", error)
    return told


def _put_down(job: Job, task: Served) -> None:
    """Writes the record of a job that was cancelled while it waited, and lets go of what was held for it.

    Raises:
        StateError: the record cannot be written.
    """
    place = place_of(task)
    base = record_of(task, place, job)
    make_folder(place)
    try:
        write_json(place.record, replace(base, status="cancelled", ended=now_utc(), details=_details(task)).to_json())
    except OSError as error:
        raise StateError(f"cannot write {printable(str(place.record))}: {error.strerror}") from None
    finally:
        _put_away(job, task)


def _details(task: Served) -> dict[str, Any]:
    return {"job": task.job, "request": task.request}


def _evaluate(job: Job, task: Served) -> Any:
    place = place_of(task)
    kept = Record(**job.meta["outcome"]) if "outcome" in job.meta else read(place.record)
    if kept is not None and kept.details.get("job") == task.job:
        # Its worker was lost between the record and the answer, or could not write it.
        return _deliver(job, place, task, kept)
    make_folder(place)
    note_served(job.connection, task)
    runs = count_run(job, place.progress(task.identity))
    base = replace(record_of(task, place, job), details=_details(task))
    if is_cancelled(job):
        return _deliver(job, place, task, replace(base, status="cancelled", ended=now_utc()))
    if runs > LOST_MAX:
        cause = {"cause": "workers lost", "message": f"{LOST_MAX} workers in a row were lost while they evaluated this request"}
        return _deliver(job, place, task, replace(base, status="failed", error=cause, ended=now_utc()))
    source = _source(task)
    gone = changed(task, source) if task.identity else None
    if gone and gone.status == "vanished":
        gone.error["message"] += note_of(job)
    if gone:
        return _deliver(job, place, task, replace(base, status=gone.status, error=gone.error, ended=now_utc()))
    logger.info("-> %s running", printable(task.description))
    base = replace(base, attempts=base.attempts + 1)
    return _tried(job, place, task, base, source)


def _source(task: Served) -> str:
    """Where the checkpoint is read: where the training keeps it, or at a hold, or at its own path."""
    if task.kept is not None and os.path.lexists(task.kept):
        return task.kept
    return source_of(task) if task.identity else task.checkpoint


def _tried(job: Job, place: Place, task: Served, base: Record, source: str) -> Any:
    scratch = scratch_of(job, task) if task.merges else None
    with _ended_when_cancelled(job) as cancelled:
        ending, base, further = attempt(job, task, place, base, source, scratch, _adapted(job, task))
    if ending.cause is None:
        told = Outcome(**ending.value)
        details = {**base.details, **told.details}
        note = [details.pop("note")] if "note" in details else []
        outcome = replace(base, status="finished", metrics=told.metrics, notes=[*base.notes, *told.notes, *note], details=details)
        return _finished(job, place, task, source, replace(outcome, ended=now_utc()))
    if cancelled():
        return _deliver(job, place, task, replace(base, status="cancelled", ended=now_utc()))
    error: dict[str, Any] = {"cause": ending.cause, "message": ending.message, "traceback": ending.traceback}
    if ending.cause in (REFUSED, UNREADABLE) and task.identity:
        gone = changed(task, source)
        if gone:
            return _deliver(job, place, task, replace(base, status=gone.status, error=gone.error, ended=now_utc()))
    if ending.cause != REFUSED and tries_again(job, task, base, error, further):
        logger.warning("<- %s attempt %d ended badly: %s", printable(task.description), base.attempts, ending.message)
        return Retry(max=_AGAIN)
    status = "timeout" if ending.cause == "timeout" else "failed"
    return _deliver(job, place, task, replace(base, status=status, error=error, ended=now_utc()))


def _finished(job: Job, place: Place, task: Served, source: str, outcome: Record) -> Any:
    """Delivers an outcome, unless the weights changed while they were evaluated."""
    gone = None
    with contextlib.suppress(StateError):
        # Where its directory is away, the record cannot be written either, and is kept.
        gone = changed_for_good(task, source) if task.identity else None
    if gone and gone.status == "superseded":
        details = {key: value for key, value in outcome.details.items() if key != ANSWER}
        outcome = replace(outcome, status="superseded", metrics={}, notes=[], error=gone.error, details=details)
    return _deliver(job, place, task, outcome)


def _adapted(job: Job, task: Served) -> Callable[[Call], Call]:
    """Changes an evaluator's call into that of the wrapper, which knows what was asked for."""

    def adapt(call: Call) -> Call:
        path = call.path or None
        if path is not None and task.merged_to is not None and task.merges:
            path = _placed(job, path, task.merged_to)
        arguments = {
            "kind": task.kind,
            "request": task.request,
            "reference": asdict(task.evaluator.reference),
            "arguments": task.evaluator.arguments,
            "name": os.path.basename(task.checkpoint) or task.evaluator.name,
            "output": task.output_dir,
            # The same in every attempt: what was begun is taken up by the same arguments alone.
            "label": f"{job.created_at:%Y%m%d_%H%M%S}_{task.job[:8]}",
        }
        return replace(call, reference=_WRAPPER, arguments=arguments, path=path, original_path=task.checkpoint or None)

    return adapt


def _placed(job: Job, merged: str, target: str) -> str:
    """The merged checkpoint under the path that the client has asked for; in second names, where that is possible.

    That this job places it there is noted before it is done, so that an attempt whose worker was lost is no stranger's.

    Raises:
        NotMerged: something lies there, or it cannot be written.
    """
    if os.path.lexists(target):
        if job.meta.get("placed") == target:
            return target
        raise _refused(f"{printable(target)} is there already; remove it, or give another output_path")
    try:
        with part_folder(Path(target)) as part:
            shutil.copytree(merged, part, copy_function=_second_name, dirs_exist_ok=True)
            keep(job, placed=target)
    except (OSError, StateError) as error:
        raise _refused(f"{printable(target)} cannot be written: {error}") from None
    return target


def _refused(text: str) -> NotMerged:
    return NotMerged(child.Ending(cause=REFUSED, message=text))


def _second_name(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextlib.contextmanager
def _ended_when_cancelled(job: Job) -> Iterator[Callable[[], bool]]:
    """While it lasts, an order to end this job ends its child; yields whether there was one."""
    over, seen = threading.Event(), threading.Event()

    def look() -> None:
        while not over.wait(_LOOK):
            with contextlib.suppress(redis.RedisError):
                if is_cancelled(job):
                    seen.set()
                    # Again and again: between a merge and an evaluation there is none for a moment.
                    child.stop()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen.is_set
    finally:
        over.set()
        thread.join()


def _deliver(job: Job, place: Place, task: Served, record: Record) -> dict[str, Any]:
    """Writes the record and the answer. Where the record cannot be written, the outcome waits in the job, and a server has it tried again;
    whoever asked has the answer."""
    try:
        make_folder(place)
        write_json(place.record, record.to_json())
    except (OSError, StateError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        text = f"cannot write {printable(str(place.record))}: {reason}"
        keep(job, outcome=asdict(record), runs=0)
        note_undelivered(job, True)
        answer(job, _answer(record))
        raise StateError(f"{text}; the outcome is kept and tried again") from None
    keep(job, runs=0)
    note_undelivered(job, False)
    answer(job, _answer(record))
    logger.info("<- %s %s", printable(task.description), record.status)
    return record.glance()


def _answer(record: Record) -> dict[str, Any]:
    told = record.details.get(ANSWER) or {}
    status = {"finished": "completed", "cancelled": "cancelled"}.get(record.status, "failed")
    return {
        "status": status,
        "result": told.get("result"),
        "metrics": told.get("metrics"),
        "error": None if status != "failed" else (record.error or {}).get("message") or record.status,
        "started_at": record.started,
        "completed_at": record.ended,
    }


def _put_away(job: Job, task: Served) -> None:
    """Releases the hold, and the merge, unless another evaluation needs them; what a training kept for this job; and what would be taken up
    again."""
    remove_progress(place_of(task).progress(task.identity))
    second = kept.at(task.kept) if task.kept is not None else None
    if second is not None and not is_wanted(job.connection, second.path, done=job.id):
        second.release()
    if task.identity:
        held = hold_of(task)
        if not is_wanted(job.connection, task.hold_id, done=job.id) and held:
            hold.release(held)
        ServedJobs(job.connection, job.origin).forget_hold(task.hold_id)
    if task.merges:
        is_wanted(job.connection, task.merge_id, done=job.id)
        scratch_of(job, task).release(task.merge_id)
