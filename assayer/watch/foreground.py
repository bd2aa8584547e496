"""The watch command while it stands in the foreground: a table or lines, and what Ctrl-C means."""

import os
import signal
import time
from types import FrameType

import redis
from rich.console import Console, Group
from rich.live import Live

from assayer.errors import AssayerError
from assayer.files import printable
from assayer.plan import Plan, PlanStore
from assayer.queues import Connection
from assayer.queues.board import Board
from assayer.queues.recover import our_workers
from assayer.session import held_plans
from assayer.watch.show import BAD, Events, Row, View, Watched, table_of
from assayer.worker.launch import Crew

__all__ = ["Foreground"]

# Seconds between two looks at the board.
STEP = 0.5
# Lines of the terminal that the table leaves free.
MARGIN = 6


class Foreground:
    """Shows the plans until they end, or until the user ends them."""

    def __init__(self, plans: list[Plan], connection: Connection, crew: Crew, console: Console) -> None:
        self.plans = plans
        self.connection = connection
        self.crew = crew
        self.console = console
        self.events = Events(console, since=min(plan.given for plan in plans))
        self.rows: list[Row] = []
        self._watched: list[Watched] = []
        # What the watches have left undone, once they have ended.
        self._last_words: list[str] = []
        self._signals = 0
        self._terminated = False
        self._view = View(connection)
        self._store = PlanStore(crew.state)

    def run(self) -> bool:
        """Returns once the watches have ended; True when in one that ended by itself an evaluation failed, or points are missing."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # Under nohup the terminal's end is nothing to heed.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        by_user = self._show_until_ended()
        if by_user:
            self._end_by_user()
        self._leave()
        if by_user:
            return False
        if not any(plan.ends for plan in self.plans):
            self.events.say("the watch was ended, or taken over, by another command")
        self.console.print(self._table())
        for problem in self._last_words:
            self.events.say(printable(problem))
        nowhere = [
            row
            for plan, one in zip(self.plans, self._watched, strict=False)
            if plan.track
            for row in one.rows
            if row.state == "finished" and not row.position
        ]
        if nowhere:
            self.events.say(
                f"{len(nowhere)} results have no step, and so no point on a curve, such as that of {printable(nowhere[0].name)}"
            )
        return bool(self._last_words) or any(row.state in BAD for row in self.rows)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-C, or the terminal has been closed: counted, and heeded where the command waits, so that nothing is left half done.

        SIGTERM, as a cluster sends it, leaves no time for the running evaluation.
        """
        self._signals += 1
        self._terminated = self._terminated or number == signal.SIGTERM

    def _show_until_ended(self) -> bool:
        """True when the user ended it."""
        if not self.console.is_terminal:
            while self._look() and not self._signals:
                self.events.show(self.rows)
                time.sleep(STEP)
            self.events.show(self.rows)
            return self._signals > 0
        with Live(console=self.console, auto_refresh=False, transient=True) as live:
            while self._look() and not self._signals:
                title = (
                    f"{len(self.rows)} evaluations; {'Ctrl-C leaves, the watch runs on' if self._runs_on() else 'Ctrl-C ends this watch'}"
                )
                live.update(self._table(title, limit=max(3, self.console.height - MARGIN)), refresh=True)
                time.sleep(STEP)
        return self._signals > 0

    def _table(self, title: str | None = None, limit: int | None = None) -> Group:
        there_before = sum(plan.there_before for plan in self.plans)
        return table_of(self.rows, title, limit, there_before, sum(one.left_out for one in self._watched))

    def _look(self) -> bool:
        """Reads the board; False once none of the plans runs any more. An outage of Redis is waited out."""
        # Asked first: what is read after a watch has ended is its last word.
        running = any(self._runs(plan) for plan in self.plans)
        try:
            watched = self._view.watched(self.plans)
            for plan, one in zip(self.plans, watched, strict=True):
                self.events.problem(plan.id, one.problem, plan.directory)
            # A watch that has ended has no other problem than its last word.
            self._last_words = [one.problem for plan, one in zip(self.plans, watched, strict=True) if plan.ends and one.problem]
            if any(one.rows for one in watched) or not self.rows:
                self._watched = watched
                self.rows = [row for one in watched for row in one.rows]
            self.events.problem("redis", "", self.crew.target.name)
        except redis.RedisError as error:
            self.events.problem("redis", f"{self.crew.target.name} does not answer ({error}); waiting for it", self.crew.target.name)
        if running:
            # Killed together, workers, supervisor and server come back from here.
            try:
                self.crew.start_supervisor()
            except (AssayerError, OSError) as error:
                self.events.problem("workers", str(error), "the workers")
        return running

    def _runs(self, plan: Plan) -> bool:
        """The disk decides: a plan that Redis has lost comes back, one that was stopped is marked."""
        stored = self._store.read(plan.id)
        return stored is not None and stored.active and (stored.redis, stored.host) == (plan.redis, plan.host)

    def _runs_on(self) -> bool:
        """True when none of the watches ends with this command: they were detached, or another command stands for them."""
        stored = [self._store.read(plan.id) for plan in self.plans]
        return all(plan is not None and plan.detached for plan in stored)

    def _end_by_user(self) -> None:
        """Ends this command's watches: those that no other foreground command stands for, and that were not detached."""
        self._look()
        if not self.console.is_terminal:
            self.events.show(self.rows)
        elif self.rows:
            self.console.print(self._table(limit=max(3, self.console.height - MARGIN)))
        held = held_plans(self.crew.state, but=os.getpid())
        for plan in self.plans:
            stored = self._store.read(plan.id)
            if stored and stored.active and not stored.detached and plan.id not in held:
                self._store.stop(plan.id)
                try:
                    Board(self.connection, plan.watch_queue).remove(plan)
                except redis.RedisError:
                    self.events.say(f"{self.crew.target.name} does not answer; the watch is ended on disk")
                self.events.say(f"ended the watch of {plan.directory} with {plan.label}; the next one goes on where it stopped")
            elif stored and stored.active:
                self.events.say(f"the watch of {plan.directory} with {plan.label} runs on (assayer.shutdown ends it)")

    def _leave(self) -> None:
        """Waits for the workers to end when nothing on this host needs them any more; one more signal ends a running evaluation, too."""
        if self.crew.has_plans() or not self.crew.is_staffed():
            return
        seen, hurried = self._signals, False
        self.crew.stop("warm")
        said = time.monotonic() + 1.5
        while self.crew.is_staffed() and not self.crew.has_plans():
            if (self._signals > seen or self._terminated) and not hurried:
                hurried = True
                if self._is_busy():
                    self.events.say("ending the running evaluation; it goes back to the queue")
                self.crew.stop("now")
            elif said and not hurried and time.monotonic() > said and self._is_busy():
                self.events.say("waiting for the running evaluation; Ctrl-C again ends it at once")
                said = 0
            time.sleep(0.1)

    def _is_busy(self) -> bool:
        queues = sorted({plan.eval_queue for plan in self.plans})
        try:
            return any(worker["state"] == "busy" for worker in our_workers(self.connection, queues))
        except redis.RedisError:
            return False
