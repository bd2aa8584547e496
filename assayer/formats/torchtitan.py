"""torchtitan: ``step-<N>/`` as a distributed checkpoint with the model's own names at its top, beside ``optimizer`` and ``train_state``.

The last step may hold the model alone, and in another dtype (torchtitan/components/checkpoint.py). Names and the order of query and key
rows are torchtitan's: ``--key_map torchtitan-llama3`` gives Hugging Face's.
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
    return dcp.claims(listing) and re.fullmatch(r"step-\d+", listing.name) is not None
