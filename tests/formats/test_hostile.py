"""Whatever lies in a watched directory, a look at it runs nothing, takes no memory without bounds, and says what it saw."""

import os
import pickle
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from on_disk import copied, original

from assayer.errors import CheckpointError
from assayer.merge.run import merge
from assayer.sealed import sealed
from assayer.watch.ready import Seen, examine
from assayer.watch.scan import scan

Copy = Callable[..., Path]

# Above this many bytes a `.metadata` is read in a child process.
LARGE = 256 << 10


class Runs:
    """When it is unpickled, a file appears."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch '{self.mark}'",)


@pytest.fixture
def copy(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Copy:
    """Copies a sample, by name and group, and returns the checkpoint's path."""
    return lambda name, group="two": copied(original(tmp_path_factory, group, name), tmp_path / "runs")


def looked_at(directory: Path) -> list[Seen]:
    """What a watch sees in a directory on its first look, without a quiet period."""
    return [examine(found, None, time.time(), first_look=True, quiet_period=0) for found in scan(str(directory), 9).found]


def sentences(directory: Path) -> list[str | None]:
    """Why each checkpoint in a directory is not whole, read with 256 MiB of memory at most."""
    return list(sealed(lambda: iter([seen.missing for seen in looked_at(directory)]), 256 << 20))


METADATA = {
    "dcp_flat": ".metadata",
    "dcp_rank_local": "__1.metadata",
    "accelerate_fsdp2_sharded": "pytorch_model_fsdp_0/.metadata",
    "kempnerforge_pp": "pp1/.metadata",
    "torchtitan": ".metadata",
    "olmo_core": "model_and_optim/.metadata",
    "optimus_dl": ".metadata",
    "lightning_fsdp": ".metadata",
}


@pytest.mark.parametrize("name", METADATA)
@pytest.mark.parametrize("size", [0, LARGE], ids=["small", "large"])
def test_a_hostile_metadata_runs_nothing_and_is_a_sentence(copy: Copy, tmp_path: Path, name: str, size: int) -> None:
    path = copy(name)
    mark = tmp_path / "ran"
    (path / METADATA[name]).write_bytes(pickle.dumps([b"x" * size, Runs(mark)]))
    (seen,) = looked_at(path.parent)
    assert not mark.exists()
    assert str(seen.missing).startswith(f"{METADATA[name]} refers to posix.system, which is not on the list of allowed names")
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        merge(path, tmp_path / "out")
    assert not mark.exists()


def save_hostile(path: Path, mark: Path) -> None:
    """A whole torch.save archive, whose pickle runs something."""
    torch.save({"global_step": 5, "optimizer_state_dict": Runs(mark), "model": Runs(mark)}, path)


HOSTILE = {
    "lmms_engine": ("two", "pytorch_model_fsdp_0/model_world_size_2_rank_0.pt"),
    "verl": ("two", "model_world_size_2_rank_1.pt"),
    "olmo_core": ("two", "train/rank0.pt"),
    "lightning_fsdp": ("two", "meta.pt"),
    "kempnerforge": ("two", "train_state.pt"),
    "accelerate_fsdp2_ranks": ("two", "pytorch_model_fsdp_0_rank0.bin"),
    "accelerate_bin": ("single", "pytorch_model.bin"),
    "deepspeed_zero1": ("single", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    "deepspeed_zero3": ("single", "zero_pp_rank_0_mp_rank_00_model_states.pt"),
    "megatron": ("single", "common.pt"),
    "lightning_file": ("single", ""),
}
# Files that a merge does not need: with these in it, the weights are still what they were.
BESIDE = ("olmo_core", "kempnerforge", "megatron", "lightning_fsdp")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_torch_file_runs_nothing_when_it_is_looked_at_or_merged(copy: Copy, tmp_path: Path, name: str) -> None:
    group, inside = HOSTILE[name]
    path = copy(name, group)
    mark = tmp_path / "ran"
    save_hostile(path / inside if inside else path, mark)
    for seen in looked_at(path.parent):
        assert seen.is_whole or seen.missing
    assert not mark.exists()
    if name not in BESIDE:
        with pytest.raises(CheckpointError, match=r"system|holds no|no tensors"):
            merge(path, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert not mark.exists()


def test_a_hostile_name_at_the_end_of_a_run_runs_nothing(copy: Copy, tmp_path: Path) -> None:
    """``last.ckpt`` tells its step only inside."""
    mark = tmp_path / "ran"
    folder = tmp_path / "runs"
    folder.mkdir()
    save_hostile(folder / "last.ckpt", mark)
    (seen,) = looked_at(folder)
    assert seen.is_whole
    assert seen.checkpoint.position.step is None
    assert not mark.exists()


def memo_bomb() -> bytes:
    """A few bytes that make Python's fast unpickler take sixteen gigabytes for a table, and padding."""
    return b"\x80\x02]" + b"r" + struct.pack("<I", 0x7FFFFFFF) + b"B" + struct.pack("<I", LARGE) + b"x" * LARGE + b"0."


def frame_bomb() -> bytes:
    """A frame and a string of a terabyte, as far as their lengths tell."""
    return b"\x80\x04" + b"\x95" + struct.pack("<Q", 1 << 40) + b"\x8e" + struct.pack("<Q", 1 << 40) + b"x" * LARGE + b"."


def doubling_bomb() -> bytes:
    """Tuples that hold one tuple twice, forty deep."""
    deep = b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(40))
    return b"\x80\x02" + deep + b"B" + struct.pack("<I", LARGE) + b"x" * LARGE + b"0."


@pytest.mark.parametrize("bomb", [memo_bomb, frame_bomb, doubling_bomb], ids=lambda made: made.__name__)
@pytest.mark.parametrize("name", ["dcp_flat", "megatron"])
def test_a_metadata_that_wants_all_memory_is_a_sentence(copy: Copy, name: str, bomb: Callable[[], bytes]) -> None:
    path = copy(name, "single" if name == "megatron" else "two")
    (path / ".metadata").write_bytes(bomb())
    assert (path / ".metadata").stat().st_size > LARGE
    (seen,) = looked_at(path.parent)
    assert str(seen.missing).startswith(".metadata ")


def metadata_naming(file: str) -> bytes:
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([2]))
    table: Any = {"w": TensorStorageMetadata(TensorProperties(torch.float32), torch.Size([2]), [chunk])}
    places = {MetadataIndex("w", torch.Size([0])): _StorageInfo(file, 0, 8)}
    return pickle.dumps(Metadata(table, planner_data={"w": ("w",)}, storage_data=places))


