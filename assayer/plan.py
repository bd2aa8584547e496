"""The noun of a watch: what one directory and one evaluator were asked to do, and its baseline, as one file on disk.

Plans live in the user's state directory, so that neither a shutdown nor a Redis that lost its data forgets what was already there when
a directory was first watched.
"""

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from assayer.errors import StateError
from assayer.files import digest, printable, private_directory, read_json, write_json
from assayer.refs import Reference

__all__ = ["Evaluator", "Mark", "Merging", "Plan", "PlanStore", "host_name", "state_directory"]


def state_directory() -> Path:
    """The folder of assayer's own state: ``$XDG_STATE_HOME/assayer``, by default ``~/.local/state/assayer``; made when missing."""
    root = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return private_directory(Path(root).absolute() / "assayer")


def host_name() -> str:
    """This machine's name, as it appears in paths, worker names and records."""
    return re.sub(r"[^\w.-]", "_", socket.gethostname()) or "localhost"


@dataclass(frozen=True)
class Evaluator:
    """A user's function with the name under which its results lie, and the keywords that it gets."""

    name: str
    reference: Reference
    arguments: dict[str, Any] = field(default_factory=dict)
    source: str | None = None

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Evaluator":
        return cls(**{**value, "reference": Reference(**value["reference"])})


@dataclass(frozen=True)
class Merging:
    """How a sharded checkpoint reaches the evaluator: merged into a scratch directory, or with ``mode`` "never" as it lies there.

    Paths are absolute; ``scratch_dir`` None stands for the worker's temporary directory, ``scratch_bytes`` None for no budget.
    """

    mode: str = "auto"
    dtype: str = "keep"
    hf_config: str | None = None
    tokenizer: str | None = None
    key_map: str | None = None
    scratch_dir: str | None = None
    scratch_bytes: int | None = None


@dataclass(frozen=True)
class Mark:
    """How a checkpoint of the baseline is known again: by its listing's signature, or else by its weights' identity."""

    signature: str
    identity: str


@dataclass(frozen=True)
class Plan:
    """One watch: a directory (or pattern) and an evaluator. Times are seconds since the epoch, intervals seconds."""

    directory: str
    evaluator: Evaluator
    # Which of a checkpoint's weights: regular, or ema.
    weights: str = "regular"
    merging: Merging = field(default_factory=Merging)
    # The directory without symbolic links; what is shown and recorded is the path as it was given.
    real: str = ""
    is_pattern: bool = False
    regex_filter: str | None = None
    max_depth: int = 3
    polling_interval: float = 5.0
    quiet_period: float = 30.0
    order: str = "oldest"
    every: int | None = None
    timeout: int = 86400
    retries: int = 2
    results_dir: str | None = None
    once: bool = False
    until_idle: float | None = None
    until_step: int | None = None
    until_file: str | None = None
    # Records that ended before this moment do not count as done: all of them, or the failed ones.
    reevaluate_before: float | None = None
    retry_failed_before: float | None = None
    watch_queue: str = "watch"
    eval_queue: str = "evaluation"
    # Which Redis the watch runs on, without its password, and the host whose state directory holds the plan.
    redis: str = ""
    host: str = ""
    given: float = 0.0
    detached: bool = False
    active: bool = True
    baseline: dict[str, Mark] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The same directory, evaluator's name and weights are the same watch, whatever its other flags."""
        return digest(self.real or self.directory, self.label)[:16]

    @property
    def label(self) -> str:
        """The evaluator's name as it is shown; of a moving average's weights with ``@ema``."""
        return self.evaluator.name if self.weights == "regular" else f"{self.evaluator.name}@{self.weights}"

    @property
    def root(self) -> str:
        """The directory itself, or of a pattern what stands before its first wildcard: paths are shown below it."""
        return os.path.dirname(re.split(r"[*?\[]", self.directory, maxsplit=1)[0]) if self.is_pattern else self.directory

    @property
    def ends(self) -> bool:
        """True when this watch is to end by itself."""
        return self.once or self.until_idle is not None or self.until_step is not None or self.until_file is not None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Plan":
        baseline = {path: Mark(**mark) for path, mark in value["baseline"].items()}
        merging = Merging(**value.get("merging", {}))
        return cls(**{**value, "evaluator": Evaluator.from_json(value["evaluator"]), "merging": merging, "baseline": baseline})


class PlanStore:
    """The plans of this user, one JSON file each below ``<state>/watches``; the file name is the plan's id."""

    def __init__(self, state: Path) -> None:
        self.folder = private_directory(state / "watches")

    def path(self, plan_id: str) -> Path:
        return self.folder / f"{plan_id}.json"

    def read(self, plan_id: str) -> Plan | None:
        value = read_json(self.path(plan_id))
        try:
            return Plan.from_json(value) if value else None
        except (TypeError, KeyError, AttributeError):
            raise StateError(f"{printable(str(self.path(plan_id)))} is no plan that this version reads; remove it") from None

    def write(self, plan: Plan) -> None:
        try:
            write_json(self.path(plan.id), plan.to_json(), 0o600)
        except OSError as error:
            raise StateError(f"cannot write the plan {printable(str(self.path(plan.id)))}: {error.strerror}") from None

    def all(self) -> Iterator[Plan]:
        """The plans that can be read; one that is damaged hinders no other (see ``unreadable``)."""
        for path in sorted(self.folder.glob("*.json")):
            with contextlib.suppress(StateError):
                plan = self.read(path.stem)
                if plan:
                    yield plan

    def unreadable(self) -> Iterator[str]:
        """A sentence for each file that should be a plan and is none."""
        for path in sorted(self.folder.glob("*.json")):
            try:
                if self.read(path.stem) is None:
                    yield f"{printable(str(path))} is damaged; remove it and give its watch again"
            except StateError as error:
                yield str(error)

    def active(self, redis: str) -> Iterator[Plan]:
        """The running watches of this host on the Redis of this name."""
        return (p for p in self.all() if p.active and p.host == host_name() and p.redis == redis)

    def stop(self, plan_id: str, given: float | None = None) -> None:
        """Marks a plan as not running; its baseline stays. With ``given``, only that very command's plan."""
        plan = self.read(plan_id)
        if plan and plan.active and (given is None or plan.given == given):
            self.write(replace(plan, active=False))
