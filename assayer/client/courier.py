"""The daemon thread that does all file work, and has all talking done, so that a training never waits for either."""

import json
import logging
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from assayer.checkpoint import Listing
from assayer.client.book import Book, point_of, words_of
from assayer.client.config import EvalConfig
from assayer.client.connection import EvalClient
from assayer.client.mailbox import Mailbox
from assayer.client.names import named
from assayer.client.pending import Job, signature_of
from assayer.errors import AssayerError, ServerError
from assayer.files import open_file, printable
from assayer.kept import is_checkpoint
from assayer.protocol import JobStatus

__all__ = ["Courier", "Patience"]

logger = logging.getLogger(__name__)

# Of a folder without a file, as some savers make beforehand, and then rename the whole checkpoint to its place.
_EMPTY = Listing("", True, ()).signature()


@dataclass(frozen=True)
class Patience:
    """How long things are waited for; seconds, but for counts.

    ``first`` and ``most``: before a failed request is made again, doubled each time. ``lock``: for an earlier training to leave the file of
    pending jobs. ``absent``: for a checkpoint that is submitted before anything lies at its path, as by an asynchronous save; ``quiet``:
    for one of a format that nobody knows to change no more. ``forgotten``: how often a job that the server lost is submitted again.
    ``unreadable``: how often a results file that is not there (a file system that is late) is looked for.
    ``denied``: after how many answers of 401 or 403 in a row the training's end does not wait for a job.
    """

    first: float = 1.0
    most: float = 60.0
    lock: float = 60.0
    absent: float = 120.0
    quiet: float = 5.0
    forgotten: int = 3
    unreadable: int = 10
    denied: int = 5

    def after(self, failures: int) -> float:
        """The wait after so many failures in a row, a little by chance, so that many trainings do not come at one time."""
        return min(self.most, self.first * 2.0 ** min(failures - 1, 30)) * random.uniform(0.75, 1.0)


class _ClosedError(Exception):
    """The mailbox was closed while an answer was waited for."""


