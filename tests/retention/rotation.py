"""A training that rotates its checkpoints in a directory that is watched, beside the same training with nobody looking on."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from conftest import House, until
from trainings import Order, Told, files_of

from assayer.queues.connect import target
from assayer.record import Place
from assayer.status import gather

# What --hold is by default: so many of the newest saves are evaluated although rotation took them while they waited. The one that is
# being evaluated counts too.
HELD = 8

PROGRAM = Path(__file__).with_name("trainings.py")
# What the watch knows to be whole.
KNOWN = ("queued", "running", "finished")
# Checkpoints that do not lie in the training's own directory.
_FIRST = {"accelerate": "checkpoints/checkpoint_0", **dict.fromkeys(("torchtitan", "early_torchtitan"), "checkpoint/step-1")}
# Evaluates nothing before it is told to, so that the queue is as long as the training; then it reads the weights for real.
EVALUATOR = """
import math, os, time
import torch
from safetensors.torch import load_file

def weigh(checkpoint_path):
    with open({begun!r}, "w") as begun:
        begun.write(os.path.basename(checkpoint_path))
    while not os.path.exists({gate!r}):
        time.sleep(0.02)
    if os.path.isdir(checkpoint_path):
        weights = load_file(os.path.join(checkpoint_path, "model.safetensors"))
    else:
        weights = torch.load(checkpoint_path, weights_only=True)["state_dict"]
    return {{"sum": math.fsum(weights[name].double().sum().item() for name in sorted(weights))}}
"""


class Scene:
    """A desk for the training and whoever looks on, and the directories that it trains in."""

    def __init__(self, house: House, trainer: str) -> None:
        self.house = house
        self.trainer = trainer
        self.desk = house.root / "desk"
        self.alone = house.root / "alone"
        self.begun = self.desk / "begun"
        self.gate = self.desk / "gate"
        self.results = Place.of(str(house.runs / _FIRST.get(trainer, "first")), "weigh").folder
        self.desk.mkdir()
        self.alone.mkdir()

    def train_watched(self, saves: int, folder: str = "", *more: object) -> tuple[Told, Told]:
        """The training without a watch, and with one of this folder in its directory; the last save comes after a resume."""
        evaluator = self.house.file("weigh.py", EVALUATOR.format(begun=str(self.begun), gate=str(self.gate)))
        directories = [str(self.alone), str(self.house.runs)]
        order = Order(self.trainer, directories, str(self.desk), watched=str(self.house.runs), first=saves - 1, last=saves)
        with _program(self.house, order) as program:
            words = ["--evaluator", f"{evaluator}:weigh", "--polling_interval", 1, "--wait_for_directory", "--detach", *more]
            self.house.command("watch", "--directory", self.house.runs / folder, *words)
            (self.desk / "begin").touch()
            number = 1
            while _next(program, self.desk / f"saved-{number}.json"):
                self._see(json.loads((self.desk / f"saved-{number}.json").read_text()))
                (self.desk / f"seen-{number}").touch()
                number += 1
        assert program.returncode == 0, said_by(self.house)
        told = _told(self.desk)
        return told[str(self.alone)], told[str(self.house.runs)]

    def train_beside_evals(self) -> tuple[Told, Told]:
        """The training in an empty directory, and in one where an earlier watch has left records and holds; nobody looks on."""
        for name in ("checkpoint-900", "checkpoint_900", "step-900", "epoch=899-step=900.ckpt", "last.ckpt"):
            self.house.file(str(self.results / f"{name}.json"), "{}")
            for file in (".metadata", "model.safetensors", "trainer_state.json"):
                self.house.file(str(self.results.parent / ".hold" / name / file), "held")
        with _program(self.house, Order(self.trainer, [str(self.alone), str(self.house.runs)], str(self.desk))) as program:
            pass
        assert program.returncode == 0, said_by(self.house)
        told = _told(self.desk)
        return told[str(self.alone)], told[str(self.house.runs)]

    def _see(self, names: list[str]) -> None:
        """Returns when a look that began now or later has found these checkpoints whole, and the first evaluation has begun."""
        now = time.time()
        until(lambda: self._is_seen(names, now), 60, f"{names} seen by the watch")
        until(self.running, 60, "the first evaluation")

    def running(self) -> str:
        """The name of the checkpoint that is being evaluated."""
        return self.begun.read_text() if self.begun.exists() else ""

    def _is_seen(self, names: list[str], since: float) -> bool:
        (watch,) = looked(self.house)["watches"]
        states = {Path(row["path"]).name: row["state"] for row in watch["checkpoints"]}
        return (watch["last_look"] or 0) > since and all(states.get(name) in KNOWN for name in names)

    def records(self) -> dict[str, dict[str, Any]]:
        """Every record by its file's name; what lies beside them may go at any moment, and is not looked at."""
        return {path.name: json.loads(path.read_text()) for path in self.results.glob("*.json")}

    def evaluate(self, told: Told) -> dict[str, dict[str, Any]]:
        """Lets the evaluations go; every record, by its file's name, once each checkpoint that was saved has its last one."""
        assert [name for name, record in self.records().items() if record["status"] == "finished"] == [], "all of them still wait"
        self.gate.touch()
        for name in told.saved:
            until(partial(self._is_settled, name, told), 60, f"the last record of {name}")
        return self.records()

    def _is_settled(self, name: str, told: Told) -> bool:
        record = self.records().get(f"{name}.json")
        # A path that was saved again first has the records of what it held before.
        return record is not None and (name not in told.counted or record["metrics"] == {"sum": told.saved[name][-1]})


