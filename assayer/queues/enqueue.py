"""One id a piece of work: an evaluation of one checkpoint's weights by one evaluator, as an RQ job of plain JSON."""

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any

from redis.exceptions import WatchError
from rq import Queue, Retry
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from assayer.files import digest, printable
from assayer.plan import Evaluator, Merging
from assayer.queues import Connection

__all__ = ["EVALUATE", "LOST_MAX", "PREFIX", "Task", "enqueue", "is_in_flight", "is_merge_wanted", "open_queue", "statuses"]

# Functions of ours, by name: jobs of other RQ users on the same queue never start with this.
PREFIX = "assayer."
EVALUATE = "assayer.worker.eval_job.evaluate"

# Seconds that RQ's own alarm comes after the time limit that the job keeps by itself, for the merge and for the evaluation.
ALARM_MARGIN = 120
# Seconds after which Redis forgets who needed a merge.
MERGE_TTL = 30 * 86400
# Seconds that RQ keeps a finished and a failed job to be seen; the record is what counts.
RESULT_TTL = 86400
FAILURE_TTL = 7 * 86400
# Workers in a row that one job may take down. RQ's own count of retries is well beyond, so that this one decides; it has an end for a
# worker that cannot even begin the job, such as one without this package.
LOST_MAX = 5
_RQ_RETRIES = 20

_IN_FLIGHT = (JobStatus.QUEUED, JobStatus.STARTED, JobStatus.DEFERRED, JobStatus.SCHEDULED)


@dataclass(frozen=True)
class Task:
    """One evaluation to be done.

    ``timeout`` in seconds; ``not_before`` is the moment before which a record does not count as done; ``merges`` says that the checkpoint
    is sharded and is to be merged first.
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

    @property
    def id(self) -> str:
        return digest(self.checkpoint, self.identity, self.evaluator.name, *([] if self.weights == "regular" else [self.weights]))

    @property
    def merge_id(self) -> str:
        """The same for every evaluator of the same weights, merged in the same way."""
        how = (self.merging.dtype, self.merging.hf_config, self.merging.tokenizer, self.merging.key_map)
        return digest(self.checkpoint, self.identity, self.weights, *(word or "" for word in how))

    @property
    def description(self) -> str:
        weights = "" if self.weights == "regular" else f"the {self.weights} weights of "
        return f"evaluate {weights}{printable(os.path.basename(self.checkpoint))} with {self.evaluator.name}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Task":
        merging = Merging(**value.get("merging", {}))
        return cls(**{**value, "evaluator": Evaluator.from_json(value["evaluator"]), "merging": merging})


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


def enqueue(queue: Queue, task: Task, guards: dict[str, str | None], at_front: bool = False) -> bool:
    """Queues the task unless it is in flight already; all or nothing.

    Args:
        queue: where to.
        task: what.
        guards: Redis keys and the field ``generation`` they must still hold (None: the key must only exist); a watch that was stopped
            or replaced in the meantime queues nothing.
        at_front: before those that wait.

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
                    timeout=task.timeout * (2 if task.merges else 1) + ALARM_MARGIN,
                    result_ttl=RESULT_TTL,
                    failure_ttl=FAILURE_TTL,
                    retry=Retry(max=_RQ_RETRIES),
                    meta=meta,
                )
                pipe.multi()
                pipe.delete(key)
                pipe.zrem(queue.failed_job_registry.key, task.id)
                pipe.zrem(queue.finished_job_registry.key, task.id)
                if task.merges:
                    pipe.sadd(_merge_key(task.merge_id), task.id)
                    pipe.expire(_merge_key(task.merge_id), MERGE_TTL)
                queue.enqueue_job(job, pipeline=pipe, at_front=at_front)
                pipe.execute()
                return True
            except WatchError:
                continue


def _merge_key(merge_id: str) -> str:
    return f"{PREFIX.rstrip('.')}:merge:{merge_id}"


def is_merge_wanted(connection: Connection, merge_id: str, done: str | None = None) -> bool:
    """True while a job waits or runs that needs this merge; the job ``done``, which is at its end, no longer counts."""
    if done is not None:
        connection.srem(_merge_key(merge_id), done)
    jobs = [member.decode() for member in connection.smembers(_merge_key(merge_id))]
    return any(is_in_flight(status) for status in statuses(connection, jobs).values())


def _meta(stored: bytes | None) -> dict[str, Any]:
    """What an earlier run of the job left to be delivered: its outcome, when the record could not be written."""
    meta = json.loads(stored) if stored else {}
    return {"outcome": meta["outcome"]} if "outcome" in meta else {}
