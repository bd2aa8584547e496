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

__all__ = ["BAD", "Events", "Row", "View", "detail_of", "rows_of", "table_of"]

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


class View:
    """The rows of watches, look after look; what a tick has seen is read again only after the next one."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._sights: dict[str, tuple[float, dict[str, Any]]] = {}

    def rows(self, plan: Plan) -> list[Row]:
        """The rows of one watch as they are now."""
        board = Board(self.connection, plan.watch_queue)
        last = float(board.tick(plan.id).get("last", 0.0))
        known = self._sights.get(plan.id)
        if known is None or known[0] != last:
            known = self._sights[plan.id] = (last, board.sights(plan.id))
        return rows_of(self.connection, plan, known[1])


def rows_of(connection: Connection, plan: Plan, sights: dict[str, Any]) -> list[Row]:
    """The rows of one watch, by step, from what its last tick saw; what waits or runs is shown as RQ knows it this moment."""
    now = time.time()
    waiting = {path: sight["job"] for path, sight in sights.items() if sight["state"] == "queued" and "job" in sight}
    live = _live(connection, waiting, now)
    rows = []
    for path, sight in sights.items():
        kept = ("state", "reason", "step", "epoch", "attempts", "seconds", "metrics", "error", "ended", "log")
        facts = {key: sight[key] for key in kept if key in sight} | live.get(path, {})
        name = os.path.relpath(path, plan.root)
        name = sight["name"] if name == "." else name
        rows.append(Row(path, name, plan.label, **facts))
    return sorted(rows, key=lambda r: ((r.step if r.step is not None else r.epoch) or 0, natural_key(r.path)))


def _live(connection: Connection, jobs: dict[str, str], now: float) -> dict[str, dict[str, Any]]:
    with connection.pipeline(transaction=False) as pipe:
        for job_id in jobs.values():
            pipe.hmget(Job.key_for(job_id), "status", "started_at", "meta")
        answers = pipe.execute()
    found: dict[str, dict[str, Any]] = {}
    for (path, job_id), (status, started, meta) in zip(jobs.items(), answers, strict=True):
        kept = json.loads(meta) if meta else {}
        attempts, error = kept.get("attempts", 0), kept.get("error")
        found[path] = {"attempts": attempts, "reason": f"attempt {attempts}: {error['message']}" if error else ""}
        if status == b"started":
            moment = datetime.fromisoformat(started.decode().replace("Z", "+00:00")).timestamp() if started else now
            found[path] |= {"state": "running", "attempts": attempts + 1, "seconds": max(0.0, now - moment)}
        elif status is None:
            # Taken out by a shutdown, or lost with its Redis: the next tick, or the next watch, queues it again.
            found[path] |= {"state": "due"}
        elif status == b"finished":
            found[path] |= _summary(connection, job_id)
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


def table_of(rows: list[Row], title: str | None = None, limit: int | None = None) -> Group:
    """A table with one line a row; those of the baseline are counted only.

    Args:
        rows: by step.
        title: stands above.
        limit: only so many lines: what runs, waits or is written first, and the last of what is settled.
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
    if len(rows) > len(told):
        notes.append(Text(f"{len(rows) - len(told)} there before the watch began"))
    if len(told) > len(shown):
        notes.append(Text(f"{len(told) - len(shown)} more not shown"))
    return Group(*([table] if shown or not notes else []), *notes)


def _most_telling(rows: list[Row], limit: int) -> list[Row]:
    active = [row for row in rows if row.state in _ACTIVE]
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
            self.say(f"-> {name} {row.state}" + (f" again ({printable(row.reason)})" if row.reason and row.state == "queued" else ""))
        elif row.state == "writing":
            self.say(f".. {name} not ready: {printable(row.reason)}")
        elif row.state not in ("baseline", "skipped", "due"):
            seconds = "" if row.seconds is None else f" in {row.seconds:.1f} s"
            self.say(f"<- {name} {row.state}{seconds}: {detail_of(row)}")
