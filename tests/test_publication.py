"""A publication ends, says what went wrong, and loses no more than it must, whatever a tracker does and leaves running."""

import json
from pathlib import Path
from typing import Any

import pytest
from curves import Run, ledger_lines

from assayer.ledger import opened
from assayer.points import run_name
from assayer.publication import Outcome, publish, publish_apart
from assayer.tracking import Target, parse


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "exp1")


def function(tmp_path: Path, body: str, head: str = "") -> Target:
    """A function of the user's that first notes the steps of each call in ``calls``, a line each."""
    note = f"    with open({str(tmp_path / 'calls')!r}, 'a') as file:\n        print(json.dumps([p.step for p in points]), file=file)\n"
    (tmp_path / "my.py").write_text(f"import json\n{head}\ndef note(points):\n{note}{body}\n")
    return parse("my.py:note", tmp_path)


def calls(tmp_path: Path) -> list[list[int]]:
    path = tmp_path / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# A process that lives on in a session of its own, with every descriptor of its parent.
ORPHAN = "    import os, time\n    if os.fork() == 0:\n        os.setsid()\n        time.sleep(20)\n        os._exit(0)\n"


@pytest.mark.parametrize(
    "body",
    [
        "    import threading, time; threading.Thread(target=time.sleep, args=(20,)).start()",
        ORPHAN,
        "    import subprocess; subprocess.Popen(['sleep', '20'])",
        "    import atexit; atexit.register(print, 'bye')",
        "    import atexit, time; atexit.register(time.sleep, 20)",
        '    print(\'{"assayer": ["no"]}\', flush=True)',
    ],
    ids=["thread", "orphan", "process", "print at exit", "hang at exit", "print"],
)
def test_what_a_function_leaves_running_or_prints_is_no_fault_of_its_points(run: Run, tmp_path: Path, body: str) -> None:
    record = run.record(10, {"acc": 0.1})
    assert publish_apart([record], function(tmp_path, body), timeout=10) == Outcome(published=1)


def test_what_a_function_does_at_its_exit_is_done(run: Run, tmp_path: Path) -> None:
    target = function(tmp_path, f"    import atexit, pathlib; atexit.register(pathlib.Path({str(tmp_path / 'flushed')!r}).touch)")
    assert publish_apart([run.record(10, {"acc": 0.1})], target) == Outcome(published=1)
    assert (tmp_path / "flushed").exists()


def test_a_time_out_ends_also_where_a_process_of_another_session_holds_every_pipe(run: Run, tmp_path: Path) -> None:
    record = run.record(10, {"acc": 0.1})
    outcome = publish_apart([record], function(tmp_path, ORPHAN + "    time.sleep(600)"), timeout=2)
    assert outcome.is_late
    assert outcome.errors == [f"{tmp_path}/my.py:note took longer than 2 s; the next publication repairs it"]


def test_a_publication_that_gets_on_is_not_late_however_long_it_is(run: Run, tmp_path: Path) -> None:
    records = [run.record(step, {"acc": 0.1}) for step in range(350)]
    assert publish_apart(records, function(tmp_path, "    import time; time.sleep(1)"), timeout=3) == Outcome(published=350)


def test_a_publication_that_waits_for_another_says_so_before_its_time_is_over(run: Run, tmp_path: Path) -> None:
    record, target = run.record(10, {"acc": 0.1}), function(tmp_path, "    pass")
    with opened(run.evals / target.ledger, 1):
        (line,) = publish_apart([record], target, timeout=4).errors
    assert "is held by another publisher" in line


def test_what_was_given_before_a_tracker_hung_is_not_given_again(run: Run, tmp_path: Path) -> None:
    records = [run.record(step, {"acc": 0.1}) for step in range(120)]
    target = function(tmp_path, "    if points[0].step >= 50:\n        import os; os._exit(7)")
    outcome = publish_apart(records, target)
    assert outcome.errors == [f"{target}: a publication broke off: it ended with code 7"]
    assert publish(records, function(tmp_path, "    pass")).published == 70
    assert [(steps[0], len(steps)) for steps in calls(tmp_path)] == [(0, 50), (50, 70), (50, 50), (100, 20)]


def test_one_point_that_is_refused_keeps_no_other_from_its_tracker(run: Run, tmp_path: Path) -> None:
    target = function(tmp_path, "    if any(p.step == 20 for p in points):\n        raise ValueError('no number')")
    records = [run.record(step, {"acc": 0.1}) for step in range(10, 60, 10)]
    outcome = publish(records, target)
    assert outcome.published == 4
    assert outcome.errors == [f"{target}: {records[1]} is refused: ValueError: no number"]
    # What is new goes first, and alone: the refused one is tried again behind it.
    (tmp_path / "calls").unlink()
    outcome = publish([run.record(60, {"acc": 0.1})], target)
    assert (outcome.published, outcome.errors) == (1, [f"{target}: {records[1]} is refused: ValueError: no number"])
    assert calls(tmp_path) == [[60], [20]]
    # And it comes, once the tracker takes it.
    assert publish(records, function(tmp_path, "    pass")).published == 1


