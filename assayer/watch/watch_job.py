"""One tick: every watch that is due is looked at, what is new and whole is queued, and the next tick is scheduled. It never sleeps."""

import logging
import os
import time
from typing import Any

from redis.exceptions import RedisError
from rq import get_current_job
from rq.job import Job
from rq.serializers import JSONSerializer

from assayer import formats
from assayer.checkpoint import numbers_called_after
from assayer.files import printable
from assayer.plan import Plan, PlanStore, host_name, state_directory
from assayer.progress import has_progress
from assayer.queues import Connection, chain
from assayer.queues.board import Board, Note
from assayer.queues.enqueue import Task, arrange, enqueue, is_in_flight, open_queue, put_notes, statuses
from assayer.record import Place
from assayer.watch.diff import Decision
from assayer.watch.known import Known
from assayer.watch.look import Look, Lookout
from assayer.watch.publishing import Publisher
from assayer.watch.sights import Sights

__all__ = ["task_of", "tick"]

logger = logging.getLogger(__name__)

# RQ's scheduler floors to whole seconds: a tick can come that much before its moment.
EARLY = 1.0
# Seconds that one tick waits for its looks at most, and at least, before another watch is due; those that take longer are served later.
PATIENCE, PATIENCE_MIN = 2.0, 0.5
# Seconds until a look that has not come back, or failed, is asked after again.
RETRY_LOOK = 1.0
# Seconds after which a job that failed without a record (its results could not be written, say) is queued again.
RETRY_PAUSE = 30.0
# Seconds after which a look that has not come back is spoken of.
SLOW = 3.0

_lookout = Lookout()
_known: dict[str, Known] = {}
_generations: dict[str, int] = {}
_sights: dict[tuple[str, str], Sights] = {}
_publisher = Publisher()


def tick(queue: str, generation: int) -> None:
    """The watch job. ``generation`` is this tick's place in the chain of its queue; a tick that is out of place does nothing."""
    job = get_current_job()
    assert job is not None
    connection = job.connection
    now = time.time()
    if not chain.begin(connection, queue, generation, now):
        return
    if generation <= _generations.get(queue, 0):
        # The chain began anew: Redis has lost its data, and all of it is to be published again.
        _lookout.forget({})
        _sights.clear()
    _generations[queue] = generation
    board = Board(connection, queue)
    known = _known.setdefault(queue, Known())
    known.refresh(board)
    if not known.plans:
        return
    _lookout.forget({plan_id: plan.given for plan_id, (plan, _) in known.plans.items()})
    for key in [key for key in _sights if key[0] == queue and key[1] not in known.plans]:
        del _sights[key]
        _publisher.drop(key[1])
    due = [plan_id for plan_id in board.due(now + EARLY) if plan_id in known.plans]
    neighbours = known.neighbours(connection)
    begun = set()
    cost = _lookout.cost()
    for plan_id, active_at in zip(due, board.active_at(due), strict=True):
        plan, baseline = known.plans[plan_id]
        if _lookout.start(plan, baseline, plan.given if active_at is None else active_at, neighbours, cost):
            begun.add(plan_id)
    guards: dict[str, str | None] = {chain.chain_key(queue): str(generation)}
    later = board.next_due(after=now + EARLY)
    patience = min(PATIENCE, max(PATIENCE_MIN, (later or now + PATIENCE) - now))
    notes: dict[str, Note] = {}
    for plan, seen in _lookout.ready(begun, patience):
        if known.is_current(plan):
            # Late ticks are not made up for: the next look is one interval from now.
            notes[plan.id] = _served(board, plan, seen, guards, now)
    for plan, seconds in _lookout.hanging():
        if known.is_current(plan) and plan.id not in notes:
            # One that does not come back is not waited for: it would delay the others at every tick.
            problem = f"its file system has not answered for {seconds:.0f} s" if seconds > SLOW else None
            notes[plan.id] = Note(plan.id, next=now + RETRY_LOOK, problem=problem)
    board.note(list(notes.values()))
    earliest = board.next_due()
    if earliest is not None:
        chain.go_on(connection, queue, generation, max(now, earliest))


