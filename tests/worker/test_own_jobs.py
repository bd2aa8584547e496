"""Our workers run our own jobs: whatever else lies in their queue is refused with a sentence, imports nothing, and holds nobody up."""

import json
import os
import pickle
import subprocess
import sys
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from conftest import REPOSITORY, House, until
from rq import Webhook
from rq.job import Job
from rq.serializers import JSONSerializer

from assayer.queues import Connection
from assayer.queues.chain import TICK
from assayer.queues.enqueue import EVALUATE, open_queue
from assayer.queues.served import SERVE

pytestmark = pytest.mark.usefixtures("without_torch")


class Trap:
    """A module that leaves a mark when it is imported, a function that leaves one when it is called, a pickle that does when it is read."""

    def __init__(self, house: House) -> None:
        self.mark = house.root / "sprung"
        house.file("site/trap.py", f"open({str(self.mark)!r}, 'a').write('imported ')\n\ndef spring(*a, **k):\n    pass\n")
        house.environment["PYTHONPATH"] = f"{house.root / 'site'}:{REPOSITORY}"

    @property
    def program(self) -> str:
        return f"touch {self.mark}"

    def pickled(self) -> bytes:
        return pickle.dumps(_Shell(self.program))


class _Shell:
    def __init__(self, program: str) -> None:
        self.program = program

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.program,)


def _put(connection: Connection, queue: str, call: list[Any] | bytes, at_end: bool = True, **fields: Any) -> str:
    """A job's hash as somebody else writes it, at the queue's end."""
    data = call if isinstance(call, bytes) else JSONSerializer.dumps(call)
    job_id = f"stranger{connection.incr('strangers')}"
    stored = {"data": zlib.compress(data), "created_at": "2026-01-01T00:00:00.000000Z", "origin": queue, "status": "queued", **fields}
    connection.hset(Job.key_for(job_id), mapping=stored)
    if at_end:
        connection.rpush(f"rq:queue:{queue}", job_id)
    return job_id


Make = Callable[[Connection, str, str, Trap], str]

STRANGERS: dict[str, tuple[Make, str]] = {
    "another function": (lambda c, q, ours, trap: _put(c, q, ["os.system", None, [trap.program], {}]), "names os.system"),
    "a module of theirs": (lambda c, q, ours, trap: _put(c, q, ["trap.spring", None, [], {}]), "names trap.spring"),
    "a served job's function as a method": (lambda c, q, ours, trap: _put(c, q, [SERVE, "text", [], {}]), "the job"),
    "a method": (lambda c, q, ours, trap: _put(c, q, [ours, "text", [], {}]), "no call of a function"),
    "no call": (lambda c, q, ours, trap: _put(c, q, [ours, None, "x", {}]), "no call of a function"),
    "a pickle": (lambda c, q, ours, trap: _put(c, q, trap.pickled()), "no JSON"),
    "a pickle in its meta": (
        lambda c, q, ours, trap: _put(c, q, ["trap.spring", None, [], {}], meta=trap.pickled(), result=trap.pickled()),
        "names trap.spring",
    ),
    "on_success": (lambda c, q, ours, trap: _put(c, q, [ours, None, [], {}], success_callback_name="trap.spring"), "carries on_success"),
    "on_failure": (lambda c, q, ours, trap: _put(c, q, [ours, None, [], {}], failure_callback_name="trap.spring"), "carries on_failure"),
    "on_stopped": (lambda c, q, ours, trap: _put(c, q, [ours, None, [], {}], stopped_callback_name="trap.spring"), "carries on_stopped"),
    "a webhook": (
        lambda c, q, ours, trap: _put(
            c, q, [ours, None, [], {}], webhooks=json.dumps([Webhook("http://127.0.0.1:9/", "failed").to_dict()])
        ),
        "carries webhook http://127.0.0.1:9/",
    ),
    "a status of its own": (lambda c, q, ours, trap: _put(c, q, [ours, None, [], {}], status="odd"), "cannot be read"),
    "retries": (
        lambda c, q, ours, trap: _put(c, q, ["trap.spring", None, [], {}], retries_left=5, failure_ttl=0, origin="elsewhere"),
        "names trap.spring",
    ),
}


@pytest.mark.parametrize(("queue", "ours"), [("evaluation", EVALUATE), ("watch", TICK)])
def test_a_job_that_is_not_ours_is_refused_and_the_worker_lives_on(house: House, queue: str, ours: str) -> None:
    trap = Trap(house)
    house.watch()
    (pid,) = until(lambda: house.workers("eval" if queue == "evaluation" else "watch"))
    connection = house.connection()
    put = {name: make(connection, queue, ours, trap) for name, (make, _) in STRANGERS.items()}
    failed = open_queue(connection, queue).failed_job_registry
    until(lambda: len(failed.get_job_ids(cleanup=False)) == len(put))
    for name, job_id in put.items():
        told = Job.fetch(job_id, connection=connection, serializer=JSONSerializer)
        assert told.get_status() == "failed", name
        result = told.latest_result()
        sentence = (result and result.exc_string) or ""
        assert sentence.startswith("refused: the job"), name
        assert STRANGERS[name][1] in sentence, name
        assert "\n" not in sentence
        assert ours in sentence
        assert (SERVE in sentence.rpartition(";")[2]) is (queue == "evaluation"), "each kind of worker runs its own functions alone"
    assert not trap.mark.exists(), trap.mark.read_text()
    assert connection.llen(f"rq:queue:{queue}:intermediate") == 0
    assert connection.zcard(f"rq:wip:{queue}") <= (queue == "watch")
    house.save("model_step1.pt")
    assert until(lambda: house.record("model_step1.pt"))["attempts"] == 1
    assert house.workers("eval" if queue == "evaluation" else "watch") == [pid]


def test_the_trap_springs_under_a_plain_rq_worker(house: House) -> None:
    """So the other tests here can fail."""
    trap = Trap(house)
    house.server.start()
    connection = house.connection()
    _put(connection, "plain", ["trap.spring", None, [], {}])
    command = [sys.executable, "-m", "rq.cli", "worker", "--burst", "-S", "json", "-u", f"unix://{house.server.socket}", "plain"]
    subprocess.run(command, env=house.environment, capture_output=True, timeout=60, check=True)
    assert trap.mark.exists()
    house.server.stop(work_left=False)


def test_an_abandoned_job_with_callbacks_runs_none_of_them(house: House) -> None:
    """RQ's cleaning of what a dead worker held runs the job's callback in the worker that cleans."""
    trap = Trap(house)
    house.server.start()
    connection = house.connection()
    job_id = _put(
        connection, "evaluation", ["trap.spring", None, [], {}], at_end=False, failure_callback_name="trap.spring", status="started"
    )
    connection.zadd("rq:wip:evaluation", {f"{job_id}:x": 1})
    source = (
        "import sys\nfrom assayer.queues.connect import connect\nfrom assayer.worker.workers import EvalWorker\n"
        "worker = EvalWorker('evaluation', connect(sys.argv[1]), 'assayer-test')\n"
        "worker._judge.may_judge = lambda: True\nworker.clean_registries()\n"
    )
    done = subprocess.run([sys.executable, "-c", source, f"unix://{house.server.socket}"], env=house.environment, timeout=60)
    assert done.returncode == 0
    assert connection.zcard("rq:wip:evaluation") == 0
    assert connection.zscore("rq:failed:evaluation", job_id)
    assert not trap.mark.exists()
    house.server.stop(work_left=False)
