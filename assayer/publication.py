"""From records to a tracker: each record's point is given to each target once.

A point is intended in the ledger, then given to the tracker, then noted as done; whoever breaks off in between leaves it doubtful, and the
next publisher, of whatever record, gives it, too. So a tracker that was down is repaired by the next record, or by
``python -m assayer.results publish``. What a tracker does about doubtful points its module says; a function of the user's is called with
them again, their ``doubtful`` True and their ``id`` the same as before.

Points are given in parts that grow, each noted before the next begins: what is broken off loses a part and no more. A part that a tracker
does not take is halved until the points are known that it refuses; those stay doubtful, and keep no other from being given.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from assayer import apart, refs
from assayer import record as records
from assayer.errors import AssayerError, StateError, TrackerError, UsageError
from assayer.files import printable
from assayer.ledger import Ledger, opened
from assayer.points import Curve, Point, is_of_job, is_of_one, point_of, why_none
from assayer.record import Record, results_folder
from assayer.trackers import all_trackers
from assayer.tracking import Target, missing_library

__all__ = ["Outcome", "publish", "publish_apart"]

# Seconds to wait for another publisher of the same results folder and target.
LOCK_TIMEOUT = 60.0
# Seconds that a publication in a process of its own may be silent, and which part of them it waits for another publisher: so it can say so.
TIMEOUT, LOCK_SHARE = 60.0, 0.6
# Points of the first part, and of the largest.
FIRST, MOST = 50, 800
# Points refused in a row, one by one, after which it is the tracker that does not answer.
REFUSED_MAX = 3


@dataclass
class Outcome:
    """What a publication came to: points that a target took now, records whose point it had, records that give none by the reason, notes,
    what went wrong, and whether it was ended for its silence."""

    published: int = 0
    present: int = 0
    without: dict[str, list[Path]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    is_late: bool = False

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "without": {reason: [str(path) for path in paths] for reason, paths in self.without.items()}}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Outcome":
        return cls(**{**value, "without": {reason: [Path(path) for path in paths] for reason, paths in value["without"].items()}})


def publish(
    paths: Iterable[Path],
    target: Target,
    again: bool = False,
    *,
    watched: str | None = None,
    lock_timeout: float = LOCK_TIMEOUT,
    alive: Callable[[], None] = lambda: None,
) -> Outcome:
    """Gives the target the points of these records that it has not, and of their results folders whatever is doubtful.

    In the process that calls: a tracker's library is imported and may keep threads and processes of its own. What goes wrong with one
    results folder stands in the outcome and keeps no other from being published.

    Args:
        paths: files of records.
        target: where to.
        again: also publish a later evaluation of the same weights.
        watched: regular or ema: of a watch, which passes over what belongs to other weights and to jobs of a server.
        lock_timeout: seconds to wait for another publisher of the same folder.
        alive: called whenever something has got done.
    """
    outcome = Outcome()
    folders: dict[Path, list[tuple[Path, Record]]] = {}
    for path, record in _read(paths, watched, outcome, alive):
        folders.setdefault(_home(path, record), []).append((path, record))
    for results, found in folders.items():
        try:
            with opened(results / target.ledger, lock_timeout) as ledger:
                _Folder(results, target, ledger, outcome, alive).publish(found, again)
        except AssayerError as error:
            outcome.errors.append(target.masked(f"{target.tracker}: {error}"))
        except Exception as error:
            outcome.errors.append(f"{printable(target.tracker)}: {_reason(error, target)}")
        alive()
    # Of ten thousand records that say the same, one sentence is enough.
    outcome.notes, outcome.errors = list(dict.fromkeys(outcome.notes)), list(dict.fromkeys(outcome.errors))
    return outcome


def _reason(error: BaseException, target: Target) -> str:
    """Whatever a library raises, on one line."""
    text = str(error) if isinstance(error, AssayerError) else f"{type(error).__name__}: {error}"
    return printable(target.masked(" ".join(text.split()))[:400])


def _read(paths: Iterable[Path], watched: str | None, outcome: Outcome, alive: Callable[[], None]) -> list[tuple[Path, Record]]:
    """The records that give a point; of the others the outcome says why not."""
    found = []
    for path in paths:
        alive()
        try:
            record = records.read(path)
        except OSError as error:
            outcome.errors.append(f"cannot read {printable(str(path))}: {error.strerror}")
            continue
        if record is not None and watched is not None and (is_of_job(record) or (record.weights == "ema") != (watched == "ema")):
            continue
        reason = "it is no record" if record is None else why_none(record)
        if record is None or reason:
            outcome.without.setdefault(str(reason), []).append(path)
        else:
            found.append((path, record))
    return found


def _home(path: Path, record: Record) -> Path:
    """The results folder whose curve this record belongs to: its own; the run's where each checkpoint has a folder of its own."""
    # evals/<evaluator>/<checkpoint>.json
    results = path.parent.parent
    is_beside = results.name == "evals"
    folder, results_dir = (results.parent, None) if is_beside else (Path(record.checkpoint).parent, str(results.parent))
    if not is_of_one(folder.name, record) or results_folder(folder / "-", results_dir) != results:
        return results
    home = results_folder(folder, results_dir)
    try:
        home.mkdir(exist_ok=True)
    except OSError:
        # What is not ours to write has its curve where it lies.
        return results
    return home


