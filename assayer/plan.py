"""The noun of a watch: what one directory and one evaluator were asked to do, and its baseline, as one file on disk.

Plans live in the user's state directory, so that neither a shutdown nor a Redis that lost its data forgets what was already there when
a directory was first watched.
"""

import contextlib
import os
import re
import socket
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from assayer.errors import StateError
from assayer.files import digest, printable, private_directory, read_json, write_json
from assayer.refs import Reference

__all__ = ["Baseline", "Evaluator", "Merging", "Plan", "PlanStore", "host_name", "state_directory"]


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


class Baseline:
    """The checkpoints that were whole when a watch began, each by two marks: its listing's signature, and its weights' identity.

    A mark is 16 hexadecimal digits over the path below the watched directory and the one or the other, so that a directory that is given
    by another path keeps its baseline, and 200,000 checkpoints take some megabytes.
    """

    def __init__(self, marks: Iterable[str] = ()) -> None:
        """
        Raises:
            ValueError: one is no number of 16 hexadecimal digits.
        """
        # Sorted: sixteen bytes a checkpoint, and found by halving.
        self._marks = array("Q", sorted({int(mark, 16) for mark in marks}))

    @classmethod
    def of(cls, whole: Iterable[tuple[str, str, str]]) -> "Baseline":
        """Of path below the directory, signature and identity of each checkpoint."""
        return cls(_mark(kind, path, word) for path, *words in whole for kind, word in zip(_KINDS, words, strict=True))

    def has_signature(self, path: str, signature: str) -> bool:
        """True for a checkpoint that was there, and whose files have not been touched since."""
        return self._has("signature", path, signature)

    def has_identity(self, path: str, identity: str) -> bool:
        """True for a checkpoint that was there with these weights."""
        return self._has("identity", path, identity)

    def _has(self, kind: str, path: str, word: str) -> bool:
        if not self._marks:
            return False
        mark = int(_mark(kind, path, word), 16)
        place = bisect_left(self._marks, mark)
        return place < len(self._marks) and self._marks[place] == mark

    def __len__(self) -> int:
        return len(self._marks) // len(_KINDS)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Baseline) and self._marks == other._marks

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def name(self) -> str:
        """A digest of the marks; empty where there are none."""
        return digest(self._marks.tobytes())[:16] if self._marks else ""

    def to_json(self) -> list[str]:
        return [f"{mark:016x}" for mark in self._marks]


_KINDS = ("signature", "identity")


def _mark(kind: str, path: str, word: str) -> str:
    return digest(kind, path, word)[:16]


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
    latest_only: bool = False
    timeout: int = 86400
    retries: int = 2
    # The trackers that get a point for each record, as assayer.tracking writes them.
    track: list[dict[str, Any]] = field(default_factory=list)
    # What starts several processes for one evaluation (torchrun, accelerate; None: there is one), and how many where no GPUs tell.
    launcher: str | None = None
    gpus_per_eval: int = 1
    # How much of what waits is protected from deletion: checkpoints of a folder, bytes of it (None: any), free part of the file system.
    hold: int = 8
    hold_bytes: int | None = None
    hold_min_free: float = 0.1
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
    # The name of its baseline, which lies beside the plan, and how many checkpoints that has.
    baseline: str = ""
    there_before: int = 0

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

    def below(self, path: str) -> str:
        """A checkpoint's path as the baseline knows it: below the directory, whatever way that was given; of a pattern as it is."""
        return path if self.is_pattern else os.path.relpath(path, self.directory)

    def with_baseline(self, baseline: Baseline) -> "Plan":
        """The same plan, naming this baseline."""
        return replace(self, baseline=baseline.name, there_before=len(baseline))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Plan":
        if not isinstance(value["baseline"], str):
            raise TypeError("the baseline of an earlier version")
        merging = Merging(**value.get("merging", {}))
        return cls(**{**value, "evaluator": Evaluator.from_json(value["evaluator"]), "merging": merging})


class PlanStore:
    """The plans of this user, one JSON file each below ``<state>/watches``; the file name is the plan's id.

    Beside it lies its baseline, ``<id>-<name of the baseline>.marks``: it is large, and read once.
    """

    def __init__(self, state: Path) -> None:
        self.folder = private_directory(state / "watches")

    def path(self, plan_id: str) -> Path:
        return self.folder / f"{plan_id}.json"

    def read(self, plan_id: str) -> Plan | None:
        """The plan of this id, if there is one; what was read before is not read again while the file is the same."""
        path = self.path(plan_id)
        try:
            status = path.stat()
        except OSError:
            return None
        stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
        known = _read_plans.get(path)
        if known and known[0] == stamp:
            return known[1]
        value = read_json(path)
        try:
            plan = Plan.from_json(value) if value else None
        except (TypeError, KeyError, AttributeError):
            raise StateError(f"{printable(str(path))} is no plan that this version reads; remove it") from None
        _read_plans[path] = (stamp, plan)
        return plan

    def baseline(self, plan: Plan) -> Baseline:
        """The baseline of a plan.

        Raises:
            StateError: it is gone or damaged.
        """
        if not plan.baseline:
            return Baseline()
        path = self._baseline_path(plan)
        try:
            return Baseline(read_json(path))
        except (TypeError, ValueError):
            raise StateError(
                f"{printable(str(path))} is gone or damaged; give the watch of {printable(plan.directory)} again with --forget"
            ) from None

    def _baseline_path(self, plan: Plan) -> Path:
        return self.folder / f"{plan.id}-{plan.baseline}.marks"

    def write(self, plan: Plan, baseline: Baseline | None = None) -> None:
        """Writes a plan; its baseline goes first, unless it is there already."""
        try:
            path = self._baseline_path(plan)
            if plan.baseline and baseline is not None and not path.exists():
                write_json(path, baseline.to_json(), 0o600)
            write_json(self.path(plan.id), plan.to_json(), 0o600)
            if baseline is not None:
                for other in self.folder.glob(f"{plan.id}-*.marks"):
                    if other != path:
                        other.unlink(missing_ok=True)
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
                plan = self.read(path.stem)
                if plan is None:
                    yield f"{printable(str(path))} is damaged; remove it and give its watch again"
                elif plan.active:
                    self.baseline(plan)
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


# Plans as they were last read, by file: whoever looks after a thousand watches reads only what has changed.
_read_plans: dict[Path, tuple[tuple[int, int, int], Plan | None]] = {}
