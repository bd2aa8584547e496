"""Keeps the wanted workers of one host and one Redis standing, and the embedded Redis under them.

Started as a daemon by ``launch.Crew``; ``python -m assayer.worker`` runs the same loop in the foreground. RQ's own pool cannot give its
workers names, heartbeats or GPUs, and its death leaves them orphans.

It ends in three ways. ``warm``: after the running evaluations (SIGINT, or an order). ``now``: the workers are killed, and what they held
goes back (a second SIGINT, or an order). ``requeue``: it was told to be gone soon (SIGTERM, as a scheduler's preemption): the workers
give back what they hold by themselves, and after ``REQUEUE_MAX`` nothing of it is left, whatever hinders it.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import redis

from assayer.errors import AssayerError, StateError
from assayer.files import lock_file, locked, try_lock
from assayer.plan import PlanStore, host_name
from assayer.queues import chain
from assayer.queues.board import Board, queues_with_watches
from assayer.queues.connect import connect
from assayer.queues.embedded import Server
from assayer.queues.enqueue import open_queue
from assayer.queues.recover import Judge, return_abandoned, return_jobs, return_taken
from assayer.queues.stop import stop_orders
from assayer.session import held_plans
from assayer.worker.child import become_reaper, descendants, end_descendants
from assayer.worker.launch import Crew, Slot, start_worker
from assayer.worker.workers import LEAVE_MAX

__all__ = ["Supervisor", "main", "retire_redis"]

logger = logging.getLogger(__name__)

# Seconds between two looks at the workers, and between two at the chains, plans and the embedded server.
STEP = 0.2
CARE = 2.0
# A worker that lived shorter than this (seconds) died young; after so many in a row the next start waits, up to the longest pause.
YOUNG = 20.0
YOUNG_MAX = 3
PAUSE_MAX = 60.0
# Seconds within which everything is gone that was told to give its work back, and those after which a worker is killed that has not gone.
REQUEUE_MAX = 18
KILL_AFTER = LEAVE_MAX + 1.5
# Seconds until a worker that does not leave is told again: it may have been about to start when it was told first.
TELL_AGAIN = 2.0
# Seconds after which a job that was handed to a worker and not begun goes back to the queue; a worker that lives takes milliseconds.
UNBEGUN = 3.0
# Seconds without its foreground command after which a watch ends.
ORPHANED = 10.0
# Bytes of the supervisor's log past which it starts anew.
LOG_MAX = 10 << 20


@dataclass
class _Post:
    """What the supervisor knows of one slot: its own child, or the pid of a worker that an earlier supervisor started."""

    slot: Slot
    process: "subprocess.Popen[bytes] | None" = None
    adopted: int | None = None
    name: str = ""
    started: float = 0.0
    young: int = 0
    not_before: float = 0.0
    stopped_by_us: bool = False
    told: float = 0.0
    taken_by: str = ""

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process is not None else self.adopted


@dataclass
class Supervisor:
    """One loop over the slots. ``say`` gets a line for each thing that happens."""

    crew: Crew
    wanted: Callable[[], list[Slot]]
    daemon: bool
    output: int | None = None
    say: Callable[[str], None] = logger.info
    leave: Callable[[], None] = lambda: None
    requeue_signals: tuple[int, ...] = (signal.SIGTERM,)
    posts: dict[str, _Post] = field(default_factory=dict)
    stopping: str | None = None
    _connection: Any = None
    _orders: tuple[int, int] | None = None
    _cared: float = 0.0
    _signalled: bool = False
    _complaint: str = ""
    _unheld: dict[str, float] = field(default_factory=dict)
    _between: dict[tuple[str, str], float] = field(default_factory=dict)
    _told_to_requeue: float = 0.0
    _unanswered: bool = False
    _judge: Judge = field(default_factory=Judge)

    def run(self) -> None:
        """Returns once the workers have been told to stop and are gone."""
        become_reaper()
        signal.signal(signal.SIGINT, self._on_signal)
        for number in self.requeue_signals:
            signal.signal(number, self._on_requeue)
        while True:
            self.step()
            if self.stopping and not self._alive() and self._may_leave():
                return
            time.sleep(STEP)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        self.stopping = "now" if self.stopping else "warm"

    def _on_requeue(self, number: int, frame: FrameType | None) -> None:
        """The workers are told here and not in the loop, which may just be waiting for a Redis that does not answer."""
        self._signalled = True
        if self.stopping in ("now", "requeue"):
            return
        self.stopping, self._told_to_requeue = "requeue", time.monotonic()
        self._connection = None
        signal.signal(signal.SIGALRM, self._on_alarm)
        signal.alarm(REQUEUE_MAX)
        self._stop_workers()

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:
        """The end of all patience: what the workers held comes back when nothing is heard of them."""
        for post in self.posts.values():
            self._kill(post)
        os._exit(0)

    def step(self) -> None:
        """One look at every slot, and now and then at everything else."""
        now = time.monotonic()
        if self.stopping != "requeue" and (now - self._cared >= CARE or self._cared == 0):
            self._cared = now
            try:
                self._care()
                self._judge.answered()
            except (redis.RedisError, AssayerError, OSError) as error:
                self._complain(str(error))
        if self.daemon and not self.stopping and self.crew.order_to_stop():
            self._read_orders()
        slots = {slot.key: slot for slot in self.wanted()}
        for key in self.posts.keys() - slots.keys():
            self._dismiss(key)
        for slot in slots.values():
            post = self.posts.setdefault(slot.key, _Post(slot))
            if post.process is not None and post.process.poll() is not None:
                self._bury(slot, post, _how(post.process.returncode), now, orderly=post.process.returncode == 0)
            elif post.adopted is not None and not self.crew.is_held(slot):
                self._bury(slot, post, "it was started by an earlier supervisor", now)
            # One that an earlier supervisor started is taken on also when all is to end: nobody else would end it.
            if post.pid is None and now >= post.not_before and (not self.stopping or self.crew.is_ours(slot)):
                self._start(slot, post, now)
        if self.stopping:
            self._stop_workers()

    def _dismiss(self, key: str) -> None:
        """Ends the worker of a slot that is no longer wanted, after its evaluation."""
        post = self.posts[key]
        gone = post.process.poll() is not None if post.process is not None else not self.crew.is_held(post.slot)
        if post.pid is None:
            del self.posts[key]
        elif gone:
            post.stopped_by_us = True
            self._bury(post.slot, post, "", time.monotonic())
            del self.posts[key]
        else:
            self._stop_worker(post, self.crew.order_to_drop())

    def _complain(self, text: str) -> None:
        if text != self._complaint:
            self._complaint = text
            self.say(text)

    def problems(self) -> list[str]:
        """A sentence for each slot whose worker does not stay up."""
        return [f"worker {key} died {post.young} times within {YOUNG:g} s" for key, post in self.posts.items() if post.young >= YOUNG_MAX]

    def _start(self, slot: Slot, post: _Post, now: float) -> None:
        started = start_worker(self.crew, slot, self.daemon, self.output, self.requeue_signals)
        name = str(started.facts.get("name", "?"))
        if started.process is not None:
            if started.before.get("name"):
                self._return_jobs(slot, str(started.before["name"]), blame=not started.before.get("orderly"))
            post.process, post.name, post.started, post.stopped_by_us, post.told = started.process, name, now, False, 0.0
            self.say(f"worker {name} started")
        elif self.daemon and self.crew.is_ours(slot):
            post.adopted, post.name, post.started, post.stopped_by_us, post.told = started.facts.get("pid"), name, now, False, 0.0
            self.say(f"worker {name} goes on")
        else:
            if post.taken_by != name:
                self.say(f"{slot.label}: worker {name} stands there already, for {started.facts.get('redis', 'another Redis')}")
            post.taken_by, post.not_before = name, now + 1

    def _bury(self, slot: Slot, post: _Post, how: str, now: float, orderly: bool = False) -> None:
        """``orderly``: it ended by itself, because somebody has told it to."""
        by_us = post.stopped_by_us or bool(self.stopping)
        post.process, post.adopted = None, None
        end_descendants(spare=self._known())
        if not self._return_jobs(slot, post.name, blame=not (by_us or orderly)) and (by_us or orderly):
            self.crew.note_orderly(slot)
        if by_us:
            self.say(f"worker {post.name} ended")
            return
        if orderly:
            self.say(f"worker {post.name} was told to end; another is started")
            return
        post.young = post.young + 1 if now - post.started < YOUNG else 0
        post.not_before = now + (min(PAUSE_MAX, 2.0 ** (post.young - YOUNG_MAX)) if post.young >= YOUNG_MAX else 0)
        self.say(f"worker {post.name} died ({how}); another is started")
        if post.young >= YOUNG_MAX:
            self.say(f"{slot.label}: {post.young} workers in a row died within {YOUNG:g} s; see the lines above and {self.crew.folder}/log")

    def _return_jobs(self, slot: Slot, name: str, blame: bool) -> bool:
        """False when Redis did not answer; in a hurry it is asked no second time."""
        try:
            if not self._unanswered:
                for job_id in return_jobs(self._redis(), slot.queue, name, blame):
                    self.say(f"job {job_id[:8]} goes back to the queue")
                return True
        except (redis.RedisError, AssayerError) as error:
            self._unanswered = self.stopping == "requeue"
            self.say(f"what worker {name} held comes back when its heartbeat runs out: {error}")
        return False

    def _known(self) -> frozenset[int]:
        pids = {post.pid for post in self.posts.values() if post.pid is not None}
        server = Server(self.crew.state).pid() if self.crew.target.embedded else None
        return frozenset(pids | ({server} if server else set()))

    def _redis(self) -> Any:
        # A signal handler may drop it in between.
        connection = self._connection or connect(self.crew.target.url, patience=2, retries=1)
        self._connection = connection
        return connection

    def _care(self) -> None:
        """An order to stop is heard, the embedded server runs, no plan is missing in Redis, and every chain goes on."""
        if self.daemon:
            self._read_orders()
        if self.crew.target.embedded:
            server = Server(self.crew.state)
            if not server.is_running() and not self.stopping:
                self.say("the embedded Redis is gone; starting it again on its data")
                server.start()
        connection = self._redis()
        if self.daemon:
            self._lay_down_orphans(connection)
            settle_plans(self.crew, connection)
            self._read_orders()
        self._hear_orders(connection)
        for slot_queue in sorted({slot.queue for slot in self.wanted()}) if self._judge.may_judge() else []:
            for job_id in return_abandoned(connection, slot_queue):
                self.say(f"job {job_id[:8]} comes back: nothing was heard of its worker")
        self._return_unbegun(connection)
        for queue in queues_with_watches(connection) if not self.stopping else []:
            if chain.ensure(connection, queue):
                logger.info("chain of queue %s started", queue)
        connection.hset("assayer:problems", f"{os.getpid()}@{host_name()}", "; ".join(self.problems()))
        connection.expire("assayer:problems", 60)

    def _return_unbegun(self, connection: Any) -> None:
        """What the server handed to a worker in the moment of its death lies between queue and start, where nobody looks for a minute."""
        between: dict[tuple[str, str], float] = {}
        for name in sorted({slot.queue for slot in self.wanted()}):
            queue = open_queue(connection, name)
            for job_id in map(bytes.decode, connection.lrange(queue.intermediate_queue_key, 0, -1)):
                since = between[name, job_id] = self._between.get((name, job_id), time.monotonic())
                if time.monotonic() - since > UNBEGUN and return_taken(connection, queue.key, job_id):
                    self.say(f"job {job_id[:8]} goes back to the queue: its worker did not begin it")
        self._between = between

    def _read_orders(self) -> None:
        """What the disk says, which counts also while no Redis answers: a daemon goes on while there are plans."""
        if self.stopping == "requeue":
            return
        order = self.crew.order_to_stop()
        if order or not self.crew.has_plans():
            self.stopping = "now" if "now" in (order, self.stopping) else "warm"
        elif self.stopping == "warm" and not self._signalled:
            self.stopping = None

    def _hear_orders(self, connection: Any) -> None:
        """What a shutdown, here or on another host, has told all supervisors of these queues. It ends a daemon's plans, too."""
        orders = stop_orders(connection, sorted({slot.queue for slot in self.wanted()}))
        before, self._orders = self._orders or orders, orders
        if self.stopping == "requeue":
            return
        if orders[1] > before[1] and (self.stopping or not self.daemon):
            self.stopping = "now"
        elif orders[0] > before[0] and not self.daemon:
            self.stopping = self.stopping or "warm"

    def _lay_down_orphans(self, connection: Any) -> None:
        """Ends the watches whose foreground command was killed: whoever gave it sees nothing of them any more."""
        store, held = PlanStore(self.crew.state), held_plans(self.crew.state)
        for plan in store.active(self.crew.target.name):
            if plan.detached or plan.id in held:
                self._unheld.pop(plan.id, None)
            elif time.monotonic() - self._unheld.setdefault(plan.id, time.monotonic()) > ORPHANED:
                self.say(f"the command that watched {plan.directory} is gone; its watch ends")
                store.stop(plan.id, plan.given)
                Board(connection, plan.watch_queue).remove(plan)

    def _stop_workers(self) -> None:
        for post in list(self.posts.values()):
            self._stop_worker(post, self.stopping)

    def _stop_worker(self, post: _Post, how: str | None) -> None:
        now = time.monotonic()
        overdue = how == "requeue" and now - self._told_to_requeue > KILL_AFTER
        if how == "now" or overdue:
            post.stopped_by_us = True
            self._kill(post)
        elif post.pid is not None and now - post.told > TELL_AGAIN:
            post.stopped_by_us, post.told = True, now
            with contextlib.suppress(ProcessLookupError):
                os.kill(post.pid, signal.SIGTERM if how == "requeue" else signal.SIGINT)

    def _kill(self, post: _Post) -> None:
        # What an adopted worker leaves behind would not become ours: it ends with it.
        for pid in [post.pid, *(descendants(post.pid) if post.adopted else [])] if post.pid is not None else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @property
    def redis_answers(self) -> bool:
        """False when it did not answer while everything had to end soon."""
        return not self._unanswered

    def _alive(self) -> bool:
        return any(post.pid is not None for post in self.posts.values())

    def _may_leave(self) -> bool:
        """Ends the embedded Redis when nothing needs it; False when a new watch has come meanwhile, and all goes on."""
        if self.daemon and self.stopping == "requeue" and not self._unanswered:
            # Its plans stay: the next command on this host goes on with them, and with what lies in the queue.
            retire_redis(self.crew, with_plans=True)
        if not self.daemon or self._signalled:
            return True
        with locked(self.crew.gate):
            if self.crew.has_plans() and not self.crew.order_to_stop():
                self.stopping = None
                return False
            if not self.crew.keeps_redis():
                retire_redis(self.crew)
            self.crew.dismiss()
            # With the gate still held: whoever comes next finds no supervisor, and starts one.
            self.leave()
            return True


