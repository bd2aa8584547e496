"""One call of an evaluator as plain data, so that a forked child, a launcher's rank and a command make the same one."""

import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from assayer import refs
from assayer.errors import EvaluatorError
from assayer.files import read_json, write_json
from assayer.progress import Binding, Progress, choose_point
from assayer.record import flatten
from assayer.refs import Reference
from assayer.worker.environ import is_launcher_variable

__all__ = ["Call", "Outcome", "clean_environment", "make"]

# Seconds between two writings of how far an evaluation is.
_REPORTS = 0.5


@dataclass(frozen=True)
class Call:
    """What an evaluator is called with.

    ``path`` is what it reads, ``original_path`` the checkpoint itself; ``output``, ``samples`` and ``progress`` are where a folder for its own
    files, its samples and its unfinished state may be made; ``reports`` is a file that tells how far it is (None: nobody asks).
    ``is_ambiguous`` says that the path alone does not tell which of the weights in it are meant.
    """

    reference: Reference
    name: str
    arguments: dict[str, Any]
    path: str
    original_path: str
    identity: str
    step: int | None
    weights: str
    source: str | None
    output: str
    samples: str
    progress: str
    reports: str | None = None
    is_ambiguous: bool = False

    def binding(self, world_size: int) -> Binding:
        """What must be the same for unfinished state to be taken up again."""
        return Binding(
            identity=self.identity,
            weights=self.weights,
            evaluator=self.name,
            source=self.source,
            arguments=self.arguments,
            world_size=world_size,
        )

    def point(self, world_size: int = 1) -> int | None:
        """The point from which this evaluation goes on, asked once for all its ranks; None: from the start."""
        return choose_point(Path(self.progress), self.binding(world_size), world_size)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Call":
        return cls(**{**value, "reference": Reference(**value["reference"])})


@dataclass(frozen=True)
class Outcome:
    """What an evaluator returned: metrics, a note for each that is not finite, and what it told of itself."""

    metrics: dict[str, float | int | None]
    notes: list[str]
    details: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def clean_environment() -> None:
    """Takes out of this process's environment what the launcher of the worker has told it of ranks and peers."""
    for name in [name for name in os.environ if is_launcher_variable(name)]:
        del os.environ[name]


def make(call: Call, rank: int = 0, world_size: int = 1, point: int | None = None) -> Outcome:
    """Imports the evaluator and calls it, in this process.

    Raises:
        EvaluatorError: it cannot be called so.
        AssayerError: it returned no metrics.
        Exception: whatever the evaluator raises.
    """
    sys.dont_write_bytecode = True
    function = refs.load(call.reference)
    named = list(inspect.signature(function).parameters)
    if call.is_ambiguous and "weights" not in named:
        raise EvaluatorError(
            f"{call.name} takes no parameter called weights, so that it would read the regular ones: add it, or give --merge auto"
        )
    details: dict[str, Any] = {}
    offered: dict[str, Callable[[], Any]] = {
        "step": lambda: call.step,
        "original_path": lambda: call.original_path,
        "weights": lambda: call.weights,
        "output_dir": lambda: _made(call.output),
        "samples_path": lambda: call.samples,
        "progress": lambda: Progress(
            Path(call.progress), call.binding(world_size), rank, world_size, point, _Reports(call.reports if rank == 0 else None)
        ),
        "details": lambda: details,
    }
    keywords = {name: value() for name, value in offered.items() if name in named[1:] and name not in call.arguments}
    returned = function(call.path, **call.arguments, **keywords)
    if rank != 0:
        return Outcome({}, [], {})
    metrics, notes = flatten(returned)
    return Outcome(metrics, notes, _plain(details, notes))


def _made(folder: str) -> str:
    Path(folder).mkdir(exist_ok=True)
    return folder


def _plain(details: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    try:
        json.dumps(details, allow_nan=False)
    except (TypeError, ValueError) as error:
        notes.append(f"details are left out, they are no JSON: {error}")
        return {}
    return details


class _Reports:
    """Writes how far an evaluation is to a file, now and then, and always at its end."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._next = 0.0

    def __call__(self, done: int, total: int | None) -> None:
        now = time.monotonic()
        if self._path is not None and (now >= self._next or done == total):
            self._next = now + _REPORTS
            write_json(Path(self._path), {"done": done, "total": total})


def read_reports(path: Path) -> dict[str, int | None]:
    """How far an evaluation is, as it has told last; empty when it has not."""
    told = read_json(path)
    if not isinstance(told, dict):
        return {}
    return {key: told.get(key) for key in ("done", "total") if isinstance(told.get(key), int)}
