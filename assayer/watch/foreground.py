"""The watch command while it stands in the foreground: a table or lines, and what Ctrl-C means."""

import os
import signal
import time
from types import FrameType

import redis
from rich.console import Console
from rich.live import Live

from assayer.errors import AssayerError
from assayer.plan import Plan, PlanStore
from assayer.queues import Connection
from assayer.queues.board import Board
from assayer.queues.recover import our_workers
from assayer.session import held_plans
from assayer.watch.show import BAD, Events, Row, rows_of, table_of
from assayer.worker.launch import Crew

__all__ = ["Foreground"]

# Seconds between two looks at the board.
STEP = 0.5
# Lines of the terminal that the table leaves free.
MARGIN = 6


class _Interrupted(Exception):
    """Ctrl-C, or the terminal has been closed."""


class Foreground:
    """Shows the plans until they end, or until the user ends them."""

    def __init__(self, plans: list[Plan], connection: Connection, crew: Crew, console: Console) -> None:
        self.plans = plans
        self.connection = connection
        self.crew = crew
        self.console = console
        self.events = Events(console)
        self.rows: list[Row] = []
        self._store = PlanStore(crew.state)

    def run(self) -> bool:
        """Returns once the watches have ended; True when an evaluation failed in a watch that ended by itself."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _interrupt)
        try:
            self._show_until_ended()
        except _Interrupted:
            self._end_by_user()
            return False
        self._leave("warm")
        self.console.print(table_of(self.rows))
        return any(row.state in BAD for row in self.rows)

    def _show_until_ended(self) -> None:
        if not self.console.is_terminal:
            while self._look():
                self.events.show(self.rows)
                time.sleep(STEP)
            self.events.show(self.rows)
            return
        with Live(console=self.console, auto_refresh=False, transient=True) as live:
            while self._look():
                title = f"{len(self.rows)} checkpoints; Ctrl-C ends this watch"
                live.update(table_of(self.rows, title, limit=max(3, self.console.height - MARGIN)), refresh=True)
                time.sleep(STEP)

    def _look(self) -> bool:
        """Reads the board; False once none of the plans runs any more. An outage of Redis is waited out."""
        try:
            rows = [row for plan in self.plans for row in rows_of(self.connection, plan)]
            for plan in self.plans:
                self.events.problem(plan.directory, str(Board(self.connection, plan.watch_queue).tick(plan.id)["problem"]))
            running = [plan for plan in self.plans if self._runs(plan)]
        except redis.RedisError as error:
            self.events.problem(self.crew.target.name, f"no answer ({error}); waiting")
            return True
        self.rows = rows or self.rows
        if running:
            try:
                self.crew.start_supervisor()
            except (AssayerError, OSError) as error:
                self.events.problem("workers", str(error))
        return bool(running)

    def _runs(self, plan: Plan) -> bool:
        """The disk decides: a plan that Redis has lost comes back, one that was stopped is marked."""
        stored = self._store.read(plan.id)
        return stored is not None and stored.active

    def _end_by_user(self) -> None:
        """Ends this command's watches, and the workers when it was the last; a second Ctrl-C ends a running evaluation, too."""
        self._look()
        if not self.console.is_terminal:
            self.events.show(self.rows)
        elif self.rows:
            self.console.print(table_of(self.rows))
        held = held_plans(self.crew.state, but=os.getpid())
        for plan in self.plans:
            stored = self._store.read(plan.id)
            if stored and not stored.detached and plan.id not in held:
                self._store.stop(plan.id)
                try:
                    Board(self.connection, plan.watch_queue).remove(plan)
                except redis.RedisError:
                    self.events.problem(self.crew.target.name, "no answer; the watch is ended on disk")
                self.events.say(f"ended the watch of {plan.directory} with {plan.evaluator.name}; the next one goes on where it stopped")
        try:
            self._leave("warm")
        except _Interrupted:
            self.events.say("ending the running evaluation; it goes back to the queue")
            self.crew.stop("now")
            while self.crew.is_supervised():
                time.sleep(0.1)

    def _leave(self, how: str) -> None:
        """Waits for the workers to end when nothing on this host needs them any more."""
        if self.crew.has_plans() or not self.crew.is_supervised():
            return
        self.crew.stop(how)
        said = time.monotonic() + 1.5
        while self.crew.is_supervised() and not self.crew.has_plans():
            if said and time.monotonic() > said and self._is_busy():
                self.events.say("waiting for the running evaluation; Ctrl-C again ends it at once")
                said = 0
            time.sleep(0.1)

    def _is_busy(self) -> bool:
        queues = sorted({plan.eval_queue for plan in self.plans})
        try:
            return any(worker["state"] == "busy" for worker in our_workers(self.connection, queues))
        except redis.RedisError:
            return False


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise _Interrupted
