"""One try to evaluate, as every eval job makes it: the checkpoint merged first where that is needed, then the evaluator in a child."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rq.job import Job
from rq.timeouts import JobTimeoutException

from assayer import formats, refs
from assayer.errors import StateError
from assayer.files import alone, printable, private_directory, private_folder
from assayer.plan import host_name, state_directory
from assayer.progress import furthest
from assayer.queues.enqueue import Task
from assayer.record import Place, Record, installed_versions, now_utc
from assayer.worker import child, ranks
from assayer.worker.call import Call, clean_environment
from assayer.worker.merging import NotMerged, merge_for
from assayer.worker.scratch import Scratch
from assayer.worker.shown import shown

__all__ = ["attempt", "count_run", "keep", "make_folder", "only_here", "record_of", "tries_again"]

# Attempts that are not counted, since each got further than the one before it.
FURTHER_MAX = 50
# What decides how a checkpoint is merged; where it changes, what was begun with the other merge is no use.
_MERGED_BY = ("dtype", "hf_config", "tokenizer", "key_map")


@contextlib.contextmanager
def only_here(task: Task) -> Iterator[None]:
    """Lets one worker of this host at a time at one piece of work: a Redis that has lost its data queues again what still runs.

    Whoever waits here finds the other's record.
    """
    folder = private_directory(private_directory(state_directory() / "running") / host_name())
    with alone(folder / task.id) as descriptor:
        child.kept_from_children.append(descriptor)
        yield


def attempt(
    job: Job,
    task: Task,
    place: Place,
    base: Record,
    source: str,
    scratch: Scratch | None,
    adapted: Callable[[Call], Call] = lambda call: call,
) -> tuple[child.Ending, Record, bool]:
    """One try to evaluate, with the checkpoint merged first where that is needed: how it ended, what the record gains by it, and whether it
    got further than the one before it.

    Args:
        job: the job that tries.
        task: what.
        place: where its results lie.
        base: its record so far.
        source: where the weights are read.
        scratch: where they are merged; None: they are not.
        adapted: may change the call before it is made.

    Raises:
        StateError: a disk refuses.
    """
    if scratch is None:
        (ending, further), seconds = _timed(lambda: _call(job, task, place, base, adapted(_the_call(task, place, source, source))))
        return ending, replace(base, seconds={"evaluate": seconds}), further
    began = time.monotonic()
    name = os.path.basename(task.checkpoint)
    heading = f"merge of {printable(name)}, attempt {base.attempts} on {base.host} at {base.started}"
    try:
        with scratch.lend(task.merge_id, name, lambda path: merge_for(task, source, place.log, heading, scratch, path)) as lent:
            path, facts, made = lent
            waited = round(time.monotonic() - began, 3)
            merged = {key: value for key, value in facts.items() if key != "boot"} | {"made_now": made}
            base = replace(base, merged=merged, notes=facts["notes"], seconds={"merge": waited})
            (ending, further), seconds = _timed(lambda: _call(job, task, place, base, adapted(_the_call(task, place, source, str(path)))))
            return ending, replace(base, seconds={"merge": waited, "evaluate": seconds}), further
    except NotMerged as error:
        return error.ending, replace(base, seconds={"merge": round(time.monotonic() - began, 3)}), False
    except OSError as error:
        raise StateError(f"cannot use the scratch directory {printable(str(scratch.root))}: {error.strerror}") from None


def tries_again(job: Job, task: Task, base: Record, error: dict[str, Any], further: bool) -> bool:
    """True when an evaluation that ended badly is to be tried again; then the job keeps what its next attempt needs to know.

    An attempt that got further than the one before it, and can be taken up where it ended, is not counted; up to a bound, since an
    evaluator may save without ever coming further.
    """
    excused = job.meta.get("further", 0)
    spared = further and excused < FURTHER_MAX
    counted = base.attempts - spared
    if counted > task.retries:
        return False
    keep(job, attempts=counted, runs=0, error=error, further=excused + spared)
    return True


def _timed(function: Callable[[], tuple[child.Ending, bool]]) -> tuple[tuple[child.Ending, bool], float]:
    began = time.monotonic()
    return function(), round(time.monotonic() - began, 3)


def _call(job: Job, task: Task, place: Place, base: Record, call: Call) -> tuple[child.Ending, bool]:
    """How the call ended, and whether it got further than the point from which it went on."""
    heading = f"{task.description}, attempt {base.attempts} on {base.host} at {base.started}"
    progress = place.progress(task.identity)
    world_size = _world_size(task)
    point = call.point(world_size)
    with private_folder("reports") as folder:
        reported = replace(call, reports=str(folder / "reports"))
        try:
            with shown(job, progress, folder / "reports"):
                ending = child.run(lambda: _in_child(reported, task.launcher, world_size, point), place.log, task.timeout, heading)
        except JobTimeoutException:
            ending = child.Ending(cause="timeout", message=f"did not end within {task.timeout:g} s")
        except OSError as error:
            raise StateError(f"cannot write {printable(str(place.log))}: {error.strerror}") from None
    return ending, furthest(progress) > (point or 0)


def _the_call(task: Task, place: Place, source: str, path: str) -> Call:
    """The call of a task's evaluator with ``path``, the merged checkpoint, or ``source`` as it lies there."""
    is_sharded = path == source and task.format != "" and formats.all_formats()[task.format].SHARDED
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
        is_ambiguous=task.weights != "regular" and is_sharded,
        merged_by={name: getattr(task.merging, name) for name in _MERGED_BY} if task.merges else {},
    )


def _world_size(task: Task) -> int:
    """With a launcher, one process for each GPU of this worker's slot, or as many as the watch says where there is none."""
    return 1 if task.launcher is None else len(gpus_here()) or task.processes


def gpus_here() -> list[str]:
    return [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]


def _in_child(call: Call, launcher: str | None, processes: int, point: int | None) -> dict[str, Any]:
    clean_environment()
    return ranks.called(call, launcher, processes, point).to_json()


def make_folder(place: Place) -> None:
    """Makes the folder of the results.

    Raises:
        StateError: it cannot be made, or what it belongs in is away.
    """
    try:
        place.make_folder()
    except FileNotFoundError:
        raise StateError(f"{printable(str(place.root))} is not there; waiting for it") from None
    except OSError as error:
        raise StateError(f"cannot make {printable(str(place.folder))}: {error.strerror}; give another place with --results_dir") from None


def count_run(job: Job, progress: Path) -> int:
    """Which run in a row this is that has not come to an orderly end yet, nor got further than the one before; a worker that is lost
    never sets it back."""
    point = furthest(progress)
    runs = 0 if point > job.meta.get("point", 0) else job.meta.get("runs", 0)
    keep(job, runs=runs + 1, point=point)
    return int(job.meta["runs"])


def keep(job: Job, **values: Any) -> None:
    """Keeps these values in the job, for its next run."""
    job.meta.update(values)
    job.save_meta()


def record_of(task: Task, place: Place, job: Job) -> Record:
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
        notes=_fewer_gpus(task),
        attempts=job.meta.get("attempts", 0),
        started=now_utc(),
        host=host_name(),
        gpus=gpus_here(),
        versions=installed_versions(),
        log=str(place.log),
    )


def _fewer_gpus(task: Task) -> list[str]:
    gpus = len(gpus_here())
    return [f"{task.processes} GPUs were asked for, and its worker has {gpus}"] if gpus and gpus < task.processes else []
