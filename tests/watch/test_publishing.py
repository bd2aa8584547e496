"""A watch with ``--track``: each record is one point, whatever ends in between."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import House, until
from curves import Run
from samples import EVALUATOR
from samples import plan as a_plan

from assayer import publication
from assayer.ledger import opened
from assayer.plan import Plan
from assayer.queues import Connection
from assayer.queues.board import Board
from assayer.tracking import Target, parse
from assayer.watch import publishing
from assayer.watch.look import Look
from assayer.watch.publishing import Publisher
from assayer.watch.sights import SETTLED_MAX, Sights

pytestmark = pytest.mark.usefixtures("without_torch")

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
    house.save("best.pt", 3)
    done = house.once("--track", "tensorboard")
    assert done.stdout.splitlines()[-1] == "1 results have no step, and so no point on a curve, such as that of best.pt"
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


def function(folder: Path, name: str, body: str = "") -> dict[str, Any]:
    """A tracker that notes the steps of its points in ``<folder>/points``, but for those below the number in ``<folder>/refuse``."""
    lines = f"""
import pathlib
HERE = pathlib.Path({str(folder)!r})
def note(points):
{body}
    refuse = HERE / "refuse"
    if refuse.exists() and any(point.step <= int(refuse.read_text()) for point in points):
        raise ValueError("no")
    with open(HERE / "points", "a") as file:
        file.writelines(f"{{point.step}}\\n" for point in points)
"""
    (folder / f"{name}.py").write_text(lines)
    return parse(f"{name}.py:note", folder).to_json()


def points(folder: Path) -> list[int]:
    path = folder / "points"
    return sorted(map(int, path.read_text().split())) if path.exists() else []


def looked(publisher: Publisher, plan: Plan) -> bool:
    """True; the watch has had a look, and there was nothing new."""
    publisher.keep_up(plan, [])
    return True


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "exp1")


@pytest.fixture
def plan(run: Run, tmp_path: Path) -> Plan:
    """A watch of that run, whose tracker is a function."""
    return a_plan(directory=str(run.folder), evaluator=replace(EVALUATOR, name="accuracy"), track=[function(tmp_path, "works")])


@pytest.fixture
def publisher(monkeypatch: pytest.MonkeyPatch) -> Publisher:
    """One that loses its patience soon."""
    monkeypatch.setattr(publication, "TIMEOUT", 3.0)
    monkeypatch.setattr(publishing, "PAUSE", 0.2)
    return Publisher()


def test_a_record_that_was_not_noted_comes_by_itself_once_the_hindrance_is_over(
    run: Run, plan: Plan, publisher: Publisher, tmp_path: Path
) -> None:
    target = Target.from_json(plan.track[0])
    publisher.keep_up(plan, [])
    until(lambda: not publisher.is_busy(plan))
    checkpoint = run.folder / "model_step1.pt"
    run.record(1, {"acc": 0.1})
    with opened(run.evals / target.ledger, 1):
        publisher.keep_up(plan, [str(checkpoint)])
        until(lambda: "is held by another publisher" in publisher.problem(plan))
        assert points(tmp_path) == []
    # No further checkpoint is needed.
    until(lambda: looked(publisher, plan) and points(tmp_path) == [1])
    until(lambda: not publisher.problem(plan))


def test_a_new_record_does_not_wait_for_the_pause_after_an_error(
    run: Run, plan: Plan, publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "PAUSE", 600.0)
    bad = run.record(1, {"acc": 0.1})
    (tmp_path / "refuse").write_text("1")
    run.record(2, {"acc": 0.1})
    publisher.keep_up(plan, [])
    until(lambda: "is refused" in publisher.problem(plan))
    run.record(3, {"acc": 0.1})
    publisher.keep_up(plan, [str(run.folder / "model_step3.pt")])
    until(lambda: points(tmp_path) == [2, 3] and not publisher.is_busy(plan))
    assert str(bad) in publisher.problem(plan), "that one is still missing"
    (tmp_path / "refuse").unlink()
    assert publisher.try_again(plan)
    until(lambda: not publisher.is_busy(plan))
    assert (points(tmp_path), publisher.problem(plan)) == ([1, 2, 3], "")
    assert not publisher.try_again(plan)


def test_a_target_that_hangs_delays_no_other_and_is_left_alone_for_a_while(
    run: Run, plan: Plan, publisher: Publisher, tmp_path: Path
) -> None:
    hanging = replace(plan, track=[function(tmp_path, "hangs", "    import time; time.sleep(600)"), *plan.track])
    others = [replace(hanging, given=float(n), directory=f"{plan.directory}/{n}") for n in range(20)]
    run.record(1, {"acc": 0.1})
    for other in others:
        Run(Path(other.directory)).record(1, {"acc": 0.1})
    for one in [hanging, *others]:
        publisher.keep_up(one, [])
    until(lambda: points(tmp_path) == [1] * 21)
    assert publisher.is_busy(hanging), "the one that hangs has still some time"
    # One of them has waited for it, and none of the others does.
    until(lambda: not any(publisher.is_busy(one) for one in [hanging, *others]), 10)
    assert all("took longer than 3 s" in publisher.problem(one) for one in others)
    assert not any(publisher.try_again(one) for one in others)


def test_in_a_folder_of_results_that_others_share_a_watch_takes_its_own(run: Run, plan: Plan, publisher: Publisher, tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    for step, one in enumerate([run, Run(tmp_path / "exp10"), Run(tmp_path / "other" / "exp1")]):
        one.record(step, {"acc": 0.1}, results_dir=str(results))
        one.record(step, {"acc": 0.2}, results_dir=str(results), weights="ema")
    publisher.keep_up(replace(plan, results_dir=str(results)), [])
    until(lambda: points(tmp_path) == [0])
    publisher.keep_up(replace(plan, results_dir=str(results), weights="ema"), [])
    until(lambda: points(tmp_path) == [0, 0])
    assert len(list(results.glob("*/*.ledger"))) == 1


def test_all_that_finish_within_one_look_are_ordered(connection: Connection) -> None:
    sights, many = Sights(), SETTLED_MAX["good"] + 50
    states = {f"/r/m_step{n}.pt": {"state": "finished", "ended": float(n), "name": f"m_step{n}.pt"} for n in range(many)}
    sights.publish(Board(connection, "watch"), "p", states, Look((), (), missing=False, final=False, began=1.0))
    assert len(sights.finished) == many


def test_a_watch_that_ends_without_all_of_its_points_says_so_and_ends_with_1(house: House) -> None:
    house.save("model_step1.pt", 1)
    house.file("tracker.py", "def note(points):\n    raise ConnectionError('no route')\n")
    done = house.once("--track", f"{house.root}/tracker.py:note", check=False)
    assert done.returncode == 1
    assert "all is well" not in done.stdout
    last = done.stdout.splitlines()[-1]
    assert last.startswith("points are missing; assayer.results publish gives them: ") and last.endswith("ConnectionError: no route")
    # Mended, the same watch gives them, and is content.
    assert house.once("--track", _tracker(house)).returncode == 0
    assert _steps(house) == [1]
