"""Megatron-Core's ``torch_dist``: ``iter_<N, seven digits>/`` with a distributed checkpoint, and ``metadata.json`` when all is complete.

The names of Megatron-Core's own layers stand for fused and stacked weights that only its converter knows how to take apart.
"""

import re

from assayer.checkpoint import Listing, Position
from assayer.errors import CheckpointError
from assayer.files import printable
from assayer.formats import dcp
from assayer.tensors import Tensor

REFINES = ("dcp",)
FOLDERS = ""
RESUMING = ""
SHARDED = True

_MARK = "metadata.json"
_FUSED = re.compile(r".*(linear_qkv|linear_fc[12]|word_embeddings|output_layer|layer_norm_weight|self_attention\.linear_proj)\b.*")


def claims(listing: Listing) -> bool:
    return dcp.claims(listing) and ("common.pt" in listing.names or re.fullmatch(r"iter_\d{7}|release", listing.name) is not None)


def missing(listing: Listing) -> str | None:
    return dcp.missing(listing) or (None if _MARK in listing.names else f"no {_MARK} yet")


def missing_mark(listing: Listing, folder: str) -> str | None:
    """Why Megatron-Core has not finished in a folder that is one of its own."""
    names = listing.in_folder(folder)
    return f"no {folder}/{_MARK} yet" if "common.pt" in names and _MARK not in names else None


def unmarked(listing: Listing) -> str | None:
    return None


def position(listing: Listing) -> Position:
    return dcp.position(listing)


def weights(listing: Listing) -> tuple[str, ...]:
    return dcp.weights(listing)


def variants(listing: Listing) -> tuple[str, ...]:
    return ("regular",)


def tensors(listing: Listing, variant: str) -> list[Tensor]:
    return tensors_in(listing, "", variant)


def tensors_in(listing: Listing, folder: str, variant: str) -> list[Tensor]:
    """The model's tensors in one folder of the listing, unless Megatron-Core has fused them."""
    stored = [item for item in dcp.read(listing, folder) if not item.path[0].startswith("optimizer.")]
    fused = next((item.tensor.name for item in stored if _FUSED.fullmatch(item.tensor.name)), None)
    if fused:
        raise CheckpointError(
            f"{printable(listing.path)} holds Megatron-Core's fused weights ({printable(fused)}); convert it with Megatron-Bridge, "
            "and watch what that writes"
        )
    return dcp.chosen(stored, variant)
