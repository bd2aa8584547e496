"""Ends watches, empties our queues, stops our workers and our Redis: ``python -m assayer.shutdown``. Baselines and records stay."""

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import click
import redis
from rq.command import send_stop_job_command
from rq.job import Job
from rq.serializers import JSONSerializer

from assayer import cli
from assayer.errors import RedisError, StateError, UsageError
from assayer.files import locked, printable
from assayer.plan import Plan, PlanStore, host_name, state_directory
from assayer.queues import Connection, chain
from assayer.queues.board import Board
from assayer.queues.connect import Target, open_running, target
from assayer.queues.embedded import Server, other_hosts
from assayer.queues.enqueue import EVALUATE, open_queue
from assayer.queues.recover import is_dead, is_ours, our_workers, remove_waiting, return_jobs
from assayer.queues.served import ServedJobs
from assayer.queues.stop import order_to_stop
from assayer.session import servers
from assayer.worker import hold
from assayer.worker.launch import Crew
from assayer.worker.scratch import Scratch
from assayer.worker.served_job import cancel
from assayer.worker.supervise import retire_redis

__all__ = ["main"]

# Seconds within which a server has ended that was told to.
SERVER_END = 10.0


@dataclass(frozen=True)
class _Where:
    """What a shutdown works on."""

    connection: Connection
    state: Path
    chosen: Target
    watch_queue: str
    eval_queue: str


@cli.command("shutdown")
@click.option("--directory", "directories", multiple=True, metavar="DIR", help="End only the watches of this directory. Repeatable.")
@click.option("--now", is_flag=True, help="End running evaluations at once; the next watch finds their checkpoints again.")
@cli.redis_options
def main(
    directories: tuple[str, ...],
    now: bool,
    redis_url: str | None,
    redis_host: str | None,
    redis_port: int | None,
    watch_queue_name: str,
    eval_queue_name: str,
) -> None:
    """Ends the watches, takes our jobs off the two queues, stops our workers after the running evaluation, then our Redis.

    Other RQ users' queues and workers on the same Redis are not touched. Baselines stay on disk, so that the next watch misses nothing.
    """
    state = state_directory()
    chosen = target(redis_url, redis_host, redis_port, state)
    connection = open_running(chosen, state)
    if connection is None:
        store = PlanStore(state)
        for plan in store.active(chosen.name):
            if not directories or _names(plan, directories):
                store.stop(plan.id)
                _say(f"ended the watch of {plan.directory} with {plan.label}")
        for host in other_hosts(state):
            _say(f"an embedded Redis has data on host {host}: run assayer.shutdown there")
        _say("nothing is running")
        return
    where = _Where(connection, state, chosen, watch_queue_name, eval_queue_name)
    if directories:
        _end_some(where, directories, now)
        return
    _end_servers(where)
    _end_watches(where, _plans(where))
    chain.break_off(connection, watch_queue_name)
    taken = []
    _cancel_served(where)
    for name in (watch_queue_name, eval_queue_name):
        waited = remove_waiting(open_queue(connection, name))
        _say(f"queue {name}: took {_count(len(waited), 'waiting job')} out")
        taken += waited
    _let_go(taken, all_ended=False, say=False)
    try:
        _stop_workers(where, now)
    except BaseException:
        Crew(state, chosen).release_redis()
        raise
    _sweep_scratch(state)
    if Crew(state, chosen).has_plans():
        return
    # What a worker that was ended at once had in its hands went back to the queue.
    with contextlib.suppress(redis.RedisError):
        _cancel_served(where)
        taken += remove_waiting(open_queue(connection, eval_queue_name))
    _let_go(taken, all_ended=True)
    _stop_redis(where)


def _end_servers(where: _Where) -> None:
    """Ends the servers of this host that work on these queues; those of others hear the order that is given to all workers."""
    for server in servers(where.state, where.chosen.name):
        if server["queue"] == where.eval_queue:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(server["pid"]), signal.SIGTERM)
            _say(f"ended the server at {server['url']}")
    deadline = time.monotonic() + SERVER_END
    while any(server["queue"] == where.eval_queue for server in servers(where.state, where.chosen.name)) and time.monotonic() < deadline:
        time.sleep(0.05)


def _cancel_served(where: _Where) -> None:
    """What clients have asked for and no worker has begun is cancelled: who asks for it later is told so."""
    jobs = ServedJobs(where.connection, where.eval_queue)
    cancelled = [job for job in jobs.waiting() if cancel(jobs, job, force=False) == "cancelled"]
    if cancelled:
        _say(f"queue {where.eval_queue}: cancelled {_count(len(cancelled), 'job')} of clients")


def _plans(where: _Where) -> list[Plan]:
    """What runs in Redis, and what this host's disk still takes for running."""
    plans = {p.id: p for p in PlanStore(where.state).active(where.chosen.name) if p.watch_queue == where.watch_queue}
    return list({**plans, **{p.id: p for p in Board(where.connection, where.watch_queue).plans()}}.values())


def _end_watches(where: _Where, plans: list[Plan]) -> None:
    store, board = PlanStore(where.state), Board(where.connection, where.watch_queue)
    for plan in plans:
        # The disk first: a supervisor publishes again what only Redis has forgotten.
        if plan.host == host_name():
            store.stop(plan.id)
        board.remove(plan)
        _say(f"ended the watch of {plan.directory} with {plan.label}")


