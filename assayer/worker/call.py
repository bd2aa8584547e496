"""One call of an evaluator as plain data, so that a forked child, a launcher's rank and a command make the same one."""

import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from assayer import refs
from assayer.errors import EvaluatorError
from assayer.progress import Binding, Progress, choose_point
from assayer.record import flatten
from assayer.refs import Reference
from assayer.worker.environ import is_launcher_variable
from assayer.worker.reports import Reports

__all__ = ["Call", "Outcome", "clean_environment", "make"]


@dataclass(frozen=True)
class Call:
    """What an evaluator is called with.

    ``path`` is what it reads (None: there is no checkpoint), ``original_path`` the checkpoint itself; ``output``, ``samples`` (None:
    nowhere) and ``progress`` are where its own files, its samples and its unfinished state go; ``reports`` is a file that tells how far it
    is (None: nobody asks). ``is_ambiguous`` says that the path alone does not tell which of the weights in it are meant.
    """

    reference: Reference
    name: str
    arguments: dict[str, Any]
    path: str | None
    original_path: str | None
    identity: str
    step: int | None
    weights: str
    source: str | None
    output: str
    samples: str | None
    progress: str
    reports: str | None = None
    is_ambiguous: bool = False
    # How the checkpoint was merged into ``path``, where it was.
    merged_by: dict[str, Any] = field(default_factory=dict)

    def binding(self, world_size: int) -> Binding:
        """What must be the same for unfinished state to be taken up again."""
        return Binding(
            identity=self.identity,
            weights=self.weights,
            evaluator=self.name,
            source=self.source,
            arguments={**self.arguments, **{f"--{name}": value for name, value in self.merged_by.items()}},
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
        "progress": lambda: _progress(call, rank, world_size, point),
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


def _progress(call: Call, rank: int, world_size: int, point: int | None) -> Progress:
    reports = Reports(Path(call.reports)) if call.reports is not None and rank == 0 else None
    return Progress(Path(call.progress), call.binding(world_size), rank, world_size, point, reports)


def _plain(details: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    try:
        json.dumps(details, allow_nan=False)
    except (TypeError, ValueError) as error:
        notes.append(f"details are left out, they are no JSON: {error}")
        return {}
    return details
