"""A training run that does nothing but write checkpoints, rewrite some in place and delete others, and keeps a journal of all that.

It runs as a process of its own and knows nothing of any watch. Each version of a checkpoint holds weights that no other has, so that a
record can be told to be of this version and no other. Run by ``faults``.
"""

import contextlib
import fcntl
import io
import json
import os
import random
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save as safetensors_bytes

from assayer import formats
from assayer.checkpoint import identity

__all__ = ["FILES", "KINDS", "Orders", "Run", "busy", "spoken"]

# What each kind's checkpoints are called.
KINDS = {"file": "model_step{}.pt", "hf": "checkpoint-{}", "dcp": "step-{}"}
# The files of those that are directories.
FILES = {"hf": ("config.json", "model.safetensors", "trainer_state.json"), "dcp": (".metadata", "__0_0.distcp")}
# How many checkpoints the first run keeps, and each of the others, by chance: the fewest go before their evaluation has begun.
KEPT_FIRST, KEPT = (2, 3), (2, 4, 12)


@dataclass(frozen=True)
class Run:
    """One experiment: where its checkpoints go, of which kinds, and the lock that is held while it is written to (or taken away)."""

    folder: str
    lock: str
    kinds: list[str]


@dataclass(frozen=True)
class Orders:
    """What a trainer is told: seconds between two of its acts (a mean), the longest pause within a save, and when to end."""

    runs: list[Run]
    journal: str
    stop: str
    seed: int
    pace: float
    slowest: float


@contextlib.contextmanager
def busy(lock: str, wait: bool = False) -> Iterator[bool]:
    """Holds a run's lock while the block runs; False when another holds it and is not waited for."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


class Trainer:
    """Writes and deletes, by chance of its seed."""

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self.chance = random.Random(orders.seed)
        self.journal = open(orders.journal, "a", buffering=1)
        self.number = 0
        self.present: dict[str, list[tuple[str, str]]] = {run.folder: [] for run in orders.runs}
        self.most = {run.folder: self.chance.choice(KEPT if run is not orders.runs[0] else KEPT_FIRST) for run in orders.runs}
        self.deleted: dict[str, list[tuple[str, str]]] = {run.folder: [] for run in orders.runs}

    def run(self) -> None:
        parent = os.getppid()
        for run in self.orders.runs:
            # One of every kind at once: also the shortest training has each.
            for kind in run.kinds:
                self._in(run, lambda run=run, kind=kind: self._save_new(run, kind))
        acts_at = 0.0
        while not os.path.exists(self.orders.stop) and os.getppid() == parent:
            if time.monotonic() > acts_at:
                run = self.chance.choice(self.orders.runs)
                self._in(run, lambda run=run: self._act(run))
                acts_at = time.monotonic() + min(5 * self.orders.pace, self.chance.expovariate(1 / self.orders.pace))
            time.sleep(0.05)

    def _in(self, run: Run, act: Any) -> None:
        with busy(run.lock) as free:
            if free:
                act()

    def _act(self, run: Run) -> None:
        present = self.present[run.folder]
        word = self.chance.choices(["new", "again", "delete", "touch"], [5, 2, 3, 1])[0]
        most = self.most[run.folder]
        if (word == "delete" and len(present) > min(3, most - 1)) or len(present) > most:
            # Retention takes the oldest, as a rule.
            self._delete(present.pop(0 if self.chance.random() < 0.7 else self.chance.randrange(len(present))))
        elif word == "again" and present:
            kind, path = self.chance.choice(present)
            self._save(kind, path)
        elif word == "touch" and present:
            self._touch(*self.chance.choice(present))
        else:
            self._save_new(run, self.chance.choice(run.kinds))

    def _save_new(self, run: Run, kind: str) -> None:
        path = os.path.join(run.folder, KINDS[kind].format(self.number + 1))
        if self.deleted[run.folder] and self.chance.random() < 0.15:
            # A name comes back after its checkpoint was deleted, as "best" does.
            kind, path = self.deleted[run.folder].pop()
        self._save(kind, path)
        self.present[run.folder].append((kind, path))

    def _save(self, kind: str, path: str) -> None:
        self.number += 1
        # Whole numbers up to 2**24 are exact in float32.
        value = float(self.number)
        self._note("begin", path, kind=kind, value=value)
        {"file": self._file, "hf": self._hf, "dcp": self._dcp}[kind](path, value)
        found = formats.identify_path(path)
        assert found is not None, path
        read = identity(found.listing, formats.of(found.checkpoint).weights(found.listing))
        self._note("whole", path, kind=kind, value=value, identity=read)

    def _file(self, path: str, value: float) -> None:
        """As ``torch.save`` writes over a file of the same name, but slowly."""
        buffer = io.BytesIO()
        torch.save(_weights(value), buffer)
        self._in_two(path, buffer.getvalue())

    def _hf(self, path: str, value: float) -> None:
        os.makedirs(path, exist_ok=True)
        Path(path, "config.json").write_text('{"model_type": "none"}')
        self._pause()
        self._in_two(os.path.join(path, "model.safetensors"), safetensors_bytes(_weights(value), {"format": "pt"}))
        self._pause()
        Path(path, "trainer_state.json").write_text(json.dumps({"global_step": int(path.rpartition("-")[2])}))

    def _dcp(self, path: str, value: float) -> None:
        with warnings.catch_warnings():
            # It says that this is one process; so it is.
            warnings.simplefilter("ignore")
            dcp.save({"model": _weights(value), "optim": {"w": torch.ones(8, 8)}}, checkpoint_id=path, no_dist=True)

    def _in_two(self, path: str, data: bytes) -> None:
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            self._pause()
            file.write(data[len(data) // 2 :])

    def _delete(self, checkpoint: tuple[str, str]) -> None:
        kind, path = checkpoint
        self._note("delete", path, kind=kind)
        if kind == "file":
            os.unlink(path)
        else:
            for name in FILES[kind]:
                os.unlink(os.path.join(path, name))
            # A stranger's file in the checkpoint would make this fail.
            os.rmdir(path)
        self.deleted[os.path.dirname(path)].append(checkpoint)
        self._note("deleted", path, kind=kind)

    def _touch(self, kind: str, path: str) -> None:
        """New times and the same weights: no new version. Of a distributed checkpoint, the file that must be its youngest."""
        os.utime({"file": path, "hf": os.path.join(path, "model.safetensors"), "dcp": os.path.join(path, ".metadata")}[kind])
        self._note("touch", path, kind=kind)

    def _pause(self) -> None:
        time.sleep(self.chance.uniform(0, self.orders.slowest))

    def _note(self, event: str, path: str, **more: object) -> None:
        self.journal.write(json.dumps({"at": time.time(), "event": event, "path": path, **more}) + "\n")


def _weights(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((8, 8), value), "b": torch.zeros(3)}


def spoken(orders: Orders) -> str:
    """The orders as the one word of this program's command line."""
    return json.dumps(asdict(orders))


def main() -> None:
    told = json.loads(sys.argv[1])
    trainer = Trainer(Orders(**{**told, "runs": [Run(**run) for run in told["runs"]]}))
    try:
        trainer.run()
    except Exception:
        trainer._note("error", "", error=traceback.format_exc())
        raise


if __name__ == "__main__":
    main()
