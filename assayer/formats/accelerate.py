"""What ``Accelerator.save_state`` writes without sharding: ``checkpoint_<count>/`` with the model, then the random states of each rank.

``random_states_<rank>.pkl`` come last (accelerate/checkpointing.py). The number in the name counts saves, not steps.
"""

import re

from assayer.checkpoint import Listing, Position, first_absent
from assayer.formats import hf_dir
from assayer.tensors import Tensor

REFINES = ("hf_dir",)
FOLDERS = ""
RESUMING = r"(optimizer|scheduler|sampler|custom_checkpoint)(_\d+)?\.(bin|pt|pkl)|scaler\.pt"
SHARDED = False

_RANDOM = re.compile(r"random_states_(\d+)\.pkl")
_STATES = re.compile(r"(optimizer|scheduler|sampler|custom_checkpoint)(_\d+)?\.(bin|pkl)|random_states_\d+\.pkl|scaler\.pt")


def claims(listing: Listing) -> bool:
    names = listing.names
    return bool(
        listing.is_directory
        and hf_dir.weights(listing)
        and any(_STATES.fullmatch(name) for name in names)
        and not names & {"config.json", hf_dir.STATE, "training_args.bin"}
    )


def missing(listing: Listing) -> str | None:
    return hf_dir.missing(listing) or missing_random_states(listing)


def unmarked(listing: Listing) -> str | None:
    return None


def position(listing: Listing) -> Position:
    return Position() if re.fullmatch(r"checkpoint_\d+", listing.name) else hf_dir.position(listing)


def weights(listing: Listing) -> tuple[str, ...]:
    return hf_dir.weights(listing)


def variants(listing: Listing) -> tuple[str, ...]:
    return ("regular",)


def tensors(listing: Listing, variant: str) -> list[Tensor]:
    return hf_dir.tensors(listing, variant)


def missing_random_states(listing: Listing) -> str | None:
    """Why accelerate has not finished: each rank writes its random states at the very end."""
    absent = first_absent((int(found[1]) for name in listing.names if (found := _RANDOM.fullmatch(name))), count=1)
    return None if absent is None else f"no random_states_{absent}.pkl yet"