def _names(plan: Plan, directories: tuple[str, ...]) -> bool:
    """True when one of these words means the plan's directory, by whatever path, or its pattern."""
    paths = [os.path.abspath(os.path.expanduser(d)) for d in directories]
    return plan.directory in paths or (not plan.is_pattern and plan.real in map(os.path.realpath, paths))


def _end_some(where: _Where, directories: tuple[str, ...], now: bool) -> None:
    plans = [plan for plan in _plans(where) if _names(plan, directories)]
    for directory in directories:
        if not any(_names(plan, (directory,)) for plan in plans):
            watched = ", ".join(sorted({printable(p.directory) for p in _plans(where)})) or "nothing"
            raise UsageError(f"{printable(directory)} is not watched; watched: {watched}")
    _end_watches(where, plans)
    board = Board(where.connection, where.watch_queue)
    seen = {sight["job"] for plan in plans for sight in board.sights(plan.id).values() if "job" in sight}
    names = {(plan.directory, plan.evaluator.name) for plan in plans}

    def belongs(job: Job) -> bool:
        """True for an evaluation of these watches, also one that was queued after the last look at the board."""
        if job.func_name != EVALUATE:
            return False
        above = [str(parent) for parent in Path(job.kwargs["checkpoint"]).parents]
        return job.id in seen or any((folder, job.kwargs["evaluator"]["name"]) in names for folder in above)

    queue = open_queue(where.connection, where.eval_queue)
    taken = remove_waiting(queue, belongs)
    _say(f"queue {where.eval_queue}: took {_count(len(taken), 'waiting job')} out")
    _let_go(taken, all_ended=False)
    for job_id in queue.started_job_registry.get_job_ids(cleanup=False) if now else []:
        job = Job.fetch(job_id, connection=where.connection, serializer=JSONSerializer)
        if is_ours(job) and belongs(job):
            send_stop_job_command(where.connection, job_id, serializer=JSONSerializer)
            _say(f"ended at once: {job.description}")
    left = _plans(where)
    if not left:
        chain.break_off(where.connection, where.watch_queue)
    _say(f"{_count(len(left), 'watch', 'watches')} left" if left else "no watch is left; the workers end after the running evaluation")


def _stop_workers(where: _Where, now: bool) -> None:
    """Ends our workers on every host, and waits for them; a watch that is given meanwhile keeps its own."""
    how = "now" if now else "warm"
    queues = [where.watch_queue, where.eval_queue]
    crew = Crew(where.state, where.chosen)
    others = crew.has_plans()
    if others:
        queues = sorted(crew.drop(set(queues), how))
    else:
        crew.stop(how, keep_redis=True)
    names = {worker["name"] for worker in _workers(where) if worker["queue"] in queues}
    order_to_stop(where.connection, queues, how)
    said = ""
    while True:
        standing = [worker for worker in _workers(where) if worker["name"] in names]
        for worker in standing:
            if is_dead(worker):
                # Killed together with its supervisor: RQ itself would believe in it until its heartbeat runs out.
                return_jobs(where.connection, worker["queue"], worker["name"], blame=True)
        if not standing and (others or not crew.is_staffed()):
            break
        if not others and crew.has_plans():
            _say("a new watch was given meanwhile: its workers stay")
            break
        busy = ", ".join(worker["name"] for worker in standing if worker["state"] == "busy")
        if busy and busy != said and not now:
            _say(f"waiting for the running evaluation of {busy} (--now ends it at once)")
            said = busy
        time.sleep(0.1)
    for name in sorted(names - {worker["name"] for worker in _workers(where)}):
        _say(f"worker {name} ended")


def _workers(where: _Where) -> list[dict[str, str]]:
    try:
        return our_workers(where.connection, [where.watch_queue, where.eval_queue])
    except redis.RedisError:
        # The server was killed meanwhile, or another shutdown was faster.
        if where.chosen.embedded and not Server(where.state).is_running():
            return []
        raise RedisError(f"{where.chosen.name} has stopped answering; the watches are ended, its workers may still run") from None


def _stop_redis(where: _Where) -> None:
    if not where.chosen.embedded:
        return
    crew = Crew(where.state, where.chosen)
    with locked(crew.gate):
        retire_redis(crew)
    _say("the embedded Redis still serves others" if Server(where.state).is_running() else "the embedded Redis is stopped")


def _sweep_scratch(state: Path) -> None:
    """Removes the merged checkpoints of this host that nobody reads; an evaluation that is queued again merges anew."""
    for folder in {None, *(plan.merging.scratch_dir for plan in PlanStore(state).all() if plan.host == host_name())}:
        with contextlib.suppress(StateError, OSError):
            Scratch(folder, None, lambda key: False).sweep()


def _let_go(taken: list[Job], all_ended: bool, say: bool = True) -> None:
    """Releases the holds of what waited, but for those that are all that is left of a checkpoint: these the next watch evaluates."""
    kept: dict[str, str] = {}
    for job in taken:
        facts = job.kwargs or {}
        held = hold.find(facts["checkpoint"], facts["identity"], facts["results_dir"]) if "checkpoint" in facts else None
        if held and os.path.lexists(held.checkpoint.path):
            # Another watch's evaluation may read it, unless all workers have ended.
            (hold.release if all_ended else hold.drop)(held)
        elif held:
            kept[held.checkpoint.path] = held.path
    for path, held_path in kept.items() if say else ():
        _say(f"{path} was deleted by its trainer and is kept for the next watch: {held_path}")


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _say(text: str) -> None:
    click.echo(printable(text))


if __name__ == "__main__":
    cli.run(main, "python -m assayer.shutdown")