@pytest.mark.parametrize("file", ["../outside.distcp", "/etc/passwd", "__0_0.distcp\n\x1b[31m", "a" * 5000])
def test_a_file_outside_of_the_checkpoint_is_never_opened_or_printed_raw(tmp_path: Path, file: str) -> None:
    path = tmp_path / "runs" / "step_1"
    path.mkdir(parents=True)
    (path.parent / "outside.distcp").write_bytes(b"x" * 100)
    (path / ".metadata").write_bytes(metadata_naming(file))
    (path / "__0_0.distcp").write_bytes(b"x" * 100)
    (seen,) = looked_at(path.parent)
    told = str(seen.missing)
    assert told.endswith(" is missing")
    assert told.isprintable()
    assert len(told) < 600


@pytest.mark.parametrize("count", [2, 10**12, -1, True, "2", None])
def test_a_number_of_ranks_that_cannot_be_is_a_sentence(copy: Copy, count: Any) -> None:
    path = copy("deepspeed_zero3", "single")
    state = {"zero_stage": 3, "partition_count": count, "fp32_flat_groups": [torch.zeros(2)]}
    torch.save({"optimizer_state_dict": state}, path / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    seen = next(one for one in looked_at(path.parent) if one.checkpoint.path == str(path))
    assert seen.missing


@pytest.mark.parametrize(
    "name", ["model_world_size_99999999999999_rank_0.pt", "model_world_size_0_rank_0.pt", "model_world_size_2_rank_9.pt"]
)
def test_a_world_that_cannot_be_is_a_sentence_and_takes_no_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / "runs" / "checkpoint-1"
    path.mkdir(parents=True)
    torch.save({"w": torch.zeros(2)}, path / name)
    (path / "config.json").write_text("{}")
    assert all(sentences(path.parent))


@pytest.mark.parametrize(
    "name", ["random_states_99999999999999.pkl", "shard-99999999999999-model-00001-of-00001.safetensors", "__99999999999999.metadata"]
)
def test_a_rank_that_cannot_be_takes_no_memory(copy: Copy, name: str) -> None:
    group, sample = {"r": ("single", "accelerate"), "s": ("two", "dcp_safetensors"), "_": ("two", "dcp_rank_local")}[name[0]]
    path = copy(sample, group)
    source = next(path.glob(f"{name[:6]}*{Path(name).suffix}"), None) or next(path.glob("__0.metadata"))
    (path / name).write_bytes(source.read_bytes())
    (told,) = sentences(path)
    assert told


def test_a_zip_that_names_impossible_places_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "m_step1.pt"
    path.parent.mkdir()
    torch.save({"w": torch.zeros(1000)}, path)
    content = bytearray(path.read_bytes())
    at = content.rfind(b"PK\x01\x02")
    content[at + 42 : at + 46] = struct.pack("<I", 0x7FFFFFFF)
    path.write_bytes(content)
    (seen,) = looked_at(path.parent)
    assert seen.missing
    with zipfile.ZipFile(path, "w"):
        pass
    (seen,) = looked_at(path.parent)
    assert seen.missing
