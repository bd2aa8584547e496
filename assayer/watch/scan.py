"""From a directory to the checkpoints in it: names, sizes and times only; no file is opened but the markers that formats read."""

import contextlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import translate
from typing import Protocol

from assayer import formats
from assayer.checkpoint import Checkpoint, Entry, Found, Listing, list_files
from assayer.files import printable
from assayer.record import OWN_FOLDERS

__all__ = ["Earlier", "Folder", "Scan", "cannot_read", "filtered", "is_temporary", "list_whole", "open_folder", "scan"]

# Names under which trainers and copy programs keep what is not finished yet.
TEMPORARY = (
    *("tmp-*", "tmp_*", "*-tmp", "*_tmp", "*.tmp", "*.tmp.*", "*.temp", "*.part", "*.partial", "*.incomplete", "*.writing"),
    *("*-unfinished", "*.orbax-checkpoint-tmp-*", "*.lock", "*~", ".*"),
)
_TEMPORARY = re.compile("|".join(translate(pattern) for pattern in TEMPORARY))


class Earlier(Protocol):
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


@dataclass(frozen=True, slots=True)
class Folder:
    """What one directory holds.

    ``own``: the checkpoint that it is itself; ``singles``: files in it that are checkpoints; ``folders``: what is to be looked into;
    ``inside``: folders whose files belong to its own listing; ``whole``: that listing, with all of them; ``others``: folders of our own.
    """

    own: Found | None
    singles: tuple[Found, ...]
    folders: tuple[str, ...]
    inside: tuple[str, ...]
    whole: Listing
    others: frozenset[str]


def scan(directory: str, max_depth: int, regex_filter: str | None = None) -> Scan:
    """The checkpoints in a directory and up to ``max_depth`` levels below it.

    Symbolic links below the directory are not followed: a link such as ``latest`` points at what is listed anyway. In a directory that
    is a checkpoint itself, only directories that are no part of it are looked into: some trainers lay ``checkpoint-N`` beside a final
    export.

    Args:
        directory: absolute path.
        max_depth: 1 is what lies directly in it.
        regex_filter: only checkpoints whose path below the directory has a match of this regular expression.

    Raises:
        OSError: the directory itself is gone or cannot be read.
    """
    found: list[Found] = []
    problems: list[str] = []
    todo = [(directory, 0)]
    while todo:
        path, depth = todo.pop()
        try:
            folder = open_folder(path, depth, max_depth, {}, problems)
        except OSError as error:
            if depth == 0:
                raise
            problems += cannot_read(path, error)
            continue
        found += [*([folder.own] if folder.own else []), *folder.singles]
        todo += [(os.path.join(path, name), depth + 1) for name in folder.folders]
    return Scan(tuple(sorted(filtered(found, directory, regex_filter), key=lambda f: f.checkpoint.order)), tuple(problems))


def filtered(found: list[Found], directory: str, regex_filter: str | None) -> list[Found]:
    """Those whose path below the directory has a match of the regular expression; all of them where there is none."""
    if regex_filter is None:
        return found
    return [f for f in found if re.search(regex_filter, os.path.relpath(f.checkpoint.path, directory))]


def cannot_read(path: str, error: OSError) -> list[str]:
    """A sentence about a directory below the watched one; none for what is deleted while we look: it was no checkpoint that stays."""
    return [] if isinstance(error, FileNotFoundError) else [f"cannot read {printable(path)}: {error.strerror}"]


def nothing(entry: Entry) -> bool:
    """No file is passed over."""
    return False


def open_folder(
    path: str,
    depth: int,
    max_depth: int,
    known: Mapping[str, Earlier],
    problems: list[str],
    is_settled: Callable[[Entry], bool] = nothing,
) -> Folder:
    """What lies in one directory, ``depth`` levels below the watched one; a sentence for what cannot be made out goes to ``problems``.

    Args:
        path: absolute.
        depth: 0 for the watched directory itself.
        max_depth: of the watch.
        known: what an earlier look saw, by path: where the listing is the same, nothing is identified anew.
        problems: gains sentences.
        is_settled: files of which all is known, and which need not be identified.

    Raises:
        OSError: it is gone or cannot be read.
    """
    whole, files, folders, inside = list_whole(path)
    before = len(problems)
    checkpoint = _identify(whole, known, problems)
    if len(problems) > before:
        # What lies in it may be parts of what could not be made out.
        return Folder(None, (), (), tuple(inside), whole, frozenset())
    own = ""
    taken: frozenset[str] = frozenset()
    if checkpoint:
        form = formats.of(checkpoint.checkpoint)
        own, taken = form.FOLDERS, frozenset(form.weights(checkpoint.listing))
    singles = []
    # Beside a final export in a run's own directory, numbered files are checkpoints as before; inside a numbered one, nothing is.
    if depth < max_depth and (checkpoint is None or checkpoint.checkpoint.position.number is None):
        for entry in files:
            if not is_temporary(entry.name) and entry.name not in taken and not is_settled(entry):
                single = _identify(Listing(os.path.join(path, entry.name), False, (entry,)), known, problems)
                if single and (checkpoint is None or single.checkpoint.position.number is not None):
                    singles.append(single)
    below = [name for name in folders if name not in OWN_FOLDERS and not is_temporary(name) and not (own and re.fullmatch(own, name))]
    kept = tuple(below) if depth < max_depth else ()
    return Folder(checkpoint, tuple(singles), kept, tuple(inside), whole, OWN_FOLDERS.intersection(folders))


def list_whole(path: str) -> tuple[Listing, list[Entry], list[str], list[str]]:
    """A directory's listing with the files of every folder that some format counts as its own; its files, folders, and those folders.

    Raises:
        OSError: it is gone or cannot be read.
    """
    files, folders = list_files(path)
    inside = [name for name in folders if re.fullmatch(formats.all_folders(), name)]
    entries = list(files)
    for name in inside:
        with contextlib.suppress(OSError):
            entries += list_files(os.path.join(path, name), f"{name}/")[0]
    return Listing(path, True, tuple(entries)), files, folders, inside


def _identify(listing: Listing, known: Mapping[str, Earlier], problems: list[str]) -> Found | None:
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
