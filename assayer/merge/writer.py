"""Streams tensors into safetensors files: laid out and allocated first, then filled by threads, block by block, then flushed.

Plain reads and writes of half a megabyte into a file whose blocks are really allocated are faster than any copy inside the kernel that
was tried (copy_file_range, sendfile), because allocated extents let the page cache work in large folios.
"""

import ctypes
import errno
import json
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from assayer.errors import CheckpointError, StateError
from assayer.files import natural_key, printable
from assayer.merge.names import Target
from assayer.merge.reader import Assembly, Source, boxes, run_of
from assayer.tensors import Piece

if TYPE_CHECKING:
    from assayer.merge.casts import Array

__all__ = ["INDEX", "OutputFile", "allocated", "index_of", "layout", "write_files"]

INDEX = "model.safetensors.index.json"

# Bytes of the boxes that are put together in memory, shared by the threads; a cast or another order of rows takes several times as much.
_ROOM, _ROOM_CHANGED, _BOX_MIN = 16 << 20, 4 << 20, 1 << 20
# Written bytes after which the kernel is asked to begin with them, so that the last flush finds little left.
_FLUSH_EACH = 16 << 20
_SYNC_FILE_RANGE_WRITE = 2


@dataclass
class OutputFile:
    """One safetensors file: its targets with the byte where each begins, its header, and its size in bytes."""

    name: str
    targets: list[Target]
    starts: list[int] = field(default_factory=list)
    header: bytes = b""
    size: int = 0


