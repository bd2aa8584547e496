"""DeepSpeed: ``<tag>/*_model_states.pt`` and ``*_optim_states.pt``, and ``latest`` beside the tag's folder, which names the last tag.

ZeRO keeps the weights in float32 as flat ranges in the optimizer's files: stages 1 and 2 cut all parameters of a group, one behind the
other, into one range a rank; stage 3 cuts every parameter by itself. They are put together as DeepSpeed's own ``zero_to_fp32.py`` does
(deepspeed/utils/zero_to_fp32.py, 0.19); of the optimizer's own states nothing is read. Under transformers the tag's folder lies in
``checkpoint-<N>/``, under accelerate it is called ``pytorch_model``, under Lightning ``checkpoint``.
"""

import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from assayer.checkpoint import Listing, Position, first_incomplete
from assayer.containers import model_names
from assayer.errors import CheckpointError, RefusedError
from assayer.files import natural_key, open_file, printable
from assayer.formats import hf_dir, single_file
from assayer.pickles import Inert, Local, text_of
from assayer.tensors import Piece, Tensor, cover, dtype_of, piece_of
from assayer.torch_file import TorchFile, leaves, read_torch_file, whole_tensors

REFINES = ("accelerate",)
FOLDERS = r"global_step\d+|pytorch_model(_\d+)?|checkpoint"
RESUMING = r"(optimizer|scheduler|sampler|custom_checkpoint)(_\d+)?\.(bin|pt|pkl)|scaler\.pt|rng_state(_\d+)?\.pth"
SHARDED = True

# Bytes of a description that is read to see how many files there are.
_GLANCE = 16 << 20
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
# deepspeed/runtime/zero/config.py, ZeroStageEnum.
_STAGES = {"optimizer_states": 1, "gradients": 2, "weights": 3}
_OPTIM = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


def claims(listing: Listing) -> bool:
    return listing.is_directory and _tag(listing) is not None


def missing(listing: Listing) -> str | None:
    tag, named = _number(_own_tag(listing)), _latest(listing)
    last = None if named is None else _number(named)
    if tag is not None and last is not None and last < tag:
        return f"`latest` still names {printable(named or '')[:100]}"
    cut = first_incomplete(listing, weights(listing))
    if cut:
        return cut
    try:
        absent = _absent(listing)
    except RefusedError:
        # It is whole, and the merge will say what it holds.
        absent = None
    except CheckpointError as error:
        return str(error)
    return absent or hf_dir.missing_state(listing)


def unmarked(listing: Listing) -> str | None:
    """A run may be told not to write `latest`; and tags such as ``best`` have no order."""
    tag, named = _own_tag(listing), _latest(listing)
    if named is None:
        return "no `latest`"
    if named == tag or (_number(named) is not None and _number(tag) is not None):
        return None
    return f"`latest` names {printable(named)[:100]}"


def position(listing: Listing) -> Position:
    return hf_dir.position(listing) if hf_dir.STATE in listing.names else single_file.position_in(listing.name.removesuffix(".ckpt"))


def weights(listing: Listing) -> tuple[str, ...]:
    tag = _tag(listing) or ""
    prefix = f"{tag}/" if tag else ""
    return tuple(sorted(prefix + n for n in listing.in_folder(tag) if _MODEL.fullmatch(n) or _OPTIM.fullmatch(n)))


def variants(listing: Listing) -> tuple[str, ...]:
    return ("regular",)


def tensors(listing: Listing, variant: str) -> list[Tensor]:
    parts = _read(listing)
    found: dict[str, Tensor] = {}
    stage = parts.stage
    module = [path for path, _ in leaves(parts.model.tree) if path[0] == "module"]
    known = set(parts.shapes) | set(parts.shared)
    for tensor in whole_tensors(parts.model, model_names(module)):
        # Under stage 3 the module's own parameters are empty; what is there beside them are buffers.
        if stage == 0 or (tensor.name not in known and not (stage == 3 and tensor.shape == (0,))):
            found[tensor.name] = tensor
    if stage == 3:
        found |= {tensor.name: tensor for tensor in _frozen(listing, parts)}
    if stage:
        found |= {tensor.name: tensor for tensor in (_stage3(parts) if stage == 3 else _stage2(parts))}
        for alias, source in parts.shared.items():
            if source in found:
                found[alias] = replace(found[source], name=alias)
    for tensor in found.values():
        cover(tensor)
    return list(found.values())


@dataclass
class _Parts:
    """What the files of one tag tell. ``flat``: for each rank its groups of flat ranges, with the file that holds them."""

    model: TorchFile
    stage: int
    shapes: dict[str, tuple[int, ...]]
    groups: list[list[str]]
    shared: dict[str, str]
    flat: list[tuple[TorchFile, list[Local]]]
    paddings: list[list[int]] | None


