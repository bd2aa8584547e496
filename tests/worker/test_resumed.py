"""An evaluation that says how far it is, and goes on from there after whatever ended it."""

import os
import signal
from pathlib import Path

from conftest import House, until

from assayer.queues.enqueue import open_queue
from assayer.queues.recover import is_gone
from assayer.worker.child import descendants

# Sums 1 to 40; each item leaves a mark. It stops at an item for as long as the file ``stop<item>`` lies beside it, or fails there by ``fail<item>``.
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


def _unfinished(house: House) -> list[Path]:
    return list(house.runs.glob("evals/*/*.progress"))


def _watch(house: House, *words: object) -> None:
    house.watch(*words, evaluator=f"{house.file('summed.py', EVALUATOR)}:summed")


def test_a_killed_evaluation_goes_on_where_it_was_and_comes_to_the_same_numbers(house: House) -> None:
    stops = [house.file(f"stop{item}", "") for item in (8, 23, 33)]
    _watch(house, "--retries", 0)
    house.save("model_step1.pt")
    # The worker, its child that runs the job, and the evaluator's own process.
    for generation, stop in enumerate(stops):
        until(lambda stop=stop: f"model_step1.pt:{stop.name[4:]}" in _items(house))
        (line,) = until(lambda: [line for w in house.workers("eval") if len(line := [w, *descendants(w)]) == 3])
        os.kill(line[generation], signal.SIGKILL)
        until(lambda pid=line[-1]: is_gone(pid))
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
        until(lambda fail=fail: f"model_step1.pt:{fail.name[4:]}" in _items(house))
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
    (job,) = queue.started_job_registry.get_job_ids()
    assert queue.fetch_job(job).get_meta() == {**queue.fetch_job(job).get_meta(), "done": 12, "total": 40}
    # Later ones wait; by the order of the watch they would go first.
    house.save("model_step3.pt")
    until(lambda: len(queue) == 1)
    house.shutdown("--now")
    stop.unlink()
    _watch(house, "--order", "newest")
    until(lambda: house.record("model_step3.pt", "summed"))
    order = list(dict.fromkeys(item.partition(":")[0] for item in _items(house)[12:]))
    assert order == ["model_step2.pt", "model_step3.pt"]
    assert house.record("model_step2.pt", "summed")["metrics"]["sum"] == 820
