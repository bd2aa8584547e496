"""What the scenes of merging share: checkpoints by hand, the command inside this process, and comparison bit by bit."""

import contextlib
import io
import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from assayer import cli
from assayer.merge.command import main

__all__ = [
    "Ended",
    "Held",
    "Part",
    "assert_same",
    "columns",
    "command",
    "dcp",
    "flip",
    "hollow",
    "metadata_of",
    "parts_in",
    "peak_memory",
    "place_of",
    "refused",
    "rewritten",
    "rows",
    "tensors_in",
]

REPOSITORY = Path(__file__).resolve().parents[2]

# Where a part of a tensor begins, and what it holds; and a tensor whole, or in parts.
Part = tuple[tuple[int, ...], torch.Tensor]
Held: TypeAlias = torch.Tensor | Sequence[Part]


@dataclass(frozen=True)
class Ended:
    """A command that has ended: its exit code, and what it said."""

    code: int
    out: str
    err: str


def command(*words: object) -> Ended:
    """``python -m assayer.merge <words>`` to its end, in this process."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["assayer.merge", *map(str, words)]
    code: object = None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.run(main, "python -m assayer.merge")
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.argv = before
    assert isinstance(code, int)
    return Ended(code, out.getvalue(), err.getvalue())


def refused(checkpoint: Path, output: Path, *words: object, code: int = 1) -> str:
    """The one line with which a merge is refused; nothing may be left behind by it."""
    before = set(output.parent.rglob("*")) if output.parent.exists() else None
    ended = command("--checkpoint_path", checkpoint, "--output_path", output, *words)
    assert ended.code == code, ended
    assert ended.out == ""
    assert ended.err.startswith("assayer: error: ") and ended.err.count("\n") == 1, ended.err
    if before is None:
        assert not output.parent.exists()
    else:
        assert set(output.parent.rglob("*")) == before
    return ended.err


def dcp(
    folder: Path,
    tensors: Mapping[str, Held],
    paths: Mapping[str, tuple[str, ...]] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Path:
    """A distributed checkpoint as torch lays it down: part n of a tensor lies in the file of rank n, each a torch.save archive.

    Args:
        folder: is made.
        tensors: whole, or in parts.
        paths: the planner's, for those whose name is not their path.
        shapes: of those whose parts do not tell it.
    """
    folder.mkdir(parents=True)
    files: dict[str, bytearray] = {}
    state: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for name, given in tensors.items():
        parts = [((0,) * given.dim(), given)] if isinstance(given, torch.Tensor) else list(given)
        ends = [[at + size for at, size in zip(begin, part.shape, strict=True)] for begin, part in parts]
        shape = torch.Size((shapes or {}).get(name) or [max(end) for end in zip(*ends, strict=True)])
        chunks = []
        for number, (begin, part) in enumerate(parts):
            file = f"__{number}_0.distcp"
            held = files.setdefault(file, bytearray())
            archive = io.BytesIO()
            torch.save(part.detach().clone(), archive)
            storage[MetadataIndex(name, torch.Size(begin), number)] = _StorageInfo(file, len(held), len(archive.getvalue()))
            held += archive.getvalue()
            chunks.append(ChunkStorageMetadata(torch.Size(begin), part.shape))
        state[name] = TensorStorageMetadata(TensorProperties(dtype=parts[0][1].dtype), shape, chunks)
    for file, data in files.items():
        (folder / file).write_bytes(data)
    planner = {name: (paths or {}).get(name, (name,)) for name in tensors}
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(state, planner, storage)))  # type: ignore[arg-type]
    return folder


def rows(tensor: torch.Tensor, count: int) -> list[Part]:
    """A tensor in ``count`` parts of its rows."""
    return _cut(tensor, count, 0)


def columns(tensor: torch.Tensor, count: int) -> list[Part]:
    """A tensor in ``count`` parts of its columns."""
    return _cut(tensor, count, 1)


def _cut(tensor: torch.Tensor, count: int, dim: int) -> list[Part]:
    parts, begin = [], 0
    for part in tensor.chunk(count, dim):
        parts.append((tuple(begin if d == dim else 0 for d in range(tensor.dim())), part))
        begin += part.shape[dim]
    return parts


def metadata_of(folder: Path) -> Any:
    """The metadata of a distributed checkpoint that was written here."""
    return pickle.loads((folder / ".metadata").read_bytes())


def rewritten(folder: Path, change: Callable[[Any], object]) -> Path:
    """Writes the metadata anew, changed."""
    metadata = metadata_of(folder)
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def place_of(folder: Path, name: str) -> tuple[Path, int]:
    """The file that holds a tensor's first part, and the byte in it where the part's first element lies."""
    index, place = next((index, place) for index, place in metadata_of(folder).storage_data.items() if index.fqn == name)
    del index
    path = folder / place.relative_path
    with path.open("rb") as file:
        file.seek(place.offset)
        data = file.read(place.length)
    header = data.index(b"/data/0")
    extra = int.from_bytes(data[header - len("archive") - 2 : header - len("archive")], "little")
    return path, int(place.offset) + header + len("/data/0") + extra


def flip(path: Path, position: int) -> None:
    """Turns one bit over, and leaves size and times of the file as they were."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a merged directory, by safetensors' own reader."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118
                assert name not in found
                found[name] = file.get_tensor(name)
    return found


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Names, dtypes, shapes and bytes are equal."""
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert _bits(found[name]).equal(_bits(tensor)), name


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def parts_in(folder: Path) -> Iterator[Path]:
    """Folders of merges that did not end."""
    return folder.rglob("*.part-*")


# The peak of a process counts what the one that started it held: this one holds little.
_MEASURED = "import os, sys; p = os.posix_spawn(sys.executable, [sys.executable, *sys.argv[1:]], os.environ); _, s, u = os.wait4(p, 0); "
_MEASURED += "print(u.ru_maxrss); sys.exit(os.waitstatus_to_exitcode(s))"


def peak_memory(*words: object) -> int:
    """The largest resident memory, in bytes, of ``python -m assayer.merge <words>``, which must end well."""
    command = [sys.executable, "-S", "-c", _MEASURED, "-m", "assayer.merge", *map(str, words)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) << 10


def hollow(path: Path, dtype: str, shape: tuple[int, ...], begin: tuple[int, ...] | None = None, name: str = "w") -> Path:
    """A safetensors file with one tensor of zeros that takes no room on the disk; with ``begin`` one rank's part of it."""
    size = {"F32": 4, "F8_E4M3": 1}[dtype] * math.prod(shape)
    header: dict[str, object] = {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}
    if begin is not None:
        header["__metadata__"] = {"DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": begin}})}
    text = json.dumps(header).encode()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + size)
    return path
