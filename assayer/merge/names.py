"""From a checkpoint's names to the model's: wrappers stripped, key maps applied, and each target with the tensor that it is made from.

The built-in maps: KempnerForge's converter (scripts/convert_checkpoint.py; Mixtral's names for experts, Qwen3's for normalized queries)
and torchtitan's Llama 3 adapter (torchtitan/models/llama3/model/state_dict_adapter.py), whose query and key rows stand in pairs.
"""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from assayer.errors import CheckpointError, UsageError
from assayer.files import printable
from assayer.tensors import Dtype, Tensor

__all__ = ["KEY_MAPS", "Rule", "Target", "key_map", "targets"]

_WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True, slots=True)
class Rule:
    """One step of a key map: what ``pattern`` finds in a name is replaced (None: the tensor is left out), and its rows reordered.

    ``form`` is "" (as it is), ``pairs`` (rows of each head stand in pairs, and are wanted in halves) or ``experts`` (a stack of transposed
    matrices, of which each becomes a tensor of its own: ``{}`` in the replacement is its number).
    """

    pattern: str
    replacement: str | None
    form: str = ""


@dataclass(slots=True)
class Target:
    """One tensor of the output: ``source`` as it is, or, with ``form``, rows in another order or one transposed ``expert`` of a stack."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    source: Tensor
    form: str = ""
    expert: int = 0

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.size


_LAYER = r"^layers\.(\d+)\."
_KEMPNERFORGE = (
    Rule(r"^token_embedding\.embedding\.", "model.embed_tokens."),
    Rule(r"^output_head\.proj\.", "lm_head."),
    Rule(r"^norm\.", "model.norm."),
    Rule(_LAYER + r"mlp\.router\.expert_ema$", None),
    Rule(_LAYER + r"mlp\.gate_w$", r"model.layers.\1.<moe>.experts.{}.<gate>.weight", "experts"),
    Rule(_LAYER + r"mlp\.up_w$", r"model.layers.\1.<moe>.experts.{}.<up>.weight", "experts"),
    Rule(_LAYER + r"mlp\.down_w$", r"model.layers.\1.<moe>.experts.{}.<down>.weight", "experts"),
    Rule(_LAYER + r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.", r"model.layers.\1.<moe>.experts.\2.<\3>."),
    Rule(_LAYER + r"mlp\.router\.gate\.", r"model.layers.\1.<moe>.gate."),
    Rule(_LAYER + r"mlp\.shared_expert\.", r"model.layers.\1.<moe>.shared_expert."),
    Rule(_LAYER + r"attention_norm\.", r"model.layers.\1.input_layernorm."),
    Rule(_LAYER + r"mlp_norm\.", r"model.layers.\1.post_attention_layernorm."),
    Rule(_LAYER + r"attention\.", r"model.layers.\1.self_attn."),
    Rule(_LAYER, r"model.layers.\1."),
)
_MIXTRAL = (
    Rule("<moe>", "block_sparse_moe"),
    Rule("<gate>", "w1"),
    Rule("<down>", "w2"),
    Rule("<up>", "w3"),
)
_QWEN3_MOE = (Rule("<moe>", "mlp"), Rule("<(gate|up|down)>", r"\1_proj"))
_TORCHTITAN_LLAMA3 = (
    Rule(r"^freqs_cis$", None),
    Rule(r"^tok_embeddings\.", "model.embed_tokens."),
    Rule(r"^output\.", "lm_head."),
    Rule(r"^norm\.", "model.norm."),
    Rule(_LAYER + r"attention\.(?:qkv_linear\.)?wq\.", r"model.layers.\1.self_attn.q_proj.", "pairs"),
    Rule(_LAYER + r"attention\.(?:qkv_linear\.)?wk\.", r"model.layers.\1.self_attn.k_proj.", "pairs"),
    Rule(_LAYER + r"attention\.(?:qkv_linear\.)?wv\.", r"model.layers.\1.self_attn.v_proj."),
    Rule(_LAYER + r"attention\.wo\.", r"model.layers.\1.self_attn.o_proj."),
    Rule(_LAYER + r"feed_forward\.w1\.", r"model.layers.\1.mlp.gate_proj."),
    Rule(_LAYER + r"feed_forward\.w2\.", r"model.layers.\1.mlp.down_proj."),
    Rule(_LAYER + r"feed_forward\.w3\.", r"model.layers.\1.mlp.up_proj."),
    Rule(_LAYER + r"attention_norm\.", r"model.layers.\1.input_layernorm."),
    Rule(_LAYER + r"ffn_norm\.", r"model.layers.\1.post_attention_layernorm."),
)
KEY_MAPS = {"kempnerforge": _KEMPNERFORGE, "torchtitan-llama3": _TORCHTITAN_LLAMA3}


def key_map(given: str | None) -> tuple[Rule, ...]:
    """The rules of a built-in key map, or of a JSON file of pairs ``[regular expression, replacement or null]``, applied in their order.

    Raises:
        UsageError: there is no such map or file, or it holds something else.
    """
    if given is None:
        return ()
    if not isinstance(given, str | os.PathLike):
        raise UsageError(f"key_map must be a name or the path of a JSON file, not a {type(given).__name__}")
    if given in KEY_MAPS:
        return KEY_MAPS[given]
    try:
        pairs = json.loads(Path(given).read_text())
        if not isinstance(pairs, list):
            raise ValueError("it holds no list")
        return tuple(_rule(pair) for pair in pairs)
    except OSError as error:
        known = ", ".join(KEY_MAPS)
        raise UsageError(f"--key_map {printable(given)} cannot be read ({error.strerror}); give {known} or a JSON file") from None
    except (ValueError, IndexError, RecursionError, re.error) as error:
        raise UsageError(
            f'--key_map {printable(given)} must be JSON: [["regular expression", "replacement or null"], ...] ({error})'
        ) from None


def _rule(pair: Any) -> Rule:
    if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], str | None)):
        raise ValueError(f"{json.dumps(pair)[:80]} is no such pair")
    # A replacement that asks for a group which is not there is found without a match.
    re.sub(pair[0], pair[1] or "", "")
    return Rule(pair[0], pair[1])


def targets(tensors: Iterable[Tensor], rules: tuple[Rule, ...], dtype: Dtype | None) -> list[Target]:
    """The tensors of the output, by the model's names.

    Args:
        tensors: of the checkpoint.
        rules: of the key map.
        dtype: for floating-point tensors; None keeps theirs. Integers and booleans are never cast.

    Raises:
        CheckpointError: two tensors come to one name.
    """
    tensors = list(tensors)
    stripped = _stripped([tensor.name for tensor in tensors])
    experts = _QWEN3_MOE if any(".q_norm." in name for name in stripped) else _MIXTRAL
    found: dict[str, Target] = {}
    for name, tensor in zip(stripped, tensors, strict=True):
        for target in _mapped(name, tensor, rules, (*experts,) if rules is _KEMPNERFORGE else ()):
            if dtype is not None and target.dtype.floating:
                target.dtype = dtype
            if target.name == "__metadata__" or not _is_text(target.name):
                raise CheckpointError(f"safetensors holds no tensor called {printable(target.name)}; rename it with --key_map")

            if target.name in found:
                first = found[target.name].source.name
                raise CheckpointError(f"{printable(first)} and {printable(tensor.name)} both come to the name {printable(target.name)}")
            found[target.name] = target
    return list(found.values())


def _is_text(name: str) -> bool:
    try:
        name.encode()
        return True
    except UnicodeEncodeError:
        return False


def _stripped(names: list[str]) -> list[str]:
    names = [_WRAPPERS.sub("", name) for name in names]
    for prefix in ("_forward_module.", "module."):
        if names and all(name.startswith(prefix) for name in names):
            names = [name.removeprefix(prefix) for name in names]
    return names


def _mapped(name: str, tensor: Tensor, rules: tuple[Rule, ...], after: tuple[Rule, ...]) -> list[Target]:
    form = ""
    for rule in rules:
        if not re.search(rule.pattern, name):
            continue
        if rule.replacement is None:
            return []
        name, form = re.sub(rule.pattern, rule.replacement, name), form or rule.form
    for rule in after:
        name = re.sub(rule.pattern, rule.replacement or "", name)
    if form != "experts":
        return [Target(name, tensor.dtype, tensor.shape, tensor, form)]
    if len(tensor.shape) != 3:
        raise CheckpointError(f"{printable(tensor.name)} has the shape {list(tensor.shape)}, a stack of experts has three dimensions")
    count, rows, columns = tensor.shape
    return [Target(name.replace("{}", str(i)), tensor.dtype, (columns, rows), tensor, form, i) for i in range(count)]


def head_size(config: dict[str, Any] | None) -> int:
    """Rows of one attention head, from a Hugging Face config.

    Raises:
        UsageError: there is no config, or it does not tell.
    """
    config = config or {}
    size = config.get("head_dim")
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if not isinstance(size, int) and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        size = hidden // heads
    if not isinstance(size, int) or size < 2 or size % 2:
        raise UsageError(
            "this key map reorders the rows of each attention head, whose size only the config tells: give it with --hf_config"
        )
    return size
