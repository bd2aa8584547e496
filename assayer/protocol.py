"""The messages of the LMMs-Eval server's protocol, as of lmms-eval 0.7, and of what this project adds <-> plain JSON.

Standard library only: the server imports it, and so does the client inside a training. A message that does not keep to the protocol is
refused as upstream's server does: ``ProtocolError`` with the status 422 and a list of ``{type, loc, msg, input}``. Unknown fields are
ignored, missing ones get upstream's defaults. To answer::

    try:
        request = EvaluateRequest.from_json(parse(body))
    except ProtocolError as error:
        return error.status, dump(error.to_json())
    return 200, dump(JobSubmitResponse.queued(job_id, position).to_json())

Beyond upstream are ``JobInfo.metrics``, ``EvaluateRequest.lmms_engine_kwargs`` (upstream drops it), ``JobList``, ``NotifyRequest``.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

from assayer.fields import (
    BOOLEAN,
    INTEGER,
    OBJECT,
    STRING,
    STRINGS,
    Location,
    Message,
    boolean,
    dictionary,
    dump,
    field_of,
    integer,
    integer_or_string,
    list_of,
    number,
    one_of,
    optional,
    parse,
    string,
)

__all__ = [
    "IDEMPOTENCY_KEY",
    "METRICS_FORM",
    "EvaluateRequest",
    "HealthResponse",
    "JobInfo",
    "JobList",
    "JobStatus",
    "JobSubmitResponse",
    "LmmsEngineKwargs",
    "MergeRequest",
    "MergeResponse",
    "Message",
    "MessageResponse",
    "NotifyRequest",
    "NotifyResponse",
    "QueueStatusResponse",
    "dump",
    "is_finished",
    "parse",
]

# The header of a submission: a second one under the same key is the same job, answered as the first was.
IDEMPOTENCY_KEY = "Idempotency-Key"

METRICS_FORM = """Finite numbers, or null for NaN and infinity, as in the results file: {task: {"<metric>,<filter>": number}}"""

CHECKPOINT_TYPES = ("regular", "ema")


class JobStatus(StrEnum):
    """How far a job is."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


def is_finished(status: str) -> bool:
    """True for a status that does not change any more."""
    return status in (JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED)


def _status(value: Any, loc: Location) -> JobStatus:
    return JobStatus(one_of(*JobStatus)(value, loc))


_STATUS: dict[str, Any] = {"type": "string", "enum": [str(word) for word in JobStatus]}
_CHECKPOINT_TYPE: dict[str, Any] = {"type": "string", "enum": list(CHECKPOINT_TYPES)}


@dataclass(frozen=True)
class LmmsEngineKwargs(Message):
    """What LMMs-Engine's trainer asks for besides: that the checkpoint be merged first, from its regular or EMA weights."""

    model_path: str | None = optional(string, STRING, "Checkpoint to merge; None: the one in model_args")
    checkpoint_type: str = field_of(one_of(*CHECKPOINT_TYPES), _CHECKPOINT_TYPE, "Weights to merge", "regular")
    output_path: str | None = optional(string, STRING, "Where the merged checkpoint is kept; None: it is not kept")


@dataclass(frozen=True)
class EvaluateRequest(Message):
    """POST /evaluate: one evaluation of one model on some tasks."""

    QUIET: ClassVar[frozenset[str]] = frozenset({"lmms_engine_kwargs"})

    model: str = field_of(string, STRING, "Model name")
    tasks: tuple[str, ...] = field_of(list_of(string), STRINGS, "Names of the tasks to evaluate")
    model_args: dict[str, Any] | None = optional(dictionary, OBJECT, "Model arguments")
    num_fewshot: int | None = optional(integer, INTEGER, "Number of few-shot examples")
    batch_size: int | str | None = optional(integer_or_string, {"anyOf": [INTEGER, STRING]}, "Batch size")
    device: str | None = optional(string, STRING, "Device to run on")
    limit: int | float | None = optional(number, {"anyOf": [INTEGER, {"type": "number"}]}, "Number, or fraction, of examples")
    gen_kwargs: str | None = optional(string, STRING, "Generation arguments")
    log_samples: bool = field_of(boolean, BOOLEAN, "Whether to keep each sample", True)
    predict_only: bool = field_of(boolean, BOOLEAN, "Only generate, without metrics", False)
    num_gpus: int = field_of(integer, INTEGER, "Number of GPUs to use", 1)
    output_dir: str | None = optional(string, STRING, "Directory for the results")
    lmms_engine_kwargs: LmmsEngineKwargs | None = optional(LmmsEngineKwargs.from_json, LmmsEngineKwargs.schema(), "Merge before evaluating")


