"""The tokens that a language model is asked to predict, end to end.

Token files are mapped into memory, never copied whole. They, the rows of a 2-D array and lists of ``input_ids`` are taken as they are;
texts as ``documents`` says.
"""

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from assayer.documents import Array, Piece, json_lines, pieces_of_file, pieces_of_text, tokenize
from assayer.errors import EvaluatorError
from assayer.files import digest, printable
from assayer.token_cache import tokenized
from assayer.token_source import Source, mapped

__all__ = ["Batches", "Tokens", "read"]

# Tokens that are looked at in one go: 32 MB.
_SCANNED = 1 << 22
_DIGESTED = 4096


class Tokens:
    """Arrays of tokens end to end, as one.

    Args:
        arrays: 1-D, of integers.
        sizes: the bytes that each token stands for, of the same length as all arrays together; None: not known.
    """

    def __init__(self, arrays: Sequence[Array], sizes: Array | None = None) -> None:
        self._arrays = [array for array in arrays if len(array)]
        self._ends = list(itertools.accumulate(len(array) for array in self._arrays))
        self._sizes = sizes

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def has_bytes(self) -> bool:
        return self._sizes is not None

    def take(self, start: int, stop: int) -> Array:
        """The tokens from ``start`` up to ``stop`` as int64, a copy."""
        parts = []
        number = bisect.bisect_right(self._ends, start)
        while start < min(stop, len(self)):
            array, end = self._arrays[number], self._ends[number]
            first = end - len(array)
            parts.append(array[start - first : stop - first])
            start, number = end, number + 1
        return numpy.concatenate(parts).astype(numpy.int64) if parts else numpy.zeros(0, numpy.int64)

    def nbytes(self, start: int, stop: int) -> int:
        """The bytes that these tokens stand for; 0 where that is not known."""
        return 0 if self._sizes is None else int(self._sizes[start:stop].sum())

    def digest(self) -> str:
        """Of their number, and of 4096 of them, evenly spaced: another tokenizer, or another way to read a file, makes another one."""
        count = len(self)
        places = sorted({(count - 1) * i // (_DIGESTED - 1) for i in range(_DIGESTED)}) if count else []
        return digest(str(count), *(self.take(place, place + 1).tobytes() for place in places))

    def extremes(self, stop: int) -> tuple[int, int]:
        """The smallest and the largest of the tokens before ``stop``; there must be one."""
        blocks = [self.take(start, min(start + _SCANNED, stop)) for start in range(0, stop, _SCANNED)]
        return min(int(block.min()) for block in blocks), max(int(block.max()) for block in blocks)


@dataclass(frozen=True)
class Batches:
    """Which tokens each batch holds.

    The tokens are cut into windows of ``seq_len`` + 1, of which each shares one token with the next, so that every token but the first is
    predicted once, from at most ``seq_len`` tokens before it. A batch is ``batch_size`` windows; what is left at the end, shorter than a
    window, is a batch of its own: nothing is padded, and nothing left out.

    Args:
        tokens: number of all tokens, at least 2.
        seq_len: tokens that the model sees at once.
        batch_size: windows a batch.
    """

    tokens: int
    seq_len: int
    batch_size: int

    def __len__(self) -> int:
        """The batches that hold every token once."""
        windows, rest = divmod(self.tokens - 1, self.seq_len)
        return -(-windows // self.batch_size) + (rest > 0)

    def span(self, number: int) -> tuple[int, int, int]:
        """The first token, the windows and the predicted tokens in each of a batch; past the end it begins anew."""
        windows, rest = divmod(self.tokens - 1, self.seq_len)
        first = number % len(self) * self.batch_size
        if first >= windows:
            return windows * self.seq_len, 1, rest
        return first * self.seq_len, min(self.batch_size, windows - first), self.seq_len


def read(source: Source, tokenizer: Any = None, enough: int | None = None) -> Tokens:
    """The tokens of a source.

    Args:
        tokenizer: a Hugging Face tokenizer; needed where ``source.is_text``.
        enough: reading documents may stop after this many tokens; None: everything is read.

    Raises:
        EvaluatorError: a file cannot be read, or does not hold what it should.
    """
    if source.kind in ("npy", "bin"):
        return Tokens([mapped(file, source) for file in source.files])
    if source.is_text:
        tokens, sizes = tokenized(source, tokenizer, enough, lambda: tokenize(_pieces(source), tokenizer, enough))
        return Tokens([tokens], sizes)
    arrays, count = [], 0
    for array in _lists(source):
        arrays.append(array)
        count += len(array)
        if enough is not None and count >= enough:
            break
    return Tokens([numpy.concatenate(arrays)] if arrays else [])


def _pieces(source: Source) -> Iterator[Piece]:
    if source.kind == "text":
        return itertools.chain.from_iterable(map(pieces_of_file, source.files))
    return pieces_of_text(_texts(source))


def _texts(source: Source) -> Iterator[tuple[str, Any]]:
    if source.kind == "jsonl":
        for file in source.files:
            for where, line in json_lines(file):
                yield where, line.get("text")
    else:
        number = itertools.count(1)
        for rows in _opened(source).iter(batch_size=1000):
            for text in rows["text"]:
                yield f"{printable(str(source.files[0]))}, row {next(number)},", text


def _lists(source: Source) -> Iterator[Array]:
    """The tokens of one line, or of many rows at once."""
    if source.kind == "jsonl":
        for file in source.files:
            for where, line in json_lines(file):
                yield _integers(line.get("input_ids"), where)
    else:
        where = printable(str(source.files[0]))
        for table in _opened(source).with_format("arrow").iter(batch_size=10_000):
            for chunk in table.column("input_ids").chunks:
                if not hasattr(chunk, "flatten") or not hasattr(chunk.type, "value_type"):
                    raise EvaluatorError(f"data {where} holds {chunk.type} in input_ids; tokens are lists of integers")
                yield _integers(chunk.flatten().to_numpy(zero_copy_only=False), where)


def _integers(values: Any, where: str) -> Array:
    try:
        array = numpy.asarray(values) if isinstance(values, list | numpy.ndarray) else numpy.zeros(0)
    except ValueError:
        # Lists of different lengths within a list.
        array = numpy.zeros(0)
    if isinstance(values, list) and not values:
        array = numpy.zeros(0, numpy.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise EvaluatorError(f"data {where} has no input_ids that are a list of integers")
    return array.astype(numpy.int64)


def _opened(source: Source) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise EvaluatorError(f"a saved dataset needs datasets ({error}); install it: pip install datasets") from None
    try:
        return datasets.load_from_disk(str(source.files[0])).select_columns([source.column])
    except (OSError, ValueError, KeyError) as error:
        said = printable(f"{type(error).__name__}: {error}")
        raise EvaluatorError(f"data {printable(str(source.files[0]))} does not load as a saved dataset: {said}") from None
