"""What the server does with Redis and with files, away from its event loop: takes jobs in, tells of them, cancels them."""

import asyncio
import logging
import uuid
from pathlib import Path
from typing import Any

from assayer import formats, second_names
from assayer.checkpoint import Found
from assayer.errors import ProtocolError
from assayer.files import printable
from assayer.protocol import EvaluateRequest, JobInfo, JobStatus, JobSubmitResponse, QueueStatusResponse, dump
from assayer.queues import Connection
from assayer.queues.connect import connect, connect_async
from assayer.queues.enqueue import is_wanted
from assayer.queues.served import Facts, Served, ServedJobs
from assayer.record import hold_folder
from assayer.server.models import Models
from assayer.server.order import Rules, order
from assayer.server.watches import hurry
from assayer.worker import hold
from assayer.worker.served_job import cancel

__all__ = ["Desk"]

logger = logging.getLogger(__name__)

# Seconds that one answer of Redis may take while a client waits.
ANSWER = 5.0
# What RQ calls the states of a job.
_STATUS = {
    "queued": JobStatus.QUEUED,
    "deferred": JobStatus.QUEUED,
    "scheduled": JobStatus.QUEUED,
    "created": JobStatus.QUEUED,
    "started": JobStatus.RUNNING,
    "canceled": JobStatus.CANCELLED,
}
# Jobs that are looked at in one go when a list of them is asked for.
_BATCH = 200


