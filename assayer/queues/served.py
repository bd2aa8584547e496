"""What a server was asked for: eval jobs with an id of their own, on the same queue as those of the watches, and what became of each.

All that a client is told of a job stands in RQ's own hash of it, so that it outlives server and worker, and is read in one command.
"""

import json
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from redis.exceptions import WatchError
from rq import Retry
from rq.job import Job, JobStatus
from rq.registry import CanceledJobRegistry

from assayer.files import digest, printable
from assayer.queues import Connection
from assayer.queues.enqueue import RETRIES_OF_RQ, Task, add, arrange, open_queue, put_notes

__all__ = ["SERVE", "Facts", "Served", "ServedJobs", "answer", "is_cancelled", "note_undelivered"]

SERVE = "assayer.worker.served_job.evaluate"

# Seconds for which a job that has ended can be asked for, and for which a key of a submission is remembered.
KEPT = 7 * 86400
# Jobs that are known at most; beyond, the oldest of those that have ended are forgotten, so many in one go.
KNOWN_MAX = 20_000
_FORGOTTEN_AT_ONCE = 1000
# What all served jobs together are for ``arrange``: one folder that takes turns with those of the watches.
_TURN = "served jobs"
# Fields of ours in RQ's hash of a job: what was asked for, what became of it, its first place in the queue, the order to end it.
_REQUEST, _ANSWER, _POSITION, _CANCEL = "assayer_request", "assayer_answer", "assayer_position", "assayer_cancel"


@dataclass(frozen=True)
class Served(Task):
    """One evaluation that a client has asked for. Without a checkpoint its path is empty; without a known format, its format.

    ``kind`` is ``own``, ``lm_eval`` or ``lmms_eval``; ``request`` the request's JSON, all fields filled in; ``output_dir`` where the
    results' files go (None: beside the record), ``merged_to`` where a merge is kept (None: it is not), ``kept`` the second name under which
    a training keeps the checkpoint until this job has ended (None: it does not).
    """

    job: str = ""
    kind: str = "own"
    request: dict[str, Any] = field(default_factory=dict)
    output_dir: str | None = None
    merged_to: str | None = None
    kept: str | None = None

    @property
    def id(self) -> str:
        return self.job

    @property
    def folder(self) -> str:
        return _TURN

    @property
    def shared(self) -> list[str]:
        return [*(super().shared if self.identity else []), *([self.kept] if self.kept else [])]

    @property
    def description(self) -> str:
        what = printable(self.checkpoint.rpartition("/")[2]) if self.checkpoint else "no checkpoint"
        return f"evaluate {what} with {self.evaluator.name} for a client, on {printable(', '.join(self.request['tasks']))[:200]}"


@dataclass(frozen=True)
class Facts:
    """What Redis holds of one job: RQ's status and times, the request, the answer (None while there is none), and its place if it waits."""

    job: str
    status: str
    created_at: str
    started_at: str | None
    ended_at: str | None
    request: dict[str, Any]
    answer: dict[str, Any] | None
    position: int | None


# Takes a job off the queue, or orders whoever runs it to end it; in one step, so that no worker takes it meanwhile. A job between the queue
# and its worker counts as running.
_CANCEL_JOB = """
local told = redis.call('HMGET', KEYS[1], 'status', ARGV[2])
if not told[1] or not told[2] then return 'missing' end
if told[1] == 'queued' and redis.call('LREM', KEYS[2], 0, ARGV[1]) > 0 then
  redis.call('HSET', KEYS[1], 'status', ARGV[3], 'ended_at', ARGV[4], ARGV[5], ARGV[6])
  redis.call('EXPIRE', KEYS[1], ARGV[7])
  redis.call('ZADD', KEYS[3], ARGV[8], ARGV[1])
  return 'cancelled'
end
if told[1] ~= 'queued' and told[1] ~= 'started' then return 'ended' end
if ARGV[9] == '1' then redis.call('HSET', KEYS[1], ARGV[10], 1) end
return 'running'
"""


# Puts a job that has failed at the front of the queue, once, and in one step: it may not be in neither place.
_QUEUE_AGAIN = """
if redis.call('ZREM', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('HSET', KEYS[2], 'status', ARGV[2])
redis.call('PERSIST', KEYS[2])
redis.call('LPUSH', KEYS[3], ARGV[1])
return 1
"""