def _served(board: Board, plan: Plan, seen: Look | str, guards: dict[str, str | None], now: float) -> Note:
    """Acts on one look; what is to be noted of it."""
    if isinstance(seen, str):
        return Note(plan.id, next=now + RETRY_LOOK, problem=seen)
    try:
        return _serve(board, plan, seen, guards, now)
    except RedisError:
        # What was decided is not on the board: the next tick begins with all of it anew.
        _sights.pop((board.queue, plan.id), None)
        _lookout.drop(plan)
        raise
    except Exception as error:
        # A bug that one watch meets must not take the others with it.
        logger.exception("the tick of %s with %s failed", printable(plan.directory), plan.label)
        return Note(plan.id, next=now + plan.polling_interval, problem=f"this tick failed: {type(error).__name__}: {error}")


def _serve(board: Board, plan: Plan, look: Look, guards: dict[str, str | None], now: float) -> Note:
    """Queues what is due, publishes what was seen, and ends the watch when it is over."""
    sights = _sights.setdefault((board.queue, plan.id), Sights())
    states = {_key(look, d): _sight(plan, d) for d in look.decisions if d.state != "baseline"}
    due = [d for d in look.decisions if d.state == "due"]
    if due:
        _queue(board, plan, look, due, states, guards, sights)
        if not board.has(plan.id):
            return Note(plan.id, next=now)
    changed = sights.publish(board, plan.id, states, look)
    _publisher.keep_up(plan, sights.finished)
    waits = any(sight["state"] == "queued" for sight in states.values()) or _publisher.is_busy(plan)
    # A directory that is away is waited for; with --once, what cannot be seen is not there.
    waits = waits or (look.missing and (not plan.once or _any_in_flight(board, sights)))
    if look.final and not waits and not _still_moving(plan, look) and not _publisher.try_again(plan):
        _end(board, plan, _publisher.problem(plan))
        return Note(plan.id, next=now)
    problems = [*look.problems, *(text for text in (look.notice, _publisher.problem(plan)) if text)]
    active_at = look.began if changed or waits else None
    return Note(plan.id, next=now + plan.polling_interval, last=look.began, active_at=active_at, problem="; ".join(problems))


def _key(look: Look, decision: Decision) -> str:
    """Under which name a checkpoint stands on the board: its path; an earlier save of it that is held, with its identity."""
    path = decision.seen.checkpoint.path
    newer = any(d is not decision and d.seen.checkpoint.path == path and d.seen.listing.path == path for d in look.decisions)
    return f"{path}@{(decision.seen.identity or '')[:8]}" if decision.seen.listing.path != path and newer else path