@dataclass(frozen=True, kw_only=True)
class JobInfo(Message):
    """GET /jobs/{job_id}: one job. Times are ISO 8601."""

    job_id: str = field_of(string, STRING)
    status: JobStatus = field_of(_status, _STATUS)
    created_at: str = field_of(string, STRING)
    started_at: str | None = optional(string, STRING)
    completed_at: str | None = optional(string, STRING)
    request: EvaluateRequest = field_of(EvaluateRequest.from_json, EvaluateRequest.schema())
    result: dict[str, Any] | None = optional(dictionary, OBJECT, "{model: {results: a JSON file, samples: [JSONL files]}}")
    error: str | None = optional(string, STRING)
    position_in_queue: int | None = optional(integer, INTEGER)
    metrics: dict[str, Any] | None = optional(dictionary, OBJECT, METRICS_FORM)


@dataclass(frozen=True)
class JobSubmitResponse(Message):
    """What a submission is answered with."""

    job_id: str = field_of(string, STRING)
    status: JobStatus = field_of(_status, _STATUS)
    position_in_queue: int = field_of(integer, INTEGER, "Queued jobs before it, those that run not counted")
    message: str = field_of(string, STRING)

    @classmethod
    def queued(cls, job_id: str, position: int) -> "JobSubmitResponse":
        return cls(job_id, JobStatus.QUEUED, position, f"Job queued successfully. Position in queue: {position}")


@dataclass(frozen=True)
class JobList(Message):
    """GET /jobs?status=&limit=: jobs, the newest first."""

    jobs: tuple[JobInfo, ...] = field_of(list_of(JobInfo.from_json), {"type": "array", "items": JobInfo.schema()})


@dataclass(frozen=True)
class QueueStatusResponse(Message):
    """GET /queue."""

    queue_size: int = field_of(integer, INTEGER)
    running_job: str | None = optional(string, STRING, "One of the jobs that run")
    queued_jobs: tuple[str, ...] = field_of(list_of(string), STRINGS, default=())
    completed_jobs: int = field_of(integer, INTEGER, default=0)
    failed_jobs: int = field_of(integer, INTEGER, default=0)


@dataclass(frozen=True)
class HealthResponse(Message):
    """GET /health."""

    status: str = field_of(string, STRING)
    timestamp: str = field_of(string, STRING)
    queue_size: int = field_of(integer, INTEGER)


@dataclass(frozen=True)
class MergeRequest(Message):
    """POST /merge: merge a sharded checkpoint."""

    checkpoint_path: str = field_of(string, STRING, "Path of the sharded checkpoint")
    output_path: str | None = optional(string, STRING, "Where the merged checkpoint goes")
    checkpoint_type: str = field_of(one_of(*CHECKPOINT_TYPES), _CHECKPOINT_TYPE, "Weights to merge", "regular")


@dataclass(frozen=True)
class MergeResponse(Message):
    """What a merge is answered with."""

    success: bool = field_of(boolean, BOOLEAN)
    message: str = field_of(string, STRING)
    merged_path: str | None = optional(string, STRING)

    @classmethod
    def merged(cls, path: str) -> "MergeResponse":
        return cls(True, "Checkpoint merged successfully", path)


@dataclass(frozen=True)
class MessageResponse(Message):
    """What a cancellation is answered with."""

    message: str = field_of(string, STRING)


@dataclass(frozen=True)
class NotifyRequest(Message):
    """POST /notify: a hint that something new lies in a directory, so that its watch looks now."""

    directory: str = field_of(string, STRING, "Absolute path of the directory of checkpoints, or of one checkpoint in it")


@dataclass(frozen=True)
class NotifyResponse(Message):
    """What a hint is answered with."""

    message: str = field_of(string, STRING)
    watches: int = field_of(integer, INTEGER, "Watches that look now", 0)
