"""One look at a plan's directories, in a thread with a deadline: a file system that hangs delays no other watch."""

import contextlib
import glob
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from assayer import refs
from assayer.files import printable
from assayer.plan import Plan
from assayer.record import Place, Record, read
from assayer.watch.diff import Decision, decide
from assayer.watch.ready import Seen, examine
from assayer.watch.scan import scan

__all__ = ["Look", "Lookout", "Memory", "directories_of", "in_thread", "look", "see"]

T = TypeVar("T")


@dataclass
class Memory:
    """What earlier looks of this process know: each checkpoint as last seen, and each record as last read."""

    seen: dict[str, Seen] = field(default_factory=dict)
    looked: set[str] = field(default_factory=set)
    records: dict[str, tuple[tuple[int, int, int], Record | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Look:
    """What one look at a plan came to. ``missing``: the directory itself cannot be read, and nothing is known of its checkpoints."""

    decisions: tuple[Decision, ...]
    problems: tuple[str, ...]
    missing: bool
    final: bool
    began: float
    source: str | None = None


def directories_of(plan: Plan) -> list[str]:
    """The directories that a plan watches now; those of a pattern are matched anew at every look."""
    if not plan.is_pattern:
        return [plan.directory]
    return sorted(path.rstrip(os.sep) for path in glob.glob(plan.directory, recursive=True) if os.path.isdir(path))


def see(plan: Plan, memory: Memory, now: float) -> tuple[list[Seen], list[str], bool]:
    """The checkpoints of a plan's directories, sentences about what cannot be read, and whether nothing could be read at all."""
    seen: list[Seen] = []
    problems: list[str] = []
    directories = directories_of(plan)
    read_one = False
    for directory in directories:
        try:
            listed = scan(directory, plan.max_depth, plan.regex_filter, memory.seen)
        except OSError as error:
            problems.append(f"{printable(directory)} cannot be read ({error.strerror}); waiting for it")
            continue
        read_one = True
        problems += listed.problems
        for found in listed.found:
            path = found.checkpoint.path
            memory.seen[path] = examine(found, memory.seen.get(path), now, directory not in memory.looked, plan.quiet_period)
            seen.append(memory.seen[path])
        memory.looked.add(directory)
    if plan.is_pattern and not directories:
        problems.append(f"no directory matches {printable(plan.directory)} yet")
    return seen, problems, not read_one


def look(plan: Plan, memory: Memory, idle_since: float, now: float) -> Look:
    """Lists, checks what is whole, reads records, decides.

    Args:
        plan: the watch.
        memory: of the process; used by one look of this plan at a time.
        idle_since: since when nothing has happened in this watch (seconds since the epoch), for ``--until_idle``.
        now: seconds since the epoch.
    """
    seen, problems, missing = see(plan, memory, now)
    final = plan.once or _training_ended(plan, seen, idle_since, now)
    source = refs.source_digest(plan.evaluator.reference)
    # What changed source means is the file as it is now; the plan holds the one that was checked.
    today = replace(plan, evaluator=replace(plan.evaluator, source=source))
    decisions = decide(today, seen, lambda s: _record(today, s, memory), now, final)
    return Look(tuple(decisions), tuple(problems), missing, final, now, source)


def _training_ended(plan: Plan, seen: list[Seen], idle_since: float, now: float) -> bool:
    if plan.until_file is not None and os.path.exists(plan.until_file):
        return True
    if plan.until_step is not None and any(s.is_whole and (s.checkpoint.position.number or 0) >= plan.until_step for s in seen):
        return True
    return plan.until_idle is not None and now - idle_since >= plan.until_idle


def _record(plan: Plan, seen: Seen, memory: Memory) -> Record | None:
    assert seen.identity is not None
    place = Place.of(seen.checkpoint.path, plan.evaluator.name, plan.results_dir, plan.weights)
    for path in (place.record, place.earlier(seen.identity)):
        try:
            status = os.stat(path)
        except OSError:
            continue
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        known = memory.records.get(str(path))
        if not known or known[0] != stamp:
            known = memory.records[str(path)] = (stamp, read(path))
        if known[1] and known[1].identity == seen.identity:
            return known[1]
    return None


class _Running:
    """One function in a thread of its own. Threads of an executor would keep a process with a hung file system from ending."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.began = time.time()
        self.value: object = None
        self.error: BaseException | None = None
        self.done = threading.Event()
        self._function = function
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self.value = self._function()
        except BaseException as error:
            self.error = error
        finally:
            self.done.set()


def in_thread(function: Callable[[], T], seconds: float) -> T | None:
    """The function's value, or None when it has not returned after ``seconds``; then it is left to itself."""
    running = _Running(function)
    if not running.done.wait(seconds):
        return None
    if running.error:
        raise running.error
    return running.value  # type: ignore[return-value]


class Lookout:
    """The looks that are under way in this process: each in its thread, at most one a plan."""

    def __init__(self) -> None:
        self._running: dict[str, _Running] = {}
        self._memories: dict[str, Memory] = {}

    def start(self, plan: Plan, idle_since: float) -> bool:
        """Begins to look, unless the last look at this plan has not come back yet; True when it began now."""
        key = f"{plan.id}:{plan.given}"
        if key in self._running:
            return False
        memory = self._memories.setdefault(plan.id, Memory())
        self._running[key] = _Running(lambda: look(plan, memory, idle_since, time.time()))
        return True

    def wait(self, plan: Plan, seconds: float) -> Look | str:
        """The look at this plan, or a sentence why there is none within ``seconds``."""
        key = f"{plan.id}:{plan.given}"
        running = self._running.get(key)
        if running is None:
            return "is looked at in a moment"
        if not running.done.wait(max(0.0, seconds)):
            return f"its file system has not answered for {time.time() - running.began:.0f} s"
        del self._running[key]
        if running.error is not None:
            return f"the look failed: {type(running.error).__name__}: {running.error}"
        assert isinstance(running.value, Look)
        return running.value

    def forget(self, plan_ids: set[str]) -> None:
        """Drops what is known of plans other than these."""
        for plan_id in self._memories.keys() - plan_ids:
            del self._memories[plan_id]
        for key in [k for k, r in self._running.items() if k.partition(":")[0] not in plan_ids and r.done.is_set()]:
            with contextlib.suppress(KeyError):
                del self._running[key]
