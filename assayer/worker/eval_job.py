"""The recipe of one evaluation: check the weights, call the evaluator, check the weights again, record."""

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rq import Retry, get_current_job
from rq.job import Job
from rq.timeouts import JobTimeoutException

from assayer import formats, refs
from assayer.checkpoint import identity, list_path
from assayer.errors import CheckpointError, StateError
from assayer.files import alone, printable, private_directory
from assayer.plan import host_name, state_directory
from assayer.progress import choose_point, furthest
from assayer.progress import remove as remove_progress
from assayer.queues import Connection
from assayer.queues.enqueue import LOST_MAX, Task, is_wanted, note_of, note_served
from assayer.record import Place, Record, hold_folder, installed_versions, now_utc
from assayer.worker import child, hold, ranks
from assayer.worker.call import Call, Outcome, clean_environment, make
from assayer.worker.merging import REFUSED, UNREADABLE, NotMerged, merge_for, scratch_of
from assayer.worker.scratch import Scratch
from assayer.worker.shown import shown

__all__ = ["evaluate"]

logger = logging.getLogger(__name__)

# RQ's own count of retries never decides: an attempt counts only when the evaluator itself ended badly.
_AGAIN = 1_000_000

# Attempts that are not counted, since each got further than the one before it.
FURTHER_MAX = 50
# Seconds that an evaluation's end waits for a checkpoint that is half written or half deleted.
HALF_THERE = 5.0


def evaluate(**arguments: Any) -> Any:
    """The eval job: its record's main fields, or RQ's order to try again. ``arguments`` are those of ``Task``."""
    job = get_current_job()
    assert job is not None
    task = Task.from_json(arguments)
    try:
        with _alone(task):
            value = _evaluate(job, task)
        if not isinstance(value, Retry):
            _put_away(job, task, value["status"])
        return value
    except BaseException:
        # RQ's retries are for lost workers: what raises here, such as a full disk, would raise again at once. The watch tries it later.
        job.retries_left = None
        raise


@contextlib.contextmanager
def _alone(task: Task) -> Iterator[None]:
    """Lets one worker of this host at a time at one piece of work: a Redis that has lost its data queues again what still runs.

    Whoever waits here finds the other's record.
    """
    folder = private_directory(private_directory(state_directory() / "running") / host_name())
    with alone(folder / task.id) as descriptor:
        child.kept_from_children.append(descriptor)
        yield


def _put_away(job: Job, task: Task, status: str) -> None:
    """Releases the hold, and the merge, unless another evaluation needs them; and what would be taken up again, unless it may still be."""
    if status not in ("failed", "timeout"):
        remove_progress(Place.of(task.checkpoint, task.evaluator.name, task.results_dir, task.weights).progress(task.identity))
    held = _hold_of(task)
    if not is_wanted(job.connection, task.hold_id, done=job.id) and held:
        hold.release(held)
    if task.merges:
        is_wanted(job.connection, task.merge_id, done=job.id)
        scratch_of(job, task).release(task.merge_id)


def _hold_of(task: Task) -> hold.Held | None:
    """The hold of these weights: this watch's, or where its results lie elsewhere, what another one holds beside the checkpoint."""
    return hold.find(task.checkpoint, task.identity, task.results_dir) or hold.find(task.checkpoint, task.identity)


