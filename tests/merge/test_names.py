"""Names of wrappers go, key maps give the model's own names, and no two tensors come to one."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from merging import Held, assert_same, columns, command, dcp, flip, place_of, refused, rows, tensors_in
from safetensors.torch import load_file
from samples_of_trainers import FOUR, TWO, sample

from assayer.merge import merge

CONFIG = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}


def config(folder: Path, **fields: object) -> str:
    path = folder / "given.json"
    path.write_text(json.dumps(fields))
    return str(path)


def key_map(folder: Path, pairs: object) -> str:
    path = folder / "map.json"
    path.write_text(pairs if isinstance(pairs, str) else json.dumps(pairs))
    return str(path)


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.",
        "module.",
        "_fsdp_wrapped_module.",
        "module._orig_mod._fsdp_wrapped_module.",
        "_forward_module.",
        "_forward_module.module.",
    ],
)
def test_wrappers_are_taken_off(tmp_path: Path, prefix: str) -> None:
    a, b = torch.randn(2), torch.randn(3)
    path = dcp(tmp_path / "step_1", {f"{prefix}a.weight": a, f"{prefix}layers.0._checkpoint_wrapped_module.b": b})
    merge(path, tmp_path / "out")
    assert_same(tensors_in(tmp_path / "out"), {"a.weight": a, "layers.0.b": b})


def test_a_part_called_module_is_no_wrapper(tmp_path: Path) -> None:
    whole = {"module.a": torch.randn(2), "head.b": torch.randn(3)}
    merge(dcp(tmp_path / "step_1", whole), tmp_path / "out")
    assert_same(tensors_in(tmp_path / "out"), whole)


def test_two_tensors_that_come_to_one_name_are_an_error(tmp_path: Path) -> None:
    path = dcp(tmp_path / "step_1", {"a.w": torch.zeros(2), "_orig_mod.a.w": torch.ones(2)})
    said = refused(path, tmp_path / "out")
    assert "_orig_mod.a.w" in said and "both come to the name a.w" in said
    path = dcp(tmp_path / "step_2", {"a.w": torch.zeros(2), "b.w": torch.ones(2)})
    said = refused(path, tmp_path / "out", "--key_map", key_map(tmp_path, [["^[ab]", "c"]]))
    assert "a.w" in said and "b.w" in said and "c.w" in said


@pytest.mark.parametrize("group", [TWO, FOUR])
@pytest.mark.parametrize(
    ("name", "built_in"),
    [
        ("kempnerforge", "kempnerforge"),
        ("kempnerforge_pp", "kempnerforge"),
        ("kempnerforge_import", "kempnerforge"),
        ("torchtitan", "torchtitan-llama3"),
        ("torchtitan_last", "torchtitan-llama3"),
        ("torchtitan_old", "torchtitan-llama3"),
    ],
)
def test_a_built_in_map_gives_hugging_faces_names_and_rows(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, group: str, name: str, built_in: str
) -> None:
    one = sample(tmp_path_factory, group, name)
    assert one.expected_hf
    merge(one.path, tmp_path / "out", key_map=built_in, hf_config=config(tmp_path, **CONFIG))
    assert_same(tensors_in(tmp_path / "out"), load_file(one.expected_hf))


@pytest.mark.parametrize("fields", [{"head_dim": 4}, {"head_dim": 4, "hidden_size": 999, "num_attention_heads": 3}, CONFIG])
def test_the_size_of_a_head_comes_from_the_config(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, fields: dict[str, object]
) -> None:
    one = sample(tmp_path_factory, TWO, "torchtitan")
    assert one.expected_hf
    merge(one.path, tmp_path / "out", key_map="torchtitan-llama3", hf_config=config(tmp_path, **fields), dtype="float32")
    wanted = {name: tensor.float() for name, tensor in load_file(one.expected_hf).items()}
    assert_same(tensors_in(tmp_path / "out"), wanted)


@pytest.mark.parametrize(
    "fields",
    [None, {}, {"head_dim": 3}, {"head_dim": 0}, {"head_dim": "4"}, {"hidden_size": 16}, {"hidden_size": 16, "num_attention_heads": 0}],
)
def test_without_the_size_of_a_head_no_rows_are_reordered(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, fields: dict[str, object] | None
) -> None:
    one = sample(tmp_path_factory, TWO, "torchtitan")
    words = () if fields is None else ("--hf_config", config(tmp_path, **fields))
    assert "--hf_config" in refused(one.path, tmp_path / "out", "--key_map", "torchtitan-llama3", *words, code=2)


def test_rows_that_make_up_no_heads_are_an_error(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    one = sample(tmp_path_factory, TWO, "torchtitan")
    said = refused(one.path, tmp_path / "out", "--key_map", "torchtitan-llama3", "--hf_config", config(tmp_path, head_dim=6))
    assert "rows" in said and "6" in said and ".w" in said


def mixture(prefix: str = "layers.0.") -> Mapping[str, Held]:
    """KempnerForge's mixture of experts with its experts packed: each stack is (experts, in, out)."""
    return {
        "token_embedding.embedding.weight": torch.randn(11, 4),
        "norm.weight": torch.randn(4),
        "output_head.proj.weight": torch.randn(11, 4),
        f"{prefix}attention.q_proj.weight": torch.randn(4, 4),
        f"{prefix}attention_norm.weight": torch.randn(4),
        f"{prefix}mlp_norm.weight": torch.randn(4),
        f"{prefix}mlp.router.gate.weight": torch.randn(3, 4),
        f"{prefix}mlp.router.expert_ema": torch.randn(3),
    }