def _tag(listing: Listing) -> str | None:
    """The folder of the listing that holds the files ("" for itself); None when this is no such checkpoint."""
    if any(_MODEL.fullmatch(name) for name in listing.in_folder("")):
        # Inside a Trainer's checkpoint the tag's folder is a part of that.
        return None if re.fullmatch(r"checkpoint-\d+", listing.path.rstrip("/").split("/")[-2]) else ""
    allowed = r"pytorch_model(_\d+)?"
    if re.fullmatch(r"checkpoint-\d+", listing.name):
        allowed += r"|global_step\d+"
    if listing.name.endswith(".ckpt"):
        allowed += "|checkpoint"
    found = [f for f in listing.folders(allowed) if any(_MODEL.fullmatch(name) for name in listing.in_folder(f))]
    # The trainer saves twice where its steps and the engine's differ: the last tag is the one that `latest` names.
    return found[-1] if found else None


def _own_tag(listing: Listing) -> str:
    return _tag(listing) or listing.name


def _latest(listing: Listing) -> str | None:
    """The tag that `latest` names; None when there is no such file. A link, or a named pipe, is none of DeepSpeed's."""
    folder = listing.path.rstrip("/") if _tag(listing) else listing.path.rstrip("/").rpartition("/")[0]
    try:
        with open_file(Path(folder, "latest"), os.O_NOFOLLOW) as file:
            return file.read(1000).decode(errors="replace").strip()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.EINVAL):
            return None
        raise


def _number(tag: str) -> int | None:
    found = re.fullmatch(r"\D*(\d{1,18})", tag)
    return int(found[1]) if found else None


def _files(listing: Listing, pattern: re.Pattern[str]) -> list[str]:
    names = [name for name in weights(listing) if pattern.fullmatch(name.rpartition("/")[2])]
    return sorted(names, key=natural_key)


def _absent(listing: Listing) -> str | None:
    """Why the files of some rank are still to come: each optimizer's file tells how many there are."""
    files = _files(listing, _OPTIM)
    if not files:
        return None if _stage_of(listing) == 0 else "no *_optim_states.pt yet"
    models = _files(listing, _MODEL)
    # Each rank of tensor parallelism has files of its own for every rank of data parallelism.
    parallel = len({found[2] for name in models if (found := _MODEL.fullmatch(name.rpartition("/")[2]))})
    wanted = parallel * _world(_optimizer(read_torch_file(listing.file(files[0]), files[0], _GLANCE)))
    if models[0].rpartition("/")[2].startswith("zero_pp_rank_") and len(models) != wanted:
        return f"{len(models)} of {wanted} *_model_states.pt are there"
    return None if len(files) == wanted else f"{len(files)} of {wanted} *_optim_states.pt are there"


def _stage_of(listing: Listing) -> int:
    """0 where the model's file says that there is no flat range of it elsewhere."""
    name = _files(listing, _MODEL)[0]
    if name.rpartition("/")[2].startswith("zero_pp_rank_"):
        return 3
    tree = read_torch_file(listing.file(name), name, _GLANCE).tree
    return 1 if isinstance(tree, dict) and tree.get("param_shapes") else 0


