"""Megatron-Core ``torch_dist`` checkpoints of two tensor-parallel ranks; Megatron is not installed.

Layout, keys, chunks and the pickle are those of megatron_core 0.16.1 (core/dist_checkpointing/strategies/torch.py), compared with what it
wrote itself. Items are torch.save archives, as torch's own writer makes them; two files a rank. Three ages of it: classes of Megatron's
own in the pickle and a layer number in each key (0.9); all layers in one tensor (0.16); no common.pt (0.19).
"""

import argparse
import io
import json
import pickle
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from trainers import Sample, llama, save_expected
from trainers.pretend import pretend

RANKS = 2
PADDED_VOCABULARY = 64

Cut = list[tuple[int, tuple[int, ...], tuple[int, ...]]]
"""Chunks as (rank, offset, size)."""


class MCoreMetadata(Metadata):
    """megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata."""


class MCoreSavePlan(SavePlan):
    """megatron.core.dist_checkpointing.strategies.torch.MCoreSavePlan."""


class AttnBackend(Enum):
    """megatron.core.transformer.enums.AttnBackend."""

    flash = 1
    auto = 5


def layer(hf: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """One layer: queries, keys and values interleaved by group; the gate above the up projection."""
    prefix, groups = f"model.layers.{number}.", llama.KEY_VALUE_HEADS
    parts = [hf[f"{prefix}self_attn.{name}_proj.weight"].unflatten(0, (groups, -1)) for name in "qkv"]
    return {
        "self_attention.linear_qkv.weight": torch.cat(parts, 1).flatten(0, 1),
        "self_attention.linear_qkv.layer_norm_weight": hf[f"{prefix}input_layernorm.weight"],
        "self_attention.linear_proj.weight": hf[f"{prefix}self_attn.o_proj.weight"],
        "mlp.linear_fc1.weight": torch.cat([hf[f"{prefix}mlp.gate_proj.weight"], hf[f"{prefix}mlp.up_proj.weight"]]),
        "mlp.linear_fc1.layer_norm_weight": hf[f"{prefix}post_attention_layernorm.weight"],
        "mlp.linear_fc2.weight": hf[f"{prefix}mlp.down_proj.weight"],
    }


def weights(hf: dict[str, Tensor], *, stacked: bool) -> dict[str, Tensor]:
    """A Llama under Megatron-Core's keys: all layers in one tensor, or each under its number."""
    pad = torch.zeros(PADDED_VOCABULARY - len(hf["lm_head.weight"]), hf["lm_head.weight"].shape[1], dtype=hf["lm_head.weight"].dtype)
    layers = [layer(hf, number) for number in range(llama.config().num_hidden_layers)]
    if stacked:
        decoder = {f"decoder.layers.{name}": torch.stack([part[name] for part in layers]) for name in layers[0]}
    else:
        decoder = {f"decoder.layers.{at}.{name}": value for at, part in enumerate(layers) for name, value in part.items()}
    return {
        "embedding.word_embeddings.weight": torch.cat([hf["model.embed_tokens.weight"], pad]),
        **decoder,
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
        "output_layer.weight": torch.cat([hf["lm_head.weight"], pad]),
    }


def cut(name: str, shape: torch.Size, *, stacked: bool) -> Cut:
    """Which rank writes which part: rows, columns, both halves of a gated projection, or rank 0 what all hold."""
    lead = 1 if stacked and name.startswith("decoder.layers.") else 0
    body = shape[lead:]
    if len(body) == 1:
        parts: Cut = [(0, (0,), tuple(body))]
    elif name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        step = body[1] // RANKS
        parts = [(rank, (0, rank * step), (body[0], step)) for rank in range(RANKS)]
    else:
        halves = 2 if name.endswith("linear_fc1.weight") else 1
        step = body[0] // (RANKS * halves)
        parts = [(rank, ((half * RANKS + rank) * step, 0), (step, body[1])) for rank in range(RANKS) for half in range(halves)]
    if not lead:
        return parts
    return [(rank, (at, *offset), (1, *size)) for at in range(shape[0]) for rank, offset, size in parts]


class Writer:
    """The shards of one directory and what .metadata says of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tables: dict[str, Any] = {}
        self.places: dict[MetadataIndex, _StorageInfo] = {}
        self.plans: list[list[WriteItem]] = [[] for _ in range(RANKS)]
        folder.mkdir(parents=True)

    def tensor(self, name: str, value: Tensor, parts: Cut) -> None:
        properties = TensorProperties(dtype=value.dtype)
        chunks = [ChunkStorageMetadata(torch.Size(offset), torch.Size(size)) for _, offset, size in parts]
        self.tables[name] = TensorStorageMetadata(properties, value.shape, chunks)
        counts = [0] * RANKS
        for (rank, offset, size), chunk in zip(parts, chunks, strict=True):
            # The index counts a rank's own chunks: only the offset says which chunk it is.
            index = MetadataIndex(name, torch.Size(offset), counts[rank])
            counts[rank] += 1
            part = value[tuple(slice(at, at + length) for at, length in zip(offset, size, strict=True))].clone()
            data = TensorWriteData(chunk, properties, value.shape)
            self._item(WriteItem(index, WriteItemType.SHARD, tensor_data=data), rank, part)

    def object(self, name: str, value: Any) -> None:
        self.tables[name] = BytesStorageMetadata()
        self._item(WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO), 0, [value])

    def _item(self, item: WriteItem, rank: int, content: Any) -> None:
        blob = io.BytesIO()
        torch.save(content, blob)
        path = self.folder / f"__{rank}_{len(self.plans[rank]) % 2}.distcp"
        with path.open("ab") as file:
            self.places[item.index] = _StorageInfo(path.name, file.tell(), blob.tell())
            file.write(blob.getvalue())
        self.plans[rank].append(item)

    def finish(self, *, old: bool) -> None:
        with pretend("megatron.core.dist_checkpointing.strategies.torch", MCoreMetadata, MCoreSavePlan):
            metadata: Any = (MCoreMetadata if old else Metadata)(self.tables, storage_data=self.places)
            metadata.storage_meta = StorageMeta(str(self.folder))
            metadata.all_local_plans = [(MCoreSavePlan if old else SavePlan)(items, planner_data={}) for items in self.plans]
            if old:
                metadata.version = None
                metadata.mcore_data = {name: {} for name in self.tables}
                for plan in metadata.all_local_plans:
                    object.__setattr__(plan, "mcore_data", {})
            (self.folder / ".metadata").write_bytes(pickle.dumps(metadata))


def common(step: int) -> dict[str, Any]:
    """The state that is the same on every rank; ``args`` tells the model's shape."""
    config = llama.config()
    args = argparse.Namespace(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=4,
        padded_vocab_size=PADDED_VOCABULARY,
        untie_embeddings_and_output_weights=True,
        swiglu=True,
        params_dtype=torch.bfloat16,
        attention_backend=AttnBackend.auto,
        seq_length=32,
        consumed_train_samples=8 * step,
        iteration=step,
    )
    return {"args": args, "checkpoint_version": 3.0, "iteration": step, "opt_param_scheduler": {"num_steps": step}, "content_metadata": {}}


def states(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The optimizer's tensors for one parameter, with the float32 master among them."""
    yield f"optimizer.state.exp_avg.{name}", torch.zeros(value.shape)
    yield f"optimizer.state.exp_avg_sq.{name}", torch.zeros(value.shape)
    yield f"optimizer.state.fp32_param.{name}", value.float()


def megatron(root: Path) -> list[Sample]:
    """Shards, .metadata, metadata.json last; then the file at the top that names the newest iteration."""
    samples = []
    for name, step, stacked, old, has_common in (
        ("megatron", 500, True, False, True),
        ("megatron_old", 600, False, True, True),
        ("megatron_new", 700, True, False, False),
    ):
        hf = llama.weights(llama.model(step))
        full = weights(hf, stacked=stacked)
        path = root / name / f"iter_{step:07d}"
        writer = Writer(path)
        with pretend("megatron.core.transformer.enums", AttnBackend):
            if has_common:
                torch.save(common(step), path / "common.pt")
            else:
                writer.object("common_state/shard_0_1", common(step))
        for key, value in full.items():
            parts = cut(key, value.shape, stacked=stacked)
            writer.tensor(key, value, parts)
            for state, tensor in states(key, value):
                writer.tensor(state, tensor, parts)
        for at in range(2):
            key = "decoder.layers.self_attention.linear_qkv._extra_state" if stacked else f"decoder.layers.{at}.mlp.linear_fc1._extra_state"
            writer.object(f"{key}/shard_{at}_2" if stacked else f"{key}/shard_0_1", None)
        writer.object("rng_state/shard_0.0_1.1", {"random_rng_state": 1})
        writer.finish(old=old)
        backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
        (path / "metadata.json").write_text(json.dumps(backends))
        (path.parent / "latest_checkpointed_iteration.txt").write_text(str(step))
        expected, expected_hf = save_expected(root, name, full), save_expected(root, f"{name}_hf", hf)
        samples.append(Sample(name, path, expected, "megatron", step=step, expected_hf=expected_hf, real=False))
    return samples
