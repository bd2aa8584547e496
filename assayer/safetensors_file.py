"""The header of a safetensors file: its tensors and where their bytes lie. Source: the safetensors format description.

Written here rather than left to the package, because its reader maps the whole file and hands out tensors, and a merge needs offsets.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assayer.content import safetensors_header
from assayer.errors import CheckpointError
from assayer.files import open_file, printable
from assayer.tensors import DTYPES, Dtype

__all__ = ["BY_NAME", "Span", "read_header"]

BY_NAME = {dtype.safetensors: dtype for dtype in DTYPES.values()}


@dataclass(frozen=True, slots=True)
class Span:
    """One tensor of a file: ``start`` counts from the file's first byte."""

    dtype: Dtype
    shape: tuple[int, ...]
    start: int


def read_header(path: Path) -> tuple[dict[str, Span], dict[str, Any]]:
    """The tensors of a safetensors file by name, and its free metadata.

    Raises:
        CheckpointError: the file is not whole, or no safetensors file.
        OSError: it cannot be read.
    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            length, header = safetensors_header(file)
        free = header.pop("__metadata__", None) or {}
        spans = {name: _span(name, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise CheckpointError(f"{printable(str(path))} is no whole safetensors file ({printable(str(error))[:120]})") from None
    end = max((span.start + _nbytes(span) for span in spans.values()), default=8 + length)
    if size < end:
        raise CheckpointError(f"{printable(str(path))} holds {size} bytes of the {end} that its header tells")
    return spans, free


def _span(name: str, entry: dict[str, Any], data: int) -> Span:
    begin, end = entry["data_offsets"]
    if entry["dtype"] not in BY_NAME:
        raise ValueError(f"{name} is of dtype {entry['dtype']}, which is not merged")
    shape = tuple(entry["shape"])
    span = Span(BY_NAME[entry["dtype"]], shape, data + begin)
    if any(not isinstance(n, int) or n < 0 for n in (*shape, begin)) or end - begin != _nbytes(span):
        raise ValueError(f"{name} has impossible offsets")
    return span


def _nbytes(span: Span) -> int:
    count = span.dtype.size
    for n in span.shape:
        count *= n
    return count
