"""One id a piece of work, queued all or nothing."""

import json

from rq.job import Job
from samples import plan, task

from assayer.plan import Baseline
from assayer.queues import Connection
from assayer.queues.board import Board
from assayer.queues.enqueue import EVALUATE, Task, arrange, enqueue, note_begun, note_served, open_queue, statuses


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
    board.put(plan(), Baseline())
    connection.hset("assayer:watch:chain", "generation", 4)
    guards: dict[str, str | None] = {"assayer:watch:chain": "4", board.plan_key(plan().id): None}
    connection.hset("assayer:watch:chain", "generation", 5)
    assert not enqueue(queue, task(), guards)
    connection.hset("assayer:watch:chain", "generation", 4)
    board.remove(plan())
    assert not enqueue(queue, task(), guards)
    board.put(plan(), Baseline())
    assert enqueue(queue, task(), guards)


def waiting(connection: Connection, *tasks: Task, newest_first: bool = False) -> list[str]:
    """The names of the checkpoints in the order in which they wait, with their folder where it is not /run."""
    queue = open_queue(connection, "evaluation")
    for one in tasks:
        assert enqueue(queue, one, {}, newest_first)
    arrange(queue)
    jobs = [Job.fetch(job_id, connection=connection, serializer="json") for job_id in queue.get_job_ids()]
    return [str(job.kwargs["checkpoint"]).removeprefix("/run/") for job in jobs]


def step(number: int | None, folder: str = "/run") -> Task:
    name = "last.ckpt" if number is None else f"m_step{number}.pt"
    return task(checkpoint=f"{folder}/{name}", step=number)


def test_within_a_folder_the_step_decides_whenever_a_job_came(connection: Connection) -> None:
    assert waiting(connection, step(20), step(100), step(3)) == ["m_step3.pt", "m_step20.pt", "m_step100.pt"]
    assert waiting(connection, step(4)) == ["m_step3.pt", "m_step4.pt", "m_step20.pt", "m_step100.pt"]


def test_the_newest_goes_first_where_that_is_asked_for(connection: Connection) -> None:
    found = waiting(connection, step(None), step(20), step(100), step(3), newest_first=True)
    assert found == ["m_step100.pt", "m_step20.pt", "m_step3.pt", "last.ckpt"]


def test_five_hundred_of_one_folder_do_not_starve_the_one_of_another(connection: Connection) -> None:
    many = [step(number, "/many") for number in range(500)]
    found = waiting(connection, *many, step(7, "/one"), step(8, "/two"), step(9, "/two"))
    assert found[:5] == ["/many/m_step0.pt", "/one/m_step7.pt", "/two/m_step8.pt", "/many/m_step1.pt", "/two/m_step9.pt"]
    assert found[5:] == [f"/many/m_step{number}.pt" for number in range(2, 500)]


def test_the_folder_that_was_served_longest_ago_goes_first(connection: Connection) -> None:
    note_served(connection, step(0, "/a"))
    assert waiting(connection, step(1, "/a"), step(2, "/a"), step(1, "/b")) == ["/b/m_step1.pt", "/a/m_step1.pt", "/a/m_step2.pt"]


def test_a_strangers_job_on_the_queue_keeps_a_place(connection: Connection) -> None:
    queue = open_queue(connection, "evaluation")
    stranger = queue.enqueue("os.getpid", job_id="stranger")
    for number in (2, 1):
        enqueue(queue, step(number), {})
    arrange(queue)
    assert queue.get_job_ids() == [stranger.id, step(1).id, step(2).id]


def test_a_name_that_is_no_utf_8_can_be_queued(connection: Connection) -> None:
    queue = open_queue(connection, "evaluation")
    strange = task(checkpoint="/run/m_\udcff\n.pt")
    assert enqueue(queue, strange, {})
    job = Job.fetch(strange.id, connection=connection, serializer="json")
    assert Task.from_json(job.kwargs) == strange
    assert job.description == "evaluate m_\\udcff\\n.pt with e"


def test_what_was_begun_before_goes_before_all_others(connection: Connection) -> None:
    queue = open_queue(connection, "evaluation")
    enqueue(queue, step(9, "/b"), {}, begun=True)
    assert waiting(connection, step(1, "/a"), step(1, "/b"), step(2, "/a"))[0] == "/b/m_step9.pt"
    note_begun(Job.fetch(step(2, "/a").id, connection=connection, serializer="json"))
    assert sorted(waiting(connection)[:2]) == ["/a/m_step2.pt", "/b/m_step9.pt"]