def _queue(
    board: Board,
    plan: Plan,
    look: Look,
    due: list[Decision],
    states: dict[str, dict[str, Any]],
    guards: dict[str, str | None],
    sights: Sights,
) -> None:
    """Queues each evaluation that is due and neither waits nor runs; all of them take their places together."""
    newest = task_of(plan, max(due, key=lambda d: d.seen.checkpoint.order))
    latest = None
    if plan.latest_only:
        latest = (board.newest_key(), plan.id)
        board.connection.hset(*latest, newest.id)
    tasks = [(d, task_of(plan, d, latest)) for d in sorted(due, key=lambda d: d.seen.checkpoint.order, reverse=plan.order == "newest")]
    in_flight = statuses(board.connection, [task.id for _, task in tasks])
    # Asked of those alone that may be queued now: each costs a look at a file system, and thousands may wait, tick after tick.
    begun = {task.id for _, task in tasks if not is_in_flight(in_flight.get(task.id)) and _was_begun(task)}
    # A worker that has nothing to do takes the first that is pushed, before the others have come and all are arranged.
    tasks.sort(key=lambda pair: pair[1].id not in begun)
    queue = open_queue(board.connection, plan.eval_queue)
    queued = 0
    notes: dict[str, str] = {}
    for decision, task in tasks:
        sight = states[_key(look, decision)]
        status = in_flight.get(task.id)
        note = look.notes.get(decision.seen.checkpoint.path, "")
        sight |= {"state": "queued", "job": task.id, "reason": "; ".join(part for part in (decision.reason, note) if part)}
        if note and sights.active.get(_key(look, decision), {}).get("reason") != sight["reason"]:
            notes[task.id] = note
        if is_in_flight(status):
            continue
        hindrance = _hindrance(board.connection, task.id, status, look, plan)
        if hindrance is not None:
            sight |= {"state": "failing", "reason": hindrance} if hindrance else {}
        elif enqueue(queue, task, {**guards, board.plan_key(plan.id): None}, plan.order == "newest", begun=task.id in begun):
            queued += 1
            logger.info("-> %s %s queued", printable(decision.seen.checkpoint.name), plan.label)
    if queued:
        arrange(queue)
    put_notes(board.connection, notes)


def _was_begun(task: Task) -> bool:
    place = Place.of(task.checkpoint, task.evaluator.name, task.results_dir, task.weights)
    return has_progress(place.progress(task.identity))


def task_of(plan: Plan, decision: Decision, newest: tuple[str, str] | None = None) -> Task:
    """The evaluation that a due checkpoint means under this plan; of one that went before it was whole, there will be word of that."""
    checkpoint = decision.seen.checkpoint
    again = [moment for moment in (plan.reevaluate_before, plan.retry_failed_before) if moment is not None]
    return Task(
        checkpoint=checkpoint.path,
        format=checkpoint.format,
        step=checkpoint.position.step,
        epoch=checkpoint.position.epoch,
        tokens=checkpoint.position.tokens,
        identity=decision.seen.identity or "",
        evaluator=plan.evaluator,
        results_dir=plan.results_dir,
        timeout=plan.timeout,
        retries=plan.retries,
        not_before=max(again, default=0.0),
        weights=plan.weights,
        merges=plan.merging.mode == "auto" and formats.is_merged_for(checkpoint, plan.evaluator.reference.builtin is not None),
        merging=plan.merging,
        launcher=plan.launcher,
        processes=plan.gpus_per_eval,
        signature=decision.seen.signature,
        turn=_turn(plan, checkpoint.path),
        root=plan.root,
        newest=newest,
    )


def _turn(plan: Plan, path: str) -> str:
    """The folder whose checkpoints take turns with those of others: the run's, also where each checkpoint has a folder of its own."""
    folder = os.path.dirname(path)
    while folder != plan.root and numbers_called_after(os.path.basename(folder)):
        folder = os.path.dirname(folder)
    return folder


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


def _still_moving(plan: Plan, look: Look) -> bool:
    """True while a checkpoint that is not whole has changed within the quiet period: it may still become whole."""
    return any(d.state == "writing" and look.began - d.seen.since < plan.quiet_period + 1 for d in look.decisions)


def _any_in_flight(board: Board, sights: Sights) -> bool:
    """True while an evaluation waits or runs that an earlier look has queued."""
    jobs = [sight["job"] for sight in sights.active.values() if "job" in sight]
    return any(is_in_flight(status) for status in statuses(board.connection, jobs).values())


def _end(board: Board, plan: Plan, problem: str) -> None:
    last_word = f"points are missing; assayer.results publish gives them: {problem}" if problem else ""
    # Before the watch is over, or who looks at its end would miss it.
    board.note([Note(plan.id, next=time.time(), problem=last_word)])
    logger.info("<- watch of %s with %s has ended", printable(plan.directory), plan.label)
    if plan.host == host_name():
        PlanStore(state_directory()).stop(plan.id, plan.given)
    board.remove(plan, last_word)
