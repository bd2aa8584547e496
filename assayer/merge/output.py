"""Where a merge's output lies, and how it comes there: built beside its place, flushed, and only then given its name."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from assayer.checkpoint import Found
from assayer.errors import StateError
from assayer.files import hold_folder_open, printable, remove_unless_held, short_name
from assayer.plan import host_name
from assayer.record import run_folder

__all__ = ["check_room", "default_output", "part_folder"]

# Bytes that headers, an index and the file system's own bookkeeping may take.
_BESIDE = 4 << 20
# Bytes that a name leaves for the ending of a folder that is being made.
_ENDING = 100


def default_output(found: Found, checkpoint_type: str) -> Path:
    """``merged/<name>`` (EMA: ``merged/<name>-ema``) beside the checkpoints; for accelerate's layout one level higher."""
    path = Path(found.checkpoint.path)
    return run_folder(path) / "merged" / (path.name + ("-ema" if checkpoint_type == "ema" else ""))


def check_room(folder: Path, wanted: int) -> None:
    """Refuses a merge for which the file system has no room.

    Raises:
        StateError: it has not; both numbers are named.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < wanted + _BESIDE:
        raise StateError(
            f"the merge needs {wanted} bytes and {_BESIDE} beside, the file system of {printable(str(folder))} has {free} free"
        )


@contextlib.contextmanager
def part_folder(output: Path) -> Iterator[Path]:
    """A folder beside the output, which gets the output's name when the block ends well, and is removed when it does not.

    Raises:
        StateError: it cannot be made, flushed or renamed.
    """
    part = output.with_name(f"{short_name(output.name, _ENDING)}{_part_sign()}{secrets.token_hex(4)}")
    made: list[Path] = []
    lock = -1
    try:
        try:
            made = _make(output.parent)
            _sweep(output)
            part.mkdir()
            lock = hold_folder_open(part)
        except OSError as error:
            raise StateError(f"cannot write in {printable(str(output.parent))}: {error.strerror}; give another --output_path") from None
        try:
            yield part
            _flush(part)
            try:
                os.rename(part, output)
                _flush(output.parent)
            except OSError as error:
                raise StateError(f"cannot name the output {printable(str(output))}: {error.strerror}") from None
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    except BaseException:
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    finally:
        if lock >= 0:
            os.close(lock)


def _make(folder: Path) -> list[Path]:
    """Makes a folder and those above it that are missing; returns those it made."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for one in reversed(missing):
        one.mkdir(exist_ok=True)
    return missing[::-1]


def _part_sign() -> str:
    return f".part-{host_name()}-"


def _sweep(output: Path) -> None:
    """Removes what merges of this output left that were killed on this host."""
    sign = short_name(output.name, _ENDING) + _part_sign()
    for path in output.parent.iterdir():
        if path.name.startswith(sign) and path.is_dir():
            remove_unless_held(path)


def _flush(folder: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
