"""``--dry_run``: for each checkpoint what a watch would do, and why not; nothing is started or written."""

import os
import time
from functools import partial
from pathlib import Path

from rich.console import Console

from assayer.files import printable
from assayer.plan import Baseline, Plan
from assayer.queues.connect import Target, open_running
from assayer.queues.embedded import Server
from assayer.queues.enqueue import is_in_flight, statuses
from assayer.watch.diff import Decision
from assayer.watch.look import Look, Memory, in_thread, look
from assayer.watch.show import Row, table_of
from assayer.watch.watch_job import task_of

__all__ = ["show_dry_run"]

# Seconds without progress after which a directory counts as hung.
TIMEOUT = 120

_WORDS = {"due": "would be evaluated", "done": "recorded", "baseline": "not new", "skipped": "skipped", "writing": "not ready"}


def show_dry_run(plans: list[tuple[Plan, Baseline]], console: Console, chosen: Target, state: Path) -> int:
    """Prints one line a checkpoint and evaluator; returns the exit code: 1 when a directory could not be read."""
    rows: list[Row] = []
    code = 0
    there_before = 0
    for plan, baseline in plans:
        there_before += plan.there_before
        memory = Memory()
        seen = in_thread(partial(look, plan, baseline, memory, time.time(), time.time()), TIMEOUT, progress=partial(_count, memory))
        if seen is None:
            console.print(f"{printable(plan.directory)} has not answered for {TIMEOUT} s", markup=False)
            code = 1
            continue
        for problem in seen.problems:
            console.print(problem, markup=False, soft_wrap=True)
        rows += _rows(plan, seen, _in_flight(plan, seen, chosen, state))
    settled = there_before - sum(row.state == _WORDS["baseline"] for row in rows)
    console.print(table_of(rows, there_before=settled))
    console.print(f"{sum(row.state == _WORDS['due'] for row in rows)} of {len(rows) + settled} would be evaluated", highlight=False)
    return code


def _count(memory: Memory) -> int:
    return memory.count


def _in_flight(plan: Plan, seen: Look, chosen: Target, state: Path) -> set[str]:
    """Paths of the due checkpoints that wait or run already; a server that does not run is not started for that."""
    if chosen.embedded and not Server(state).is_running():
        return set()
    connection = open_running(chosen, state)
    tasks = {task_of(plan, d).id: d.seen.checkpoint.path for d in seen.decisions if d.state == "due"}
    if connection is None or not tasks:
        return set()
    return {tasks[job_id] for job_id, status in statuses(connection, list(tasks)).items() if is_in_flight(status)}


def _rows(plan: Plan, seen: Look, in_flight: set[str]) -> list[Row]:
    return [_row(plan, d, d.seen.checkpoint.path in in_flight) for d in seen.decisions]


def _row(plan: Plan, decision: Decision, in_flight: bool) -> Row:
    checkpoint, record = decision.seen.checkpoint, decision.record
    state = "in flight" if in_flight else record.status if record else _WORDS[decision.state]
    return Row(
        checkpoint.path,
        os.path.relpath(checkpoint.path, plan.root),
        plan.label,
        state,
        reason=decision.reason,
        step=checkpoint.position.step,
        epoch=checkpoint.position.epoch,
        attempts=record.attempts if record else 0,
        metrics=record.metrics if record else {},
        error=(record.error or {}).get("message") if record else None,
    )
