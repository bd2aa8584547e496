"""Documents of text and their tokens, each with the number of UTF-8 bytes that it stands for.

A text file is one document; so is each line of a JSONL file and each row of a dataset. Between two documents stands the tokenizer's
end-of-sequence token; other special tokens are added nowhere. Long text files are tokenized in pieces of about a million characters that
end with a line.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy

from assayer.errors import EvaluatorError
from assayer.files import printable

__all__ = ["Array", "Piece", "json_lines", "pieces_of_file", "pieces_of_text", "tokenize"]

Array: TypeAlias = numpy.ndarray[Any, Any]

# Characters that a tokenizer is given at once: enough to keep its threads busy, and some ten megabytes of offsets.
PIECE = 1 << 20


@dataclass(frozen=True)
class Piece:
    """Text that is tokenized by itself; ``begins`` a document, or goes on with one. ``where`` names it in errors."""

    text: str
    begins: bool
    where: str


def pieces_of_file(file: Path) -> Iterator[Piece]:
    """The pieces of a text file.

    Raises:
        EvaluatorError: it cannot be read, or is not UTF-8.
    """
    where = printable(str(file))
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            begins = True
            while text := "".join(lines.readlines(PIECE)):
                yield Piece(text, begins, where)
                begins = False
    except UnicodeDecodeError as error:
        raise EvaluatorError(f"data {where} is not text in UTF-8 ({error.reason}); token files end in .npy or .bin") from None
    except OSError as error:
        raise EvaluatorError(f"data {where} cannot be read: {error.strerror}") from None


def json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, each with its place; empty lines are passed over.

    Raises:
        EvaluatorError: it cannot be read, or a line is not an object in JSON.
    """
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{printable(str(file))}, line {number},"
                    yield where, _object(line, where)
    except OSError as error:
        raise EvaluatorError(f"data {printable(str(file))} cannot be read: {error.strerror}") from None


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise EvaluatorError(f"data {where} is not an object in JSON")
    return value


def pieces_of_text(texts: Iterable[tuple[str, Any]]) -> Iterator[Piece]:
    """A piece for each document, given with its place.

    Raises:
        EvaluatorError: one is not a string.
    """
    for where, text in texts:
        if not isinstance(text, str):
            raise EvaluatorError(f"data {where} has no text: a {type(text).__name__} stands there")
        yield Piece(text, True, where)


def tokenize(pieces: Iterable[Piece], tokenizer: Any, enough: int | None) -> tuple[Array, Array | None]:
    """The tokens of all pieces end to end (int64), and the bytes of each (None where the tokenizer does not tell where a token came from).

    What a token stands for reaches from the end of the one before it to its own end; what a tokenizer drops counts with the next token, or
    with the last. Of a character that several tokens share, the first has all bytes. A separator has none.

    Args:
        enough: reading may stop after this many tokens; None: everything is read.

    Raises:
        EvaluatorError: the tokenizer has no end-of-sequence token and there are several documents, or a text is not Unicode.
    """
    has_offsets = bool(getattr(tokenizer, "is_fast", False))
    tokens: list[Array] = []
    sizes: list[Array] = []
    count, between = 0, False
    for group in _groups(pieces):
        for piece, (ids, nbytes) in zip(group, _encode(group, tokenizer, has_offsets), strict=True):
            between |= piece.begins and count > 0
            if not len(ids):
                continue
            if between:
                tokens.append(numpy.array([_separator(tokenizer)], numpy.int64))
                sizes.append(numpy.zeros(1, numpy.int64))
                count, between = count + 1, False
            tokens.append(ids)
            sizes.append(nbytes)
            count += len(ids)
        if enough is not None and count >= enough:
            break
    empty = [numpy.zeros(0, numpy.int64)]
    return numpy.concatenate(tokens or empty), numpy.concatenate(sizes or empty) if has_offsets else None


def _groups(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece.text)
        if size >= PIECE:
            yield group
            group, size = [], 0
    if group:
        yield group


def _separator(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise EvaluatorError(
            "the tokenizer has no end-of-sequence token to stand between documents; give one that has, or the tokens themselves"
        )
    return int(tokenizer.eos_token_id)


def _encode(group: list[Piece], tokenizer: Any, has_offsets: bool) -> Iterator[tuple[Array, Array]]:
    told = tokenizer(
        [_unicode(piece) for piece in group],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=has_offsets,
        verbose=False,
    )
    for number, piece in enumerate(group):
        ids = numpy.array(told["input_ids"][number], numpy.int64)
        offsets = told["offset_mapping"][number] if has_offsets else []
        yield ids, _sizes(piece.text, offsets)


def _unicode(piece: Piece) -> str:
    try:
        piece.text.encode()
    except UnicodeEncodeError:
        raise EvaluatorError(f"data {piece.where} holds half a surrogate pair, which is no character") from None
    return piece.text


def _sizes(text: str, offsets: Sequence[tuple[int, int]]) -> Array:
    """Bytes of each token, given where it begins and ends in the text, in characters."""
    ends = numpy.maximum.accumulate(numpy.fromiter((end for _, end in offsets), numpy.int64, len(offsets)))
    if not text.isascii():
        points = numpy.frombuffer(text.encode("utf-32-le"), "<u4")
        widths = 1 + (points > 0x7F).astype(numpy.int64) + (points > 0x7FF) + (points > 0xFFFF)
        ends = numpy.concatenate([numpy.zeros(1, numpy.int64), numpy.cumsum(widths)])[ends]
    if len(ends):
        ends[-1] = len(text.encode())
    return numpy.diff(ends, prepend=0)
