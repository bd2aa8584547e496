"""One file a checkpoint format. To add one is to add a module here that answers the questions of ``checkpoint.Format``."""

import importlib
import pkgutil
from functools import cache
from types import MappingProxyType

from assayer.checkpoint import Checkpoint, Format, Listing

__all__ = ["all_formats", "identify", "of"]


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


def identify(listing: Listing) -> Checkpoint | None:
    """The checkpoint that this listing is, by the narrowest format that claims it; None when no format does."""
    claiming = {name: form for name, form in all_formats().items() if form.claims(listing)}
    refined = {wider for form in claiming.values() for wider in form.REFINES}
    narrowest = sorted(claiming.keys() - refined)
    if not narrowest:
        return None
    return Checkpoint(listing.path, narrowest[0], claiming[narrowest[0]].position(listing))
