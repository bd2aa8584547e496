"""torch's distributed checkpoint: ``__<rank>_<n>.distcp`` files and one ``.metadata``, written last under its name.

Each item in a ``.distcp`` file is a whole ``torch.save`` archive; ``.metadata`` is a pickle that says which part of which tensor lies
where (torch/distributed/checkpoint/metadata.py, filesystem.py). It is read with inert classes, and above ``_SMALL`` bytes in a child
process of limited memory. A save over an older checkpoint rewrites the shards first: then they are younger than ``.metadata``.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from assayer.checkpoint import Listing, Position
from assayer.containers import model_names
from assayer.content import METADATA_MAX, read_limited
from assayer.errors import CheckpointError
from assayer.files import printable
from assayer.formats import single_file
from assayer.pickles import Inert, read_metadata, text_of
from assayer.sealed import sealed
from assayer.tensors import DTYPES, Dtype, Piece, Tensor, cover, dtype_of

REFINES: tuple[str, ...] = ()
FOLDERS = ""
RESUMING = ""
SHARDED = True

# Folders of other formats that hold an optimizer alone.
_PART = re.compile(r"optim(izer)?(_\d+)?")
METADATA = ".metadata"
SHARD = re.compile(r"__\d+_\d+\.distcp")

# Characters of a name that a sentence shows.
_SHOWN = 200
# Bytes of a `.metadata` that is read in this process, by the reader whose memory is bounded by its input.
_SMALL = 256 << 10
# A larger one may take so many bytes, and so many for each of its own, in a child (measured: about 12 for each).
_MEMORY, _MEMORY_EACH = 512 << 20, 24
# Seconds of a processor for it, and for each MiB (measured: a twentieth of one).
_SECONDS = 2
# Words of the way to a tensor.
_PATH_MAX = 100


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor that a `.metadata` tells of: the way to it in the state dict, and an extension that its bytes went through, if any."""

    path: tuple[str, ...]
    tensor: Tensor
    extension: str | None


def claims(listing: Listing) -> bool:
    return listing.is_directory and has_shards(listing, "") and not _PART.fullmatch(listing.name)


def missing(listing: Listing) -> str | None:
    return missing_in(listing, "")


def unmarked(listing: Listing) -> str | None:
    return None


def position(listing: Listing) -> Position:
    return single_file.position_in(listing.name)


def weights(listing: Listing) -> tuple[str, ...]:
    return weights_in(listing, "")


def variants(listing: Listing) -> tuple[str, ...]:
    """A directory of names alone does not tell whether a moving average lies in it; asking for one that is not there is an error."""
    return ("regular", "ema") if missing(listing) is None and _has_ema(listing) else ("regular",)


def tensors(listing: Listing, variant: str) -> list[Tensor]:
    return chosen(read(listing, ""), variant)


def _has_ema(listing: Listing) -> bool:
    try:
        model_names((stored.path for stored in read(listing, "")), "ema")
    except CheckpointError:
        return False
    return True


def has_shards(listing: Listing, folder: str) -> bool:
    """True when a folder of the listing ("" for itself) holds shards of a distributed checkpoint, finished or not."""
    return any(SHARD.fullmatch(name) for name in listing.in_folder(folder))


def weights_in(listing: Listing, folder: str) -> tuple[str, ...]:
    """`.metadata` and the shards of one folder; a rank that had nothing to save leaves an empty file, which counts for nothing."""
    prefix = f"{folder}/" if folder else ""
    kept = listing.in_folder(folder)
    sizes = {e.name: e.size for e in listing.entries}
    return tuple(sorted(prefix + n for n in kept if n == METADATA or (SHARD.fullmatch(n) and sizes[prefix + n])))


