"""One chain of watch jobs a queue, and it heals.

A chain is a number, its generation, in a Redis hash of ours. The watch job of generation n may act only while the hash says n; it moves
the hash to n + 1 and schedules job n + 1 in one transaction, so there is never a second chain, however often RQ runs a job. Whoever
finds that the job of the present generation is nowhere (worker killed, Redis emptied, job failed) starts generation n + 1.
"""

import time
from datetime import UTC, datetime

from redis.exceptions import WatchError
from rq import Queue
from rq.job import Job, JobStatus
from rq.registry import ScheduledJobRegistry

from assayer.files import digest
from assayer.queues import Connection
from assayer.queues.board import Board
from assayer.queues.enqueue import open_queue

__all__ = ["TICK", "TICK_TIMEOUT", "begin", "break_off", "chain_key", "ensure", "go_on", "hurry"]

# The watch job, by its name only: what seeds a chain need not know how a directory is watched.
TICK = "assayer.watch.watch_job.tick"

# Seconds that one tick may take; its listings run in threads and do not count.
TICK_TIMEOUT = 120
# Seconds after which a tick counts as lost that has begun and does not go on, that was due and was not queued, or that a worker took and
# did not begin (the server hands a job to a worker that dies in that moment, too). Too early a verdict costs nothing: it is out of place.
LOST_AFTER = 90.0
OVERDUE_AFTER = 10.0
TAKEN_AFTER = 3.0


def chain_key(queue: str) -> str:
    """The Redis hash that holds the chain of this queue: ``generation``, ``due``, ``begun``."""
    return f"assayer:{queue}:chain"


def _job_id(queue: str, generation: int) -> str:
    return f"watch-{digest(queue)[:8]}-{generation}"


def _job(queue: Queue, generation: int, status: JobStatus) -> Job:
    return queue.create_job(
        TICK,
        args=[queue.name, generation],
        job_id=_job_id(queue.name, generation),
        description=f"watch tick {generation}",
        timeout=TICK_TIMEOUT,
        result_ttl=0,
        failure_ttl=3600,
        status=status,
    )


def begin(connection: Connection, queue: str, generation: int, now: float) -> bool:
    """Notes that the tick of this generation has begun; False when the chain is elsewhere, and the tick must do nothing."""
    if connection.hget(chain_key(queue), "generation") != str(generation).encode():
        return False
    connection.hset(chain_key(queue), "begun", now)
    return True


def go_on(connection: Connection, queue: str, generation: int, due: float) -> bool:
    """Schedules the next tick for the moment ``due`` (seconds since the epoch); False when the chain has gone elsewhere meanwhile.

    RQ's own ``enqueue_at`` adds to its schedule outside of a transaction; here hash, job and schedule change together.
    """
    rq_queue = open_queue(connection, queue)
    registry = ScheduledJobRegistry(queue=rq_queue)
    with connection.pipeline() as pipe:
        try:
            pipe.watch(chain_key(queue))
            if pipe.hget(chain_key(queue), "generation") != str(generation).encode():
                return False
            job = _job(rq_queue, generation + 1, JobStatus.SCHEDULED)
            job.enqueued_at = datetime.fromtimestamp(due, UTC)
            pipe.multi()
            pipe.hset(chain_key(queue), mapping={"generation": generation + 1, "due": due})
            pipe.sadd(Queue.redis_queues_keys, rq_queue.key)
            job.save(pipeline=pipe)
            pipe.zadd(registry.key, {job.id: int(due)})
            pipe.execute()
            return True
        except WatchError:
            return False


def ensure(connection: Connection, queue: str, now: float | None = None) -> bool:
    """Starts the chain of this queue anew when it has plans and its job is nowhere; True when it did. Safe to call by anyone, any time."""
    now = time.time() if now is None else now
    if not connection.exists(f"assayer:{queue}:plans") or _is_alive(connection, queue, now):
        return False
    return _seed(connection, queue, only_from=_generation(connection, queue))


def hurry(connection: Connection, queue: str) -> None:
    """Makes the next tick come now: a command has changed the plans."""
    if Board(connection, queue).ids():
        _seed(connection, queue, only_from=None)


def break_off(connection: Connection, queue: str) -> None:
    """Ends the chain: a tick that is running does not come back, and one that waits does nothing."""
    rq_queue = open_queue(connection, queue)
    generation = int(connection.hincrby(chain_key(queue), "generation", 1))
    for job_id in (_job_id(queue, generation), _job_id(queue, generation - 1)):
        _discard(rq_queue, job_id)


def _generation(connection: Connection, queue: str) -> int:
    return int(connection.hget(chain_key(queue), "generation") or 0)


def _is_alive(connection: Connection, queue: str, now: float) -> bool:
    generation = _generation(connection, queue)
    rq_queue = open_queue(connection, queue)
    job_id = _job_id(queue, generation)
    status = connection.hget(Job.key_for(job_id), "status")
    if status == b"scheduled":
        score = connection.zscore(ScheduledJobRegistry(queue=rq_queue).key, job_id)
        return score is not None and score > now - OVERDUE_AFTER
    if status == b"queued":
        if connection.lpos(rq_queue.key, job_id) is not None:
            return True
        # Between the queue and its start a job is in the intermediate list, for milliseconds when its worker lives.
        taken = connection.lpos(rq_queue.intermediate_queue_key, job_id) is not None
        return taken and _age(connection, queue, now) < TAKEN_AFTER
    return status == b"started" and _age(connection, queue, now) < LOST_AFTER


def _age(connection: Connection, queue: str, now: float) -> float:
    """Seconds since the present tick was due or has begun, whichever is later."""
    begun, due = (float(v or 0) for v in connection.hmget(chain_key(queue), "begun", "due"))
    return now - max(begun, due)


def _seed(connection: Connection, queue: str, only_from: int | None) -> bool:
    """Queues the next generation's tick now; with ``only_from`` only while the chain stands there."""
    rq_queue = open_queue(connection, queue)
    with connection.pipeline() as pipe:
        while True:
            try:
                pipe.watch(chain_key(queue))
                generation = int(pipe.hget(chain_key(queue), "generation") or 0)
                if only_from is not None and generation != only_from:
                    return False
                job = _job(rq_queue, generation + 1, JobStatus.QUEUED)
                pipe.multi()
                pipe.hset(chain_key(queue), mapping={"generation": generation + 1, "due": time.time()})
                rq_queue.enqueue_job(job, pipeline=pipe)
                pipe.execute()
                break
            except WatchError:
                continue
    _discard(rq_queue, _job_id(queue, generation))
    return True


def _discard(queue: Queue, job_id: str) -> None:
    """Takes a tick that has not begun out of queue and schedule."""
    with queue.connection.pipeline() as pipe:
        pipe.lrem(queue.key, 0, job_id)
        pipe.lrem(queue.intermediate_queue_key, 0, job_id)
        pipe.zrem(ScheduledJobRegistry(queue=queue).key, job_id)
        pipe.zrem(queue.failed_job_registry.key, job_id)
        pipe.execute()
    if queue.connection.hget(Job.key_for(job_id), "status") != b"started":
        queue.connection.delete(Job.key_for(job_id))
