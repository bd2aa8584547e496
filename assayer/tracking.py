"""What ``--track`` means: where points go, and whether that can work."""

import importlib.util
import inspect
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from assayer import apart, refs
from assayer.errors import AssayerError, TrackerError, UsageError
from assayer.files import digest, printable
from assayer.refs import Reference
from assayer.trackers import Tracker, all_trackers

__all__ = ["NAMES", "Target", "check", "missing_library", "parse"]

# How metrics are named: by themselves, or with their evaluator.
NAMES = ("metric", "evaluator")
# Seconds that the check of a function may take.
CHECK_TIMEOUT = 120.0

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
        return self.tracker + (":" + ",".join(f"{name}={_masked(value)}" for name, value in words.items()) if words else "")

    def masked(self, text: str) -> str:
        """The text, in which a library may speak of its URL, without what stands there before the host."""
        for value in self.options.values():
            if (found := _CREDENTIALS.search(value)) and found[1]:
                text = text.replace(found[1], "***")
        return _masked(text)

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
        # How it is reached is no part of where it is: a password may change.
        kept = {name: value for name, value in self.options.items() if name not in ("mode", "group")}
        place = {name: _CREDENTIALS.sub("://", value).rstrip("/") if "://" in value else value for name, value in kept.items()}
        return f"{word}-{digest(self.tracker, json.dumps(place, sort_keys=True))[:8]}.ledger"


# What stands before the host of a URL, whatever letters the password has; a path has no host.
_CREDENTIALS = re.compile(r"://(?!/)(\S*)@")


def _masked(text: str) -> str:
    """The text without what stands before the host of a URL."""
    return _CREDENTIALS.sub("://***@", text)


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


def check(text: str, cwd: Path) -> Target:
    """The target of ``--track TEXT``, once it is known to work as far as this machine can tell. No network is used.

    A function is imported in a process of its own.

    Args:
        text: what follows ``--track``.
        cwd: the folder in which it was given.

    Raises:
        UsageError: the words are not allowed, or the function cannot be imported.
        TrackerError: the tracker's library is not installed.
    """
    target = parse(text, cwd)
    if target.reference:
        if problem := _problem_of(target):
            raise UsageError(f"--track {printable(text)}: {problem}")
    elif missing := missing_library(target.tracker, all_trackers()[target.tracker]):
        raise TrackerError(missing)
    return target


def missing_library(name: str, tracker: Tracker) -> str | None:
    """The sentence that says which package a tracker lacks here; None when it has all."""
    missing = [module for module in tracker.NEEDS if importlib.util.find_spec(module) is None]
    return f"{name} needs {missing[0]}, which is not installed: pip install 'assayer[{tracker.EXTRA}]'" if missing else None


def _problem_of(target: Target) -> str:
    """What is wrong with a function of the user's; empty when nothing is."""
    try:
        return str(apart.ask("assayer.tracking", target.to_json(), CHECK_TIMEOUT))
    except TimeoutError:
        return f"it did not answer within {CHECK_TIMEOUT:g} s"
    except ChildProcessError as error:
        return f"its import broke off: {error}"


def _answer(question: Mapping[str, Any], alive: Callable[[], None]) -> str:
    reference = Target.from_json(question).reference
    try:
        if reference:
            inspect.signature(refs.load(reference)).bind([])
        return ""
    except AssayerError as error:
        return str(error)
    except TypeError as error:
        return f"it must take one argument, the list of points: {error}"
    except BaseException as error:  # SystemExit at import is the user's mistake like any other
        return f"its import raised {type(error).__name__}: {error}"


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    apart.answer(_answer)
