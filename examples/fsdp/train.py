"""Trains a small Llama on bytes of English under FSDP2, in as many CPU processes as torchrun starts, and saves it sharded.

The text is Python's own documentation, which comes with every Python (``pydoc_data.topics``). Every save is torch's own distributed
checkpoint, by turns written at once and in the background (``dcp.async_save``); nothing here knows of assayer.
"""

import argparse
import os
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

LENGTH = 128


def text(held_out: bool) -> torch.Tensor:
    """The documentation as bytes (int64, one dimension): every eighth topic is held out of training."""
    kept = [topics[name] for i, name in enumerate(sorted(topics)) if (i % 8 == 0) is held_out]
    return torch.tensor(list("\n".join(kept).encode()))


def batch(data: torch.Tensor, size: int, chance: torch.Generator) -> torch.Tensor:
    starts = torch.randint(0, len(data) - LENGTH, (size,), generator=chance)
    return torch.stack([data[start : start + LENGTH] for start in starts.tolist()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "checkpoints")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--save_every", type=int, default=20)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        architectures=["LlamaForCausalLM"],
    )
    model = LlamaForCausalLM(config)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    if dist.get_rank() == 0:
        options.output.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(options.output)
    # The background save talks to the other ranks while training does: it needs a group of its own.
    saving = dist.new_group(backend="gloo")
    data, chance = text(held_out=False), torch.Generator().manual_seed(dist.get_rank())
    pending: Any = None
    for step in range(1, options.steps + 1):
        tokens = batch(data, 8, chance)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % options.save_every == 0:
            if pending is not None:
                pending.result()
                pending = None
            state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
            path = str(options.output / f"step_{step}")
            if step // options.save_every % 2:
                dcp.save(state, checkpoint_id=path)
            else:
                pending = dcp.async_save(state, checkpoint_id=path, process_group=saving)
            if dist.get_rank() == 0:
                print(f"step {step}: loss {loss.item():.3f}, saved to {path}", flush=True)
    if pending is not None:
        pending.result()
    dist.barrier()
    # gloo's own end of a process can abort after everything has been saved.
    os._exit(0)


if __name__ == "__main__":
    main()
