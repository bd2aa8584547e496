"""What a training keeps from its own rotation until it has been evaluated: ``evals/.hold/<key>/<name of the checkpoint>``.

Second names, as a watch's or a server's hold has them (``worker/hold.py``), but given inside a training: by the names of files alone. No
file is opened, no process started, and whether the checkpoint is whole is left to whoever evaluates it. ``kept.json`` beside them says
of what they are. Whoever has evaluated it takes it away, else the training; what both have left is swept after a month.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from assayer import formats, second_names
from assayer.checkpoint import Listing, list_path
from assayer.files import read_json, write_json
from assayer.record import hold_folder, hold_key

__all__ = ["Kept", "at", "is_stale", "left_by", "of_checkpoint"]

_FACTS = "kept.json"
# What such a folder's name begins with: that of a hold has no more than what follows.
_START = "client"
# Seconds after which nobody comes back for it.
_STALE = 30 * 86400


@dataclass(frozen=True)
class Kept:
    """A checkpoint (its first path, absolute), and where its second one is; ``owner`` is the file of those whose it is."""

    folder: Path
    checkpoint: str
    owner: str

    @classmethod
    def of(cls, checkpoint: str, owner: str, key: str) -> "Kept":
        """Where a checkpoint is kept for one evaluation, told by its key."""
        return cls(hold_folder(Path(checkpoint)) / f"{_START}{hold_key(owner, key)}", checkpoint, owner)

    @property
    def path(self) -> str:
        """The second name; its last part is the checkpoint's own."""
        return str(self.folder / os.path.basename(self.checkpoint))

    @property
    def is_there(self) -> bool:
        return (self.folder / _FACTS).exists()

    @property
    def is_the_same(self) -> bool:
        """True while what lies at the first path are the files that are kept, perhaps with others beside them, or written over in place."""
        try:
            return self._is_of(list_path(self.checkpoint, formats.all_folders()))
        except OSError:
            return False

    def _is_of(self, listing: Listing) -> bool:
        """True when no file of this listing of the first path is another one under its second name."""
        before = {entry.name: entry.inode for entry in list_path(self.path, formats.all_folders()).entries}
        return all(before.get(entry.name, entry.inode) == entry.inode for entry in listing.entries)

    def keep(self) -> bool:
        """Gives the files second names that are there now, and have none; True when the checkpoint is kept.

        False where nothing is there, or nothing that a format knows. What was saved anew is another checkpoint, and adds nothing to this.

        Raises:
            OSError: the file system refuses hard links (see ``second_names.is_refusal``), or has no room.
        """
        try:
            listing = list_path(self.checkpoint, formats.all_folders())
            name = formats.claiming(listing)
            if name is None:
                return self.is_there
            form = formats.all_formats()[name]
            listing = listing.within(form.FOLDERS)
            if self.is_there:
                if self._is_of(listing):
                    second_names.add(listing, form, Path(self.path))
                os.utime(self.folder / _FACTS)
                return True
            with second_names.made_aside(self.folder) as part:
                second_names.add(listing, form, part / os.path.basename(self.checkpoint))
                write_json(part / _FACTS, {"checkpoint": self.checkpoint, "owner": self.owner})
                second_names.name_of(part, self.folder)
            return True
        except FileNotFoundError:
            return self.is_there

    def release(self) -> None:
        """Takes the second names away."""
        second_names.remove(self.folder)


def at(path: str) -> Kept | None:
    """What is kept under this path; None where it is any other path."""
    folder = Path(path).parent
    found = _read(folder)
    return found if found and found.path == path else None


def left_by(owner: str, folder: Path) -> list[Kept]:
    """All that is kept in a ``.hold`` folder for this owner."""
    return [kept for kept in _all_in(folder) if kept.owner == owner]


def of_checkpoint(checkpoint: str) -> list[Kept]:
    """All that is kept of one checkpoint, by its first path."""
    return [kept for kept in _all_in(hold_folder(Path(checkpoint))) if kept.checkpoint == checkpoint]


def _all_in(folder: Path) -> list[Kept]:
    try:
        return [kept for one in sorted(folder.iterdir()) if (kept := _read(one))]
    except OSError:
        return []


def is_stale(folder: Path) -> bool:
    """True for a folder in which something is kept that nobody has asked for during a month."""
    try:
        return folder.name.startswith(_START) and time.time() - (folder / _FACTS).stat().st_mtime > _STALE
    except OSError:
        return False


def _read(folder: Path) -> Kept | None:
    if not folder.name.startswith(_START):
        return None
    try:
        facts = read_json(folder / _FACTS)
        kept = Kept(folder, str(facts["checkpoint"]), str(facts["owner"]))
        # It speaks for checkpoints of its own directory alone.
        is_its_own = os.path.realpath(hold_folder(Path(kept.checkpoint))) == os.path.realpath(folder.parent)
    except (OSError, TypeError, KeyError, ValueError):
        return None
    return kept if is_its_own else None
