"""Faults at the one moment that chance seldom hits: a queue lost under an evaluation, a job in nobody's hands, a lock of the dead."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import House, until
from injuries import Scene
from rq.scheduler import RQScheduler

from assayer.queues import Connection
from assayer.queues.enqueue import open_queue
from assayer.queues.recover import free_scheduler_lock

pytestmark = pytest.mark.usefixtures("without_torch")


def test_a_queue_that_is_lost_under_a_running_evaluation_makes_no_second_record(house: House) -> None:
    begun = house.root / "begun"
    source = f"""
import os, time

def patient(path):
    with open({str(begun)!r}, "a") as file:
        file.write("x")
        which = file.tell()
    while not os.path.exists({str(house.root)!r} + f"/end{{which}}"):
        time.sleep(0.05)
    return {{"pid": os.getpid()}}
"""
    house.watch("--num_eval_workers", 2, evaluator=f"{house.file('patient.py', source)}:patient")
    until(lambda: len(house.workers("eval")) == 2)
    house.save("model_step1.pt")
    until(begun.exists)
    house.connection().flushdb()
    # The watch finds it again, and nothing says that it is being evaluated.
    queue = open_queue(house.connection(), "evaluation")
    until(lambda: queue.started_job_registry.count or len(queue) or len(begun.read_text()) > 1)
    time.sleep(1)
    (house.root / "end1").touch()
    first = until(lambda: house.record("model_step1.pt", "patient"))
    (house.root / "end2").touch()
    until(lambda: not queue.started_job_registry.count and not len(queue) and not any(map(_scene(house).pids, ("work horse", "evaluator"))))
    assert house.record("model_step1.pt", "patient") == first


def test_what_was_held_is_evaluated_although_it_was_deleted_and_redis_lost_all_that_waited(house: House) -> None:
    source = f"""
import os, time
from evaluator import mean

def gated(path):
    while not os.path.exists({str(house.root / "go")!r}):
        time.sleep(0.05)
    return mean(path)
"""
    house.watch(evaluator=f"{house.file('gated.py', source)}:gated")
    paths = [house.save(f"model_step{step}.pt", step) for step in (1, 2)]
    holds = house.runs / "evals" / ".hold"
    queue = open_queue(house.connection(), "evaluation")
    until(lambda: queue.started_job_registry.count == 1 and len(queue) == 1)
    for path in paths:
        path.unlink()
    house.connection().flushdb()
    (house.root / "go").touch()
    until(lambda: len(house.records()) == 2)
    assert [(record["status"], record["metrics"]) for _, record in sorted(house.records().items())] == [
        ("finished", {"mean": 1.0}),
        ("finished", {"mean": 2.0}),
    ]
    until(lambda: not holds.exists())


def test_a_job_that_is_handed_to_a_worker_in_the_moment_of_its_death_does_not_wait_for_a_minute(house: House) -> None:
    house.watch()
    (pid,) = until(lambda: house.workers("eval"))
    # Stopped first: where the server hands the job to it all the same, it never begins.
    os.kill(pid, signal.SIGSTOP)
    house.save("model_step1.pt")
    queue = open_queue(house.connection(), "evaluation")
    until(lambda: len(queue) or house.connection().llen(queue.intermediate_queue_key))
    os.kill(pid, signal.SIGKILL)
    assert until(lambda: house.record("model_step1.pt"))["attempts"] == 1


def test_a_killed_watch_workers_successor_has_its_scheduler_at_once(house: House) -> None:
    """Without one, every look waits until somebody finds the chain overdue."""
    house.watch()
    scene = _scene(house)
    (pid,) = until(lambda: scene.pids("watch worker"))
    until(lambda: scene.pids("scheduler"))
    os.kill(pid, signal.SIGKILL)
    until(lambda: scene.pids("watch worker") not in ([], [pid]) and scene.pids("scheduler"), 20)


def test_a_scheduler_that_is_killed_before_it_has_begun_keeps_no_lock(connection: Connection) -> None:
    code = """
import os, sys
from assayer.queues.connect import connect
from assayer.worker.workers import WatchWorker, _Scheduler

_Scheduler.start = lambda self: os._exit(9)
connection = connect(sys.argv[1])
WatchWorker("watch", connection, name="it")._start_scheduler()
"""
    socket = connection.connection_pool.connection_kwargs["path"]
    assert subprocess.run([sys.executable, "-c", code, f"unix://{socket}"], timeout=60, check=False).returncode == 9
    key = RQScheduler.get_locking_key("watch")
    assert connection.exists(key)
    assert free_scheduler_lock(connection, "watch")
    assert not connection.exists(key)


def _scene(house: House) -> Scene:
    from random import Random

    return Scene(house, [], Random(0), 0, None, [])
