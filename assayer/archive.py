"""The records of a ``torch.save`` archive (a zip without compression), alone in a file or as one item among others in it.

Only the zip's directory and a few headers are read. Source: the zip application note (sections 4.3 and 4.5.3), and
torch/csrc/inline_container (records are stored, ``<name>/data.pkl`` describes tensors, ``<name>/data/<key>`` are their bytes).
"""

import os
import struct
import zlib
from dataclasses import dataclass

from assayer.errors import CheckpointError

__all__ = ["Record", "read_bytes", "read_checked", "records_of"]

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL_SIZE = 30
_TAIL = 2048
# Bytes of a directory: 300,000 records.
_DIRECTORY_MAX = 32 << 20
# The longest comment that may stand behind the end of a zip's directory.
_COMMENT_MAX = 65535


@dataclass(frozen=True, slots=True)
class Record:
    """One record's bytes: where they start in the file, how many they are, and their CRC32 (None: the writer left it out)."""

    start: int
    length: int
    crc: int | None


def read_bytes(descriptor: int, length: int, offset: int) -> bytes:
    """``length`` bytes at ``offset``.

    Raises:
        CheckpointError: the file ends before.
    """
    data = os.pread(descriptor, length, offset)
    while len(data) < length:
        more = os.pread(descriptor, length - len(data), offset + len(data))
        if not more:
            raise CheckpointError(f"ends at byte {offset + len(data)}, {length - len(data)} bytes before it should")
        data += more
    return data


def read_checked(descriptor: int, record: Record, what: str) -> bytes:
    """A record's bytes, compared with its CRC32.

    Raises:
        CheckpointError: they are not those that were saved, or the file ends before.
    """
    data = read_bytes(descriptor, record.length, record.start)
    if record.crc is not None and zlib.crc32(data) != record.crc:
        raise CheckpointError(f"is damaged in {what}, {record.length} bytes at byte {record.start}")
    return data


def records_of(descriptor: int, offset: int, length: int, wanted: tuple[str, ...] | None = None) -> dict[str, Record]:
    """The records of the archive that lies at ``offset``, by name without the archive's own; with ``wanted`` only those.

    Raises:
        CheckpointError: there is no whole archive, or it is compressed.
        OSError: it cannot be read.
    """
    try:
        return _records_of(descriptor, offset, length, wanted)
    except (struct.error, OverflowError, ValueError):
        raise CheckpointError("has a damaged zip directory") from None


def _records_of(descriptor: int, offset: int, length: int, wanted: tuple[str, ...] | None) -> dict[str, Record]:
    at, size, count, tail_at, tail = _directory(descriptor, offset, length)
    if at >= tail_at:
        directory = tail[at - tail_at : at - tail_at + size]
    else:
        directory = read_bytes(descriptor, size, offset + at)
    found: dict[str, Record] = {}
    position = 0
    for _ in range(count):
        if position + _ENTRY.size > len(directory):
            raise CheckpointError("has a damaged zip directory")
        fields = _ENTRY.unpack_from(directory, position)
        method, crc, packed, plain, name_size, extra_size, comment_size = fields[4], *fields[7:13]
        header_at = fields[16]
        if fields[0] != b"PK\x01\x02" or name_size == 0:
            raise CheckpointError("has a damaged zip directory")
        start = position + _ENTRY.size
        name = directory[start : start + name_size].decode("utf-8", "replace").partition("/")[2]
        extra = directory[start + name_size : start + name_size + extra_size]
        position = start + name_size + extra_size + comment_size
        if wanted is not None and name not in wanted:
            continue
        if 0xFFFFFFFF in (packed, plain, header_at):
            plain, packed, header_at = _wide(extra, plain, packed, header_at)
        if method != 0 or packed != plain:
            raise CheckpointError(f"has the record {name!r} compressed, which torch.save never does")
        if header_at + _LOCAL_SIZE > at:
            raise CheckpointError("has a zip directory that points past its end")
        local = read_bytes(descriptor, _LOCAL_SIZE, offset + header_at)
        if local[:4] != b"PK\x03\x04":
            raise CheckpointError("has a damaged zip header")
        begin = header_at + _LOCAL_SIZE + sum(struct.unpack_from("<2H", local, 26))
        if begin + plain > at:
            raise CheckpointError("has a zip directory that points past its end")
        found[name] = Record(offset + begin, plain, crc if crc or not plain else None)
    return found


def _directory(descriptor: int, offset: int, length: int) -> tuple[int, int, int, int, bytes]:
    """Where the directory starts in the archive, its size, its number of entries; and the archive's last bytes with their place."""
    for room in (_TAIL, _COMMENT_MAX + _END.size):
        tail_at = max(0, length - room)
        tail = read_bytes(descriptor, length - tail_at, offset + tail_at)
        found = tail.rfind(b"PK\x05\x06")
        if found >= 0 and found + _END.size <= len(tail):
            break
        if tail_at == 0:
            raise CheckpointError("has no zip directory (it is written last)")
    else:
        raise CheckpointError("has no zip directory (it is written last)")
    _, _, _, _, count, size, at, _ = _END.unpack_from(tail, found)
    if count == 0xFFFF or 0xFFFFFFFF in (size, at):
        if found < _LOCATOR.size:
            raise CheckpointError("has a damaged zip directory")
        sign, _, end_at, _ = _LOCATOR.unpack_from(tail, found - _LOCATOR.size)
        if sign != b"PK\x06\x07" or not 0 <= end_at <= length - _END64.size:
            raise CheckpointError("has a damaged zip directory")
        fields = _END64.unpack(read_bytes(descriptor, _END64.size, offset + end_at))
        if fields[0] != b"PK\x06\x06":
            raise CheckpointError("has a damaged zip directory")
        count, size, at = fields[7:10]
    if at + size > length:
        raise CheckpointError("has a zip directory that points past its end")
    if size > _DIRECTORY_MAX:
        raise CheckpointError(f"has a zip directory of {size} bytes; {_DIRECTORY_MAX} are read")
    return at, size, count, tail_at, tail


def _wide(extra: bytes, *narrow: int) -> list[int]:
    """The 64-bit values of plain size, packed size and header offset, from the entry's extra field."""
    position = 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            values = iter(struct.unpack_from(f"<{size // 8}Q", extra, position + 4))
            return [next(values, 0) if value == 0xFFFFFFFF else value for value in narrow]
        position += 4 + size
    raise CheckpointError("has a damaged zip directory")
