"""What a training keeps from its own rotation until it has been evaluated: ``evals/.hold/<key>/<name of the checkpoint>``.

Second names, as a watch's or a server's hold has them (``worker/hold.py``), but given inside a training: by the names of files alone. No
file is opened, no process started, and whether the checkpoint is whole is left to whoever evaluates it. ``kept.json`` beside them says
of what they are. Whoever has evaluated it takes it away, else the training; what both have left is swept after a month.
"""

import contextlib
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from assayer import formats, second_names
from assayer.checkpoint import Format, Listing, list_path
from assayer.files import read_json, write_json
from assayer.record import hold_folder, hold_key

__all__ = ["Kept", "at", "is_checkpoint", "left_by", "of_checkpoint", "sweep"]

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
        """True while what lies at the first path are the weights that are kept, perhaps with more beside them, or written over in place."""
        try:
            listing = list_path(self.checkpoint, formats.all_folders())
            name = formats.claiming(listing)
            return name is not None and self._is_of(listing, formats.all_formats()[name])
        except OSError:
            return False

    def _is_of(self, listing: Listing, form: Format) -> bool:
        """True when no file of weights in this listing of the first path is another one under its second name."""
        before, weights = self._inodes(), set(form.weights(listing))
        return all(before.get(entry.name, entry.inode) == entry.inode for entry in listing.entries if entry.name in weights)

    def _inodes(self) -> dict[str, int]:
        return {entry.name: entry.inode for entry in list_path(self.path, formats.all_folders()).entries}

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
                if self._is_of(listing, form):
                    self._add(listing, form)
                os.utime(self.folder / _FACTS)
                return True
            with second_names.made_aside(self.folder) as part:
                second_names.add(listing, form, part / os.path.basename(self.checkpoint))
                write_json(part / _FACTS, {"checkpoint": self.checkpoint, "owner": self.owner})
                second_names.name_of(part, self.folder)
            return True
        except FileNotFoundError:
            return self.is_there

    def _add(self, listing: Listing, form: Format) -> None:
        """What has come since, and what was replaced beside the weights, such as a config."""
        before = self._inodes()
        for entry in listing.entries:
            if listing.is_directory and before.get(entry.name, entry.inode) != entry.inode:
                Path(self.path, entry.name).unlink(missing_ok=True)
        second_names.add(listing, form, Path(self.path))

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


def is_checkpoint(path: str) -> bool:
    """True when a format knows what lies at this path, whole or not; by names alone."""
    try:
        return formats.claiming(list_path(path, formats.all_folders())) is not None
    except (OSError, ValueError):
        return False


def sweep(root: Path) -> None:
    """Removes from a ``.hold`` folder what killed processes left half made or half removed, and what nobody asked for during a month."""
    with contextlib.suppress(OSError):
        for folder in sorted(root.iterdir()):
            if folder.name.startswith(".") and second_names.is_left(folder):
                shutil.rmtree(folder, ignore_errors=True)
            elif _is_stale(folder):
                second_names.remove(folder)


def _is_stale(folder: Path) -> bool:
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
