"""From the records of watches to their trackers, in threads beside the ticks, so that no look waits for a tracker that is slow or away.

Each target has a lane: one thread, which serves the watches that have something for it in turn. So a tracker that hangs keeps waiting
nobody but those who publish there, and after its time-out it is left alone for a while.
"""

import contextlib
import glob
import json
import logging
import re
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from assayer import record as records
from assayer.errors import UsageError
from assayer.files import printable
from assayer.plan import Plan
from assayer.publication import Outcome, publish_apart
from assayer.record import Place, results_folder
from assayer.results.find import find_records
from assayer.tracking import Target
from assayer.watch.look import directories_of

__all__ = ["Publisher"]

logger = logging.getLogger(__name__)

# Seconds until what went wrong is tried again, after an error and after a time-out; twice as many each time, up to the last.
PAUSE, LATE_PAUSE, PAUSE_MAX = 10.0, 60.0, 600.0


class Publisher:
    """Publishes what has a record: of a watch that this process meets for the first time all of it, then what is new.

    After any error it is all again: what was not noted in a ledger is known from the records alone. A record that a tracker has is no
    second point there (``assayer.ledger``), so what was broken off is simply begun again.
    """

    def __init__(self) -> None:
        self._lanes: dict[str, _Lane] = {}
        # Watches by id, as they were given: one that is given again may have other trackers.
        self._met: dict[str, float] = {}

    def keep_up(self, plan: Plan, finished: Iterable[str]) -> None:
        """Orders what this watch's trackers lack: ``finished`` are the paths of checkpoints that have a record since the last look."""
        is_new = bool(plan.track) and self._met.get(plan.id) != plan.given
        if is_new:
            self.drop(plan.id)
            self._met[plan.id] = plan.given
        new = set(finished)
        for told in plan.track:
            key = json.dumps(told, sort_keys=True)
            lane = self._lanes.setdefault(key, _Lane(Target.from_json(told)))
            lane.order(plan, new, all_of_it=is_new)

    def drop(self, plan_id: str) -> None:
        """Forgets a watch that is over; what is under way for it comes to its end."""
        self._met.pop(plan_id, None)
        for lane in self._lanes.values():
            lane.drop(plan_id)

    def is_busy(self, plan: Plan) -> bool:
        """True while something of this watch's is published or is about to be; what waits for the end of a pause does not count."""
        return any(lane.is_busy(plan.id) for lane in self._lanes_of(plan))

    def try_again(self, plan: Plan) -> bool:
        """True when something of a watch that is about to end is tried a last time, now; False when nothing is left, or was so tried."""
        # Of every target, not of the first alone.
        tried = [lane.try_again(plan.id) for lane in self._lanes_of(plan)]
        return any(tried)

    def problem(self, plan: Plan) -> str:
        """Why points of this watch's are missing; empty when all is well."""
        return "; ".join(problem for lane in self._lanes_of(plan) if (problem := lane.problem(plan.id)))

    def _lanes_of(self, plan: Plan) -> "list[_Lane]":
        keys = [json.dumps(told, sort_keys=True) for told in plan.track]
        return [self._lanes[key] for key in keys if key in self._lanes]


@dataclass
class _Pause:
    """How often something went wrong in a row, and until when it is left alone (seconds, monotonic)."""

    first: float
    times: int = 0
    until: float = 0.0

    def begin(self) -> None:
        self.until = time.monotonic() + min(PAUSE_MAX, self.first * 2**self.times)
        self.times += 1

    def end(self) -> None:
        self.times, self.until = 0, 0.0

    def is_over(self) -> bool:
        return time.monotonic() >= self.until


@dataclass
class _Desk:
    """One watch at one lane: checkpoints that have come to a record, whether all records are to be gone through, and when, and why."""

    plan: Plan
    new: set[str] = field(default_factory=set)
    wants_all: bool = False
    pause: _Pause = field(default_factory=lambda: _Pause(PAUSE))
    problem: str = ""
    at_work: bool = False
    was_last: bool = False

    def is_due(self) -> bool:
        return not self.at_work and (bool(self.new) or (self.wants_all and self.pause.is_over()))


