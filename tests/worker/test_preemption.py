"""A worker that is told to leave gives its evaluation back at once; one that is killed is missed soon. Neither costs an attempt."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import House, until

from assayer.worker import child
from assayer.worker.command import REQUEUE_SIGNALS

pytestmark = pytest.mark.usefixtures("without_torch")

# Slow until the file ``fast`` lies beside it; each call leaves a mark. With ``kind`` it takes a SIGTERM as that says.
EVALUATOR = """
import json, os, signal, subprocess, sys, time

HERE = os.path.dirname(__file__)

def slow(path, kind="plain"):
    signals = [signal.getsignal(number) == signal.SIG_DFL for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)]
    blocked = len(signal.pthread_sigmask(signal.SIG_BLOCK, []))
    if kind == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if kind == "exits":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    with open(HERE + "/begun", "a") as file:
        file.write(os.path.basename(path) + " ")
    if kind == "alone":
        time.sleep(0 if os.path.exists(HERE + "/fast") else 100)
    elif not os.path.exists(HERE + "/fast"):
        # Fails when its own child does.
        subprocess.run([sys.executable, "-c", "import time; time.sleep(100)"], check=True)
    return {"default": sum(signals), "blocked": blocked}
"""


class Scene:
    """A watch whose workers stand elsewhere, and one checkpoint that takes long."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.evaluator = f"{house.file('slow.py', EVALUATOR)}:slow"
        self.marks = house.root / "begun"

    def watch(self, *words: object, workers: int = 0) -> None:
        self.house.watch("--num_eval_workers", workers, *words, evaluator=self.evaluator)

    def save(self, name: str = "model_step1.pt") -> None:
        self.house.save(name)

    def begun(self) -> list[str]:
        return self.marks.read_text().split() if self.marks.exists() else []

    def await_begun(self, times: int = 1, seconds: float = 30) -> None:
        until(lambda: len(self.begun()) == times, seconds)
        # The evaluator's own child runs.
        time.sleep(0.3)

    def fast(self) -> None:
        (self.house.root / "fast").touch()

    def queued(self) -> list[str]:
        """The jobs that wait, from the front, and that nothing else holds."""
        connection = self.house.connection()
        assert connection.zcard("rq:wip:evaluation") == 0
        assert connection.llen("rq:queue:evaluation:intermediate") == 0
        return [job_id.decode() for job_id in connection.lrange("rq:queue:evaluation", 0, -1)]

    def meta(self, job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.house.connection().hget(f"rq:job:{job_id}", "meta"))
        return found

    def tree(self, pid: int) -> list[int]:
        return [pid, *child.descendants(pid)]

    def gone(self, pids: list[int]) -> bool:
        left = self.house.processes()
        return not any(pid in left for pid in pids)

    def finished_at_first_attempt(self, name: str = "model_step1.pt", seconds: float = 30) -> bool:
        record = until(lambda: self.house.record(name, "slow"), seconds)
        return (record["status"], record["attempts"]) == ("finished", 1)


@pytest.fixture
def scene(house: House) -> Iterator[Scene]:
    yield Scene(house)


def test_sigterm_gives_the_running_evaluation_back_and_another_worker_takes_it(scene: Scene) -> None:
    scene.watch()
    scene.save()
    with scene.house.running("worker") as worker:
        scene.await_begun()
        scene.save("model_step2.pt")
        (first,) = [e.decode().split(":")[0] for e in scene.house.connection().zrange("rq:wip:evaluation", 0, -1)]
        until(lambda: scene.house.connection().llen("rq:queue:evaluation") == 1)
        everything = scene.tree(worker.pid)
        began = time.monotonic()
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(20) == 0
        assert time.monotonic() - began < 20
    assert scene.gone(everything)
    waiting = scene.queued()
    assert len(waiting) == 2
    assert waiting[0] == first, "it is at the front"
    assert scene.meta(first)["runs"] == 0, "nobody was lost"
    scene.fast()
    with scene.house.running("worker"):
        assert scene.finished_at_first_attempt()
    assert scene.begun()[:2] == ["model_step1.pt"] * 2