def _optimizer(file: TorchFile) -> dict[str, Any]:
    state = file.tree.get("optimizer_state_dict") if isinstance(file.tree, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{printable(file.name)} holds no optimizer_state_dict")
    return state


def _world(state: dict[str, Any]) -> int:
    count = state.get("partition_count")
    counts = list(count) if isinstance(count, list | tuple) else [count]
    world = max((n for n in counts if isinstance(n, int)), default=0)
    if not 1 <= world < 10**6:
        raise CheckpointError("the optimizer's files do not tell their number (partition_count)")
    return world


def _read(listing: Listing) -> _Parts:
    models, optims = _files(listing, _MODEL), _files(listing, _OPTIM)
    ranks = {found[2] for name in models if (found := _MODEL.fullmatch(name.rpartition("/")[2]))}
    if len(ranks) > 1:
        raise CheckpointError(f"{printable(listing.path)} was cut by tensor parallelism over {len(ranks)} ranks, which is not merged")
    model = read_torch_file(listing.file(models[0]), models[0])
    if not isinstance(model.tree, dict):
        raise CheckpointError(f"{printable(models[0])} holds no model of DeepSpeed's")
    shared = model.tree.get("shared_params")
    pairs = shared.items() if isinstance(shared, dict) else shared or []
    aliases = {text_of(alias): text_of(source) for alias, source in pairs}
    if not optims or not model.tree.get("param_shapes"):
        return _Parts(model, 0, {}, [], {}, [], None)
    files = [read_torch_file(listing.file(name), name) for name in optims]
    states = [_optimizer(file) for file in files]
    stage = _stage(states[0], optims[0])
    if len(files) != _world(states[0]):
        raise CheckpointError(f"{printable(listing.path)} holds {len(files)} of {_world(states[0])} *_optim_states.pt")
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    flat = []
    for file, state in zip(files, states, strict=True):
        groups = state.get(key)
        if not isinstance(groups, list) or any(not isinstance(g, Local) or len(g.size) != 1 for g in groups):
            raise CheckpointError(f"{printable(file.name)} holds no {key}")
        flat.append((file, groups))
    told = model.tree["param_shapes"]
    tables = told if isinstance(told, list) else [told]
    shapes = {text_of(name): tuple(shape) for table in tables for name, shape in table.items()}
    paddings = states[0].get("param_alignment_paddings")
    return _Parts(model, stage, shapes, [[text_of(name) for name in table] for table in tables], aliases, flat, paddings)


def _stage(state: dict[str, Any], name: str) -> int:
    stage = state.get("zero_stage")
    number = stage.args[0] if isinstance(stage, Inert) and stage.args else stage
    if isinstance(stage, type):
        # Python 3.11.0 to 3.11.3 pickle an enum's member by its name.
        number = _STAGES.get(str(getattr(stage, "given", "")).rpartition(".")[2])
    if number not in (1, 2, 3):
        raise CheckpointError(f"{printable(name)} is none of ZeRO's stages 1 to 3 (zero_stage {printable(text_of(number))})")
    return int(number)


def _ranges(file: TorchFile, groups: list[Local], offset: int, length: int, begin: int) -> Iterator[Piece]:
    """Where ``length`` elements from ``offset`` of a rank's groups, one behind the other, lie; as pieces of a row from ``begin`` on."""
    for group in groups:
        count = group.size[0]
        if length and offset < count:
            taken = min(length, count - offset)
            part = replace(group, offset=group.offset + offset, size=(taken,), stride=(1,))
            yield piece_of(file.name, part, file.records, (begin,), (taken,), dtype_of(group.dtype, file.name))
            begin, length, offset = begin + taken, length - taken, 0
        else:
            offset = max(0, offset - count)
    if length:
        raise CheckpointError(f"{printable(file.name)} ends {length} elements before the last parameter does")


def _stage2(parts: _Parts) -> Iterator[Tensor]:
    for number, names in enumerate(parts.groups):
        bounds: list[tuple[TorchFile, Local, int]] = []
        total = 0
        for file, groups in parts.flat:
            if number >= len(groups):
                raise CheckpointError(f"{printable(file.name)} holds {len(groups)} of {len(parts.groups)} groups of parameters")
            bounds.append((file, groups[number], total))
            total += groups[number].size[0]
        offset = 0
        for place, name in enumerate(names):
            count = prod(parts.shapes[name])
            pieces = [
                piece
                for file, group, first in bounds
                if first < offset + count and offset < first + group.size[0]
                for piece in _ranges(
                    file,
                    [group],
                    max(0, offset - first),
                    min(offset + count, first + group.size[0]) - max(offset, first),
                    max(0, first - offset),
                )
            ]
            yield Tensor(name, dtype_of(bounds[0][1].dtype, name), parts.shapes[name], pieces, flat=True)
            offset += count + (parts.paddings[number][place] if parts.paddings else 0)
        if offset > total:
            raise CheckpointError(f"the parameters of group {number} have {offset} elements, the ranks hold {total}")


def _stage3(parts: _Parts) -> Iterator[Tensor]:
    world = len(parts.flat)
    offset = 0
    for name, shape in parts.shapes.items():
        count = prod(shape)
        share = -(-count // world)
        pieces: list[Piece] = []
        for rank, (file, groups) in enumerate(parts.flat):
            kept = max(0, min(share, count - rank * share))
            pieces += _ranges(file, groups, offset, kept, rank * share)
        yield Tensor(name, dtype_of(parts.flat[0][1][0].dtype, name), shape, pieces, flat=True)
        offset += share


def _frozen(listing: Listing, parts: _Parts) -> Iterator[Tensor]:
    """Parameters that are not trained: of stage 3 each rank's model file holds its share, in the dtype of training."""
    shapes = parts.model.tree.get("frozen_param_shapes") or {}
    files = [read_torch_file(listing.file(name), name) for name in _files(listing, _MODEL)]
    for name, told in shapes.items():
        shape = tuple(told)
        count = prod(shape)
        pieces: list[Piece] = []
        begin = 0
        for file in files:
            part = (file.tree.get("frozen_param_fragments") or {}).get(name)
            if not isinstance(part, Local) or len(part.size) != 1:
                raise CheckpointError(f"{printable(file.name)} holds no share of the frozen {printable(str(name))}")
            kept = max(0, min(part.size[0], count - begin))
            pieces += _ranges(file, [part], 0, kept, begin)
            begin += part.size[0]
            dtype = part.dtype
        yield Tensor(str(name), dtype_of(dtype, str(name)), shape, pieces, flat=True)