class _Lane:
    """One target, and the watches that publish there. Its thread lives while there is something to do."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._desks: dict[str, _Desk] = {}
        self._pause = _Pause(LATE_PAUSE)
        self._problem = ""
        self._thread: threading.Thread | None = None

    def order(self, plan: Plan, new: set[str], all_of_it: bool) -> None:
        with self._lock:
            desk = self._desks.setdefault(plan.id, _Desk(plan))
            desk.new |= new
            desk.wants_all = desk.wants_all or all_of_it
            self._wake()

    def drop(self, plan_id: str) -> None:
        with self._lock:
            self._desks.pop(plan_id, None)

    def is_busy(self, plan_id: str) -> bool:
        with self._lock:
            desk = self._desks.get(plan_id)
            return desk is not None and (desk.at_work or (desk.is_due() and self._pause.is_over()))

    def try_again(self, plan_id: str) -> bool:
        with self._lock:
            desk = self._desks.get(plan_id)
            # One that hangs has had its time.
            if desk is None or desk.was_last or not desk.wants_all or not self._pause.is_over():
                return False
            desk.was_last = True
            desk.pause.end()
            self._wake()
            return True

    def problem(self, plan_id: str) -> str:
        with self._lock:
            desk = self._desks.get(plan_id)
            if desk is None:
                return ""
            return desk.problem or (self._problem if desk.new or desk.wants_all else "")

    def _wake(self) -> None:
        if self._thread is None and self._pause.is_over() and any(desk.is_due() for desk in self._desks.values()):
            self._thread = threading.Thread(target=self._run, daemon=True, name="publisher")
            self._thread.start()

    def _run(self) -> None:
        while (order := self._next()) is not None:
            desk, checkpoints = order
            try:
                outcome = _publish(desk.plan, checkpoints, self._target)
            except Exception as error:
                # A bug that one watch's records meet must not keep the others from their trackers.
                logger.exception("publishing the records of %s failed", printable(desk.plan.directory))
                outcome = Outcome(errors=[f"its records could not be published: {type(error).__name__}: {error}"])
            self._note(desk, checkpoints is None, outcome)

    def _next(self) -> tuple[_Desk, set[str] | None] | None:
        """Whose turn it is, and which checkpoints it is for (None: for all records); None when nothing is to be done now."""
        with self._lock:
            desk = next((desk for desk in self._desks.values() if desk.is_due()), None) if self._pause.is_over() else None
            if desk is None:
                self._thread = None
                return None
            # Behind the others, for the next time.
            self._desks[desk.plan.id] = self._desks.pop(desk.plan.id)
            desk.at_work = True
            checkpoints = None if desk.wants_all and desk.pause.is_over() else desk.new
            if checkpoints is None:
                desk.wants_all = False
            desk.new = set()
            return desk, checkpoints

    def _note(self, desk: _Desk, were_all: bool, outcome: Outcome) -> None:
        for note in outcome.notes:
            logger.info("%s: %s", printable(desk.plan.directory), printable(note))
        for reason, paths in outcome.without.items():
            logger.info("%s: %d records give no point: %s", printable(desk.plan.directory), len(paths), printable(reason))
        with self._lock:
            desk.at_work = False
            if outcome.errors:
                desk.problem, desk.wants_all = "; ".join(outcome.errors), True
            elif were_all or not desk.wants_all:
                desk.problem = ""
            if outcome.is_late:
                self._problem = desk.problem
                self._pause.begin()
                # It is due again when the lane is.
                desk.pause.end()
                return
            self._pause.end()
            self._problem = ""
            if outcome.errors and desk.pause.is_over():
                desk.pause.begin()
            elif not outcome.errors and were_all:
                desk.pause.end()


def _publish(plan: Plan, checkpoints: set[str] | None, target: Target) -> Outcome:
    paths = _all_records(plan) if checkpoints is None else _records_of(plan, checkpoints)
    return publish_apart(paths, target, plan.weights) if paths else Outcome()


def _all_records(plan: Plan) -> list[Path]:
    directories = directories_of(plan)
    found: list[Path] = []
    for place in [plan.results_dir] if plan.results_dir else directories:
        # There may be no record yet.
        with contextlib.suppress(UsageError):
            found += [path for path in find_records(Path(place)) if path.parent.name == plan.evaluator.name]
    return found if plan.results_dir is None else _below(found, directories, plan.results_dir)


def _below(paths: Iterable[Path], directories: Iterable[str], results_dir: str) -> list[Path]:
    """Those records in a ``--results_dir``, which others may share, that are of checkpoints below these directories."""
    folders: dict[Path, list[Path]] = {}
    for path in paths:
        folders.setdefault(path.parent, []).append(path)
    # All records of a folder are of one directory of checkpoints, so one that can be read tells.
    return [path for of_one in folders.values() if _is_below(of_one, directories, results_dir) for path in of_one]


def _is_below(paths: Iterable[Path], directories: Iterable[str], results_dir: str) -> bool:
    for path in paths:
        with contextlib.suppress(OSError):
            record = records.read(path)
            if record and results_folder(Path(record.checkpoint), results_dir) == path.parent.parent:
                return any(Path(record.checkpoint).is_relative_to(directory) for directory in directories)
    return False


def _records_of(plan: Plan, checkpoints: Iterable[str]) -> list[Path]:
    """The records under these checkpoints' names, also those of other weights that the names stood for before."""
    found: list[Path] = []
    # What was saved before under a name stands on the board as <path>@<8 digits>.
    for checkpoint in [name for path in sorted(checkpoints) for name in (path, re.sub("@[0-9a-f]{8}$", "", path))]:
        place = Place.of(checkpoint, plan.evaluator.name, plan.results_dir, plan.weights)
        found += [place.record, *place.folder.glob(f"{glob.escape(place.name)}@*.json")]
    return [path for path in dict.fromkeys(found) if path.is_file()]
