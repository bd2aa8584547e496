"""One ``torch.save`` file of DTensors a rank, ``model_world_size_<W>_rank_<r>.pt``: LMMs-Engine (with EMA) and verl.

LMMs-Engine lays them in ``checkpoint-<step>/pytorch_model_fsdp_0/`` and ``pytorch_ema_model_fsdp_0/``, which stays empty for good while the
average is not kept, verl in ``global_step_<step>/actor/``, with ``fsdp_config.json``. No file is written behind all others: it is
whole when all ranks' files are whole, in every folder that has some, and rank 0 has written its config.
"""

import re
from collections.abc import Iterable
from dataclasses import replace

from assayer.checkpoint import Listing, Position, count_of, first_absent, first_incomplete
from assayer.containers import model_names
from assayer.errors import CheckpointError
from assayer.files import printable
from assayer.formats import single_file
from assayer.pickles import Local, Sharded, Unsupported
from assayer.placement import box_of
from assayer.tensors import Dtype, Piece, Tensor, cover, dtype_of, piece_of
from assayer.torch_file import TorchFile, leaves, read_torch_file

REFINES = ("accelerate_fsdp", "hf_dir", "accelerate")
FOLDERS = r"pytorch_model_fsdp_\d+|pytorch_ema_model_fsdp_\d+|optimizer|extra_state|dataloader_state|actor|critic|huggingface"
RESUMING = (
    r"(optimizer|extra_state|dataloader_state|critic)/.*|(.*/)?(optim|extra_state)_world_size_\d+_rank_\d+\.pt"
    r"|(optimizer|scheduler)\.pt|rng_state(_\d+)?\.pth"
)
SHARDED = True

# Seconds between the ranks' files of one save; when they are further apart, the quiet period decides.
_SPREAD = 1.0
_FILE = re.compile(r"((?:[^/]+/)?)(\w+)_world_size_(\d+)_rank_(\d+)\.pt")
_REGULAR = re.compile(r"(?:(?:pytorch_model_fsdp_\d+|actor)/)?model_world_size_\d+_rank_\d+\.pt")
_EMA = re.compile(r"pytorch_ema_model_fsdp_\d+/model_world_size_\d+_rank_\d+\.pt")
# Bytes of a description that is read for a position alone.
_GLANCE = 4 << 20
_EMA_FOLDER = re.compile(r"pytorch_ema_model_fsdp_\d+")
_CONFIG = ("config.json", "fsdp_config.json", "actor/fsdp_config.json", "huggingface/config.json", "data.pt")


def claims(listing: Listing) -> bool:
    # The average's folder is a part of the checkpoint around it, also before the first regular file is there.
    return listing.is_directory and not _EMA_FOLDER.fullmatch(listing.name) and any(_REGULAR.fullmatch(name) for name in listing.names)


def missing(listing: Listing) -> str | None:
    groups: dict[tuple[str, str], dict[int, str]] = {}
    worlds: dict[tuple[str, str], set[int]] = {}
    for name in listing.names:
        found = _FILE.fullmatch(name)
        # verl's critic is another model, of a world of its own.
        if found and not found[1].startswith("critic/"):
            groups.setdefault((found[1], found[2]), {})[int(found[4])] = name
            worlds.setdefault((found[1], found[2]), set()).add(int(found[3]))
    for (folder, kind), files in sorted(groups.items()):
        sizes = worlds[folder, kind]
        if len(sizes) > 1:
            return f"holds the files of runs on {' and '.join(map(str, sorted(sizes)))} ranks"
        (world,) = sizes
        absent = first_absent(files, count=world)
        if absent is not None and absent < world:
            return f"no {folder}{kind}_world_size_{world}_rank_{absent}.pt yet"
        if len(files) > world or world < 1:
            return f"holds the file of rank {max(files)} of {world}"
    return first_incomplete(listing, weights(listing))


def unmarked(listing: Listing) -> str | None:
    if not any(name in listing.names for name in _CONFIG):
        return "no config.json"
    return apart(listing, weights(listing))


