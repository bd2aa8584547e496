"""optimus-dl: ``checkpoint_<iteration, nine digits>/`` is a distributed checkpoint, renamed into place when it is whole.

Where only the last one is kept it is called ``checkpoint_latest``. Beside it lie ``metadata_<iteration>.pt`` and
``per_rank_metadata_<rank>_<iteration>.pt``, which are no models.
"""

import re

from assayer.checkpoint import Listing
from assayer.formats import dcp

REFINES = ("dcp",)
FOLDERS = ""
RESUMING = ""
SHARDED = True

missing = dcp.missing
unmarked = dcp.unmarked
position = dcp.position
weights = dcp.weights
variants = dcp.variants
tensors = dcp.tensors


def claims(listing: Listing) -> bool:
    return dcp.claims(listing) and re.fullmatch(r"checkpoint_(\d{9}|latest)", listing.name) is not None