def layout(wanted: Sequence[Target], max_shard_size: int) -> list[OutputFile]:
    """The output's files: targets by name, as many to a file as ``max_shard_size`` bytes hold (one at least)."""
    groups: list[list[Target]] = [[]]
    held = 0
    for target in sorted(wanted, key=lambda t: natural_key(t.name)):
        if groups[-1] and held + target.nbytes > max_shard_size:
            groups.append([])
            held = 0
        groups[-1].append(target)
        held += target.nbytes
    names = (
        ["model.safetensors"]
        if len(groups) == 1
        else [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    )
    return [_laid_out(name, group) for name, group in zip(names, groups, strict=True)]


def _laid_out(name: str, group: list[Target]) -> OutputFile:
    """Wide elements first, so that each is aligned to its size; the header padded to eight bytes with spaces."""
    made = OutputFile(name, sorted(group, key=lambda t: (-t.dtype.size, natural_key(t.name))))
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    offsets = []
    for target in made.targets:
        end = position + target.nbytes
        table[target.name] = {"dtype": target.dtype.safetensors, "shape": list(target.shape), "data_offsets": [position, end]}
        offsets.append(position)
        position = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    made.header = len(text).to_bytes(8, "little") + text
    made.starts = [len(made.header) + offset for offset in offsets]
    made.size = len(made.header) + position
    return made


def index_of(files: Sequence[OutputFile]) -> dict[str, object]:
    """The index that transformers reads beside several files."""
    total = sum(target.nbytes for file in files for target in file.targets)
    return {"metadata": {"total_size": total}, "weight_map": {t.name: file.name for file in files for t in file.targets}}


def write_files(
    folder: Path,
    files: Sequence[OutputFile],
    source: Source,
    threads: int,
    head_rows: int,
    advance: Callable[[int], None],
    flush: bool = True,
) -> None:
    """Fills and flushes the files.

    Args:
        folder: of the output, which exists.
        files: as ``layout`` gives them.
        source: of the bytes.
        threads: that copy.
        head_rows: rows of an attention head, for targets whose rows are reordered.
        advance: is told the number of bytes written, from any thread.
        flush: to the disk, before it returns.

    Raises:
        CheckpointError: the checkpoint's bytes are damaged or gone.
        StateError: the output cannot be written.
    """
    opened: list[int] = []
    try:
        tasks: list[_Task] = []
        for file in files:
            descriptor = allocated(folder / file.name, file)
            opened.append(descriptor)
            for target, start in zip(file.targets, file.starts, strict=True):
                changed = bool(target.form) or target.dtype is not target.source.dtype
                room = max(_BOX_MIN, (_ROOM_CHANGED if changed else _ROOM) // threads)
                tasks += _tasks(target, _Output(descriptor, flush), start, source, head_rows, room)
        tasks.sort(key=lambda task: (task.file, task.position))
        _run(tasks, threads, advance)
        if flush:
            _run(
                [_Task("", number, _flushing(descriptor)) for number, descriptor in enumerate(opened)],
                min(threads, len(opened)),
                lambda _: None,
            )
    except OSError as error:
        raise StateError(f"cannot write below {printable(str(folder))}: {error.strerror}") from None
    finally:
        for descriptor in opened:
            os.close(descriptor)


@dataclass
class _Task:
    """What one thread does in one go; sorted by the place of its first byte in the checkpoint, so that disks read forwards."""

    file: str
    position: int
    run: Callable[[Callable[[int], None]], None]


@dataclass(frozen=True, slots=True)
class _Output:
    """An open file of the output; with ``flush``, the kernel is asked early to begin with what will be flushed at the end."""

    descriptor: int
    flush: bool

    def write(self, data: memoryview, at: int) -> None:
        written = os.pwrite(self.descriptor, data, at)
        while written < len(data):
            written += os.pwrite(self.descriptor, data[written:], at + written)

    def begin_flush(self, at: int, length: int) -> None:
        """Asks the kernel to begin writing these bytes to the disk, and does not wait."""
        if self.flush and length and sys.platform == "linux":
            _libc().sync_file_range(self.descriptor, ctypes.c_longlong(at), ctypes.c_longlong(length), _SYNC_FILE_RANGE_WRITE)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _flushing(descriptor: int) -> Callable[[Callable[[int], None]], None]:
    return lambda advance: os.fsync(descriptor)


def allocated(path: Path, file: OutputFile) -> int:
    """An open descriptor of a new file of the output, with its header written and room for all of it.

    Raises:
        OSError: it cannot be made, or there is no room.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        if not _fallocate(descriptor, file.size):
            os.ftruncate(descriptor, file.size)
        os.pwrite(descriptor, file.header, 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _fallocate(descriptor: int, size: int) -> bool:
    """Allocates the file's blocks; False where the file system has no such call (glibc's own would write every block instead).

    Raises:
        OSError: there is no room.
    """
    if sys.platform != "linux" or size == 0:
        return False
    if _libc().fallocate(descriptor, 0, ctypes.c_longlong(0), ctypes.c_longlong(size)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(number, os.strerror(number))


def _run(tasks: list[_Task], threads: int, advance: Callable[[int], None]) -> None:
    """Does every task; the first error stops the others."""
    waiting = deque(tasks)
    errors: list[BaseException] = []

    def work() -> None:
        while not errors:
            try:
                task = waiting.popleft()
            except IndexError:
                return
            try:
                task.run(advance)
            except BaseException as error:
                errors.append(error)

    others = [threading.Thread(target=work, daemon=True) for _ in range(min(threads, len(tasks)) - 1)]
    try:
        for thread in others:
            thread.start()
        work()
        for thread in others:
            thread.join()
    except BaseException as error:
        errors.append(error)
        for thread in others:
            thread.join()
    if errors:
        raise errors[0]


def _tasks(target: Target, output: _Output, start: int, source: Source, head_rows: int, room: int) -> list[_Task]:
    tensor = target.source
    if target.nbytes == 0:
        return []
    places = [run_of(tensor.space, piece) for piece in tensor.pieces]
    if target.form or any(place is None for place in places):
        first = min(tensor.pieces, key=lambda p: (p.file, p.start))
        return [_Task(first.file, first.start, lambda advance: _assemble(target, output, start, source, head_rows, room, advance))]
    return [
        _Task(piece.file, piece.start, _streaming(target, piece, output, start + place * target.dtype.size, source))
        for piece, place in zip(tensor.pieces, places, strict=True)
        if place is not None
    ]


def _streaming(target: Target, piece: Piece, output: _Output, at: int, source: Source) -> Callable[[Callable[[int], None]], None]:
    return lambda advance: _stream(target, piece, output, at, source, advance)


def _stream(target: Target, piece: Piece, output: _Output, at: int, source: Source, advance: Callable[[int], None]) -> None:
    """Copies a piece that lies in one run in the output."""
    tensor = target.source
    piece = source.opened(piece, tensor)
    crc = source.crc(piece, tensor.name)
    if piece.stride is not None:
        for begin, sizes in boxes(piece.sizes, tensor.dtype.size, _BOX_MIN):
            end = tuple(b + n for b, n in zip(begin, sizes, strict=True))
            data = _converted(_bytes_of(source.strided(piece, tensor, begin, end)), target)
            output.write(data, at)
            at += len(data)
            advance(len(data))
        if crc:
            crc.finish(source)
        return
    begun = at
    for position, block in source.blocks(piece.file, piece.start, piece.numel * tensor.dtype.size):
        if crc:
            crc.add(block, position)
        data = _converted(block, target)
        output.write(data, at)
        at += len(data)
        advance(len(data))
        if at - begun >= _FLUSH_EACH:
            output.begin_flush(begun, at - begun)
            begun = at
    output.begin_flush(begun, at - begun)
    if crc:
        crc.finish(source)


def _converted(data: memoryview, target: Target) -> memoryview:
    source = target.source.dtype
    if source is target.dtype:
        return data
    import numpy

    from assayer.merge.casts import cast, raw_type

    return _bytes_of(cast(numpy.frombuffer(data, raw_type(source)), source, target.dtype))


def _bytes_of(values: "Array") -> memoryview:
    """The elements' bytes, the last dimension innermost."""
    import numpy

    return numpy.ascontiguousarray(values).reshape(-1).view(numpy.uint8).data


def _assemble(
    target: Target, output: _Output, start: int, source: Source, head_rows: int, room: int, advance: Callable[[int], None]
) -> None:
    """Puts a target together in memory, box by box."""
    tensor = target.source
    assembly = Assembly(source, tensor)
    if target.form == "experts":
        _, rows, columns = tensor.shape
        data = _converted(_bytes_of(assembly.box((target.expert, 0, 0), (1, rows, columns))[0].T), target)
        output.write(data, start)
        advance(len(data))
        if target.expert == tensor.shape[0] - 1:
            # Its bytes do not come first, so that this reads the whole record, once for all experts.
            assembly.finish()
        return
    if target.form == "pairs" and (len(tensor.shape) != 2 or tensor.shape[0] % head_rows):
        raise CheckpointError(f"{printable(tensor.name)} has {tensor.shape[0]} rows, no multiple of the {head_rows} of an attention head")
    place = start
    multiple = head_rows if target.form == "pairs" else 1
    for begin, sizes in boxes(tensor.shape, tensor.dtype.size, room, multiple):
        made = assembly.box(begin, sizes)
        if target.form == "pairs":
            made = made.reshape(-1, head_rows // 2, 2, sizes[1]).transpose(0, 2, 1, 3).reshape(sizes)
        data = _converted(_bytes_of(made), target)
        output.write(data, place)
        place += len(data)
        advance(len(data))
    assembly.finish()
