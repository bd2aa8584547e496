"""A ``torch.save`` file as its tensors: the nested state dict's paths and where each one's bytes lie. Nothing of it is run.

Sources: torch/serialization.py (``_save``; and ``_legacy_save`` for the form before 1.6: five pickles, then each storage with its
number of elements before it).
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assayer.archive import Record, read_bytes, read_checked, records_of
from assayer.errors import CheckpointError, RefusedError
from assayer.files import open_descriptor, printable
from assayer.pickles import Inert, Local, Sharded, Unsupported, read_objects, read_tree, text_of
from assayer.tensors import DTYPES, Piece, Tensor, dtype_of, piece_of

__all__ = ["TorchFile", "leaves", "read_torch_file", "whole_tensors"]

# Entries of a state dict, and how deep they lie: a few bytes of a pickle can hold themselves, or one part under a million names.
_PARTS_MAX, _DEPTH_MAX = 10_000_000, 100
# Bytes of a description; a file of ten thousand DTensors takes ten million.
_DESCRIPTION_MAX = 64 << 20
# torch's own mark of a file from before 1.6.
_MAGIC = 0x1950A86A20F9469CFC6C
Leaf = Local | Sharded | Unsupported


@dataclass(frozen=True)
class TorchFile:
    """``name`` below the checkpoint, its nested content (``tree``) and the records that hold its storages."""

    name: str
    tree: Any
    records: dict[str, Record]


def read_torch_file(path: Path, name: str, limit: int = _DESCRIPTION_MAX) -> TorchFile:
    """What a ``torch.save`` file holds, of which the description of its tensors has at most ``limit`` bytes.

    Raises:
        CheckpointError: it is not whole, or asks for a call of a name that is not on the list.
        OSError: it cannot be read.
    """
    descriptor = open_descriptor(path)
    try:
        size = os.fstat(descriptor).st_size
        if os.pread(descriptor, 4, 0) != b"PK\x03\x04":
            return _legacy(descriptor, size, name, limit)
        records = records_of(descriptor, 0, size)
        description, order = records.get("data.pkl"), records.get("byteorder")
        if description is None:
            raise CheckpointError("is a zip, and none of torch.save's (TorchScript is not read)")
        if description.length > limit:
            raise RefusedError(f"describes its tensors in {description.length} bytes; {limit} are read")
        if order and read_bytes(descriptor, min(order.length, 16), order.start) != b"little":
            raise CheckpointError("is in another byte order than little-endian; --reader torch reads it")
        return TorchFile(name, read_tree(read_checked(descriptor, description, "the description of its tensors")), records)
    except (TypeError, AttributeError, ValueError, LookupError) as error:
        raise CheckpointError(f"{printable(str(path))} holds no state dict that can be read ({printable(str(error))[:120]})") from None
    except CheckpointError as error:
        raise type(error)(f"{printable(str(path))} {error}") from None
    finally:
        os.close(descriptor)


def _legacy(descriptor: int, size: int, name: str, limit: int) -> TorchFile:
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        magic, _, system, tree = read_objects(file, limit, 4)
        if magic != _MAGIC or not isinstance(system, dict) or not system.get("little_endian", True):
            raise CheckpointError("holds no torch.save data (neither a zip nor a pickle of torch's)")
        (keys,) = read_objects(file, limit, 1)
        sizes = {leaf.key: DTYPES[leaf.dtype].size for _, leaf in _locals(tree) if leaf.dtype in DTYPES}
        records = {}
        position = file.tell()
        for key in map(text_of, keys):
            count = int.from_bytes(read_bytes(descriptor, 8, position), "little")
            length = count * sizes.get(key, 0)
            if key not in sizes or position + 8 + length > size:
                raise CheckpointError(f"ends before the {length} bytes of its storage {printable(key)}")
            records[f"data/{key}"] = Record(position + 8, length, None)
            position += 8 + length
    return TorchFile(name, tree, records)


def leaves(tree: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Leaf]]:
    """Every tensor in a nested state dict with its path; lists count by position, objects of other classes are passed over.

    Raises:
        CheckpointError: it holds itself, or the same parts under more names than any state dict has.
    """
    todo: list[tuple[tuple[str, ...], Any]] = [(above, tree)]
    passed = 0
    while todo:
        path, value = todo.pop()
        passed += 1
        if passed > _PARTS_MAX or len(path) > _DEPTH_MAX:
            raise CheckpointError("holds a state dict that is nested without end")
        if isinstance(value, Local | Sharded | Unsupported):
            yield path, value
        elif isinstance(value, dict | list | tuple):
            inner = value.items() if isinstance(value, dict) else enumerate(value)
            todo += [((*path, str(key)), item) for key, item in reversed(list(inner))]
        elif isinstance(value, Inert) and value.items:
            todo += [((*path, str(key)), item) for key, item in value.items.items()]


def _locals(tree: Any) -> Iterator[tuple[tuple[str, ...], Local]]:
    for path, leaf in leaves(tree):
        if isinstance(leaf, Sharded):
            leaf = leaf.local or Unsupported("an empty shard")
        if isinstance(leaf, Local):
            yield path, leaf


def whole_tensors(file: TorchFile, names: dict[tuple[str, ...], str]) -> list[Tensor]:
    """The tensors under these paths, by these names; each is whole in this file.

    Raises:
        CheckpointError: one is sharded, or of a kind that is not merged.
    """
    found = []
    for path, leaf in leaves(file.tree):
        name = names.get(path)
        if name is None:
            continue
        if not isinstance(leaf, Local):
            kind = leaf.kind if isinstance(leaf, Unsupported) else "one rank's share of a sharded tensor"
            raise CheckpointError(f"{printable(file.name)} holds {printable(name)} as {printable(kind)}; --reader torch may read it")
        dtype = dtype_of(leaf.dtype, name)
        pieces: list[Piece] = []
        if 0 not in leaf.size:
            pieces = [piece_of(file.name, leaf, file.records, (0,) * len(leaf.size), leaf.size, dtype)]
        found.append(Tensor(name, dtype, leaf.size, pieces))
    return found
