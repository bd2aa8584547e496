"""What a dead worker held goes back to the queue at once, and what of ours waits there can be taken out.

RQ alone notices a dead worker when its heartbeat runs out; whoever started the worker knows at once that its process has ended.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from redis.exceptions import WatchError
from rq import Queue
from rq.exceptions import DeserializationError, NoSuchJobError
from rq.job import Job, JobStatus
from rq.scheduler import RQScheduler
from rq.serializers import JSONSerializer
from rq.worker import BaseWorker

from assayer.queues import Connection
from assayer.queues.enqueue import PREFIX, open_queue

__all__ = [
    "SILENCE",
    "WORKER_PREFIX",
    "Judge",
    "forget_worker",
    "free_scheduler_lock",
    "is_dead",
    "is_gone",
    "is_ours",
    "our_workers",
    "remove_waiting",
    "return_abandoned",
    "return_jobs",
    "return_taken",
]

# Names of our workers start with this; no other RQ user's do.
WORKER_PREFIX = "assayer-"
# Seconds without a heartbeat after which what a worker holds counts as abandoned, and seconds between two answers of Redis that are an
# outage: after one, all heartbeats are old, and nobody is judged until everybody has had the time for another.
SILENCE = 45
GAP = 20.0


class Judge:
    """Decides when another worker's silence means anything: once Redis has answered this process for ``SILENCE`` without a gap."""

    def __init__(self) -> None:
        self._since = self._last = time.monotonic()

    def answered(self) -> None:
        """Redis has answered just now."""
        now = time.monotonic()
        if now - self._last > GAP:
            self._since = now
        self._last = now

    def may_judge(self) -> bool:
        now = time.monotonic()
        return now - self._last <= GAP and now - self._since >= SILENCE


def return_abandoned(connection: Connection, queue_name: str) -> list[str]:
    """Puts our jobs whose worker has not been heard of back to the front of the queue, and returns their ids.

    RQ's own cleaning, by two workers at a time, can queue a job twice; here whoever comes second finds nothing.
    """
    queue = open_queue(connection, queue_name)
    returned = []
    for entry in connection.zrangebyscore(queue.started_job_registry.key, 0, time.time()):
        job_id, _, execution = entry.decode().rpartition(":")
        if _names_ours(connection, job_id) and _return(queue, entry, job_id, execution, True):
            returned.append(job_id)
    return returned


def _names_ours(connection: Connection, job_id: str) -> bool:
    with contextlib.suppress(NoSuchJobError, ValueError, TypeError):
        return is_ours(Job.fetch(job_id, connection=connection, serializer=JSONSerializer))
    return False


def return_taken(connection: Connection, queue_key: str, job_id: str) -> bool:
    """Puts a job that was taken off the queue and not begun back to its front; False when it is no longer between the two."""
    between = f"{queue_key}:intermediate"
    with connection.pipeline() as pipe:
        while True:
            try:
                pipe.watch(between, Job.key_for(job_id))
                if pipe.lpos(between, job_id) is None or pipe.hget(Job.key_for(job_id), "status") == b"started":
                    return False
                pipe.multi()
                pipe.lrem(between, 0, job_id)
                pipe.lpush(queue_key, job_id)
                pipe.execute()
                return True
            except WatchError:
                continue


def return_jobs(connection: Connection, queue_name: str, worker: str, blame: bool, forget: bool = True) -> list[str]:
    """Puts what this worker was working on back to the front of its queue, and returns the ids.

    Args:
        connection: Redis.
        queue_name: the queue that it worked on.
        worker: its name.
        blame: False when we ended it ourselves; then the run does not count toward the workers that a job may take down.
        forget: the worker is dead, and is taken out of RQ's lists as well.
    """
    queue = open_queue(connection, queue_name)
    returned = []
    for entry in connection.zrange(queue.started_job_registry.key, 0, -1):
        job_id, _, execution = entry.decode().rpartition(":")
        holder = connection.hget(f"rq:execution:{entry.decode()}", "worker_name")
        if holder == worker.encode() and _return(queue, entry, job_id, execution, blame):
            returned.append(job_id)
    if forget:
        forget_worker(connection, queue_name, worker)
    return returned


