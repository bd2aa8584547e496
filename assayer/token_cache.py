"""Texts that were tokenized before: their tokens are the same for every checkpoint, and cost a second a megabyte.

They lie below ``$XDG_CACHE_HOME/assayer/tokens`` (this user's alone), one ``.npy`` file for each tokenizer and data: tokens in the first
row, the bytes of each in the second. What was not used for a month goes, and the longest unused beyond 2 GiB. Without such a place, or
where it is full, texts are tokenized each time.
"""

import io
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy

from assayer.documents import Array
from assayer.errors import StateError
from assayer.files import digest, printable, private_directory, write_whole
from assayer.token_source import Source

__all__ = ["directory", "tokenized"]

logger = logging.getLogger(__name__)

# Tokens, and the bytes of each where they are known.
Tokenized: TypeAlias = tuple[Array, Array | None]

# Fewer tokens are not worth a file.
TOKENS_MIN = 50_000
# Bytes of all entries, and seconds that an unused one stays.
BYTES_MAX = 2 << 30
SECONDS_MAX = 30 * 24 * 3600
# Changes when texts are cut or counted otherwise.
_VERSION = "1"


def directory() -> Path:
    """Where the entries lie."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "assayer" / "tokens"


def tokenized(source: Source, tokenizer: Any, enough: int | None, make: Callable[[], Tokenized]) -> Tokenized:
    """The tokens and their bytes that ``make`` returns, or returned before for the same data and tokenizer.

    Args:
        tokenizer: one of transformers' own; with code of its own, nothing is kept.
        enough: as ``documents.tokenize`` takes it.
    """
    key = _key(source, tokenizer, enough)
    if key is None:
        return make()
    path = directory() / f"{key}.npy"
    found = _load(path)
    if found is not None:
        return found[0], found[1]
    tokens, sizes = make()
    if sizes is not None and len(tokens) >= TOKENS_MIN and int(tokens.max()) < 1 << 31:
        _store(path, numpy.stack([tokens, sizes]).astype(numpy.int32))
    return tokens, sizes


def _key(source: Source, tokenizer: Any, enough: int | None) -> str | None:
    """A digest of all that the tokens depend on; None where that is not known."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not type(tokenizer).__module__.startswith("transformers."):
        return None
    import tokenizers
    import transformers

    files = [file for place in source.files for file in (sorted(place.iterdir()) if source.kind == "dataset" else [place])]
    stats = [(file, file.stat()) for file in files]
    return digest(
        _VERSION,
        type(tokenizer).__qualname__,
        backend.to_str(),
        str(tokenizer.eos_token_id),
        str(getattr(tokenizer, "split_special_tokens", None)),
        transformers.__version__,
        tokenizers.__version__,
        str(enough),
        source.digest(),
        # The digest reads little of a large file.
        *(f"{file.absolute()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}" for file, stat in stats),
    )


def _load(path: Path) -> Array | None:
    try:
        if path.parent.stat().st_uid != os.getuid():
            return None
        found: Array = numpy.load(path, mmap_mode="r", allow_pickle=False)
        os.utime(path)
    except (OSError, ValueError, EOFError):
        # Not there, or cut off: it is made anew.
        return None
    return found if found.dtype == numpy.int32 and found.ndim == 2 and len(found) == 2 else None


def _store(path: Path, rows: Array) -> None:
    if rows.nbytes > BYTES_MAX:
        return
    data = io.BytesIO()
    numpy.save(data, rows, allow_pickle=False)
    try:
        write_whole(private_directory(path.parent) / path.name, data.getvalue(), 0o600)
        _forget(path.parent)
    except StateError as error:
        logger.warning("tokens are not kept: %s", error)
    except OSError as error:
        logger.warning("tokens are not kept below %s: %s", printable(str(path.parent)), error.strerror)


def _forget(folder: Path) -> None:
    """Removes what was not used for long, and the longest unused of what is too much."""
    entries = sorted(((file.stat().st_mtime, file.stat().st_size, file) for file in folder.glob("*.npy")), reverse=True)
    total = 0
    for used, size, file in entries:
        total += size
        if total > BYTES_MAX or used < time.time() - SECONDS_MAX:
            # Whoever has it mapped keeps it.
            file.unlink(missing_ok=True)