def rotate(house: House, trainer: str, saves: int = 4, folder: str = "") -> list[str]:
    """The scene that every trainer plays; returns what the trainer counts as its checkpoints in the end."""
    scene = Scene(house, trainer)
    alone, watched = scene.train_watched(saves, folder)
    assert (scene.results.parent / ".hold").is_dir()
    assert_undisturbed(alone, watched)
    first = scene.running()
    records = scene.evaluate(watched)
    assert_told(watched, records)
    held = {first, *watched.order[1 - HELD :]}
    assert {name: records[f"{name}.json"]["status"] for name in held} == dict.fromkeys(held, "finished")
    until(lambda: os.listdir(scene.results.parent) == ["weigh"], what="every hold let go")
    assert files_of(house.runs) == alone.files, "the evaluations left nothing but what is below evals/"
    assert looked(house)["failed"] == []
    return watched.counted


def looked(house: House) -> dict[str, Any]:
    """What ``assayer status`` tells."""
    chosen = target(None, None, None, house.state)
    with house.connection() as connection:
        return gather(connection, house.state, chosen, ["watch", "evaluation"])


@contextmanager
def _program(house: House, order: Order) -> "Iterator[subprocess.Popen[bytes]]":
    words = [sys.executable, str(PROGRAM), json.dumps(asdict(order))]
    with (
        (house.root / "trained.log").open("wb") as log,
        subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=house.environment, cwd=house.root) as program,
    ):
        try:
            yield program
        except BaseException:
            program.kill()
            raise


def _next(program: "subprocess.Popen[bytes]", path: Path) -> bool:
    """True when the training has saved once more; False when it has ended."""
    until(lambda: path.exists() or program.poll() is not None, 60, path.name)
    return path.exists()


def _told(desk: Path) -> dict[str, Told]:
    return {name: Told(**value) for name, value in json.loads((desk / "told.json").read_text()).items()}


def said_by(house: House) -> str:
    return (house.root / "trained.log").read_text()


def assert_undisturbed(alone: Told, watched: Told) -> None:
    """The same checkpoints with the same files are left, all of them load, and nothing was said that is not said without a watch."""
    assert watched.saved == alone.saved
    assert watched.counted == alone.counted
    assert watched.files == alone.files
    assert watched.loaded == alone.loaded == {name: alone.saved[name][-1] for name in alone.counted}
    assert set(watched.said) - set(alone.said) == set()


def assert_told(watched: Told, records: dict[str, dict[str, Any]]) -> None:
    """Every checkpoint that was whole has a true record; one that was saved again under its name may have one of what it held before."""
    for name in watched.saved:
        expected = ["finished"] if name in watched.counted else ["finished", "vanished"]
        assert records[f"{name}.json"]["status"] in expected, records[f"{name}.json"]
    for file, record in records.items():
        name = Path(record["checkpoint"]).name
        assert file == f"{name}.json" or len(watched.saved[name]) > 1, f"{name} was saved once"
        if record["status"] == "finished":
            assert record["metrics"]["sum"] in watched.saved[name]
        elif record["status"] == "vanished":
            assert name not in watched.counted, record
        else:
            assert record["status"] == "superseded" and len(watched.saved[name]) > 1, record
