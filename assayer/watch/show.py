"""What a person sees of watches: rows, a live table in a terminal, one line an event on a pipe."""

import json
import os
import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from rq.exceptions import NoSuchJobError
from rq.job import Job
from rq.serializers import JSONSerializer

from assayer.files import natural_key, printable
from assayer.plan import Plan
from assayer.queues import Connection
from assayer.queues.board import Board

__all__ = ["BAD", "Events", "Row", "View", "Watched", "detail_of", "table_of"]

# States in which an evaluation did not come to metrics.
BAD = ("failed", "timeout", "failing")
# States in which something is still to happen with a checkpoint.
_ACTIVE = ("running", "queued", "writing", "failing")
_COLOURS = {"finished": "green", "running": "cyan", "queued": "blue", "writing": "yellow"} | dict.fromkeys(BAD, "red")
# Metrics that a line of the table shows.
METRICS_SHOWN = 4
# Lines that a table too long for its terminal keeps for what is settled already.
SETTLED_SHOWN = 5


@dataclass(frozen=True)
class Row:
    """One checkpoint under one evaluator. ``seconds`` is the evaluation's time, so far or in all."""

    path: str
    name: str
    evaluator: str
    state: str
    reason: str = ""
    step: int | None = None
    epoch: float | None = None
    attempts: int = 0
    seconds: float | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    error: str | None = None
    ended: float | None = None
    log: str | None = None

    @property
    def position(self) -> str:
        return str(self.step) if self.step is not None else f"epoch {self.epoch:g}" if self.epoch is not None else ""


@dataclass(frozen=True)
class Watched:
    """What is to be shown of one watch: its rows by step, what hinders it, and how many settled checkpoints are not among the rows."""

    rows: list[Row]
    problem: str
    left_out: int