@dataclass
class _Folder:
    """One results folder whose points go to one target."""

    results: Path
    target: Target
    ledger: Ledger
    outcome: Outcome
    alive: Callable[[], None]
    # Points refused one by one since the last that was taken, and the reason of each that was refused at all.
    in_a_row: int = 0
    is_one: bool = False
    refused: list[tuple[Point, BaseException]] = field(default_factory=list)

    def publish(self, found: Sequence[tuple[Path, Record]], again: bool) -> None:
        fresh = self._fresh(found, again)
        points = sorted([*self.ledger.pending.values(), *fresh], key=lambda point: (point.step, point.wall))
        if not points:
            return
        self.is_one = len(points) == 1
        # Before anything is asked of it, what a tracker is to get is on the disk.
        self.ledger.intend(fresh)
        # What was refused before comes last, and by itself.
        known = [point for point in points if point.id in self.ledger.refused]
        try:
            self._give_all([point for point in points if point.id not in self.ledger.refused])
            for point in known:
                self._give_part([point])
        except _TrackerAway:
            pass
        finally:
            self._tell_refused()

    def _fresh(self, found: Sequence[tuple[Path, Record]], again: bool) -> list[Point]:
        """The points that are not in the ledger; what is doubtful is published anyway."""
        fresh: dict[str, Point] = {}
        keys: set[str] = set()
        owners = dict(self.ledger.owners)
        for path, record in found:
            point, notes = point_of(record, path, owners, self.target.names)
            if point.id in self.ledger.ids | fresh.keys() or (not again and point.key in self.ledger.keys | keys):
                self.outcome.present += point.id not in self.ledger.pending
                continue
            self.outcome.notes += notes
            fresh[point.id] = point
            keys.add(point.key)
            for name in point.values:
                owners.setdefault(name, point.evaluator)
        return list(fresh.values())

    def _give_all(self, points: Sequence[Point]) -> None:
        size = FIRST
        while points:
            self._give_part(points[:size])
            points, size = points[size:], min(2 * size, MOST)

    def _give_part(self, points: Sequence[Point]) -> None:
        """Gives these points and notes them; where they are refused, each half by itself.

        Raises:
            UsageError, StateError: of what is no single point's fault.
            _TrackerAway: too many points were refused in a row.
        """
        try:
            self.outcome.notes += give(points, self.target, self._curve())
        except (UsageError, StateError):
            raise
        except (Exception, SystemExit) as error:
            # Whatever a library raises: it is down, or refuses. What it has taken of them is not known.
            again = [replace(point, doubtful=True) for point in points]
            if len(again) == 1:
                self._refuse(again[0], error)
            else:
                self._give_part(again[: len(again) // 2])
                self._give_part(again[len(again) // 2 :])
            return
        self.ledger.done(points)
        self.outcome.published += len(points)
        self.in_a_row = 0
        self.alive()

    def _curve(self) -> Curve:
        return Curve(self.results, self.ledger.uid, self.ledger.facts, self.ledger.remember, self.alive)

    def _refuse(self, point: Point, error: BaseException) -> None:
        self.refused.append((point, error))
        # Of one that was all there is, nobody knows whether it is for the point or for the tracker.
        if not self.is_one:
            self.ledger.refuse([point])
        self.in_a_row += 1
        if self.in_a_row >= REFUSED_MAX:
            raise _TrackerAway

    def _tell_refused(self) -> None:
        if not self.refused:
            return
        name = printable(self.target.masked(self.target.tracker))
        if self.in_a_row >= REFUSED_MAX or not self.outcome.published:
            self.outcome.errors.append(f"{name}: {_reason(self.refused[-1][1], self.target)}")
            return
        self.outcome.errors += [
            f"{name}: {printable(point.record)} is refused: {_reason(error, self.target)}" for point, error in self.refused[:REFUSED_MAX]
        ]


class _TrackerAway(Exception):
    """So many points were refused in a row that it is not for what they are."""


def give(points: Sequence[Point], target: Target, curve: Curve) -> list[str]:
    """Gives these points to the target, and returns notes."""
    if target.reference:
        refs.load(target.reference)(list(points))
        return []
    tracker = all_trackers()[target.tracker]
    if missing := missing_library(target.tracker, tracker):
        raise TrackerError(missing.removeprefix(f"{target.tracker} "))
    return tracker.publish(points, target.options, curve)


def publish_apart(paths: Sequence[Path], target: Target, watched: str | None = None, timeout: float | None = None) -> Outcome:
    """As ``publish``, in a process of its own; raises nothing.

    The caller imports no library, inherits no thread, and waits no longer than the timeout after the last point that was taken: then the
    process is ended, and what it was at is doubtful until the next publication. Any number of processes on any number of hosts may call
    this for one folder. The process ends by itself soon after the timeout when the caller is gone.

    Args:
        paths: the records' files.
        target: as ``tracking.check`` gives it.
        watched: as for ``publish``.
        timeout: seconds without a sign of life; default: ``TIMEOUT``.
    """
    timeout = TIMEOUT if timeout is None else timeout
    lock_timeout = LOCK_SHARE * timeout
    question = {"target": target.to_json(), "records": [str(path) for path in paths], "watched": watched, "lock_timeout": lock_timeout}
    name = printable(str(target))
    try:
        return Outcome.from_json(apart.ask("assayer.publication", question, timeout))
    except TimeoutError:
        return Outcome(errors=[f"{name} took longer than {timeout:g} s; the next publication repairs it"], is_late=True)
    except ChildProcessError as error:
        return Outcome(errors=[target.masked(f"{name}: a publication broke off: {error}")])
    except OSError as error:
        return Outcome(errors=[f"{name} cannot be asked: {error.strerror}"])


def _answer(question: dict[str, Any], alive: Callable[[], None]) -> dict[str, Any]:
    """The outcome of the publication that the question asks for."""
    paths, target = [Path(path) for path in question["records"]], Target.from_json(question["target"])
    alive()
    return publish(paths, target, watched=question["watched"], lock_timeout=question["lock_timeout"], alive=alive).to_json()


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    apart.answer(_answer)
