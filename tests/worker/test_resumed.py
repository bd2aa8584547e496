"""An evaluation that says how far it is, and goes on from there after whatever ended it."""

import os
import signal
from pathlib import Path

import pytest
from conftest import House, until

from assayer.queues.enqueue import open_queue
from assayer.queues.recover import is_gone
from assayer.worker.child import descendants

pytestmark = pytest.mark.usefixtures("without_torch")

# Sums 1 to 40; each item leaves a mark. At an item it stops while the file ``stop<item>`` lies beside it, and fails by ``fail<item>``.
EVALUATOR = """
import os, time

HERE = os.path.dirname(__file__)

def summed(path, progress):
    state = {"sum": 0, "count": 0}
    for item in progress.items(range(1, 41), state, every=5):
        with open(HERE + "/items", "a") as file:
            file.write(f"{os.path.basename(path)}:{item} ")
        progress.report(item, 40)
        if os.path.exists(f"{HERE}/fail{item}"):
            raise ValueError(f"item {item}")
        while os.path.exists(f"{HERE}/stop{item}"):
            time.sleep(0.02)
        state["sum"] += item
        state["count"] += 1
    return state
"""


def _items(house: House) -> list[str]:
    path = house.root / "items"
    return path.read_text().split() if path.exists() else []


def _await(house: House, item: str) -> None:
    until(lambda: f"model_step1.pt:{item}" in _items(house))


def _line(house: House) -> list[int]:
    """An eval worker, its child that runs the job, and the evaluator's own process."""
    found = [[worker, *descendants(worker)] for worker in house.workers("eval")]
    return next((line for line in found if len(line) == 3), [])


def _until_gone(pid: int) -> None:
    until(lambda: is_gone(pid))


def _unfinished(house: House) -> list[Path]:
    return list(house.runs.glob("evals/*/*.progress"))


def _watch(house: House, *words: object) -> None:
    house.watch(*words, evaluator=f"{house.file('summed.py', EVALUATOR)}:summed")


def test_a_killed_evaluation_goes_on_where_it_was_and_comes_to_the_same_numbers(house: House) -> None:
    stops = [house.file(f"stop{item}", "") for item in (8, 23, 33)]
    _watch(house, "--retries", 0)
    house.save("model_step1.pt")
    for generation, stop in enumerate(stops):
        _await(house, stop.name[4:])
        line = until(lambda: _line(house))
        os.kill(line[generation], signal.SIGKILL)
        _until_gone(line[-1])
        stop.unlink()
    record = until(lambda: house.record("model_step1.pt", "summed"))
    assert (record["status"], record["metrics"], record["attempts"]) == ("finished", {"sum": 820, "count": 40}, 1)
    numbers = [int(item.partition(":")[2]) for item in _items(house)]
    # Each death costs what came after the last of every five; all else is done once, and in order.
    assert numbers == [*range(1, 9), *range(6, 24), *range(21, 34), *range(31, 41)]
    until(lambda: not _unfinished(house))


def test_an_attempt_that_got_further_is_not_counted_and_one_that_did_not_is(house: House) -> None:
    fails = [house.file(f"fail{item}", "") for item in (7, 14, 28)]
    _watch(house, "--retries", 1)
    house.save("model_step1.pt")
    for fail in fails[:2]:
        _await(house, fail.name[4:])
        fail.unlink()
    # The third one stays: what fails where it failed before has used up its attempts.
    record = until(lambda: house.record("model_step1.pt", "summed"))
    assert (record["status"], record["error"]["message"]) == ("failed", "ValueError: item 28")
    assert record["attempts"] == 2
    # It may be tried again from there, once whatever was wrong is mended.
    fails[2].unlink()
    assert _unfinished(house)
    before = len(_items(house))
    _watch(house, "--retry_failed")
    again = until(lambda: (r := house.record("model_step1.pt", "summed")) and r["status"] == "finished" and r)
    assert again["metrics"] == {"sum": 820, "count": 40}
    assert _items(house)[before] == "model_step1.pt:26"
    until(lambda: not _unfinished(house))


def test_how_far_it_is_is_seen_and_what_was_begun_goes_first_after_a_restart(house: House) -> None:
    stop = house.file("stop12", "")
    _watch(house, "--order", "newest")
    house.save("model_step2.pt")
    until(lambda: "model_step2.pt:12" in _items(house))
    (row,) = until(lambda: [c for c in house.status()["watches"][0]["checkpoints"] if c["reason"] == "12 of 40 done"])
    assert row["state"] == "running"
    queue = open_queue(house.connection(), "evaluation")
    (job_id,) = queue.started_job_registry.get_job_ids()
    job = queue.fetch_job(job_id)
    assert job
    assert job.meta.items() >= {"done": 12, "total": 40}.items()
    # Later ones wait; by the order of the watch they would go first.
    house.save("model_step3.pt")
    until(lambda: len(queue) == 1)
    house.shutdown("--now")
    stop.unlink()
    _watch(house, "--order", "newest")
    until(lambda: house.record("model_step3.pt", "summed"))
    order = list(dict.fromkeys(item.partition(":")[0] for item in _items(house)[12:]))
    assert order == ["model_step2.pt", "model_step3.pt"]
    assert until(lambda: house.record("model_step2.pt", "summed"))["metrics"]["sum"] == 820
