"""``python -m trainers.check ROOT``: read samples back, chunk by chunk, and compare them with what is expected of them."""

import io
import json
import logging
import pickle
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore

from trainers import Sample, load_expected, load_samples, megatron, native
from trainers.pretend import pretend


def read_dcp(folder: Path, metadata: str) -> dict[str, Tensor]:
    """Every tensor of a DCP directory, keyed by its last path, with the optimizer's left out."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob(metadata)):
        table: Any = pickle.loads(path.read_bytes())
        for index, place in table.storage_data.items():
            about = table.state_dict_metadata[index.fqn]
            if not isinstance(about, TensorStorageMetadata) or index.fqn.startswith(("optim", "app.optim")):
                continue
            data = (folder / place.relative_path).read_bytes()[place.offset : place.offset + place.length]
            chunk = torch.load(io.BytesIO(data), weights_only=True)
            into = found.setdefault(index.fqn, torch.empty(about.size, dtype=chunk.dtype))
            into[tuple(slice(at, at + size) for at, size in zip(index.offset or [0] * chunk.dim(), chunk.shape, strict=True))] = chunk
    return found


def read_ranks(files: list[Path]) -> dict[str, Tensor]:
    """Every tensor of per-rank torch.save files; each DTensor or ShardedTensor says where its rank's part belongs.

    The mesh of a part of the ranks tells which they are only to a process of such a rank: each file is read as its own rank.
    """
    found: dict[str, Tensor] = {}
    for file in files:
        rank = int(re.findall(r"\d+", file.name)[-1])
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=len(files))
        for name, value in torch.load(file, weights_only=False, map_location="cpu").items():
            for offset, part in local_parts(value, rank):
                into = found.setdefault(name, torch.empty(value.size(), dtype=value.dtype))
                into[tuple(slice(at, at + size) for at, size in zip(offset, part.shape, strict=True))] = part
        dist.destroy_process_group()
    return found


def local_parts(value: Any, rank: int) -> list[tuple[Sequence[int], Tensor]]:
    """What one rank's value holds: parts and where they begin."""
    if isinstance(value, ShardedTensor):
        return [(shard.metadata.shard_offsets, shard.tensor) for shard in value.local_shards()]
    if not isinstance(value, DTensor):
        return [([0] * value.dim(), value)]
    spec = value._spec
    where = (spec.mesh.mesh == rank).nonzero()
    if not len(where):
        return []
    place = [int(at) for at in where[0]]
    _, offset = _compute_local_shape_and_global_offset(spec.shape, spec.mesh.shape, place.__getitem__, spec.placements)
    return [(offset, value._local_tensor)]


def read_safetensors_shards(files: list[Path]) -> dict[str, Tensor]:
    """Every tensor of DCP's safetensors shards, as large as its parts reach."""
    parts: dict[str, list[tuple[list[int], Tensor]]] = {}
    for file in files:
        with safe_open(file, "pt") as shard:
            places = json.loads(shard.metadata()["DCP_SHARDING_INFO"])
            for name in shard.keys():  # noqa: SIM118
                parts.setdefault(name, []).append((places[name]["saved_offsets"], shard.get_tensor(name)))
    found = {}
    for name, pieces in parts.items():
        size = [max(offset[at] + part.shape[at] for offset, part in pieces) for at in range(pieces[0][1].dim())]
        found[name] = torch.empty(size, dtype=pieces[0][1].dtype)
        for offset, part in pieces:
            found[name][tuple(slice(at, at + length) for at, length in zip(offset, part.shape, strict=True))] = part
    return found


def read(sample: Sample) -> dict[str, Tensor] | None:
    """What this reader finds in a sample; None for the forms it does not know."""
    folder = {"olmo_core": "model_and_optim", "accelerate_fsdp": "pytorch_model_fsdp_0"}.get(sample.format, ".")
    if next((sample.path / folder).rglob(".metadata"), None):
        found: dict[str, Tensor] = {}
        with (
            pretend("olmo_core.distributed.checkpoint.filesystem", native._StorageInfo),
            pretend("megatron.core.dist_checkpointing.strategies.torch", megatron.MCoreMetadata, megatron.MCoreSavePlan),
        ):
            for path in sorted((sample.path / folder).rglob(".metadata")):
                found |= read_dcp(path.parent, ".metadata")
        return found
    if sample.format == "dcp_rank_local":
        return read_dcp(sample.path, "__*.metadata")
    ranks = sorted(
        file for glob in ("model_world_size_*", "pytorch_model_fsdp_0/model_*", "*_fsdp_0_rank*") for file in sample.path.glob(glob)
    )
    whole = sorted(file for glob in ("*.safetensors", "pytorch_model*.bin") for file in sample.path.glob(glob))
    if ranks:
        return read_ranks(ranks)
    if sample.format == "dcp_safetensors":
        return read_safetensors_shards(whole)
    if sample.format == "lightning_file":
        state = torch.load(sample.path, weights_only=True)["state_dict"]
        return {name.removeprefix("network."): value for name, value in state.items()}
    if whole:
        return load_file(whole[0]) if whole[0].suffix == ".safetensors" else torch.load(whole[0], weights_only=True)
    return None


def bare(name: str, prefix: str) -> str:
    return name.removeprefix(prefix).replace("._checkpoint_wrapped_module.", ".")


def same(found: Tensor, expected: Tensor) -> bool:
    """Equal bit by bit: some dtypes cannot be compared."""
    bits = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (found, expected)]
    return found.dtype == expected.dtype and found.shape == expected.shape and bits[0].equal(bits[1])


def main(root: Path) -> int:
    logging.disable(logging.WARNING)
    wrong = 0
    for sample in load_samples(root):
        found, expected = read(sample), load_expected(sample)
        if found is None:
            print(f"{sample.name:32} not read here")
            continue
        for prefix in ("model.", "app.model.", "model.network.", "state_dict.network.", "model.module._orig_mod."):
            if not set(expected) <= set(found):
                found |= {bare(name, prefix): value for name, value in found.items() if name.startswith(prefix)}
        bad = sorted(name for name, value in expected.items() if name not in found or not same(found[name], value))
        wrong += len(bad)
        print(f"{sample.name:32} {len(expected) - len(bad)} of {len(expected)} tensors" + (f", not {', '.join(bad[:5])}" if bad else ""))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
