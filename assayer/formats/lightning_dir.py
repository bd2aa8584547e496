"""Lightning's and Fabric's sharded checkpoint: a directory, often called ``*.ckpt``, with a distributed checkpoint and ``meta.pt``.

``meta.pt`` holds what is no tensor and is written after the shards (lightning/fabric/strategies/fsdp.py, model_parallel.py). The model
lies under ``model`` or ``state_dict``, behind the attribute of the LightningModule that holds the network.
"""

from assayer.checkpoint import Listing, Position, first_incomplete
from assayer.errors import RefusedError
from assayer.formats import dcp, lightning_file, single_file
from assayer.tensors import Tensor
from assayer.torch_file import read_torch_file

REFINES = ("dcp",)
FOLDERS = ""
RESUMING = ""
SHARDED = True

META = "meta.pt"

variants = dcp.variants


def claims(listing: Listing) -> bool:
    return listing.is_directory and dcp.has_shards(listing, "") and (META in listing.names or listing.name.endswith(".ckpt"))


def missing(listing: Listing) -> str | None:
    reason = dcp.missing(listing)
    if reason:
        return reason
    if META not in listing.names:
        return f"no {META} yet"
    return first_incomplete(listing, [META])


def unmarked(listing: Listing) -> str | None:
    return None


def position(listing: Listing) -> Position:
    named = single_file.position_in(listing.name.removesuffix(".ckpt"))
    return lightning_file.position_inside(listing, META) if named.number is None and META in listing.names else named


def weights(listing: Listing) -> tuple[str, ...]:
    return dcp.weights(listing)


def tensors(listing: Listing, variant: str) -> list[Tensor]:
    found = dcp.tensors(listing, variant)
    try:
        tree = read_torch_file(listing.file(META), META).tree
        is_module = isinstance(tree, dict) and "pytorch-lightning_version" in tree
    except RefusedError:
        # Callbacks and hyperparameters may be of any class; Fabric, which knows no such things, gives its directories no suffix.
        is_module = listing.name.endswith(".ckpt")
    return lightning_file.without_attribute(found) if is_module else found
