"""The noun that is carried: a listing of names, the checkpoint that a format sees in it, and the identity of its weights."""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from assayer.content import fingerprint
from assayer.files import digest, natural_key

__all__ = ["Checkpoint", "Entry", "Format", "Listing", "Position", "entry_of", "identity", "list_path"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One file as a directory listing shows it: name below the listing's path, size in bytes, times in nanoseconds."""

    name: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class Listing:
    """What lies at ``path`` (absolute), without any file being opened: a file's one entry, or the files of a directory."""

    path: str
    is_directory: bool
    entries: tuple[Entry, ...]

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(entry.name for entry in self.entries)

    @property
    def changed_ns(self) -> int:
        """When the youngest file last changed, by the file system's clock: the later of content and inode change."""
        return max((max(e.mtime_ns, e.ctime_ns) for e in self.entries), default=0)

    def file(self, name: str) -> Path:
        return Path(self.path) / name if self.is_directory else Path(self.path)

    def signature(self) -> str:
        """A digest of names, sizes, times and inodes. Another one tells that something may have changed, never that it did."""
        return digest(*(f"{e.name}\0{e.size}\0{e.mtime_ns}\0{e.inode}" for e in sorted(self.entries, key=lambda e: e.name)))


def list_path(path: str) -> Listing:
    """The listing of one path as it is now; symbolic links inside a directory are left out.

    Raises:
        OSError: it is gone or cannot be read.
    """
    status = os.stat(path)
    if not stat.S_ISDIR(status.st_mode):
        return Listing(path, False, (entry_of(os.path.basename(path), status),))
    with os.scandir(path) as found:
        entries = [entry_of(e.name, e.stat(follow_symlinks=False)) for e in found if e.is_file(follow_symlinks=False)]
    return Listing(path, True, tuple(sorted(entries, key=lambda entry: entry.name)))


def entry_of(name: str, status: os.stat_result) -> Entry:
    """The entry of one file, from what ``stat`` says of it."""
    return Entry(name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@dataclass(frozen=True, slots=True)
class Position:
    """How far training was: optimizer steps, epochs, tokens; None where it is not written."""

    step: int | None = None
    epoch: float | None = None
    tokens: int | None = None

    @property
    def number(self) -> float | None:
        """What checkpoints are ordered by: the step, else the epoch."""
        return self.step if self.step is not None else self.epoch


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A listing that a format claims. ``format`` is the format's module name, such as ``hf_dir``."""

    path: str
    format: str
    position: Position

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    @property
    def order(self) -> tuple[object, ...]:
        """Sort key: by step (or epoch), then by name with its numbers as numbers; what has no number comes first."""
        number = self.position.number
        return (number is not None, number or 0, natural_key(self.path))


class Format(Protocol):
    """The questions that a module in ``formats/`` answers; it is found by being there.

    ``missing`` and ``unmarked`` return a sentence, or None when all is well; that sentence is what ``assayer status`` shows.
    """

    @property
    def REFINES(self) -> Sequence[str]:
        """Names of wider formats that also claim these listings; this one wins over them."""

    def claims(self, listing: Listing) -> bool:
        """True when this is a checkpoint of this format, finished or not; by names alone."""

    def missing(self, listing: Listing) -> str | None:
        """Why the checkpoint cannot be whole yet; may open its files, never unpickles."""

    def unmarked(self, listing: Listing) -> str | None:
        """Why only time can tell that it is whole; None when its trainer leaves a sign that it has finished."""

    def position(self, listing: Listing) -> Position:
        """Step, epoch and tokens, from the name or from what the trainer wrote beside the weights."""

    def weights(self, listing: Listing) -> Sequence[str]:
        """Names of the files that hold the model's weights."""


def identity(listing: Listing, weights: Sequence[str]) -> str:
    """A digest of the weights' content (32 hexadecimal digits): a ``touch`` or a ``cp -a`` keeps it, one changed tensor does not.

    Raises:
        CheckpointError: a file is not whole.
        OSError: a file is gone or cannot be read.
    """
    parts = []
    for name in sorted(weights):
        # A single file keeps its identity when it is renamed; inside a directory the names tell the shards apart.
        parts += [name if listing.is_directory else "", fingerprint(listing.file(name))]
    return digest(*parts)
