"""Second names for what waits, so that a trainer's retention cannot take it: ``evals/.hold/<key>/<name of the checkpoint>``.

A hard link costs no bytes until the first name is deleted, and outlives that. It does not protect from a file that is opened and written
again: the evaluation compares identities before and after. ``hold.json`` beside the links is written last and says what they hold, so that
nothing in Redis is needed to find out; ``claim`` is made by whoever comes first: an evaluation that begins to read, or a watch that takes
the hold away because newer checkpoints need its place.
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from assayer import formats
from assayer.checkpoint import Checkpoint, Found, Listing, Position, list_path, needed
from assayer.files import printable, read_json, write_json
from assayer.plan import host_name
from assayer.queues.recover import is_gone
from assayer.record import hold_folder, hold_key

__all__ = [
    "Bounds",
    "Held",
    "chosen",
    "claim",
    "drop",
    "find",
    "free_part",
    "held_in",
    "is_read",
    "is_refusal",
    "release",
    "size_of",
    "take",
]

logger = logging.getLogger(__name__)

_FACTS = "hold.json"
# Of what no format knows, how deep it is looked for, and what by its name only resumes a training.
_DEPTH_MAX = 3
_RESUMING = re.compile(
    r"(bf16_)?(zero_pp_rank|optim|sched|lr_sched|scaler|sampler|rng|random_states|global_step|dataloader|extra_state)", re.IGNORECASE
)
# A symbolic link, because it is made with its content in one step.
_CLAIM, _READ, _DROPPED = "claim", "evaluation", "watch"
# Seconds for which an evaluation on another host is believed to read.
_READ_MAX = 2 * 86400
# What the name of a hold that is being removed begins with.
_GONE = ".gone-"
# What a file system, or its rules, answer where a hard link cannot be made at all.
_REFUSALS = frozenset({errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EROFS, errno.EMLINK})


@dataclass(frozen=True)
class Bounds:
    """How much may be held of one directory's checkpoints: so many, so many bytes (None: any), while this part of the disk is free."""

    count: int = 8
    nbytes: int | None = None
    min_free: float = 0.1


@dataclass(frozen=True)
class Held:
    """One checkpoint under its second name. ``path`` is that name, ``checkpoint`` tells the first one; ``nbytes`` of its files."""

    folder: Path
    checkpoint: Checkpoint
    identity: str
    signature: str
    variants: tuple[str, ...]
    nbytes: int
    is_claimed: bool = False

    @property
    def key(self) -> str:
        return self.folder.name

    @property
    def path(self) -> str:
        return str(self.folder / self.checkpoint.name)

    def listing(self) -> Listing:
        """The listing of what is held.

        Raises:
            OSError: it is gone or cannot be read.
        """
        return list_path(self.path, formats.of(self.checkpoint).FOLDERS)


def size_of(found: Found) -> int:
    """Bytes of the files that a hold of this checkpoint links."""
    names = set(needed(found.listing, formats.of(found.checkpoint)))
    return sum(entry.size for entry in found.listing.entries if entry.name in names)


