"""Trains a small Llama under FSDP2 on Python's standard library, in as many processes as torchrun starts: gloo on CPUs, NCCL on GPUs.

``torchrun --standalone --nproc_per_node 2 train.py OUT`` saves torch's own distributed checkpoints, ``OUT/step_<N>``, and keeps the last
few of them only. Nothing here knows of assayer.
"""

import argparse
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Size:
    """A model's shape, and how it is trained: ``length`` in tokens, ``batch`` in sequences of one process."""

    hidden: int
    layers: int
    heads: int
    length: int
    vocabulary: int
    batch: int
    rate: float


SIZES = {
    "tiny": Size(hidden=128, layers=2, heads=4, length=128, vocabulary=1024, batch=4, rate=2e-3),
    # For GPUs: 0.1 and 1.1 billion parameters, computed in bfloat16.
    "small": Size(hidden=768, layers=12, heads=12, length=512, vocabulary=8192, batch=32, rate=6e-4),
    "large": Size(hidden=2048, layers=22, heads=32, length=1024, vocabulary=8192, batch=8, rate=3e-4),
}


def llama_config(size: Size, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.length,
        bos_token_id=0,
        eos_token_id=0,
        architectures=["LlamaForCausalLM"],
    )


def sharded(config: LlamaConfig, device: str) -> LlamaForCausalLM:
    """The model with random weights, cut over all processes; on GPUs it computes in bfloat16, and its weights are float32."""
    with torch.device(device):
        model = LlamaForCausalLM(config)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if device == "cuda" else MixedPrecisionPolicy()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)
    return model


def batch(data: Any, size: Size, chance: torch.Generator) -> torch.Tensor:
    """Sequences from random places of the training text, (batch, length)."""
    starts = torch.randint(0, len(data) - size.length, (size.batch,), generator=chance).tolist()
    return torch.tensor(np.stack([data[start : start + size.length] for start in starts]).astype(np.int64))


def save(out: Path, step: int, keep: int, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> None:
    """Saves model and optimizer, then deletes what is older than the last ``keep`` checkpoints."""
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=out / f"step_{step}")
    if dist.get_rank() == 0:
        saved = sorted(out.glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))
        for path in saved[:-keep]:
            shutil.rmtree(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the run's directory")
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--save_every", type=int, default=150, help="steps from one checkpoint to the next")
    parser.add_argument("--keep", type=int, default=3, help="how many checkpoints are kept")
    options = parser.parse_args()
    size, out = SIZES[options.size], options.out
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    torch.manual_seed(0)
    if dist.get_rank() == 0:
        corpus.prepare(out, size.vocabulary)
    dist.barrier()
    config = llama_config(size, len(AutoTokenizer.from_pretrained(out)))
    if dist.get_rank() == 0:
        config.save_pretrained(out)
    model = sharded(config, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.rate)
    # The rate rises over the first twentieth of the steps, and falls to nothing from there.
    warm = max(1, options.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / warm, (options.steps - n) / (options.steps - warm)))
    data, chance = np.load(out / "train.npy", mmap_mode="r"), torch.Generator().manual_seed(dist.get_rank())
    began = time.monotonic()
    for step in range(1, options.steps + 1):
        tokens = batch(data, size, chance).to(device)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % options.save_every == 0:
            save(out, step, options.keep, model, optimizer)
            if dist.get_rank() == 0:
                print(f"step {step}: loss {loss.item():.3f} after {time.monotonic() - began:.1f} s", flush=True)
    dist.barrier()
    # gloo's own end of a process can abort after everything has been saved.
    os._exit(0)


if __name__ == "__main__":
    main()
