"""One look at a plan's directories, in a thread with a deadline: a file system that hangs delays no other watch."""

import contextlib
import glob
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TypeVar

from assayer import formats, refs
from assayer.checkpoint import Found
from assayer.files import printable
from assayer.plan import Baseline, Plan
from assayer.record import Place, Record, hold_folder, hold_key, read
from assayer.watch.diff import Decision, counts, decide
from assayer.watch.protect import Neighbours, Protection, as_seen, is_meant, protect
from assayer.watch.ready import Seen
from assayer.watch.scan import scan
from assayer.watch.survey import Survey, Terms
from assayer.worker.hold import Held

__all__ = ["Look", "Lookout", "Memory", "directories_of", "in_thread", "look", "place_of", "see", "see_all"]

T = TypeVar("T")

# Everything is listed at every look while that takes no more than this part of the polling interval; else in turn, so often that it takes
# no more of the time, and at least so often (seconds).
FULL_PART = 0.05
FULL_MAX = 600.0
# What part of the polling interval one look may spend on directories whose turn it is, and how many seconds on those that are new.
TURNS_PART = 0.1
NEW_MAX = 2.0
# Threads that look; and past how many seconds without an answer there are more, up to a limit. One that has nothing to do ends.
THREADS, THREADS_MAX, STALLED, IDLE = 4, 1024, 0.05, 60.0


@dataclass
class Memory:
    """What earlier looks of this process know of one watch: its directories, and what is held of them."""

    surveys: dict[str, Survey] = field(default_factory=dict)
    protection: Protection = field(default_factory=Protection)
    source: str | None = None

    @property
    def cost(self) -> float:
        """Seconds that it takes to list everything."""
        # A copy: a look may be adding directories in its own thread.
        return sum(survey.cost for survey in list(self.surveys.values()))

    @property
    def count(self) -> int:
        """How many checkpoints have been looked into and are not settled."""
        return sum(len(survey.seen) for survey in list(self.surveys.values()))


@dataclass(frozen=True)
class Look:
    """What one look at a plan came to: a decision for each checkpoint that was not settled before.

    ``missing``: the directory itself cannot be read, and nothing is known of its checkpoints. ``notes`` says of waiting checkpoints, by
    path, why they are not protected from deletion; ``notice`` is a sentence to be said once. ``is_anew``: all of them are decided about.
    """

    decisions: tuple[Decision, ...]
    problems: tuple[str, ...]
    missing: bool
    final: bool
    began: float
    notes: dict[str, str] = field(default_factory=dict)
    notice: str = ""
    is_anew: bool = False


def directories_of(plan: Plan) -> list[str]:
    """The directories that a plan watches now; those of a pattern are matched anew at every look."""
    if not plan.is_pattern:
        return [plan.directory]
    return sorted(path.rstrip(os.sep) for path in glob.glob(plan.directory, recursive=True) if os.path.isdir(path))


def see(plan: Plan, memory: Memory, now: float, terms: Terms | None = None) -> tuple[list[Seen], list[str], bool]:
    """The checkpoints of a plan's directories that are not settled, sentences about what cannot be read, and whether nothing could be."""
    terms = terms or Terms(plan.max_depth, plan.regex_filter, plan.quiet_period)
    seen: list[Seen] = []
    problems: list[str] = []
    directories = directories_of(plan)
    read_one = False
    for gone in memory.surveys.keys() - set(directories):
        del memory.surveys[gone]
    for directory in directories:
        survey = memory.surveys.setdefault(directory, Survey(directory))
        try:
            seen += survey.look(terms, now)
        except OSError as error:
            problems.append(f"{printable(directory)} cannot be read ({error.strerror}); waiting for it")
            continue
        read_one = True
        problems += survey.problems
    if plan.is_pattern and not directories:
        problems.append(f"no directory matches {printable(plan.directory)} yet")
    return seen, problems, not read_one


def see_all(plan: Plan, memory: Memory, now: float) -> list[Seen]:
    """Everything that is there when a watch begins, what is held of deleted checkpoints included."""
    seen, _, _ = see(plan, memory, now)
    _find_holds(plan, memory)
    return seen + _held_only(plan, memory, seen, memory.protection.held(plan), now)


