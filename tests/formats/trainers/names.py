"""The tiny Llama under the parameter names of trainers that have names of their own, as DTensors of an FSDP2 module."""

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from trainers import llama

KEMPNERFORGE = {
    "model.embed_tokens.": "token_embedding.embedding.",
    "lm_head.": "output_head.proj.",
    "model.norm.": "norm.",
    "model.layers.": "layers.",
    ".input_layernorm.": ".attention_norm.",
    ".post_attention_layernorm.": ".mlp_norm.",
    ".self_attn.": ".attention.",
}
TORCHTITAN_OLD = {
    "model.embed_tokens.": "tok_embeddings.",
    "lm_head.": "output.",
    "model.norm.": "norm.",
    "model.layers.": "layers.",
    ".input_layernorm.": ".attention_norm.",
    ".post_attention_layernorm.": ".ffn_norm.",
    **{f".self_attn.{part}_proj.": f".attention.w{part}." for part in "qkvo"},
    ".mlp.gate_proj.": ".feed_forward.w1.",
    ".mlp.down_proj.": ".feed_forward.w2.",
    ".mlp.up_proj.": ".feed_forward.w3.",
}
TORCHTITAN = {
    **TORCHTITAN_OLD,
    "lm_head.": "lm_head.",
    **{f".self_attn.{part}_proj.": f".attention.qkv_linear.w{part}." for part in "qkv"},
}
OLMO_CORE = {
    "model.embed_tokens.": "embeddings.",
    "lm_head.": "lm_head.w_out.",
    "model.norm.": "lm_head.norm.",
    "model.layers.": "blocks.",
    ".input_layernorm.": ".attention_norm.",
    ".post_attention_layernorm.": ".feed_forward_norm.",
    **{f".self_attn.{part}_proj.": f".attention.w_{part}." for part in "qkv"},
    ".self_attn.o_proj.": ".attention.w_out.",
    ".mlp.gate_proj.": ".feed_forward.w1.",
    ".mlp.down_proj.": ".feed_forward.w2.",
    ".mlp.up_proj.": ".feed_forward.w3.",
}
OPTIMUS_DL = {
    "model.embed_tokens.": "transformer.wte.",
    "model.norm.": "transformer.ln_f.",
    "model.layers.": "transformer.h.",
    ".input_layernorm.": ".ln_1.",
    ".post_attention_layernorm.": ".ln_2.",
    **{f".self_attn.{part}_proj.": f".attn.w{part}." for part in "qkvo"},
    ".mlp.gate_proj.": ".mlp.w1.",
    ".mlp.up_proj.": ".mlp.w2.",
    ".mlp.down_proj.": ".mlp.c_proj.",
}

_ROTARY = re.compile(r"\.self_attn\.([qk])_proj\.")


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """The rows of a query or key projection for rotary pairs that lie side by side; Hugging Face has them half a head apart."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def renamed(weights: dict[str, Tensor], table: dict[str, str], *, rotary_pairs: bool = False) -> dict[str, Tensor]:
    """A Llama's weights as another trainer names them, and orders their rows."""
    heads, found = {"q": llama.HEADS, "k": llama.KEY_VALUE_HEADS}, {}
    for name, value in weights.items():
        match = _ROTARY.search(name)
        if rotary_pairs and match:
            value = interleaved(value, heads[match[1]])
        for ours, theirs in table.items():
            name = name.replace(ours, theirs)
        found[name] = value
    return found


class Branch(nn.Module):
    """A module that is nothing but its parameters and parts, named as wished."""

    def forward(self, *_: Any) -> None:
        raise NotImplementedError


def tree(weights: dict[str, Tensor]) -> nn.Module:
    """A module whose state dict is ``weights``."""
    root = Branch()
    for name, value in weights.items():
        *parts, last = name.split(".")
        at: nn.Module = root
        for part in parts:
            if part not in at._modules:
                at.add_module(part, Branch())
            at = at.get_submodule(part)
        at.register_parameter(last, nn.Parameter(value.clone()))
    return root


def shard(module: nn.Module, **options: Any) -> nn.Module:
    """FSDP2, each dtype in a group of its own."""
    for part in list(module.modules())[1:]:
        if any(parameter.dtype == torch.float32 for parameter in part.parameters(recurse=False)):
            fully_shard(part, **options)
    fully_shard(module, **options)
    return module
