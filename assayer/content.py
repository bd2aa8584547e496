"""What one weight file says of itself: is it whole, and which weights does it hold. Nothing is unpickled, nothing is read whole.

Sources: the zip application note (torch.save writes the directory of its zip last), the safetensors format description
(8 bytes of header length, a JSON header, then the data), torch/serialization.py (magic number of the form before torch 1.6).
"""

import contextlib
import io
import itertools
import json
import os
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from assayer.errors import CheckpointError
from assayer.files import digest, open_descriptor, open_file, printable

__all__ = ["METADATA_MAX", "fingerprint", "incomplete", "is_legacy", "read_limited", "read_table", "safetensors_header", "tells_save"]

# Bytes of a safetensors header that are read: 300,000 tensors. (The format allows 100 million bytes.)
_HEADER_MAX = 32 << 20
# Bytes of a JSON file that are read, such as an index of shards or a Trainer's state with its whole history.
_JSON_MAX = 32 << 20
# Bytes of the metadata of a distributed checkpoint: ten million pieces.
METADATA_MAX = 1 << 30
# Bytes of JSON for each table or list in it, in what a person or a library writes; more of them only fill memory.
_EACH_CONTAINER, _CONTAINERS_FREE = 6, 1000
# Bytes of a zip's directory that are read (300,000 records), and of the directories of a file of archives.
_DIRECTORY_MAX, _DIRECTORIES_MAX = 32 << 20, 256 << 20
_CHUNK = 1 << 20
# Bytes of one sample, and how many samples are spread over one tensor or record.
_BLOCK = 1024
_BLOCKS = 4
# A pickle tells nothing of where its tensors lie: up to so many bytes it is read whole, above that one sample for so many bytes.
_LEGACY_WHOLE = 64 << 20
_LEGACY_STRIDE = 64 << 10
_LEGACY_SAMPLES_MAX = 1 << 18
# A pickle of protocol 2 and later starts with this byte; torch's own form before 1.6 is such a pickle.
_PICKLE = b"\x80"
# A save's number in the pickle of a distributed checkpoint's metadata.
_SAVE_ID = re.compile(rb"save_id.{1,6}?[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.DOTALL)
_SAVE_ID_ROOM = 64
# The end of a zip's directory; bytes that hold it in both its forms; archives of one file that are looked at.
_END, _TAIL, _ARCHIVES_MAX = struct.Struct("<4s4H2LH"), 128, 100_000
# Bytes of the end of the directory in its 64-bit form, and of what points at it.
_WIDE_END = 56 + 20
# torch's distributed checkpoint puts one archive behind the other.
_DISTRIBUTED = ".distcp"


def incomplete(path: Path) -> str | None:
    """None when every byte of the file is there, as far as its form tells; else a sentence why not.

    Known forms: safetensors (by suffix), zip (torch.save since 1.6), pickle (before; has no end mark, see ``is_legacy``). Of a ``.distcp``
    file only its metadata tells how long it must be.

    Raises:
        OSError: the file is gone or cannot be read.
    """
    if path.suffix == ".safetensors":
        return _incomplete_safetensors(path)
    with open_file(path) as file:
        start = file.read(4)
    if path.suffix == _DISTRIBUTED and start:
        return None
    if start == b"PK\x03\x04":
        return _incomplete_zip(path)
    if start[:1] == _PICKLE:
        return None
    return "is empty" if not start else "holds no torch.save data (neither a zip nor a pickle)"


def is_legacy(path: Path) -> bool:
    """True for a pickle without a zip around it: only time can tell that such a file is whole."""
    if path.suffix in (".safetensors", _DISTRIBUTED):
        return False
    with open_file(path) as file:
        return file.read(1) == _PICKLE


def read_limited(path: Path, limit: int) -> bytes:
    """All bytes of a file that has at most ``limit``: of a sparse one of many gigabytes nothing is read.

    Raises:
        CheckpointError: it has more; the text goes behind the file's name.
        OSError: it is gone or cannot be read.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise CheckpointError(f"holds {size} bytes; {limit} are read")
        # What grows while it is read is read no further.
        return file.read(size)


def read_table(path: Path) -> dict[str, Any] | None:
    """The table in a JSON file; None while it is no whole one.

    Raises:
        CheckpointError: it is larger, or holds more tables and lists, than any honest one; the text goes behind the file's name.
        OSError: it is gone or cannot be read.
    """
    data = read_limited(path, _JSON_MAX)
    try:
        _refuse_containers(data)
        value = json.loads(data)
    except _ContainersError as error:
        raise CheckpointError(str(error)) from None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


class _ContainersError(ValueError):
    """JSON that would take many times its size in memory."""


def _refuse_containers(data: bytes) -> None:
    count = data.count(b"[") + data.count(b"{")
    if count > _CONTAINERS_FREE + len(data) // _EACH_CONTAINER:
        raise _ContainersError(f"holds {count} tables and lists in {len(data)} bytes, which no honest file does")


def fingerprint(path: Path, sampled: bool = False) -> str:
    """A digest that changes when the weights in the file change, read in milliseconds whatever the size.

    A zip gives the CRC32 of each record; where the writer left them out, samples. safetensors gives its header and samples of every
    tensor; a pickle all of it, above 64 MiB a sample of every 64 KiB; a ``.distcp`` file the directories of its archives (with ``sampled``
    the last one alone, for where another file tells one save from the next). Times and inodes play no part.

    Raises:
        CheckpointError: the file is not whole.
        OSError: it is gone or cannot be read.
    """
    problem = incomplete(path)
    if problem:
        raise CheckpointError(f"{printable(str(path))} {problem}")
    try:
        return _fingerprint(path, sampled)
    except (zipfile.BadZipFile, ValueError, TypeError, LookupError, NotImplementedError, OverflowError, EOFError, struct.error):
        raise CheckpointError(f"{printable(str(path))} changed while it was read") from None


def tells_save(path: Path) -> bool:
    """True for the metadata of a distributed checkpoint in which every save has a number of its own (torch 2.4 and later)."""
    with open_file(path) as file:
        before = b""
        for _ in range(METADATA_MAX // _CHUNK):
            chunk = file.read(_CHUNK)
            if not chunk or _SAVE_ID.search(before + chunk):
                return bool(chunk)
            before = chunk[-_SAVE_ID_ROOM:]
    return False


def _fingerprint(path: Path, sampled: bool) -> str:
    if path.suffix == ".safetensors":
        return digest(*_safetensors_samples(path))
    if path.suffix == _DISTRIBUTED:
        return digest(*_spread(path, [(0, path.stat().st_size)]), *_archives(path, 1 if sampled else _ARCHIVES_MAX))
    if is_legacy(path):
        size = path.stat().st_size
        count = min(_LEGACY_SAMPLES_MAX, max(_BLOCKS, size // _LEGACY_STRIDE))
        return digest(read_limited(path, _LEGACY_WHOLE) if size <= _LEGACY_WHOLE else b"", *_spread(path, [(0, size)], count=count))
    return digest(*_zip_records(path))


class _Bounded(io.BufferedReader):
    """A file of which no more is read at once than an honest zip's directory takes: its length is what the file itself says."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > _DIRECTORY_MAX:
            raise ValueError(f"{size} bytes; {_DIRECTORY_MAX} are read")
        rest = os.fstat(self.fileno()).st_size - self.tell()
        return super().read(min(rest, _DIRECTORY_MAX) if size is None or size < 0 else size)


@contextlib.contextmanager
def _opened_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    with _Bounded(io.FileIO(open_descriptor(path))) as file, zipfile.ZipFile(file) as archive:
        yield archive


def _incomplete_zip(path: Path) -> str | None:
    try:
        with _opened_zip(path) as archive:
            ends = [info.header_offset + info.compress_size for info in archive.infolist()]
            start_of_directory = archive.start_dir
    except zipfile.BadZipFile:
        return "has no zip directory yet (it is written last)"
    except (ValueError, NotImplementedError, OverflowError, EOFError, struct.error) as error:
        return f"has a damaged zip directory ({error})"
    if not ends:
        return "is an empty zip"
    return "has a zip directory that points past its end" if max(ends) > start_of_directory else None


def _zip_records(path: Path) -> Iterator[str | bytes]:
    with _opened_zip(path) as archive:
        for info in sorted(archive.infolist(), key=lambda info: info.filename):
            # The archive's own name is the file's name when it was saved, and says nothing of the weights.
            yield info.filename.partition("/")[2]
            yield f"{info.file_size}:{info.CRC}"
            if info.CRC == 0 and info.file_size:
                yield from _spread(path, [(info.header_offset, info.header_offset + info.compress_size)])


def _archives(path: Path, count: int) -> Iterator[bytes]:
    """The zip directories, which hold the CRC32s, of the last ``count`` archives in a file of archives, from its end."""
    descriptor = open_descriptor(path)
    left = _DIRECTORIES_MAX
    try:
        end = os.fstat(descriptor).st_size
        while end >= _END.size and count:
            tail = os.pread(descriptor, min(end, _TAIL), max(0, end - _TAIL))
            if tail[-_END.size : -_END.size + 4] != b"PK\x05\x06":
                # An item that went through an extension, such as compression.
                break
            size, start = struct.unpack_from("<2L", tail, len(tail) - _END.size + 12)
            behind = _END.size
            wide = len(tail) - _END.size - _WIDE_END
            if wide >= 0 and tail[wide : wide + 4] == b"PK\x06\x06":
                # The form for large archives, which torch writes always, stands before the common one.
                size, start = struct.unpack_from("<2Q", tail, wide + 40)
                behind += _WIDE_END
            directory = end - behind - size
            left -= size
            if start > directory or size > _DIRECTORY_MAX or left < 0:
                break
            yield os.pread(descriptor, size, directory)
            end, count = directory - start, count - 1
    finally:
        os.close(descriptor)


def safetensors_header(file: BinaryIO) -> tuple[int, dict[str, Any]]:
    """The length of a safetensors header, and the header, of a file that stands at its start.

    Raises:
        ValueError, struct.error, RecursionError: it is not one.
    """
    (length,) = struct.unpack("<Q", file.read(8))
    if length > _HEADER_MAX:
        raise ValueError(f"its header would be {length} bytes long; {_HEADER_MAX} are read")
    text = file.read(length)
    _refuse_containers(text)
    header = json.loads(text, object_pairs_hook=_unique)
    if not isinstance(header, dict):
        raise ValueError("its header is not a table of tensors")
    return length, header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("it names something twice")
    return table


def _offsets(header: dict[str, Any]) -> list[tuple[int, int]]:
    spans = []
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        begin, end = tensor["data_offsets"]
        if not (isinstance(begin, int) and isinstance(end, int) and 0 <= begin <= end):
            raise ValueError(f"tensor {printable(name)[:80]} has impossible offsets")
        spans.append((begin, end))
    spans.sort()
    if any(begin < end for (_, end), (begin, _) in itertools.pairwise(spans)):
        raise ValueError("its tensors overlap")
    return spans


def _incomplete_safetensors(path: Path) -> str | None:
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            return f"holds {size} bytes, too few for a safetensors header"
        start = file.read(8)
        if len(start) < 8:
            return f"holds {len(start)} bytes, too few for a safetensors header"
        (length,) = struct.unpack("<Q", start)
        if length <= _HEADER_MAX and size < 8 + length:
            return f"holds {size} of the {8 + length} bytes of its header"
        file.seek(0)
        try:
            length, header = safetensors_header(file)
            spans = _offsets(header)
        except (ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
            return f"is no safetensors file ({printable(str(error))[:120]})"
    expected = 8 + length + max((end for _, end in spans), default=0)
    return None if size == expected else f"holds {size} bytes of the {expected} that its header tells"


def _safetensors_samples(path: Path) -> Iterator[bytes]:
    with open_file(path) as file:
        length, header = safetensors_header(file)
        file.seek(8)
        yield file.read(length)
    yield from _spread(path, [(8 + length + begin, 8 + length + end) for begin, end in _offsets(header)])


def _spread(path: Path, spans: list[tuple[int, int]], count: int = _BLOCKS) -> Iterator[bytes]:
    """``count`` samples spread evenly over each span (begin and end in bytes), its first and its last bytes among them."""
    descriptor = open_descriptor(path)
    try:
        for begin, end in spans:
            if end - begin <= count * _BLOCK:
                yield os.pread(descriptor, end - begin, begin)
                continue
            for i in range(count):
                yield os.pread(descriptor, _BLOCK, begin + (end - begin - _BLOCK) * i // (count - 1))
    finally:
        os.close(descriptor)