def look(
    plan: Plan,
    baseline: Baseline,
    memory: Memory,
    idle_since: float,
    now: float,
    full_every: float = 0.0,
    new_max: float = float("inf"),
    neighbours: Neighbours | None = None,
) -> Look:
    """Lists, checks what is whole, reads records, decides, and holds what waits.

    Args:
        plan: the watch.
        baseline: its baseline.
        memory: of the process; used by one look of this plan at a time.
        idle_since: since when nothing has happened in this watch (seconds since the epoch), for ``--until_idle``.
        now: seconds since the epoch.
        full_every: seconds that a directory which seems unchanged may go without being listed.
        new_max: seconds that it may spend on directories that no look has seen; the others come later.
        neighbours: the other watches; None: holds are left alone.
    """
    source = refs.source_digest(plan.evaluator.reference)
    is_anew = memory.source != source or not memory.surveys
    for survey in memory.surveys.values() if is_anew else ():
        survey.reconsider()
    memory.source = source
    # What changed source means is the file as it is now; the plan holds the one that was checked.
    today = replace(plan, evaluator=replace(plan.evaluator, source=source))
    terms = Terms(
        plan.max_depth,
        plan.regex_filter,
        plan.quiet_period,
        is_known=lambda found, signature: baseline.has_signature(plan.below(found.checkpoint.path), signature),
        recall=lambda found, signature: _recall(plan, found.checkpoint.path, signature),
        keeps_lost=plan.results_dir is not None,
        full_every=full_every,
        turns_max=TURNS_PART * plan.polling_interval,
        new_max=new_max,
    )
    seen, problems, missing = see(plan, memory, now, terms)
    is_partial = any(survey.is_partial for survey in memory.surveys.values())
    ended = (plan.once or _training_ended(plan, memory, idle_since, now)) and not is_partial
    last = _last_whole(plan, memory) if ended and plan.every else None
    if last and not any(s.checkpoint.path == last for s in seen):
        for survey in memory.surveys.values():
            survey.ask_again(last)
        seen, problems, missing = see(plan, memory, now, terms)
    _find_holds(plan, memory)
    held = memory.protection.held(plan) if neighbours else []
    seen += _held_only(plan, memory, seen, held, now)
    decisions = decide(today, baseline, seen, lambda s: _record(today, s), now, last)
    if neighbours:
        protect(plan, decisions, held, memory.protection, _record, neighbours, now)
    for decision in decisions:
        if decision.state in ("done", "baseline", "skipped"):
            _settle(today, memory, decision)
    return Look(
        tuple(decisions),
        tuple(problems),
        missing,
        ended,
        now,
        memory.protection.notes,
        "; ".join(memory.protection.refused.values()),
        is_anew,
    )


def _settle(plan: Plan, memory: Memory, decision: Decision) -> None:
    path = decision.seen.checkpoint.path
    folder = str(place_of(plan, path).folder) if decision.record else None
    for survey in memory.surveys.values():
        if survey.seen.get(path) is decision.seen:
            survey.settle(decision.seen, folder)


def _held_only(plan: Plan, memory: Memory, seen: list[Seen], held: list[Held], now: float) -> list[Seen]:
    """What is held of checkpoints that retention has taken, or that were saved again, since."""
    known = {hold_key(s.checkpoint.path, s.identity) for s in seen if s.identity}
    found = []
    for one in held:
        # What is held for another watch may be none of this one's.
        if one.key not in known and is_meant(plan, memory.surveys, one.checkpoint.path):
            again = as_seen(one, now)
            if again:
                found.append(again)
    return found


def _find_holds(plan: Plan, memory: Memory) -> None:
    """Folders in which something may be held, by an earlier watch or another: those that a look comes across, or that stand elsewhere."""
    state = memory.protection
    for directory, survey in memory.surveys.items():
        state.folders |= survey.hold_folders
        survey.hold_folders = set()
        if not state.searched:
            state.folders |= {hold_folder(Path(directory, name)) for name in ("", "checkpoint_0", "step-0", "last.ckpt")}
    if not state.searched and plan.results_dir is not None and os.path.isdir(plan.results_dir):
        state.folders |= set(Path(plan.results_dir).glob("*/.hold"))
    state.searched = state.searched or plan.results_dir is None or os.path.isdir(plan.results_dir)


def _last_whole(plan: Plan, memory: Memory) -> str | None:
    """The path of the last checkpoint that lies there whole."""
    found: list[Found] = []
    for directory in memory.surveys:
        with contextlib.suppress(OSError):
            found += scan(directory, plan.max_depth, plan.regex_filter).found
    for one in sorted(found, key=lambda f: f.checkpoint.order, reverse=True):
        with contextlib.suppress(Exception):
            # What its files hold must not keep the watch from ending.
            if formats.of(one.checkpoint).missing(one.listing) is None:
                return one.checkpoint.path
    return None


def _training_ended(plan: Plan, memory: Memory, idle_since: float, now: float) -> bool:
    if plan.until_file is not None and os.path.exists(plan.until_file):
        return True
    if plan.until_step is not None and any(survey.furthest >= plan.until_step for survey in memory.surveys.values()):
        return True
    return plan.until_idle is not None and now - idle_since >= plan.until_idle


def place_of(plan: Plan, path: str) -> Place:
    """Where a watch's results of the checkpoint at this path lie."""
    return Place.of(path, plan.evaluator.name, plan.results_dir, plan.weights)


def _record(plan: Plan, seen: Seen) -> Record | None:
    return place_of(plan, seen.checkpoint.path).find(seen.identity or "")


def _recall(plan: Plan, path: str, signature: str) -> str | None:
    """The identity of a checkpoint that was evaluated and has not been touched since."""
    try:
        record = read(place_of(plan, path).record)
    except OSError:
        return None
    return record.identity if record and record.signature == signature and counts(plan, record) else None