def _evaluate(job: Job, task: Task) -> Any:
    place = Place.of(task.checkpoint, task.evaluator.name, task.results_dir, task.weights)
    present = place.find(task.identity)
    if present and present.settles and present.ended_at >= task.not_before:
        return present.glance()
    _make_folder(place)
    held = _hold_of(task)
    if held is None and not os.path.lexists(task.checkpoint):
        # A network file system may remember for a while that a hold was not there; to list its folder makes it ask.
        for folder in (hold_folder(Path(task.checkpoint), task.results_dir), Path(task.checkpoint).parent):
            with contextlib.suppress(OSError):
                os.listdir(folder)
        held = _hold_of(task)
    source = held.path if held and hold.claim(held) else task.checkpoint
    kept = Record(**job.meta.pop("outcome")) if "outcome" in job.meta else None
    if kept and kept.ended_at >= task.not_before:
        return _finish(job, place, task, source, kept)
    note_served(job.connection, task)
    runs = _count_run(job, place.progress(task.identity))
    base = _record(task, place, job)
    if _is_overtaken(job, task):
        return _deliver(
            job, place, task, replace(base, status="skipped", notes=["a newer checkpoint waits (--latest_only)"], ended=now_utc())
        )
    if runs > LOST_MAX:
        cause = {"cause": "workers lost", "message": f"{LOST_MAX} workers in a row were lost while they evaluated this checkpoint"}
        return _deliver(job, place, task, replace(base, status="failed", error=cause, ended=now_utc()))
    gone = _changed(task, source)
    if gone and gone.status == "vanished":
        gone.error["message"] += note_of(job)
    if gone:
        return _deliver(job, place, task, replace(base, status=gone.status, error=gone.error, ended=now_utc()))
    logger.info("-> %s %s running", printable(os.path.basename(task.checkpoint)), task.evaluator.name)
    base = replace(base, attempts=base.attempts + 1)
    scratch = scratch_of(job, task) if task.merges else None
    point = _point(task, place)
    ending, base = _attempt(job, task, place, base, source, scratch, point)
    if ending.cause is None:
        told = Outcome(**ending.value)
        outcome = replace(
            base, status="finished", metrics=told.metrics, notes=base.notes + told.notes, details=told.details, ended=now_utc()
        )
        return _finish(job, place, task, source, outcome)
    error: dict[str, Any] = {"cause": ending.cause, "message": ending.message, "traceback": ending.traceback}
    if ending.cause in (REFUSED, UNREADABLE):
        # It may have been deleted, or saved again, while it was merged.
        gone = _changed(task, source)
        if gone:
            return _deliver(job, place, task, replace(base, status=gone.status, error=gone.error, ended=now_utc()))
        if ending.cause == REFUSED:
            # No attempt changes what a checkpoint holds.
            return _deliver(job, place, task, replace(base, status="failed", error=error, ended=now_utc()))
    # An attempt that got further than the one before it, and can be taken up where it ended, is not counted; up to a bound, since an
    # evaluator may save without ever coming further.
    further = furthest(place.progress(task.identity)) > (point or 0) and job.meta.get("further", 0) < FURTHER_MAX
    counted = base.attempts - further
    if counted <= task.retries:
        _keep(job, attempts=counted, runs=0, error=error, further=job.meta.get("further", 0) + further)
        logger.warning("<- %s attempt %d ended badly: %s", printable(os.path.basename(task.checkpoint)), base.attempts, ending.message)
        return Retry(max=_AGAIN)
    status = "timeout" if ending.cause == "timeout" else "failed"
    return _deliver(job, place, task, replace(base, status=status, error=error, ended=now_utc()))


def _attempt(
    job: Job, task: Task, place: Place, base: Record, source: str, scratch: Scratch | None, point: int | None
) -> tuple[child.Ending, Record]:
    """One try to evaluate, with the checkpoint merged first where that is needed; how it ended, and what the record gains by it."""
    if scratch is None:
        ending, seconds = _timed(lambda: _call(job, task, place, base, source, source, point))
        return ending, replace(base, seconds={"evaluate": seconds})
    began = time.monotonic()
    name = os.path.basename(task.checkpoint)
    heading = f"merge of {printable(name)}, attempt {base.attempts} on {base.host} at {base.started}"
    try:
        with scratch.lend(task.merge_id, name, lambda path: merge_for(task, source, place.log, heading, scratch, path)) as lent:
            path, facts, made = lent
            waited = round(time.monotonic() - began, 3)
            merged = {key: value for key, value in facts.items() if key != "boot"} | {"made_now": made}
            base = replace(base, merged=merged, notes=facts["notes"], seconds={"merge": waited})
            ending, seconds = _timed(lambda: _call(job, task, place, base, source, str(path), point))
            return ending, replace(base, seconds={"merge": waited, "evaluate": seconds})
    except NotMerged as error:
        return error.ending, replace(base, seconds={"merge": round(time.monotonic() - began, 3)})
    except OSError as error:
        raise StateError(f"cannot use the scratch directory {printable(str(scratch.root))}: {error.strerror}") from None


def _timed(function: Callable[[], child.Ending]) -> tuple[child.Ending, float]:
    began = time.monotonic()
    return function(), round(time.monotonic() - began, 3)


