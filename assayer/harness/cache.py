"""A folder of this user alone for what is built once: ``$XDG_CACHE_HOME/assayer/lm_eval``, ``~/.cache`` by default.

Each file is named by a digest of all that it is made of, whole or absent, and no pickle. Files not used for 30 days, and those longest
unused beyond 2 GiB, are removed.
"""

import contextlib
import json
import logging
import os
import time
import zlib
from pathlib import Path
from typing import Any

from assayer.errors import StateError
from assayer.files import private_directory, write_whole

__all__ = ["KEPT_BYTES", "KEPT_DAYS", "cache_folder", "keep", "kept", "trim"]

logger = logging.getLogger(__name__)

KEPT_DAYS = 30
KEPT_BYTES = 2 << 30


def cache_folder() -> Path:
    """Where it is; it need not exist."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "assayer" / "lm_eval"


def kept(name: str) -> Any:
    """The JSON value kept under a name, now used again; None when there is none that is whole."""
    try:
        path = private_directory(cache_folder()) / name
        value = json.loads(zlib.decompress(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, StateError, ValueError, zlib.error) as error:
        logger.warning("%s in %s is not readable (%s) and is made anew", name, cache_folder(), error)
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return value


def keep(name: str, text: str) -> None:
    """Keeps a JSON text under a name; where that cannot be done, the log says so."""
    try:
        write_whole(private_directory(cache_folder()) / name, zlib.compress(text.encode(), 1), 0o600)
    except (OSError, StateError) as error:
        logger.warning("%s cannot be kept in %s: %s", name, cache_folder(), error)


def trim() -> None:
    """Removes what was not used for long, and what was longest unused beyond the room that there is."""
    found = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(cache_folder()):
            with contextlib.suppress(OSError):
                found.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
    room = KEPT_BYTES
    for used, size, path in sorted(found, reverse=True):
        room -= size
        if room < 0 or time.time() - used > KEPT_DAYS * 86400:
            with contextlib.suppress(OSError):
                os.unlink(path)