def missing_in(listing: Listing, folder: str, metadata: Sequence[str] = (METADATA,)) -> str | None:
    """Why the distributed checkpoint in a folder of the listing cannot be whole yet."""
    prefix = f"{folder}/" if folder else ""
    entries = {entry.name: entry for entry in listing.entries}
    for name in metadata:
        told = entries.get(prefix + name)
        if told is None:
            return f"no {prefix}{name} yet"
        if told.size == 0:
            return f"{prefix}{name} is empty"
        try:
            ends = dict(_parsed(listing.file(prefix + name), _ends))
        except CheckpointError as error:
            return f"{prefix}{name} {error}"
        for file, end in sorted(ends.items()):
            shard = entries.get(prefix + file)
            if shard is None:
                return f"{_shown(prefix + file)} is missing"
            if shard.size < end:
                return f"{_shown(prefix + file)} holds {shard.size} bytes of the {end} that {name} tells"
            if shard.mtime_ns > told.mtime_ns:
                return (
                    f"{_shown(prefix + file)} is younger than {name}: it is being saved again, or that broke off "
                    f"(of a copy that is known to be whole, touch {name})"
                )
    return None


def read(listing: Listing, folder: str, metadata: Sequence[str] = (METADATA,)) -> list[Stored]:
    """Every tensor that the folder's metadata tells of; the files of several metadata are put together.

    Raises:
        CheckpointError: the metadata is damaged or hostile, or names a file that is not in the folder.
        OSError: it cannot be read.
    """
    prefix = f"{folder}/" if folder else ""
    names = listing.in_folder(folder)
    found: dict[str, Stored] = {}
    for told in metadata:
        try:
            for key, path, dtype, shape, pieces, extension in _parsed(listing.file(prefix + told), _rows):
                _refuse_names({piece[2] for piece in pieces}, names)
                made = [Piece(prefix + file, tuple(begin), tuple(sizes), start, length) for begin, sizes, file, start, length in pieces]
                stored = found.get(key)
                if stored is None:
                    # An optimizer may hold what safetensors cannot; what the model holds is looked at when it is chosen.
                    tensor = Tensor(key, DTYPES.get(dtype) or Dtype(dtype, "", 1, False), tuple(shape), made)
                    found[key] = Stored(tuple(path), tensor, extension)
                elif stored.tensor.shape != tuple(shape):
                    raise CheckpointError(f"tells another shape of {printable(key)} than the other ranks")
                else:
                    stored.tensor.pieces = [*stored.tensor.pieces, *made]
        except CheckpointError as error:
            raise CheckpointError(f"{printable(str(listing.file(prefix + told)))} {error}") from None
    return list(found.values())


def chosen(stored: list[Stored], variant: str) -> list[Tensor]:
    """The model's tensors among all, by the model's names; each is checked to be there without gap or overlap."""
    names = model_names([s.path for s in stored], variant)
    kept = []
    for item in stored:
        if item.path in names:
            if item.extension:
                raise CheckpointError(
                    f"{printable(names[item.path])} was saved through the extension {printable(item.extension)}; --reader torch may read it"
                )
            dtype_of(item.tensor.dtype.torch, names[item.path])
            item.tensor.name = names[item.path]
            cover(item.tensor)
            kept.append(item.tensor)
    return kept


def _refuse_names(files: set[str], names: frozenset[str]) -> None:
    for file in files - names:
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise CheckpointError(f"names a file outside of the checkpoint: {_shown(file)}")
        raise CheckpointError(f"names the file {_shown(file)}, which is missing")


def _shown(name: str) -> str:
    """A name from a file that may hold anything, short enough for a sentence."""
    return printable(name if len(name) <= _SHOWN else f"{name[:_SHOWN]}...")