class Courier:
    """Carries orders to the server and points back; ``run`` is the thread's function."""

    def __init__(
        self,
        mailbox: Mailbox,
        client: EvalClient,
        config: EvalConfig,
        book: Book,
        style: str,
        patience: Patience,
    ) -> None:
        self._mailbox = mailbox
        self._client = client
        self._config = config
        self._book = book
        self._style = style
        self._patience = patience
        # When a job is next asked for, since when its checkpoint is waited for, and how often it failed in a row; of the server as a whole
        # under "".
        self._due: dict[str, float] = {}
        self._absent: dict[str, float] = {}
        self._seen: dict[str, tuple[str, float]] = {}
        self._failures: dict[str, int] = {}
        # How often a job was answered with 401 or 403 in a row.
        self._denials: dict[str, int] = {}
        self._began = time.monotonic()

    def run(self) -> None:
        """Until the mailbox is closed: carries what there is, then waits until something is due, or the mailbox wakes it."""
        while True:
            # Cleared before it is looked at: a call to wake between the two is heeded.
            self._mailbox.wake.clear()
            if self._mailbox.is_closed:
                break
            try:
                self._round()
            except Exception:
                # Whatever it is, later evaluations are still to be carried.
                logger.exception("the evaluations are looked after again in %g s", self._patience.most)
                self._due[""] = time.monotonic() + self._patience.most
            self._mailbox.wake.wait(self._seconds_until_due())
        self._book.close()

    def _seconds_until_due(self) -> float:
        if not self._book.is_loaded or self._book.is_dirty:
            return self._patience.first
        now = time.monotonic()
        due = min((self._due.get(job.key, now) for job in self._book.out()), default=now + 3600)
        return max(due, self._due.get("", 0.0)) - now

    def _round(self) -> None:
        if not self._book.is_loaded and not self._book.load(time.monotonic() - self._began >= self._patience.lock):
            return
        self._book.sort_mail()
        self._book.save()
        for key in [job.key for job in self._book.out()]:
            now = time.monotonic()
            if self._mailbox.is_closed or self._due.get("", 0.0) > now:
                return
            job = self._book.get(key)
            if job and self._due.get(key, 0.0) <= now:
                try:
                    self._carry(job)
                except Exception:
                    # The others are not to wait for this one's sake.
                    logger.exception("%s (%s) is looked after again in %g s", job.checkpoint, job.weights, self._patience.most)
                    self._due[key] = now + self._patience.most
                self._book.sort_mail()
                self._book.save()

    def _carry(self, job: Job) -> None:
        """One request for one job."""
        if job.state == "new":
            if not self._is_there(job):
                self._due[job.key] = time.monotonic() + self._config.poll_interval
                self._mailbox.tell(job.key, f"{job.checkpoint} ({job.weights}): nothing is there yet")
                return
            job = self._book.named(job)
        try:
            changed = self._submit(job) if job.state == "new" else self._ask(job)
        except ServerError as error:
            if self._book.get(job.key) == job:
                self._failed(job, error)
            return
        except _ClosedError:
            return
        if self._book.get(job.key) != job:
            # Its checkpoint was saved anew while the server thought about it.
            return
        self._failures.pop("", None)
        self._failures.pop(job.key, None)
        self._denials.pop(job.key, None)
        self._due[job.key] = time.monotonic() + (0.0 if changed.state == "new" else self._config.poll_interval)
        self._book.put(changed)
        if changed.is_out:
            self._mailbox.tell(job.key, words_of(changed))
        elif changed.state == "done":
            # Remembered first: a point that is handed out and not known of would be fetched, and logged, again.
            self._book.save()
            self._mailbox.settle(job.key, point_of(changed))
        else:
            logger.warning("%s (%s) has no metrics: %s", job.checkpoint, job.weights, changed.note)
            self._mailbox.settle(job.key, None)

    def _is_there(self, job: Job) -> bool:
        """True when a checkpoint can be submitted: it is kept, with what has come since the last try, or lies where it was saved; or has
        been waited for long enough, so that the server may say what is wrong."""
        if self._book.keep(job) or job.path or job.key in self._book.saved or is_checkpoint(job.checkpoint):
            return True
        now = time.monotonic()
        patience = self._patience.absent
        was_there = job.signature not in ("", _EMPTY)
        if was_there and not os.path.lexists(job.checkpoint) and os.path.isdir(os.path.dirname(job.checkpoint)):
            # What was there when it was ordered was deleted, and is not waited for as one that is still to be written.
            patience = min(self._patience.quiet, patience)
        if now - self._absent.setdefault(job.key, now) >= patience:
            return True
        # What no format knows is there once nothing of it changes any more.
        last, since = self._seen.get(job.key, ("", now))
        signature = signature_of(job.checkpoint) if _is_anything(job.checkpoint) else ""
        self._seen[job.key] = (signature, since if signature == last else now)
        return bool(signature) and signature == last and now - since >= self._patience.quiet

    def _talk(self, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The answer to a request, which is made in a thread of its own: while it hangs, new orders are remembered all the same.

        Raises:
            ServerError: the request came to nothing.
            _ClosedError: the training ended meanwhile.
        """
        answers: list[dict[str, Any] | Exception] = []

        def ask() -> None:
            try:
                answers.append(call())
            except Exception as error:
                answers.append(error)
            self._mailbox.wake.set()

        threading.Thread(target=ask, name="assayer-request", daemon=True).start()
        # The client's own time-out counts what it reads; this one counts, too, where a server sends a header's letter now and then.
        deadline = time.monotonic() + 2 * (self._client.timeout or 60.0)
        while not answers:
            if time.monotonic() >= deadline:
                raise ServerError(f"{self._client.base_url}: no answer in time")
            self._mailbox.wake.wait(max(0.0, deadline - time.monotonic()))
            self._mailbox.wake.clear()
            if self._mailbox.is_closed:
                raise _ClosedError
            self._book.sort_mail()
            self._book.save()
        if isinstance(answers[0], Exception):
            raise answers[0]
        return answers[0]

    def _failed(self, job: Job, error: ServerError) -> None:
        """Nobody answers: all wait. This request alone is not answered well: it waits. It is refused for what it says: it has ended."""
        if error.status == 422 and job.state == "new" and "Idempotency-Key was used" in str(error):
            # An earlier training has submitted this under another configuration, and did not learn of it.
            self._book.put(replace(job, sent_as=str(uuid.uuid4())))
            return
        is_for_the_name = error.status in (403, 422) and job.state == "new" and printable(job.path) in str(error)
        if is_for_the_name and job.path != job.checkpoint and _is_anything(job.checkpoint):
            # The second name may lie where the server does not look; while the first is there, it is asked for that one.
            logger.info("%s is not taken under its second name: %s", job.checkpoint, error)
            self._book.put(replace(job, path=job.checkpoint, sent_as=str(uuid.uuid4())))
            return
        if error.status in (400, 413, 422) and job.state == "new":
            logger.error("%s (%s) is not evaluated: %s", job.checkpoint, job.weights, error)
            self._book.put(replace(job, state="ended", note=str(error)))
            self._mailbox.settle(job.key, None)
            return
        key = "" if error.status is None else job.key
        if key:
            self._failures.pop("", None)
            self._denials[key] = self._denials.get(key, 0) + 1 if error.status in (401, 403) else 0
        count = self._failures[key] = self._failures.get(key, 0) + 1
        wait = self._patience.after(count)
        self._due[key] = time.monotonic() + wait
        if count & (count - 1) == 0:
            # The first time, and then ever more rarely.
            logger.warning("%s; tried again in %.0f s (%d so far)", error, wait, count)
        self._mailbox.tell(job.key, f"{words_of(job)} ({error})", is_denied=bool(key) and self._denials[key] >= self._patience.denied)

    def _submit(self, job: Job) -> Job:
        body = self._config.request(job.path, job.weights)
        answer = self._talk(lambda: self._client.post_evaluate(body, job.sent_as))
        job_id = answer.get("job_id")
        if not isinstance(job_id, str):
            raise ServerError(f"{self._client.base_url} answered a submission without a job_id", 502)
        logger.info(
            "-> %s (%s) step %d: job %s, position %s", job.checkpoint, job.weights, job.step, job_id, answer.get("position_in_queue")
        )
        return replace(job, state="submitted", job_id=job_id)

    def _ask(self, job: Job) -> Job:
        try:
            answer = self._talk(lambda: self._client.get_job(job.job_id or ""))
        except ServerError as error:
            if error.status == 404 and "not found" in str(error):
                return self._forgotten(job)
            raise
        status = answer.get("status")
        if status in (JobStatus.QUEUED, JobStatus.RUNNING):
            return job
        if status == JobStatus.COMPLETED:
            return self._completed(job, answer)
        if status in (JobStatus.FAILED, JobStatus.CANCELLED):
            reason = answer.get("error")
            return replace(job, state="ended", note=f"job {job.job_id} {status}" + (f": {reason}" if reason else ""))
        raise ServerError(f"{self._client.base_url} gives job {job.job_id} the unknown status {status!r}", 502)

    def _forgotten(self, job: Job) -> Job:
        """A server that lost its jobs gets this one again, under a new key; not for ever."""
        if job.forgotten >= self._patience.forgotten:
            return replace(job, state="ended", note=f"the server does not know job {job.job_id}, and lost it {job.forgotten} times before")
        logger.warning("the server does not know job %s of %s any more: submitted again", job.job_id, job.checkpoint)
        return replace(job, state="new", job_id=None, sent_as=str(uuid.uuid4()), path="", forgotten=job.forgotten + 1)

    def _completed(self, job: Job, answer: Mapping[str, Any]) -> Job:
        numbers = answer.get("metrics")
        if not isinstance(numbers, Mapping):
            try:
                numbers = read_results(answer.get("result") or {})
            except (OSError, AssayerError) as error:
                return self._unreadable(job, error)
        metrics = named(numbers, self._style, job.weights)
        if not metrics:
            return replace(job, state="ended", note=f"job {job.job_id} completed without a finite number")
        shown = ", ".join(f"{name}={value:.6g}" for name, value in list(metrics.items())[:5])
        logger.info("<- %s (%s) step %d: %s", job.checkpoint, job.weights, job.step, shown)
        return replace(job, state="done", metrics=metrics)

    def _unreadable(self, job: Job, error: Exception) -> Job:
        key = f"results of {job.key}"
        self._failures[key] = self._failures.get(key, 0) + 1
        if self._failures[key] < self._patience.unreadable:
            return job
        return replace(job, state="ended", note=f"job {job.job_id} completed, but its results cannot be read: {error}")


def _is_anything(path: str) -> bool:
    """True for a file, and for a directory with anything in it."""
    try:
        return bool(os.listdir(path))
    except NotADirectoryError:
        return True
    except (OSError, ValueError):
        return False


def read_results(result: Mapping[str, Any]) -> dict[str, Any]:
    """``{task: {"<metric>,<filter>": value}}`` from the results files that a job names: upstream's server gives no more than their paths.

    Raises:
        OSError: a file is not there, or cannot be read.
        AssayerError: it names no file, or one that is no results file.
    """
    found: dict[str, Any] = {}
    for files in result.values():
        path = files.get("results") if isinstance(files, Mapping) else None
        if isinstance(path, str):
            with open_file(Path(path)) as file:
                try:
                    found |= json.load(file)["results"]
                except (ValueError, KeyError, TypeError, RecursionError):
                    raise AssayerError(f"{path} is no results file") from None
    if not found:
        raise AssayerError("it names no results file")
    return found
