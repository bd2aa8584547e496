"""The noun that is carried: a listing of names, the checkpoint that a format sees in it, and the identity of its weights."""

import os
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from assayer.content import fingerprint, incomplete, tells_save
from assayer.files import digest, natural_key
from assayer.tensors import Tensor

__all__ = [
    "Checkpoint",
    "Entry",
    "Format",
    "Found",
    "Listing",
    "Position",
    "count_of",
    "entry_of",
    "first_absent",
    "first_incomplete",
    "identity",
    "is_called_after_one",
    "list_files",
    "list_path",
    "needed",
    "numbers_called_after",
]

# A folder's name that tells which checkpoint lies in it.
_AFTER_ONE = re.compile(r"(?:step|iter|iteration|checkpoint|epoch)[=_-]?(\d+)", re.IGNORECASE)


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
    """What lies at ``path`` (absolute), without any file being opened: a file's one entry, or the files of a directory.

    Files of folders directly inside it are there too, as ``folder/name``: those of every folder that some format knows, and, once the
    checkpoint's format is known, of that format's folders alone (``within``).
    """

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

    def entry(self, name: str) -> Entry | None:
        """The entry of this name, if it is there."""
        return next((e for e in self.entries if e.name == name), None)

    def within(self, folders: str) -> "Listing":
        """Only the direct files, and those of the folders that this regular expression matches."""
        kept = tuple(e for e in self.entries if "/" not in e.name or re.fullmatch(folders, e.name.partition("/")[0]))
        return self if len(kept) == len(self.entries) else Listing(self.path, self.is_directory, kept)

    def in_folder(self, folder: str) -> frozenset[str]:
        """The names in one folder of it ("" for itself), without the folder's own."""
        prefix = f"{folder}/" if folder else ""
        return frozenset(
            e.name.removeprefix(prefix) for e in self.entries if e.name.startswith(prefix) and "/" not in e.name[len(prefix) :]
        )

    def folders(self, pattern: str) -> list[str]:
        """The folders with files that this regular expression matches, in natural order."""
        found = {e.name.partition("/")[0] for e in self.entries if "/" in e.name}
        return sorted((name for name in found if re.fullmatch(pattern, name)), key=natural_key)

    def signature(self) -> str:
        """A digest of names, sizes, times and inodes. Another one tells that something may have changed, never that it did."""
        return digest(*(f"{e.name}\0{e.size}\0{e.mtime_ns}\0{e.inode}" for e in sorted(self.entries, key=lambda e: e.name)))


def list_path(path: str, folders: str = "") -> Listing:
    """The listing of one path as it is now, with the files of those folders (a regular expression) in it; symbolic links are left out.

    Raises:
        OSError: it is gone or cannot be read.
    """
    status = os.stat(path)
    if not stat.S_ISDIR(status.st_mode):
        return Listing(path, False, (entry_of(os.path.basename(path), status),))
    entries, inside = list_files(path)
    for name in inside:
        if re.fullmatch(folders, name):
            entries += list_files(os.path.join(path, name), f"{name}/")[0]
    return Listing(path, True, tuple(entries))


def list_files(path: str, prefix: str = "") -> tuple[list[Entry], list[str]]:
    """The regular files directly in a directory (their names behind ``prefix``), and the names of the directories in it, both sorted.

    Raises:
        OSError: it is gone or cannot be read.
    """
    files, folders = [], []
    with os.scandir(path) as entries:
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if stat.S_ISREG(status.st_mode):
                files.append(entry_of(prefix + entry.name, status))
            elif stat.S_ISDIR(status.st_mode):
                folders.append(entry.name)
    return sorted(files, key=lambda e: e.name), sorted(folders)


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


def numbers_called_after(folder: str) -> set[int]:
    """The steps or epochs that a folder of this name is called after: ``{500}`` for ``global_step_500``; empty for that of a run."""
    return {int(number) for number in _AFTER_ONE.findall(folder)}


