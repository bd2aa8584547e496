"""Evaluations that a training loop drives, and never waits for."""

import atexit
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from assayer.client.book import Book
from assayer.client.config import EvalConfig
from assayer.client.connection import EvalClient
from assayer.client.courier import Courier, Patience
from assayer.client.keeping import Keeping
from assayer.client.mailbox import Mailbox, Order, Point
from assayer.client.names import STYLES
from assayer.client.pending import PendingFile
from assayer.errors import UsageError
from assayer.files import short_name
from assayer.protocol import CHECKPOINT_TYPES

__all__ = ["AsyncEvaluation", "is_first_rank"]

logger = logging.getLogger(__name__)

# Seconds that the end of the process may wait for what is to be written down.
AT_EXIT = 1.0


class AsyncEvaluation:
    """Submits a training's checkpoints to an evaluation server, and collects their metrics.

    ``submit`` and ``poll`` touch memory alone: a daemon thread does all talking and all file work, so that a server or a file system that
    hangs, refuses or restarts never delays a step. What fails is tried again, with growing waits of at most a minute. Jobs are remembered
    in ``<output_dir>/evals/pending-<name>`` before they are submitted, and again once their points were taken: a restarted training goes on
    collecting, and logs nothing twice. (A process that is killed within the milliseconds between taking a point and writing that down takes
    it again: twice the same number at the same step, rather than none. One that ends, by an exception too, writes down what it has.)

    A checkpoint is kept from the trainer's rotation from the moment it is submitted until it has been evaluated, whether or not the server
    can be reached: its model files get second names (hard links) below ``evals/.hold``, and the server is told those.

    Args:
        config: ``EvalConfig``, or LMMs-Engine's ``eval_config`` as a dictionary.
        output_dir: the run's directory, in which the trainer saves checkpoints.
        token: the server's; default: the environment's ``ASSAYER_TOKEN``.
        weights: which weights of each checkpoint: ``("regular",)``, or ``("regular", "ema")``, logged as ``eval/...`` and ``eval_ema/...``.
        style: ``slash`` (``eval/<task>/<metric>``), or ``lmms_engine`` (``eval/<task>_<metric>``).
        name: another one for a second evaluation of the same run, which asks for something else.
        timeout: seconds for one request.
        rank: 0 for the one process that talks, in all others nothing happens; default: torch.distributed's where it is initialized, else
            the environment's ``RANK``, asked at each call.
        hold: how many checkpoints are kept so at most; what was not submitted yet gives way to what is newer; 0: none.
        hold_min_free: the part of their file system that must be free, else no further one is kept.
        patience: see ``courier.Patience``.
    """

    def __init__(
        self,
        config: EvalConfig | Mapping[str, Any],
        output_dir: str | os.PathLike[str],
        *,
        token: str | None = None,
        weights: Sequence[str] = ("regular",),
        style: str = "slash",
        name: str = "evaluations",
        timeout: float = 30.0,
        rank: int | None = None,
        hold: int = 8,
        hold_min_free: float = 0.1,
        patience: Patience | None = None,
    ) -> None:
        if style not in STYLES:
            raise UsageError(f"style {style!r} is not known; allowed: {', '.join(STYLES)}")
        wrong = [word for word in weights if word not in CHECKPOINT_TYPES]
        if isinstance(weights, str) or wrong or not weights:
            raise UsageError(f"weights {weights!r} are not known; a list of: {', '.join(CHECKPOINT_TYPES)}")
        if not name or "/" in name or name.endswith(".json") or short_name(name, 40) != name:
            raise UsageError(f"name {name!r} is none for a file; letters and digits will do")
        self.config = config if isinstance(config, EvalConfig) else EvalConfig.of(config)
        self.weights = tuple(dict.fromkeys(weights))
        self._client = EvalClient(self.config.server_url, token, timeout)
        self._output_dir = Path(os.path.abspath(output_dir))
        self._name, self._style, self._rank, self._patience = name, style, rank, patience or Patience()
        # May be changed until the first call that talks.
        self.hold, self._hold_min_free = hold, hold_min_free
        self._mailbox = Mailbox()
        self._thread: threading.Thread | None = None
        # Everything that was ordered has ended, and was handed out.
        self._is_over = False

    def __getstate__(self) -> dict[str, Any]:
        """All but the thread and what is in its hands: a copy, in another process or in this one, has its own."""
        return {name: value for name, value in vars(self).items() if name not in ("_mailbox", "_thread")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _mailbox=Mailbox(), _thread=None)

    @property
    def is_active(self) -> bool:
        """True in the one process that talks."""
        return self._rank == 0 if self._rank is not None else is_first_rank()

    def submit(self, checkpoint: str | os.PathLike[str], step: int, *, is_saved: bool = False) -> None:
        """Has a checkpoint evaluated; returns at once. The same checkpoint a second time, not saved anew, is not evaluated again.

        Args:
            checkpoint: its file or directory, which may still be written.
            step: the step at which its metrics are logged.
            is_saved: it lies there, so that nothing is waited for where it does not any more.
        """
        if not self.is_active:
            return
        try:
            path = os.path.abspath(checkpoint)
        except FileNotFoundError:
            # The working directory is gone; no step fails for it.
            path = os.fspath(checkpoint)
        self._is_over = False
        self._mailbox.order([Order(str(uuid.uuid4()), path, int(step), weights, is_saved) for weights in self.weights])
        self._start()

    def poll(self) -> list[Point]:
        """The points that came since the last call, by step, to be logged; returns at once. Every point is returned once."""
        if not self.is_active:
            return []
        self._start()
        return self._mailbox.take_points()

    def out(self) -> list[str]:
        """What is still out, each in a sentence."""
        return self._mailbox.out()

    def finish(self, timeout: float) -> list[Point]:
        """Waits until all evaluations have ended, at most ``timeout`` seconds, and returns the last points. What is still out then is told
        in a warning, stays at the server, and is collected by the next training of the same ``output_dir``. It ends earlier where all that
        is out was answered with 401 or 403 several times, and once more now: time mends no token and no path that the server does not take.
        """
        if not self.is_active:
            return []
        self._start()
        began = time.monotonic()
        end = began + timeout
        # The end of the time is for remembering what is handed out now.
        is_idle = self._mailbox.wait_idle(end - min(1.0, timeout / 10))
        points = self._mailbox.take_points()
        self._mailbox.wait_written(end)
        out = self.out()
        self._is_over = is_idle and not out
        if out:
            shown = "; ".join(out[:10]) + ("; ..." if len(out) > 10 else "")
            logger.warning("%d evaluations are still out after %.0f s: %s", len(out), time.monotonic() - began, shown)
        elif not is_idle:
            logger.warning("what an earlier training left in %s is not known after %g s", self._file().path, timeout)
        return points

    def close(self, timeout: float = 1.0) -> None:
        """Ends the thread, waiting for it at most so many seconds; what is out stays remembered, and a later call goes on with it."""
        thread, self._thread = self._thread, None
        if thread:
            if _living.get(self._file().path) is self:
                del _living[self._file().path]
            mailbox, self._mailbox = self._mailbox, Mailbox()
            mailbox.close()
            thread.join(timeout)

    @property
    def _asks_for(self) -> tuple[object, ...]:
        # Not where it is asked, nor how often: where a wrong address was mended, what waits goes to the right one.
        return replace(self.config, server_url="", poll_interval=1.0), self.weights, self._style

    def _own_file(self) -> tuple[PendingFile, threading.Thread | None]:
        """The file of this evaluation's name, or one beside it, where another one of this process, which asks for something else, has that:
        in a training that begins them in the same order, each finds its own again. And the thread that leaves that file now, if one does.
        """
        name, number = self._name, 2
        leaving = None
        file = self._file()
        while (before := _living.get(file.path)) is not None and before is not self:
            if before._asks_for == self._asks_for or before._is_over:
                # One that this process had before, and that nobody closed, such as after an exception in a notebook.
                leaving = before._thread
                before.close(0.0)
                # Also where its thread could never be started.
                _living.pop(file.path, None)
                break
            # Jobs of one are not to be sent with what the other asks for, nor taken for its own.
            self._name, number = f"{name}-{number}", number + 1
            file = self._file()
        if number > 2:
            text = "two evaluations of %s are called %r: this one, of %s, is called %r from now on; give it a name of its own (name=...)"
            logger.warning(text, self._output_dir, name, ", ".join(self.config.tasks or ()), self._name)
        return file, leaving

    def _file(self) -> PendingFile:
        return PendingFile(self._output_dir, self._name)

    def _start(self) -> None:
        """Starts the thread, in the process that calls: one that was forked has none."""
        if self._thread is not None and self._thread.is_alive():
            return
        file, leaving = self._own_file()
        _living[file.path] = self
        book = Book(self._mailbox, file, Keeping(file.path, self.hold, self._hold_min_free))
        courier = Courier(self._mailbox, self._client, self.config, book, self._style, self._patience)
        thread = threading.Thread(target=_run_after, args=(leaving, courier, self._patience.lock), name="assayer-client", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            # No room for a thread now: the next call tries again, and no step fails for it.
            logger.warning("evaluations wait: %s", error)
            return
        self._thread = thread


def _run_after(leaving: threading.Thread | None, courier: Courier, patience: float) -> None:
    """What the thread before has in its hands is written down before this one reads it."""
    if leaving:
        leaving.join(patience)
    courier.run()


# Those of this process that were not closed, by their file: also one that nobody refers to any more has evaluations out.
_living: dict[Path, AsyncEvaluation] = {}


def _close_all() -> None:
    """At the end of the process: what was ordered a moment ago is remembered, and what was taken counts as logged."""
    for evaluation in list(_living.values()):
        evaluation.close(AT_EXIT)


atexit.register(_close_all)
# What is in the hands of the parent's thread is not the child's to close; that thread may have held a lock when it was copied.
os.register_at_fork(after_in_child=_living.clear)


def is_first_rank() -> bool:
    """True in the first process of a distributed training, and in the only one of another; nothing is imported for that."""
    torch = sys.modules.get("torch")
    distributed = getattr(torch, "distributed", None)
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return bool(distributed.get_rank() == 0)
    return os.environ.get("RANK", "0") in ("", "0")
