"""Second names for what waits, so that a trainer's retention cannot take it: ``evals/.hold/<key>/<name of the checkpoint>``.

A hard link costs no bytes until the first name is deleted, and outlives that. It does not protect from a file that is opened and written
again: the evaluation compares identities before and after. ``hold.json`` beside the links is written last and says what they hold, so that
nothing in Redis is needed to find out; ``claim`` is made by whoever comes first: an evaluation that begins to read, or a watch that takes
the hold away because newer checkpoints need its place.
"""

import logging
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from assayer import formats, second_names
from assayer.checkpoint import Checkpoint, Found, Listing, Position, list_path, needed
from assayer.files import printable, read_json, write_json
from assayer.kept import sweep
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
    "held_in",
    "is_read",
    "release",
    "size_of",
    "take",
]

logger = logging.getLogger(__name__)

_FACTS = "hold.json"
# A symbolic link, because it is made with its content in one step.
_CLAIM, _READ, _DROPPED = "claim", "evaluation", "watch"
# Seconds for which an evaluation on another host is believed to read.
_READ_MAX = 2 * 86400


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
        OSError: the file system refuses hard links (see ``second_names.is_refusal``), or has no room.
    """
    present = find(found.checkpoint.path, identity, results_dir)
    if present:
        return present
    listing, form = found.listing, formats.of(found.checkpoint)
    folder = hold_folder(Path(found.checkpoint.path), results_dir) / hold_key(found.checkpoint.path, identity)
    held = Held(folder, found.checkpoint, identity, signature, tuple(variants), size_of(found))
    try:
        with second_names.made_aside(folder) as part:
            second_names.add(listing, form, part / found.checkpoint.name)
            if list_path(found.checkpoint.path, form.FOLDERS).signature() != signature:
                return None
            write_json(part / _FACTS, asdict(held) | {"folder": None})
            second_names.name_of(part, folder)
    except FileNotFoundError:
        return None
    return _read(folder)


def find(checkpoint: str, identity: str, results_dir: str | None = None) -> Held | None:
    """The hold of these weights, if there is one."""
    return _read(hold_folder(Path(checkpoint), results_dir) / hold_key(checkpoint, identity))


def held_in(root: Path) -> list[Held]:
    """Everything that is held in a ``.hold`` folder; what a killed process left half made there is removed.

    A hold that cannot be read stays: it may be another version's, another user's, or of a watch that knows this folder by another path.
    """
    sweep(root)
    try:
        folders = sorted(root.iterdir())
    except OSError:
        return []
    found = [held for folder in folders if not folder.name.startswith(".") and (held := _read(folder))]
    if not found:
        second_names.tidy(root)
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
    if second_names.remove(held.folder):
        logger.info("released the hold of %s", printable(held.checkpoint.name))


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
