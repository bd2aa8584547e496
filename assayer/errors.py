"""Every error that is raised on purpose, one tree.

::

    AssayerError            exit 1   what went wrong, where, what is allowed, what to do: one line
    ├── UsageError          exit 2   the command's own words cannot be carried out
    ├── EvaluatorError      exit 2   an evaluator's reference does not lead to a function
    ├── RedisError          exit 1   no Redis answers, or the embedded one cannot be started
    ├── ProtocolError       exit 1   a message is not what the LMMs-Eval protocol allows
    ├── ServerError         exit 1   an evaluation server refuses, or does not answer
    ├── StateError          exit 1   a directory or file of our own cannot be read, written or locked
    ├── TrackerError        exit 1   a tracker did not take points; publishing again repairs it
    └── CheckpointError     exit 1   a checkpoint's files are gone, unreadable or changed
        ├── RefusedError    exit 1   a pickle in it asks for what is not run
        └── UnreadableError exit 1   it could not be read this time: an error of the disk, or it changed meanwhile

A command prints one of these as one line and ends with its ``exit_code``; anything else is a bug and keeps its traceback.
"""

from typing import Any

__all__ = [
    "AssayerError",
    "CheckpointError",
    "EvaluatorError",
    "ProtocolError",
    "RedisError",
    "RefusedError",
    "ServerError",
    "StateError",
    "TrackerError",
    "UnreadableError",
    "UsageError",
]


class AssayerError(Exception):
    """Something that the user can mend; its text is one line."""

    exit_code = 1


class UsageError(AssayerError):
    """The command's flags or arguments are not allowed, or contradict each other."""

    exit_code = 2


class EvaluatorError(AssayerError):
    """An evaluator cannot be found, imported or called with the arguments given."""

    exit_code = 2


class RedisError(AssayerError):
    """No Redis answers at the place asked for, or the embedded server does not start."""


class ProtocolError(AssayerError):
    """A message is refused; ``status`` and ``detail`` (a sentence, or a list of ``{type, loc, msg, input}``) make the answer."""

    def __init__(self, detail: str | list[dict[str, Any]], status: int = 422) -> None:
        self.detail = detail
        self.status = status
        first = [f"{'.'.join(map(str, d['loc']))}: {d['msg']}" for d in detail] if isinstance(detail, list) else [detail]
        super().__init__("; ".join(first))

    @property
    def details(self) -> list[dict[str, Any]]:
        return self.detail if isinstance(self.detail, list) else []

    def to_json(self) -> dict[str, Any]:
        """The body of the answer, as FastAPI forms it."""
        return {"detail": self.detail}


class ServerError(AssayerError):
    """An evaluation server's answer is no success; ``status`` is that of HTTP, None where no answer came."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status

    @property
    def is_passing(self) -> bool:
        """True where the same request may well succeed later: no answer, a server's own error, too many requests."""
        return self.status is None or self.status >= 500 or self.status in (408, 425, 429)


class StateError(AssayerError):
    """A directory or file of assayer's own cannot be read, written or locked."""


class TrackerError(AssayerError):
    """A tracker is away, not installed, or has not taken what it was given."""


class CheckpointError(AssayerError):
    """A checkpoint's files are gone, unreadable, or not what they were."""


class RefusedError(CheckpointError):
    """A pickle asks for a call of a name that is not on the list of those that are known to be harmless."""


class UnreadableError(CheckpointError):
    """A checkpoint could not be read this time; another time may come to another end."""
