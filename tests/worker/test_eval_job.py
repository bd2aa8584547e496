"""Eval jobs under a plain RQ worker: whatever the evaluator does ends in a record, and the worker takes the next job."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import until
from rq.job import Job

from assayer import formats, refs
from assayer.checkpoint import identity, list_path
from assayer.plan import Evaluator
from assayer.queues import Connection
from assayer.queues.enqueue import LOST_MAX, Task, enqueue, open_queue
from assayer.record import Place
from assayer.worker import hold

SOURCE = """
import os, sys, time, math

def good(path):
    return {"m": 1.0}

def crash(path):
    import ctypes
    ctypes.string_at(0)

def hang(path):
    time.sleep(100)

def leave(path):
    sys.exit(0)

def wrong(path):
    return {"m": "high"}

def nothing(path):
    pass

def nan(path):
    return {"m": math.nan}

def late(path):
    tries = path + ".tries"
    open(tries, "a").write("x")
    if os.path.getsize(tries) < 3:
        raise RuntimeError("not yet")
    return {"m": 3}

def overwrite(path):
    open(path, "r+b").write(b"PK")
    import torch
    torch.save({"w": torch.ones(5)}, path)
    return {"m": 1}

def peek(path, step, environment=None):
    return {"rank": int("RANK" in os.environ), "step": step, "job": int("SLURM_JOB_ID" in os.environ)}
"""


class Bench:
    """A checkpoint, a Redis, and RQ's own worker as anybody would start it."""

    def __init__(self, folder: Path, connection: Connection) -> None:
        import torch

        self.connection = connection
        self.checkpoint = folder / "run" / "model_step5.pt"
        self.checkpoint.parent.mkdir()
        torch.save({"w": torch.zeros(4)}, self.checkpoint)
        self.source = folder / "evals.py"
        self.source.write_text(SOURCE)
        self.queue = open_queue(connection, "evaluation")
        self.url = f"unix://{connection.connection_pool.connection_kwargs['path']}"

    def task(self, function: str, **fields: Any) -> Task:
        listing = list_path(str(self.checkpoint))
        form = formats.all_formats()["single_file"]
        evaluator = Evaluator(function, refs.parse(f"{self.source}:{function}", self.source.parent), fields.pop("arguments", {}))
        base = {"format": "single_file", "step": 5, "epoch": None, "tokens": None, "results_dir": None, "timeout": 60, "retries": 0}
        return Task(
            **{
                **base,
                "checkpoint": str(self.checkpoint),
                "identity": identity(listing, form.weights(listing)),
                "evaluator": evaluator,
                **fields,
            }
        )

    def work(self, **environment: str) -> str:
        import os

        command = [sys.executable, "-m", "rq.cli", "worker", "-u", self.url, "-S", "rq.serializers.JSONSerializer", "--burst", "evaluation"]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=90, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
        )
        return done.stdout + done.stderr

    def evaluate(self, function: str, **fields: Any) -> Any:
        """The record after RQ's worker has run the task."""
        task = self.task(function, **fields)
        assert enqueue(self.queue, task, {})
        said = self.work()
        record = Place.of(task.checkpoint, task.evaluator.name).find(task.identity)
        assert record, said
        return record


@pytest.fixture
def bench(tmp_path: Path, connection: Connection) -> Bench:
    return Bench(tmp_path, connection)


def test_metrics_are_recorded_with_all_that_is_known(bench: Bench) -> None:
    record = bench.evaluate("good")
    assert (record.status, record.metrics, record.step, record.attempts) == ("finished", {"m": 1.0}, 5, 1)
    assert record.evaluator["reference"] == f"{bench.source}:good"
    assert record.evaluator["source"] == refs.source_digest(refs.parse(f"{bench.source}:good", bench.source.parent))
    assert record.started < record.ended
    assert record.seconds["evaluate"] >= 0
    assert set(record.versions) >= {"python", "assayer", "torch"}
    job = Job.fetch(bench.task("good").id, connection=bench.connection, serializer="json")
    value: Any = job.return_value()
    assert value["metrics"] == {"m": 1.0}


