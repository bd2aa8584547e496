"""What a dead worker held goes back to the queue at once, and what of ours waits there can be taken out.

RQ alone notices a dead worker when its heartbeat runs out; whoever started the worker knows at once that its process has ended.
"""

import contextlib
import json
import os
import socket
from collections.abc import Callable

from redis.exceptions import WatchError
from rq import Queue
from rq.exceptions import DeserializationError, NoSuchJobError
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer
from rq.worker import BaseWorker

from assayer.queues import Connection
from assayer.queues.enqueue import PREFIX, open_queue

__all__ = ["WORKER_PREFIX", "forget_worker", "is_dead", "is_ours", "our_workers", "remove_waiting", "return_jobs"]

# Names of our workers start with this; no other RQ user's do.
WORKER_PREFIX = "assayer-"


def return_jobs(connection: Connection, queue_name: str, worker: str, blame: bool) -> list[str]:
    """Puts what this dead worker was working on back to the front of its queue, and returns the ids.

    Args:
        connection: Redis.
        queue_name: the queue that it worked on.
        worker: its name.
        blame: False when we ended it ourselves; then the run does not count toward the workers that a job may take down.
    """
    queue = open_queue(connection, queue_name)
    returned = []
    for entry in connection.zrange(queue.started_job_registry.key, 0, -1):
        job_id, _, execution = entry.decode().rpartition(":")
        holder = connection.hget(f"rq:execution:{entry.decode()}", "worker_name")
        if holder == worker.encode() and _return(queue, entry, job_id, execution, blame):
            returned.append(job_id)
    forget_worker(connection, queue_name, worker)
    return returned


def _return(queue: Queue, entry: bytes, job_id: str, execution: str, blame: bool) -> bool:
    wip = queue.started_job_registry.key
    connection: Connection = queue.connection
    with connection.pipeline() as pipe:
        try:
            pipe.watch(wip, Job.key_for(job_id))
            if pipe.zscore(wip, entry) is None:
                return False
            status = pipe.hget(Job.key_for(job_id), "status")
            job = None
            if status in (b"started", b"queued"):
                with contextlib.suppress(NoSuchJobError):
                    job = Job.fetch(job_id, connection=queue.connection, serializer=JSONSerializer)
            pipe.multi()
            pipe.zrem(wip, entry)
            pipe.delete(f"rq:execution:{entry.decode()}")
            pipe.zrem(f"rq:executions:{job_id}", execution)
            pipe.lrem(queue.intermediate_queue_key, 0, job_id)
            if job is not None:
                if not blame and job.meta.get("runs"):
                    pipe.hset(job.key, "meta", json.dumps({**job.meta, "runs": job.meta["runs"] - 1}))
                pipe.hset(job.key, "status", JobStatus.QUEUED.value)
                pipe.lpush(queue.key, job_id)
            pipe.execute()
            return job is not None
        except WatchError:
            return _return(queue, entry, job_id, execution, blame)


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
    try:
        os.kill(int(worker["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def remove_waiting(queue: Queue, only: Callable[[Job], bool] | None = None) -> int:
    """Takes our own waiting jobs out of a queue (queued, scheduled, failed) and returns how many waited; others' stay.

    Args:
        queue: the queue.
        only: which of ours to take; None for all of them.
    """
    count = 0
    ids = [*queue.get_job_ids(), *queue.scheduled_job_registry.get_job_ids(cleanup=False)]
    for job_id in dict.fromkeys(ids):
        with contextlib.suppress(NoSuchJobError):
            job = Job.fetch(job_id, connection=queue.connection, serializer=JSONSerializer)
            if is_ours(job) and (only is None or only(job)):
                job.delete()
                count += 1
    return count


def is_ours(job: Job) -> bool:
    """True for a job of this project's; a job of another RQ user's may even hold arguments that cannot be read."""
    try:
        return (job.func_name or "").startswith(PREFIX)
    except DeserializationError:
        return False
