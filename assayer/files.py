"""Files that are whole or absent, locks that end with their holder, digests, and names that are safe to show and to store."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from assayer.errors import StateError

__all__ = [
    "alone",
    "digest",
    "hold_folder_open",
    "is_locked",
    "is_open_as",
    "lock_file",
    "locked",
    "natural_key",
    "open_descriptor",
    "open_file",
    "printable",
    "private_directory",
    "private_folder",
    "read_json",
    "remove_left_over",
    "remove_unless_held",
    "short_name",
    "try_lock",
    "write_json",
    "write_whole",
]

# The longest file name that Linux file systems take, in bytes.
NAME_MAX = 255
# Bytes of a JSON file that are read: a plan whose baseline has half a million checkpoints.
JSON_MAX = 128 << 20

# Names under which ``write_whole`` writes.
_TEMPORARY = re.compile(r"(.+)\.tmp-[0-9a-f]{8}", re.DOTALL)


def write_whole(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Writes a file so that a reader, also after a crash, sees the old content, the new one, or no file.

    The temporary file lies beside it as ``<name>.tmp-<random>``; it is flushed to the disk before the rename, the folder after it. What a
    killed writer has left of it, the next writer of the same name removes.

    Raises:
        OSError: the folder does not exist, is read-only or full; the temporary file is removed.
    """
    name = short_name(path.name, room=24)
    remove_left_over(path.parent, name)
    temporary, descriptor = _open_temporary(path.parent, f"{name}.tmp-", mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def _open_temporary(folder: Path, start: str, mode: int) -> tuple[Path, int]:
    """A new file and its descriptor, locked for as long as this process writes it, where the file system has locks."""
    while True:
        path = folder / f"{start}{secrets.token_hex(4)}"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return path, descriptor
        # Another writer took it, not locked yet, for one that was left over.
        os.close(descriptor)


def remove_left_over(folder: Path, name: str | None = None) -> None:
    """Removes what killed writers have left in a folder: the temporary files (of this name, or of all) whose locks nobody holds."""
    try:
        found = [(file, _TEMPORARY.fullmatch(file)) for file in os.listdir(folder)]
    except OSError:
        # To write there will say what is wrong.
        return
    for file, match in found:
        if match and name in (None, match[1]):
            with contextlib.suppress(OSError):
                descriptor = os.open(folder / file, os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(folder / file)
                finally:
                    os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush a folder; the rename itself has been done.
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_json(path: Path, value: object, mode: int = 0o666) -> None:
    """Writes ``value`` as JSON, whole or not at all. Only ASCII is written, so that any file name survives the way back."""
    write_whole(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode(), mode)


def open_descriptor(path: str | Path, flags: int = 0) -> int:
    """A descriptor to read a regular file; anything else is refused at once: a named pipe would keep its reader waiting for ever.

    Raises:
        OSError: there is no such file, it cannot be read, or it is none; its ``strerror`` says which.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | flags)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    except OSError as error:
        # So the system says that it is a socket.
        if error.errno != errno.ENXIO:
            raise
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def open_file(path: Path, flags: int = 0) -> BinaryIO:
    """``open_descriptor`` as a file."""
    return os.fdopen(open_descriptor(path, flags), "rb")


def read_json(path: Path) -> Any:
    """The JSON value in ``path``, or None when there is no such file, or it is not JSON, or larger than any of ours (``JSON_MAX``)."""
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            return json.loads(file.read(size)) if size <= JSON_MAX else None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return None
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise


def private_directory(path: Path) -> Path:
    """Makes ``path`` where it is missing, for this user alone (mode 0700), and returns it.

    Raises:
        StateError: it cannot be made or closed to others, or it belongs to another user.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise StateError(f"cannot make the directory {printable(str(path))}: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise StateError(f"{printable(str(path))} is not a directory of this user; set XDG_STATE_HOME (or TMPDIR) to one that is")
    if status.st_mode & 0o077:
        # Made by another program, or opened later: what lies in it tells passwords, and who may write there gives orders to our workers.
        try:
            path.chmod(0o700)
        except OSError as error:
            raise StateError(
                f"cannot close {printable(str(path))} to other users ({error.strerror}); set XDG_STATE_HOME to a folder on a local disk"
            ) from None
    return path


def lock_file(path: Path) -> int:
    """An open descriptor of ``path`` (made when missing, mode 0600), for ``try_lock``; the caller closes it."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def try_lock(descriptor: int, path: Path) -> bool:
    """True when the lock of ``path`` is now held by this open file; it lasts until its last copy in any process is closed.

    Raises:
        StateError: the file system has no locks.
    """
    # Somebody who only looks (is_locked) holds a shared lock for an instant: hence a few tries.
    for _ in range(5):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.002)
        except OSError as error:
            raise _no_locks(path, error) from None
    return False


def _no_locks(path: Path, error: OSError) -> StateError:
    return StateError(f"{printable(str(path))} cannot be locked ({error.strerror}); set XDG_STATE_HOME to a folder on a local disk")


def is_locked(path: Path) -> bool:
    """True while some process holds the lock of ``path``; looking takes no lock that keeps another out for longer than an instant."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of ``path`` while the block runs; waits for it."""
    descriptor = lock_file(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise _no_locks(path, error) from None
        raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[int]:
    """Holds the lock of ``path`` (its open descriptor) while the block runs, and removes the file behind it; waits for it."""
    while True:
        descriptor = lock_file(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not is_open_as(descriptor, path):
                # Whoever had it has removed it.
                continue
            yield descriptor
            path.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)


def is_open_as(descriptor: int, path: Path) -> bool:
    """False when the file of this path was removed, and perhaps made anew, since it was opened."""
    try:
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def hold_folder_open(folder: Path) -> int:
    """An open descriptor of a folder that holds its lock, as long as it is open; what nobody holds was left behind."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    with contextlib.suppress(OSError):
        # Where a file system has no locks, nothing is swept either.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def remove_unless_held(folder: Path) -> None:
    """Removes a folder with all in it, unless a process of this host holds it open."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        # It is held, or its file system has no locks.
        pass
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def private_folder(name: str) -> Iterator[Path]:
    """A folder below ``assayer-<name>-<uid>`` of the temporary directory that only this user may enter, removed at the end; what processes
    that were killed have left there is removed, too."""
    root = private_directory(Path(tempfile.gettempdir()) / f"assayer-{name}-{os.getuid()}")
    with locked(root / "lock"):
        for left in root.iterdir():
            if left.is_dir() and not left.is_symlink():
                remove_unless_held(left)
        folder = tempfile.TemporaryDirectory(dir=root, ignore_cleanup_errors=True)
        descriptor = hold_folder_open(Path(folder.name))
    try:
        with folder:
            yield Path(folder.name)
    finally:
        os.close(descriptor)


def digest(*parts: str | bytes) -> str:
    """A name of 32 hexadecimal digits for these parts; two different lists of parts get two different names."""
    hashed = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        hashed.update(len(data).to_bytes(8, "little"))
        hashed.update(data)
    return hashed.hexdigest()


def short_name(name: str, room: int) -> str:
    """``name``, or, when it leaves less than ``room`` bytes for an ending, its start and a digest of the whole."""
    data = os.fsencode(name)
    if len(data) + room <= NAME_MAX:
        return name
    return data[: NAME_MAX - room - 17].decode(errors="ignore") + "~" + digest(name)[:16]


def printable(text: str) -> str:
    """``text`` on one line, without control or terminal sequences: what would move a cursor is shown as an escape."""
    return "".join(c if c == " " or unicodedata.category(c)[0] not in "CZ" else ascii(c)[1:-1] for c in text)


def natural_key(text: str) -> tuple[tuple[int, int | str], ...]:
    """A sort key that puts ``step9`` before ``step10``."""
    return tuple((0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", text) if part)
