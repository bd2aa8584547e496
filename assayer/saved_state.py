"""A state of JSON, tensors and arrays <-> one safetensors file, without pickle; a file that was cut or changed is known by its digest.

The file's first tensor, ``json`` (U8), holds the tree, in which each tensor or array is a number; the others are called by these numbers.
Written here rather than left to the safetensors package, whose dtypes differ from version to version, and whose two ways to write take
either tensors or arrays.
"""

import json
import os
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from assayer.content import safetensors_header
from assayer.errors import StateError
from assayer.files import digest, open_file, printable
from assayer.safetensors_file import BY_NAME
from assayer.tensors import DTYPES

__all__ = ["ALLOWED", "Frozen", "freeze", "pack", "thaw", "unpack"]

ALLOWED = "dict with str keys, list, tuple, str, int, float, bool, None, torch tensors, numpy arrays and numbers"

# The layout of these files; one of another version starts over.
_FORMAT = "assayer progress 1"
_NO_DIGEST = "0" * len(digest())

# How deep lists and tables may be nested (Python reads no JSON of 1,000), the tensors of one file, and the bits of an integer
# (Python turns no longer one into text).
_DEPTH_MAX, _TENSORS_MAX, _BITS_MAX = 200, 100_000, 14_000

# A table with this key is one of ours: a tuple, a tensor, an array, or a table of the user's that has the key too.
_MARK = "$"

_SCALARS = frozenset({str, float, bool, type(None)})


@dataclass(frozen=True, slots=True)
class _Array:
    """The bytes of one tensor or array, in C order, little-endian; ``dtype`` is torch's name."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True, slots=True)
class Frozen:
    """A state as it was at one moment: its tree as JSON, and the arrays that the tree names by their places in the list."""

    text: str
    arrays: tuple[_Array, ...] = ()


def freeze(value: object, name: str = "state") -> Frozen:
    """A copy of ``value`` that nothing changes any more; tensors are copied from whatever device they are on.

    Raises:
        TypeError: something in it is not one of ``ALLOWED``, also a subclass of these, which would come back as something else; the
            message says where, beginning with ``name``.
    """
    freezer = _Freezer(name)
    return Frozen(json.dumps(freezer.plain(value), separators=(",", ":")), tuple(freezer.arrays))


class _Freezer:
    """One walk through a state; ``trail`` is the way from its root to where the walk is."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.trail: list[str | int] = []
        self.arrays: list[_Array] = []

    def plain(self, value: object) -> object:
        kind = type(value)
        if kind in _SCALARS:
            return value
        if isinstance(value, int) and kind is int:
            if value.bit_length() > _BITS_MAX:
                raise self.error(f"is an integer of {value.bit_length()} bits; {_BITS_MAX} are stored")
            return value
        if len(self.trail) >= _DEPTH_MAX:
            raise TypeError(f"{self.name} is nested more than {_DEPTH_MAX} deep, or holds itself")
        if isinstance(value, dict) and kind is dict:
            return self.table(value)
        if isinstance(value, list) and kind is list:
            return self.items(value)
        if isinstance(value, tuple) and kind is tuple:
            return {_MARK: "tuple", "of": self.items(value)}
        return self.array(value)

    def items(self, values: list[Any] | tuple[Any, ...]) -> list[object]:
        return [value if type(value) in _SCALARS else self.below(place, value) for place, value in enumerate(values)]

    def table(self, values: dict[Any, Any]) -> object:
        for key in values:
            if type(key) is not str:
                raise self.error(f"has the key {key!r}, of type {type(key).__name__}; keys must be str")
        found = {key: value if type(value) in _SCALARS else self.below(key, value) for key, value in values.items()}
        return {_MARK: "dict", "of": [[key, value] for key, value in found.items()]} if _MARK in found else found

    def below(self, step: str | int, value: object) -> object:
        self.trail.append(step)
        found = self.plain(value)
        self.trail.pop()
        return found

    def array(self, value: Any) -> object:
        # What is not imported, nothing can be an instance of.
        torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
        if torch and isinstance(value, torch.Tensor):
            return self.add("torch", self.of_torch(torch, value))
        if numpy and (type(value) is numpy.ndarray or isinstance(value, numpy.generic)):
            return self.add("array" if isinstance(value, numpy.ndarray) else "number", self.of_numpy(value))
        raise self.error(f"is a {type(value).__module__}.{type(value).__qualname__}; a state holds {ALLOWED}".replace("builtins.", ""))

    def of_torch(self, torch: Any, tensor: Any) -> _Array:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided or tensor.is_meta:
            raise self.error(f"is a {type(tensor).__name__} ({tensor.layout}, {tensor.device}); a state holds plain, dense tensors")
        dtype = str(tensor.dtype).removeprefix("torch.")
        self.check_dtype(dtype)
        flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        return _Array(dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes())

    def of_numpy(self, array: Any) -> _Array:
        little = array.dtype.newbyteorder("<")
        # Another package's bfloat16 would not be known to whoever reads it.
        self.check_dtype(array.dtype.name if array.dtype.type.__module__ == "numpy" else str(array.dtype))
        return _Array(array.dtype.name, array.shape, array.astype(little, copy=False).tobytes())

    def check_dtype(self, dtype: str) -> None:
        if dtype not in DTYPES:
            raise self.error(f"is of dtype {dtype}; a state holds {', '.join(DTYPES)}")

    def add(self, kind: str, array: _Array) -> object:
        if len(self.arrays) >= _TENSORS_MAX:
            raise self.error(f"is one tensor too many; a state holds {_TENSORS_MAX}: stack them, or take .item() of single numbers")
        self.arrays.append(array)
        return {_MARK: kind, "of": len(self.arrays) - 1}

    def error(self, text: str) -> TypeError:
        return TypeError(f"{self.name}{''.join(f'[{step!r}]' for step in self.trail)} {text}")