class _Running:
    """One function on its way through a thread; ``plan`` tells whose look it is."""

    def __init__(self, function: Callable[[], object], plan: Plan | None = None) -> None:
        self.plan = plan
        self.began = time.time()
        self.value: object = None
        self.error: BaseException | None = None
        self.done = threading.Event()
        self._function = function

    def run(self) -> None:
        try:
            self.value = self._function()
        except BaseException as error:
            self.error = error
        finally:
            self.done.set()


def in_thread(function: Callable[[], T], seconds: float, progress: Callable[[], object] | None = None) -> T | None:
    """The function's value, or None when it has not returned after ``seconds`` (in which ``progress`` has not changed either); then it is
    left to itself. A daemon thread: those of an executor would keep a process with a hung file system from ending."""
    running = _Running(function)
    threading.Thread(target=running.run, daemon=True).start()
    before = None
    while not running.done.wait(seconds):
        now = progress() if progress else None
        if now == before:
            return None
        before = now
    if running.error:
        raise running.error
    return running.value  # type: ignore[return-value]


class _Pool:
    """Threads for looks: a few while file systems answer, more while some of them hang."""

    def __init__(self) -> None:
        self._todo: SimpleQueue[_Running] = SimpleQueue()
        self._finished: SimpleQueue[_Running] = SimpleQueue()
        self._threads = 0
        self._lock = threading.Lock()

    def submit(self, running: _Running) -> None:
        self._todo.put(running)
        if self._threads < THREADS:
            self._grow(1)

    def next_finished(self, seconds: float) -> _Running | None:
        """The next look that comes back within ``seconds``; while none does and others wait, threads are added."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                return self._finished.get(timeout=max(0.0, min(STALLED, deadline - time.monotonic())))
            except Empty:
                if time.monotonic() >= deadline:
                    return None
                if not self._todo.empty():
                    self._grow(min(self._threads, THREADS_MAX - self._threads))

    def _grow(self, count: int) -> None:
        for _ in range(count):
            with self._lock:
                self._threads += 1
            threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            try:
                running = self._todo.get(timeout=IDLE)
            except Empty:
                with self._lock:
                    self._threads -= 1
                return
            running.run()
            self._finished.put(running)


class Lookout:
    """The looks that are under way in this process, at most one a plan."""

    def __init__(self) -> None:
        self._running: dict[tuple[str, float], _Running] = {}
        self._memories: dict[tuple[str, float], Memory] = {}
        self._pool = _Pool()

    def start(self, plan: Plan, baseline: Baseline, idle_since: float, neighbours: Neighbours | None = None, cost: float = 0.0) -> bool:
        """Begins to look, unless the last look at this plan has not come back yet; True when it began now.

        Args:
            plan: the watch.
            baseline: its baseline.
            idle_since: since when nothing has happened in it.
            neighbours: the other watches.
            cost: seconds that it takes to list everything of all watches (``cost()``).
        """
        key = (plan.id, plan.given)
        if key in self._running:
            return False
        memory = self._memories.setdefault(key, Memory())
        every = 0.0 if cost / FULL_PART <= plan.polling_interval else min(FULL_MAX, cost / FULL_PART)
        running = _Running(lambda: look(plan, baseline, memory, idle_since, time.time(), every, NEW_MAX, neighbours), plan)
        self._running[key] = running
        self._pool.submit(running)
        return True

    def cost(self) -> float:
        """Seconds that it takes to list everything of all watches."""
        # A look's thread may add directories meanwhile.
        return sum(memory.cost for memory in self._memories.values())

    def ready(self, begun: set[str], seconds: float) -> Iterator[tuple[Plan, Look | str]]:
        """The looks that have come back, as they do: each plan with its look, or a sentence why there is none.

        Args:
            begun: the ids of the plans that are waited for; those whose look hangs since earlier are only taken along.
            seconds: for at most so long.
        """
        deadline = time.monotonic() + seconds
        left = set(begun)
        while running := self._pool.next_finished(max(0.0, deadline - time.monotonic()) if left else 0.0):
            assert running.plan is not None
            left.discard(running.plan.id)
            del self._running[running.plan.id, running.plan.given]
            if running.error is not None:
                yield running.plan, f"the look failed: {type(running.error).__name__}: {running.error}"
            else:
                assert isinstance(running.value, Look)
                yield running.plan, running.value

    def hanging(self) -> Iterator[tuple[Plan, float]]:
        """The plans whose look has not come back, and the seconds that it has taken so far."""
        for running in self._running.values():
            if running.plan:
                yield running.plan, time.time() - running.began

    def drop(self, plan: Plan) -> None:
        """Forgets what is known of a plan, so that its next look decides about everything anew."""
        self._memories.pop((plan.id, plan.given), None)

    def forget(self, plans: Mapping[str, float]) -> None:
        """Drops what is known of plans other than these (id, and when it was given)."""
        for key in [key for key in self._memories if plans.get(key[0]) != key[1]]:
            del self._memories[key]
