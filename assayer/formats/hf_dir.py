"""A Hugging Face directory: one weight file, or shards with an index, or a PEFT adapter, with its config beside it.

transformers writes config.json first and trainer_state.json last, both in place (transformers/trainer.py, modeling_utils.py);
``save_pretrained`` alone writes no trainer_state.json, so such an export is whole when its files are, and nothing has moved for a while.
"""

import re
from collections.abc import Sequence
from typing import Any

from assayer.checkpoint import Listing, Position, count_of
from assayer.containers import model_names
from assayer.content import incomplete, read_table
from assayer.errors import CheckpointError
from assayer.files import printable
from assayer.formats import single_file
from assayer.tensors import Tensor
from assayer.torch_file import leaves, read_torch_file, whole_tensors

# With the gathered weights at hand, DeepSpeed's shards inside, or those that were consolidated, are not needed.
REFINES = ("deepspeed", "dcp_safetensors")
FOLDERS = r"sharded|optimizer_\d+"
RESUMING = r"(optimizer|scheduler)\.(pt|bin)|scaler\.pt|rng_state(_\d+)?\.pth|optimizer_\d+/.*"
SHARDED = False

STATE = "trainer_state.json"

_COUNT_MAX = 10**18
# Characters of a file name; a longer one is there nowhere.
_NAME_MAX = 300
_SHARD = re.compile(r"(model|pytorch_model|adapter_model)-(\d+)-of-(\d+)\.(safetensors|bin)")
_WHOLE = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")
_INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SIGNS = ("config.json", "adapter_config.json", STATE, "training_args.bin")
_NUMBERED = re.compile(r"(checkpoint|step|global_step|epoch|iter)[=_-]?\d+", re.IGNORECASE)


def claims(listing: Listing) -> bool:
    if not listing.is_directory:
        return False
    names = listing.names
    found = {name for name in names if name in _WHOLE or name in _INDEX or _SHARD.fullmatch(name)}
    if found == {"model.safetensors"}:
        # This name alone, among a user's own single files, makes no Hugging Face directory of their folder.
        return any(sign in names for sign in _SIGNS) or bool(_NUMBERED.search(listing.name))
    return bool(found)


def missing(listing: Listing) -> str | None:
    names = listing.names
    for index in _INDEX:
        if index in names:
            try:
                shards = _shards_in(listing, index)
            except CheckpointError as error:
                return f"{index} {error}"
            if shards is None:
                return f"{index} is being written"
            absent = sorted(shards - names)
            if absent:
                return f"{printable(absent[0])} is missing" + (f", and {len(absent) - 1} more" if absent[1:] else "")
    for name in weights(listing):
        shard = _SHARD.fullmatch(name)
        if shard and not any(index in names for index in _INDEX):
            return f"no {shard[1]}.{shard[4]}.index.json yet"
        problem = incomplete(listing.file(name))
        if problem:
            return f"{name} {problem}"
    if any(name.startswith("adapter_model.") for name in names) and "adapter_config.json" not in names:
        return "no adapter_config.json yet"
    return missing_state(listing)


def missing_state(listing: Listing) -> str | None:
    """Why the Trainer's own state is not whole yet, where there is one."""
    if STATE not in listing.names:
        return None
    try:
        return f"{STATE} is being written" if _state(listing) is None else None
    except CheckpointError as error:
        return f"{STATE} {error}"


def unmarked(listing: Listing) -> str | None:
    return None if STATE in listing.names else f"no {STATE}"


def position(listing: Listing) -> Position:
    named = single_file.position_in(listing.name)
    try:
        state = (_state(listing) if STATE in listing.names else None) or {}
    except CheckpointError:
        # Why it is not ready is said by ``missing_state``.
        state = {}
    step, tokens = (count_of(state.get(key)) for key in ("global_step", "num_input_tokens_seen"))
    epoch = state.get("epoch")
    return Position(
        step=named.step if step is None else step,
        epoch=float(epoch) if isinstance(epoch, int | float) and abs(epoch) < _COUNT_MAX else named.epoch,
        tokens=tokens or None,
    )


def weights(listing: Listing) -> tuple[str, ...]:
    return tuple(sorted(name for name in listing.names if name in _WHOLE or _SHARD.fullmatch(name)))


def variants(listing: Listing) -> tuple[str, ...]:
    return ("regular",)


def tensors(listing: Listing, variant: str) -> list[Tensor]:
    names = weights(listing)
    # Where both kinds lie there, transformers takes safetensors.
    kept = [name for name in names if name.endswith(".safetensors")]
    found = [t for name in kept for t in single_file.safetensors_in(listing, name)] if kept else read_torch(listing, names)
    if len({tensor.name for tensor in found}) < len(found):
        raise CheckpointError(f"{printable(listing.path)} holds a tensor of one name in two files")
    return found


def read_torch(listing: Listing, names: Sequence[str]) -> list[Tensor]:
    """The tensors of ``torch.save`` files that hold parts of one state dict, or all of it."""
    found = []
    for name in names:
        file = read_torch_file(listing.file(name), name)
        found += whole_tensors(file, model_names([path for path, _ in leaves(file.tree)]))
    return found


def _shards_in(listing: Listing, index: str) -> set[str] | None:
    """The names of the shards that an index tells; None while it is no whole JSON.

    Raises:
        CheckpointError: it is none of an honest size.
    """
    table = (read_table(listing.file(index)) or {}).get("weight_map")
    return {str(name)[:_NAME_MAX] for name in table.values()} if isinstance(table, dict) else None


def _state(listing: Listing) -> dict[str, Any] | None:
    """The Trainer's state; None while it is no whole JSON, or cannot be read.

    Raises:
        CheckpointError: it is none of an honest size.
    """
    try:
        return read_table(listing.file(STATE))
    except OSError:
        return None
