"""Which paths a client may name, and which of the words of a request are paths."""

import os
from collections.abc import Iterator
from typing import Any

from assayer import formats
from assayer.checkpoint import Found
from assayer.errors import ProtocolError
from assayer.files import printable

__all__ = ["Roots", "is_path", "strings_in", "why_not_into", "within"]

# Bytes of a path that the system takes.
_PATH_MAX = 4096


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
            if "\0" in path or not path or len(os.fsencode(path)) >= _PATH_MAX:
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
        return len(text) < _PATH_MAX and os.path.lexists(text)
    except (ValueError, OSError):
        return False


def why_not_into(target: str, checkpoint: str) -> str | None:
    """Why a merge of this checkpoint (empty: none) may not be put to this path; None when it may."""
    if os.path.realpath(target) == os.path.realpath(checkpoint) or formats.is_inside_checkpoint(os.path.dirname(target), checkpoint):
        return f"{printable(target)} lies inside a checkpoint, where nothing is ever written"
    # What an earlier merge has left there is a checkpoint, too, but no place inside one.
    if os.path.lexists(target):
        return f"{printable(target)} is there already; remove it, or give another output_path"
    return None


def within(found: Found, roots: Roots) -> Found:
    """A checkpoint that was found below a path, such as the newest one there, by its path in the roots: it may be a link that leads out.

    Raises:
        ProtocolError: it does (403).
    """
    path = roots.resolve(found.checkpoint.path)
    return found if path == found.checkpoint.path else formats.identify_path(path) or found


def strings_in(value: Any) -> Iterator[str]:
    """Every string in a JSON value, at any depth; keys are none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings_in(inner)
