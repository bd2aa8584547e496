"""The weights are compared with the model that the config describes, before a byte of them is copied."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import command, dcp, refused

from assayer.errors import AssayerError, CheckpointError
from assayer.merge.check import check_model
from assayer.merge.names import Target
from assayer.tensors import DTYPES, Tensor

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "max_position_embeddings": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
}
LAYER = "model.layers.0."
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (11, 8),
    "lm_head.weight": (11, 8),
    "model.norm.weight": (8,),
    f"{LAYER}input_layernorm.weight": (8,),
    f"{LAYER}post_attention_layernorm.weight": (8,),
    **{f"{LAYER}self_attn.{part}_proj.weight": (rows, 8) for part, rows in (("q", 8), ("k", 4), ("v", 4), ("o", 8))},
    **{f"{LAYER}mlp.{part}_proj.weight": shape for part, shape in (("gate", (6, 8)), ("up", (6, 8)), ("down", (8, 6)))},
}


def wanted(shapes: dict[str, tuple[int, ...]]) -> list[Target]:
    dtype = DTYPES["bfloat16"]
    return [Target(name, dtype, shape, Tensor(name, dtype, shape)) for name, shape in shapes.items()]


def without(*names: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in SHAPES.items() if name not in names}


def test_weights_that_fit_are_passed_in_silence() -> None:
    assert check_model(wanted(SHAPES), CONFIG) is None
    assert check_model(wanted(SHAPES), {**CONFIG, "architectures": None}) is None


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (without("lm_head.weight"), "1 missing (lm_head.weight)"),
        (without("model.norm.weight", f"{LAYER}mlp.up_proj.weight"), "2 missing"),
        ({**SHAPES, "model.extra.weight": (2,)}, "1 unexpected (model.extra.weight)"),
        ({**SHAPES, f"{LAYER}mlp.up_proj.weight": (5, 8)}, "[5, 8]"),
        ({**SHAPES, "lm_head.weight": (8, 11)}, "lm_head.weight [8, 11], the model's is [11, 8]"),
        ({f"other.{name}": shape for name, shape in SHAPES.items()}, "12 missing"),
    ],
    ids=["head", "two", "extra", "shape", "transposed", "names"],
)
def test_what_differs_is_listed(shapes: dict[str, tuple[int, ...]], said: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        check_model(wanted(shapes), CONFIG)
    assert said in str(raised.value) and "--hf_config" in str(raised.value) and "\n" not in str(raised.value)


def test_a_head_that_is_the_embedding_need_not_be_there() -> None:
    assert check_model(wanted(without("lm_head.weight")), {**CONFIG, "tie_word_embeddings": True}) is None
    assert check_model(wanted(SHAPES), {**CONFIG, "tie_word_embeddings": True}) is None


ODD: dict[str, dict[str, Any]] = {
    "nothing": {},
    "no_architecture": {"architectures": []},
    "unknown": {"architectures": ["NoSuchForCausalLM"], "model_type": "no_such"},
    "unknown_architecture": {**CONFIG, "architectures": ["NoSuchForCausalLM"]},
    "unknown_type": {**CONFIG, "model_type": "no_such"},
    "type_number": {**CONFIG, "model_type": 7},
    "size_word": {**CONFIG, "hidden_size": "many"},
    "size_negative": {**CONFIG, "hidden_size": -1},
    "architecture_number": {**CONFIG, "architectures": [3]},
    "architecture_module": {**CONFIG, "architectures": ["logging"]},
    "architecture_config": {**CONFIG, "architectures": ["AutoConfig"]},
}


@pytest.mark.parametrize("odd", ODD)
def test_a_model_that_cannot_be_made_is_a_note_or_an_error_in_one_line(odd: str) -> None:
    config = ODD[odd]
    try:
        told = check_model(wanted(SHAPES), config)
    except AssayerError as error:
        told = str(error)
    assert told and "\n" not in told


def test_a_merge_of_the_wrong_model_leaves_nothing_and_of_the_right_one_is_merged(tmp_path: Path) -> None:
    path = dcp(tmp_path / "step_1", {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in SHAPES.items()})
    (path / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 12}))
    assert "LlamaForCausalLM" in refused(path, tmp_path / "out", "--check_model")
    (path / "config.json").write_text(json.dumps(CONFIG))
    assert command("--checkpoint_path", path, "--output_path", tmp_path / "out", "--check_model").code == 0
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert all(not parameter.any() for parameter in model.parameters())


def test_several_files_with_an_index_load_into_transformers(tmp_path: Path) -> None:
    path = dcp(tmp_path / "step_1", {name: torch.full(shape, 0.5) for name, shape in SHAPES.items()})
    (path / "config.json").write_text(json.dumps(CONFIG))
    assert command("--checkpoint_path", path, "--output_path", tmp_path / "out", "--max_shard_size", "500", "--dtype", "float16").code == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert all(parameter.eq(0.5).all() and parameter.dtype == torch.float16 for parameter in model.parameters())