def _finish(job: Job, place: Place, task: Task, source: str, outcome: Record) -> dict[str, Any]:
    """Delivers an outcome, unless the weights changed meanwhile; while the run is away (an unmounted file system), it waits in the job."""
    try:
        gone = _changed_for_good(task, source)
    except StateError:
        _keep(job, outcome=asdict(outcome), runs=0)
        raise
    if outcome.status == "finished" and gone and gone.status == "superseded":
        outcome = replace(outcome, status="superseded", metrics={}, notes=[], error=gone.error)
    return _deliver(job, place, task, outcome)


class _Gone:
    """Why the weights that were queued are no longer those at the path."""

    def __init__(self, status: str, message: str, whole: bool = True) -> None:
        self.status = status
        # False while what lies there is half written, or half deleted.
        self.whole = whole
        self.error = {"cause": status, "message": message}


def _is_overtaken(job: Job, task: Task) -> bool:
    """True when a newer checkpoint of the same watch waits or runs, and only the latest is asked for."""
    connection: Connection = job.connection
    newest = connection.hget(*task.newest) if task.newest else None
    return newest is not None and newest.decode() != job.id


def _changed_for_good(task: Task, source: str) -> _Gone | None:
    """As ``_changed``, once what is half there is whole or gone: while a trainer deletes it, a checkpoint looks half written."""
    deadline = time.monotonic() + HALF_THERE
    while True:
        gone = _changed(task, source)
        if gone is None or gone.whole or time.monotonic() > deadline:
            return gone
        time.sleep(0.1)


def _changed(task: Task, source: str) -> _Gone | None:
    """None while the weights at ``source`` (the checkpoint's path, or where it is held) are those that were queued."""
    form = formats.all_formats().get(task.format)
    if form is None:
        raise StateError(f"this worker's assayer knows no checkpoint format {task.format!r}; install the version that the watch runs")
    try:
        listing = list_path(source, form.FOLDERS)
        if not form.claims(listing):
            # What is left of its directory, such as files that a network file system keeps until their last reader is gone.
            return _Gone("vanished", f"the files of {printable(task.checkpoint)} were deleted before it could be evaluated")
        missing = form.missing(listing)
        if missing:
            raise CheckpointError(f"{printable(task.checkpoint)}: {missing}")
        now = identity(listing, form.weights(listing))
    except FileNotFoundError:
        if not os.path.isdir(os.path.dirname(task.checkpoint)) and not (task.results_dir and os.path.isdir(task.root)):
            raise StateError(f"{printable(os.path.dirname(task.checkpoint))} is not there; waiting for it") from None
        if os.path.exists(source):
            # The directory was away for a moment.
            return _changed(task, source)
        return _Gone("vanished", f"{printable(task.checkpoint)} was deleted before it could be evaluated")
    except CheckpointError as error:
        return _Gone("superseded", f"it is being written again ({error})", whole=False)
    except OSError as error:
        raise StateError(f"cannot read {printable(task.checkpoint)}: {error.strerror}") from None
    return None if now == task.identity else _Gone("superseded", "the checkpoint's weights are no longer those that were queued")


def _is_current(task: Task) -> bool:
    """False when the checkpoint's path holds other weights by now than those that were evaluated from a hold."""
    form = formats.all_formats()[task.format]
    try:
        listing = list_path(task.checkpoint, form.FOLDERS)
        return listing.signature() == task.signature or identity(listing, form.weights(listing)) == task.identity
    except FileNotFoundError:
        return True
    except (CheckpointError, OSError):
        # It is being written again.
        return False


def _point(task: Task, place: Place) -> int | None:
    """From where this evaluation goes on."""
    return choose_point(place.progress(task.identity), _the_call(task, place, "", "", "").binding(_world_size(task)), _world_size(task))


def _call(job: Job, task: Task, place: Place, base: Record, source: str, path: str, point: int | None) -> child.Ending:
    heading = f"{task.description}, attempt {base.attempts} on {base.host} at {base.started}"
    with tempfile.TemporaryDirectory(prefix="assayer-reports-") as folder:
        call = _the_call(task, place, source, path, os.path.join(folder, "reports"))
        try:
            with shown(job, place.progress(task.identity), Path(folder, "reports")):
                return child.run(lambda: _in_child(task, call, point), place.log, task.timeout, heading)
        except JobTimeoutException:
            return child.Ending(cause="timeout", message=f"did not end within {task.timeout:g} s")
        except OSError as error:
            raise StateError(f"cannot write {printable(str(place.log))}: {error.strerror}") from None


