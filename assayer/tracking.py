"""From records to trackers: what ``--track`` means, and each record's point given to each target once.

A point is intended in the ledger, then given to the tracker, then noted as done; whoever breaks off in between leaves it doubtful, and the
next publisher, of whatever record, begins with what is doubtful. So a tracker that was down is repaired by the next record, or by
``python -m assayer.results publish``. What a tracker does about doubtful points its module says; a function of the user's is called with
them again, their ``doubtful`` True and their ``id`` the same as before.
"""

import contextlib
import importlib.util
import inspect
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from assayer import record as records
from assayer import refs
from assayer.errors import AssayerError, TrackerError, UsageError
from assayer.files import digest, printable
from assayer.ledger import Ledger, opened
from assayer.points import Curve, Point, point_of, why_none
from assayer.refs import PACKAGE_PARENT, Reference
from assayer.trackers import Tracker, all_trackers

__all__ = ["NAMES", "Outcome", "Target", "check", "parse", "publish", "publish_record", "publish_records"]

# How metrics are named: by themselves, or with their evaluator.
NAMES = ("metric", "evaluator")
# Seconds to wait for another publisher of the same results folder and target.
LOCK_TIMEOUT = 60.0
# Seconds that a publication may take beside an evaluation, and that the check of a function may.
RECORD_TIMEOUT, CHECK_TIMEOUT = 60.0, 120.0
# Seconds after that in which a child ends by itself, when nobody is there any more to end it.
GRACE = 10

_COMMON = {"names": "metric (eval/<metric>) or evaluator (eval/<evaluator>/<metric>); default: metric"}


@dataclass(frozen=True)
class Target:
    """Where points go: a tracker with its options, or a function of the user's. Paths in it are absolute.

    ``str`` is for people: a password in a URL is not shown.
    """

    tracker: str
    options: Mapping[str, str] = field(default_factory=dict)
    names: str = NAMES[0]
    reference: Reference | None = None

    def __str__(self) -> str:
        words = dict(self.options) if self.names == NAMES[0] else {**self.options, "names": self.names}
        return _masked(self.tracker + (":" + ",".join(f"{name}={value}" for name, value in words.items()) if words else ""))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Target":
        reference = value["reference"]
        return cls(value["tracker"], value["options"], value["names"], reference and Reference(**reference))

    @property
    def ledger(self) -> str:
        """The name of its ledger in every results folder."""
        word = "function" if self.reference else self.tracker
        # How it is reached is no part of where it is.
        place = {name: value for name, value in self.options.items() if name not in ("mode", "group")}
        return f"{word}-{digest(self.tracker, json.dumps(place, sort_keys=True))[:8]}.ledger"


def _masked(text: str) -> str:
    """The text without what stands before the host of a URL."""
    return re.sub(r"://[^/@\s]*@", "://***@", text)


def parse(text: str, cwd: Path) -> Target:
    """The target that ``--track TEXT`` means when given in the folder ``cwd``; nothing is imported but our own modules.

    Raises:
        UsageError: it is none; the error says what is allowed.
    """
    word, colon, rest = text.partition(":")
    if word in all_trackers():
        return _parse_options(word, rest, bool(colon), cwd)
    return Target(str(reference := _parse_function(text, cwd)), reference=reference)


def _forms() -> str:
    return f"{', '.join(all_trackers())} (with :option=value,...) or path/to/file.py:function"


def _parse_options(word: str, text: str, is_given: bool, cwd: Path) -> Target:
    tracker = all_trackers()[word]
    allowed = {**tracker.OPTIONS, **_COMMON}
    if is_given and not text:
        raise UsageError(f"--track {word}: nothing follows the colon; give {', '.join(f'{name}=' for name in allowed)}")
    parts = re.split(r",(?=\w+=)", text) if text else []
    if parts and tracker.WORD and not re.match(r"\w+=", parts[0]):
        parts[0] = f"{tracker.WORD}={parts[0]}"
    options: dict[str, str] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        if name not in allowed or not equals or not value:
            offer = "; ".join(f"{name}= {meaning}" for name, meaning in allowed.items())
            raise UsageError(f"--track {word}: {printable(part)} is not allowed; give {offer}")
        if name in options:
            raise UsageError(f"--track {word}: {name}= is given twice")
        options[name] = value
    names = options.pop("names", NAMES[0])
    if names not in NAMES:
        raise UsageError(f"--track {word}: names={printable(names)} is not allowed; give {' or '.join(NAMES)}")
    return Target(word, tracker.settle(options, cwd), names)


