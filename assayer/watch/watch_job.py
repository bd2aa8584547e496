"""One tick: every watch that is due is looked at, what is new and whole is queued, and the next tick is scheduled. It never sleeps."""

import logging
import time
from typing import Any

from redis.exceptions import RedisError
from rq import get_current_job
from rq.job import Job
from rq.serializers import JSONSerializer

from assayer import formats
from assayer.files import printable
from assayer.plan import Plan, PlanStore, host_name, state_directory
from assayer.queues import Connection, chain
from assayer.queues.board import Board
from assayer.queues.enqueue import Task, enqueue, is_in_flight, open_queue, statuses
from assayer.watch.diff import Decision
from assayer.watch.look import Look, Lookout

__all__ = ["task_of", "tick"]

logger = logging.getLogger(__name__)

# RQ's scheduler floors to whole seconds: a tick can come that much before its moment.
EARLY = 1.0
# Seconds that one tick waits for its listings; those that take longer are looked at by the next.
PATIENCE = 2.0
# Seconds until a look that has not come back, or failed, is asked after again.
RETRY_LOOK = 1.0
# Seconds after which a job that failed without a record (its results could not be written, say) is queued again.
RETRY_PAUSE = 30.0

_lookout = Lookout()
_published: dict[str, dict[str, dict[str, Any]]] = {}


def tick(queue: str, generation: int) -> None:
    """The watch job. ``generation`` is this tick's place in the chain of its queue; a tick that is out of place does nothing."""
    job = get_current_job()
    assert job is not None
    connection = job.connection
    now = time.time()
    if not chain.begin(connection, queue, generation, now):
        return
    board = Board(connection, queue)
    plans = board.plans()
    if not plans:
        return
    _lookout.forget({plan.id for plan in plans})
    due = board.due(plans, now + EARLY)
    begun = {plan.id for plan in due if _lookout.start(plan, board.tick(plan.id).get("active_at", plan.given))}
    deadline = time.monotonic() + PATIENCE
    guards: dict[str, str | None] = {chain.chain_key(queue): str(generation)}
    for plan in due:
        # One that has not come back since an earlier tick is not waited for: it would delay the others at every tick.
        seen = _lookout.wait(plan, deadline - time.monotonic() if plan.id in begun else 0)
        if not board.is_current(plan):
            continue
        if isinstance(seen, str):
            board.note_tick(plan.id, next=now + RETRY_LOOK, problem=seen)
            continue
        # Late ticks are not made up for: the next look is one interval from now.
        board.note_tick(plan.id, next=now + plan.polling_interval)
        try:
            _serve(board, plan, seen, guards)
        except RedisError:
            raise
        except Exception as error:
            # A bug that one watch meets must not take the others with it.
            logger.exception("the tick of %s with %s failed", printable(plan.directory), plan.label)
            board.note_tick(plan.id, problem=f"this tick failed: {type(error).__name__}: {error}")
    left = board.plans()
    if left:
        chain.go_on(connection, queue, generation, max(now, board.next_due(left)))


def _serve(board: Board, plan: Plan, look: Look, guards: dict[str, str | None]) -> None:
    """Queues what is due, publishes what was seen, and ends the watch when it is over."""
    states = {d.seen.checkpoint.path: _sight(plan, d) for d in look.decisions}
    due = [d for d in look.decisions if d.state == "due"]
    tasks = {d.seen.checkpoint.path: task_of(plan, d) for d in due}
    in_flight = statuses(board.connection, [task.id for task in tasks.values()])
    queue = open_queue(board.connection, plan.eval_queue)
    # With the newest first, each goes before those that wait: so the newest has to come last.
    for decision in due if plan.order == "oldest" else due[::-1]:
        path = decision.seen.checkpoint.path
        task, sight = tasks[path], states[path]
        status = in_flight.get(task.id)
        sight |= {"state": "queued", "job": task.id}
        if is_in_flight(status):
            continue
        hindrance = _hindrance(board.connection, task.id, status, look, plan)
        if hindrance is not None:
            sight |= {"state": "failing", "reason": hindrance} if hindrance else {}
        elif enqueue(queue, task, {**guards, board.plan_key(plan.id): None}, at_front=plan.order == "newest"):
            logger.info("-> %s %s queued", printable(decision.seen.checkpoint.name), plan.label)
    if not board.has(plan.id):
        return
    changed = _publish(board, plan, states, keep_gone=look.missing)
    values: dict[str, object] = {"last": look.began, "problem": "; ".join(look.problems)}
    # A directory that is away is waited for; with --once, what cannot be seen is not there.
    away = look.missing and (not plan.once or _any_in_flight(board, plan))
    waits = away or any(sight["state"] == "queued" for sight in states.values())
    if changed or waits:
        values["active_at"] = look.began
    board.note_tick(plan.id, **values)
    if look.final and not waits and not _still_moving(plan, look):
        _end(board, plan)


