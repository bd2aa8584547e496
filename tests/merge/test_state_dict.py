"""A checkpoint as a mapping: each tensor is read when it is asked for, and checked as a merge would."""

import json
from pathlib import Path

import pytest
import torch
from merging import assert_same, columns, dcp, flip, place_of
from samples_of_trainers import FOUR, SINGLE, TWO, expected, sample

from assayer.archive import records_of
from assayer.errors import CheckpointError
from assayer.merge.state_dict import load_state_dict


@pytest.mark.parametrize(
    ("group", "name"),
    [
        *((group, name) for group in (TWO, FOUR) for name in ("placements_model", "verl", "dcp_rank_local", "dcp_safetensors")),
        *((SINGLE, name) for name in ("deepspeed_zero1", "deepspeed_zero3", "accelerate_bin")),
    ],
)
def test_the_mapping_holds_what_was_saved(tmp_path_factory: pytest.TempPathFactory, group: str, name: str) -> None:
    one = sample(tmp_path_factory, group, name)
    found = load_state_dict(one.path)
    wanted = expected(one)
    assert len(found) == len(wanted) and set(found) == set(wanted)
    assert_same(dict(found), wanted)
    assert "none.of.them" not in found
    with pytest.raises(KeyError):
        found["none.of.them"]


def test_the_average_is_a_mapping_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    one = sample(tmp_path_factory, TWO, "lmms_engine_ema")
    assert_same(dict(load_state_dict(one.path, weights="ema")), expected(one, ema=True))
    with pytest.raises(CheckpointError, match="EMA"):
        load_state_dict(sample(tmp_path_factory, TWO, "verl").path, weights="ema")


def test_a_model_loads_from_the_mapping(tmp_path: Path) -> None:
    model = torch.nn.Linear(5, 3)
    path = dcp(tmp_path / "step_1", {name: columns(value, 2) if value.dim() > 1 else value for name, value in model.state_dict().items()})
    other = torch.nn.Linear(5, 3)
    other.load_state_dict(dict(load_state_dict(path)))
    assert other.weight.equal(model.weight) and other.bias.equal(model.bias)


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "columns"])
def test_a_flipped_bit_raises_when_its_tensor_is_read(tmp_path: Path, cut: bool) -> None:
    whole = torch.randn(8, 6)
    path = dcp(tmp_path / "step_1", {"fine": torch.ones(3), "hurt": columns(whole, 2) if cut else whole})
    file, position = place_of(path, "hurt")
    flip(file, position + 9)
    found = load_state_dict(path)
    assert found["fine"].equal(torch.ones(3))
    with pytest.raises(CheckpointError, match=f"{file} is damaged.*hurt"):
        found["hurt"]


def test_a_flipped_bit_in_a_shared_storage_raises(tmp_path: Path) -> None:
    base = torch.arange(100.0)
    path = tmp_path / "m_step1.pt"
    torch.save({"first": base[:40], "second": base[40:]}, path)
    with path.open("rb") as opened:
        record = records_of(opened.fileno(), 0, path.stat().st_size)["data/0"]
    flip(path, record.start + 9)
    with pytest.raises(CheckpointError, match="CRC32"):
        load_state_dict(path)["first"]


def test_tensors_are_the_callers_own(tmp_path: Path) -> None:
    path = dcp(tmp_path / "step_1", {"w": torch.zeros(3)})
    found = load_state_dict(path)
    found["w"].add_(1)
    assert found["w"].equal(torch.zeros(3))


def test_a_tied_config_hides_nothing(tmp_path: Path) -> None:
    whole = {"model.embed_tokens.weight": torch.ones(4, 3), "lm_head.weight": torch.ones(4, 3)}
    path = dcp(tmp_path / "step_1", whole)
    (path / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    assert_same(dict(load_state_dict(path)), whole)


def test_a_half_written_checkpoint_is_no_mapping(tmp_path: Path) -> None:
    path = dcp(tmp_path / "step_1", {"w": torch.zeros(3)})
    (path / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="not whole"):
        load_state_dict(path)
    with pytest.raises(CheckpointError, match="No such file"):
        load_state_dict(tmp_path / "nowhere")
