"""A training as far as its client can see: a run's directory with checkpoints in it, and what drives their evaluation."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conftest import until
from protocol_server import EvaluationServer

from assayer.client import AsyncEvaluation, Point
from assayer.client.courier import Patience

QUICK = Patience(first=0.01, most=0.05, absent=0.0)
GOOD = {"t": {"acc,none": 0.5}}


class Training:
    """Trainings of one run, one after another."""

    def __init__(self, run: Path, server: EvaluationServer) -> None:
        self.run, self.server = run, server
        self.evaluations: list[AsyncEvaluation] = []

    def start(self, **more: Any) -> AsyncEvaluation:
        config = {"server_url": self.server.url, "model": "m", "tasks": ["t"], "poll_interval": 0.02}
        self.evaluations.append(AsyncEvaluation(config, self.run, **{"patience": QUICK, **more}))
        return self.evaluations[-1]

    def save(self, step: int, text: str = "weights") -> Path:
        path = self.run / f"checkpoint-{step}" / "model.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path.parent

    @property
    def file(self) -> Path:
        return self.run / "evals" / "pending-evaluations"

    def states(self) -> list[str]:
        return [job["state"] for job in json.loads(self.file.read_text())["jobs"]] if self.file.exists() else []


@contextlib.contextmanager
def trainings(run: Path, server: EvaluationServer) -> Iterator[Training]:
    """Trainings whose threads have ended at the end of the block, also those that a server has kept waiting."""
    training = Training(run, server)
    try:
        yield training
    finally:
        server.hang.clear()
        server.let_go.set()
        for evaluation in training.evaluations:
            evaluation.close(30)


def come(evaluation: AsyncEvaluation, count: int = 1) -> list[Point]:
    """So many points, polled for, by step: in what order they come is the server's affair."""
    points: list[Point] = []

    def enough() -> bool:
        points.extend(evaluation.poll())
        return len(points) >= count

    until(enough)
    return sorted(points, key=lambda point: point.step)
