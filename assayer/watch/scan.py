"""From a directory to the checkpoints in it: names, sizes and times only; no file is opened but the markers that formats read."""

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import translate
from typing import Protocol

from assayer import formats
from assayer.checkpoint import Checkpoint, Found, Listing, list_files
from assayer.files import printable
from assayer.record import OWN_FOLDERS

__all__ = ["Known", "Scan", "is_temporary", "scan"]

# Names under which trainers and copy programs keep what is not finished yet.
TEMPORARY = (
    *("tmp-*", "tmp_*", "*-tmp", "*_tmp", "*.tmp", "*.tmp.*", "*.temp", "*.part", "*.partial", "*.incomplete", "*.writing"),
    *("*-unfinished", "*.orbax-checkpoint-tmp-*", "*.lock", "*~", ".*"),
)
_TEMPORARY = re.compile("|".join(translate(pattern) for pattern in TEMPORARY))


class Known(Protocol):
    """What an earlier look saw at a path."""

    @property
    def checkpoint(self) -> Checkpoint: ...

    @property
    def listing(self) -> Listing: ...


@dataclass(frozen=True)
class Scan:
    """What one look at a directory found, and a sentence for each part of it that could not be read."""

    found: tuple[Found, ...]
    problems: tuple[str, ...] = ()


def is_temporary(name: str) -> bool:
    """True for a name that is never a checkpoint's: hidden, or one that says "not finished"."""
    return _TEMPORARY.match(name) is not None


def scan(directory: str, max_depth: int, regex_filter: str | None = None, known: Mapping[str, Known] | None = None) -> Scan:
    """The checkpoints in a directory and up to ``max_depth`` levels below it.

    Symbolic links below the directory are not followed: a link such as ``latest`` points at what is listed anyway. In a directory that
    is a checkpoint itself, only directories that are no part of it are looked into: some trainers lay ``checkpoint-N`` beside a final
    export.

    Args:
        directory: absolute path.
        max_depth: 1 is what lies directly in it.
        regex_filter: only checkpoints whose path below the directory has a match of this regular expression.
        known: what an earlier look saw, by path: where the listing is the same, nothing is identified anew.

    Raises:
        OSError: the directory itself is gone or cannot be read.
    """
    found: list[Found] = []
    problems: list[str] = []
    _walk(directory, 0, max_depth, known or {}, found, problems)
    if regex_filter is not None:
        pattern = re.compile(regex_filter)
        found = [f for f in found if pattern.search(os.path.relpath(f.checkpoint.path, directory))]
    return Scan(tuple(sorted(found, key=lambda f: f.checkpoint.order)), tuple(problems))


def _walk(path: str, depth: int, max_depth: int, known: Mapping[str, Known], found: list[Found], problems: list[str]) -> None:
    try:
        files, folders = list_files(path)
    except OSError as error:
        if depth == 0:
            raise
        # What is deleted while we look was no checkpoint that stays.
        if not isinstance(error, FileNotFoundError):
            problems.append(f"cannot read {printable(path)}: {error.strerror}")
        return
    inside = list(files)
    for name in folders:
        if re.fullmatch(formats.all_folders(), name):
            with contextlib.suppress(OSError):
                inside += list_files(os.path.join(path, name), f"{name}/")[0]
    before = len(problems)
    checkpoint = _identify(Listing(path, True, tuple(inside)), known, problems)
    if len(problems) > before:
        # What lies in it may be parts of what could not be made out.
        return
    own = ""
    taken: frozenset[str] = frozenset()
    if checkpoint:
        found.append(checkpoint)
        form = formats.of(checkpoint.checkpoint)
        own, taken = form.FOLDERS, frozenset(form.weights(checkpoint.listing))
    # Beside a final export in a run's own directory, numbered files are checkpoints as before; inside a numbered one, nothing is.
    if depth < max_depth and (checkpoint is None or checkpoint.checkpoint.position.number is None):
        for entry in files:
            if not is_temporary(entry.name) and entry.name not in taken:
                single = _identify(Listing(os.path.join(path, entry.name), False, (entry,)), known, problems)
                if single and (checkpoint is None or single.checkpoint.position.number is not None):
                    found.append(single)
    if depth < max_depth:
        for name in folders:
            if name not in OWN_FOLDERS and not is_temporary(name) and not (own and re.fullmatch(own, name)):
                _walk(os.path.join(path, name), depth + 1, max_depth, known, found, problems)


def _identify(listing: Listing, known: Mapping[str, Known], problems: list[str]) -> Found | None:
    before = known.get(listing.path)
    if before and before.listing == listing:
        return Found(before.checkpoint, before.listing)
    try:
        return formats.identify(listing)
    except OSError:
        # A marker that vanished between listing and reading: the next look sees what is there then.
        return None
    except Exception as error:
        # What one checkpoint's files hold must never keep the others from being seen.
        problems.append(f"cannot make out {printable(listing.path)}: {type(error).__name__}: {printable(str(error))[:200]}")
        return None
