"""A distributed checkpoint in a folder of its checkpoint: NeMo 2 (``<name>/weights/``), NeMo Automodel (``epoch_0_step_19/model/``).

Beside it lie ``context/``, ``optim/`` and the like. The name that tells the step is the outer one, and results belong beside that.
"""

from assayer.checkpoint import Listing, Position
from assayer.formats import dcp, megatron, single_file
from assayer.tensors import Tensor

REFINES: tuple[str, ...] = ()
FOLDERS = r"weights|model_weights|model|optim|optimizer|context"
RESUMING = r"(optim|optimizer|context)/.*"
SHARDED = True

_MODEL = r"weights|model_weights|model"

unmarked = dcp.unmarked
variants = megatron.variants


def claims(listing: Listing) -> bool:
    # A run's own directory may be called anything, and hold a folder called so: a checkpoint's name has a number.
    return listing.is_directory and single_file.position_in(listing.name).number is not None and _folder(listing) is not None


def missing(listing: Listing) -> str | None:
    folder = _folder(listing) or ""
    return dcp.missing_in(listing, folder) or megatron.missing_mark(listing, folder)


def position(listing: Listing) -> Position:
    return dcp.position(listing)


def weights(listing: Listing) -> tuple[str, ...]:
    return dcp.weights_in(listing, _folder(listing) or "")


def tensors(listing: Listing, variant: str) -> list[Tensor]:
    return megatron.tensors_in(listing, _folder(listing) or "", variant)


def _folder(listing: Listing) -> str | None:
    return next((folder for folder in listing.folders(_MODEL) if dcp.has_shards(listing, folder)), None)
