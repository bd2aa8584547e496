"""FSDP as accelerate saves it, alone or under transformers' Trainer: a distributed checkpoint in ``pytorch_model_fsdp_<i>/``, or files.

``SHARDED_STATE_DICT`` gives the directory (with ``use_dcp=False`` one ``pytorch_model_fsdp_<i>_rank<r>.bin`` a rank), ``FULL_STATE_DICT``
``pytorch_model_fsdp.bin`` (accelerate/utils/fsdp_utils.py). accelerate ends with ``random_states_<rank>.pkl``, the Trainer with
``trainer_state.json``.
"""

import re

from assayer.checkpoint import Listing, Position, first_absent, first_incomplete
from assayer.errors import CheckpointError
from assayer.formats import accelerate, dcp, hf_dir, rank_files
from assayer.tensors import Tensor

REFINES = ("accelerate",)
FOLDERS = r"pytorch_model_fsdp_\d+|optimizer_\d+"
RESUMING = (
    r"optimizer(_\d+)?(_rank\d+)?\.(bin|pt)|optimizer_\d+/.*|(scheduler|sampler|custom_checkpoint)(_\d+)?\.(bin|pt|pkl)"
    r"|scaler\.pt|rng_state(_\d+)?\.pth"
)
SHARDED = True

_MODEL = r"pytorch_model_fsdp_\d+"
_FULL = re.compile(r"pytorch_model_fsdp(_\d+)?\.bin")
_RANK = re.compile(r"(pytorch_model_fsdp(?:_\d+)?)_rank(\d+)\.bin")


def claims(listing: Listing) -> bool:
    # With FULL_STATE_DICT the Trainer writes the model twice; then the safetensors are taken.
    if not listing.is_directory or hf_dir.weights(listing):
        return False
    return any(dcp.has_shards(listing, folder) for folder in listing.folders(_MODEL)) or bool(_full(listing) or _ranks(listing))


def missing(listing: Listing) -> str | None:
    for folder in listing.folders(_MODEL):
        reason = dcp.missing_in(listing, folder)
        if reason:
            return reason
    ranks = _ranks(listing)
    absent = first_absent(ranks)
    if absent is not None:
        return f"the file of rank {absent} is missing"
    cut = first_incomplete(listing, (*_full(listing), *ranks.values()))
    if cut:
        return cut
    if hf_dir.STATE in listing.names:
        return hf_dir.missing_state(listing)
    if "training_args.bin" in listing.names:
        return f"no {hf_dir.STATE} yet"
    return accelerate.missing_random_states(listing) if unmarked(listing) is None else None


def unmarked(listing: Listing) -> str | None:
    if hf_dir.STATE in listing.names or any(name.startswith("random_states_") for name in listing.names):
        return None
    return f"no {hf_dir.STATE} and no random_states_0.pkl"


def position(listing: Listing) -> Position:
    return accelerate.position(listing) if hf_dir.STATE not in listing.names else hf_dir.position(listing)


def weights(listing: Listing) -> tuple[str, ...]:
    sharded = [name for folder in listing.folders(_MODEL) for name in dcp.weights_in(listing, folder)]
    return tuple(sorted([*sharded, *_full(listing), *_ranks(listing).values()]))


def variants(listing: Listing) -> tuple[str, ...]:
    return ("regular",)


def tensors(listing: Listing, variant: str) -> list[Tensor]:
    folders = [folder for folder in listing.folders(_MODEL) if dcp.has_shards(listing, folder)]
    models = [*folders, *_full(listing), *sorted({found[1] for n in listing.names if (found := _RANK.fullmatch(n))})]
    if len(models) > 1:
        raise CheckpointError(
            f"holds {len(models)} models ({', '.join(models)}); one at a time can be merged: give the path of its directory"
        )
    if folders:
        return dcp.chosen(dcp.read(listing, folders[0]), variant)
    if _full(listing):
        return hf_dir.read_torch(listing, _full(listing))
    return rank_files.merged(listing, list(_ranks(listing).values()), variant)


def _full(listing: Listing) -> list[str]:
    return sorted(name for name in listing.names if _FULL.fullmatch(name))


def _ranks(listing: Listing) -> dict[int, str]:
    found = {int(m[2]): name for name in listing.names if (m := _RANK.fullmatch(name))}
    return dict(sorted(found.items()))