def _parse_function(text: str, cwd: Path) -> Reference:
    target, colon, function = text.rpartition(":")
    if not colon or not function.isidentifier():
        raise UsageError(f"--track {printable(text)}: give {_forms()}")
    if target.endswith(".py"):
        path = Path(os.path.abspath(cwd / Path(target).expanduser()))
        if not path.is_file():
            raise UsageError(f"--track {printable(text)}: no file {printable(str(path))}; give {_forms()}")
        return Reference(str(path), function, str(cwd))
    if not re.fullmatch(r"\w+(\.\w+)*", target):
        raise UsageError(f"--track {printable(text)}: give {_forms()}")
    return Reference(target, function, str(cwd))


def check(text: str, cwd: Path, elsewhere: bool = False) -> tuple[Target, str | None]:
    """The target of ``--track TEXT``, once it is known to work as far as this machine can tell, and a warning or None.

    A function is imported in a subprocess. No network is used.

    Args:
        text: what follows ``--track``.
        cwd: the folder in which it was given.
        elsewhere: points are published on other machines: then a library that is missing here is a warning.

    Raises:
        UsageError: the words are not allowed, or the function cannot be imported.
        TrackerError: the tracker's library is not installed.
    """
    target = parse(text, cwd)
    if target.reference:
        if problem := _ask({"check": target.to_json()}, CHECK_TIMEOUT):
            raise UsageError(f"--track {printable(text)}: {problem[0]}")
        return target, None
    missing = _missing_library(target.tracker, all_trackers()[target.tracker])
    if missing and not elsewhere:
        raise TrackerError(missing)
    return target, missing and f"{missing} on this machine"


def _missing_library(name: str, tracker: Tracker) -> str | None:
    missing = [module for module in tracker.NEEDS if importlib.util.find_spec(module) is None]
    return f"{name} needs {missing[0]}, which is not installed: pip install 'assayer[{tracker.EXTRA}]'" if missing else None