def stacks() -> dict[str, torch.Tensor]:
    return {"gate_w": torch.randn(3, 4, 6), "up_w": torch.randn(3, 4, 6), "down_w": torch.randn(3, 6, 4)}


def test_packed_experts_are_taken_apart_and_transposed_under_mixtrals_names(tmp_path: Path) -> None:
    experts = stacks()
    cuts: dict[str, Held] = {"gate_w": rows(experts["gate_w"], 2), "up_w": columns(experts["up_w"], 3), "down_w": experts["down_w"]}
    path = dcp(tmp_path / "step_1", {**mixture(), **{f"layers.0.mlp.{name}": value for name, value in cuts.items()}})
    for size in ("5GB", "100"):
        merge(path, tmp_path / f"out{size}", key_map="kempnerforge", max_shard_size=size)
        found = tensors_in(tmp_path / f"out{size}")
        moe = "model.layers.0.block_sparse_moe"
        for name, kept in (("w1", "gate_w"), ("w3", "up_w"), ("w2", "down_w")):
            for expert in range(3):
                assert found[f"{moe}.experts.{expert}.{name}.weight"].equal(experts[kept][expert].t())
        assert set(found) == {
            *(f"{moe}.experts.{expert}.{name}.weight" for expert in range(3) for name in ("w1", "w2", "w3")),
            f"{moe}.gate.weight",
            *("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"),
            *("model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"),
        }


def test_packed_experts_are_cast_like_any_other_tensor(tmp_path: Path) -> None:
    experts = stacks()
    path = dcp(tmp_path / "step_1", {**mixture(), **{f"layers.0.mlp.{name}": columns(value, 2) for name, value in experts.items()}})
    merge(path, tmp_path / "out", key_map="kempnerforge", dtype="bfloat16")
    found = tensors_in(tmp_path / "out")
    assert found["model.layers.0.block_sparse_moe.experts.2.w2.weight"].equal(experts["down_w"][2].t().bfloat16())


@pytest.mark.parametrize("expert", [0, 1, 2])
def test_a_flipped_bit_in_any_of_the_packed_experts_is_found(tmp_path: Path, expert: int) -> None:
    path = dcp(tmp_path / "step_1", {**mixture(), **{f"layers.0.mlp.{name}": value for name, value in stacks().items()}})
    file, start = place_of(path, "layers.0.mlp.up_w")
    flip(file, start + expert * 4 * 6 * 4 + 2)
    assert "layers.0.mlp.up_w" in refused(path, tmp_path / "out", "--key_map", "kempnerforge")


