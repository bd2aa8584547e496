"""The two kinds of RQ worker: one process that serves watches itself, and one that forks a child for every evaluation."""

import contextlib
import importlib
import os
from collections.abc import Callable
from typing import Any

from rq import SimpleWorker, Worker
from rq.job import Job
from rq.scheduler import RQScheduler
from rq.serializers import JSONSerializer
from rq.worker import BaseWorker

from assayer.queues import Connection, chain
from assayer.queues.board import queues_with_watches
from assayer.worker.child import become_reaper, die_with_parent, end_descendants

__all__ = ["EvalWorker", "WatchWorker", "preload"]

# Seconds: how often a busy worker tells that it lives, after how long without a word its job counts as abandoned, how often a worker
# cleans up, and how long an idle one is believed. RQ's own defaults notice a dead worker after 800 s.
HEARTBEAT = 10
HEARTBEAT_TTL = 30
MAINTENANCE = 10
WORKER_TTL = 30


class _Ours(BaseWorker):
    """What both kinds share: short heartbeats, the GPUs in RQ's own worker hash, and chains that heal."""

    def __init__(self, queue: str, connection: Connection, name: str, gpus: tuple[str, ...] = ()) -> None:
        super().__init__(
            [queue],
            name=name,
            connection=connection,
            serializer=JSONSerializer,
            maintenance_interval=MAINTENANCE,
            job_monitoring_interval=HEARTBEAT,
            worker_ttl=WORKER_TTL,
        )
        self._gpus = gpus
        self.on_maintenance: Callable[[], None] | None = None

    def register_birth(self) -> None:
        super().register_birth()  # type: ignore[no-untyped-call]
        self.connection.hset(self.key, "gpus", ",".join(self._gpus))

    def run_maintenance_tasks(self) -> None:
        super().run_maintenance_tasks()  # type: ignore[no-untyped-call]
        for queue in queues_with_watches(self.connection):
            chain.ensure(self.connection, queue)
        if self.on_maintenance:
            self.on_maintenance()

    def unsubscribe(self) -> None:
        """RQ unsubscribes first and stops its thread second, which then sleeps on; this way round it ends at once."""
        thread: Any = self.pubsub_thread
        pubsub: Any = self.pubsub
        if thread:
            thread.stop()
            pubsub.unsubscribe()
            thread.join(timeout=1)
            pubsub.close()


class EvalWorker(_Ours, Worker):
    """Forks a child for each job; the child dies with it, and nothing that the child leaves behind outlives the job."""

    def get_heartbeat_ttl(self, job: Job) -> int:
        return HEARTBEAT_TTL

    def fork_work_horse(self, job: Job, queue: Any) -> None:
        self._parent = os.getpid()
        become_reaper()
        super().fork_work_horse(job, queue)

    def main_work_horse(self, job: Job, queue: Any) -> None:
        die_with_parent(self._parent)
        super().main_work_horse(job, queue)

    def monitor_work_horse(self, job: Job, queue: Any) -> None:
        super().monitor_work_horse(job, queue)
        end_descendants()
        # Between jobs a supervisor that this worker revives must not become its child: it would end with the next job's leftovers.
        become_reaper(False)


class WatchWorker(_Ours, SimpleWorker):
    """Runs watch jobs in its own process, and RQ's scheduler in one beside it."""

    def _start_scheduler(self, burst: bool = False, logging_level: str | None = "WARNING", *formats: str) -> None:
        self.scheduler = _Scheduler(self.queues, connection=self.connection, serializer=JSONSerializer, logging_level="WARNING")
        if self.scheduler.acquire_locks():  # type: ignore[no-untyped-call]
            self.scheduler.start()


class _Scheduler(RQScheduler):
    """RQ's scheduler, which else would outlive a killed worker and go on without it."""

    def start(self) -> Any:
        self._parent = os.getpid()
        return super().start()  # type: ignore[no-untyped-call]

    def work(self) -> None:
        die_with_parent(self._parent)
        super().work()  # type: ignore[no-untyped-call]


def preload() -> None:
    """Imports torch, where it is installed, before the worker forks, so that no evaluation pays for it.

    Only the import: after one tensor operation (or CUDA) here, every child would hang in its own first one.
    """
    with contextlib.suppress(ImportError):
        importlib.import_module("torch")
