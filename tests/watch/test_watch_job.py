"""One tick, run by RQ's own worker in this process: what is queued, published, scheduled."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import plan

from assayer.plan import Baseline, Plan, PlanStore
from assayer.queues import Connection, chain
from assayer.queues.board import Board, Note
from assayer.queues.enqueue import open_queue
from assayer.watch import watch_job
from assayer.watch.look import Lookout
from assayer.worker.workers import WatchWorker


class Watchers:
    """A directory, its plan on the board, and a watch worker that runs the ticks that wait."""

    def __init__(self, root: Path, connection: Connection) -> None:
        self.root = root
        self.connection = connection
        self.board = Board(connection, "watch")
        self.queue = open_queue(connection, "evaluation")

    def put(self, **fields: Any) -> Plan:
        given = replace(plan(directory=str(self.root)), **fields)
        self.board.put(given, Baseline())
        return given

    def save(self, name: str, value: float = 1.0) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"w": torch.full((2,), value)}, path)
        return path

    def tick(self) -> None:
        """The next tick, now, whatever its schedule."""
        self.board.note([Note(plan_id, next=0) for plan_id in self.board.ids()])
        chain.hurry(self.connection, "watch")
        WatchWorker("watch", self.connection, f"assayer-test-{time.monotonic_ns()}").work(burst=True, logging_level="ERROR")

    def states(self, p: Plan) -> dict[str, str]:
        return {sight["name"]: sight["state"] for sight in self.board.sights(p.id).values()}


@pytest.fixture
def watchers(tmp_path: Path, connection: Connection, monkeypatch: pytest.MonkeyPatch) -> Watchers:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(watch_job, "_lookout", Lookout())
    for name in ("_known", "_generations", "_sights"):
        monkeypatch.setattr(watch_job, name, {})
    (tmp_path / "run").mkdir()
    return Watchers(tmp_path / "run", connection)


def test_a_tick_queues_what_is_due_once_and_schedules_its_successor(watchers: Watchers) -> None:
    p = watchers.put(polling_interval=7.0)
    watchers.save("m_step1.pt")
    watchers.tick()
    watchers.tick()
    assert watchers.queue.count == 1
    assert watchers.states(p) == {"m_step1.pt": "queued"}
    ((_, score),) = watchers.connection.zrange("rq:scheduled:watch", 0, -1, withscores=True)
    assert 5 < score - time.time() < 8


def test_what_waits_is_not_asked_again_whether_it_was_begun(watchers: Watchers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands may wait, and each question is one to a file system."""
    asked: list[Path] = []
    monkeypatch.setattr(watch_job, "has_progress", asked.append)
    watchers.put()
    for step in (1, 2):
        watchers.save(f"m_step{step}.pt", step)
    for _ in range(3):
        watchers.tick()
    assert watchers.queue.count == 2
    assert len(asked) == 2


def test_only_watches_that_are_due_are_looked_at(watchers: Watchers) -> None:
    p = watchers.put(polling_interval=3600.0)
    watchers.tick()
    watchers.save("m_step1.pt")
    chain.hurry(watchers.connection, "watch")
    WatchWorker("watch", watchers.connection, "assayer-test-2").work(burst=True, logging_level="ERROR")
    assert watchers.states(p) == {}


def test_without_plans_the_chain_ends(watchers: Watchers) -> None:
    p = watchers.put()
    watchers.tick()
    watchers.board.remove(p)
    chain.hurry(watchers.connection, "watch")
    assert watchers.connection.llen("rq:queue:watch") == 0


def test_what_rotation_took_while_it_was_written_leaves_the_board(watchers: Watchers) -> None:
    p = watchers.put()
    path = watchers.root / "m_step1.pt"
    path.write_bytes(b"PK\x03\x04")
    watchers.tick()
    assert watchers.states(p) == {"m_step1.pt": "writing"}
    path.unlink()
    watchers.tick()
    assert watchers.states(p) == {}


def test_while_the_directory_is_away_nothing_is_taken_for_deleted(watchers: Watchers) -> None:
    p = watchers.put()
    watchers.save("m_step1.pt")
    watchers.tick()
    watchers.root.rename(watchers.root.with_name("away"))
    watchers.tick()
    assert watchers.states(p) == {"m_step1.pt": "queued"}
    assert "cannot be read" in watchers.board.tick(p.id)["problem"]


def test_a_job_that_failed_without_a_record_is_shown_and_queued_again_after_a_pause(
    watchers: Watchers, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rq.job import Job
    from rq.results import Result
    from rq.utils import now, utcformat

    p = watchers.put()
    watchers.save("m_step1.pt")
    watchers.tick()
    (job_id,) = watchers.queue.get_job_ids()
    job = Job.fetch(job_id, connection=watchers.connection, serializer="json")
    watchers.connection.delete(watchers.queue.key)
    watchers.connection.hset(job.key, mapping={"status": "failed", "ended_at": utcformat(now())})
    with watchers.connection.pipeline() as pipe:
        Result.create_failure(job, 100, "Traceback\nassayer.errors.StateError: cannot write /x: No space left on device\n", pipeline=pipe)
        pipe.execute()
    watchers.tick()
    (sight,) = watchers.board.sights(p.id).values()
    assert (sight["state"], sight["reason"]) == ("failing", "cannot write /x: No space left on device")
    assert watchers.queue.count == 0
    monkeypatch.setattr(watch_job, "RETRY_PAUSE", 0.0)
    watchers.tick()
    assert watchers.queue.count == 1


def test_a_watch_that_is_over_is_laid_down_on_the_board_and_on_disk(watchers: Watchers) -> None:
    from assayer.plan import state_directory

    p = watchers.put(once=True)
    store = PlanStore(state_directory())
    store.write(p)
    watchers.tick()
    assert not watchers.board.has(p.id)
    assert watchers.board.ended(p)
    assert not store.read(p.id).active  # type: ignore[union-attr]


def test_with_once_a_checkpoint_that_is_still_growing_is_waited_for(watchers: Watchers) -> None:
    p = watchers.put(once=True, quiet_period=1000.0)
    (watchers.root / "m_step1.pt").write_bytes(b"PK\x03\x04")
    watchers.tick()
    assert watchers.board.has(p.id)
    watchers.save("m_step1.pt")
    watchers.tick()
    assert watchers.queue.count == 1


def test_the_newest_goes_before_those_that_wait(watchers: Watchers) -> None:
    watchers.put(order="newest")
    for step in (1, 2):
        watchers.save(f"m_step{step}.pt", step)
    watchers.tick()
    for step in (3, 10):
        watchers.save(f"m_step{step}.pt", step)
    watchers.tick()
    assert [str(job.description).split()[1] for job in watchers.queue.jobs] == ["m_step10.pt", "m_step3.pt", "m_step2.pt", "m_step1.pt"]


def test_a_pattern_matches_anew_at_every_look(watchers: Watchers) -> None:
    p = watchers.put(directory=f"{watchers.root}/exp*", is_pattern=True)
    watchers.tick()
    assert "no directory matches" in watchers.board.tick(p.id)["problem"]
    watchers.save("exp1/m_step1.pt")
    watchers.save("other/m_step1.pt")
    watchers.tick()
    assert list(watchers.board.sights(p.id)) == [str(watchers.root / "exp1" / "m_step1.pt")]
    assert watchers.board.tick(p.id)["problem"] == ""