class View:
    """What watches have on the board, look after look; what has not changed is not read again."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._sights: dict[str, tuple[int, dict[str, Any]]] = {}

    def watched(self, plans: list[Plan]) -> list[Watched]:
        """Each of these watches as it is now; what waits or runs as RQ knows it this moment."""
        told: dict[str, tuple[int, str, int]] = {}
        for queue in {plan.watch_queue for plan in plans}:
            ids = [plan.id for plan in plans if plan.watch_queue == queue]
            told |= dict(zip(ids, Board(self.connection, queue).versions(ids), strict=True))
        for plan in plans:
            known = self._sights.get(plan.id)
            version = told[plan.id][0]
            if known is None or known[0] != version:
                self._sights[plan.id] = (version, Board(self.connection, plan.watch_queue).sights(plan.id) if version else {})
        sights = {plan.id: self._sights[plan.id][1] for plan in plans}
        waiting = {s["job"] for seen in sights.values() for s in seen.values() if s["state"] == "queued" and "job" in s}
        live = _live(self.connection, waiting, time.time())
        return [Watched(_rows(plan, sights[plan.id], live), *told[plan.id][1:]) for plan in plans]


def _rows(plan: Plan, sights: dict[str, Any], live: dict[str, dict[str, Any]]) -> list[Row]:
    rows = []
    for path, sight in sights.items():
        kept = ("state", "reason", "step", "epoch", "attempts", "seconds", "metrics", "error", "ended", "log")
        facts = {key: sight[key] for key in kept if key in sight}
        if sight["state"] == "queued":
            now = live.get(sight.get("job", ""), {})
            facts |= {**now, "reason": "; ".join(part for part in (now.get("reason"), facts.get("reason")) if part)}
            if facts["state"] not in ("queued", "running"):
                facts["reason"] = now.get("reason", "")
        name = os.path.relpath(path, plan.root)
        name = sight["name"] if name == "." else name
        rows.append(Row(path, name, plan.label, **facts))
    return sorted(rows, key=lambda r: ((r.step if r.step is not None else r.epoch) or 0, natural_key(r.path)))


def _live(connection: Connection, jobs: set[str], now: float) -> dict[str, dict[str, Any]]:
    """What RQ knows of these jobs, by id."""
    with connection.pipeline(transaction=False) as pipe:
        for job_id in jobs:
            pipe.hmget(Job.key_for(job_id), "status", "started_at", "meta")
        answers = pipe.execute()
    found: dict[str, dict[str, Any]] = {}
    for job_id, (status, started, meta) in zip(jobs, answers, strict=True):
        kept = json.loads(meta) if meta else {}
        attempts, error = kept.get("attempts", 0), kept.get("error")
        found[job_id] = {"attempts": attempts, "reason": f"attempt {attempts}: {error['message']}" if error else ""}
        if status == b"started":
            moment = datetime.fromisoformat(started.decode().replace("Z", "+00:00")).timestamp() if started else now
            found[job_id] |= {"state": "running", "attempts": attempts + 1, "seconds": max(0.0, now - moment)}
            if "done" in kept:
                found[job_id]["reason"] = f"{kept['done']} of {kept['total']} done" if "total" in kept else f"{kept['done']} done"
        elif status is None:
            # Taken out by a shutdown, or lost with its Redis: the next tick, or the next watch, queues it again.
            found[job_id] |= {"state": "due"}
        elif status == b"finished":
            found[job_id] |= _summary(connection, job_id)
    return found


def _summary(connection: Connection, job_id: str) -> dict[str, Any]:
    """What a job that has just finished returned; the next tick reads the same from the record."""
    try:
        value = Job.fetch(job_id, connection=connection, serializer=JSONSerializer).return_value()
    except NoSuchJobError:
        return {}
    return {"state": value.pop("status"), "reason": "", **value} if isinstance(value, dict) else {}


def metrics_text(metrics: dict[str, float | None]) -> str:
    shown = [
        f"{printable(name)}={'null' if value is None else format(value, '.5g')}" for name, value in list(metrics.items())[:METRICS_SHOWN]
    ]
    return " ".join(shown) + (f" and {len(metrics) - METRICS_SHOWN} more" if len(metrics) > METRICS_SHOWN else "")


def detail_of(row: Row) -> str:
    """What is worth saying of a row beside its state: its metrics, its error, or why it is not ready."""
    log = f"log: {printable(row.log)}" if row.log and row.state in BAD else ""
    parts = [metrics_text(row.metrics), printable(row.error or ""), printable(row.reason), log]
    return "; ".join(part for part in parts if part)


def table_of(rows: list[Row], title: str | None = None, limit: int | None = None, there_before: int = 0, left_out: int = 0) -> Group:
    """A table with one line a row.

    Args:
        rows: by step; those of the baseline, which a dry run has, are counted only.
        title: stands above.
        limit: only so many lines: what runs, waits or is written first, and the last of what is settled.
        there_before: checkpoints of the baseline that are not among the rows.
        left_out: settled ones that are not.
    """
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("checkpoint", overflow="fold", min_width=12)
    several = len({row.evaluator for row in rows}) > 1
    if several:
        table.add_column("evaluator")
    for heading in ("state", "step"):
        table.add_column(heading, no_wrap=True)
    for heading in ("tries", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("metrics, or why not", overflow="fold")
    told = [row for row in rows if row.state != "baseline"]
    shown = told if limit is None or len(told) <= limit else _most_telling(told, limit)
    for row in shown:
        cells = [Text(printable(row.name))]
        if several:
            cells.append(Text(row.evaluator))
        seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
        cells += [Text(row.state, style=_COLOURS.get(row.state, "dim")), Text(row.position), Text(str(row.attempts or "")), Text(seconds)]
        table.add_row(*cells, Text(detail_of(row)))
    notes = []
    before, more = there_before + len(rows) - len(told), left_out + len(told) - len(shown)
    if before:
        notes.append(Text(f"{before} there before the watch began"))
    if more:
        notes.append(Text(f"{more} more not shown"))
    return Group(*([table] if shown or not notes else []), *notes)


def _in_brackets(row: Row) -> str:
    """Why a row is queued again, or what there is to say of it while it waits."""
    if row.state != "queued" or not row.reason:
        return ""
    return f"{' again' if row.attempts else ''} ({printable(row.reason)})"


def _most_telling(rows: list[Row], limit: int) -> list[Row]:
    active = sorted((row for row in rows if row.state in _ACTIVE), key=lambda row: row.state != "running")
    others = [row for row in rows if row.state not in _ACTIVE]
    room = limit - min(len(others), max(min(SETTLED_SHOWN, limit // 2), limit - len(active)))
    chosen = {id(row) for row in [*active[:room], *others[room - limit :]]}
    return [row for row in rows if id(row) in chosen]


class Events:
    """Turns what changes between two looks into lines. ``since``: results from before this moment (seconds) are no news."""

    def __init__(self, console: Console, since: float) -> None:
        self.console = console
        self.since = since
        self._states: dict[tuple[str, str], tuple[str, int]] = {}
        self._problems: dict[str, str] = {}

    def show(self, rows: list[Row]) -> None:
        """Prints one line for each row whose state has changed."""
        for row in rows:
            key, state = (row.path, row.evaluator), (row.state, row.attempts if row.state == "queued" else 0)
            if self._states.get(key) != state:
                self._states[key] = state
                if row.ended is None or row.ended >= self.since or row.reason:
                    self._line(row)

    def problem(self, key: str, text: str, where: str) -> None:
        """Prints what hinders a watch, once until it changes, and when it is over."""
        if text != self._problems.get(key, ""):
            self.say(printable(text or f"{where}: all is well again"))
        self._problems[key] = text

    def say(self, text: str) -> None:
        """Prints one line."""
        self.console.print(Text(text), soft_wrap=True)

    def _line(self, row: Row) -> None:
        name = f"{printable(row.name)} {row.evaluator}"
        if row.state in ("queued", "running"):
            self.say(f"-> {name} {row.state}{_in_brackets(row)}")
        elif row.state == "writing":
            self.say(f".. {name} not ready: {printable(row.reason)}")
        elif row.state not in ("baseline", "skipped", "due"):
            seconds = "" if row.seconds is None else f" in {row.seconds:.1f} s"
            self.say(f"<- {name} {row.state}{seconds}: {detail_of(row)}")
