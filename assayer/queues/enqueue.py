"""One id a piece of work: an evaluation of one checkpoint's weights by one evaluator, as an RQ job of plain JSON."""

import json
import os
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from redis.exceptions import WatchError
from rq import Queue, Retry
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from assayer.files import digest, printable
from assayer.plan import Evaluator, Merging
from assayer.queues import Connection
from assayer.record import hold_key

__all__ = [
    "EVALUATE",
    "LOST_MAX",
    "PREFIX",
    "RETRIES_OF_RQ",
    "Task",
    "add",
    "arrange",
    "enqueue",
    "is_in_flight",
    "is_wanted",
    "job_id",
    "note_begun",
    "note_of",
    "note_served",
    "open_queue",
    "put_notes",
    "statuses",
]

# Functions of ours, by name: jobs of other RQ users on the same queue never start with this.
PREFIX = "assayer."
EVALUATE = "assayer.worker.eval_job.evaluate"

# Seconds that RQ's own alarm comes after the time limit that the job keeps by itself, for the merge and for the evaluation.
ALARM_MARGIN = 120
# Seconds after which Redis forgets who needed a merge or a hold.
SHARED_TTL = 30 * 86400
# Seconds that RQ keeps a finished and a failed job to be seen; the record is what counts.
RESULT_TTL = 86400
FAILURE_TTL = 7 * 86400
# Workers in a row that one job may take down. RQ's own count of retries is well beyond, so that this one decides; it has an end for a
# worker that cannot even begin the job, such as one without this package.
LOST_MAX = 5
RETRIES_OF_RQ = 20

# When an evaluation of each folder's checkpoints began last, and how long (seconds) that is remembered.
_SERVED = "assayer:served"
_SERVED_TTL = 86400
# Fields of ours in RQ's hash of a job: whose turn it takes, and its place among those of the same folder.
_FOLDER, _RANK = "assayer_folder", "assayer_rank"
# And whether an evaluation has begun that can be taken up again: it goes before all others.
_BEGUN = "assayer_begun"
# And what the watch has to say of it, such as that it is not protected from deletion.
_NOTE = "assayer_note"

_IN_FLIGHT = (JobStatus.QUEUED, JobStatus.STARTED, JobStatus.DEFERRED, JobStatus.SCHEDULED)


@dataclass(frozen=True)
class Task:
    """One evaluation to be done.

    ``timeout`` in seconds; ``not_before`` is the moment before which a record does not count as done; ``merges`` says that the checkpoint
    is to be merged first, since it is sharded or the evaluator reads Hugging Face directories only.
    """

    checkpoint: str
    format: str
    step: int | None
    epoch: float | None
    tokens: int | None
    identity: str
    evaluator: Evaluator
    results_dir: str | None
    timeout: int
    retries: int
    not_before: float = 0.0
    weights: str = "regular"
    merges: bool = False
    merging: Merging = field(default_factory=Merging)
    # The listing's signature when the identity was read.
    signature: str = ""
    # What takes turns with others in the queue, by default the checkpoint's own folder; and the watched directory.
    turn: str = ""
    root: str = ""
    # What starts several processes for this evaluation (None: there is one), and how many where no GPUs tell.
    launcher: str | None = None
    processes: int = 1
    # With --latest_only: the hash and the field in Redis that name the newest job that waits.
    newest: tuple[str, str] | None = None

    @property
    def id(self) -> str:
        return job_id(self.checkpoint, self.identity, self.evaluator.name, self.weights)

    @property
    def folder(self) -> str:
        """The folder of checkpoints that takes turns with others."""
        return self.turn or os.path.dirname(self.checkpoint)

    @property
    def merge_id(self) -> str:
        """The same for every evaluator of the same weights, merged in the same way."""
        how = (self.merging.dtype, self.merging.hf_config, self.merging.tokenizer, self.merging.key_map)
        return digest(self.checkpoint, self.identity, self.weights, *(word or "" for word in how))

    @property
    def hold_id(self) -> str:
        """The same for every evaluator of the same weights."""
        return hold_key(self.checkpoint, self.identity)

    @property
    def alarm(self) -> int:
        """Seconds after which RQ itself ends the job, which keeps its limit for the merge and for the evaluation by itself."""
        return self.timeout * (2 if self.merges else 1) + ALARM_MARGIN

    @property
    def shared(self) -> list[str]:
        """What this evaluation may have in common with others, and the last of them puts away: its hold and its merge."""
        return [self.hold_id, *([self.merge_id] if self.merges else [])]

    @property
    def description(self) -> str:
        weights = "" if self.weights == "regular" else f"the {self.weights} weights of "
        return f"evaluate {weights}{printable(os.path.basename(self.checkpoint))} with {self.evaluator.name}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        merging = Merging(**value.get("merging", {}))
        newest = tuple(value["newest"]) if value.get("newest") else None
        return cls(**{**value, "evaluator": Evaluator.from_json(value["evaluator"]), "merging": merging, "newest": newest})


