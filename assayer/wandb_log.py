"""What W&B has written on this machine: the rows in a run's ``.wandb`` file.

The file is a log as LevelDB keeps it (github.com/google/leveldb, doc/log_format.md) behind a header of seven bytes, with zlib's CRC32 in
place of CRC32C; its records are protocol buffers of W&B's own. W&B reads them in Go (earlier versions in Python, too:
wandb/sdk/internal/datastore.py).
"""

import importlib
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from assayer.files import open_file

__all__ = ["records", "rows"]

_HEADER = b":W&B\xe1\xbe\x00"
_BLOCK = 32768
_CHUNK = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[bytes]:
    """The data of every whole record in the file; ends before what a killed writer has left half.

    Raises:
        OSError: it cannot be read.
    """
    with open_file(path) as file:
        data = file.read()
    if not data.startswith(_HEADER):
        return
    at, parts = len(_HEADER), b""
    while at + _CHUNK.size <= len(data):
        if _BLOCK - at % _BLOCK < _CHUNK.size:
            # The rest of a block that holds no further head.
            at += _BLOCK - at % _BLOCK
            continue
        crc, length, kind = _CHUNK.unpack_from(data, at)
        chunk = data[at + _CHUNK.size : at + _CHUNK.size + length]
        if len(chunk) < length or zlib.crc32(bytes([kind]) + chunk) != crc:
            return
        at += _CHUNK.size + length
        parts = chunk if kind in (_FULL, _FIRST) else parts + chunk
        if kind in (_FULL, _LAST):
            yield parts


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Every row of history in the file, by the names of its values.

    Raises:
        OSError: it cannot be read.
        ModuleNotFoundError: W&B, which knows its own records, is not installed.
    """
    # Under a name that a type checker does not follow: the module is generated, and not typed.
    protocol: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    for data in records(path):
        record = protocol.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
