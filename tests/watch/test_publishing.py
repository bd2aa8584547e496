"""A watch with ``--track``: each record is one point, whatever ends in between."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import House, until

# Notes every point on a line of its own; stops for as long as the file ``stop`` lies beside it.
TRACKER = """
import json, os, time

HERE = os.path.dirname(__file__)

def note(points):
    while os.path.exists(HERE + "/stop"):
        time.sleep(0.05)
    with open(HERE + "/points", "a") as file:
        for point in points:
            file.write(json.dumps([point.step, point.values, point.doubtful]) + "\\n")
"""


def _points(house: House) -> list[list[Any]]:
    path = house.root / "points"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _steps(house: House) -> list[int]:
    return sorted(step for step, _, _ in _points(house))


def _tracker(house: House) -> str:
    return f"{house.file('tracker.py', TRACKER)}:note"


def test_each_record_is_one_point_also_those_that_were_there_and_over_restarts(house: House) -> None:
    house.save("model_step1.pt", 1)
    house.once()
    house.save("model_step2.pt", 2)
    house.once("--track", _tracker(house))
    # The command has waited for its points.
    assert sorted(_points(house)) == [[1, {"eval/mean": 1.0}, False], [2, {"eval/mean": 2.0}, False]]
    house.watch("--track", _tracker(house))
    house.save("model_step3.pt", 3)
    until(lambda: _steps(house) == [1, 2, 3])
    # A path that is saved again is another point of its step.
    house.save("model_step3.pt", 30)
    until(lambda: [3, {"eval/mean": 30.0}, False] in _points(house))
    assert _steps(house) == [1, 2, 3, 3]


def test_a_tracker_that_hangs_delays_no_evaluation_and_its_points_come_after_the_watch_worker_was_killed(house: House) -> None:
    stop = house.file("stop", "")
    house.watch("--track", _tracker(house))
    house.save("model_step1.pt", 1)
    until(lambda: house.record("model_step1.pt"))
    house.save("model_step2.pt", 2)
    until(lambda: house.record("model_step2.pt"))
    (worker,) = house.workers("watch")
    os.kill(worker, signal.SIGKILL)
    stop.unlink()
    house.save("model_step3.pt", 3)
    until(lambda: set(_steps(house)) == {1, 2, 3}, 60)
    # What was under way in that moment may come twice to a function, and says so.
    assert [step for step, _, doubtful in _points(house) if not doubtful].count(3) == 1


def test_the_curve_of_tensorboard_lies_in_the_results_folder(house: House) -> None:
    pytest.importorskip("tensorboard")
    for step in (1, 2):
        house.save(f"model_step{step}.pt", step)
    house.once("--track", "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(Path(house.runs, "evals")))
    read.Reload()
    (tag,) = read.Tags()["tensors"] or read.Tags()["scalars"]
    assert tag == "eval/mean"


def test_a_tracker_that_is_none_is_an_error_before_anything_is_watched(house: House) -> None:
    done = house.once("--track", "tensorbord", check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "tensorboard" in done.stderr
    assert not house.status()["watches"]