def test_unpacked_experts_get_mixtrals_names(tmp_path: Path) -> None:
    weights = {f"layers.0.mlp.experts.{n}.{part}_proj.weight": torch.randn(2, 3) for n in range(2) for part in ("gate", "up", "down")}
    path = dcp(tmp_path / "step_1", {**mixture(), **weights, "layers.0.mlp.shared_expert.up_proj.weight": torch.ones(2)})
    merge(path, tmp_path / "out", key_map="kempnerforge")
    found = tensors_in(tmp_path / "out")
    moe = "model.layers.0.block_sparse_moe"
    for ours, theirs in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
        for n in range(2):
            assert found[f"{moe}.experts.{n}.{ours}.weight"].equal(weights[f"layers.0.mlp.experts.{n}.{theirs}_proj.weight"])
    assert f"{moe}.shared_expert.up_proj.weight" in found
    assert not [name for name in found if "expert_ema" in name]


def test_normalized_queries_mean_qwen3s_names(tmp_path: Path) -> None:
    more = {f"layers.0.mlp.{name}": value for name, value in stacks().items()}
    norms = {f"layers.0.attention.{name}_norm.weight": torch.randn(4) for name in "qk"}
    merge(dcp(tmp_path / "step_1", {**mixture(), **more, **norms}), tmp_path / "out", key_map="kempnerforge")
    found = tensors_in(tmp_path / "out")
    assert found["model.layers.0.mlp.experts.1.gate_proj.weight"].equal(more["layers.0.mlp.gate_w"][1].t())
    assert {"model.layers.0.mlp.gate.weight", "model.layers.0.self_attn.q_norm.weight"} <= set(found)


def test_a_stack_of_experts_that_is_none_is_refused(tmp_path: Path) -> None:
    path = dcp(tmp_path / "step_1", {**mixture(), "layers.0.mlp.up_w": torch.randn(3, 4)})
    said = refused(path, tmp_path / "out", "--key_map", "kempnerforge")
    assert "layers.0.mlp.up_w" in said and "[3, 4]" in said


def test_a_file_of_pairs_renames_and_drops_in_its_order(tmp_path: Path) -> None:
    whole = {"blocks.0.w": torch.zeros(1), "blocks.1.w": torch.ones(1), "seen": torch.ones(3), "head.w": torch.ones(2)}
    pairs = [["^seen$", None], [r"^blocks\.(\d+)\.", r"layers.\1."], ["^layers", "model.layers"], ["^head", "lm_head"]]
    merge(dcp(tmp_path / "step_1", whole), tmp_path / "out", key_map=key_map(tmp_path, pairs))
    assert set(tensors_in(tmp_path / "out")) == {"model.layers.0.w", "model.layers.1.w", "lm_head.w"}


def test_a_map_that_drops_everything_is_an_error(tmp_path: Path) -> None:
    path = dcp(tmp_path / "step_1", {"w": torch.zeros(1)})
    assert "holds no tensors" in refused(path, tmp_path / "out", "--key_map", key_map(tmp_path, [["", None]]))


@pytest.mark.parametrize(
    "text",
    [
        '[["(", "x"]]',
        '[["w"]]',
        '[["w", "x", "y"]]',
        '[["w", 3]]',
        '[[3, "w"]]',
        '[["w", "\\\\9"]]',
        '[["w", "\\\\g<no>"]]',
        '{"w": "x"}',
        '{"^w": "x"}',
        '{"wx": "x"}',
        '["wx"]',
        "3",
        "null",
        "{",
        "",
        "[" * 100_000,
        '[["\ud800", "x"]]',
    ],
)
def test_a_file_that_is_no_key_map_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "map.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    path = dcp(tmp_path / "step_1", {"w": torch.zeros(1)})
    said = refused(path, tmp_path / "out", "--key_map", tmp_path / "map.json", code=2)
    assert "--key_map" in said and "map.json" in said


def test_a_map_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    path = dcp(tmp_path / "step_1", {"w": torch.zeros(1)})
    said = refused(path, tmp_path / "out", "--key_map", tmp_path / "none.json", code=2)
    assert "none.json" in said and "kempnerforge, torchtitan-llama3" in said


def test_a_key_map_does_not_depend_on_the_spelling_of_its_flag(tmp_path: Path) -> None:
    path = dcp(tmp_path / "step_1", {"norm.weight": torch.zeros(1)})
    assert command("--checkpoint-path", path, "--output-path", tmp_path / "out", "--key-map", "kempnerforge").code == 0
    assert set(tensors_in(tmp_path / "out")) == {"model.norm.weight"}