def job_id(checkpoint: str, identity: str, evaluator: str, weights: str) -> str:
    """The id of the job that evaluates these weights, whoever queues it."""
    return digest(checkpoint, identity, evaluator, *([] if weights == "regular" else [weights]))


def open_queue(connection: Connection, name: str) -> Queue:
    """The RQ queue of this name, with JSON for arguments and results."""
    return Queue(name, connection=connection, serializer=JSONSerializer)


def statuses(connection: Connection, job_ids: list[str]) -> dict[str, str]:
    """The RQ status of each job that exists."""
    with connection.pipeline(transaction=False) as pipe:
        for job_id in job_ids:
            pipe.hget(Job.key_for(job_id), "status")
        found = pipe.execute()
    return {job_id: status.decode() for job_id, status in zip(job_ids, found, strict=True) if status}


def is_in_flight(status: str | None) -> bool:
    """True for the RQ status of a job that waits or runs."""
    return status in _IN_FLIGHT


def enqueue(queue: Queue, task: Task, guards: dict[str, str | None], newest_first: bool = False, begun: bool = False) -> bool:
    """Queues the task unless it is in flight already; all or nothing. ``arrange`` gives it its place.

    Args:
        queue: where to.
        task: what.
        guards: Redis keys and the field ``generation`` they must still hold (None: the key must only exist); a watch that was stopped
            or replaced in the meantime queues nothing.
        newest_first: among those of the same folder, a later step goes before an earlier one.
        begun: it was begun before and is taken up again, before all others.

    Returns:
        True when it was queued now.
    """
    connection: Connection = queue.connection
    key = Job.key_for(task.id)
    with connection.pipeline() as pipe:
        while True:
            try:
                pipe.watch(key, *guards)
                for guard, generation in guards.items():
                    if generation is None:
                        if not pipe.exists(guard):
                            return False
                    elif pipe.hget(guard, "generation") != generation.encode():
                        return False
                status = pipe.hget(key, "status")
                if status and is_in_flight(status.decode()):
                    return False
                meta = _meta(pipe.hget(key, "meta"))
                job = queue.create_job(
                    EVALUATE,
                    kwargs=task.to_json(),
                    job_id=task.id,
                    description=task.description,
                    timeout=task.alarm,
                    result_ttl=RESULT_TTL,
                    failure_ttl=FAILURE_TTL,
                    retry=Retry(max=RETRIES_OF_RQ),
                    meta=meta,
                )
                pipe.multi()
                pipe.delete(key)
                pipe.zrem(queue.failed_job_registry.key, task.id)
                pipe.zrem(queue.finished_job_registry.key, task.id)
                add(pipe, queue, job, task, _rank(task, newest_first), begun)
                pipe.execute()
                return True
            except WatchError:
                continue


def add(pipe: Connection, queue: Queue, job: Job, task: Task, rank: float, begun: bool = False) -> None:
    """Adds the commands that queue this job of the task's: what it shares with others, and its place among those of its folder."""
    for shared in task.shared:
        pipe.sadd(_shared_key(shared), task.id)
        pipe.expire(_shared_key(shared), SHARED_TTL)
    queue.enqueue_job(job, pipeline=pipe)
    pipe.hset(job.key, mapping={_FOLDER: _field(task.folder), _RANK: rank, _BEGUN: int(begun)})


def _rank(task: Task, newest_first: bool) -> float:
    """What jobs of one folder are sorted by; what has no number goes first, or with the newest first last."""
    number = task.step if task.step is not None else task.epoch
    place = -1.0 if number is None else float(number)
    return -place if newest_first else place


