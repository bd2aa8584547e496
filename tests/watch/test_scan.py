"""One look at a directory tree: what is a checkpoint in it and what is not."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from assayer.watch.scan import is_temporary, scan


def save(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"w": torch.zeros(2)}, path)


def names(root: Path, depth: int = 3, regex: str | None = None) -> list[str]:
    return [os.path.relpath(f.checkpoint.path, root) for f in scan(str(root), depth, regex).found]


def hf(path: Path, name: str = "model.safetensors") -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(b"")
    (path / "config.json").write_text("{}")


def test_checkpoints_come_by_step_and_to_the_depth_asked_for(tmp_path: Path) -> None:
    save(tmp_path / "m_step10.pt", tmp_path / "m_step9.pt", tmp_path / "a" / "m_step1.pt", tmp_path / "a" / "b" / "c" / "m_step2.pt")
    assert names(tmp_path) == ["a/m_step1.pt", "m_step9.pt", "m_step10.pt"]
    assert names(tmp_path, depth=1) == ["m_step9.pt", "m_step10.pt"]
    assert "a/b/c/m_step2.pt" in names(tmp_path, depth=4)


def test_our_own_folders_and_unfinished_names_are_passed_over(tmp_path: Path) -> None:
    save(
        tmp_path / "evals" / "e" / "m.pt",
        tmp_path / "merged" / "m.pt",
        tmp_path / ".cache" / "m.pt",
        tmp_path / "tmp-checkpoint-5" / "m.pt",
    )
    save(tmp_path / ".m.pt.Xy12", tmp_path / "m.pt.tmp", tmp_path / "m.ckpt.part", tmp_path / "x.orbax-checkpoint-tmp-7" / "m.pt")
    assert names(tmp_path) == []
    assert is_temporary("tmp-checkpoint-100")
    assert not is_temporary("template-100")


def test_the_files_inside_a_checkpoint_are_none_but_directories_beside_a_final_export_are(tmp_path: Path) -> None:
    hf(tmp_path / "exp")
    save(tmp_path / "exp" / "extra.pt")
    hf(tmp_path / "exp" / "checkpoint-500")
    save(tmp_path / "exp" / "checkpoint-500" / "optimizer.pt", tmp_path / "exp" / "checkpoint-500" / "ema.pt")
    assert names(tmp_path) == ["exp", "exp/checkpoint-500"]


def test_a_file_called_model_safetensors_among_single_files_is_one_of_them(tmp_path: Path) -> None:
    save(tmp_path / "run" / "m_step1.pt")
    (tmp_path / "run" / "model.safetensors").write_bytes(b"")
    assert names(tmp_path) == ["run/model.safetensors", "run/m_step1.pt"]


def test_links_are_not_followed(tmp_path: Path) -> None:
    save(tmp_path / "run" / "epoch=1-step=5.ckpt", tmp_path / "outside" / "m.pt")
    (tmp_path / "run" / "last.ckpt").symlink_to("epoch=1-step=5.ckpt")
    (tmp_path / "run" / "loop").symlink_to(tmp_path / "run")
    (tmp_path / "run" / "out").symlink_to(tmp_path / "outside")
    assert names(tmp_path / "run") == ["epoch=1-step=5.ckpt"]
    (tmp_path / "linked").symlink_to(tmp_path / "run")
    assert names(tmp_path / "linked") == ["epoch=1-step=5.ckpt"], "the directory itself may be a link"


def test_the_filter_sees_the_path_below_the_directory(tmp_path: Path) -> None:
    save(tmp_path / "a" / "m_step1.pt", tmp_path / "b" / "m_step2.pt")
    assert names(tmp_path, regex=r"^a/") == ["a/m_step1.pt"]
    assert names(tmp_path, regex=r"step2\.pt$") == ["b/m_step2.pt"]


def test_a_directory_that_is_a_checkpoint_is_found_as_itself(tmp_path: Path) -> None:
    hf(tmp_path / "checkpoint-5")
    assert names(tmp_path / "checkpoint-5") == ["."]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_folder_below_is_a_sentence(tmp_path: Path) -> None:
    save(tmp_path / "m_step1.pt", tmp_path / "closed" / "m.pt")
    (tmp_path / "closed").chmod(0)
    try:
        found = scan(str(tmp_path), 3)
        assert len(found.found) == 1
        assert "Permission denied" in found.problems[0]
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        scan(str(tmp_path / "none"), 3)


def laid(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_every_tag_of_a_deepspeed_run_is_a_checkpoint_and_nothing_beside_them_is(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (100, 200, 1000):
        tag = run / f"global_step{step}"
        laid(tag / "mp_rank_00_model_states.pt", *(tag / f"bf16_zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in range(2)))
    laid(run / "latest", run / "zero_to_fp32.py")
    assert names(run) == ["global_step100", "global_step200", "global_step1000"]
    assert names(tmp_path, depth=9) == ["run/global_step100", "run/global_step200", "run/global_step1000"]


def test_inside_a_trainers_checkpoint_deepspeeds_tag_is_no_second_one(tmp_path: Path) -> None:
    run = tmp_path / "out"
    for step in (10, 20):
        path = run / f"checkpoint-{step}"
        laid(path / f"global_step{step}" / "zero_pp_rank_0_mp_rank_00_model_states.pt", path / "config.json", path / "latest")
        laid(path / f"global_step{step}" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", path / "trainer_state.json")
        laid(path / "rng_state_0.pth", path / "training_args.bin", path / "scheduler.pt")
    assert names(run, depth=9) == ["checkpoint-10", "checkpoint-20"]
    # Stage 2, or gathered weights: the safetensors are there too.
    laid(run / "checkpoint-20" / "model.safetensors")
    assert names(run, depth=9) == ["checkpoint-10", "checkpoint-20"]


def test_a_trainers_output_holds_its_checkpoints_beside_the_final_export(tmp_path: Path) -> None:
    for step in (10, 20, 100):
        hf(tmp_path / "out" / f"checkpoint-{step}")
        save(tmp_path / "out" / f"checkpoint-{step}" / "optimizer.pt", tmp_path / "out" / f"checkpoint-{step}" / "rng_state_0.pth")
    hf(tmp_path / "out")
    save(tmp_path / "out" / "training_args.bin", tmp_path / "out" / "runs" / "optimizer.pt")
    assert names(tmp_path) == ["out", "out/checkpoint-10", "out/checkpoint-20", "out/checkpoint-100"]
    assert names(tmp_path / "out", depth=9) == [".", "checkpoint-10", "checkpoint-20", "checkpoint-100"]


def test_what_was_evaluated_and_merged_beside_checkpoints_is_none(tmp_path: Path) -> None:
    hf(tmp_path / "checkpoint-10")
    hf(tmp_path / "merged" / "checkpoint-10")
    hf(tmp_path / "evals" / "mean" / "checkpoint-10")
    laid(tmp_path / "evals" / "mean" / "checkpoint-10.json")
    assert names(tmp_path, depth=9) == ["checkpoint-10"]
    hf(tmp_path / "merged" / "checkpoint-20.part-host-1")
    assert names(tmp_path, depth=9) == ["checkpoint-10"]


def test_a_pruned_step_of_verl_without_its_actor_is_none(tmp_path: Path) -> None:
    laid(tmp_path / "global_step_10" / "data.pt", tmp_path / "latest_checkpointed_iteration.txt")
    laid(tmp_path / "global_step_20" / "data.pt", tmp_path / "global_step_20" / "actor" / "model_world_size_1_rank_0.pt")
    laid(tmp_path / "global_step_20" / "actor" / "huggingface" / "config.json")
    laid(tmp_path / "global_step_20" / "critic" / "model_world_size_1_rank_0.pt")
    assert names(tmp_path, depth=9) == ["global_step_20"]


def shard(path: Path) -> None:
    path.mkdir(parents=True)
    for name in ("__0_0.distcp", ".metadata"):
        (path / name).write_bytes(b"x")


def test_a_model_in_a_folder_of_its_checkpoint_is_found_by_the_outer_name(tmp_path: Path) -> None:
    for name in ("nemo--step=99-epoch=1", "epoch_0_step_19"):
        shard(tmp_path / name / ("weights" if "nemo" in name else "model"))
        shard(tmp_path / name / "optim")
    checkpoints = [f.checkpoint for f in scan(str(tmp_path), 9).found]
    found = {os.path.relpath(c.path, tmp_path): (c.format, c.position.step) for c in checkpoints}
    assert found == {"nemo--step=99-epoch=1": ("dcp_folder", 99), "epoch_0_step_19": ("dcp_folder", 19)}


def test_a_final_export_in_the_runs_directory_hides_nothing_that_lies_beside_it(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "step_100.safetensors", "step_200.pt", "value_head.pt"):
        (tmp_path / name).write_bytes(b"x")
    for tag in ("global_step5", "global_step10"):
        (tmp_path / tag).mkdir()
        (tmp_path / tag / "mp_rank_00_model_states.pt").write_bytes(b"x")
    found = {os.path.relpath(f.checkpoint.path, tmp_path) for f in scan(str(tmp_path), 3).found}
    assert found == {".", "step_100.safetensors", "step_200.pt", "global_step5", "global_step10"}


def test_a_checkpoint_that_breaks_its_format_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from assayer import formats

    for name in ("checkpoint-1", "checkpoint-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"x")
    identify = formats.identify

    def breaking(listing: Any) -> Any:
        if listing.name == "checkpoint-1":
            raise ZeroDivisionError("a hostile number")
        return identify(listing)

    monkeypatch.setattr(formats, "identify", breaking)
    listed = scan(str(tmp_path), 3)
    assert [f.checkpoint.name for f in listed.found] == ["checkpoint-2"]
    assert len(listed.problems) == 1 and "checkpoint-1: ZeroDivisionError: a hostile number" in listed.problems[0]
