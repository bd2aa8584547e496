"""What is half-there, out of order, pruned, or left of an earlier save: each says so in a sentence."""

import io
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from on_disk import copied, identity_of, known, missing, original, unmarked
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from assayer import formats
from assayer.errors import CheckpointError
from assayer.merge.run import merge
from assayer.watch.ready import examine
from assayer.watch.scan import scan

Copy = Callable[..., Path]


@pytest.fixture
def copy(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Copy:
    """Copies a sample, by name and group, and returns the checkpoint's path."""
    return lambda name, group="two": copied(original(tmp_path_factory, group, name), tmp_path)


def saved_alone(state: dict[str, Any], path: Path) -> Path:
    """What torch's own saver writes in a process without others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_save(state, checkpoint_id=path, no_dist=True)
    return path


def found_in(directory: Path) -> list[str]:
    return [os.path.relpath(f.checkpoint.path, directory) for f in scan(str(directory), 9).found]


SHARDS = {
    "dcp_model_optimizer": "__1_0.distcp",
    "dcp_flat": "__0_0.distcp",
    "dcp_rank_local": "__0_0.distcp",
    "accelerate_fsdp2_sharded": "pytorch_model_fsdp_0/__1_0.distcp",
    "hf_trainer_fsdp2_sharded": "pytorch_model_fsdp_0/__0_0.distcp",
    "kempnerforge": "__1_0.distcp",
    "kempnerforge_pp": "pp1/__0_0.distcp",
    "torchtitan": "__0_0.distcp",
    "olmo_core": "model_and_optim/__0_1.distcp",
    "optimus_dl": "__1_0.distcp",
    "lightning_fsdp": "__0_0.distcp",
}


@pytest.mark.parametrize("name", SHARDS)
def test_a_shard_younger_than_its_metadata_is_named_with_what_to_do(copy: Copy, name: str) -> None:
    path = copy(name)
    shard = path / SHARDS[name]
    later = time.time_ns() + 10**9
    os.utime(shard, ns=(later, later))
    told = missing(path)
    assert told is not None
    assert told.startswith(f"{SHARDS[name]} is younger than ")
    assert "it is being saved again, or that broke off" in told
    assert "of a copy that is known to be whole, touch " in told
    for metadata in path.rglob("*.metadata"):
        os.utime(metadata, ns=(later, later))
    assert missing(path) is None


def test_the_metadata_of_the_optimizer_beside_a_model_may_be_of_any_age(copy: Copy) -> None:
    path = copy("accelerate_fsdp2_sharded")
    later = time.time_ns() + 10**9
    os.utime(path / "optimizer_0" / "__0_0.distcp", ns=(later, later))
    assert missing(path) is None


def test_a_shard_file_that_is_being_written_under_a_temporary_name_is_no_shard(copy: Copy) -> None:
    path = copy("olmo_core")
    before = identity_of(path)
    (path / "model_and_optim" / "tmpab12cd34.distcp").write_bytes(b"PK")
    (path / "model_and_optim" / ".metadata.tmp").write_bytes(b"")
    assert missing(path) is None
    assert identity_of(path) == before


def test_kempnerforge_asynchronous_order_is_not_whole_before_its_last_shard(copy: Copy, tmp_path: Path) -> None:
    source = copy("kempnerforge")
    path = tmp_path / "async" / source.name
    path.mkdir(parents=True)
    for name in ("train_state.pt", "metadata.json"):
        shutil.copy2(source / name, path)
    assert formats.identify_path(str(path)) is None
    assert found_in(path.parent) == []
    for name in ("__0_0.distcp", "__1_0.distcp"):
        shutil.copy2(source / name, path)
        assert known(path).checkpoint.format == "kempnerforge"
        assert missing(path) == "no .metadata yet"
    shutil.copy2(source / ".metadata", path)
    assert missing(path) is None


def test_kempnerforge_synchronous_order_waits_for_train_state(copy: Copy) -> None:
    path = copy("kempnerforge")
    (path / "train_state.pt").unlink()
    assert missing(path) == "no train_state.pt yet"


def test_a_pipeline_stage_that_is_not_there_yet_is_told(copy: Copy) -> None:
    path = copy("kempnerforge_pp")
    shutil.move(path / "pp1", path.parent / "later")
    assert missing(path) == "the last pipeline stage is not there yet"
    (path / "pp1").mkdir()
    assert missing(path) == "the last pipeline stage is not there yet"
    shutil.copy2(path.parent / "later" / "__0_0.distcp", path / "pp1")
    assert missing(path) == "no pp1/.metadata yet"
    shutil.copy2(path.parent / "later" / ".metadata", path / "pp1")
    assert missing(path) is None
    shutil.rmtree(path / "pp0")
    assert missing(path) == "no pp0/ yet"


def test_experts_that_expert_parallelism_lost_are_an_error_of_the_merge(tmp_path: Path) -> None:
    state: dict[str, torch.Tensor] = {"layers.0.mlp.router.gate.weight": torch.zeros(4, 8), "norm.weight": torch.ones(8)}
    for expert in range(2):
        state[f"layers.0.mlp.experts.{expert}.up_proj.weight"] = torch.zeros(8, 8)
    path = saved_alone({"model": state}, tmp_path / "step_5")
    torch.save({"step": 5}, path / "train_state.pt")
    assert known(path).checkpoint.format == "kempnerforge"
    with pytest.raises(CheckpointError, match=r"holds 2 of the 4 experts of layers\.0\.mlp\.experts\.\*"):
        merge(path, tmp_path / "out")
    for expert in range(2, 4):
        state[f"layers.0.mlp.experts.{expert}.up_proj.weight"] = torch.zeros(8, 8)
    saved_alone({"model": state}, path)
    merge(path, tmp_path / "out")


def test_olmo_core_is_whole_when_its_mark_and_its_state_are_there(copy: Copy) -> None:
    path = copy("olmo_core")
    (path / ".metadata.json").rename(path.parent / "mark")
    assert missing(path) == "no .metadata.json yet"
    (path.parent / "mark").rename(path / ".metadata.json")
    shutil.rmtree(path / "train")
    assert missing(path) == "no train/rank0.pt yet"


@pytest.mark.parametrize("name", ["megatron", "megatron_old", "megatron_new"])
def test_megatron_is_whole_when_its_mark_is_there(copy: Copy, name: str) -> None:
    path = copy(name, "single")
    (path / "metadata.json").unlink()
    assert known(path).checkpoint.format == "megatron"
    assert missing(path) == "no metadata.json yet"


@pytest.mark.parametrize("name", ["lightning_fsdp", "lightning_model_parallel"])
def test_lightnings_directory_is_whole_when_meta_is(copy: Copy, name: str) -> None:
    path = copy(name)
    whole = (path / "meta.pt").read_bytes()
    for kept in (0, len(whole) // 2, len(whole) - 1):
        (path / "meta.pt").write_bytes(whole[:kept])
        assert missing(path), kept
    (path / "meta.pt").unlink()
    assert known(path).checkpoint.format == "lightning_dir"
    assert missing(path) == "no meta.pt yet"


def test_a_deepspeed_tag_is_whole_when_latest_names_it_or_a_later_one(copy: Copy) -> None:
    path = copy("deepspeed_zero1", "single")
    latest = path.parent / "latest"
    assert path.name == "global_step10"
    latest.write_text("global_step9")
    assert missing(path) == "`latest` still names global_step9"
    for text in ("global_step10", "global_step11", "global_step100\n"):
        latest.write_text(text)
        assert missing(path) is None, text
        assert unmarked(path) is None, text
    for text in ("best", ""):
        latest.write_text(text)
        assert missing(path) is None
        assert unmarked(path) == f"`latest` names {text}"
    latest.unlink()
    assert unmarked(path) == "no `latest`"


def test_deepspeeds_latest_may_come_before_the_last_bytes_of_a_slow_rank(copy: Copy) -> None:
    for name in ("deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"):
        path = copy(name, "single")
        slow = next(path.glob("*pp_rank_2_mp_rank_00_optim_states.pt"))
        whole = slow.read_bytes()
        slow.write_bytes(whole[:-100])
        assert str(missing(path)).startswith(slow.name)
        slow.unlink()
        assert missing(path) == "2 of 3 *_optim_states.pt are there"


def test_a_rank_of_zero_3_without_its_model_states_is_told(copy: Copy) -> None:
    """Each rank's file holds its share of what is frozen, the first one's the names of tied weights too."""
    path = copy("deepspeed_zero3", "single")
    for rank in range(3):
        file = path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        whole = file.read_bytes()
        file.unlink()
        assert missing(path) is not None, f"without {file.name}"
        file.write_bytes(whole)


@pytest.mark.parametrize("name", ["lmms_engine", "lmms_engine_ema", "verl", "placements_ranks"])
def test_every_rank_that_is_missing_is_named(copy: Copy, name: str) -> None:
    path = copy(name, "four")
    for file in sorted(path.rglob("*_world_size_4_rank_*.pt")):
        whole = file.read_bytes()
        file.unlink()
        told = missing(path) if formats.identify_path(str(path)) else None
        assert told == f"no {file.relative_to(path)} yet"
        file.write_bytes(whole)
    assert missing(path) is None


def test_an_average_that_is_not_kept_yet_leaves_its_folder_empty_and_holds_nothing_up(copy: Copy) -> None:
    path = copy("lmms_engine_ema_later")
    (path / "pytorch_ema_model_fsdp_0").mkdir(exist_ok=True)
    assert missing(path) is None
    with pytest.raises(CheckpointError, match="holds no EMA weights"):
        merge(path, path.parent / "out", checkpoint_type="ema")


def test_rank_files_of_two_world_sizes_are_not_one_checkpoint(copy: Copy) -> None:
    path = copy("lmms_engine")
    folder = path / "pytorch_model_fsdp_0"
    for rank in range(4):
        shutil.copy2(folder / "model_world_size_2_rank_0.pt", folder / f"model_world_size_4_rank_{rank}.pt")
    assert missing(path) == "holds the files of runs on 2 and 4 ranks"


def test_rank_files_without_any_config_wait_for_a_quiet_period(copy: Copy) -> None:
    path = copy("lmms_engine")
    (path / "config.json").unlink()
    assert (missing(path), unmarked(path)) == (None, "no config.json")


@pytest.mark.parametrize("name", ["accelerate", "accelerate_fsdp2_sharded"])
def test_a_rank_whose_random_states_are_missing_has_not_finished(copy: Copy, name: str) -> None:
    path = copy(name, "single" if name == "accelerate" else "two")
    (path / "random_states_1.pkl").unlink(missing_ok=True)
    shutil.copy2(path / "random_states_0.pkl", path / "random_states_2.pkl")
    assert missing(path) == "no random_states_1.pkl yet"
    shutil.copy2(path / "random_states_0.pkl", path / "random_states_1.pkl")
    assert missing(path) is None


def test_accelerates_model_without_random_states_has_not_finished(copy: Copy) -> None:
    path = copy("accelerate", "single")
    (path / "random_states_0.pkl").unlink()
    assert known(path).checkpoint.format == "accelerate"
    assert missing(path) == "no random_states_0.pkl yet"


@pytest.mark.parametrize("name", ["epoch=1-step=5.ckpt", "epoch=1-step=5-EMA.ckpt"])
def test_nemos_marker_says_that_a_file_is_unfinished(tmp_path: Path, name: str) -> None:
    """One marker for a model and its average, without either's ending (nemo/utils/callbacks/nemo_model_checkpoint.py)."""
    torch.save({"w": torch.zeros(2)}, tmp_path / name)
    marker = tmp_path / "epoch=1-step=5-unfinished"
    marker.touch()
    assert missing(tmp_path / name) == f"{marker.name} lies beside it"
    marker.unlink()
    assert missing(tmp_path / name) is None


def test_what_optimus_dl_has_not_renamed_yet_is_no_checkpoint(copy: Copy) -> None:
    path = copy("optimus_dl")
    for name in (path.name, "metadata_000000150.pt", "per_rank_metadata_0_000000150.pt"):
        (path.parent / name).rename(path.parent / f"{name}.150.tmp")
    assert found_in(path.parent) == []


def test_what_optimus_dl_keeps_of_the_last_save_alone_is_one_checkpoint(copy: Copy) -> None:
    """There ``latest`` is no link but the name of all its files."""
    path = copy("optimus_dl")
    for file in path.parent.glob("*_latest*"):
        file.unlink()
    for file in list(path.parent.iterdir()):
        file.rename(file.with_name(file.name.replace("000000150", "latest")))
    assert found_in(path.parent) == ["checkpoint_latest"]


def test_a_rank_in_the_middle_whose_safetensors_are_missing_is_named(copy: Copy) -> None:
    path = copy("dcp_safetensors", "four")
    (path / "shard-00002-model-00001-of-00001.safetensors").unlink()
    assert missing(path) == "no shard-00002-model-*.safetensors yet"


def test_torchtitans_export_is_one_checkpoint_and_waits_for_its_index(copy: Copy) -> None:
    path = copy("dcp_safetensors_consolidated")
    assert (path / "sharded").is_dir()
    assert known(path).checkpoint.format == "hf_dir"
    assert found_in(path.parent) == [path.name]
    (path / "model.safetensors.index.json").unlink()
    assert missing(path) == "no model.safetensors.index.json yet"
    (path / "model-00001-of-00001.safetensors").unlink()
    assert known(path).checkpoint.format == "dcp_safetensors"
    assert unmarked(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("name", ["olmo_core", "lmms_engine", "dcp_safetensors_consolidated", "dcp_flat", "deepspeed_zero1"])
def test_files_that_another_user_keeps_to_himself_are_a_sentence(copy: Copy, name: str) -> None:
    path = copy(name, "single" if name == "deepspeed_zero1" else "two")
    for file in path.parent.rglob("*"):
        if file.is_file():
            file.chmod(0)
    seen = examine(known(path), None, time.time(), first_look=True, quiet_period=0)
    assert seen.missing is not None
    file_name, _, said = seen.missing.partition(" ")
    assert said == "cannot be read: Permission denied"
    assert any(file.name == file_name for file in path.parent.rglob("*"))


@pytest.mark.parametrize(
    "name",
    [
        *("data.pt", "dl_state_dict.bin", "recipe_state.pt", "metadata_latest.pt", "per_rank_metadata_0_latest.pt"),
        *("extra_state_world_size_2_rank_0.pt", "ep1-ba20-rank1.pt", "layer_1_expert_0_mp_rank_00_model_states.pt"),
        *("expp_rank_0_mp_rank_00_optim_states.pt", "rank0.pt", "mmlu_rank_0.pt", "pytorch_model_fsdp_0_rank0.bin", "sampler_1.bin"),
    ],
)
def test_what_more_trainers_lay_beside_a_model_is_no_checkpoint(tmp_path: Path, name: str) -> None:
    torch.save({"state": torch.zeros(2)}, tmp_path / name)
    assert formats.identify_path(str(tmp_path / name)) is None


def test_one_ranks_share_of_a_megatron_model_is_no_checkpoint(tmp_path: Path) -> None:
    for rank in range(2):
        path = tmp_path / "iter_0000500" / f"mp_rank_0{rank}" / "model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        torch.save({"model": {"w": torch.zeros(2)}}, path)
    assert found_in(tmp_path) == []


def changed_in_place(shard: Path, number: int) -> bool:
    """Other values for one tensor of a shard, in a record of the same length; False when there are no more."""
    content = shard.read_bytes()
    ends = [found.end() for found in re.finditer(rb"PK\x05\x06.{18}", content, re.DOTALL)]
    if number >= len(ends):
        return False
    begin = ends[number - 1] if number else 0
    held = torch.load(io.BytesIO(content[begin : ends[number]]), weights_only=False)
    if isinstance(held, torch.Tensor):
        archive = io.BytesIO()
        torch.save(held + 1, archive)
        item = archive.getvalue()
        assert len(item) == ends[number] - begin
        status = shard.stat()
        shard.write_bytes(content[:begin] + item + content[ends[number] :])
        os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    return True


@pytest.mark.parametrize(("group", "name"), [("two", "dcp_flat"), ("single", "megatron")])
def test_another_value_of_any_tensor_in_a_shard_is_another_identity(copy: Copy, group: str, name: str) -> None:
    """A shard holds one archive a tensor: the last one's directory says nothing of the others."""
    path = copy(name, group)
    # As a saver leaves it that gives its saves no number: with one, metadata tells them apart.
    told = path / ".metadata"
    status = told.stat()
    told_apart = rb"(save_id.{1,6}?)[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    told.write_bytes(re.sub(told_apart, rb"\g<1>" + b"x" * 36, told.read_bytes(), flags=re.DOTALL))
    os.utime(told, ns=(status.st_atime_ns, status.st_mtime_ns))
    shard = path / "__0_0.distcp"
    seen, number, before = {identity_of(path)}, 0, shard.read_bytes()
    while changed_in_place(shard, number):
        number += 1
        # What is no tensor is left as it is.
        if shard.read_bytes() != before:
            one = identity_of(path)
            assert one not in seen
            seen.add(one)
            before = shard.read_bytes()
        assert missing(path) is None
    assert len(seen) > 10
