"""What every trainer's saver has written comes out whole, byte for byte, and an output is there complete or not at all."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from merging import REPOSITORY, Held, assert_same, command, dcp, parts_in, place_of, refused, rows, tensors_in
from samples_of_trainers import FOUR, SINGLE, TWO, expected, sample, samples

from assayer.errors import CheckpointError, StateError, UsageError
from assayer.merge import merge
from assayer.merge.run import Options, find_checkpoint, run, size_in_bytes
from assayer.plan import host_name

OF_RANKS = [
    *("dcp_model_optimizer", "dcp_app_state", "dcp_flat", "dcp_rank_local", "dcp_async", "dcp_safetensors", "dcp_safetensors_two"),
    *("dcp_safetensors_consolidated", "dcp_tied", "dcp_wrapped", "placements_top", "placements_model", "placements_rank_local"),
    *("placements_ranks", "lmms_engine", "lmms_engine_ema", "lmms_engine_ema_later", "verl", "accelerate_fsdp2_sharded"),
    *("accelerate_fsdp2_ranks", "accelerate_fsdp2_full", "accelerate_fsdp1_sharded", "accelerate_fsdp1_ranks", "hf_trainer_fsdp2_sharded"),
    *("hf_trainer_fsdp2_full", "hf_trainer_fsdp1_sharded", "kempnerforge", "kempnerforge_pp", "kempnerforge_import", "torchtitan"),
    *("torchtitan_last", "torchtitan_old", "olmo_core", "optimus_dl", "lightning_fsdp", "lightning_model_parallel"),
]
OF_ONE = [
    *("lightning_file", "accelerate", "accelerate_tied", "accelerate_bin", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"),
    *("deepspeed_zero3_hf", "deepspeed_zero2_accelerate"),
]
MEGATRON = ["megatron", "megatron_old", "megatron_new"]
ALL = [*((group, name) for group in (TWO, FOUR) for name in OF_RANKS), *((SINGLE, name) for name in OF_ONE)]


def checkpoint(folder: Path) -> Path:
    weights: dict[str, Held] = {"a.weight": rows(torch.randn(300, 40), 3), "b.weight": torch.randn(40, 7)}
    return dcp(folder / "step_5", weights)


@pytest.mark.parametrize(("group", "name"), ALL, ids=[f"{group}-{name}" for group, name in ALL])
def test_what_a_trainer_saved_comes_out_byte_for_byte(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, group: str, name: str
) -> None:
    one = sample(tmp_path_factory, group, name)
    wanted = expected(one)
    if name == "deepspeed_zero3_hf":
        # Its config says that the head is the embedding: that is stored once.
        del wanted["lm_head.weight"]
    assert merge(one.path, tmp_path / "out") == tmp_path / "out"
    assert_same(tensors_in(tmp_path / "out"), wanted)
    assert not list(parts_in(tmp_path))


@pytest.mark.parametrize("group", [TWO, FOUR])
def test_a_moving_average_comes_out_byte_for_byte(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, group: str) -> None:
    one = sample(tmp_path_factory, group, "lmms_engine_ema")
    merge(one.path, tmp_path / "out", checkpoint_type="ema")
    assert_same(tensors_in(tmp_path / "out"), expected(one, ema=True))


@pytest.mark.parametrize("name", ["lmms_engine", "lmms_engine_ema_later", "verl", "dcp_flat", "torchtitan"])
def test_an_average_that_is_not_there_is_an_error(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    one = sample(tmp_path_factory, TWO, name)
    assert "holds no EMA weights" in refused(one.path, tmp_path / "out", "--checkpoint_type", "ema")


@pytest.mark.parametrize("name", MEGATRON)
def test_fused_weights_are_refused_with_the_name_of_their_converter(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    one = sample(tmp_path_factory, SINGLE, name)
    said = refused(one.path, tmp_path / "out")
    assert "Megatron-Bridge" in said and str(one.path) in said


def test_the_samples_are_all_that_the_savers_write(tmp_path_factory: pytest.TempPathFactory) -> None:
    for group, names in ((TWO, OF_RANKS), (FOUR, OF_RANKS), (SINGLE, [*OF_ONE, *MEGATRON])):
        assert set(names) - set(samples(tmp_path_factory, group)) <= {"lightning_file"}
        assert set(samples(tmp_path_factory, group)) <= set(names)


@pytest.mark.parametrize(("config", "kept"), [({"tie_word_embeddings": True}, 1), ({"tie_word_embeddings": False}, 2), (None, 2)])
def test_tied_weights_are_stored_once_where_the_config_ties_them(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, config: dict[str, bool] | None, kept: int
) -> None:
    one = sample(tmp_path_factory, TWO, "dcp_tied")
    flags = {}
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
        flags = {"hf_config": str(tmp_path / "config.json")}
    merge(one.path, tmp_path / "out", **flags)  # type: ignore[arg-type]
    found = tensors_in(tmp_path / "out")
    heads = [name for name in found if name in ("lm_head.weight", "model.embed_tokens.weight")]
    assert len(heads) == kept and "model.embed_tokens.weight" in heads
    assert len(found) == len(expected(one)) - (2 - kept)


def test_weights_that_the_config_ties_and_that_differ_are_both_stored_and_said(tmp_path: Path) -> None:
    path = dcp(tmp_path / "step_1", {"model.embed_tokens.weight": torch.zeros(4, 3), "lm_head.weight": torch.ones(4, 3)})
    (path / "config.json").write_text('{"tie_word_embeddings": true}')
    ended = command("--checkpoint_path", path, "--output_path", tmp_path / "out")
    assert ended.code == 0 and "lm_head.weight" in ended.err and "differ" in ended.err
    assert len(tensors_in(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("2GiB", 2 << 30), ("1.5kb", 1500), ("1 TiB", 1 << 40), ("12345", 12345), ("7B", 7)],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0", "0GB", "-5GB", "five", "5XB", "5 G B", "1e9", "9" * 400 + "GB"])
def test_what_is_no_size_is_refused_before_anything_is_read(tmp_path: Path, text: str) -> None:
    said = refused(checkpoint(tmp_path), tmp_path / "out", "--max_shard_size", text, code=2)
    assert "5GB" in said


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: os.utime(path, ns=(1, 1)),
        lambda path: path.unlink(),
        lambda path: shutil.copy(path, path.with_name("copy")) and path.with_name("copy").replace(path),
    ],
    ids=["shorter", "touched", "gone", "replaced"],
)
def test_a_checkpoint_that_changes_while_it_is_read_is_not_merged(tmp_path: Path, change: Callable[[Path], object]) -> None:
    path = checkpoint(tmp_path)
    found = find_checkpoint(path)

    def started(total: int) -> None:
        change(path / "__0_0.distcp")

    with pytest.raises(CheckpointError, match=r"changed while|ends at byte|cannot be read|before it should|directory"):
        run(found, tmp_path / "out", Options(dtype="bfloat16"), started=started)
    assert sorted(os.listdir(tmp_path)) == ["step_5"]


def test_a_file_cut_inside_an_element_while_it_is_read_is_told_as_a_checkpoints_fault(tmp_path: Path) -> None:
    path = dcp(tmp_path / "step_5", {"w": torch.randn(1 << 20)})
    shard, position = place_of(path, "w")
    stream = tmp_path / "m_step1.safetensors"
    from safetensors.torch import save_file

    save_file({"w": torch.randn(1 << 20)}, stream)
    with pytest.raises(CheckpointError, match="ends at byte"):
        run(find_checkpoint(stream), tmp_path / "out", Options(dtype="bfloat16"), started=lambda total: os.truncate(stream, 1 << 20 | 3))
    with pytest.raises(CheckpointError):
        run(find_checkpoint(path), tmp_path / "out", Options(dtype="bfloat16"), started=lambda total: os.truncate(shard, position + 5))
    assert sorted(os.listdir(tmp_path)) == ["m_step1.safetensors", "step_5"]


def test_an_output_that_is_there_stays_as_it_was(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    said = refused(path, tmp_path / "out", code=2)
    assert str(tmp_path / "out") in said and "--output_path" in said
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused(path, tmp_path / "link", code=2)


def test_a_disk_without_room_is_told_before_anything_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    said = refused(checkpoint(tmp_path), tmp_path / "deep" / "er" / "out")
    assert "1000" in said and str(300 * 40 * 4 + 40 * 7 * 4) in said


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        path = dcp(tmp_path / "step_1", {"w": torch.zeros(3 << 20, dtype=torch.uint8)})
        monkeypatch.setattr("assayer.merge.run.check_room", lambda folder, wanted: None)
        for words in ((), ("--max_shard_size", "500KB")):
            assert "No space left" in refused(path, small / "runs" / "out", *words)
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("place", ["file", "file/deeper/out"])
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, place: str) -> None:
    path = checkpoint(tmp_path)
    (tmp_path / "file").write_text("x")
    said = refused(path, tmp_path / place, code=2 if place == "file" else 1)
    assert "file" in said
    assert (tmp_path / "file").read_text() == "x"


def merging(path: Path, output: Path) -> "subprocess.Popen[str]":
    """A merge in a process of its own that stands still once it has begun to write."""
    program = (
        "import sys, time; from assayer import cli; from assayer.merge import command, run, writer\n"
        "old = writer.allocated\n"
        "def slow(*a):\n    made = old(*a); print('writes', flush=True); time.sleep(60); return made\n"
        "writer.allocated = slow\n"
        "sys.argv = ['merge', '--checkpoint_path', sys.argv[1], '--output_path', sys.argv[2]]\n"
        "cli.run(command.main, 'merge')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path), str(output)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stdout.readline() == "writes\n"
    return process


def test_a_killed_merge_leaves_one_folder_which_the_next_one_removes(tmp_path: Path) -> None:
    path, output = checkpoint(tmp_path), tmp_path / "merged" / "out"
    with merging(path, output) as process:
        process.kill()
    (left,) = output.parent.iterdir()
    assert left.name.startswith("out.part-")
    merge(path, output)
    assert os.listdir(output.parent) == ["out"]


def test_the_folder_of_a_merge_that_lives_is_left_alone(tmp_path: Path) -> None:
    path, output = checkpoint(tmp_path), tmp_path / "merged" / "out"
    with merging(path, output) as process:
        try:
            merge(path, output)
            assert len(os.listdir(output.parent)) == 2
        finally:
            process.kill()
    elsewhere = output.with_name(f"other.part-another_host-{process.pid}")
    elsewhere.mkdir()
    merge(path, output.with_name("other"))
    assert elsewhere.exists()


def test_what_nobody_holds_any_more_is_removed_whoever_made_it(tmp_path: Path) -> None:
    # In a container, the next merge often has the number of the one that was killed: numbers tell nothing, locks do.
    path, output = checkpoint(tmp_path), tmp_path / "merged" / "out"
    left = output.with_name(f"out.part-{host_name()}-0123abcd")
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    merge(path, output)
    assert os.listdir(output.parent) == ["out"]


def test_ctrl_c_leaves_nothing_and_ends_with_130(tmp_path: Path) -> None:
    path, output = checkpoint(tmp_path), tmp_path / "merged" / "out"
    with merging(path, output) as process:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in said
    assert not output.parent.exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"dtype": "int8"}, "int8"),
        ({"dtype": "float8_e5m2"}, "float8_e5m2"),
        ({"dtype": "nonsense"}, "nonsense"),
        ({"checkpoint_type": "both"}, "both"),
        ({"reader": "other"}, "other"),
        ({"threads": -1}, "-1"),
    ],
)
def test_words_that_the_function_does_not_know_are_refused(tmp_path: Path, flags: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        merge(checkpoint(tmp_path), tmp_path / "out", **flags)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == ["step_5"]


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_result_does_not_depend_on_the_number_of_threads(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, threads: int
) -> None:
    one = sample(tmp_path_factory, TWO, "placements_model")
    merge(one.path, tmp_path / "out", threads=threads, max_shard_size="2KB")
    assert_same(tensors_in(tmp_path / "out"), expected(one))


def test_an_output_whose_parent_is_read_only_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint(tmp_path)

    def refuse(self: Path, *args: object, **more: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StateError, match="Permission denied"):
        merge(path, tmp_path / "merged" / "out")


def test_nothing_is_written_inside_a_checkpoint(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    refused(path, path / "merged", code=2)
    refused(path, path / "deep" / "er" / "out", code=2)