def apart(listing: Listing, names: Iterable[str]) -> str | None:
    """Why only time can tell whether all ranks' files are of one save: between theirs, files of an older one may still lie there."""
    times = [e.mtime_ns for e in listing.entries if e.name in set(names)]
    spread = (max(times) - min(times)) / 1e9
    return f"its files were written {spread:.0f} s apart: perhaps it is being saved again" if spread > _SPREAD else None


def position(listing: Listing) -> Position:
    """The step from the name; LMMs-Engine keeps the tokens in rank 0's extra state."""
    named = single_file.position_in(listing.path.rstrip("/").split("/")[-2] if listing.name == "actor" else listing.name)
    extra = next((name for name in listing.names if re.fullmatch(r"extra_state/extra_state_world_size_\d+_rank_0\.pt", name)), None)
    try:
        tree = read_torch_file(listing.file(extra), extra, _GLANCE).tree if extra else None
    except (CheckpointError, OSError):
        tree = None
    return replace(named, tokens=count_of(tree.get("total_tokens")) if isinstance(tree, dict) else None)


def weights(listing: Listing) -> tuple[str, ...]:
    return tuple(sorted(name for name in listing.names if _REGULAR.fullmatch(name) or _EMA.fullmatch(name)))


def variants(listing: Listing) -> tuple[str, ...]:
    return ("regular", "ema") if any(_EMA.fullmatch(name) for name in listing.names) else ("regular",)


def tensors(listing: Listing, variant: str) -> list[Tensor]:
    pattern = _EMA if variant == "ema" else _REGULAR
    files = [name for name in listing.names if pattern.fullmatch(name)]
    if not files:
        raise CheckpointError(f"{printable(listing.path)} holds no EMA weights")
    return merged(listing, sorted(files, key=_rank), "regular")


def _rank(name: str) -> int:
    return int(re.findall(r"\d+", name)[-1])


def merged(listing: Listing, files: list[str], variant: str) -> list[Tensor]:
    """The tensors that the ranks' files make up, in the order of ranks.

    Raises:
        CheckpointError: a part is missing, or the ranks contradict each other.
        OSError: a file cannot be read.
    """
    found: dict[str, Tensor] = {}
    for name in files:
        file = read_torch_file(listing.file(name), name)
        held = dict(leaves(file.tree))
        for path, key in model_names(held, variant).items():
            _add(found, key, held[path], file)
    for tensor in found.values():
        cover(tensor)
    return list(found.values())


def _add(found: dict[str, Tensor], key: str, leaf: Local | Sharded | Unsupported, file: TorchFile) -> None:
    if isinstance(leaf, Unsupported):
        raise CheckpointError(f"{printable(file.name)} holds {printable(key)} as {printable(leaf.kind)}, which is not merged")
    local = leaf.local if isinstance(leaf, Sharded) else leaf
    if local is None:
        return
    dtype = dtype_of(local.dtype, key)
    shape = leaf.shape if isinstance(leaf, Sharded) else leaf.size
    tensor = found.setdefault(key, Tensor(key, dtype, shape, []))
    if tensor.shape != shape or tensor.dtype is not dtype:
        told = f"{dtype.torch} {list(shape)}, another rank as {tensor.dtype.torch} {list(tensor.shape)}"
        raise CheckpointError(f"{printable(file.name)} holds {printable(key)} as {told}")
    tensor.pieces = [*tensor.pieces, *_pieces(key, leaf, local, shape, dtype, file)]


def _pieces(key: str, leaf: Local | Sharded, local: Local, shape: tuple[int, ...], dtype: Dtype, file: TorchFile) -> list[Piece]:
    if not isinstance(leaf, Sharded):
        box = (0,) * len(shape), shape
    else:
        place = box_of(leaf.spec, shape, key)
        if place is None:
            return []
        box = place
    if 0 in box[1]:
        return []
    if local.size != box[1]:
        raise CheckpointError(f"{printable(file.name)} holds {list(local.size)} of {printable(key)}, its placement says {list(box[1])}")
    return [piece_of(file.name, local, file.records, *box, dtype)]
