"""One file a checkpoint format. To add one is to add a module here that answers the questions of ``checkpoint.Format``."""

import importlib
import os
import pkgutil
from functools import cache
from types import MappingProxyType

from assayer.checkpoint import Checkpoint, Format, Found, Listing, list_path

__all__ = ["all_folders", "all_formats", "claiming", "identify", "identify_path", "is_inside_checkpoint", "is_merged_for", "of"]

# The one that Hugging Face's from_pretrained reads as it lies there.
_HUGGING_FACE = "hf_dir"
# How many folders above a path are looked at for being a checkpoint.
_ABOVE = 4


@cache
def all_formats() -> MappingProxyType[str, Format]:
    """Every format by its module's name."""
    found: dict[str, Format] = {}
    for module in pkgutil.iter_modules(__path__):
        found[module.name] = importlib.import_module(f"{__name__}.{module.name}")
    return MappingProxyType(found)


def of(checkpoint: Checkpoint) -> Format:
    """The format that claimed this checkpoint."""
    return all_formats()[checkpoint.format]


def is_merged_for(checkpoint: Checkpoint, reads_hugging_face: bool) -> bool:
    """True when this checkpoint is to be merged for an evaluator: it is sharded, or the evaluator reads Hugging Face directories only."""
    return of(checkpoint).SHARDED or (reads_hugging_face and checkpoint.format != _HUGGING_FACE)


@cache
def all_folders() -> str:
    """A regular expression of the folders that some format counts as its own."""
    return "|".join(f"(?:{form.FOLDERS})" for form in all_formats().values() if form.FOLDERS)


def claiming(listing: Listing) -> str | None:
    """The name of the narrowest format that claims this listing, by names alone; None when no format does."""
    found = {name: form for name, form in all_formats().items() if form.claims(listing)}
    refined = {wider for form in found.values() for wider in form.REFINES}
    return min(found.keys() - refined, default=None)


def identify(listing: Listing) -> Found | None:
    """The checkpoint that this listing is, by the narrowest format that claims it, with what belongs to it; None when no format does."""
    name = claiming(listing)
    if name is None:
        return None
    form = all_formats()[name]
    own = listing.within(form.FOLDERS)
    return Found(Checkpoint(listing.path, name, form.position(own)), own)


def identify_path(path: str) -> Found | None:
    """The checkpoint that lies at this path (absolute); None when no format knows it.

    Raises:
        OSError: it is gone or cannot be read.
    """
    return identify(list_path(path, all_folders()))


def is_inside_checkpoint(path: str, checkpoint: str) -> bool:
    """True for a folder that is, or lies in, this checkpoint (empty: none) or any other."""
    real = os.path.realpath(path)
    if checkpoint and (real + os.sep).startswith(os.path.join(os.path.realpath(checkpoint), "")):
        return True
    seen = 0
    while seen < _ABOVE and os.path.dirname(real) != real:
        if os.path.isdir(real):
            seen += 1
            try:
                found = identify_path(real)
            except OSError:
                found = None
            if found is not None:
                return True
        real = os.path.dirname(real)
    return False