def take(found: Found, identity: str, signature: str, variants: Sequence[str], results_dir: str | None = None) -> Held | None:
    """Gives the model files of a checkpoint a second name; None when it has changed, or gone, since ``signature`` was read.

    Raises:
        OSError: the file system refuses hard links (see ``is_refusal``), or has no room.
    """
    present = find(found.checkpoint.path, identity, results_dir)
    if present:
        return present
    listing, form = found.listing, formats.of(found.checkpoint)
    root = hold_folder(Path(found.checkpoint.path), results_dir)
    key = hold_key(found.checkpoint.path, identity)
    part = root / f".{key}-{secrets.token_hex(4)}"
    held = Held(root / key, found.checkpoint, identity, signature, tuple(variants), size_of(found))
    lock = None
    try:
        # Not what lies above: a directory that is away is not made anew.
        for folder in (root.parent, root, part):
            folder.mkdir(exist_ok=folder != part)
        lock = _locked(part)
        target = part / found.checkpoint.name
        for name in needed(listing, form):
            second = target / name if listing.is_directory else target
            second.parent.mkdir(parents=True, exist_ok=True)
            os.link(listing.file(name), second, follow_symlinks=False)
        if listing.is_directory:
            _add_the_rest(Path(listing.path), target, form.FOLDERS)
        if list_path(found.checkpoint.path, form.FOLDERS).signature() != signature:
            return None
        write_json(part / _FACTS, asdict(held) | {"folder": None})
        with contextlib.suppress(FileExistsError):
            # Where somebody else was faster, theirs stays.
            os.rename(part, held.folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        _tidy(root)
    return _read(held.folder)


def _add_the_rest(source: Path, target: Path, folders: str) -> None:
    """Gives second names to what an evaluation may look for beside the weights: links, and folders that are no part of the format.

    A link to a tokenizer, a folder of a processor: what loads from the checkpoint loads from its hold, too.
    """
    for folder, below, names in os.walk(source):
        inside = Path(folder).relative_to(source)
        depth = len(inside.parts)
        below[:] = [
            name for name in below if depth < _DEPTH_MAX and not _RESUMING.match(name) and not (depth == 0 and re.fullmatch(folders, name))
        ]
        for name in [*names, *below]:
            second, first = target / inside / name, Path(folder, name)
            if first.is_symlink() and first.exists():
                second.parent.mkdir(parents=True, exist_ok=True)
                os.symlink(os.path.realpath(first), second)
            elif depth and name in names and not _RESUMING.match(name) and stat.S_ISREG(first.lstat().st_mode):
                second.parent.mkdir(parents=True, exist_ok=True)
                os.link(first, second, follow_symlinks=False)


def is_refusal(error: OSError) -> bool:
    """True when hard links cannot be made here at all, now or later."""
    return error.errno in _REFUSALS


def find(checkpoint: str, identity: str, results_dir: str | None = None) -> Held | None:
    """The hold of these weights, if there is one."""
    return _read(hold_folder(Path(checkpoint), results_dir) / hold_key(checkpoint, identity))


def held_in(root: Path) -> list[Held]:
    """Everything that is held in a ``.hold`` folder; what a killed process left half made there is removed.

    A hold that cannot be read stays: it may be another version's, another user's, or of a watch that knows this folder by another path.
    """
    found = []
    try:
        folders = sorted(root.iterdir())
    except OSError:
        return []
    for folder in folders:
        held = None if folder.name.startswith(".") else _read(folder)
        if held:
            found.append(held)
        elif folder.name.startswith(".") and _is_left(folder):
            shutil.rmtree(folder, ignore_errors=True)
    if not found:
        _tidy(root)
    return found


def claim(held: Held) -> bool:
    """Keeps a hold for an evaluation that begins to read it; False when it has been, or is being, taken away."""
    try:
        os.symlink(f"{_READ}@{host_name()}@{os.getpid()}", held.folder / _CLAIM)
    except FileExistsError:
        # By another evaluation of the same checkpoint, or by ``drop``.
        return _is_claimed(held.folder)
    except OSError:
        return False
    return True


def drop(held: Held) -> bool:
    """Takes a hold away unless an evaluation has claimed it; True when it is gone."""
    try:
        os.symlink(_DROPPED, held.folder / _CLAIM)
    except FileExistsError:
        return False
    except OSError:
        pass
    release(held)
    return True


def is_read(held: Held) -> bool:
    """True while the evaluation that has claimed a hold may live: its process on this host does; of another host's, for two days."""
    try:
        claim_file = held.folder / _CLAIM
        _, host, pid = os.readlink(claim_file).split("@")
        if host == host_name():
            return not is_gone(int(pid))
        return time.time() - claim_file.lstat().st_mtime < _READ_MAX
    except (OSError, ValueError):
        return False


def _is_claimed(folder: Path) -> bool:
    try:
        return os.readlink(folder / _CLAIM).partition("@")[0] == _READ
    except OSError:
        return False


def release(held: Held) -> None:
    """Takes a hold away; only second names are deleted."""
    gone = held.folder.with_name(f"{_GONE}{held.key}-{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):
        os.rename(held.folder, gone)
        shutil.rmtree(gone, ignore_errors=True)
        logger.info("released the hold of %s", printable(held.checkpoint.name))
    _tidy(held.folder.parent)


def chosen(waiting: Sequence[tuple[str, int]], claimed: Iterable[tuple[str, int]], bounds: Bounds) -> set[str]:
    """Which of the waiting are to be held: as many of the newest as the bounds allow beside those that are read. Pure.

    Args:
        waiting: key and bytes of each, the newest first.
        claimed: key and bytes of those that evaluations read.
        bounds: of the directory.
    """
    kept = dict(claimed)
    for key, nbytes in waiting:
        if key in kept:
            continue
        if len(kept) >= bounds.count or (bounds.nbytes is not None and sum(kept.values()) + nbytes > bounds.nbytes):
            break
        kept[key] = nbytes
    return set(kept)


def _read(folder: Path) -> Held | None:
    try:
        facts = read_json(folder / _FACTS)
        checkpoint = facts["checkpoint"]
        known = Checkpoint(str(checkpoint["path"]), str(checkpoint["format"]), Position(**checkpoint["position"]))
        # A hold speaks for checkpoints of its own directory alone.
        path, elsewhere = Path(known.path), str(folder.parent.parent.parent)
        is_its_own = folder.parent in (hold_folder(path), hold_folder(path, elsewhere)) and folder.name == hold_key(
            known.path, facts["identity"]
        )
        if not is_its_own or known.format not in formats.all_formats():
            return None
        return Held(
            folder,
            known,
            str(facts["identity"]),
            str(facts["signature"]),
            tuple(map(str, facts["variants"])),
            int(facts["nbytes"]),
            _is_claimed(folder),
        )
    except (OSError, TypeError, KeyError, ValueError, AttributeError):
        return None


def _locked(folder: Path) -> int | None:
    """A descriptor that keeps a lock of this folder until it is closed; None where somebody else has it, or the file system has none."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _is_left(folder: Path) -> bool:
    """True for what is half removed, and for what was half made by somebody who is gone: without locks, such as that of another host's,
    a minute tells."""
    if folder.name.startswith(_GONE):
        return True
    with contextlib.suppress(OSError):
        descriptor = _locked(folder)
        if descriptor is not None:
            os.close(descriptor)
        return time.time() - folder.stat().st_mtime > (60 if descriptor is None else 2)
    return False


def _tidy(root: Path) -> None:
    """Removes the folder of all holds when it is empty."""
    with contextlib.suppress(OSError):
        root.rmdir()


def free_part(path: str) -> float:
    """The part of the file system that an unprivileged user may still fill; 1 where that cannot be told."""
    try:
        told = os.statvfs(path)
    except OSError:
        return 1.0
    return told.f_bavail / told.f_blocks if told.f_blocks else 1.0
