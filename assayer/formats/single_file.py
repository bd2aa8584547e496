"""One file that holds the whole model: ``torch.save`` (zip, or the pickle before torch 1.6) and safetensors.

The files that trainers lay beside a model (optimizer, scheduler, random states, one rank's share of a sharded model) carry the same
suffixes and are never taken for one: see the trainers' own savers (transformers/trainer.py, accelerate/checkpointing.py,
deepspeed/runtime/engine.py, verl and LMMs-Engine for ``model_world_size_W_rank_R.pt``).
"""

import os
import re

from assayer.checkpoint import Listing, Position, is_called_after_one
from assayer.containers import model_names
from assayer.content import incomplete, is_legacy
from assayer.safetensors_file import read_header
from assayer.tensors import Piece, Tensor
from assayer.torch_file import leaves, read_torch_file, whole_tensors

REFINES: tuple[str, ...] = ()
FOLDERS = ""
RESUMING = ""
SHARDED = False

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")

_NEVER = re.compile(
    r"(optim|optimizer|opt|opt_state|scheduler|lr_scheduler|scaler|sampler|rng|rng_state|random_states|custom_checkpoint)([_.-]|\d|$)"
    r"|(training_args|train_state|trainer_state|training_state|recipe_state|model_optim_rng|distrib_optim|dl_state_dict)\b"
    r"|(data|dataloader|common|meta)\.(pt|bin)$|(per_rank_)?metadata(_\d+|_latest)*\.pt$"
    # One rank's share: named so, or numbered from 1 on where rank 0 holds all.
    r"|.*(world_size|mp_rank|optim_states|model_states)[_-]?\d*\b.*\.pt$|(.*_)?rank[_-]?\d+\.pt$|ep\d+-ba\d+-rank[1-9]\d*\.pt$"
    r"|pytorch_model.*\.bin$|adapter_model\b|tf_model|flax_model"
    r"|.*-\d+-of-\d+\.(safetensors|bin)$"
)
_STEP = re.compile(r"(?:^|[^a-z])(?:global[_-]?step|step|steps|iteration|iter|it|checkpoint|ba)[=_-]?(\d{1,18})", re.IGNORECASE)
_EPOCH = re.compile(r"(?:^|[^a-z])(?:epoch|ep)[=_-]?(\d{1,18})", re.IGNORECASE)
# Names of a file that say nothing but that it is the one in its folder; ``best`` or ``ema`` may lie beside others in a run's own folder.
_PLAIN = re.compile(r"model(?:_(?:state_dict|state|weights))?|weights|checkpoint|ckpt|state_dict|params", re.IGNORECASE)
_LAST_NUMBER = re.compile(r"(?:^|[_.=-])(\d{1,18})$")


def claims(listing: Listing) -> bool:
    return not listing.is_directory and listing.name.endswith(SUFFIXES) and not _NEVER.match(listing.name)


def missing(listing: Listing) -> str | None:
    for mark in (listing.path, re.sub(r"(-EMA)?\.\w+$", "", listing.path)):
        # NeMo's leaves out the suffix, and that it is an average.
        if os.path.lexists(f"{mark}-unfinished"):
            return f"{os.path.basename(mark)}-unfinished lies beside it"
    return incomplete(listing.file(listing.name))


def unmarked(listing: Listing) -> str | None:
    return "a pickle has no end mark" if is_legacy(listing.file(listing.name)) else None


def position(listing: Listing) -> Position:
    """From the file's own name; where that says nothing at all (``model.pt``), from that of a folder called after its one checkpoint."""
    folder = os.path.basename(os.path.dirname(listing.path))
    if is_called_after_one(folder) and _PLAIN.fullmatch(os.path.splitext(listing.name)[0]):
        return position_in(folder)
    return position_of_name(listing)


def position_of_name(listing: Listing) -> Position:
    """From the file's own name alone."""
    return position_in(listing.name.removesuffix(os.path.splitext(listing.name)[1]))


def weights(listing: Listing) -> tuple[str, ...]:
    return (listing.name,)


def variants(listing: Listing) -> tuple[str, ...]:
    return ("regular",)


def tensors(listing: Listing, variant: str) -> list[Tensor]:
    if listing.name.endswith(".safetensors"):
        return safetensors_in(listing, listing.name)
    file = read_torch_file(listing.file(listing.name), listing.name)
    return whole_tensors(file, model_names([path for path, _ in leaves(file.tree)], variant))


def safetensors_in(listing: Listing, name: str) -> list[Tensor]:
    """The tensors of one safetensors file of the listing."""
    spans, _ = read_header(listing.file(name))
    found = []
    for key, span in spans.items():
        pieces = [] if 0 in span.shape else [Piece(name, (0,) * len(span.shape), span.shape, span.start)]
        found.append(Tensor(key, span.dtype, span.shape, pieces))
    return found


def position_in(stem: str) -> Position:
    """The position that a name tells: ``step``, ``iter``, ``checkpoint``, ``ba`` and ``epoch`` with a number, or a last number."""
    step, epoch = _STEP.search(stem), _EPOCH.search(stem)
    if step is None and epoch is None:
        step = _LAST_NUMBER.search(stem)
    return Position(step=int(step[1]) if step else None, epoch=int(epoch[1]) if epoch else None)
