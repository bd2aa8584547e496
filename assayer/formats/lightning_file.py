"""Lightning's and NeMo's checkpoint in one file: ``epoch=E-step=S.ckpt``, ``last.ckpt``; the module's weights under ``state_dict``.

Names there begin with the attribute of the LightningModule that holds the network (lightning/pytorch, ``dump_checkpoint``).
"""

from dataclasses import replace

from assayer.checkpoint import Listing, Position, count_of
from assayer.errors import CheckpointError
from assayer.formats import single_file
from assayer.tensors import Tensor
from assayer.torch_file import read_torch_file

REFINES = ("single_file",)
FOLDERS = ""
RESUMING = ""
SHARDED = False

# Bytes of a description that is read for a position alone.
_GLANCE = 4 << 20

missing = single_file.missing
unmarked = single_file.unmarked
weights = single_file.weights


def claims(listing: Listing) -> bool:
    return single_file.claims(listing) and listing.name.endswith(".ckpt")


def position(listing: Listing) -> Position:
    """From the name; where that tells nothing (``last.ckpt``), from ``global_step`` and ``epoch`` inside."""
    named = single_file.position_of_name(listing)
    return position_inside(listing, listing.name) if named.number is None else named


def position_inside(listing: Listing, name: str) -> Position:
    """``global_step`` and ``epoch`` as Lightning keeps them in a file; none while it cannot be read."""
    try:
        tree = read_torch_file(listing.file(name), name, _GLANCE).tree
    except (CheckpointError, OSError):
        return Position()
    step, epoch = (tree.get(name) if isinstance(tree, dict) else None for name in ("global_step", "epoch"))
    return Position(step=count_of(step), epoch=count_of(epoch))


def variants(listing: Listing) -> tuple[str, ...]:
    """NeMo writes the moving average as a file of its own, which is never taken for the weights of its step."""
    return ("ema",) if listing.name.endswith("-EMA.ckpt") else ("regular",)


def tensors(listing: Listing, variant: str) -> list[Tensor]:
    tree = read_torch_file(listing.file(listing.name), listing.name).tree
    found = single_file.tensors(listing, "regular")
    is_module = isinstance(tree, dict) and "pytorch-lightning_version" in tree
    return without_attribute(found) if is_module else found


def without_attribute(found: list[Tensor]) -> list[Tensor]:
    """The network's tensors by its own names, where one attribute of the LightningModule holds all of it.

    Parameters and buffers of the LightningModule itself are no part of the network. With several such attributes nothing is left out.
    """
    first = {tensor.name.partition(".")[0] for tensor in found if "." in tensor.name}
    if len(first) != 1:
        return found
    (word,) = first
    return [replace(tensor, name=tensor.name.removeprefix(f"{word}.")) for tensor in found if "." in tensor.name]
