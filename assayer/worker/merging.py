"""A sharded checkpoint on its way to the evaluator: merged into the scratch directory, in a process of its own."""

import contextlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rq.job import Job

from assayer import refs
from assayer.checkpoint import Checkpoint
from assayer.errors import AssayerError, StateError, UnreadableError
from assayer.files import printable
from assayer.merge.hf import companions
from assayer.merge.run import Options, find_checkpoint, run
from assayer.queues.enqueue import Task, is_wanted
from assayer.worker import child
from assayer.worker.scratch import Scratch

__all__ = ["REFUSED", "UNREADABLE", "NotMerged", "merge_for", "scratch_of"]

# The causes of an evaluation that did not begin: what the checkpoint holds cannot be merged; or it could not be read this time.
REFUSED, UNREADABLE = "merge", "read"


class NotMerged(Exception):
    """The checkpoint was not merged; ``ending`` says why."""

    def __init__(self, ending: child.Ending) -> None:
        super().__init__(ending.message)
        self.ending = ending


class _NoRoom(Exception):
    """Other merges, which are read, take the budget."""


def scratch_of(job: Job, task: Task) -> Scratch:
    """Where this job's merge lies."""
    return Scratch(task.merging.scratch_dir, task.merging.scratch_bytes, lambda merge_id: is_wanted(job.connection, merge_id))


def merge_for(task: Task, source: str, log: Path, heading: str, scratch: Scratch, path: Path) -> dict[str, Any]:
    """Merges what lies at ``source`` in a child process, as an evaluator runs in one: what it imports, takes or breaks is gone with it.

    Waiting for room that other merges take counts neither against the time limit nor as an attempt.

    Raises:
        NotMerged: it cannot be merged, or not this time.
        StateError: the scratch directory or the log cannot be written.
    """
    while True:
        try:
            ending = child.run(lambda: _in_child(task, source, scratch, path), log, task.timeout, heading)
        except OSError as error:
            raise StateError(f"cannot write {printable(str(log))}: {error.strerror}") from None
        told = ending.value
        if ending.cause is not None:
            raise NotMerged(child.Ending(None, ending.cause, f"while it was merged: {ending.message}", ending.traceback))
        if "room" not in told:
            break
        scratch.wait_for_room(task.merge_id, told["room"])
    if "away" in told:
        raise StateError(told["away"])
    for cause in (REFUSED, UNREADABLE):
        if cause in told:
            raise NotMerged(child.Ending(cause=cause, message=told[cause]))
    facts: dict[str, Any] = told
    return facts


def _in_child(task: Task, source: str, scratch: Scratch, path: Path) -> dict[str, Any]:
    how = task.merging
    can_check = find_spec("transformers") is not None and find_spec("torch") is not None
    options = Options(
        checkpoint_type=task.weights,
        dtype=how.dtype,
        hf_config=how.hf_config,
        tokenizer=how.tokenizer,
        key_map=how.key_map,
        check_model=can_check,
        original=task.checkpoint,
    )
    wanted = 0

    def reserve(nbytes: int) -> None:
        nonlocal wanted
        wanted = nbytes
        if not scratch.reserve(task.merge_id, nbytes):
            raise _NoRoom

    # A training run on this machine goes first.
    os.nice(5)
    try:
        found = find_checkpoint(Path(source))
        _check_files(task, found.checkpoint)
        done = run(found, path, options, reserve=reserve, flush=False)
    except _NoRoom:
        return {"room": wanted}
    except AssayerError as error:
        print(error, file=sys.stderr)
        kind = "away" if isinstance(error, StateError) else UNREADABLE if isinstance(error, UnreadableError) else REFUSED
        return {kind: str(error)}
    notes = done.notes if can_check else [*done.notes, "not checked against a model: transformers is not installed"]
    return {"from": done.format, "bytes": done.weights, "tensors": done.tensors, "seconds": round(done.seconds, 3), "notes": notes}


def _check_files(task: Task, checkpoint: Checkpoint) -> None:
    """Asks a built-in evaluator, before any weights are read, whether it has all that it needs beside them.

    Raises:
        EvaluatorError: a tokenizer, or the like, is missing.
    """
    module = refs.builtin_module(task.evaluator.reference)
    if module is not None:
        around = companions(checkpoint, task.merging.hf_config, task.merging.tokenizer, task.checkpoint)
        # Relative paths in its arguments mean what they meant where the command was given, as they will when it evaluates.
        with contextlib.suppress(OSError):
            os.chdir(task.evaluator.reference.cwd)
        module.check_files(around.files, task.evaluator.arguments)