class ServedJobs:
    """The served jobs of one evaluation queue."""

    def __init__(self, connection: Connection, queue: str) -> None:
        self.connection = connection
        self.queue = open_queue(connection, queue)
        self._prefix = f"assayer:{queue}:served"
        self._index = f"{self._prefix}:jobs"
        self._holds = f"{self._prefix}:holds"
        self._unheld = f"{self._prefix}:unheld"

    def submit(self, served: Served) -> int:
        """Queues a job, once, and returns how many wait before it."""
        key = Job.key_for(served.job)
        with self.connection.pipeline() as pipe:
            while True:
                try:
                    pipe.watch(key)
                    if pipe.exists(key):
                        return int(pipe.hget(key, _POSITION) or 0)
                    job = self.queue.create_job(
                        SERVE,
                        kwargs=served.to_json(),
                        job_id=served.job,
                        description=served.description,
                        timeout=served.alarm,
                        result_ttl=KEPT,
                        failure_ttl=KEPT,
                        retry=Retry(max=RETRIES_OF_RQ),
                    )
                    pipe.multi()
                    add(pipe, self.queue, job, served, time.time())
                    pipe.hset(key, _REQUEST, json.dumps(served.request))
                    pipe.zadd(self._index, {served.job: time.time()})
                    pipe.execute()
                    break
                except WatchError:
                    continue
        arrange(self.queue)
        position = int(self.connection.lpos(self.queue.key, served.job) or 0)
        self.connection.hset(key, _POSITION, position)
        return position

    def claim(self, key: str, job: str, content: str) -> tuple[str, bool]:
        """The job that a client's key stands for (``job``, the first time), and whether it was asked for with the same content."""
        name = f"{self._prefix}:key:{digest(key)}"
        said = json.dumps([job, digest(content)])
        before = self.connection.set(name, said, nx=True, get=True, ex=KEPT)
        first, same = json.loads(before or said)
        return first, same == digest(content)

    def release(self, key: str, job: str) -> None:
        """Lets a client's key stand for nothing again: its request was refused."""
        name = f"{self._prefix}:key:{digest(key)}"
        before = self.connection.get(name)
        if before and json.loads(before)[0] == job and not self.connection.exists(Job.key_for(job)):
            self.connection.delete(name)

    def position(self, job: str) -> int | None:
        """How many waited before a job when it was queued; None when it is not known."""
        told = self.connection.hget(Job.key_for(job), _POSITION)
        return None if told is None else int(told)

    def look(self, jobs: list[str]) -> list[Facts | None]:
        """What is known of each of these jobs; None of one that is none of ours, or is forgotten."""
        with self.connection.pipeline(transaction=False) as pipe:
            self._ask(pipe, jobs)
            told = pipe.execute() if jobs else []
        return [_facts(job, told[2 * i], told[2 * i + 1]) for i, job in enumerate(jobs)]

    async def look_at(self, connection: Connection, job: str) -> Facts | None:
        """As ``look``, of one job, by a client for an event loop: what is asked most takes no thread."""
        async with connection.pipeline(transaction=False) as pipe:
            self._ask(pipe, [job])
            told = await pipe.execute()
        return _facts(job, *told)

    def _ask(self, pipe: Connection, jobs: list[str]) -> None:
        for job in jobs:
            pipe.hmget(Job.key_for(job), "status", "created_at", "started_at", "ended_at", _REQUEST, _ANSWER)
            pipe.lpos(self.queue.key, job)

    def newest(self, start: int, count: int) -> list[str]:
        """Ids of jobs, the newest first."""
        return [job.decode() for job in self.connection.zrevrange(self._index, start, start + count - 1)]

    def forget_old(self) -> None:
        """Takes off the list what Redis has forgotten, and forgets the oldest that have ended where there are more than ``KNOWN_MAX``."""
        old = self.connection.zrangebyscore(self._index, 0, time.time() - KEPT, start=0, num=_FORGOTTEN_AT_ONCE)
        surplus = min(_FORGOTTEN_AT_ONCE, self.connection.zcard(self._index) - KNOWN_MAX)
        oldest = self.connection.zrange(self._index, 0, surplus - 1) if surplus > 0 else []
        ids = list(dict.fromkeys([*old, *oldest]))
        undelivered = self.connection.smembers(_undelivered(self.queue.name))
        with self.connection.pipeline(transaction=False) as pipe:
            for job in ids:
                pipe.exists(Job.key_for(job.decode()))
                pipe.hexists(Job.key_for(job.decode()), _ANSWER)
            told = pipe.execute() if ids else []
            for job, exists, has_ended in zip(ids, told[::2], told[1::2], strict=True):
                if not exists or (job in oldest and has_ended and job not in undelivered):
                    pipe.delete(Job.key_for(job.decode()))
                    pipe.zrem(self._index, job)
            pipe.execute()

    def waiting(self) -> list[str]:
        """Ids of the jobs that wait, in the order of the queue."""
        return self._known(self.connection.lrange(self.queue.key, 0, -1))

    def running(self) -> list[str]:
        """Ids of the jobs that workers have begun."""
        found = self.connection.zrange(self.queue.started_job_registry.key, 0, -1)
        return self._known([entry.rpartition(b":")[0] for entry in found])

    def _known(self, ids: list[bytes]) -> list[str]:
        # Ours have the form of a UUID, those of watches are digests.
        kept = [job.decode() for job in ids if len(job) == 36]
        scores = self.connection.zmscore(self._index, kept) if kept else []
        return [job for job, score in zip(kept, scores, strict=True) if score is not None]

    def length(self) -> int:
        """How many jobs wait in the queue, those of watches among them."""
        return int(self.connection.llen(self.queue.key))

    def ended(self) -> tuple[int, int]:
        """How many jobs have completed and how many have failed, of those that can still be asked for."""
        since = time.time() - KEPT
        words = ("completed", "failed", "cancelled")
        told = {word: set(self.connection.zrangebyscore(f"{self._prefix}:{word}", since, "+inf")) for word in words}
        # Those that RQ itself has given up have no answer.
        lost = set(self.connection.zrange(self.queue.failed_job_registry.key, 0, -1)).difference(*told.values())
        return len(told["completed"]), len(told["failed"]) + len(self._known(list(lost)))

    def cancel(self, job: str, force: bool, answer: dict[str, Any]) -> str:
        """``cancelled``: it waited and is taken off; ``running``: it runs (with ``force`` it is told to end); ``ended``; ``missing``."""
        keys = (Job.key_for(job), self.queue.key, CanceledJobRegistry(queue=self.queue).key)
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        words = (job, _REQUEST, JobStatus.CANCELED.value, now, _ANSWER, json.dumps(answer), KEPT, int(time.time()) + KEPT)
        told = self.connection.eval(_CANCEL_JOB, 3, *keys, *words, int(force), _CANCEL)
        return str(told.decode())

    def failure(self, job: str) -> str:
        """The last line of what a job raised that RQ itself counts as failed."""
        found = Job.fetch_many([job], connection=self.connection, serializer=self.queue.serializer)[0]
        result = found.latest_result() if found is not None else None
        lines = ((result.exc_string if result else None) or "").strip().splitlines()
        return printable(lines[-1])[:1000] if lines else "the job ended without an outcome"

    def deliver_again(self) -> None:
        """Queues the jobs again whose outcome could not be recorded; they are not evaluated a second time."""
        registry = self.queue.failed_job_registry.key
        for member in self.connection.smembers(_undelivered(self.queue.name)):
            job = member.decode()
            if not self.connection.exists(Job.key_for(job)):
                self.connection.srem(_undelivered(self.queue.name), job)
            else:
                self.connection.eval(_QUEUE_AGAIN, 3, registry, Job.key_for(job), self.queue.key, job, JobStatus.QUEUED.value)

    # Which holds were taken for served jobs: a job that ends without its own last step leaves its hold to the server.

    def note_hold(self, key: str, facts: dict[str, Any]) -> None:
        """Notes a hold by its key, with what it takes to find it again."""
        self.connection.hset(self._holds, key, json.dumps(facts))

    def note_unheld(self, job: str, note: str) -> bool:
        """Notes that a job waits without a hold, with what there is to say should its checkpoint vanish; True the first time."""
        put_notes(self.connection, {job: note})
        return bool(self.connection.sadd(self._unheld, job))

    def forget_unheld(self, job: str) -> None:
        """Takes a job off that list."""
        self.connection.srem(self._unheld, job)

    def unheld(self) -> list[Served]:
        """The jobs that wait without a hold, in the order of the queue; those that do not wait any more are taken off the list."""
        listed = {job.decode() for job in self.connection.smembers(self._unheld)}
        waiting = [job for job in self.waiting() if job in listed] if listed else []
        for job in listed.difference(waiting):
            self.forget_unheld(job)
        found = Job.fetch_many(waiting, connection=self.connection, serializer=self.queue.serializer)
        return [Served.from_json(job.kwargs) for job in found if job is not None]

    def holds(self) -> dict[str, dict[str, Any]]:
        """The holds that were noted, by key."""
        return {key.decode(): json.loads(facts) for key, facts in self.connection.hgetall(self._holds).items()}

    def forget_hold(self, key: str) -> None:
        """Takes a hold off the list."""
        self.connection.hdel(self._holds, key)


