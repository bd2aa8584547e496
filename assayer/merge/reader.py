"""Reads tensors from a checkpoint's files: open files, bytes by position, boxes put together from pieces, and CRC32s on the way."""

import itertools
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from assayer.archive import Record
from assayer.checkpoint import Listing
from assayer.errors import CheckpointError, UnreadableError
from assayer.files import printable
from assayer.tensors import Piece, Tensor, open_piece

if TYPE_CHECKING:
    from assayer.merge.casts import Array

__all__ = ["BLOCK", "Assembly", "Crc", "Source", "boxes", "run_of", "shared_records"]

# Bytes of one read. With larger ones the copy leaves the processor's cache.
BLOCK = 512 << 10
# Bytes of one read where elements do not lie in a row, and how many times what is needed it may hold.
_GATHER, _SPARSE = 1 << 20, 4
# Files that one thread holds open at a time.
_OPEN_MAX = 32

Box = tuple[tuple[int, ...], tuple[int, ...]]


def run_of(space: tuple[int, ...], piece: Piece) -> int | None:
    """The place (in elements) where a piece lies in one run in its tensor; None where it lies in several."""
    sizes = piece.sizes
    inner = len(space)
    while inner > 0 and sizes[inner - 1] == space[inner - 1]:
        inner -= 1
    if any(n != 1 for n in sizes[: max(0, inner - 1)]):
        return None
    place, step = 0, 1
    for begin, size in zip(reversed(piece.begin), reversed(space), strict=True):
        place += begin * step
        step *= size
    return place


