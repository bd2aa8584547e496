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

__all__ = ["BAD", "Events", "Row", "detail_of", "rows_of", "table_of"]

# States in which an evaluation did not come to metrics.
BAD = ("failed", "timeout", "failing")
# States that mean: nothing more will happen with this checkpoint.
_COLOURS = {"finished": "green", "running": "cyan", "queued": "blue", "writing": "yellow"} | dict.fromkeys(BAD, "red")
# Metrics that a line of the table shows.
METRICS_SHOWN = 4


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

    @property
    def position(self) -> str:
        return str(self.step) if self.step is not None else f"epoch {self.epoch:g}" if self.epoch is not None else ""


def rows_of(connection: Connection, plan: Plan, now: float | None = None) -> list[Row]:
    """The rows of one watch, by step; what waits or runs is shown as RQ knows it this moment."""
    now = time.time() if now is None else now
    sights = Board(connection, plan.watch_queue).sights(plan.id)
    waiting = {path: sight["job"] for path, sight in sights.items() if sight["state"] == "queued" and "job" in sight}
    live = _live(connection, waiting, now)
    rows = []
    for path, sight in sights.items():
        kept = ("state", "reason", "step", "epoch", "attempts", "seconds", "metrics", "error")
        facts = {key: sight[key] for key in kept if key in sight} | live.get(path, {})
        name = path if plan.is_pattern else os.path.relpath(path, plan.directory)
        name = sight["name"] if name == "." else name
        rows.append(Row(path, name, plan.evaluator.name, **facts))
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
    parts = [metrics_text(row.metrics), printable(row.error or ""), printable(row.reason)]
    return "; ".join(part for part in parts if part)


def table_of(rows: list[Row], title: str | None = None, limit: int | None = None) -> Group:
    """A table with one line a row; with ``limit`` only so many lines, the youngest, and a line that counts the others."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("checkpoint", overflow="fold", no_wrap=False, min_width=12)
    several = len({row.evaluator for row in rows}) > 1
    if several:
        table.add_column("evaluator")
    for heading in ("state", "step"):
        table.add_column(heading, no_wrap=True)
    for heading in ("tries", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("metrics, or why not", overflow="fold", ratio=1)
    left_out = max(0, len(rows) - limit) if limit else 0
    for row in rows[left_out:]:
        cells = [Text(printable(row.name))]
        if several:
            cells.append(Text(row.evaluator))
        seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
        cells += [Text(row.state, style=_COLOURS.get(row.state, "dim")), Text(row.position), Text(str(row.attempts or "")), Text(seconds)]
        table.add_row(*cells, Text(detail_of(row)))
    return Group(*([Text(f"... and {left_out} more above")] if left_out else []), table)


class Events:
    """Turns what changes between two looks into lines."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._states: dict[tuple[str, str], str] = {}
        self._problems: dict[str, str] = {}

    def show(self, rows: list[Row]) -> None:
        """Prints one line for each row whose state has changed; what was there from the start and stays as it was is passed over."""
        for row in rows:
            key = (row.path, row.evaluator)
            if self._states.get(key) == row.state:
                continue
            self._states[key] = row.state
            self._line(row)

    def problem(self, where: str, text: str) -> None:
        """Prints what hinders a watch, once until it changes."""
        if text and self._problems.get(where) != text:
            self.say(f"{printable(where)}: {printable(text)}")
        self._problems[where] = text

    def say(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def _line(self, row: Row) -> None:
        name = f"{printable(row.name)} {row.evaluator}"
        if row.state in ("queued", "running"):
            self.say(f"-> {name} {row.state}")
        elif row.state == "writing":
            self.say(f".. {name} not ready: {printable(row.reason)}")
        elif row.state not in ("baseline", "skipped"):
            seconds = "" if row.seconds is None else f" in {row.seconds:.1f} s"
            self.say(f"<- {name} {row.state} {detail_of(row)}{seconds}")
