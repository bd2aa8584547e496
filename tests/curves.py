"""Runs with records, as evaluations leave them, for the tests of trackers."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from conftest import REPOSITORY

from assayer.publication import publish
from assayer.record import Place, Record, read
from assayer.tracking import parse

BASE = Record(
    checkpoint="",
    format="single_file",
    step=None,
    epoch=None,
    tokens=None,
    identity="",
    weights="regular",
    evaluator={"name": "accuracy"},
    status="finished",
)


class Run:
    """A directory of checkpoints with results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def evals(self) -> Path:
        return self.folder / "evals"

    def record(
        self,
        step: int | None,
        metrics: dict[str, Any],
        name: str | None = None,
        evaluator: str = "accuracy",
        results_dir: str | None = None,
        **more: Any,
    ) -> Path:
        """Writes a record as a worker does. Identities differ by step unless one is given; each ends a second after its step."""
        path = self.folder / (name or f"model_step{step}.pt")
        fields: dict[str, Any] = {
            "checkpoint": str(path),
            "step": step,
            "identity": f"{step or 0:032x}",
            "evaluator": {"name": evaluator},
            "metrics": metrics,
            "ended": f"2026-11-20T04:{(step or 0) // 60 % 60:02}:{(step or 0) % 60:02}.25+00:00",
        }
        made = replace(BASE, **(fields | more))
        place = Place.of(str(path), made.evaluator["name"], results_dir, made.weights)
        written = place.write(made)
        assert read(written) == made
        return written


def ledger_lines(run: Run, pattern: str) -> list[dict[str, Any]]:
    """The lines of the one ledger of this name."""
    (path,) = run.evals.glob(pattern)
    return [json.loads(line) for line in path.read_text().splitlines()]


# Ends the process as the worst moments do: when all is intended and nothing given; when all is given and nothing noted.
BEFORE = "publication.give = die"
AFTER = "ledger.Ledger.done = die"

_DIES = """
import json, os, signal, sys
from pathlib import Path
from assayer import ledger, publication, tracking

def die(*words, **more):
    os.kill(os.getpid(), signal.SIGKILL)

{patch}
publication.publish([Path(path) for path in json.loads(sys.argv[2])], tracking.parse(sys.argv[1], Path.cwd()))
"""


def killed(patch: str, target: str, *paths: Path) -> None:
    """Publishes these records in a process that kills itself where ``patch`` puts ``die``."""
    words = [sys.executable, "-c", _DIES.format(patch=patch), target, json.dumps([str(path) for path in paths])]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == -9, done.stderr


def published(target: str, *paths: Path, again: bool = False) -> tuple[int, int]:
    """Publishes these records here, without anything going wrong: how many points were given, and how many were there."""
    outcome = publish(paths, parse(target, REPOSITORY), again)
    assert outcome.errors == [], outcome.errors
    return outcome.published, outcome.present