def _the_call(task: Task, place: Place, source: str, path: str, reports: str) -> Call:
    is_sharded = path == source and formats.all_formats()[task.format].SHARDED
    return Call(
        reference=task.evaluator.reference,
        name=task.evaluator.name,
        arguments=task.evaluator.arguments,
        path=path,
        original_path=task.checkpoint,
        identity=task.identity,
        step=task.step,
        weights=task.weights,
        source=refs.source_digest(task.evaluator.reference),
        output=str(place.output),
        samples=str(place.samples),
        progress=str(place.progress(task.identity)),
        reports=reports,
        is_ambiguous=task.weights != "regular" and is_sharded,
    )


def _world_size(task: Task) -> int:
    """With a launcher, one process for each GPU of this worker's slot, or as many as the watch says where there is none."""
    return 1 if task.launcher is None else len(_gpus()) or task.processes


def _gpus() -> list[str]:
    return [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]


def _in_child(task: Task, call: Call, point: int | None) -> dict[str, Any]:
    """What the evaluator returns, called in the child's own process, or in as many processes below it as are asked for."""
    clean_environment()
    if task.launcher is not None:
        return ranks.launch(call, task.launcher, _world_size(task)).to_json()
    return make(call, point=point).to_json()


def _make_folder(place: Place) -> None:
    try:
        place.make_folder()
    except FileNotFoundError:
        raise StateError(f"{printable(str(place.root))} is not there; waiting for it") from None
    except OSError as error:
        raise StateError(f"cannot make {printable(str(place.folder))}: {error.strerror}; give another place with --results_dir") from None


def _count_run(job: Job, progress: Path) -> int:
    """Which run in a row this is that has not come to an orderly end yet, nor got further than the one before; a worker that is lost
    never sets it back."""
    point = furthest(progress)
    runs = 0 if point > job.meta.get("point", 0) else job.meta.get("runs", 0)
    _keep(job, runs=runs + 1, point=point)
    return int(job.meta["runs"])


def _keep(job: Job, **values: Any) -> None:
    job.meta.update(values)
    job.save_meta()


def _record(task: Task, place: Place, job: Job) -> Record:
    """The record as far as it is known before the evaluation."""
    evaluator = {
        "name": task.evaluator.name,
        "reference": str(task.evaluator.reference),
        "source": refs.source_digest(task.evaluator.reference),
        "arguments": task.evaluator.arguments,
    }
    return Record(
        checkpoint=task.checkpoint,
        format=task.format,
        step=task.step,
        epoch=task.epoch,
        tokens=task.tokens,
        identity=task.identity,
        signature=task.signature,
        weights=task.weights,
        evaluator=evaluator,
        status="",
        attempts=job.meta.get("attempts", 0),
        started=now_utc(),
        host=host_name(),
        gpus=_gpus(),
        versions=installed_versions(),
        log=str(place.log),
    )


def _deliver(job: Job, place: Place, task: Task, record: Record) -> dict[str, Any]:
    """Writes the record. Where that fails, the outcome waits in the job, and the job's next run delivers it without evaluating again."""
    try:
        # Whoever was faster, on another host, has recorded it.
        present = place.find(task.identity)
        if present and present.settles and present.ended_at >= task.not_before:
            return present.glance()
        place.write(record, _is_current(task))
    except OSError as error:
        _keep(job, outcome=asdict(record), runs=0)
        raise StateError(f"cannot write {printable(str(place.record))}: {error.strerror}; the outcome is kept and tried again") from None
    _keep(job, runs=0)
    shown = " ".join(f"{name}={value:.6g}" for name, value in list(record.metrics.items())[:4] if value is not None)
    detail = shown or (record.error or {}).get("message", "")
    logger.info("<- %s %s %s %s", printable(os.path.basename(record.checkpoint)), record.evaluator["name"], record.status, detail)
    return record.glance()