@pytest.mark.parametrize(
    ("function", "status", "cause", "message"),
    [
        ("crash", "failed", "signal", "the evaluation was ended by signal SIGSEGV"),
        ("leave", "failed", "exit", "the evaluator called sys.exit(0)"),
        ("wrong", "failed", "evaluator", "the metric 'm' is a str, not a number"),
        ("nothing", "failed", "evaluator", "the evaluator returned None; it must return a mapping of metric names to numbers"),
        ("absent", "failed", "evaluator", "evals.py has no function 'absent'"),
    ],
)
def test_every_bad_end_is_a_record_with_its_cause(bench: Bench, function: str, status: str, cause: str, message: str) -> None:
    record = bench.evaluate(function)
    assert (record.status, record.error["cause"]) == (status, cause)
    assert message in record.error["message"]
    assert record.metrics == {}


def test_a_hang_is_a_timeout(bench: Bench) -> None:
    record = bench.evaluate("hang", timeout=1)
    assert (record.status, record.error["message"]) == ("timeout", "did not end within 1 s")


def test_nan_is_null_with_a_note(bench: Bench) -> None:
    record = bench.evaluate("nan")
    assert (record.status, record.metrics, record.notes) == ("finished", {"m": None}, ["m is nan"])
    json.loads(Place.of(str(bench.checkpoint), "nan").record.read_text(), parse_constant=lambda name: pytest.fail(name))


def test_the_worker_takes_the_next_job_after_each_bad_one(bench: Bench) -> None:
    for function in ("crash", "leave", "hang", "good"):
        enqueue(bench.queue, bench.task(function, timeout=1), {})
    bench.work()
    statuses = {f: Place.of(str(bench.checkpoint), f).find(bench.task(f).identity) for f in ("crash", "leave", "hang", "good")}
    assert {f: r.status for f, r in statuses.items() if r} == {"crash": "failed", "leave": "failed", "hang": "timeout", "good": "finished"}


def test_retries_are_kept_in_the_record_and_each_has_its_part_of_the_log(bench: Bench) -> None:
    record = bench.evaluate("late", retries=2)
    assert (record.status, record.attempts, record.metrics) == ("finished", 3, {"m": 3})
    log = Path(record.log).read_text()
    assert [line.split(",")[1].split(" on ")[0] for line in log.splitlines() if line.startswith("---")] == [
        " attempt 1",
        " attempt 2",
        " attempt 3",
    ]
    assert log.count("RuntimeError: not yet") == 2


def test_too_few_retries_end_as_failed(bench: Bench) -> None:
    record = bench.evaluate("late", retries=1)
    assert (record.status, record.attempts, record.error["message"]) == ("failed", 2, "RuntimeError: not yet")


def test_what_has_a_record_is_not_evaluated_again(bench: Bench) -> None:
    first = bench.evaluate("good")
    enqueue(bench.queue, bench.task("good"), {})
    bench.work()
    assert Place.of(str(bench.checkpoint), "good").find(first.identity) == first
    bench.connection.flushdb()
    enqueue(bench.queue, bench.task("good", not_before=2e9 * 2), {})
    bench.work()
    assert Place.of(str(bench.checkpoint), "good").find(first.identity) != first


def test_a_checkpoint_that_is_gone_is_recorded_as_vanished(bench: Bench) -> None:
    task = bench.task("good")
    enqueue(bench.queue, task, {})
    bench.checkpoint.unlink()
    bench.work()
    record = Place.of(task.checkpoint, "good").find(task.identity)
    assert record
    assert (record.status, record.attempts) == ("vanished", 0)


def test_a_checkpoint_that_changes_while_it_is_evaluated_publishes_no_metrics(bench: Bench) -> None:
    record = bench.evaluate("overwrite")
    assert (record.status, record.metrics) == ("superseded", {})
    assert not Place.of(str(bench.checkpoint), "overwrite").record.exists()


def test_a_checkpoint_that_changed_while_it_waited_is_not_evaluated(bench: Bench) -> None:
    import torch

    task = bench.task("good")
    enqueue(bench.queue, task, {})
    torch.save({"w": torch.ones(4)}, bench.checkpoint)
    bench.work()
    record = Place.of(task.checkpoint, "good").find(task.identity)
    assert record
    assert (record.status, record.attempts) == ("superseded", 0)


def test_a_job_that_took_five_workers_down_is_failed_for_it(bench: Bench) -> None:
    task = bench.task("good")
    enqueue(bench.queue, task, {})
    bench.connection.hset(Job.key_for(task.id), "meta", json.dumps({"runs": LOST_MAX - 1}))
    bench.work()
    assert Place.of(task.checkpoint, "good").find(task.identity).status == "finished"  # type: ignore[union-attr]
    again = bench.task("good", not_before=4e9)
    enqueue(bench.queue, again, {})
    bench.connection.hset(Job.key_for(task.id), "meta", json.dumps({"runs": LOST_MAX}))
    bench.work()
    record = Place.of(task.checkpoint, "good").find(task.identity)
    assert record
    assert (record.status, record.error["message"]) == (  # type: ignore[index]
        "failed",
        "5 workers in a row were lost while they evaluated this checkpoint",
    )