def _parsed(path: Path, extract: Callable[[Inert], Iterator[Any]]) -> Iterator[Any]:
    size = os.stat(path).st_size
    if size <= _SMALL:
        try:
            yield from extract(read_metadata(read_limited(path, _SMALL)))
        except (TypeError, AttributeError, ValueError, LookupError) as error:
            raise CheckpointError(f"has an impossible form ({printable(str(error))[:120]})") from None
        return
    if size > METADATA_MAX:
        raise CheckpointError(f"holds {size} bytes; {METADATA_MAX} are read")

    def read_and_extract() -> Iterator[Any]:
        return extract(read_metadata(read_limited(path, METADATA_MAX), bounded=True))

    yield from sealed(read_and_extract, _MEMORY + _MEMORY_EACH * size, _SECONDS * (1 + (size >> 20)))


def _ends(metadata: Inert) -> Iterator[list[Any]]:
    """Each file with the byte behind the last item in it."""
    ends: dict[str, int] = {}
    for info in _table(metadata, "storage_data").values():
        file, offset, length = _place(info)
        ends[file] = max(ends.get(file, 0), offset + length)
    for file, end in ends.items():
        yield [file, end]


def _rows(metadata: Inert) -> Iterator[list[Any]]:
    """For each tensor its key, path, dtype, shape, pieces (begin, sizes, file, offset, length) and extension."""
    places: dict[str, dict[tuple[int, ...], Any]] = {}
    for index, info in _table(metadata, "storage_data").items():
        offset = index.field("offset") if isinstance(index, Inert) else None
        if offset is not None:
            places.setdefault(index.field("fqn"), {})[tuple(offset)] = info
    paths = metadata.field("planner_data")
    tensors = {k: v for k, v in _table(metadata, "state_dict_metadata").items() if isinstance(v, Inert) and v.field("chunks") is not None}
    guess = _Guess(tensors) if not isinstance(paths, dict) else None
    for key, value in tensors.items():
        path = guess.path(key) if guess else paths.get(key, (key,)) if isinstance(paths, dict) else (key,)
        if not isinstance(path, tuple | list) or not 0 < len(path) <= _PATH_MAX:
            raise CheckpointError(f"tells no way to {printable(str(key))}")
        properties = value.field("properties")
        state = properties.state if isinstance(properties, Inert) else None
        dtype = state[0] if isinstance(state, tuple) and state else state.get("dtype") if isinstance(state, dict) else None
        pieces, extension = [], None
        for chunk in value.field("chunks"):
            begin, sizes = _numbers(chunk.field("offsets")), _numbers(chunk.field("sizes"))
            info = places.get(key, {}).get(begin)
            if info is None:
                raise CheckpointError(f"does not say where the part of {printable(str(key))} at {list(begin)} lies")
            pieces.append([begin, sizes, *_place(info)])
            extension = extension or info.field("transform_descriptors")
        yield [
            key,
            [text_of(p) for p in path],
            text_of(dtype),
            _numbers(value.field("size")),
            pieces,
            text_of(extension[0]) if extension else None,
        ]


class _Guess:
    """Paths for metadata without planner data: the first word counts as a container where it stands beside an optimizer's."""

    def __init__(self, keys: dict[str, Any]) -> None:
        first = {key.partition(".")[0] for key in keys}
        self._nested = any(word.startswith("optim") for word in first) and bool(first & {"model", "state_dict"})

    def path(self, key: str) -> tuple[str, ...]:
        first, dot, rest = key.partition(".")
        return (first, rest) if dot and (self._nested or first.startswith("optim")) else (key,)


def _table(metadata: Inert, name: str) -> dict[Any, Any]:
    table = metadata.field(name)
    if not isinstance(table, dict):
        raise CheckpointError(f"has no table {name}")
    return table


def _place(info: Any) -> tuple[str, int, int]:
    file, offset, length = (info.field(name) if isinstance(info, Inert) else None for name in ("relative_path", "offset", "length"))
    if not (isinstance(file, str) and isinstance(offset, int) and isinstance(length, int) and offset >= 0 and length > 0):
        raise CheckpointError("names an impossible place in a file")
    return file, offset, length


def _numbers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or any(not isinstance(n, int) or n < 0 for n in value):
        raise CheckpointError("holds an impossible shape")
    return tuple(value)
