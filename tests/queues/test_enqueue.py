"""One id a piece of work, queued all or nothing."""

import json

from rq.job import Job
from samples import plan, task

from assayer.queues import Connection
from assayer.queues.board import Board
from assayer.queues.enqueue import EVALUATE, Task, enqueue, open_queue, statuses


def test_a_job_is_plain_json_with_a_readable_description_and_the_asked_limit(connection: Connection) -> None:
    queue = open_queue(connection, "evaluation")
    assert enqueue(queue, task(), {})
    (job_id,) = queue.get_job_ids()
    job = Job.fetch(job_id, connection=connection, serializer="json")
    assert job.description == "evaluate m_step1.pt with e"
    assert job.func_name == EVALUATE
    assert job.timeout is not None
    assert job.timeout >= 86400, "RQ's default of 180 s never counts"
    assert Task.from_json(job.kwargs) == task()
    assert json.loads(connection.hget(job.key, "meta") or b"{}") == {}


def test_the_same_work_is_queued_once(connection: Connection) -> None:
    queue = open_queue(connection, "evaluation")
    assert enqueue(queue, task(), {})
    assert not enqueue(queue, task(timeout=5), {})
    assert enqueue(queue, task(identity="b" * 32), {})
    assert queue.count == 2


def test_work_that_has_ended_can_be_queued_again(connection: Connection) -> None:
    queue = open_queue(connection, "evaluation")
    enqueue(queue, task(), {})
    connection.delete(queue.key)
    connection.hset(Job.key_for(task().id), "status", "failed")
    assert enqueue(queue, task(), {})
    assert queue.get_job_ids() == [task().id]
    assert statuses(connection, [task().id]) == {task().id: "queued"}


def test_an_outcome_that_could_not_be_written_is_carried_on(connection: Connection) -> None:
    queue = open_queue(connection, "evaluation")
    enqueue(queue, task(), {})
    connection.hset(
        Job.key_for(task().id), mapping={"status": "failed", "meta": json.dumps({"outcome": {"status": "finished"}, "runs": 3})}
    )
    enqueue(queue, task(), {})
    assert json.loads(connection.hget(Job.key_for(task().id), "meta")) == {"outcome": {"status": "finished"}}


def test_a_watch_that_was_stopped_or_overtaken_queues_nothing(connection: Connection) -> None:
    board = Board(connection, "watch")
    queue = open_queue(connection, "evaluation")
    board.put(plan())
    connection.hset("assayer:watch:chain", "generation", 4)
    guards: dict[str, str | None] = {"assayer:watch:chain": "4", board.plan_key(plan().id): None}
    connection.hset("assayer:watch:chain", "generation", 5)
    assert not enqueue(queue, task(), guards)
    connection.hset("assayer:watch:chain", "generation", 4)
    board.remove(plan())
    assert not enqueue(queue, task(), guards)
    board.put(plan())
    assert enqueue(queue, task(), guards)


def test_at_the_front_means_before_those_that_wait(connection: Connection) -> None:
    queue = open_queue(connection, "evaluation")
    enqueue(queue, task(), {})
    enqueue(queue, task(identity="b" * 32), {}, at_front=True)
    assert queue.get_job_ids() == [task(identity="b" * 32).id, task().id]


def test_a_name_that_is_no_utf_8_can_be_queued(connection: Connection) -> None:
    queue = open_queue(connection, "evaluation")
    strange = task(checkpoint="/run/m_\udcff\n.pt")
    assert enqueue(queue, strange, {})
    job = Job.fetch(strange.id, connection=connection, serializer="json")
    assert Task.from_json(job.kwargs) == strange
    assert job.description == "evaluate m_\\udcff\\n.pt with e"
