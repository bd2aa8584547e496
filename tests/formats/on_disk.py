"""Every sample of the trainers by name, private copies of them, and what is asked of a path."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from samples_of_trainers import FOUR, SINGLE, TWO, sample
from trainers import Sample

from assayer import formats
from assayer.checkpoint import Found, identity
from assayer.merge.run import merge

# What each run of the trainers' savers writes: with 2 and 4 ranks the same samples.
GLOO = (
    *("dcp_model_optimizer", "dcp_app_state", "dcp_flat", "dcp_rank_local", "dcp_async", "dcp_tied", "dcp_wrapped"),
    *("dcp_safetensors", "dcp_safetensors_two", "dcp_safetensors_consolidated"),
    *("placements_top", "placements_model", "placements_rank_local", "placements_ranks"),
    *("lmms_engine", "lmms_engine_ema", "lmms_engine_ema_later", "verl"),
    *("accelerate_fsdp2_sharded", "accelerate_fsdp2_ranks", "accelerate_fsdp2_full", "accelerate_fsdp1_sharded", "accelerate_fsdp1_ranks"),
    *("hf_trainer_fsdp2_sharded", "hf_trainer_fsdp2_full", "hf_trainer_fsdp1_sharded"),
    *("kempnerforge", "kempnerforge_pp", "kempnerforge_import", "torchtitan", "torchtitan_last", "torchtitan_old"),
    *("olmo_core", "optimus_dl", "lightning_fsdp", "lightning_model_parallel"),
)
ALONE = (
    *("lightning_file", "accelerate", "accelerate_tied", "accelerate_bin"),
    *("deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero3_hf", "deepspeed_zero2_accelerate"),
    *("megatron", "megatron_old", "megatron_new"),
)
# Each sample as the group that writes it, and its name.
ALL = [(group, name) for group, names in ((TWO, GLOO), (FOUR, GLOO), (SINGLE, ALONE)) for name in names]
IDS = ["-".join(one) for one in ALL]
# One sample of each layout, for what concerns names and files and not what is in them.
SAME = {
    *("dcp_app_state", "dcp_async", "dcp_tied", "dcp_wrapped", "kempnerforge_import", "lmms_engine"),
    *("placements_top", "placements_model", "placements_rank_local", "torchtitan_last", "torchtitan_old"),
    *("lightning_model_parallel", "megatron_old", "accelerate_tied"),
}
LAYOUTS = [one for one in ALL if one[0] != FOUR and one[1] not in SAME]
LAYOUT_IDS = [name for _, name in LAYOUTS]


def original(factory: pytest.TempPathFactory, group: str, name: str) -> Sample:
    """A sample as it was written, for tests that only look at it."""
    return sample(factory, group, name)


def run_folder(one: Sample) -> Path:
    """The directory of the training run that wrote the sample: the folder below the samples' root."""
    root = one.expected.parent.parent
    return root / one.path.relative_to(root).parts[0]


def copied(one: Sample, to: Path) -> Path:
    """A copy of the sample with its times, and of what its run has laid around it; returns the checkpoint's path."""
    run = run_folder(one)
    shutil.copytree(run, to / run.name, symlinks=True)
    return to / one.path.relative_to(run.parent)


def known(path: Path) -> Found:
    """The checkpoint at this path, which must be known."""
    found = formats.identify_path(str(path))
    assert found, f"{path} is not known"
    return found


def missing(path: Path) -> str | None:
    found = known(path)
    return formats.of(found.checkpoint).missing(found.listing)


def unmarked(path: Path) -> str | None:
    found = known(path)
    return formats.of(found.checkpoint).unmarked(found.listing)


def weights(path: Path) -> tuple[str, ...]:
    found = known(path)
    return tuple(formats.of(found.checkpoint).weights(found.listing))


def identity_of(path: Path) -> str:
    return identity(known(path).listing, weights(path))


def files_of(path: Path) -> Iterator[Path]:
    """Every file of a checkpoint, the file itself where it is one."""
    yield from [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file() and not one.is_symlink())


def assert_merges_to(path: Path, expected: dict[str, torch.Tensor], output: Path) -> None:
    """A merge of the checkpoint gives these tensors, bit by bit, and no others."""
    merged = merge(path, output)
    found: dict[str, torch.Tensor] = {}
    for file in merged.glob("*.safetensors"):
        found |= load_file(file)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name].flatten().view(torch.uint8), value.contiguous().flatten().view(torch.uint8)), name
