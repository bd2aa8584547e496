"""Is a checkpoint whole? None, or the sentence why not yet, which ``assayer status`` shows."""

import os
import time
from dataclasses import dataclass, replace

from assayer import formats
from assayer.checkpoint import Checkpoint, Found, Listing, identity, list_path
from assayer.errors import CheckpointError
from assayer.files import printable

__all__ = ["Seen", "examine", "why_not"]

# How many times as long as a look into a checkpoint took, an unchanged one is left alone.
_REST = 50


@dataclass(frozen=True, slots=True)
class Seen:
    """A checkpoint with what is known of it so far. ``since``: the moment (seconds) from which nothing has changed."""

    checkpoint: Checkpoint
    listing: Listing
    signature: str
    since: float
    missing: str | None = None
    unmarked: str | None = None
    identity: str | None = None
    variants: tuple[str, ...] = ()
    # True when it is no longer there, though there is no word of it yet.
    gone: bool = False
    # When it was last looked into, and for how long.
    examined: float = 0.0
    took: float = 0.0

    @property
    def is_whole(self) -> bool:
        return self.identity is not None


def why_not(seen: Seen, now: float, quiet_period: float) -> str | None:
    """Why this checkpoint is not taken for whole; ``quiet_period`` (seconds) counts only where its format leaves no sign of its end."""
    if seen.missing:
        return seen.missing
    if seen.unmarked and now - seen.since < quiet_period:
        return f"waits until nothing has changed for {quiet_period:g} s ({seen.unmarked})"
    return None


def examine(found: Found, before: Seen | None, now: float, first_look: bool, quiet_period: float) -> Seen:
    """What is known of a checkpoint after this look; opens its files only while it is not known to be whole.

    Args:
        found: as listed now.
        before: what the last look knew.
        now: seconds since the epoch.
        first_look: nobody has looked here before: then the file system's own clock tells since when nothing has changed.
        quiet_period: seconds.
    """
    signature = found.listing.signature()
    if before and before.signature == signature:
        if before.is_whole:
            return before
        since = before.since
        if before.missing and now - before.examined < _REST * before.took:
            # Nothing has changed here, and to look again takes long.
            return before
    else:
        since = min(now, found.listing.changed_ns / 1e9) if first_look else now
    began = time.monotonic()
    seen = _examined(Seen(found.checkpoint, found.listing, signature, since), now, quiet_period)
    return replace(seen, examined=now, took=time.monotonic() - began)


def _examined(seen: Seen, now: float, quiet_period: float) -> Seen:
    form = formats.of(seen.checkpoint)
    try:
        seen = replace(seen, missing=form.missing(seen.listing))
        if seen.missing is None:
            seen = replace(seen, unmarked=form.unmarked(seen.listing))
        if why_not(seen, now, quiet_period) is None:
            seen = _with_identity(seen)
    except FileNotFoundError:
        return replace(seen, missing="is being deleted or replaced")
    except OSError as error:
        file = f"{printable(os.path.basename(str(error.filename)))} " if error.filename else ""
        return replace(seen, missing=f"{file}cannot be read: {error.strerror}")
    except Exception as error:
        # What one checkpoint's files hold must never keep the others from being looked at.
        return replace(seen, missing=f"cannot be read ({type(error).__name__}: {printable(str(error))[:200]})")
    return seen


def _with_identity(seen: Seen) -> Seen:
    try:
        form = formats.of(seen.checkpoint)
        read = identity(seen.listing, form.weights(seen.listing))
        variants = tuple(form.variants(seen.listing))
    except CheckpointError as error:
        return replace(seen, missing=str(error))
    if list_path(seen.checkpoint.path, formats.of(seen.checkpoint).FOLDERS).signature() != seen.signature:
        return replace(seen, missing="changed while it was read")
    return replace(seen, identity=read, variants=variants)