def boxes(space: tuple[int, ...], element: int, room: int, multiple: int = 1) -> Iterator[Box]:
    """Boxes of at most ``room`` bytes that make up the space in order; each lies in one run in it.

    Args:
        space: shape.
        element: bytes of one element.
        room: bytes.
        multiple: of indices of the first dimension that stay together; then a box may be larger than ``room``.
    """
    if prod(space) == 0:
        return
    if not space:
        yield (), ()
        return
    dim, inner = 0, prod(space[1:]) * element
    while inner > room and dim < len(space) - 1 and multiple == 1:
        dim += 1
        inner = prod(space[dim + 1 :]) * element
    rows = max(1, room // max(1, inner) // multiple) * multiple
    rest = space[dim + 1 :]
    for prefix in itertools.product(*(range(n) for n in space[:dim])):
        for first in range(0, space[dim], rows):
            yield (*prefix, first, *(0 for _ in rest)), (*(1 for _ in prefix), min(rows, space[dim] - first), *rest)


def shared_records(tensors: Iterable[Tensor]) -> set[tuple[str, int]]:
    """The records (file and first byte) in which several pieces lie, or one that does not begin where the record does."""
    seen: set[tuple[str, int]] = set()
    shared: set[tuple[str, int]] = set()
    for tensor in tensors:
        for piece in tensor.pieces:
            if piece.record is not None:
                key = (piece.file, piece.record.start)
                if key in seen or piece.start != piece.record.start:
                    shared.add(key)
                seen.add(key)
    return shared


class Crc:
    """The CRC32 of one record while its bytes go by in order."""

    def __init__(self, piece: Piece, tensor: str) -> None:
        self.piece, self.tensor = piece, tensor
        self.value = 0
        self.position = piece.record.start if piece.record else 0

    def add(self, data: "memoryview | bytes", position: int) -> None:
        """Takes the bytes that lie at ``position``, when they follow those before; others are of no use to it."""
        if position == self.position:
            self.value = zlib.crc32(data, self.value)
            self.position += len(data)

    def finish(self, source: "Source") -> None:
        """Reads what is left of the record, and compares; a record that several pieces share is read by itself, once.

        Raises:
            CheckpointError: the bytes are not those that were saved.
        """
        record = self.piece.record
        if record is None or record.crc is None:
            return
        if source.is_new_among_shared(self.piece):
            source.check(self.piece.file, record, self.tensor)
        elif not source.is_shared(self.piece):
            source.check(self.piece.file, record, self.tensor, self.value, self.position)


class Source:
    """The files of one checkpoint, opened once a thread.

    Args:
        listing: of the checkpoint.
        tensors: those that will be read.
        verify: compare CRC32s.
    """

    def __init__(self, listing: Listing, tensors: Iterable[Tensor], verify: bool = True) -> None:
        self._listing, self.verify = listing, verify
        self._threads = threading.local()
        self._all: list[int] = []
        self._lock = threading.Lock()
        self._shared = shared_records(tensors)
        self._checked: set[tuple[str, int]] = set()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Closes what all threads have opened."""
        with self._lock:
            for descriptor in self._all:
                os.close(descriptor)
            self._all.clear()
            self._threads = threading.local()

    def path(self, file: str) -> Path:
        return self._listing.file(file)

    def descriptor(self, file: str) -> int:
        """An open descriptor of one of the checkpoint's files, of this thread's own.

        Raises:
            CheckpointError: it is gone or cannot be read.
        """
        if not hasattr(self._threads, "open"):
            self._threads.open = OrderedDict()
            self._threads.buffer = memoryview(bytearray(BLOCK))
        held: OrderedDict[str, int] = self._threads.open
        if file in held:
            held.move_to_end(file)
            return held[file]
        try:
            descriptor = os.open(self.path(file), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UnreadableError(f"{printable(str(self.path(file)))} cannot be read: {error.strerror}") from None
        with self._lock:
            self._all.append(descriptor)
            if len(held) >= _OPEN_MAX:
                _, oldest = held.popitem(last=False)
                self._all.remove(oldest)
                os.close(oldest)
        held[file] = descriptor
        return descriptor

    def blocks(self, file: str, start: int, length: int) -> Iterator[tuple[int, memoryview]]:
        """The bytes from ``start`` on, block by block, in a buffer of this thread's that the next block overwrites.

        Raises:
            CheckpointError: the file ends before, or cannot be read.
        """
        descriptor = self.descriptor(file)
        buffer: memoryview = self._threads.buffer
        end = start + length
        while start < end:
            block = buffer[: min(BLOCK, end - start)]
            self._fill(descriptor, file, block, start)
            yield start, block
            start += len(block)

    def _fill(self, descriptor: int, file: str, block: memoryview, start: int) -> None:
        filled = 0
        while filled < len(block):
            try:
                count = os.preadv(descriptor, [block[filled:]], start + filled)
            except OSError as error:
                raise UnreadableError(f"{printable(str(self.path(file)))} cannot be read at byte {start}: {error.strerror}") from None
            if count == 0:
                where = f"{printable(str(self.path(file)))} ends at byte {start + filled}"
                raise CheckpointError(f"{where}, at least {len(block) - filled} bytes before it should")
            filled += count

    def opened(self, piece: Piece, tensor: Tensor) -> Piece:
        """A piece with the place of its bytes known; see ``tensors.open_piece``.

        Raises:
            CheckpointError: its archive is damaged or holds something else.
        """
        if not piece.archive:
            return piece
        try:
            return open_piece(piece, tensor.dtype, self.descriptor(piece.file))
        except CheckpointError as error:
            where = f"{printable(str(self.path(piece.file)))} at byte {piece.start}, for {printable(tensor.name)},"
            raise type(error)(f"{where} {error}") from None

    def crc(self, piece: Piece, tensor: str) -> Crc | None:
        """What checks the bytes of an opened piece as they go by; None when nothing is to be checked."""
        return Crc(piece, tensor) if self.verify and piece.record and piece.record.crc is not None else None

    def is_shared(self, piece: Piece) -> bool:
        return piece.record is not None and (piece.file, piece.record.start) in self._shared

    def is_new_among_shared(self, piece: Piece) -> bool:
        """True for the first piece of a shared record, and for no other one."""
        if not self.is_shared(piece):
            return False
        assert piece.record is not None
        key = (piece.file, piece.record.start)
        with self._lock:
            is_new = key not in self._checked
            self._checked.add(key)
        return is_new

    def check(self, file: str, record: Record, tensor: str, value: int = 0, position: int | None = None) -> None:
        """Compares a record's CRC32, of which the bytes before ``position`` have the CRC ``value``.

        Raises:
            CheckpointError: the bytes are not those that were saved.
        """
        position = record.start if position is None else position
        for _, data in self.blocks(file, position, record.start + record.length - position):
            value = zlib.crc32(data, value)
        if value != record.crc:
            raise CheckpointError(
                f"{printable(str(self.path(file)))} is damaged in the {record.length} bytes at byte {record.start}, which hold "
                f"{printable(tensor)}: their CRC32 is {value:08x}, it was {record.crc:08x} when they were saved"
            )

    def strided(self, piece: Piece, tensor: Tensor, low: tuple[int, ...], high: tuple[int, ...]) -> "Array":
        """The raw elements of a box of an opened piece whose elements do not lie in a row; ``low`` and ``high`` count within the piece.

        The box is halved where it is widest in the file until what is read at once is dense, and no more than a few blocks.
        """
        import numpy

        from assayer.merge.casts import raw_type

        stride, element = piece.stride or (), tensor.dtype.size
        made = numpy.empty(tuple(b - a for a, b in zip(low, high, strict=True)), dtype=raw_type(tensor.dtype))
        todo = [(low, high)]
        while todo:
            begin, end = todo.pop()
            sizes = tuple(b - a for a, b in zip(begin, end, strict=True))
            reach = [(n - 1) * step for n, step in zip(sizes, stride, strict=True)]
            span = sum(reach) + 1
            if (span * element > _GATHER or span > _SPARSE * prod(sizes)) and max(reach, default=0) > 0:
                dim = reach.index(max(reach))
                middle = (begin[dim] + end[dim]) // 2
                todo.append(((*begin[:dim], middle, *begin[dim + 1 :]), end))
                todo.append((begin, (*end[:dim], middle, *end[dim + 1 :])))
                continue
            start = piece.start + sum(a * step for a, step in zip(begin, stride, strict=True)) * element
            data = bytearray(span * element)
            self._fill(self.descriptor(piece.file), piece.file, memoryview(data), start)
            flat = numpy.frombuffer(data, dtype=raw_type(tensor.dtype))
            where = tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, low, strict=True))
            made[where] = numpy.lib.stride_tricks.as_strided(flat, sizes, tuple(step * element for step in stride))
        return made


class Assembly:
    """One tensor, box by box in order, put together from its pieces."""

    def __init__(self, source: Source, tensor: Tensor) -> None:
        self._source, self._tensor = source, tensor
        self._pieces = [source.opened(piece, tensor) for piece in tensor.pieces]
        self._crcs = [source.crc(piece, tensor.name) for piece in self._pieces]

    def box(self, begin: tuple[int, ...], sizes: tuple[int, ...]) -> "Array":
        """The raw elements of a box of the tensor's shape that lies in one run in it (see ``boxes``)."""
        import numpy

        from assayer.merge.casts import raw_type

        shape = sizes
        if self._tensor.flat:
            place = 0
            for first, extent in zip(begin, self._tensor.shape, strict=True):
                place = place * extent + first
            begin, sizes = (place,), (prod(sizes),)
        made = numpy.empty(sizes, dtype=raw_type(self._tensor.dtype))
        for index, piece in enumerate(self._pieces):
            low = tuple(map(max, begin, piece.begin))
            high = tuple(min(b + n, p + m) for b, n, p, m in zip(begin, sizes, piece.begin, piece.sizes, strict=True))
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            where = tuple(slice(a - b, z - b) for a, z, b in zip(low, high, begin, strict=True))
            made[where] = self._part(index, piece, low, high)
        return made.reshape(shape)

    def _part(self, index: int, piece: Piece, low: tuple[int, ...], high: tuple[int, ...]) -> "Array":
        import numpy

        from assayer.merge.casts import raw_type

        first = tuple(a - p for a, p in zip(low, piece.begin, strict=True))
        shape = tuple(z - a for a, z in zip(low, high, strict=True))
        if piece.stride is not None:
            return self._source.strided(piece, self._tensor, first, tuple(f + n for f, n in zip(first, shape, strict=True)))
        size = self._tensor.dtype.size
        place = 0
        for index_in, extent in zip(first, piece.sizes, strict=True):
            place = place * extent + index_in
        data = bytearray(prod(shape) * size)
        view = memoryview(data)
        start = piece.start + place * size
        crc = self._crcs[index]
        for position, block in self._source.blocks(piece.file, start, len(data)):
            view[position - start : position - start + len(block)] = block
            if crc:
                crc.add(block, position)
        return numpy.frombuffer(data, dtype=raw_type(self._tensor.dtype)).reshape(shape)

    def finish(self) -> None:
        """Compares the CRC32s, once the last box has been read.

        Raises:
            CheckpointError: bytes are not those that were saved.
        """
        for crc in self._crcs:
            if crc:
                crc.finish(self._source)
