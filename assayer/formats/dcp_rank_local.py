"""torch's distributed checkpoint without collectives (``dcp.save(..., use_collectives=False)``, torch 2.9): a ``__<rank>.metadata`` a rank.

No file says how many ranks there were, and each metadata names only its own rank's part, so it is whole when all parts together make
up every tensor. (torch's own reader fills what it does not find with whatever lay in memory.)
"""

import re

from assayer.checkpoint import Listing, Position, first_absent
from assayer.errors import CheckpointError
from assayer.files import natural_key
from assayer.formats import dcp, rank_files
from assayer.tensors import Tensor, cover

REFINES = ("dcp",)
FOLDERS = ""
RESUMING = ""
SHARDED = True

_METADATA = re.compile(r"__\d+\.metadata")


def claims(listing: Listing) -> bool:
    return listing.is_directory and bool(_metadata(listing)) and dcp.METADATA not in listing.names


def missing(listing: Listing) -> str | None:
    reason = dcp.missing_in(listing, "", _metadata(listing))
    if reason:
        return reason
    absent = first_absent(int(re.findall(r"\d+", name)[0]) for name in _metadata(listing))
    if absent is not None:
        return f"no __{absent}.metadata yet"
    try:
        for stored in dcp.read(listing, "", _metadata(listing)):
            cover(stored.tensor)
    except CheckpointError as error:
        return f"the metadata of some rank is missing: {error}"
    return None


def unmarked(listing: Listing) -> str | None:
    return rank_files.apart(listing, _metadata(listing))


def position(listing: Listing) -> Position:
    return dcp.position(listing)


def weights(listing: Listing) -> tuple[str, ...]:
    return tuple(sorted({*_metadata(listing), *dcp.weights_in(listing, "")}))


def variants(listing: Listing) -> tuple[str, ...]:
    return ("regular",)


def tensors(listing: Listing, variant: str) -> list[Tensor]:
    return dcp.chosen(dcp.read(listing, "", _metadata(listing)), variant)


def _metadata(listing: Listing) -> list[str]:
    return sorted((name for name in listing.names if _METADATA.fullmatch(name)), key=natural_key)