def task_of(plan: Plan, decision: Decision) -> Task:
    """The evaluation that a due checkpoint means under this plan."""
    checkpoint = decision.seen.checkpoint
    assert decision.seen.identity is not None
    again = [moment for moment in (plan.reevaluate_before, plan.retry_failed_before) if moment is not None]
    return Task(
        checkpoint=checkpoint.path,
        format=checkpoint.format,
        step=checkpoint.position.step,
        epoch=checkpoint.position.epoch,
        tokens=checkpoint.position.tokens,
        identity=decision.seen.identity,
        evaluator=plan.evaluator,
        results_dir=plan.results_dir,
        timeout=plan.timeout,
        retries=plan.retries,
        not_before=max(again, default=0.0),
        weights=plan.weights,
        merges=plan.merging.mode == "auto" and formats.of(checkpoint).SHARDED,
        merging=plan.merging,
    )


def _hindrance(connection: Connection, job_id: str, status: str | None, look: Look, plan: Plan) -> str | None:
    """None when the job may be queued now. A sentence when it failed without leaving a record and a pause is kept; an empty one when it
    has finished since the look, whose record the next look will see."""
    if status not in ("finished", "failed", "stopped", "canceled"):
        return None
    job = Job.fetch(job_id, connection=connection, serializer=JSONSerializer)
    ended = job.ended_at.timestamp() if job.ended_at else 0.0
    if status == "finished":
        return "" if ended > look.began - 1 else None
    # A watch that is about to end does not try for ever what this very watch has seen fail.
    if ended < plan.given or (time.time() - ended > RETRY_PAUSE and not look.final):
        return None
    return _last_line(job) or f"the job {status}; it is queued again in a moment"


def _last_line(job: Job) -> str:
    """The message of the exception that RQ keeps of a failed job; empty when there is none."""
    result = job.latest_result()
    lines = (result.exc_string or "").strip().splitlines() if result else []
    return printable(lines[-1].partition(": ")[2] or lines[-1]) if lines else ""


def _sight(plan: Plan, decision: Decision) -> dict[str, Any]:
    checkpoint, record = decision.seen.checkpoint, decision.record
    sight: dict[str, Any] = {
        "name": checkpoint.name,
        "state": decision.state,
        "reason": decision.reason,
        "step": checkpoint.position.step,
        "epoch": checkpoint.position.epoch,
        "format": checkpoint.format,
        "identity": decision.seen.identity,
    }
    if record:
        glance = record.glance()
        sight |= {"state": glance.pop("status"), **glance}
    return sight


def _publish(board: Board, plan: Plan, states: dict[str, dict[str, Any]], keep_gone: bool) -> bool:
    """Brings the board up to date; True when a checkpoint has come, gone or changed its state."""
    key = f"{board.queue}:{plan.id}"
    before = _published.get(key)
    if before is None or not board.connection.exists(board.sight_key(plan.id)):
        before = board.sights(plan.id)
    changed = {path: sight for path, sight in states.items() if before.get(path) != sight}
    # While the directory cannot be read, nothing is known to be gone. A finished one stays in sight after rotation took it.
    gone = [] if keep_gone else [path for path, sight in before.items() if path not in states and "metrics" not in sight]
    board.publish(plan.id, changed, gone)
    _published[key] = {**{path: sight for path, sight in before.items() if path not in gone}, **states}
    return bool(gone) or any(before.get(path, {}).get("state") != sight["state"] for path, sight in changed.items())


def _still_moving(plan: Plan, look: Look) -> bool:
    """True while a checkpoint that is not whole has changed within the quiet period: it may still become whole."""
    return any(d.state == "writing" and look.began - d.seen.since < plan.quiet_period + 1 for d in look.decisions)


def _any_in_flight(board: Board, plan: Plan) -> bool:
    """True while an evaluation waits or runs that an earlier look has queued."""
    jobs = [sight["job"] for sight in board.sights(plan.id).values() if "job" in sight]
    return any(is_in_flight(status) for status in statuses(board.connection, jobs).values())


def _end(board: Board, plan: Plan) -> None:
    logger.info("<- watch of %s with %s has ended", printable(plan.directory), plan.label)
    if plan.host == host_name():
        PlanStore(state_directory()).stop(plan.id, plan.given)
    board.remove(plan)
