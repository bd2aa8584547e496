"""One chain a watch queue: never none for long, never two."""

import time

import pytest
from rq.job import Job
from samples import plan

from assayer.plan import Baseline
from assayer.queues import Connection, chain
from assayer.queues.board import Board


def jobs(connection: Connection) -> list[str]:
    """The ticks that wait, in queue and schedule."""
    waiting = connection.lrange("rq:queue:watch", 0, -1) + connection.zrange("rq:scheduled:watch", 0, -1)
    return [job_id.decode() for job_id in waiting]


def generation(connection: Connection) -> int:
    return int(connection.hget(chain.chain_key("watch"), "generation") or 0)


@pytest.fixture
def board(connection: Connection) -> Board:
    board = Board(connection, "watch")
    board.put(plan(), Baseline())
    return board


def test_a_queue_without_plans_has_no_chain(connection: Connection) -> None:
    assert not chain.ensure(connection, "watch")
    assert jobs(connection) == []


def test_a_missing_chain_is_started_once(connection: Connection, board: Board) -> None:
    assert chain.ensure(connection, "watch")
    assert not chain.ensure(connection, "watch")
    assert len(jobs(connection)) == 1


def test_a_tick_moves_the_chain_on_and_a_repeated_one_does_nothing(connection: Connection, board: Board) -> None:
    chain.ensure(connection, "watch")
    now = time.time()
    first = generation(connection)
    assert chain.begin(connection, "watch", first, now)
    assert chain.go_on(connection, "watch", first, now + 5)
    assert not chain.begin(connection, "watch", first, now), "RQ runs a job at least once: the second run is out of place"
    assert not chain.go_on(connection, "watch", first, now + 5)
    assert generation(connection) == first + 1
    assert connection.zcard("rq:scheduled:watch") == 1


def test_the_next_tick_waits_in_rqs_own_schedule_under_a_new_id(connection: Connection, board: Board) -> None:
    chain.ensure(connection, "watch")
    due = time.time() + 190
    chain.go_on(connection, "watch", generation(connection), due)
    ((job_id, score),) = connection.zrange("rq:scheduled:watch", 0, -1, withscores=True)
    assert score == int(due)
    job = Job.fetch(job_id.decode(), connection=connection, serializer="json")
    assert job.func_name == chain.TICK
    assert job.args == ["watch", generation(connection)]
    assert job.get_status() == "scheduled"


@pytest.mark.parametrize("status", ["failed", "canceled", None])
def test_a_chain_whose_tick_ended_badly_or_is_nowhere_is_started_anew(connection: Connection, board: Board, status: str | None) -> None:
    chain.ensure(connection, "watch")
    (job_id,) = jobs(connection)
    connection.delete("rq:queue:watch")
    if status is None:
        connection.delete(Job.key_for(job_id))
    else:
        connection.hset(Job.key_for(job_id), "status", status)
    assert chain.ensure(connection, "watch")
    assert len(jobs(connection)) == 1
    assert jobs(connection) != [job_id]


def test_a_tick_that_a_dying_worker_took_is_started_anew_after_seconds(connection: Connection, board: Board) -> None:
    chain.ensure(connection, "watch")
    connection.lmove("rq:queue:watch", "rq:queue:watch:intermediate")
    now = time.time()
    assert not chain.ensure(connection, "watch", now)
    assert chain.ensure(connection, "watch", now + chain.TAKEN_AFTER + 1)
    assert connection.llen("rq:queue:watch:intermediate") == 0


def test_a_tick_that_began_and_never_ended_is_lost_after_a_while(connection: Connection, board: Board) -> None:
    chain.ensure(connection, "watch")
    (job_id,) = jobs(connection)
    connection.delete("rq:queue:watch")
    connection.hset(Job.key_for(job_id), "status", "started")
    now = time.time()
    chain.begin(connection, "watch", generation(connection), now)
    assert not chain.ensure(connection, "watch", now + chain.LOST_AFTER - 1)
    assert chain.ensure(connection, "watch", now + chain.LOST_AFTER + 1)


def test_a_schedule_that_nobody_serves_is_overtaken(connection: Connection, board: Board) -> None:
    chain.ensure(connection, "watch")
    now = time.time()
    chain.go_on(connection, "watch", generation(connection), now + 1)
    connection.delete("rq:queue:watch")
    assert not chain.ensure(connection, "watch", now + 5)
    assert chain.ensure(connection, "watch", now + 60)
    assert len(jobs(connection)) == 1


def test_a_command_makes_the_next_tick_come_now(connection: Connection, board: Board) -> None:
    chain.ensure(connection, "watch")
    connection.delete("rq:queue:watch")
    chain.go_on(connection, "watch", generation(connection), time.time() + 3600)
    chain.hurry(connection, "watch")
    assert connection.zcard("rq:scheduled:watch") == 0
    assert connection.llen("rq:queue:watch") == 1


def test_after_a_shutdown_the_tick_that_was_running_does_not_come_back(connection: Connection, board: Board) -> None:
    chain.ensure(connection, "watch")
    running = generation(connection)
    assert chain.begin(connection, "watch", running, time.time())
    board.remove(plan())
    chain.break_off(connection, "watch")
    assert not chain.go_on(connection, "watch", running, time.time())
    assert jobs(connection) == []
    assert not chain.ensure(connection, "watch")