def test_three_that_are_refused_at_the_front_stop_a_publication_once(run: Run, tmp_path: Path) -> None:
    target = function(tmp_path, "    if any(p.step < 4 for p in points):\n        raise ValueError('no number')")
    records = [run.record(step, {"acc": 0.1}) for step in range(10)]
    assert publish(records, target).published == 0
    assert publish(records, target).published == 6


def test_a_tracker_that_is_away_is_not_asked_for_every_point(run: Run, tmp_path: Path) -> None:
    records = [run.record(step, {"acc": 0.1}) for step in range(50)]
    target = function(tmp_path, "    raise ConnectionError('away')")
    assert publish(records, target).errors == [f"{target}: ConnectionError: away"]
    assert len(calls(tmp_path)) < 15
    assert publish(records, function(tmp_path, "    pass")).published == 50


@pytest.mark.parametrize("metrics", [{"acc": 0.1, "loss": float("nan")}, {"acc": 0.1, "loss": 10**400}, {"acc": 0.1, "loss": "2.0"}])
def test_what_is_no_finite_number_in_a_record_is_passed_over(run: Run, tmp_path: Path, metrics: dict[str, Any]) -> None:
    path = run.record(10, {"acc": 0.1})
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, "metrics": metrics}))
    target = function(tmp_path, "    pass")
    assert publish([path, run.record(20, {"acc": 0.2})], target) == Outcome(published=2)
    assert [list(point["values"]) for line in ledger_lines(run, "*.ledger") for point in line.get("intend", [])] == [["eval/acc"]] * 2


def test_a_name_that_belongs_to_another_evaluator_is_spoken_of_once(run: Run, tmp_path: Path) -> None:
    target = function(tmp_path, "    pass")
    publish([run.record(10, {"acc": 0.1}, evaluator="val")], target)
    said = [publish([run.record(step, {"acc": 0.1}, evaluator="test") for step in steps], target).notes for steps in ((10, 20), (30,))]
    assert said == [["eval/acc belongs to the evaluator val: that of test is called eval/test/acc"], []]


@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_checkpoints_in_folders_of_their_own_are_one_curve(tmp_path: Path, is_elsewhere: bool) -> None:
    results = tmp_path / "results"
    results.mkdir()
    place = str(results) if is_elsewhere else None
    paths = [Run(tmp_path / "exp1" / f"step_{step:04}").record(step, {"acc": 0.1}, results_dir=place) for step in (1, 20)]
    target = function(tmp_path, "    pass")
    assert publish(paths, target) == Outcome(published=2)
    assert calls(tmp_path) == [[1, 20]]
    (ledger,) = (results if is_elsewhere else tmp_path / "exp1").rglob("*.ledger")
    assert run_name(ledger.parent).startswith("exp1")


def test_runs_that_are_called_like_checkpoints_stay_apart(tmp_path: Path) -> None:
    paths = [Run(tmp_path / "exp1" / f"iter{n}").record(100, {"acc": 0.1}) for n in (1, 2)]
    publish(paths, function(tmp_path, "    pass"))
    assert calls(tmp_path) == [[100], [100]]


def a_job(run: Run, step: int) -> Path:
    """A record as a server leaves it, beside that of the watch."""
    path = run.record(step, {"acc": 0.9})
    told = json.loads(path.read_text())
    job = path.with_name(path.name.replace(".json", "@job-0a1b2c3d.json"))
    job.write_text(json.dumps({**told, "details": {"job": "0a1b2c3d4e5f", "request": {}}}))
    path.unlink()
    return job


@pytest.mark.parametrize("is_job_first", [True, False])
def test_what_a_client_has_asked_for_takes_no_watch_its_point_and_the_other_way_round(run: Run, tmp_path: Path, is_job_first: bool) -> None:
    target = function(tmp_path, "    pass")
    paths = [a_job(run, 10), run.record(10, {"acc": 0.1})]
    for path in paths if is_job_first else reversed(paths):
        assert publish([path], target).published == 1
    assert publish(paths, target) == Outcome(present=2)


def test_a_watch_publishes_its_own_weights_and_no_job_of_a_server(run: Run, tmp_path: Path) -> None:
    target = function(tmp_path, "    pass")
    paths = [a_job(run, 10), run.record(10, {"acc": 0.1}), run.record(20, {"acc": 0.1}), run.record(10, {"acc": 0.2}, weights="ema")]
    assert publish(paths, target, watched="regular") == Outcome(published=2)
    assert publish(paths, target, watched="ema") == Outcome(published=1)
