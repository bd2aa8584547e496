"""What is gathered while faults happen: the trainer's journal, the evaluator's ledger, and every record from its first moment on."""

import contextlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from conftest import House
from fake_trainer import KINDS
from redis.backoff import NoBackoff
from redis.retry import Retry

from assayer.plan import PlanStore
from assayer.queues.board import Board

__all__ = ["EVALUATOR", "Poller", "Sight", "Version", "read_lines", "versions_of"]

# The evaluator of a trial. It reads the weights before and, half of the time, also after its pause, as one that loads late does.
EVALUATOR = """
import json, os, random, time

def look(path, original_path, ledger, slowest, seed):
    run = f"{os.getpid()}-{time.time_ns()}"
    value = read(path)
    chance = random.Random(f"{seed} {value}")
    note(ledger, run=run, event="start", path=original_path, value=value, pid=os.getpid())
    # One in five takes long, so that whatever happens meanwhile has time to do harm.
    time.sleep(chance.uniform(0, slowest) * (5 if chance.random() < 0.2 else 1))
    if chance.random() < 0.5 and read(path) != value:
        raise ValueError("the weights changed while they were evaluated")
    note(ledger, run=run, event="end", path=original_path, value=value, pid=os.getpid())
    return {"value": value}

def read(path):
    if os.path.isdir(path):
        from safetensors import safe_open
        with safe_open(os.path.join(path, "model.safetensors"), "numpy") as file:
            return float(file.get_tensor("w")[0, 0])
    import torch
    return torch.load(path, weights_only=True)["w"][0, 0].item()

def note(ledger, **line):
    descriptor = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, (json.dumps(line | {"at": time.time()}) + "\\n").encode())
    os.close(descriptor)
"""

_TRAINERS_OWN = re.compile("|".join(pattern.replace(".", r"\.").format(r"\d+") for pattern in KINDS.values()))
# Seconds between two looks of the poller's.
_STEP = 0.1


@dataclass
class Version:
    """One save of one checkpoint: the weights that lay at ``path`` from ``whole`` until ``end`` (seconds since the epoch; None: still)."""

    path: str
    value: float
    begun: float
    identity: str = ""
    whole: float | None = None
    end: float | None = None
    deleted: float | None = None
    rewritten: float | None = None

    @property
    def name(self) -> str:
        return f"{os.path.basename(os.path.dirname(self.path))}/{os.path.basename(self.path)} version {self.value:g}"


@dataclass(frozen=True)
class Sight:
    """One content of one record file, when it was first seen."""

    at: float
    file: str
    inode: int
    checkpoint: str
    identity: str
    status: str
    ended: str
    value: float | None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal or ledger; one that a kill cut off is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def versions_of(journal: list[dict[str, Any]]) -> list[Version]:
    """Every save that the journal tells of, with what became of it."""
    made: list[Version] = []
    last: dict[str, Version] = {}
    for line in journal:
        before = last.get(line["path"])
        if line["event"] == "begin":
            if before and before.end is None:
                before.end = before.rewritten = line["at"]
            last[line["path"]] = Version(line["path"], line["value"], line["at"])
            made.append(last[line["path"]])
        elif line["event"] == "whole" and before:
            before.whole, before.identity = line["at"], line["identity"]
        elif line["event"] == "delete" and before:
            before.end = before.deleted = line["at"]
    return made


@dataclass
class Poller:
    """A thread that notes each record's contents over time, each look of the watches, and whatever should not be there."""

    house: House
    runs: dict[str, Path]
    results: list[Path]
    sights: list[Sight] = field(default_factory=list)
    looks: dict[str, set[float]] = field(default_factory=dict)
    problems: set[str] = field(default_factory=set)
    _known: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _connection: "redis.Redis | None" = None

    def __enter__(self) -> "Poller":
        self._thread = threading.Thread(target=self._go_round, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._thread:
            self._thread.join()

    def _go_round(self) -> None:
        turn = 0
        while not self._over.wait(_STEP):
            try:
                self.look_at_records()
                turn += 1
                if turn % 4 == 0:
                    self._look_at_looks()
                    self._look_for_strangers()
            except Exception as error:
                self.problems.add(f"the poller itself failed: {type(error).__name__}: {error}")

    def look_at_records(self) -> None:
        """Reads every record file that is new or has changed."""
        for folder in self.results:
            for path in _json_files(folder):
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    with open(path, "rb") as file:
                        status = os.fstat(file.fileno())
                        stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
                        if self._known.get(path) == stamp:
                            continue
                        text = file.read()
                    self._known[path] = stamp
                    self._note(path, stamp[0], text)

    def _note(self, path: str, inode: int, text: bytes) -> None:
        try:
            told = json.loads(text)
            value = told["metrics"].get("value")
            sight = Sight(time.time(), path, inode, told["checkpoint"], told["identity"], told["status"], told["ended"], value)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.problems.add(f"{path} held no whole record: {error}: {text[:80]!r}")
            return
        self.sights.append(sight)

    def _look_at_looks(self) -> None:
        server = self.house.server
        if self._connection is None:
            self._connection = redis.Redis(unix_socket_path=str(server.socket), socket_timeout=0.5, retry=Retry(NoBackoff(), 0))
        try:
            board = Board(self._connection, "watch")
            for plan in PlanStore(self.house.state).all():
                last = board.tick(plan.id).get("last")
                if last:
                    self.looks.setdefault(plan.directory, set()).add(last)
        except (redis.RedisError, OSError):
            pass

    def _look_for_strangers(self) -> None:
        for folder in self.runs.values():
            with contextlib.suppress(FileNotFoundError):
                for name in os.listdir(folder):
                    if name != "evals" and not _TRAINERS_OWN.fullmatch(name):
                        self.problems.add(f"{folder} holds {name}, which is not the trainer's")


def _json_files(folder: Path) -> Iterator[str]:
    """The JSON files in the folders of evaluators below this one."""
    for root, folders, files in os.walk(folder):
        # Hidden ones hold no records.
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.endswith(".json"):
                yield os.path.join(root, name)
