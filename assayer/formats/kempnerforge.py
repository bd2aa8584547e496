"""KempnerForge: ``step_<N>/`` with a distributed checkpoint, or one a pipeline stage in ``pp<stage>/``, and ``train_state.pt``.

In its asynchronous mode ``train_state.pt`` and ``metadata.json`` come before the shards, else after them, so both must be there. Stages
do not say how many they are: the first holds the embedding, the last the final norm, and layers carry their number in the whole model.
"""

import re

from assayer.checkpoint import Listing, Position, count_of
from assayer.content import read_table
from assayer.errors import CheckpointError
from assayer.files import printable
from assayer.formats import dcp
from assayer.tensors import Tensor

REFINES = ("dcp",)
FOLDERS = r"pp\d+"
RESUMING = ""
SHARDED = True

_STATE = "train_state.pt"


def claims(listing: Listing) -> bool:
    if not listing.is_directory or not re.fullmatch(r"step_\d+", listing.name):
        return False
    beside = dcp.has_shards(listing, "") and bool({_STATE, "metadata.json"} & listing.names)
    return beside or any(dcp.has_shards(listing, stage) for stage in listing.folders(FOLDERS))


def missing(listing: Listing) -> str | None:
    stages = listing.folders(FOLDERS)
    for stage in stages or [""]:
        reason = dcp.missing_in(listing, stage)
        if reason:
            return reason
    if _STATE not in listing.names:
        return f"no {_STATE} yet"
    absent = next((f"pp{i}" for i, stage in enumerate(stages) if stage != f"pp{i}"), None)
    if absent:
        return f"no {absent}/ yet"
    return _missing_stage(listing) if stages else None


def _missing_stage(listing: Listing) -> str | None:
    """Why some stage is still to come, from the names of all tensors."""
    try:
        names = {tensor.name for tensor in tensors(listing, "regular")}
    except CheckpointError as error:
        return str(error)
    layers = {int(found[1]) for name in names if (found := re.match(r"(?:.*\.)?layers\.(\d+)\.", name))}
    if layers != set(range(len(layers))) or not any(name.endswith("norm.weight") and "layers." not in name for name in names):
        return "the last pipeline stage is not there yet"
    return None


def unmarked(listing: Listing) -> str | None:
    return None


def position(listing: Listing) -> Position:
    named = dcp.position(listing)
    try:
        told = read_table(listing.file("metadata.json")) or {}
    except (OSError, CheckpointError):
        return named
    step, tokens = told.get("step"), told.get("tokens_seen")
    return Position(step=named.step if count_of(step) is None else count_of(step), tokens=count_of(tokens))


def weights(listing: Listing) -> tuple[str, ...]:
    return tuple(sorted(name for stage in listing.folders(FOLDERS) or [""] for name in dcp.weights_in(listing, stage)))


def variants(listing: Listing) -> tuple[str, ...]:
    return ("regular",)


def tensors(listing: Listing, variant: str) -> list[Tensor]:
    found: dict[str, Tensor] = {}
    for stage in listing.folders(FOLDERS) or [""]:
        for tensor in dcp.chosen(dcp.read(listing, stage), variant):
            if tensor.name in found:
                raise CheckpointError(f"two pipeline stages hold {printable(tensor.name)}")
            found[tensor.name] = tensor
    _refuse_lost_experts(found)
    return list(found.values())


def _refuse_lost_experts(found: dict[str, Tensor]) -> None:
    """With expert parallelism every rank saves its experts under the same numbers, and only one rank's reach the file."""
    for name, gate in found.items():
        if name.endswith(".mlp.router.gate.weight"):
            prefix = name.removesuffix("router.gate.weight") + "experts."
            experts = {other.removeprefix(prefix).partition(".")[0] for other in found if other.startswith(prefix)}
            if experts and len(experts) != gate.shape[0]:
                raise CheckpointError(
                    f"holds {len(experts)} of the {gate.shape[0]} experts of {printable(prefix)}*: "
                    "those of other ranks were lost when it was saved"
                )