@dataclass
class Outcome:
    """What a publication came to: points that a target took now, records whose point it had, records that give none by the reason, notes,
    and what went wrong."""

    published: int = 0
    present: int = 0
    without: dict[str, list[Path]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def publish(paths: Iterable[Path], target: Target, again: bool = False, lock_timeout: float = LOCK_TIMEOUT) -> Outcome:
    """Gives the target the points of these records that it has not, and of their results folders whatever is doubtful.

    In the process that calls: a tracker's library is imported and may keep threads and processes of its own. What goes wrong with one
    results folder stands in the outcome and keeps no other from being published.

    Args:
        paths: files of records.
        target: where to.
        again: also publish a later evaluation of the same weights.
        lock_timeout: seconds to wait for another publisher of the same folder.
    """
    outcome = Outcome()
    folders: dict[Path, list[Path]] = {}
    for path in paths:
        # evals/<evaluator>/<checkpoint>.json
        folders.setdefault(path.parent.parent, []).append(path)
    for results, chosen in folders.items():
        try:
            with opened(results / target.ledger, lock_timeout) as ledger:
                _publish_folder(results, chosen, target, again, ledger, outcome)
        except AssayerError as error:
            outcome.errors.append(_masked(f"{target.tracker}: {error}"))
        except Exception as error:
            # Whatever a library raises: it is down, or refuses. The points stay doubtful.
            reason = _masked(" ".join(f"{type(error).__name__}: {error}".split()))
            outcome.errors.append(f"{printable(target.tracker)}: {printable(reason[:400])}")
    return outcome


def _publish_folder(results: Path, paths: Sequence[Path], target: Target, again: bool, ledger: Ledger, outcome: Outcome) -> None:
    fresh: dict[str, Point] = {}
    keys: set[str] = set()
    owners = dict(ledger.owners)
    for path in paths:
        found = records.read(path)
        reason = "it is no record" if found is None else why_none(found)
        if found is None or reason:
            outcome.without.setdefault(str(reason), []).append(path)
            continue
        point, notes = point_of(found, path, owners, target.names)
        if point.id in ledger.ids | fresh.keys() or (not again and point.key in ledger.keys | keys):
            # What is doubtful is published below.
            outcome.present += point.id not in ledger.pending
            continue
        outcome.notes += notes
        fresh[point.id] = point
        keys.add(point.key)
        for name in point.values:
            owners.setdefault(name, point.evaluator)
    points = sorted([*ledger.pending.values(), *fresh.values()], key=lambda point: (point.step, point.wall))
    if not points:
        return
    # Before anything is asked of it, what a tracker is to get is on the disk.
    ledger.intend(fresh.values())
    curve = Curve(results, ledger.uid, ledger.facts, ledger.remember)
    outcome.notes += _give(points, target, curve)
    ledger.done(points)
    outcome.published += len(points)


def _give(points: Sequence[Point], target: Target, curve: Curve) -> list[str]:
    if target.reference:
        refs.load(target.reference)(list(points))
        return []
    tracker = all_trackers()[target.tracker]
    if missing := _missing_library(target.tracker, tracker):
        raise TrackerError(missing.removeprefix(f"{target.tracker} "))
    return tracker.publish(points, target.options, curve)


def publish_record(path: Path, targets: Sequence[Target], timeout: float = RECORD_TIMEOUT) -> list[str]:
    """As ``publish_records``, for one record. Of one whose status is not finished there is nothing to publish or to say."""
    with contextlib.suppress(OSError):
        found = records.read(path)
        if found and found.status != "finished":
            return []
    return publish_records([path], targets, timeout)


def publish_records(paths: Sequence[Path], targets: Sequence[Target], timeout: float | None = None) -> list[str]:
    """Publishes records to each target, and returns a sentence for whatever did not go well; raises nothing.

    Each target has a child process of its own, so that the caller imports no library, inherits no thread, and waits no longer than the
    timeout: then the children are ended, and what they were at is doubtful until the next publication. Any number of processes on any
    number of hosts may call this for one folder. The children are given a cycle of their own (a session), out of reach of the caller's
    signals, and end by themselves soon after the timeout when the caller is gone.

    Args:
        paths: the records' files; those that give no point are passed over, and only said of one alone.
        targets: as ``check`` gives them.
        timeout: seconds, for all targets together; None: ``RECORD_TIMEOUT``, and a second more for each record.
    """
    timeout = RECORD_TIMEOUT + len(paths) if timeout is None else timeout
    deadline = time.monotonic() + timeout
    notes: list[str] = []
    asked: list[tuple[str, _Child]] = []
    for target in targets:
        text = str(target)
        try:
            question = {"publish": target.to_json(), "records": [str(path) for path in paths], "timeout": timeout}
            asked.append((text, _Child(question, timeout)))
        except OSError as error:
            notes.append(f"{printable(text)}: cannot be asked: {error.strerror}")
    for text, child in asked:
        answer = child.answer(deadline)
        notes += [f"{printable(text)} took longer than {timeout:g} s; the next publication repairs it"] if answer is None else answer
    return notes


class _Child:
    """A process of this module that answers one question with a list of sentences."""

    def __init__(self, question: Mapping[str, Any], timeout: float) -> None:
        # The alarm outlives the exec: without a parent it ends whatever hangs, in whatever library.
        code = f"import runpy, signal; signal.alarm({int(timeout) + GRACE}); runpy.run_module('assayer.tracking', run_name='__main__')"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            cwd=PACKAGE_PARENT,
            # By this variable W&B would use the process that the caller's W&B has: a run that a killed child leaves open there stays open.
            env={name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"},
            start_new_session=True,
        )
        # Not on its command line, which every user of the host may read: a URL may hold a password.
        stdin, self._process.stdin = self._process.stdin, None
        with contextlib.suppress(BrokenPipeError):
            if stdin:
                with stdin:
                    stdin.write(json.dumps(question) + "\n")

    def answer(self, deadline: float) -> list[str] | None:
        """Its sentences; None when it took too long."""
        try:
            said, complaints = self._process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            return None
        lines = said.splitlines()
        if lines and lines[-1].startswith('{"assayer"'):
            return [str(sentence) for sentence in json.loads(lines[-1])["assayer"]]
        last = (complaints.strip().splitlines() or [f"it ended with code {self._process.returncode}"])[-1]
        return [printable(f"a publication broke off: {last}")]


def _ask(question: Mapping[str, Any], timeout: float) -> list[str]:
    answer = _Child(question, timeout).answer(time.monotonic() + timeout)
    return [f"it did not answer within {timeout:g} s"] if answer is None else answer


def _answer(question: Mapping[str, Any]) -> list[str]:
    """What the child says: of a check what is wrong, of a publication what did not go well."""
    if "check" in question:
        reference = Target.from_json(question["check"]).reference
        try:
            if reference:
                inspect.signature(refs.load(reference)).bind([])
            return []
        except AssayerError as error:
            return [str(error)]
        except TypeError as error:
            return [f"it must take one argument, the list of points: {error}"]
        except BaseException as error:  # SystemExit at import is the user's mistake like any other
            return [f"its import raised {type(error).__name__}: {error}"]
    paths = [Path(path) for path in question["records"]]
    outcome = publish(paths, Target.from_json(question["publish"]), lock_timeout=question["timeout"])
    without = [f"{printable(str(paths[0]))} gives no point: {reason}" for reason in outcome.without] if len(paths) == 1 else []
    return [*outcome.errors, *outcome.notes, *without]


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    print("\n" + json.dumps({"assayer": _answer(json.loads(sys.stdin.readline()))}))