@pytest.mark.parametrize("order", ["up", *(pytest.param(order, marks=pytest.mark.slow) for order in ("down", "random", "evaluator first"))])
def test_sigterm_to_every_process_at_once_is_no_failed_attempt(scene: Scene, order: str) -> None:
    """As ``scancel`` does; the evaluator fails when its own child dies, which may be the first to."""
    scene.watch("--retries", 0)
    scene.save()
    with scene.house.running("worker") as worker:
        scene.await_begun()
        pids = scene.tree(worker.pid)
        assert len(pids) == 5, "supervisor, worker, horse, evaluator and its child"
        if order == "random":
            random.shuffle(pids)
        for pid in pids if order in ("down", "random") else reversed(pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            time.sleep(0.2 if order == "evaluator first" else 0)
        assert worker.wait(20) == 0
    assert scene.gone(pids)
    assert scene.house.records() == {}
    (job,) = scene.queued()
    assert scene.meta(job)["runs"] == 0
    assert "attempts" not in scene.meta(job)
    scene.fast()
    with scene.house.running("worker"):
        assert scene.finished_at_first_attempt()


def test_sigterm_to_a_worker_alone_moves_its_evaluation_to_the_next_worker(scene: Scene) -> None:
    scene.watch(workers=1)
    scene.save()
    scene.await_begun()
    (pid,) = scene.house.workers("eval")
    scene.fast()
    os.kill(pid, signal.SIGTERM)
    assert scene.finished_at_first_attempt()
    assert "was told to end; another is started" in scene.house.log()
    assert until(lambda: scene.house.workers("eval")) != [pid]


def test_sigterm_to_the_supervisor_of_a_watch_leaves_nothing_and_loses_nothing(scene: Scene) -> None:
    scene.watch(workers=1)
    scene.save()
    scene.await_begun()
    (supervisor,) = [pid for pid, line in scene.house.processes().items() if "assayer.worker.supervise" in line]
    os.kill(supervisor, signal.SIGTERM)
    until(lambda: not scene.house.processes(), 20)
    scene.fast()
    scene.watch(workers=1)
    assert scene.finished_at_first_attempt()
    assert scene.begun() == ["model_step1.pt"] * 2


def test_sigterm_to_a_watch_its_workers_and_its_redis_loses_nothing(scene: Scene) -> None:
    scene.watch("--retries", 0, workers=1)
    scene.save()
    scene.await_begun()
    for pid in scene.house.processes():
        # One of them may have ended for another one's sake.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    until(lambda: not scene.house.processes(), 20)
    assert scene.house.records() == {}
    scene.watch("--retries", 0, workers=1)
    scene.await_begun(2)
    (entry,) = scene.house.connection().zrange("rq:wip:evaluation", 0, -1)
    assert scene.meta(entry.decode().split(":")[0])["runs"] == 1, "the run that was given up does not count, this one does"
    scene.house.shutdown("--now")


def test_a_watch_under_nohup_outlives_its_terminal(house: House) -> None:
    words = ["watch", "--directory", house.runs, "--evaluator", f"{house.evaluator}:mean", "--polling_interval", 1, "--eval_existing"]
    command = ["nohup", sys.executable, "-m", "assayer", *map(str, words)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=house.environment) as process:
        try:
            house.save("model_step1.pt")
            until(lambda: house.record("model_step1.pt"))
            process.send_signal(signal.SIGHUP)
            house.save("model_step2.pt")
            until(lambda: house.record("model_step2.pt"))
            assert process.poll() is None
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


@pytest.mark.parametrize("kind", ["stubborn", pytest.param("exits", marks=pytest.mark.slow)])
def test_an_evaluator_may_take_sigterm_as_it_likes(scene: Scene, kind: str) -> None:
    scene.watch("--retries", 0, "-E", f"kind={kind}")
    scene.save()
    with scene.house.running("worker") as worker:
        scene.await_begun()
        pids = scene.tree(worker.pid)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(20) == 0
    assert scene.gone(pids)
    assert len(scene.queued()) == 1
    assert scene.house.records() == {}


def test_a_redis_that_hangs_holds_nobody_up(scene: Scene) -> None:
    scene.watch()
    scene.save()
    server = scene.house.server.pid()
    assert server
    with scene.house.running("worker") as worker:
        scene.await_begun()
        pids = scene.tree(worker.pid)
        os.kill(server, signal.SIGSTOP)
        try:
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(20) == 0
            assert scene.gone(pids)
        finally:
            os.kill(server, signal.SIGCONT)
    scene.fast()
    with scene.house.running("worker"):
        assert scene.finished_at_first_attempt()


def test_a_signal_ahead_of_time_does_the_same(scene: Scene) -> None:
    scene.watch()
    scene.save()
    with scene.house.running("worker", "--requeue_signal", "SIGUSR1") as worker:
        scene.await_begun()
        worker.send_signal(signal.SIGUSR1)
        assert worker.wait(20) == 0
    assert len(scene.queued()) == 1
    scene.fast()
    with scene.house.running("worker", "--requeue_signal", "usr1"):
        assert scene.finished_at_first_attempt()
    record = scene.house.record("model_step1.pt", "slow")
    assert record and record["metrics"] == {"default": 3, "blocked": 0}, "the evaluator inherits no handler and no mask"


def test_a_signal_ahead_of_time_to_every_process_is_no_failed_attempt(scene: Scene) -> None:
    scene.watch("--retries", 0)
    scene.save()
    with scene.house.running("worker", "--requeue_signal", "USR2") as worker:
        scene.await_begun()
        for pid in reversed(scene.tree(worker.pid)):
            os.kill(pid, signal.SIGUSR2)
        assert worker.wait(20) == 0
    assert scene.house.records() == {}
    assert len(scene.queued()) == 1


@pytest.mark.parametrize("name", ["KILL", "INT", "no such"])
def test_a_signal_that_cannot_be_heeded_is_refused_with_those_that_can(house: House, name: str) -> None:
    done = house.command("worker", "--requeue_signal", name, check=False)
    assert done.returncode == 2
    assert f"--requeue_signal {name} must be one of {', '.join(REQUEUE_SIGNALS)}" in done.stderr
    assert house.processes() == {}


def test_ctrl_c_lets_the_evaluation_end_and_a_second_gives_it_back(scene: Scene) -> None:
    scene.watch()
    scene.save()
    with scene.house.running("worker") as worker:
        scene.await_begun()
        worker.send_signal(signal.SIGINT)
        time.sleep(3)
        assert worker.poll() is None
        assert scene.begun() == ["model_step1.pt"]
        worker.send_signal(signal.SIGINT)
        assert worker.wait(20) == 0
    assert len(scene.queued()) == 1


def test_the_workers_of_a_killed_supervisor_end_after_their_evaluation(scene: Scene) -> None:
    begin = "import os, time\n\ndef slow(path):\n    open(os.path.dirname(__file__) + '/begun', 'a').write('x ')\n"
    scene.house.file("slow.py", begin + "    time.sleep(3)\n    return {'m': 1}\n")
    scene.watch()
    scene.save()
    with scene.house.running("worker") as worker:
        scene.await_begun()
        (pid,) = scene.house.workers("eval")
        worker.kill()
        worker.wait()
        assert scene.finished_at_first_attempt()
        until(lambda: scene.gone([pid]))
    assert scene.begun() == ["x"]


@pytest.mark.parametrize("whom", ["worker", *(pytest.param(whom, marks=pytest.mark.slow) for whom in ("horse", "worker and horse"))])
def test_a_killed_worker_is_replaced_and_its_evaluation_starts_again_at_once(scene: Scene, whom: str) -> None:
    scene.watch()
    scene.save()
    with scene.house.running("worker") as supervisor:
        scene.await_begun()
        _, worker, horse, *_ = scene.tree(supervisor.pid)
        for pid in {"worker": [worker], "horse": [horse], "worker and horse": [worker, horse]}[whom]:
            os.kill(pid, signal.SIGKILL)
        scene.fast()
        assert scene.finished_at_first_attempt()
    assert len(scene.begun()) == 2


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_worker_of_which_nothing_is_heard_is_missed_within_90_seconds(scene: Scene) -> None:
    """Worker and supervisor are killed together; only another host's worker is left."""
    scene.watch("-E", "kind=alone")
    scene.save()
    other = elsewhere(scene.house)
    with scene.house.running("worker") as here, other.running("worker"):
        until(lambda: len(scene.house.workers("eval")) == 2)
        scene.await_begun()
        holder = scene.house.connection().hget(next(scene.house.connection().scan_iter("rq:execution:*")), "worker_name").decode()
        (pid,) = [int(w["pid"]) for w in scene.house.status()["workers"] if w["name"] == holder]
        # Whichever has taken it goes, with its supervisor.
        supervisor = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        scene.fast()
        began = time.monotonic()
        for killed in (supervisor, pid):
            os.kill(killed, signal.SIGKILL)
        assert scene.finished_at_first_attempt(seconds=90)
        print(f"missed after {time.monotonic() - began:.1f} s")
        assert len(scene.begun()) == 2
        here.poll()


def test_a_revived_supervisor_is_no_workers_child(house: House) -> None:
    house.watch()
    until(lambda: house.workers("eval"))
    (old,) = [pid for pid, line in house.processes().items() if "assayer.worker.supervise" in line]
    os.kill(old, signal.SIGKILL)
    workers = house.workers("eval") + house.workers("watch")

    def revived() -> int | None:
        found = [pid for pid, line in house.processes().items() if "assayer.worker.supervise" in line and pid != old]
        return found[0] if len(found) == 1 and os.getsid(found[0]) == found[0] else None

    new = until(revived, 40)
    assert all(new not in child.descendants(pid) for pid in workers)


def elsewhere(house: House) -> House:
    """Another host, as far as assayer can see, on the same Redis."""
    root = house.root / "elsewhere"
    root.mkdir()
    other = House(root)
    other.environment["ASSAYER_REDIS_URL"] = f"unix://{house.server.socket}"
    return other


def test_a_plain_process_that_is_told_to_give_up_while_nothing_runs_gives_up_before_it_begins(tmp_path: Path) -> None:
    source = (
        "import os, signal\nfrom pathlib import Path\nfrom assayer.worker import child\n"
        "child.give_up_on((signal.SIGTERM,))\nos.kill(os.getpid(), signal.SIGTERM)\n"
        f"child.run(lambda: 1, Path({str(tmp_path / 'log')!r}), 10, 'heading')\n"
    )
    done = subprocess.run([sys.executable, "-c", source], timeout=30)
    assert done.returncode == child.GIVEN_UP
    assert not (tmp_path / "log").exists()