class Desk:
    """One server's work on one queue; every method but ``ask`` may wait for a disk or for Redis."""

    def __init__(self, url: str, queue: str, watch_queue: str, models: Models, rules: Rules) -> None:
        self.connection: Connection = connect(url, answer=ANSWER)
        self._asking: Connection = connect_async(url, ANSWER)
        self.jobs = ServedJobs(self.connection, queue)
        self.watch_queue = watch_queue
        self.models = models
        self.rules = rules

    def submit(self, request: EvaluateRequest, key: str | None) -> JobSubmitResponse:
        """Queues what is asked for; a second time under the same key, what the first time came to.

        Raises:
            ProtocolError: it is refused.
        """
        model = self.models.find(request.model)
        if model is None:
            raise self._unknown(request.model)
        job = str(uuid.uuid4())
        if key is not None:
            job, same = self.jobs.claim(key, job, dump(request.to_json()).decode())
            if not same:
                raise ProtocolError("this Idempotency-Key was used for another request; give each request its own")
            before = self.jobs.position(job)
            if before is not None:
                return JobSubmitResponse.queued(job, before)
        if self.jobs.length() >= self.rules.queue_max:
            raise ProtocolError(f"{self.rules.queue_max} jobs wait already; try again later", status=503)
        try:
            made = order(job, request, model, self.rules)
        except ProtocolError:
            if key is not None:
                self.jobs.release(key, job)
            raise
        position = self.jobs.submit(made.served)
        self._protect(made.served, made.found)
        return JobSubmitResponse.queued(job, position)

    def _unknown(self, name: str) -> ProtocolError:
        near = self.models.nearest(name)
        text = f"no model is called {printable(name)[:100]!r}" + (
            f"; the nearest: {', '.join(near)}" if near else "; GET /models lists all"
        )
        detail = {"type": "value_error", "loc": ["body", "model"], "msg": f"Value error, {text}", "input": name, "ctx": {"error": text}}
        return ProtocolError([detail])

    def _protect(self, served: Served, found: Found | None) -> None:
        """Holds the weights of a job that waits; what cannot be held yet is noted, told, and tried again when others have let go.

        The job is queued first: a watch lets go of what no job needs.
        """
        if found is None or served.kept is not None:
            return
        why = self._hold(served, found)
        if why is None:
            self.jobs.forget_unheld(served.job)
        elif self.jobs.note_unheld(served.job, f"not protected from deletion: {why}"):
            logger.warning("%s waits unprotected from deletion: %s", printable(served.checkpoint), why)

    def _hold(self, served: Served, found: Found) -> str | None:
        """Gives the weights a second name, so that the trainer's rotation cannot take them; None, or why it could not be done.

        What is held already stays: the oldest are evaluated first, and are the ones that rotation has deleted.
        """
        bounds = self.rules.bounds
        folder = hold_folder(Path(served.checkpoint), served.results_dir)
        facts = {"path": served.checkpoint, "identity": served.identity, "results_dir": served.results_dir}
        place = folder.parent.parent
        try:
            if bounds.count == 0 or not place.is_dir():
                return "--hold 0" if bounds.count == 0 else f"{printable(str(place))} is not there"
            if second_names.free_part(str(place)) < bounds.min_free:
                return f"less than {bounds.min_free:.0%} of its file system is free (--hold_min_free)"
            others = [held for held in hold.held_in(folder) if held.key != served.hold_id]
            size = hold.size_of(found)
            if served.hold_id not in hold.chosen([(served.hold_id, size)], [(held.key, held.nbytes) for held in others], bounds):
                return f"{len(others)} others are held (--hold)"
            # Noted before it is there: a server that is killed in between leaves nothing that nobody knows of.
            self.jobs.note_hold(served.hold_id, facts)
            hold.take(found, served.identity, served.signature, (served.weights,), served.results_dir)
        except OSError as error:
            return f"a hard link cannot be made ({error.strerror})"
        self._release(served.hold_id, facts)
        return None

    def _release(self, key: str, facts: dict[str, Any]) -> None:
        """Lets go of a hold that no job needs any more."""
        if is_wanted(self.connection, key):
            return
        held = hold.find(facts["path"], facts["identity"], facts["results_dir"])
        if held is not None and not hold.is_read(held):
            hold.release(held)
        self.jobs.forget_hold(key)

    def sweep(self) -> None:
        """Lets go of what jobs have left that came to no orderly end, holds what could not be held before, queues those again whose record
        could not be written, and forgets the oldest."""
        self.jobs.deliver_again()
        self.jobs.forget_old()
        for key, facts in self.jobs.holds().items():
            self._release(key, facts)
        for served in self.jobs.unheld():
            found = _as_it_was(served)
            if found is not None:
                self._protect(served, found)

    def is_busy(self) -> bool:
        """True while a client's job waits or runs."""
        return bool(self.jobs.waiting() or self.jobs.running())

    async def ask(self, job: str) -> JobInfo:
        """What is known of a job; called by an event loop.

        Raises:
            ProtocolError: nothing is (404).
        """
        facts = await self.jobs.look_at(self._asking, job)
        if facts is None:
            raise not_found(job)
        if facts.status not in _STATUS and facts.answer is None:
            return await asyncio.to_thread(self._info, facts)
        return self._info(facts)

    def _info(self, facts: Facts) -> JobInfo:
        answer = facts.answer or {}
        # An answer is the last word, also while RQ still counts the job as running, or has its record to write.
        status = JobStatus(answer["status"]) if answer else _STATUS.get(facts.status, JobStatus.FAILED)
        waits = status == JobStatus.QUEUED
        error = answer.get("error")
        if status == JobStatus.FAILED and error is None:
            error = self.jobs.failure(facts.job).partition("Error: ")[2] or self.jobs.failure(facts.job)
        is_over = status not in (JobStatus.QUEUED, JobStatus.RUNNING)
        return JobInfo(
            job_id=facts.job,
            status=status,
            created_at=_iso(facts.created_at) or "",
            started_at=None if waits else answer.get("started_at") or _iso(facts.started_at),
            completed_at=(answer.get("completed_at") or _iso(facts.ended_at)) if is_over else None,
            request=EvaluateRequest.from_json(facts.request),
            result=answer.get("result") if status == JobStatus.COMPLETED else None,
            error=error if is_over else None,
            position_in_queue=(facts.position or 0) if waits else None,
            metrics=answer.get("metrics") if is_over else None,
        )

    def list(self, status: str | None, limit: int) -> list[JobInfo]:
        """The newest jobs, all or those of this status."""
        found: list[JobInfo] = []
        start = 0
        while len(found) < limit and (ids := self.jobs.newest(start, _BATCH)):
            start += _BATCH
            infos = (self._info(facts) for facts in self.jobs.look(ids) if facts is not None)
            found += [info for info in infos if status in (None, info.status)]
        return found[:limit]

    def queue(self) -> QueueStatusResponse:
        """How the queue stands; jobs of watches are not counted."""
        waiting, running = self.jobs.waiting(), self.jobs.running()
        completed, failed = self.jobs.ended()
        return QueueStatusResponse(len(waiting), running[0] if running else None, tuple(waiting), completed, failed)

    def cancel(self, job: str, force: bool) -> str:
        """Takes a job off the queue (``cancelled``), or with ``force`` tells whoever runs it to end it (``running``: not over yet).

        Raises:
            ProtocolError: it is not known (404), runs, or has ended (400).
        """
        told = cancel(self.jobs, job, force)
        if told == "missing":
            raise not_found(job)
        if told == "ended":
            raise ProtocolError("Job already finished or cancelled", status=400)
        if told == "running" and not force:
            raise ProtocolError("Cannot cancel a running job", status=400)
        return told

    def notify(self, directory: str) -> int:
        """Makes the watches of a directory look now, and returns how many there are.

        Raises:
            ProtocolError: the path is refused, or nobody watches it (404).
        """
        path = self.rules.roots.resolve(directory)
        count = hurry(self.connection, self.watch_queue, path)
        if count == 0:
            raise ProtocolError(f"no watch looks at {printable(path)}", status=404)
        return count


def _as_it_was(served: Served) -> Found | None:
    """The checkpoint of a job, unless it has changed or gone since."""
    try:
        found = formats.identify_path(served.checkpoint)
    except OSError:
        return None
    return found if found is not None and found.listing.signature() == served.signature else None


def _iso(moment: str | None) -> str | None:
    """RQ's moment in the form of our own."""
    return moment.replace("Z", "+00:00") if moment else None


def not_found(job: str) -> ProtocolError:
    """The refusal of a job that is not known."""
    return ProtocolError(f"Job {job} not found", status=404)