def is_called_after_one(folder: str) -> bool:
    """True when a folder's name is that of one checkpoint and nothing else, such as ``step_500`` or ``global_step500``."""
    return re.fullmatch(f"(?:global[_-]?)?{_AFTER_ONE.pattern}", folder, re.IGNORECASE) is not None


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


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint and the listing in which it was seen."""

    checkpoint: Checkpoint
    listing: Listing


class Format(Protocol):
    """The questions that a module in ``formats/`` answers; it is found by being there.

    ``missing`` and ``unmarked`` return a sentence, or None when all is well; that sentence is what ``assayer status`` shows.
    """

    @property
    def REFINES(self) -> Sequence[str]:
        """Names of wider formats that also claim these listings; this one wins over them."""

    @property
    def FOLDERS(self) -> str:
        """A regular expression of the folders inside it that belong to it; no other checkpoint is looked for in those."""

    @property
    def RESUMING(self) -> str:
        """A regular expression of the files in it by which training goes on, and no evaluation: optimizer, scheduler, random states."""

    @property
    def SHARDED(self) -> bool:
        """True when no library loads it as it lies there: an evaluator gets it merged."""

    def claims(self, listing: Listing) -> bool:
        """True when this is a checkpoint of this format, finished or not; by names alone."""

    def missing(self, listing: Listing) -> str | None:
        """Why the checkpoint cannot be whole yet; may open its files, never unpickles."""

    def unmarked(self, listing: Listing) -> str | None:
        """Why only time can tell that it is whole; None when its trainer leaves a sign that it has finished."""

    def position(self, listing: Listing) -> Position:
        """Step, epoch and tokens, from the name or from what the trainer wrote beside the weights."""

    def weights(self, listing: Listing) -> Sequence[str]:
        """Names of the files that hold the model's weights, of every variant: what an evaluation needs, and the identity is read from."""

    def variants(self, listing: Listing) -> Sequence[str]:
        """Which weights it holds: ``regular``, and ``ema`` where a moving average lies beside them."""

    def tensors(self, listing: Listing, variant: str) -> list[Tensor]:
        """The model's tensors with the pieces of their bytes, by names without container; nothing is unpickled or read whole.

        Raises:
            CheckpointError: the files contradict each other, or hold what cannot be merged.
            OSError: a file is gone or cannot be read.
        """


def needed(listing: Listing, form: Format) -> list[str]:
    """Names of the files that an evaluation needs: the weights, and what stands around them, such as a config and a tokenizer."""
    kept = set(form.weights(listing))
    return sorted(name for name in listing.names if name in kept or not (form.RESUMING and re.fullmatch(form.RESUMING, name)))


def identity(listing: Listing, weights: Sequence[str]) -> str:
    """A digest of the weights' content (32 hexadecimal digits): a ``touch`` or a ``cp -a`` keeps it, one changed tensor does not.

    Raises:
        CheckpointError: a file is not whole.
        OSError: a file is gone or cannot be read.
    """
    # Where its metadata tells one save from the next, a look at each shard's end is enough.
    sampled = any(name.endswith(".metadata") and tells_save(listing.file(name)) for name in weights)
    parts = []
    for name in sorted(weights):
        # A single file keeps its identity when it is renamed; inside a directory the names tell the shards apart.
        parts += [name if listing.is_directory else "", fingerprint(listing.file(name), sampled)]
    return digest(*parts)


def first_incomplete(listing: Listing, names: Iterable[str]) -> str | None:
    """Why the first of these files that is not whole is not; None when all are.

    Raises:
        OSError: one is gone or cannot be read.
    """
    for name in names:
        problem = incomplete(listing.file(name))
        if problem:
            return f"{name} {problem}"
    return None


def count_of(value: object) -> int | None:
    """``value`` where it is a count; what a damaged or hostile file holds in its place is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**18 else None


def first_absent(numbers: Iterable[int], count: int | None = None) -> int | None:
    """The smallest number from 0 on that is not there; None when all below the largest (or below ``count``) are."""
    expected = 0
    for number in sorted(set(numbers)):
        if number != expected:
            return expected
        expected += 1
    return expected if count is not None and expected < count else None