def _facts(job: str, told: list[bytes | None], position: int | None) -> Facts | None:
    status, created, started, ended, request, answer = [None if value is None else value.decode() for value in told]
    if status is None or request is None:
        return None
    return Facts(
        job,
        status,
        created or "",
        started or None,
        ended or None,
        json.loads(request),
        json.loads(answer) if answer else None,
        position,
    )


def answer(job: Job, told: dict[str, Any]) -> None:
    """Writes down what became of a job: ``status`` (completed, failed, cancelled), ``result``, ``metrics``, ``error``, and its times."""
    connection: Connection = job.connection
    with connection.pipeline() as pipe:
        pipe.hset(job.key, _ANSWER, json.dumps(told))
        ended = f"assayer:{job.origin}:served:{told['status']}"
        pipe.zadd(ended, {job.id: time.time()})
        pipe.zremrangebyscore(ended, 0, time.time() - KEPT)
        pipe.execute()


def note_undelivered(job: Job, undelivered: bool) -> None:
    """Notes that the record of a job is still to be written, or no longer."""
    connection: Connection = job.connection
    (connection.sadd if undelivered else connection.srem)(_undelivered(job.origin), job.id)


def _undelivered(queue: str | None) -> str:
    return f"assayer:{queue}:served:undelivered"


def is_cancelled(job: Job) -> bool:
    """True when a client has told this job to end."""
    connection: Connection = job.connection
    return bool(connection.hexists(job.key, _CANCEL))