def thaw(frozen: Frozen) -> Any:
    """A new copy of the state: torch tensors on the CPU and without gradient, numpy arrays in C order, all of them writable."""

    def revive(table: dict[str, Any]) -> Any:
        kind = table.get(_MARK)
        if kind is None:
            return table
        if kind in ("tuple", "dict"):
            return tuple(table["of"]) if kind == "tuple" else dict(table["of"])
        array = frozen.arrays[table["of"]]
        if kind == "torch":
            return _to_torch(array)
        return _to_numpy(array) if kind == "array" else _to_numpy(array)[()]

    return json.loads(frozen.text, object_hook=revive)


def _to_torch(array: _Array) -> Any:
    import torch

    dtype = getattr(torch, array.dtype)
    # An empty buffer is refused.
    return (
        torch.frombuffer(bytearray(array.data), dtype=dtype).reshape(array.shape) if array.data else torch.empty(array.shape, dtype=dtype)
    )


def _to_numpy(array: _Array) -> Any:
    import numpy as np

    little = np.ndarray(array.shape, np.dtype(array.dtype).newbyteorder("<"), bytearray(array.data))
    return little.astype(np.dtype(array.dtype), copy=False)


def pack(facts: Mapping[str, Any], parts: Mapping[str, Frozen]) -> bytes:
    """The file's bytes: ``facts`` (JSON) and frozen states by name. They are put together in memory."""
    told = ",".join(f"{json.dumps(name)}:[{len(part.arrays)},{part.text}]" for name, part in parts.items())
    text = f'{{"facts":{json.dumps(facts)},"parts":{{{told}}}}}'.encode()
    # Arrays begin at a multiple of eight bytes.
    tree = _Array("uint8", (), text + b" " * (-len(text) % 8))
    table: dict[str, object] = {"__metadata__": {"digest": _NO_DIGEST, "format": _FORMAT}}
    arrays = [tree, *(array for part in parts.values() for array in part.arrays)]
    position = 0
    for place, array in enumerate(arrays):
        end = position + len(array.data)
        shape = list(array.shape) if place else [end]
        table[str(place - 1) if place else "json"] = {
            "dtype": DTYPES[array.dtype].safetensors,
            "shape": shape,
            "data_offsets": [position, end],
        }
        position = end
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    body = b"".join(array.data for array in arrays)
    header = header.replace(_NO_DIGEST.encode(), digest(header, body).encode(), 1)
    return b"".join((len(header).to_bytes(8, "little"), header, body))


def unpack(path: Path) -> tuple[dict[str, Any], dict[str, Frozen]]:
    """The facts and frozen states that ``pack`` has put into a file. A link is not followed.

    Raises:
        StateError: it cannot be read, was cut or changed, or is no such file; the text is the reason alone.
    """
    try:
        header, table, body = _read(path)
        told = table["__metadata__"]
        if told["format"] != _FORMAT:
            raise StateError(f"is of the format {printable(str(told['format']))[:60]}, not {_FORMAT}")
        blank = header.replace(told["digest"].encode(), _NO_DIGEST.encode(), 1)
        if digest(blank, body) != told["digest"]:
            raise StateError("was damaged: its digest differs")
        begin, end = table["json"]["data_offsets"]
        tree = json.loads(body[begin:end])
        arrays = [_array(table[str(place)], body) for place in range(len(table) - 2)]
        parts = {}
        for name, (count, value) in tree["parts"].items():
            parts[name] = Frozen(json.dumps(value, separators=(",", ":")), tuple(arrays[:count]))
            arrays = arrays[count:]
        return tree["facts"], parts
    except OSError as error:
        raise StateError(f"cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, struct.error) as error:
        raise StateError(f"is no file of a state ({printable(str(error))[:120]})") from None


def _read(path: Path) -> tuple[bytes, dict[str, Any], bytes]:
    """The header as bytes and as a table, and what follows it; no more is read than the header tells."""
    with open_file(path, os.O_NOFOLLOW) as file:
        size = os.fstat(file.fileno()).st_size
        length, table = safetensors_header(file)
        expected = 8 + length + max((entry["data_offsets"][1] for name, entry in table.items() if name != "__metadata__"), default=0)
        if size != expected:
            raise StateError(f"holds {size} bytes of the {expected} that its header tells")
        file.seek(8)
        return file.read(length), table, file.read(expected - 8 - length)


def _array(entry: dict[str, Any], body: bytes) -> _Array:
    begin, end = entry["data_offsets"]
    dtype, shape = BY_NAME[entry["dtype"]], tuple(entry["shape"])
    if end - begin != dtype.size * prod(shape):
        raise ValueError("a tensor of an impossible size")
    return _Array(dtype.torch, shape, body[begin:end])
