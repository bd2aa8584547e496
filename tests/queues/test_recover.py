"""What a dead worker held comes back; what is another user's stays."""

import json

from rq import Queue
from rq.executions import Execution
from rq.job import Job
from samples import task

from assayer.queues import Connection
from assayer.queues.enqueue import enqueue, open_queue
from assayer.queues.recover import is_ours, our_workers, remove_waiting, return_jobs


def start(connection: Connection, worker: str) -> None:
    """What RQ leaves behind when a worker takes the task and is killed before it ends."""
    queue = open_queue(connection, "evaluation")
    enqueue(queue, task(), {})
    connection.lpop(queue.key)
    job = Job.fetch(task().id, connection=connection, serializer="json")
    with connection.pipeline() as pipe:
        Execution.create(job, ttl=30, pipeline=pipe, worker_name=worker)
        pipe.hset(job.key, mapping={"status": "started", "meta": json.dumps({"runs": 1})})
        pipe.sadd("rq:workers", f"rq:worker:{worker}")
        pipe.hset(f"rq:worker:{worker}", "hostname", "h")
        pipe.execute()


def test_a_dead_workers_job_is_back_at_once_and_its_run_counts(connection: Connection) -> None:
    start(connection, "assayer-h-1")
    assert return_jobs(connection, "evaluation", "assayer-other", blame=True) == []
    assert return_jobs(connection, "evaluation", "assayer-h-1", blame=True) == [task().id]
    assert open_queue(connection, "evaluation").get_job_ids() == [task().id]
    assert connection.zcard("rq:wip:evaluation") == 0
    assert connection.smembers("rq:workers") == set()
    assert json.loads(connection.hget(Job.key_for(task().id), "meta"))["runs"] == 1
    assert return_jobs(connection, "evaluation", "assayer-h-1", blame=True) == [], "it is returned once"


def test_a_worker_that_we_ended_ourselves_is_not_to_blame(connection: Connection) -> None:
    start(connection, "assayer-h-1")
    return_jobs(connection, "evaluation", "assayer-h-1", blame=False)
    assert json.loads(connection.hget(Job.key_for(task().id), "meta"))["runs"] == 0


def test_only_our_own_waiting_jobs_are_taken_out(connection: Connection) -> None:
    ours = open_queue(connection, "evaluation")
    enqueue(ours, task(), {})
    enqueue(ours, task(identity="b" * 32), {})
    foreign = Queue("evaluation", connection=connection).enqueue("math.sqrt", 4)
    connection.lpush("rq:queue:evaluation", "no-such-job")
    assert not is_ours(foreign)
    assert len(remove_waiting(ours, only=lambda job: job.id == task().id)) == 1
    assert len(remove_waiting(ours)) == 1
    assert set(connection.lrange("rq:queue:evaluation", 0, -1)) == {b"no-such-job", foreign.id.encode()}
    assert len(remove_waiting(ours)) == 0


def test_another_users_worker_on_our_queue_is_not_ours(connection: Connection) -> None:
    for name in ("assayer-h-1", "hand-made"):
        connection.sadd("rq:workers:evaluation", f"rq:worker:{name}")
        connection.hset(f"rq:worker:{name}", mapping={"hostname": "h", "pid": 1, "state": "idle", "gpus": "0"})
    assert [w["name"] for w in our_workers(connection, ["evaluation"])] == ["assayer-h-1"]
