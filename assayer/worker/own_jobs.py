"""Jobs as our workers read them: of all that a job's hash names, only the functions that a worker is there for are ever imported.

RQ imports what a job names in five places: the function, three callbacks, and the serializer's pickles; a webhook sends a request. Whoever
can write to the Redis could so run anything. Here each of them is refused, and the refusal is what the failed job says.
"""

import time
from datetime import timedelta
from typing import Any

import redis
from rq import Queue
from rq.exceptions import DequeueTimeout, DeserializationError, NoSuchJobError, StopRequested, TimeoutFormatError
from rq.intermediate_queue import IntermediateQueue
from rq.job import Job
from rq.utils import now

from assayer.errors import StateError
from assayer.files import printable
from assayer.queues import Connection
from assayer.queues.recover import return_taken

__all__ = ["OwnJob", "OwnQueue", "Stand"]

# Seconds for which one command waits at the queue; between two of them an order to stop is heeded.
POP = 0.5
# Seconds after which a job that was taken off the queue and not begun counts as lost (RQ: 60), and a lock for cleaning as left behind
# (RQ: 899; whoever is killed while it cleans would keep all others from it as long).
TAKEN_MAX = 20.0
CLEANING_MAX = 60

_UNREADABLE = (ValueError, TypeError, AttributeError, OverflowError, TimeoutFormatError)


class OwnJob(Job):
    """A job that runs one of ``FUNCTIONS`` or nothing."""

    FUNCTIONS: tuple[str, ...] = ()
    _unreadable = ""
    _extras: tuple[str, ...] = ()

    def refresh(self) -> None:
        try:
            super().refresh()  # type: ignore[no-untyped-call]
        except redis.ResponseError as error:
            raise NoSuchJobError(str(error)) from None

    def restore(self, raw_data: Any) -> None:
        self._unreadable = ""
        try:
            super().restore(raw_data)
        except NoSuchJobError:
            raise
        except _UNREADABLE as error:
            self._unreadable = printable(f"{type(error).__name__}: {error}")
        callbacks = {"on_success": self._success_callback_name, "on_failure": self._failure_callback_name}
        callbacks["on_stopped"] = self._stopped_callback_name
        self._extras = tuple(f"{kind} {printable(name)}" for kind, name in callbacks.items() if name)
        self._extras += tuple(f"webhook {printable(webhook.url)}" for webhook in self.webhooks)
        self._success_callback_name = self._failure_callback_name = self._stopped_callback_name = None
        self.webhooks = []
        # A lost worker's job comes before those that wait.
        self.enqueue_at_front_on_retry = True

    def refusal(self) -> str | None:
        """Why our worker must not run this job; None when it may."""
        ours = f"this worker runs only {' and '.join(self.FUNCTIONS)}"
        if self._unreadable:
            return f"refused: the job cannot be read ({self._unreadable[:200]}); {ours}"
        if self._extras:
            return f"refused: the job carries {', '.join(self._extras)[:500]}; {ours}, without callbacks"
        try:
            name, instance, arguments, keywords = self.func_name, self.instance, self.args, self.kwargs
        except DeserializationError:
            return f"refused: the job's data are no JSON; {ours}"
        if name not in self.FUNCTIONS:
            return f"refused: the job names {printable(str(name))[:200]}; {ours}"
        if instance is not None or not isinstance(arguments, list) or not isinstance(keywords, dict):
            return f"refused: the job's data are no call of a function; {ours}"
        return None

    @property
    def func(self) -> Any:
        refusal = self.refusal()
        if refusal:
            raise StateError(refusal)
        return super().func


class Stand:
    """What the worker's main thread is about, for its signal handlers: ``leaving`` is empty, ``warm`` or ``now``."""

    def __init__(self) -> None:
        self.leaving: str = ""
        self.popping = False
        self.held = ""
        self.held_since = 0.0

    def was_told(self) -> bool:
        return bool(self.leaving)


class _Intermediate(IntermediateQueue):
    def should_be_cleaned_up(self, job_id: str) -> bool:
        seen = self.get_first_seen(job_id)
        return seen is not None and now() - seen > timedelta(seconds=TAKEN_MAX)


class OwnQueue(Queue):
    """A queue that an order to stop finds in a known state: either nothing was taken from it, or ``stand`` says what.

    RQ leaves its wait by an exception out of the signal handler, and a job that the server hands out in that moment is lost for a minute.
    """

    stand = Stand()

    @classmethod
    def lmove(cls, connection: Connection, queue_key: str, timeout: int | None) -> tuple[str, bytes] | None:
        target, stand = f"{queue_key}:intermediate", cls.stand
        deadline = time.monotonic() + (timeout or 0)
        while not stand.was_told():
            stand.popping = True
            try:
                taken = connection.lmove(queue_key, target) if timeout is None else connection.blmove(queue_key, target, POP)
                if taken is not None:
                    stand.held, stand.held_since = taken.decode(), time.monotonic()
            finally:
                stand.popping = False
            if taken is not None:
                if not stand.was_told():
                    return queue_key, taken
                return_taken(connection, queue_key, stand.held)
                stand.held = ""
                break
            if timeout is None:
                return None
            if time.monotonic() >= deadline:
                raise DequeueTimeout(timeout, queue_key)
        raise StopRequested

    @property
    def intermediate_queue(self) -> IntermediateQueue:
        return _Intermediate(self.key, connection=self.connection)

    def acquire_maintenance_lock(self) -> bool:
        return bool(self.connection.set(self.registry_cleaning_key, 1, nx=True, ex=CLEANING_MAX))