def test_results_that_cannot_be_written_are_kept_and_delivered_without_evaluating_again(bench: Bench) -> None:
    counted = bench.source.parent / "count.py"
    counted.write_text("def count(path):\n    open(path + '.count', 'a').write('x')\n    return {'m': 1}\n")
    evaluator = Evaluator("count", refs.parse(f"{counted}:count", counted.parent))
    task = bench.task("good", evaluator=evaluator)
    place = Place.of(task.checkpoint, "count")
    # A directory in the record's place refuses the rename, as a full or read-only disk would.
    place.record.mkdir(parents=True)
    enqueue(bench.queue, task, {})
    bench.work()
    job = Job.fetch(task.id, connection=bench.connection, serializer="json")
    assert job.meta["outcome"]["metrics"] == {"m": 1}
    place.record.rmdir()
    enqueue(bench.queue, task, {})
    bench.work()
    record = place.find(task.identity)
    assert record
    assert record.metrics == {"m": 1}
    assert Path(f"{task.checkpoint}.count").read_text() == "x"
    enqueue(bench.queue, bench.task("good", evaluator=evaluator, not_before=4e9), {})
    bench.work()
    assert Path(f"{task.checkpoint}.count").read_text() == "xx", "what was delivered is not delivered again"


def test_the_evaluator_sees_no_launchers_ranks(bench: Bench) -> None:
    enqueue(bench.queue, bench.task("peek"), {})
    bench.work(RANK="3", WORLD_SIZE="8", SLURM_JOB_ID="77")
    record = Place.of(str(bench.checkpoint), "peek").find(bench.task("peek").identity)
    assert record
    assert record.metrics == {"rank": 0, "step": 5, "job": 1}


def test_a_killed_work_horse_costs_no_attempt(bench: Bench) -> None:
    slow = bench.source.parent / "slow.py"
    slow.write_text(
        "import os, time\ndef slow(path):\n    open(path + '.pid', 'a').write(f'{os.getppid()} ')\n    time.sleep(2)\n    return {'m': 1}\n"
    )
    task = bench.task("good", evaluator=Evaluator("slow", refs.parse(f"{slow}:slow", slow.parent)))
    enqueue(bench.queue, task, {})
    noted = Path(f"{task.checkpoint}.pid")
    import os
    import signal
    import threading

    def kill() -> None:
        until(lambda: noted.exists() and noted.read_text())
        os.kill(int(noted.read_text().split()[0]), signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    bench.work()
    thread.join()
    record = Place.of(task.checkpoint, "slow").find(task.identity)
    assert record
    assert (record.status, record.attempts) == ("finished", 1)
    assert len(noted.read_text().split()) == 2


def test_of_a_directory_that_was_emptied_and_not_removed_the_checkpoint_has_vanished(bench: Bench, tmp_path: Path) -> None:
    """As a network file system leaves it, while a reader has a file open; ``superseded`` would be asked after for ever."""
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "checkpoint-5"
    path.mkdir()
    (path / "config.json").write_text("{}")
    save_file({"w": torch.zeros(4)}, path / "model.safetensors")
    found = formats.identify_path(str(path))
    assert found
    weights = identity(found.listing, ["model.safetensors"])
    task = replace(bench.task("good"), checkpoint=str(path), format=found.checkpoint.format, identity=weights)
    enqueue(bench.queue, task, {})
    for file in path.iterdir():
        file.unlink()
    (path / ".nfs0001").touch()
    bench.work()
    record = Place.of(str(path), "good").find(weights)
    assert record
    assert record.status == "vanished"


def test_what_another_watch_holds_beside_the_checkpoint_is_evaluated_also_where_results_go_elsewhere(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    task = replace(bench.task("good"), results_dir=str(tmp_path / "results"))
    found = formats.identify_path(task.checkpoint)
    assert found
    held = hold.take(found, task.identity, found.listing.signature(), ("regular",))
    assert held
    bench.checkpoint.unlink()
    enqueue(bench.queue, task, {})
    bench.work()
    record = Place.of(task.checkpoint, "good", task.results_dir).find(task.identity)
    assert record
    assert record.status == "finished"
    assert not held.folder.exists(), "and let go when nobody needs it any more"