def settle_plans(crew: Crew, connection: Any) -> None:
    """Publishes the plans of this host again that Redis has lost, and lays down those that ended elsewhere."""
    store = PlanStore(crew.state)
    there: dict[str, set[str]] = {}
    for plan in store.active(crew.target.name):
        board = Board(connection, plan.watch_queue)
        if plan.watch_queue not in there:
            there[plan.watch_queue] = board.ids()
        if plan.id not in there[plan.watch_queue]:
            if board.ended(plan):
                store.stop(plan.id, plan.given)
                continue
            with contextlib.suppress(StateError):
                # Without its baseline it would take what was there for new; status says that it is damaged.
                board.put(plan, store.baseline(plan))
    for queue in queues_with_watches(connection):
        board = Board(connection, queue)
        for plan_id, given in board.given().items():
            # Ended while this Redis did not answer. A plan of another host's has no file here.
            stored = store.read(plan_id)
            if stored and not stored.active and stored.given >= given and stored.host == host_name():
                board.remove(stored)


def retire_redis(crew: Crew, with_plans: bool = False) -> bool:
    """Stops the embedded server when no watch, no worker and no other RQ user needs it; True when it was stopped.

    With ``with_plans`` a watch does not count as needing it.
    """
    server = Server(crew.state)
    if not crew.target.embedded or not server.is_running() or (crew.has_plans() and not with_plans):
        return False
    try:
        connection = connect(crew.target.url, patience=2, retries=1)
        if any(connection.exists(key) for key in connection.smembers("rq:workers")):
            return False
        left = any(connection.llen(key) for key in connection.scan_iter("rq:queue:*", count=1000, _type="list"))
        connection.close()
    except (AssayerError, redis.RedisError):
        left = True
    server.stop(work_left=left or with_plans)
    return True


def _how(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
    return f"code {code}"


def main(folder: Path) -> None:
    """Becomes a daemon and supervises the crew of ``folder``; returns at once in the caller, and in a second supervisor."""
    crew = Crew.of(folder)
    descriptor = lock_file(crew.supervisor_lock)
    if not try_lock(descriptor, crew.supervisor_lock):
        return
    if os.fork():
        return
    os.setsid()
    os.chdir(crew.folder)
    log = crew.folder / "log"
    if log.exists() and log.stat().st_size > LOG_MAX:
        log.unlink()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, null), (1, output), (2, output)):
        os.dup2(source, target)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    try:
        Supervisor(crew, crew.wanted, daemon=True, output=output, leave=lambda: os.close(descriptor)).run()
    except BaseException:
        logger.exception("the supervisor ended by an error")
        raise
    logger.info("the supervisor ends: nothing is left to do")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)
