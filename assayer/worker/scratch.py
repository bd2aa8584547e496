"""Merged checkpoints on this host, each made once, lent to every evaluation that needs it, and removed behind the last.

``<scratch_dir>/assayer-scratch-<user>/<key>/<name of the checkpoint>/``: the key stands for the weights and for how they are merged. Beside
the directory, ``merged.json`` says what the merge came to, and that it is complete; beside the key, ``<key>.lock`` is held alone by who
merges and shared by who reads, so that it ends with its holder, and ``<key>.bytes`` is what the merge takes of the budget. Who else needs
a merge is told by a set in Redis: the jobs that were queued for it.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from assayer.errors import StateError, UsageError
from assayer.files import is_locked, is_open_as, lock_file, locked, printable, private_directory, read_json, write_json

__all__ = ["Scratch"]

# Seconds between two looks for room that other evaluations hold.
_PAUSE = 0.5
_FACTS = "merged.json"


class Scratch:
    """One user's merged checkpoints below ``directory`` (default: the temporary directory), at most ``budget`` bytes of them."""

    def __init__(self, directory: str | None, budget: int | None, is_wanted: Callable[[str], bool]) -> None:
        """
        Args:
            directory: None stands for ``$TMPDIR``.
            budget: bytes; None for as much as the file system holds.
            is_wanted: whether some job still needs the merge of this key.
        """
        root = Path(directory or tempfile.gettempdir())
        if not root.is_dir():
            raise StateError(f"the scratch directory {printable(str(root))} is not there; waiting for it")
        self.root = private_directory(root / f"assayer-scratch-{os.getuid()}")
        self.budget = budget
        self._is_wanted = is_wanted

    @contextlib.contextmanager
    def lend(self, key: str, name: str, make: Callable[[Path], dict[str, Any]]) -> Iterator[tuple[Path, dict[str, Any], bool]]:
        """The merged directory for as long as the block runs, what ``make`` said of it, and whether it was made now.

        Any number of evaluations read it side by side; one makes it, and the others wait for that alone.

        Args:
            key: of the merge, letters and digits.
            name: of the directory.
            make: merges into the path that it is given; calls ``reserve`` before it writes.

        Raises:
            Whatever ``make`` raises; then nothing of it is left.
        """
        self.sweep(spare=key)
        path = self.root / key / name
        descriptor, made = self._hold(key, path, make)
        try:
            facts: dict[str, Any] = read_json(path.parent / _FACTS)
            yield path, facts, made
        finally:
            os.close(descriptor)

    def release(self, key: str) -> None:
        """Removes a merge that no job needs any more, unless somebody reads it."""
        if not self._is_wanted(key):
            self._remove(key)

    def sweep(self, spare: str = "") -> None:
        """Removes what nobody reads and no job waits for, such as the merges of workers that were killed."""
        for entry in list(self.root.iterdir()):
            key = entry.name.partition(".")[0]
            if key not in (spare, "lock") and not is_locked(self._lock(key)) and not self._is_wanted(key):
                self._remove(key)

    def _hold(self, key: str, path: Path, make: Callable[[Path], dict[str, Any]]) -> tuple[int, bool]:
        """A shared lock on what is there, or was made now."""
        lock, made = self._lock(key), False
        while True:
            descriptor = lock_file(lock)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                if not is_open_as(descriptor, lock):
                    os.close(descriptor)
                    continue
                if _is_complete(path):
                    return descriptor, made
                # The lock may pass to another in between: whoever gets it alone looks again.
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if is_open_as(descriptor, lock) and not _is_complete(path):
                    self._make(key, path, make)
                    made = True
                os.close(descriptor)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
                raise

    def _make(self, key: str, path: Path, make: Callable[[Path], dict[str, Any]]) -> None:
        """Merges, while the key's lock is held alone."""
        self._clear(key, reserved=False)
        try:
            path.parent.mkdir(mode=0o700)
            write_json(path.parent / _FACTS, {**make(path), "boot": _boot()})
        except BaseException:
            self._clear(key)
            with contextlib.suppress(OSError):
                self._lock(key).unlink()
            raise

    def reserve(self, key: str, wanted: int) -> bool:
        """Takes so many bytes of the budget for a merge; False while others that are read take them. What is not read makes room.

        Raises:
            UsageError: the budget is smaller than what is wanted; both numbers are named.
        """
        if self.budget is not None and wanted > self.budget:
            raise UsageError(f"the merge takes {wanted} bytes, --scratch_bytes allows {self.budget}; give more, with --retry_failed")
        with locked(self.root / "lock"):
            if self.budget is None or self._used(key) + wanted <= self.budget or self._evicted(key, wanted, self.budget):
                (self.root / f"{key}.bytes").write_text(str(wanted))
                return True
        return False

    def wait_for_room(self, key: str, wanted: int) -> None:
        """Returns when ``reserve`` has succeeded."""
        while not self.reserve(key, wanted):
            time.sleep(_PAUSE)

    def _used(self, spare: str) -> int:
        return sum(_number(path) for path in self.root.glob("*.bytes") if path.stem != spare)

    def _evicted(self, spare: str, wanted: int, budget: int) -> bool:
        """True when removing what nobody reads at the moment has made enough room; the oldest goes first."""
        entries = sorted((p for p in self.root.glob("*.bytes") if p.stem != spare), key=_changed)
        for entry in entries:
            self._remove(entry.stem)
            if self._used(spare) + wanted <= budget:
                return True
        return False

    def _remove(self, key: str) -> None:
        """Removes a merge unless somebody holds its lock."""
        lock = self._lock(key)
        descriptor = lock_file(lock)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_open_as(descriptor, lock):
                self._clear(key)
                lock.unlink()
        except (BlockingIOError, FileNotFoundError):
            pass
        finally:
            os.close(descriptor)

    def _clear(self, key: str, reserved: bool = True) -> None:
        shutil.rmtree(self.root / key, ignore_errors=True)
        if reserved:
            (self.root / f"{key}.bytes").unlink(missing_ok=True)

    def _lock(self, key: str) -> Path:
        return self.root / f"{key}.lock"


def _boot() -> str:
    """This start of the machine: what was not flushed before a crash does not pass for complete after it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _is_complete(path: Path) -> bool:
    facts = read_json(path.parent / _FACTS)
    return isinstance(facts, dict) and facts.get("boot") == _boot() and path.is_dir()


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
