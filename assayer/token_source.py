"""Where tokens come from: token files, texts, JSONL files, saved datasets, found and checked by names and headers alone.

Files of a pattern stand in natural order (``part9`` before ``part10``). Nothing is ever unpickled, and no dtype is guessed.
"""

import glob
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from assayer.documents import Array, json_lines
from assayer.errors import EvaluatorError
from assayer.files import digest, natural_key, printable, read_json

__all__ = ["BIN_DTYPES", "Source", "find", "mapped"]

# Little-endian, as every machine that trains writes them.
BIN_DTYPES = ("uint8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
# What a document is called in a JSONL file or a dataset; tokens come before the text that they were made of.
_COLUMNS = ("input_ids", "text")
# Endings of files that hold no plain text.
_NO_TEXT = (".npz", ".json", ".parquet", ".arrow", ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".pt", ".pth", ".pkl", ".safetensors")
_FORMS = (
    "give a .npy or .bin file of tokens, a text or .jsonl file, a pattern of files of one of these kinds, or the folder of a saved dataset"
)
# A digest is made of this many blocks of each file, evenly spaced, and of so many bytes of each.
_BLOCKS, _BLOCK = 64, 4096


@dataclass(frozen=True)
class Source:
    """Files of one kind (``npy``, ``bin``, ``text``, ``jsonl``, ``dataset``: its folder), in their order."""

    kind: str
    files: tuple[Path, ...]
    column: str = ""
    bin_dtype: str = ""

    @property
    def is_text(self) -> bool:
        """True when a tokenizer is needed."""
        return self.kind == "text" or self.column == "text"

    def digest(self) -> str:
        """Of the names and sizes of all files, and of 64 evenly spaced blocks of each, and of how they are read."""
        files = [file for place in self.files for file in (_data_files(place) if self.kind == "dataset" else [place])]
        return digest(self.kind, self.column, self.bin_dtype, *itertools.chain.from_iterable(map(_sampled, files)))


def _data_files(folder: Path) -> list[Path]:
    """A saved dataset's own files; what ``datasets`` has cached beside them is left out."""
    return sorted(file for file in folder.iterdir() if file.suffix in (".arrow", ".json") and not file.name.startswith("cache-"))


def _sampled(file: Path) -> Iterator[str | bytes]:
    with file.open("rb") as opened:
        size = opened.seek(0, os.SEEK_END)
        yield f"{file.name} {size}"
        last = max(0, size - _BLOCK)
        for place in sorted({last * i // (_BLOCKS - 1) for i in range(_BLOCKS)}):
            opened.seek(place)
            yield opened.read(_BLOCK)


def find(data: str, bin_dtype: str | None = None, split: str | None = None) -> Source:
    """What ``data`` means: a file, a pattern of files of one kind, or the folder of a saved dataset. Little more than headers is read.

    Args:
        bin_dtype: of ``.bin`` files, one of ``BIN_DTYPES``; it is required for these, and never guessed.
        split: of a saved dataset that has several.

    Raises:
        EvaluatorError: nothing is there, it is of no kind that is known, or it cannot be what it is said to be.
    """
    if not isinstance(data, str) or not data:
        raise EvaluatorError(f"data {printable(str(data))!r} is no path; {_FORMS}")
    path = Path(data).expanduser()
    if path.is_dir():
        return _dataset(path, split, bin_dtype)
    if split is not None:
        raise EvaluatorError("split is for saved datasets; leave it out")
    files = (
        [path]
        if path.exists()
        else sorted((Path(name) for name in glob.glob(str(path), recursive=True)), key=lambda p: natural_key(str(p)))
    )
    if not files:
        raise EvaluatorError(f"data {printable(data)}: there is no such file; {_FORMS}")
    kinds = {_kind(file): file for file in files}
    if len(kinds) > 1:
        names = " and ".join(printable(str(file)) for file in list(kinds.values())[:2])
        raise EvaluatorError(f"data {printable(data)} means files of several kinds ({names}); give a pattern of one kind")
    kind = next(iter(kinds))
    _check_bin_dtype(kind, bin_dtype)
    source = Source(kind, tuple(files), _column_of_lines(files[0]) if kind == "jsonl" else "", (bin_dtype or "") if kind == "bin" else "")
    if kind in ("npy", "bin"):
        for file in files:
            mapped(file, source)
    return source


def _kind(file: Path) -> str:
    ending = file.suffix.lower()
    if not file.is_file():
        raise EvaluatorError(f"data {printable(str(file))} is not a file; {_FORMS}")
    if ending in _NO_TEXT:
        raise EvaluatorError(f"data {printable(str(file))}: {ending} is not read; {_FORMS}")
    return {".npy": "npy", ".bin": "bin", ".jsonl": "jsonl"}.get(ending, "text")


def _check_bin_dtype(kind: str, bin_dtype: str | None) -> None:
    if kind != "bin" and bin_dtype is not None:
        raise EvaluatorError("bin_dtype is for .bin files; leave it out")
    if kind == "bin" and bin_dtype not in BIN_DTYPES:
        told = "" if bin_dtype is None else f"bin_dtype {printable(str(bin_dtype))} is not known: "
        raise EvaluatorError(f"{told}a .bin file does not say what it holds; give -E bin_dtype= one of {', '.join(BIN_DTYPES)}")


def _column_of_lines(file: Path) -> str:
    where, first = next(json_lines(file), (printable(str(file)), {}))
    return _column(first, where)


def _column(names: dict[str, Any], where: str) -> str:
    for column in _COLUMNS:
        if column in names:
            return column
    raise EvaluatorError(f"data {where} has neither {' nor '.join(_COLUMNS)}, but {printable(', '.join(map(str, names))) or 'nothing'}")


def _dataset(folder: Path, split: str | None, bin_dtype: str | None) -> Source:
    where = printable(str(folder))
    _check_bin_dtype("dataset", bin_dtype)
    splits = read_json(folder / "dataset_dict.json")
    if isinstance(splits, dict) and isinstance(splits.get("splits"), list):
        names = [str(name) for name in splits["splits"]]
        if split is None and len(names) == 1:
            split = names[0]
        if split not in names:
            told = "" if split is None else f", and no {printable(split)!r}"
            raise EvaluatorError(f"data {where} has the splits {printable(', '.join(names))}{told}; give one with -E split=")
        folder = folder / split
    elif split is not None:
        raise EvaluatorError(f"data {where} has no splits; leave split out")
    facts = read_json(folder / "dataset_info.json")
    if not (folder / "state.json").is_file() or not isinstance(facts, dict) or not isinstance(facts.get("features"), dict):
        raise EvaluatorError(f"data {where} is a folder, and not one that a dataset's save_to_disk has written; {_FORMS}")
    return Source("dataset", (folder,), _column(facts["features"], where))


def mapped(file: Path, source: Source) -> Array:
    """The tokens of a token file (``npy`` or ``bin``), mapped into memory, row after row.

    Raises:
        EvaluatorError: it cannot be read, or does not hold what it should.
    """
    where = f"data {printable(str(file))}"
    try:
        size = file.stat().st_size
        if source.kind == "bin":
            width = numpy.dtype(source.bin_dtype).itemsize
            if not size or size % width:
                raise EvaluatorError(f"{where} has {size} bytes, which are no {source.bin_dtype} of {width} bytes each; look at bin_dtype")
            return numpy.memmap(file, numpy.dtype(source.bin_dtype).newbyteorder("<"), mode="r")
        array: Array = numpy.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        # numpy says so of arrays of objects, which would be unpickled, and of files that are none or cut off.
        raise EvaluatorError(f"{where} is no .npy file that can be read: {printable(str(error))}") from None
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise EvaluatorError(f"{where} holds {array.dtype} in {array.ndim} dimensions; tokens are integers in 1 or 2")
    return array.reshape(-1)
