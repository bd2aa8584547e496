"""The two kinds of RQ worker: one process that serves watches itself, and one that forks a child for every evaluation.

An order to leave has two strengths. SIGINT is warm: the worker ends after the running job, however often it comes. SIGTERM, and the signals
that ``requeue_signals`` adds, is now: the running job goes back to the front of its queue, and the process is gone within ``LEAVE_MAX``.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from rq import SimpleWorker, Worker, worker_registration
from rq.job import Job, JobStatus
from rq.scheduler import RQScheduler
from rq.serializers import JSONSerializer
from rq.utils import now
from rq.worker import BaseWorker

from assayer.queues import Connection, chain
from assayer.queues.board import queues_with_watches
from assayer.queues.enqueue import EVALUATE, FAILURE_TTL
from assayer.queues.recover import SILENCE, Judge, free_scheduler_lock, return_abandoned, return_jobs, return_taken
from assayer.queues.served import SERVE
from assayer.worker.child import GIVEN_UP, GIVING_UP_GRACE, SETTLE_LONG, become_reaper, die_with_parent, end_descendants, give_up_on
from assayer.worker.own_jobs import TAKEN_MAX, OwnJob, OwnQueue, Stand
from assayer.worker.warm import warm

__all__ = ["LEAVE_MAX", "EvalWorker", "WatchWorker"]

# Seconds: how often a busy worker tells that it lives, how often a worker cleans up, and how long an idle one is believed. What counts as
# silence is ``SILENCE``; RQ's own defaults notice a dead worker after 800 s.
HEARTBEAT = 10
MAINTENANCE = 10
WORKER_TTL = 30
# Seconds within which a worker that is told to leave now is gone, whatever hinders it, and those of it that its horse or scheduler has.
LEAVE_MAX = 14
HORSE_GRACE = GIVING_UP_GRACE + 2
# Seconds that one answer of Redis may take then.
ANSWER_MAX = 2.0
# Seconds after which an idle worker ends whose Redis does not answer.
IDLE_MAX = 6


class _OwnEvaluation(OwnJob):
    FUNCTIONS = (EVALUATE, SERVE)


class _OwnTick(OwnJob):
    FUNCTIONS = (chain.TICK,)


class _Ours(BaseWorker):
    """What both kinds share: only our own jobs, short heartbeats, GPUs in RQ's own worker hash, chains that heal, and orders to leave."""

    def __init__(
        self,
        queue: str,
        connection: Connection,
        name: str,
        gpus: tuple[str, ...] = (),
        requeue_signals: tuple[int, ...] = (signal.SIGTERM,),
    ) -> None:
        self._stand = Stand()
        super().__init__(
            [queue],
            name=name,
            connection=connection,
            serializer=JSONSerializer,
            job_class=self.job_class,
            queue_class=type("OwnQueue", (OwnQueue,), {"stand": self._stand}),
            maintenance_interval=MAINTENANCE,
            job_monitoring_interval=HEARTBEAT,
            worker_ttl=WORKER_TTL,
        )
        self._gpus = gpus
        self._requeue_signals = requeue_signals
        self._judge = Judge()
        self.on_maintenance: Callable[[], None] | None = None

    @property
    def was_told_to_leave(self) -> bool:
        return bool(self._stand.leaving)

    # What Redis is told of this worker.

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        """Tells all that RQ's registration tells, each time: a Redis that lost everything knows the worker again."""
        with contextlib.ExitStack() as stack:
            pipe = stack.enter_context(self.connection.pipeline()) if pipeline is None else pipeline
            super().heartbeat(timeout, pipe)
            worker_registration.register(self, pipe)
            said = {**self.serialize(), "gpus": ",".join(self._gpus), "state": self.get_state()}
            pipe.hset(self.key, mapping=said)
            if pipeline is None:
                pipe.execute()
                self._judge.answered()

    def register_birth(self) -> None:
        super().register_birth()  # type: ignore[no-untyped-call]
        self.connection.hset(self.key, "gpus", ",".join(self._gpus))

    def _pubsub_exception_handler(self, exc: Exception, pubsub: Any, pubsub_thread: Any) -> None:
        if isinstance(exc, redis.TimeoutError):
            exc = redis.ConnectionError(str(exc))
        super()._pubsub_exception_handler(exc, pubsub, pubsub_thread)

    def unsubscribe(self) -> None:
        """RQ unsubscribes first and stops its thread second, which then sleeps on; this way round it ends at once."""
        thread: Any = self.pubsub_thread
        pubsub: Any = self.pubsub
        if thread:
            thread.stop()
            pubsub.unsubscribe()
            thread.join(timeout=1)
            pubsub.close()

    # What it does for others.

    def run_maintenance_tasks(self) -> None:
        super().run_maintenance_tasks()  # type: ignore[no-untyped-call]
        for queue in queues_with_watches(self.connection):
            chain.ensure(self.connection, queue)
        if self.on_maintenance:
            self.on_maintenance()

    def clean_registries(self) -> None:
        if self._judge.may_judge():
            for queue in self.queues:
                for job_id in return_abandoned(self.connection, queue.name):
                    self.log.warning("job %s comes back: nothing was heard of its worker for %d s", job_id[:8], SILENCE)
            super().clean_registries()  # type: ignore[no-untyped-call]
        self.last_cleaned_at: Any = now()

    # One job.

    def execute_job(self, job: Job, queue: Any) -> None:
        late = time.monotonic() - self._stand.held_since > TAKEN_MAX / 2
        try:
            refusal = job.refusal() if isinstance(job, OwnJob) else None
            if refusal:
                self._refuse(job, queue, refusal)
            elif not late or self.connection.lpos(queue.intermediate_queue_key, job.id) is not None:
                super().execute_job(job, queue)
        finally:
            self._stand.held = ""

    def _refuse(self, job: Job, queue: Any, refusal: str) -> None:
        self.log.error("job %s of queue %s is %s", job.id, queue.name, refusal)
        job.origin, job.failure_ttl, job.retries_left, job.ended_at = queue.name, FAILURE_TTL, None, now()
        with self.connection.pipeline() as pipe:
            job.set_status(JobStatus.FAILED, pipeline=pipe)
            job._handle_failure(refusal, pipeline=pipe, worker_name=self.name)
            pipe.lrem(queue.intermediate_queue_key, 0, job.id)
            pipe.execute()

    # Orders to leave. RQ's own handlers end a worker warm by either signal, and leave the job "started" when a second one comes.

    def _install_signal_handlers(self) -> None:
        signal.signal(signal.SIGINT, self._on_warm)
        for number in self._requeue_signals:
            signal.signal(number, self._on_now)

    def _on_warm(self, number: int, frame: FrameType | None) -> None:
        if not self._stand.leaving and not self._stand.held:
            self._exit_within(IDLE_MAX)
        self._stop_requested = True
        self._stand.leaving = self._stand.leaving or "warm"

    def _on_now(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.pid:
            # A child that has just been forked and has no handlers of its own yet.
            os._exit(GIVEN_UP)
        self._stop_requested = True
        self._stand.leaving = "now"
        if self._stand.popping:
            # Only the main thread learns whether the server hands out a job in this moment; it looks within POP seconds.
            self._exit_within(IDLE_MAX)
        else:
            self._leave_now()

    def teardown(self) -> None:
        if self._stand.leaving:
            # What is told here Redis finds out by itself; it may not answer.
            self._exit_within(IDLE_MAX)
        super().teardown()  # type: ignore[no-untyped-call]

    def _exit_within(self, seconds: int) -> None:
        def end(number: int, frame: FrameType | None) -> None:
            end_descendants()
            os._exit(0)

        signal.signal(signal.SIGALRM, end)
        signal.alarm(seconds)

    def _leave_now(self) -> None:
        """Gives back what this worker holds, and ends the process; what Redis does not hear now it learns by the silence."""
        for number in (signal.SIGINT, *self._requeue_signals):
            signal.signal(number, signal.SIG_IGN)
        self._exit_within(LEAVE_MAX)
        self._end_children()
        end_descendants()
        try:
            self._give_back(_hasty(self.connection))
        except redis.RedisError as error:
            self.log.warning("worker %s leaves; what it held comes back later: %s", self.name, error)
        os._exit(0)

    def _give_back(self, connection: Connection) -> None:
        (queue,) = self.queues
        returned = return_jobs(connection, queue.name, self.name, blame=False)
        if self._stand.held and self._stand.held not in returned and return_taken(connection, queue.key, self._stand.held):
            returned.append(self._stand.held)
        for job_id in returned:
            self.log.warning("job %s goes back to the queue", job_id[:8])

    def _end_children(self) -> None:
        raise NotImplementedError


class EvalWorker(_Ours, Worker):
    """Forks a child for each job; the child dies with it, and nothing that the child leaves behind outlives the job."""

    job_class = _OwnEvaluation
    _horse_status: int | None = None

    def get_heartbeat_ttl(self, job: Job) -> int:
        return SILENCE

    def maintain_heartbeats(self, job: Job) -> None:
        """As RQ's, but a Redis that does not answer ends no evaluation."""
        try:
            super().maintain_heartbeats(job)
            with self.connection.pipeline() as pipe:
                # A Redis that lost everything has half of them after RQ's heartbeat, and RQ itself stumbles over half an execution.
                if self.execution is not None:
                    pipe.hset(self.execution.key, mapping=self.execution.serialize())
                    pipe.expire(self.execution.key, SILENCE)
                pipe.hset(self.key, "current_job", job.id)
                pipe.execute()
            self._judge.answered()
        except redis.RedisError as error:
            self.log.warning("worker %s: Redis does not answer, the evaluation goes on: %s", self.name, error)

    def set_current_job_working_time(self, current_job_working_time: float, pipeline: Any = None) -> None:
        try:
            super().set_current_job_working_time(current_job_working_time, pipeline)
        except redis.RedisError as error:
            self.log.warning("worker %s: Redis does not answer: %s", self.name, error)

    def fork_work_horse(self, job: Job, queue: Any) -> None:
        warm(job.kwargs.get("evaluator"), lambda: self.maintain_heartbeats(job))
        self._parent = os.getpid()
        self._horse_status = None
        become_reaper()
        super().fork_work_horse(job, queue)

    def main_work_horse(self, job: Job, queue: Any) -> None:
        die_with_parent(self._parent)
        super().main_work_horse(job, queue)

    def setup_work_horse_signals(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        give_up_on(self._requeue_signals)

    def monitor_work_horse(self, job: Job, queue: Any) -> None:
        try:
            super().monitor_work_horse(job, queue)
        finally:
            self._horse_status = None
            end_descendants()
            # Between jobs a supervisor that this worker revives must not become its child: it would end with the next job's leftovers.
            become_reaper(False)

    def wait_for_horse(self) -> tuple[int | None, int | None, Any]:
        pid, status, usage = super().wait_for_horse()
        self._horse_status = status
        return pid, status, usage

    def handle_job_failure(self, job: Job, queue: Any, started_job_registry: Any = None, exc_string: str = "") -> None:
        """As RQ's, but a horse that gave its evaluation up has not failed: the job goes back."""
        if self.is_horse or not self._horse_gave_up():
            super().handle_job_failure(job, queue, started_job_registry, exc_string)
            return
        # The order was most likely meant for this process as well; then its handler gives back, and does not return.
        time.sleep(SETTLE_LONG)
        self.log.warning("worker %s: the evaluation was told to end; it goes back to the queue", self.name)
        return_jobs(self.connection, queue.name, self.name, blame=True, forget=False)
        self.set_current_job_id(None)
        self.execution = None

    def _horse_gave_up(self) -> bool:
        status = self._horse_status
        if status is None:
            return False
        if os.WIFSIGNALED(status):
            return os.WTERMSIG(status) in self._requeue_signals
        return os.WEXITSTATUS(status) == GIVEN_UP

    def _end_children(self) -> None:
        """The horse ends its evaluator politely first, or delivers what the evaluator has returned."""
        pid = self.horse_pid
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            if pid:
                os.kill(pid, signal.SIGTERM)
                _await_exit(pid, HORSE_GRACE)


class WatchWorker(_Ours, SimpleWorker):
    """Runs watch jobs in its own process, and RQ's scheduler in one beside it."""

    job_class = _OwnTick

    def _start_scheduler(self, burst: bool = False, logging_level: str | None = "WARNING", *formats: str) -> None:
        self.scheduler = _Scheduler(self.queues, connection=self.connection, serializer=JSONSerializer, logging_level="WARNING")
        for queue in self.queue_names():
            free_scheduler_lock(self.connection, queue)
        # Known before it has a lock, by this process until its own begins: killed in between, it would hold the lock as nobody's.
        self.scheduler.register_birth()
        if self.scheduler.acquire_locks():  # type: ignore[no-untyped-call]
            self.scheduler.start()
        else:
            self.scheduler.register_death()

    def _end_children(self) -> None:
        """The scheduler lets go of its lock, so that another can begin at once."""
        process: Any = self.scheduler._process if self.scheduler else None
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            if process and process.pid:
                os.kill(process.pid, signal.SIGTERM)
                _await_exit(process.pid, HORSE_GRACE)


class _Scheduler(RQScheduler):
    """RQ's scheduler, which else would outlive a killed worker and go on without it."""

    def start(self) -> Any:
        self._parent = os.getpid()
        return super().start()  # type: ignore[no-untyped-call]

    def work(self) -> None:
        die_with_parent(self._parent)
        super().work()  # type: ignore[no-untyped-call]


def _await_exit(pid: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None and time.monotonic() < deadline:
        time.sleep(0.02)


def _hasty(connection: Connection) -> Connection:
    """A connection of its own to the same Redis, which does not wait long for an answer."""
    pool = connection.connection_pool
    short = {"socket_timeout": ANSWER_MAX, "socket_connect_timeout": ANSWER_MAX, "retry": Retry(NoBackoff(), 1)}
    return redis.Redis(connection_pool=redis.ConnectionPool(connection_class=pool.connection_class, **{**pool.connection_kwargs, **short}))
