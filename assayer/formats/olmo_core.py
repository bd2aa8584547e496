"""OLMo-core: ``step<N>/`` with a distributed checkpoint in ``model_and_optim/``, ``train/rank<r>.pt`` and ``.metadata.json``.

``.metadata.json`` is written last, and deleted first when OLMo-core prunes (olmo_core/train/checkpoint.py). Its `.metadata` holds a class
of its own for places in files.
"""

import re

from assayer.checkpoint import Listing, Position, count_of
from assayer.errors import CheckpointError
from assayer.formats import dcp
from assayer.tensors import Tensor
from assayer.torch_file import read_torch_file

REFINES: tuple[str, ...] = ()
FOLDERS = "model_and_optim|train"
RESUMING = ""
SHARDED = True

_MODEL = "model_and_optim"
_MARK = ".metadata.json"
# Bytes of a description that is read for a position alone.
_GLANCE = 4 << 20


def claims(listing: Listing) -> bool:
    return listing.is_directory and dcp.has_shards(listing, _MODEL)


def missing(listing: Listing) -> str | None:
    reason = dcp.missing_in(listing, _MODEL)
    if reason:
        return reason
    if not any(re.fullmatch(r"rank\d+\.pt", name) for name in listing.in_folder("train")):
        return "no train/rank0.pt yet"
    return None if _MARK in listing.names else f"no {_MARK} yet"


def unmarked(listing: Listing) -> str | None:
    return None


def position(listing: Listing) -> Position:
    """The step from the name, the tokens from rank 0's state."""
    named = dcp.position(listing)
    try:
        tree = read_torch_file(listing.file("train/rank0.pt"), "train/rank0.pt", _GLANCE).tree
    except (CheckpointError, OSError):
        return named
    tokens = tree.get("global_train_tokens_seen") if isinstance(tree, dict) else None
    return Position(step=named.step, tokens=count_of(tokens))


def weights(listing: Listing) -> tuple[str, ...]:
    return dcp.weights_in(listing, _MODEL)


def variants(listing: Listing) -> tuple[str, ...]:
    return ("regular",)


def tensors(listing: Listing, variant: str) -> list[Tensor]:
    return dcp.chosen(dcp.read(listing, _MODEL), variant)
