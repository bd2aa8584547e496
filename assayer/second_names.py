"""Second names for a checkpoint's model files, in a folder that stands whole or not at all: what a trainer deletes is still there.

A hard link costs no bytes until the first name is deleted, and outlives that. Holds of watches and servers (``worker/hold.py``) are made of
them, and what a training keeps for itself (``kept.py``); both lie side by side in one ``.hold`` folder.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from assayer.checkpoint import Format, Listing, needed

__all__ = ["add", "free_part", "is_left", "is_refusal", "made_aside", "name_of", "remove", "tidy"]

# Of what no format knows, how deep it is looked for, and what by its name only resumes a training.
_DEPTH_MAX = 3
_RESUMING = re.compile(
    r"(bf16_)?(zero_pp_rank|optim|sched|lr_sched|scaler|sampler|rng|random_states|global_step|dataloader|extra_state)", re.IGNORECASE
)
# What the name of a folder that is being removed begins with.
_GONE = ".gone-"
# What a file system, or its rules, answer where a hard link cannot be made at all.
_REFUSALS = frozenset({errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EROFS, errno.EMLINK})


def is_refusal(error: OSError) -> bool:
    """True when hard links cannot be made here at all, now or later."""
    return error.errno in _REFUSALS


@contextlib.contextmanager
def made_aside(folder: Path) -> Iterator[Path]:
    """A folder beside this one, in which it is made; it is locked, so that nobody takes it for left over. ``name_of`` gives it its name.

    Raises:
        FileNotFoundError: what lies above ``.hold`` and the folder of results is away; it is not made anew.
    """
    root = folder.parent
    part = root / f".{folder.name}-{secrets.token_hex(4)}"
    lock = None
    try:
        for one in (root.parent, root, part):
            one.mkdir(exist_ok=one != part)
        lock = _locked(part)
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        tidy(root)


def name_of(part: Path, folder: Path) -> None:
    """Gives what was made aside its name; where somebody else was faster, theirs stays."""
    try:
        os.rename(part, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def add(listing: Listing, form: Format, target: Path) -> None:
    """Gives the files of a checkpoint that an evaluation needs second names at ``target``; those that are there stay.

    Raises:
        FileNotFoundError: one is gone.
        OSError: the file system refuses hard links (see ``is_refusal``), or has no room.
    """
    for name in needed(listing, form):
        _link(listing.file(name), target / name if listing.is_directory else target)
    if listing.is_directory:
        _add_the_rest(Path(listing.path), target, form.FOLDERS)


def _link(first: Path, second: Path) -> None:
    second.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        # A path that is a link itself, such as ``last.ckpt``, may lead elsewhere tomorrow.
        os.link(os.path.realpath(first) if first.is_symlink() else first, second, follow_symlinks=False)


def _add_the_rest(source: Path, target: Path, folders: str) -> None:
    """Gives second names to what an evaluation may look for beside the weights: links, and folders that are no part of the format.

    A link to a tokenizer, a folder of a processor: what loads from the checkpoint loads from its second name, too.
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
                with contextlib.suppress(FileExistsError):
                    os.symlink(os.path.realpath(first), second)
            elif depth and name in names and not _RESUMING.match(name) and stat.S_ISREG(first.lstat().st_mode):
                _link(first, second)


def remove(folder: Path) -> bool:
    """Takes a folder of second names away, at once for whoever looks for it; only second names are deleted. False when it was not there."""
    gone = folder.with_name(f"{_GONE}{folder.name}-{secrets.token_hex(4)}")
    try:
        os.rename(folder, gone)
    except OSError:
        return False
    shutil.rmtree(gone, ignore_errors=True)
    tidy(folder.parent)
    return True


def tidy(root: Path) -> None:
    """Removes the ``.hold`` folder when it is empty."""
    with contextlib.suppress(OSError):
        root.rmdir()


def is_left(folder: Path) -> bool:
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


def _locked(folder: Path) -> int | None:
    """A descriptor that keeps a lock of this folder until it is closed; None where somebody else has it, or the file system has none."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def free_part(path: str) -> float:
    """The part of the file system that an unprivileged user may still fill; 1 where that cannot be told."""
    try:
        told = os.statvfs(path)
    except OSError:
        return 1.0
    return told.f_bavail / told.f_blocks if told.f_blocks else 1.0
