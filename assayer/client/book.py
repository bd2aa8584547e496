"""All evaluations of one training: those that were ordered become jobs, and what becomes of them is written down."""

import logging
from collections.abc import Iterable
from dataclasses import replace

from assayer.client.keeping import Keeping
from assayer.client.mailbox import Mailbox, Order, Point
from assayer.client.pending import Job, PendingFile, signature_of

__all__ = ["Book", "point_of", "words_of"]

logger = logging.getLogger(__name__)


class Book:
    """The jobs, as ``file`` has them or will have them; of each that is out the checkpoint is kept, and ``mailbox`` tells the training.

    ``saved`` are the keys of those whose checkpoint was there when it was ordered.
    """

    def __init__(self, mailbox: Mailbox, file: PendingFile, keeping: Keeping) -> None:
        self.is_loaded = False
        self.is_dirty = False
        self.saved: set[str] = set()
        self._mailbox = mailbox
        self._file = file
        self._keeping = keeping
        # All jobs, by key; and their keys by place, and by the path of their checkpoint.
        self._jobs: dict[str, Job] = {}
        self._places: dict[tuple[str, int, str], str] = {}
        self._at: dict[str, set[str]] = {}
        self._logged: set[str] = set()
        self._said: set[str] = set()

    def out(self) -> Iterable[Job]:
        """The jobs that are out."""
        return [job for job in self._jobs.values() if job.is_out]

    def get(self, key: str) -> Job | None:
        """The job of this key, as it is by now."""
        return self._jobs.get(key)

    def load(self, is_late: bool) -> bool:
        """Reads what an earlier training left; False while that one still has the file, or it cannot be read.

        Once it is late for that, a training that goes on in the file is left alone with it, and another file is taken.
        """
        jobs: list[Job] = []
        try:
            if not self._file.try_lock():
                has = f"{self._file.path}: another training has this file of pending evaluations"
                if not is_late or not self._file.beside():
                    self._say(f"{has}; waiting for it to end")
                    return False
                logger.warning("%s; those of this one are in %s", has, self._file.path.name)
                self._keeping.owner = str(self._file.path)
            jobs = self._file.read()
            self._keeping.take_over(jobs)
        except OSError as error:
            self._say(f"{self._file.path} cannot be read ({error.strerror}), and with it what an earlier training left")
            if not is_late:
                return False
        for job in jobs:
            self._add(job)
        self.is_loaded = True
        waiting = {job.key: words_of(job) for job in jobs if job.is_out}
        self._mailbox.loaded(waiting)
        if waiting:
            logger.info("%d evaluations of an earlier training are still out", len(waiting))
        for job in jobs:
            if job.state == "done":
                self._mailbox.settle(job.key, point_of(job))
        return True

    def sort_mail(self) -> None:
        """Orders become jobs, points that were handed out are logged."""
        orders, handed = self._mailbox.take_orders()
        for key in handed:
            self._logged.add(key)
            if key in self._jobs:
                # So much as tells that it is known.
                self.put(replace(self._jobs[key], state="logged", metrics={}, job_id=None, sent_as="", path=""))
        self.is_dirty |= bool(handed)
        new = [job for order in orders if (job := self._take_in(order))]
        for job in new:
            try:
                # At once: the next save may delete it.
                self.keep(job)
            except Exception:
                logger.exception("%s is not kept from the trainer's rotation", job.checkpoint)

    def _take_in(self, order: Order) -> Job | None:
        """The job of an order; None where it is known already."""
        signature = signature_of(order.checkpoint)
        twin = self._jobs.get(self._places.get((order.checkpoint, order.step, order.weights), ""))
        if twin and twin.signature == signature and twin.state != "ended":
            logger.info("%s (%s) is known already, and not evaluated twice", order.checkpoint, order.weights)
            self._mailbox.settle(order.key, None)
            return None
        if twin:
            self._drop(twin)
        self._end_overwritten(order, signature)
        job = Job(order.key, order.checkpoint, order.step, order.weights, signature, sent_as=order.key)
        self.put(job)
        if order.is_saved:
            self.saved.add(job.key)
        return job

    def _end_overwritten(self, order: Order, signature: str) -> None:
        """Ends what waits of an earlier step at the same path, such as ``last.ckpt``: the weights there are a later step's by now."""
        for job in [self._jobs[key] for key in self._at.get(order.checkpoint, ())]:
            is_earlier = job.state == "new" and job.step != order.step and job.signature != signature
            if is_earlier and not self._keeping.has_earlier(job):
                note = f"it was overwritten by step {order.step} before it could be submitted"
                logger.warning("%s (%s) of step %d is not evaluated: %s", job.checkpoint, job.weights, job.step, note)
                self.put(replace(job, state="ended", note=note))
                self._mailbox.settle(job.key, None)

    def _drop(self, twin: Job) -> None:
        """The checkpoint was saved anew, by a training that was resumed before it: nobody waits for its earlier weights."""
        del self._jobs[twin.key]
        self._at[twin.checkpoint].discard(twin.key)
        self.is_dirty = True
        if twin.job_id is None:
            self._keeping.release(twin.key)
        else:
            # Whoever evaluates it lets go of it at the end, or the next training.
            self._keeping.forget(twin.key)
        if twin.is_out:
            logger.info("%s was saved anew: its earlier evaluation (job %s) is not waited for", twin.checkpoint, twin.job_id)
            self._mailbox.settle(twin.key, None)

    def put(self, job: Job) -> None:
        self.is_dirty |= self._jobs.get(job.key) != job
        self._add(job)
        if not job.is_out:
            self._keeping.release(job.key)

    def _add(self, job: Job) -> None:
        self._jobs[job.key] = job
        self._places[job.place] = job.key
        self._at.setdefault(job.checkpoint, set()).add(job.key)

    def keep(self, job: Job) -> bool:
        """Keeps the checkpoint of a job from the trainer's rotation, as it is by now; True when it is kept."""
        return self._keeping.keep(job, self._jobs)

    def named(self, job: Job) -> Job:
        """The job with the name under which its checkpoint is submitted, which is the same in every try: they are one submission."""
        if not job.path:
            job = replace(job, path=self._keeping.path(job))
            self.put(job)
            self.save()
        return job

    def save(self) -> None:
        """Writes the file, where something has changed. A disk that is full or away is told once; all goes on in memory."""
        if not self.is_dirty:
            return
        try:
            self._file.write(self._jobs.values())
            # Where there was no folder for it before.
            self._file.try_lock()
        except OSError as error:
            self._say(f"{self._file.path} cannot be written ({error.strerror}); a restarted training would not know of what is out")
            # Nobody is to wait for that.
            self._mailbox.written(self._logged)
            return
        self.is_dirty = False
        self._said.clear()
        self._mailbox.written(self._logged)
        self._logged = set()

    def close(self) -> None:
        """Remembers what is still in the mailbox, in another file where this one is another training's still; then gives the file up."""
        try:
            if self.is_loaded or (self._mailbox.has_orders and self.load(is_late=True)):
                self.sort_mail()
                self.save()
        except Exception:
            logger.exception("what is out is not remembered")
        if orders := self._mailbox.take_orders()[0]:
            logger.warning("not submitted, and not remembered: %s", ", ".join(order.checkpoint for order in orders))
        self._file.unlock()

    def _say(self, words: str) -> None:
        if words not in self._said:
            logger.warning("%s", words)
            self._said.add(words)


def point_of(job: Job) -> Point:
    """What the training is given of a job that is done."""
    return Point(job.step, dict(job.metrics), job.checkpoint, job.weights, job.key)


def words_of(job: Job) -> str:
    """How a job stands that is out, in words."""
    return f"{job.checkpoint} ({job.weights}): " + (f"job {job.job_id} is out" if job.job_id else "not submitted yet")
