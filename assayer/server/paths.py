"""Which paths a client may name, and which of the words of a request are paths."""

import os
from collections.abc import Iterator
from typing import Any

from assayer import formats
from assayer.errors import ProtocolError
from assayer.files import printable

__all__ = ["Roots", "inside_checkpoint", "is_path", "strings_in"]

# How many folders above a path are looked at for being a checkpoint.
_ABOVE = 4


class Roots:
    """The folders that clients may name paths in; none: any path that this user can read."""

    def __init__(self, given: tuple[str, ...]) -> None:
        self._roots = tuple(os.path.realpath(path) for path in given)

    def resolve(self, path: str) -> str:
        """The absolute path that a client means; with roots, what it leads to, links followed, also where it does not exist yet.

        Raises:
            ProtocolError: it can be no path (422), or lies outside the roots (403).
        """
        try:
            os.fsencode(path)
            if "\0" in path or not path:
                raise ValueError
            absolute = os.path.abspath(os.path.expanduser(path))
            if not self._roots:
                return absolute
            real = os.path.realpath(absolute)
        except (ValueError, OSError):
            raise ProtocolError(f"{printable(path)[:200]!r} is no path") from None
        if not self.has(real):
            raise ProtocolError(f"{printable(path)[:500]} lies outside of the folders that this server may use (--root)", status=403)
        return real

    def has(self, path: str) -> bool:
        """True for a path in one of the folders, links followed."""
        real = os.path.realpath(path)
        return not self._roots or any(real == root or real.startswith(os.path.join(root, "")) for root in self._roots)


def is_path(text: str) -> bool:
    """True for a text that names a file here, or can name nothing else; a name on a hub is none."""
    if text.startswith(("/", "~", "./", "../")) or "/../" in text or text in (".", ".."):
        return True
    try:
        return os.path.lexists(text)
    except (ValueError, OSError):
        return False


def strings_in(value: Any) -> Iterator[str]:
    """Every string in a JSON value, at any depth; keys are none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings_in(inner)


def inside_checkpoint(path: str, checkpoint: str) -> bool:
    """True for a folder that is, or lies in, this checkpoint (empty: none) or any other."""
    real = os.path.realpath(path)
    if checkpoint and (real + os.sep).startswith(os.path.join(os.path.realpath(checkpoint), "")):
        return True
    seen = 0
    while seen < _ABOVE and os.path.dirname(real) != real:
        if os.path.isdir(real):
            seen += 1
            try:
                found = formats.identify_path(real)
            except OSError:
                found = None
            if found is not None:
                return True
        real = os.path.dirname(real)
    return False
