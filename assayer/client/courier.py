"""The daemon thread that does all file work, and has all talking done, so that a training never waits for either."""

import json
import logging
import math
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from assayer.client.config import EvalConfig
from assayer.client.connection import EvalClient
from assayer.client.keeping import Keeping
from assayer.client.mailbox import Mailbox, Order, Point
from assayer.client.names import named
from assayer.client.pending import Job, PendingFile, signature_of
from assayer.errors import AssayerError, ServerError
from assayer.files import open_file
from assayer.protocol import JobStatus

__all__ = ["Courier", "Patience"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """How long things are waited for; seconds, but for counts.

    ``first`` and ``most``: before a failed request is made again, doubled each time. ``lock``: for an earlier training to leave the file of
    pending jobs. ``absent``: for a checkpoint that is submitted before anything lies at its path, as by an asynchronous save.
    ``forgotten``: how often a job that the server lost is submitted again. ``unreadable``: how often a results file that is not there (a
    file system that is late) is looked for.
    """

    first: float = 1.0
    most: float = 60.0
    lock: float = 60.0
    absent: float = 120.0
    forgotten: int = 3
    unreadable: int = 10

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
        file: PendingFile,
        keeping: Keeping,
        style: str,
        patience: Patience,
    ) -> None:
        self._mailbox = mailbox
        self._client = client
        self._config = config
        self._file = file
        self._keeping = keeping
        self._style = style
        self._patience = patience
        # All jobs, by key; and their keys by place, and by the path of their checkpoint.
        self._jobs: dict[str, Job] = {}
        self._places: dict[tuple[str, int, str], str] = {}
        self._at: dict[str, set[str]] = {}
        # When a job is next asked for, since when its checkpoint is waited for, and how often it failed in a row; of the server as a whole
        # under "".
        self._due: dict[str, float] = {}
        self._absent: dict[str, float] = {}
        self._failures: dict[str, int] = {}
        self._is_loaded = False
        self._is_dirty = False
        self._logged: set[str] = set()
        self._began = time.monotonic()
        self._said_of_file: set[str] = set()

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
        self._leave()

    def _leave(self) -> None:
        """What is in the mailbox is remembered, in another file where this one is another training's still."""
        try:
            if self._is_loaded or (self._mailbox.has_orders and self._load(is_late=True)):
                self._sort_mail()
                self._save()
        except Exception:
            logger.exception("what is out is not remembered")
        if orders := self._mailbox.take_orders()[0]:
            logger.warning("not submitted, and not remembered: %s", ", ".join(order.checkpoint for order in orders))
        self._file.unlock()

    def _seconds_until_due(self) -> float:
        if not self._is_loaded or self._is_dirty:
            return self._patience.first
        now = time.monotonic()
        due = min((self._due.get(job.key, now) for job in self._jobs.values() if job.is_out), default=now + 3600)
        return max(due, self._due.get("", 0.0)) - now

    def _round(self) -> None:
        if not self._is_loaded and not self._load(time.monotonic() - self._began >= self._patience.lock):
            return
        self._sort_mail()
        self._save()
        for key in [job.key for job in self._jobs.values() if job.is_out]:
            now = time.monotonic()
            if self._mailbox.is_closed or self._due.get("", 0.0) > now:
                return
            job = self._jobs.get(key)
            if job and self._due.get(key, 0.0) <= now:
                try:
                    self._carry(job)
                except Exception:
                    # The others are not to wait for this one's sake.
                    logger.exception("%s (%s) is looked after again in %g s", job.checkpoint, job.weights, self._patience.most)
                    self._due[key] = now + self._patience.most
                self._sort_mail()
                self._save()

    def _load(self, is_late: bool) -> bool:
        """Reads what an earlier training left; False while that one still has the file, or it cannot be read.

        Once it is late for that, a training that goes on in the file is left alone with it, and another file is taken.
        """
        jobs: list[Job] = []
        try:
            if not self._file.try_lock():
                has = f"{self._file.path}: another training has this file of pending evaluations"
                if not is_late or not self._file.beside():
                    self._say_of_file(f"{has}; waiting for it to end")
                    return False
                logger.warning("%s; those of this one are in %s", has, self._file.path.name)
                self._keeping.owner = str(self._file.path)
            jobs = self._file.read()
            self._keeping.take_over(jobs)
        except OSError as error:
            self._say_of_file(f"{self._file.path} cannot be read ({error.strerror}), and with it what an earlier training left")
            if not is_late:
                return False
        for job in jobs:
            self._add(job)
        self._is_loaded = True
        waiting = {job.key: _words(job) for job in jobs if job.is_out}
        self._mailbox.loaded(waiting)
        if waiting:
            logger.info("%d evaluations of an earlier training are still out", len(waiting))
        for job in jobs:
            if job.state == "done":
                self._mailbox.settle(job.key, _point(job))
        return True

    def _add(self, job: Job) -> None:
        self._jobs[job.key] = job
        self._places[job.place] = job.key
        self._at.setdefault(job.checkpoint, set()).add(job.key)

    def _sort_mail(self) -> None:
        """Orders become jobs, points that were handed out are logged."""
        orders, handed = self._mailbox.take_orders()
        for key in handed:
            self._logged.add(key)
            if key in self._jobs:
                # So much as tells that it is known.
                self._put(replace(self._jobs[key], state="logged", metrics={}, job_id=None, sent_as="", path=""))
        self._is_dirty |= bool(handed)
        for order in orders:
            signature = signature_of(order.checkpoint)
            twin = self._jobs.get(self._places.get((order.checkpoint, order.step, order.weights), ""))
            if twin and twin.signature == signature and twin.state != "ended":
                logger.info("%s (%s) is known already, and not evaluated twice", order.checkpoint, order.weights)
                self._mailbox.settle(order.key, None)
                continue
            if twin:
                self._drop(twin)
            self._end_overwritten(order, signature)
            job = Job(order.key, order.checkpoint, order.step, order.weights, signature, sent_as=order.key)
            self._put(job)
            # At once: the next save may delete it.
            self._keeping.keep(job, self._jobs)
            if order.is_saved:
                self._absent[job.key] = -math.inf

    def _drop(self, twin: Job) -> None:
        """The checkpoint was saved anew, by a training that was resumed before it: nobody waits for its earlier weights."""
        del self._jobs[twin.key]
        self._at[twin.checkpoint].discard(twin.key)
        self._is_dirty = True
        if twin.job_id is None:
            # Whoever evaluates it lets go of it at the end, or the next training.
            self._keeping.release(twin.key)
        if twin.is_out:
            logger.info("%s was saved anew: its earlier evaluation (job %s) is not waited for", twin.checkpoint, twin.job_id)
            self._mailbox.settle(twin.key, None)

    def _end_overwritten(self, order: Order, signature: str) -> None:
        """Ends what waits of an earlier step at the same path, such as ``last.ckpt``: the weights there are a later step's by now."""
        for job in [self._jobs[key] for key in self._at.get(order.checkpoint, ())]:
            is_earlier = job.state == "new" and job.step != order.step and job.signature != signature
            if is_earlier and not self._keeping.has_earlier(job):
                note = f"it was overwritten by step {order.step} before it could be submitted"
                logger.warning("%s (%s) of step %d is not evaluated: %s", job.checkpoint, job.weights, job.step, note)
                self._put(replace(job, state="ended", note=note))
                self._mailbox.settle(job.key, None)

    def _put(self, job: Job) -> None:
        self._is_dirty |= self._jobs.get(job.key) != job
        self._add(job)
        if not job.is_out:
            self._keeping.release(job.key)

    def _save(self) -> None:
        """Writes the file, where something has changed. A disk that is full or away is told once; all goes on in memory."""
        if not self._is_dirty:
            return
        try:
            self._file.write(self._jobs.values())
            # Where there was no folder for it before.
            self._file.try_lock()
        except OSError as error:
            self._say_of_file(f"{self._file.path} cannot be written ({error.strerror}); a restarted training would not know of what is out")
            # Nobody is to wait for that.
            self._mailbox.written(self._logged)
            return
        self._is_dirty = False
        self._said_of_file.clear()
        self._mailbox.written(self._logged)
        self._logged = set()

    def _say_of_file(self, words: str) -> None:
        if words not in self._said_of_file:
            logger.warning("%s", words)
            self._said_of_file.add(words)

    def _carry(self, job: Job) -> None:
        """One request for one job."""
        if job.state == "new":
            if not self._is_there(job):
                self._due[job.key] = time.monotonic() + self._config.poll_interval
                self._mailbox.tell(job.key, f"{job.checkpoint} ({job.weights}): nothing is there yet")
                return
            if not job.path:
                # The same in every try, since they are one submission.
                job = replace(job, path=self._keeping.path(job))
                self._put(job)
                self._save()
        try:
            changed = self._submit(job) if job.state == "new" else self._ask(job)
        except ServerError as error:
            if self._jobs.get(job.key) == job:
                self._failed(job, error)
            return
        except _ClosedError:
            return
        if self._jobs.get(job.key) != job:
            # Its checkpoint was saved anew while the server thought about it.
            return
        self._failures.pop("", None)
        self._failures.pop(job.key, None)
        self._due[job.key] = time.monotonic() + (0.0 if changed.state == "new" else self._config.poll_interval)
        self._put(changed)
        if changed.is_out:
            self._mailbox.tell(job.key, _words(changed))
        elif changed.state == "done":
            # Remembered first: a point that is handed out and not known of would be fetched, and logged, again.
            self._save()
            self._mailbox.settle(job.key, _point(changed))
        else:
            logger.warning("%s (%s) has no metrics: %s", job.checkpoint, job.weights, changed.note)
            self._mailbox.settle(job.key, None)

    def _is_there(self, job: Job) -> bool:
        """True when a checkpoint can be submitted: it is kept, with what has come since the last try, or lies where it was saved; or has
        been waited for long enough, so that the server may say what is wrong."""
        if self._keeping.keep(job, self._jobs) or job.path or _is_anything(job.checkpoint):
            return True
        return time.monotonic() - self._absent.setdefault(job.key, time.monotonic()) >= self._patience.absent

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
            self._sort_mail()
            self._save()
        if isinstance(answers[0], Exception):
            raise answers[0]
        return answers[0]

    def _failed(self, job: Job, error: ServerError) -> None:
        """Nobody answers: all wait. This request alone is not answered well: it waits. It is refused for what it says: it has ended."""
        if error.status == 422 and job.state == "new" and "Idempotency-Key was used" in str(error):
            # An earlier training has submitted this under another configuration, and did not learn of it.
            self._put(replace(job, sent_as=str(uuid.uuid4())))
            return
        if error.status in (400, 413, 422) and job.state == "new":
            logger.error("%s (%s) is not evaluated: %s", job.checkpoint, job.weights, error)
            self._put(replace(job, state="ended", note=str(error)))
            self._mailbox.settle(job.key, None)
            return
        key = "" if error.status is None else job.key
        if key:
            self._failures.pop("", None)
        count = self._failures[key] = self._failures.get(key, 0) + 1
        wait = self._patience.after(count)
        self._due[key] = time.monotonic() + wait
        if count & (count - 1) == 0:
            # The first time, and then ever more rarely.
            logger.warning("%s; tried again in %.0f s (%d so far)", error, wait, count)
        self._mailbox.tell(job.key, f"{_words(job)} ({error})")

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


def _point(job: Job) -> Point:
    return Point(job.step, dict(job.metrics), job.checkpoint, job.weights, job.key)


def _words(job: Job) -> str:
    return f"{job.checkpoint} ({job.weights}): " + (f"job {job.job_id} is out" if job.job_id else "not submitted yet")


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
