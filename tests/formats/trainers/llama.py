"""A tiny Llama, its weights known before anything is sharded, and what surrounds it in a training run."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

HEADS, KEY_VALUE_HEADS = 4, 2


def config(*, tied: bool = False) -> LlamaConfig:
    """61 rows and 40 columns: no shard is as long as the next."""
    return LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )


def model(seed: int = 0, *, tied: bool = False, mixed: bool = True) -> Any:
    """A Llama with random weights: bfloat16 with float32 norms, or (``mixed=False``) float32 throughout."""
    torch.manual_seed(seed)
    made = LlamaForCausalLM(config(tied=tied))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) / 50)
    if mixed:
        made.bfloat16()
        for norm in norms(made):
            norm.float()
    return made


def norms(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if type(part).__name__ == "LlamaRMSNorm"]


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict as it is now, tied weights under both names."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def shard(module: Any, mesh: DeviceMesh | None = None) -> Any:
    """FSDP2, as trainers apply it: layer by layer, then the root; the norms by themselves, for their dtype."""
    for part in [*norms(module), *module.model.layers, module]:
        fully_shard(part, mesh=mesh)
    return module


def optimizer(module: nn.Module) -> torch.optim.Optimizer:
    """AdamW after one step at a learning rate of zero: its state is there, the weights are as before."""
    made = torch.optim.AdamW(module.parameters(), lr=0.0, weight_decay=0.0, foreach=False)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    made.step()
    made.zero_grad()
    return made
