"""Whatever becomes of the Redis while an evaluation runs: its result is kept, told once, and the worker lives on."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import pytest
from conftest import House, until

from assayer.errors import RedisError
from assayer.files import locked
from assayer.queues import Connection
from assayer.queues.recover import Judge

pytestmark = pytest.mark.usefixtures("without_torch")

EVALUATOR = """
import os, time

def slow(path, seconds=3.0):
    with open(os.path.dirname(__file__) + "/begun", "a") as file:
        file.write("x")
    time.sleep(float(seconds))
    return {"m": 1}
"""


class Outage:
    """An evaluation that runs, and the Redis under it."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.evaluator = f"{house.file('slow.py', EVALUATOR)}:slow"

    def begin(self, seconds: float = 3.0, workers: int = 1) -> None:
        """Returns while the evaluation runs."""
        self.house.watch("--num_eval_workers", workers, "-E", f"seconds={seconds}", evaluator=self.evaluator)
        until(lambda: len(self.house.workers("eval")) == workers)
        self.pids = sorted(self.house.workers("eval"))
        self.house.save("model_step1.pt")
        until((self.house.root / "begun").exists)

    @property
    def server(self) -> int:
        pid = self.house.server.pid()
        assert pid
        return int(pid)

    def record(self, seconds: float = 30) -> dict[str, object]:
        found: dict[str, object] = until(lambda: self.house.record("model_step1.pt", "slow"), seconds)
        return found

    def connection(self) -> Connection | None:
        with contextlib.suppress(RedisError):
            return self.house.connection()
        return None

    def is_well(self) -> None:
        """One record, one evaluation, a finished job, nothing stuck, and the same workers."""
        record = self.record()
        assert (record["status"], record["attempts"]) == ("finished", 1)
        connection = until(self.connection)
        until(lambda: connection.zcard("rq:wip:evaluation") == 0)
        until(lambda: [w["state"] for w in self.house.status()["workers"] if w["queue"] == "evaluation"] == ["idle"] * len(self.pids))
        assert connection.llen("rq:queue:evaluation:intermediate") == 0
        assert connection.llen("rq:queue:evaluation") == 0
        assert {connection.hget(key, "status") for key in connection.scan_iter("rq:job:*") if b"watch-" not in key} <= {b"finished"}
        assert (self.house.root / "begun").read_text() == "x"
        assert sorted(self.house.workers("eval")) == self.pids

    def goes_on(self) -> None:
        self.house.save("model_step2.pt")
        until(lambda: self.house.record("model_step2.pt", "slow"), 60)
        assert (self.house.root / "begun").read_text() == "xx"


@pytest.fixture
def outage(house: House) -> Iterator[Outage]:
    yield Outage(house)


def _down(outage: Outage, seconds: float) -> None:
    """The server is killed, and its start is held up."""
    with locked(outage.house.server.folder / "starting"):
        os.kill(outage.server, signal.SIGKILL)
        time.sleep(seconds)
        assert outage.house.record("model_step1.pt", "slow"), "the record does not wait for Redis"
        assert not outage.house.server.is_running()


def test_an_evaluation_that_ends_during_an_outage_is_recorded_and_delivered(outage: Outage) -> None:
    outage.begin(seconds=2)
    _down(outage, 8)
    outage.is_well()
    outage.goes_on()


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("workers", [1, 2])
def test_an_evaluation_that_ends_during_a_minutes_outage_is_recorded_and_delivered(outage: Outage, workers: int) -> None:
    outage.begin(seconds=20, workers=workers)
    _down(outage, 60)
    outage.is_well()
    outage.goes_on()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_an_evaluation_that_runs_beyond_a_minutes_outage_is_not_given_to_another_worker(outage: Outage) -> None:
    """All heartbeats are old when Redis is back; whoever is first must not take the others for dead."""
    outage.begin(seconds=80, workers=2)
    with locked(outage.house.server.folder / "starting"):
        os.kill(outage.server, signal.SIGKILL)
        time.sleep(60)
    outage.record(90)
    outage.is_well()


def test_a_server_that_hangs_for_ten_seconds_costs_nothing(outage: Outage) -> None:
    outage.begin(seconds=2)
    server = outage.server
    os.kill(server, signal.SIGSTOP)
    time.sleep(10)
    os.kill(server, signal.SIGCONT)
    outage.is_well()
    outage.goes_on()


def test_connections_that_are_cut_are_made_anew(outage: Outage) -> None:
    outage.begin(seconds=4)
    connection = outage.house.connection()
    for _ in range(3):
        connection.client_kill_filter(skipme=True, _type="normal")
        connection.client_kill_filter(skipme=True, _type="pubsub")
        time.sleep(0.5)
    outage.is_well()
    outage.goes_on()


def test_a_redis_that_loses_everything_during_an_evaluation_has_it_recorded_once(outage: Outage) -> None:
    outage.begin(seconds=6)
    connection = outage.house.connection()
    connection.flushdb()
    until(lambda: connection.exists("assayer:watch:plans"))
    outage.is_well()
    outage.goes_on()
    assert connection.exists("rq:scheduler-lock:watch")


def test_a_worker_is_seen_again_after_its_next_heartbeat(outage: Outage) -> None:
    """One that runs an evaluation, and one that waits for one."""
    outage.begin(seconds=20, workers=2)
    connection = outage.house.connection()
    before = {w["pid"]: w for w in outage.house.status()["workers"]}
    connection.flushdb()
    until(lambda: {w["pid"] for w in outage.house.status()["workers"]} == set(before), 20)
    assert connection.smembers("rq:workers") == {f"rq:worker:{w['name']}".encode() for w in before.values()}
    states = {w["pid"]: w["state"] for w in outage.house.status()["workers"] if w["queue"] == "evaluation"}
    assert "busy" in states.values()
    outage.house.shutdown("--now")


def test_nobody_is_judged_soon_after_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("assayer.queues.recover.time.monotonic", lambda: now)
    judge = Judge()
    assert not judge.may_judge(), "it has only begun to listen"
    for _ in range(6):
        now += 10
        judge.answered()
    assert judge.may_judge()
    now += 30
    assert not judge.may_judge(), "Redis has not answered"
    judge.answered()
    assert not judge.may_judge(), "the others have had no time to speak"
    for _ in range(5):
        now += 10
        judge.answered()
    assert judge.may_judge()