def _field(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


# Sorts a list of job ids: what was begun goes first; folders take turns, the one that was served longest ago first; within a folder by
# rank, then as they came. Jobs of others on the same queue count as one more folder, in their own order. A list that differs is written.
_ARRANGE = """
local ids = redis.call('LRANGE', KEYS[1], 0, -1)
local jobs, folders = {}, {}
for place, id in ipairs(ids) do
  local told = redis.call('HMGET', ARGV[1] .. id, ARGV[2], ARGV[3], ARGV[4])
  local folder = told[1] or ''
  local job = {id = id, place = place, rank = tonumber(told[2] or place), folder = folder, begun = told[3] == '1'}
  jobs[place] = job
  if not folders[folder] then
    folders[folder] = {served = tonumber(redis.call('HGET', KEYS[2], folder) or 0), jobs = {}}
  end
  table.insert(folders[folder].jobs, job)
end
for _, folder in pairs(folders) do
  table.sort(folder.jobs, function(a, b) if a.rank ~= b.rank then return a.rank < b.rank end return a.place < b.place end)
  for turn, job in ipairs(folder.jobs) do
    job.turn = turn
    job.served = folder.served
    job.first = folder.jobs[1].place
  end
end
table.sort(jobs, function(a, b)
  if a.begun ~= b.begun then return a.begun end
  if a.turn ~= b.turn then return a.turn < b.turn end
  if a.served ~= b.served then return a.served < b.served end
  if a.first ~= b.first then return a.first < b.first end
  return a.place < b.place
end)
local moved = 0
for place, job in ipairs(jobs) do
  if job.id ~= ids[place] then moved = moved + 1 end
end
if moved > 0 then
  redis.call('DEL', KEYS[1])
  for _, job in ipairs(jobs) do redis.call('RPUSH', KEYS[1], job.id) end
end
return moved
"""


def arrange(queue: Queue) -> int:
    """Puts the waiting jobs of a queue into their order, in one step, and returns how many have another place now.

    Folders of checkpoints take turns, so that one with 500 waiting does not starve one with a single one; what was begun before and can be
    taken up again goes first.
    """
    connection: Connection = queue.connection
    return int(connection.eval(_ARRANGE, 2, queue.key, _SERVED, Job.redis_job_namespace_prefix, _FOLDER, _RANK, _BEGUN))


def note_begun(job: Job) -> None:
    """Notes that this job can be taken up again where it is, should it come back to the queue."""
    connection: Connection = job.connection
    connection.hset(job.key, _BEGUN, 1)


def note_served(connection: Connection, task: Task) -> None:
    """Notes that it was the turn of this task's folder."""
    with connection.pipeline() as pipe:
        pipe.hset(_SERVED, _field(task.folder), time.time())
        pipe.expire(_SERVED, _SERVED_TTL)
        pipe.execute()


def put_notes(connection: Connection, notes: dict[str, str]) -> None:
    """Notes with waiting jobs, by id, what there is to say of them should their checkpoints vanish."""
    with connection.pipeline(transaction=False) as pipe:
        for waiting, note in notes.items():
            pipe.hset(Job.key_for(waiting), _NOTE, note)
        pipe.execute()


def note_of(job: Job) -> str:
    """What the watch has said of this job, as the rest of a sentence; empty when it has not."""
    connection: Connection = job.connection
    note = connection.hget(job.key, _NOTE)
    return f"; it was {note.decode(errors='replace')}" if note else ""


def _shared_key(name: str) -> str:
    return f"{PREFIX.rstrip('.')}:shared:{name}"


def is_wanted(connection: Connection, shared: str, done: str | None = None) -> bool:
    """True while a job waits or runs that needs this merge or hold; the job ``done``, which is at its end, no longer counts.

    Also True where ``done`` was not noted: then Redis has lost who needs it, and the next look decides.
    """
    if done is not None and not connection.srem(_shared_key(shared), done):
        return True
    jobs = [member.decode() for member in connection.smembers(_shared_key(shared))]
    return any(is_in_flight(status) for status in statuses(connection, jobs).values())


def _meta(stored: bytes | None) -> dict[str, Any]:
    """What an earlier run of the job left to be delivered: its outcome, when the record could not be written."""
    meta = json.loads(stored) if stored else {}
    return {"outcome": meta["outcome"]} if "outcome" in meta else {}
