"""Whether the weights that were queued are still there, under which of their two names, and where they went."""

import contextlib
import os
import time
from pathlib import Path

from assayer import formats
from assayer.checkpoint import identity, list_path
from assayer.errors import CheckpointError, StateError
from assayer.files import printable
from assayer.queues.enqueue import Task
from assayer.record import hold_folder
from assayer.worker import hold

__all__ = ["Gone", "changed", "changed_for_good", "hold_of", "is_current", "source_of"]

# Seconds that an evaluation's end waits for a checkpoint that is half written or half deleted.
HALF_THERE = 5.0


def hold_of(task: Task) -> hold.Held | None:
    """The hold of these weights: this watch's, or where its results lie elsewhere, what another one holds beside the checkpoint."""
    return hold.find(task.checkpoint, task.identity, task.results_dir) or hold.find(task.checkpoint, task.identity)


def source_of(task: Task) -> str:
    """Where the weights are read: at their hold, which is claimed, else at the checkpoint's own path."""
    held = hold_of(task)
    if held is None and not os.path.lexists(task.checkpoint):
        # A network file system may remember for a while that a hold was not there; to list its folder makes it ask.
        for folder in (hold_folder(Path(task.checkpoint), task.results_dir), Path(task.checkpoint).parent):
            with contextlib.suppress(OSError):
                os.listdir(folder)
        held = hold_of(task)
    return held.path if held and hold.claim(held) else task.checkpoint


class Gone:
    """Why the weights that were queued are no longer those at the path."""

    def __init__(self, status: str, message: str, whole: bool = True) -> None:
        self.status = status
        # False while what lies there is half written, or half deleted.
        self.whole = whole
        self.error = {"cause": status, "message": message}


def changed_for_good(task: Task, source: str) -> Gone | None:
    """As ``changed``, once what is half there is whole or gone: while a trainer deletes it, a checkpoint looks half written."""
    deadline = time.monotonic() + HALF_THERE
    while True:
        gone = changed(task, source)
        if gone is None or gone.whole or time.monotonic() > deadline:
            return gone
        time.sleep(0.1)


def changed(task: Task, source: str) -> Gone | None:
    """None while the weights at ``source`` (the checkpoint's path, or where it is held) are those that were queued."""
    form = formats.all_formats().get(task.format)
    if form is None:
        raise StateError(f"this worker's assayer knows no checkpoint format {task.format!r}; install the version that the watch runs")
    try:
        listing = list_path(source, form.FOLDERS)
        if not form.claims(listing):
            # What is left of its directory, such as files that a network file system keeps until their last reader is gone.
            return Gone("vanished", f"the files of {printable(task.checkpoint)} were deleted before it could be evaluated")
        missing = form.missing(listing)
        if missing:
            raise CheckpointError(f"{printable(task.checkpoint)}: {missing}")
        now = identity(listing, form.weights(listing))
    except FileNotFoundError:
        if not os.path.isdir(os.path.dirname(task.checkpoint)) and not (task.results_dir and os.path.isdir(task.root)):
            raise StateError(f"{printable(os.path.dirname(task.checkpoint))} is not there; waiting for it") from None
        if os.path.exists(source):
            # The directory was away for a moment.
            return changed(task, source)
        return Gone("vanished", f"{printable(task.checkpoint)} was deleted before it could be evaluated")
    except CheckpointError as error:
        return Gone("superseded", f"it is being written again ({error})", whole=False)
    except OSError as error:
        raise StateError(f"cannot read {printable(task.checkpoint)}: {error.strerror}") from None
    return None if now == task.identity else Gone("superseded", "the checkpoint's weights are no longer those that were queued")


def is_current(task: Task) -> bool:
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