def _return(queue: Queue, entry: bytes, job_id: str, execution: str, blame: bool) -> bool:
    wip, key = queue.started_job_registry.key, Job.key_for(job_id)
    connection: Connection = queue.connection
    with connection.pipeline() as pipe:
        while True:
            try:
                pipe.watch(wip, key)
                if pipe.zscore(wip, entry) is None:
                    return False
                status, stored = pipe.hmget(key, "status", "meta")
                waits = status in (b"started", b"queued")
                meta = _meta(stored)
                pipe.multi()
                pipe.zrem(wip, entry)
                pipe.delete(f"rq:execution:{entry.decode()}")
                pipe.zrem(f"rq:executions:{job_id}", execution)
                pipe.lrem(queue.intermediate_queue_key, 0, job_id)
                if waits:
                    if not blame and meta.get("runs"):
                        pipe.hset(key, "meta", json.dumps({**meta, "runs": meta["runs"] - 1}))
                    pipe.hset(key, "status", JobStatus.QUEUED.value)
                    # It may wait there already: a Redis that lost everything got it again from the watch.
                    pipe.lrem(queue.key, 0, job_id)
                    pipe.lpush(queue.key, job_id)
                pipe.execute()
                return waits
            except WatchError:
                continue


def _meta(stored: bytes | None) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        meta = json.loads(stored) if stored else {}
        return meta if isinstance(meta, dict) else {}
    return {}


def forget_worker(connection: Connection, queue_name: str, worker: str) -> None:
    """Takes a dead worker out of RQ's lists, which would show it until its heartbeat runs out."""
    key = f"{BaseWorker.redis_worker_namespace_prefix}{worker}"
    with connection.pipeline() as pipe:
        pipe.srem("rq:workers", key)
        pipe.srem(f"rq:workers:{queue_name}", key)
        pipe.delete(key)
        pipe.execute()


def our_workers(connection: Connection, queue_names: list[str]) -> list[dict[str, str]]:
    """Our workers on these queues: name, queue, state, host, pid, gpus and current job's id, as RQ's hash and ours tell."""
    found = []
    for queue_name in queue_names:
        for key in sorted(connection.smembers(f"rq:workers:{queue_name}")):
            name = key.decode().removeprefix(BaseWorker.redis_worker_namespace_prefix)
            facts = {k.decode(): v.decode(errors="replace") for k, v in connection.hgetall(key).items()}
            if name.startswith(WORKER_PREFIX) and facts.get("hostname"):
                kept = {k: facts.get(k, "") for k in ("state", "hostname", "pid", "gpus", "current_job")}
                found.append({"name": name, "queue": queue_name, **kept})
    return found


def is_dead(worker: dict[str, str]) -> bool:
    """True for a worker (as ``our_workers`` tells it) of this very host whose process is gone."""
    if worker["hostname"] != socket.gethostname() or not worker["pid"].isdigit():
        return False
    return is_gone(int(worker["pid"]))


def free_scheduler_lock(connection: Connection, queue_name: str) -> bool:
    """Takes the lock of RQ's scheduler from one that was killed on this host, which would keep its successor out for a minute; True when
    it was taken."""
    key = RQScheduler.get_locking_key(queue_name)
    with connection.pipeline() as pipe:
        try:
            pipe.watch(key)
            name = pipe.get(key)
            host, pid = pipe.hmget(f"rq:scheduler:{name.decode()}", "hostname", "pid") if name else (None, None)
            if host is None or host.decode() != socket.gethostname() or not pid or not is_gone(int(pid)):
                return False
            pipe.multi()
            pipe.delete(key)
            pipe.execute()
            return True
        except WatchError:
            return False


def is_gone(pid: int) -> bool:
    """True for a process of this host that has ended, though perhaps nobody has taken note of that yet."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    with contextlib.suppress(OSError, IndexError):
        # The command's name stands in brackets and may hold anything.
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in (b"Z", b"X")
    return False


def remove_waiting(queue: Queue, only: Callable[[Job], bool] | None = None) -> list[Job]:
    """Takes our own waiting jobs out of a queue (queued, scheduled) and returns them; others' stay.

    Args:
        queue: the queue.
        only: which of ours to take; None for all of them.
    """
    taken = []
    ids = [*queue.get_job_ids(), *queue.scheduled_job_registry.get_job_ids(cleanup=False)]
    for job_id in dict.fromkeys(ids):
        with contextlib.suppress(NoSuchJobError):
            job = Job.fetch(job_id, connection=queue.connection, serializer=JSONSerializer)
            if is_ours(job) and (only is None or only(job)):
                job.delete()
                taken.append(job)
    return taken


def is_ours(job: Job) -> bool:
    """True for a job of this project's; a job of another RQ user's may even hold arguments that cannot be read."""
    try:
        return (job.func_name or "").startswith(PREFIX)
    except DeserializationError:
        return False
