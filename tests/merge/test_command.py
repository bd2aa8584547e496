"""The command: which checkpoint it takes, where the result goes, what it copies, and what it says."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from merging import REPOSITORY, command, dcp, refused, tensors_in
from samples_of_trainers import SINGLE, TWO, sample

TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "merges.txt", "tokenizer.model"]
OTHERS = ["generation_config.json", "chat_template.jinja", "preprocessor_config.json", "modeling_mine.py"]


def checkpoint(path: Path, value: float = 1.0) -> Path:
    return dcp(path, {"w": torch.full((4,), value)})


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_of_a_directory_of_checkpoints_the_newest_whole_one_is_taken(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        checkpoint(tmp_path / f"step_{step}", step)
    checkpoint(tmp_path / "step_30") / ".metadata"
    (tmp_path / "step_30" / ".metadata").unlink()
    checkpoint(tmp_path / "checkpoint-40-merged")
    checkpoint(tmp_path / "merged" / "step_50")
    checkpoint(tmp_path / ".hidden_60")
    (tmp_path / "step_70").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "step_80").symlink_to(tmp_path / "nowhere")
    ended = command("--checkpoint_path", tmp_path, "--output_path", tmp_path / "out")
    assert ended.code == 0, ended
    assert tensors_in(tmp_path / "out")["w"].equal(torch.full((4,), 10.0))


def test_where_no_checkpoint_is_whole_the_newest_ones_reason_is_told(tmp_path: Path) -> None:
    for step in (1, 2):
        (checkpoint(tmp_path / f"step_{step}") / ".metadata").unlink()
    said = refused(tmp_path, tmp_path / "out")
    assert "none of the 2 checkpoints" in said and "step_2: no .metadata yet" in said


@pytest.mark.parametrize("what", ["nothing", "empty", "file", "other"])
def test_where_there_is_no_checkpoint_that_is_said(tmp_path: Path, what: str) -> None:
    path = tmp_path / "there"
    if what == "empty":
        path.mkdir()
    elif what == "file":
        path.write_text("x")
    elif what == "other":
        (path / "deep").mkdir(parents=True)
        (path / "deep" / "notes.txt").write_text("x")
    said = refused(path, tmp_path / "out")
    assert str(path) in said


def test_without_a_path_the_flag_is_named() -> None:
    ended = command("--dtype", "bfloat16")
    assert ended.code == 2 and "--checkpoint_path" in ended.err


@pytest.mark.parametrize(
    "words",
    [
        ("--dtype", "int8"),
        ("--checkpoint_type", "other"),
        ("--threads", "-1"),
        ("--threads", "many"),
        ("--reader", "x"),
        ("--unknown",),
        ("--max_shard_size", "big"),
        ("--model_general_type", "x"),
        ("extra",),
    ],
)
def test_words_that_are_not_known_are_one_line_and_two(tmp_path: Path, words: tuple[str, ...]) -> None:
    refused(checkpoint(tmp_path / "step_1"), tmp_path / "out", *words, code=2)


def test_the_result_lies_beside_the_checkpoints_unless_told_otherwise(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "run" / "step_1")
    ended = command("--checkpoint_path", path)
    assert ended.code == 0
    assert files(tmp_path / "run" / "merged") == ["step_1/model.safetensors"]
    assert str(tmp_path / "run" / "merged" / "step_1") in ended.out
    assert files(path) == [".metadata", "__0_0.distcp"]


def test_relative_paths_are_those_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path / "run" / "step_1")
    monkeypatch.chdir(tmp_path / "run")
    assert command("--checkpoint_path", "step_1").code == 0
    assert command("--checkpoint_path", ".", "--output_path", "here/out").code == 0
    assert files(tmp_path / "run" / "merged") == ["step_1/model.safetensors"]
    assert files(tmp_path / "run" / "here") == ["out/model.safetensors"]


def test_both_kinds_of_weights_are_merged_side_by_side(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    source = sample(tmp_path_factory, TWO, "lmms_engine_ema").path
    path = tmp_path / "run" / source.name
    shutil.copytree(source, path)
    ended = command("--checkpoint_path", path, "--checkpoint_type", "both")
    assert ended.code == 0, ended
    merged = tmp_path / "run" / "merged"
    assert sorted(os.listdir(merged)) == ["checkpoint-40", "checkpoint-40-ema"]
    assert ended.out.count("merged ") == 2
    first, second = (tensors_in(merged / name) for name in sorted(os.listdir(merged)))
    assert first.keys() == second.keys() and any(not first[name].equal(second[name]) for name in first)
    assert command("--checkpoint_path", path, "--checkpoint_type", "both", "--output_path", tmp_path / "x").code == 0
    assert {"x", "x-ema"} <= set(os.listdir(tmp_path))


def test_accelerates_layout_is_merged_one_level_higher(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    source = sample(tmp_path_factory, SINGLE, "accelerate").path
    path = tmp_path / "run" / "checkpoints" / source.name
    shutil.copytree(source, path)
    assert command("--checkpoint_path", path).code == 0
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoints", "merged"]
    assert os.listdir(tmp_path / "run" / "merged") == [source.name]


def test_a_dry_run_tells_everything_and_writes_nothing(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = dcp(tmp_path / "step_1", {"a.w": torch.zeros(3, 2), "b.n": torch.zeros(5, dtype=torch.int64)})
    (path / "config.json").write_text("{}")
    before = files(tmp_path)
    ended = command("--checkpoint_path", path, "--dry_run", "--dtype", "bfloat16", "--max_shard_size", "20")
    assert ended.code == 0 and files(tmp_path) == before
    for part in ("a.w  bfloat16 from float32  [3, 2]", "b.n  int64  [5]", "2 tensors, 52 bytes in 2 files", "config.json", "merged/step_1"):
        assert part in ended.out


@pytest.mark.parametrize("spelling", ["_", "-"])
def test_flags_are_spelled_with_hyphens_or_underscores(tmp_path: Path, spelling: str) -> None:
    path = checkpoint(tmp_path / "step_1")
    words = ["--checkpoint_path", path, "--output_path", tmp_path / "out", "--max_shard_size", "1GB", "--no_verify", "--dry_run"]
    ended = command(*(word.replace("_", spelling) if isinstance(word, str) and word.startswith("--") else word for word in words))
    assert ended.code == 0


@pytest.mark.parametrize("kind", ["causal_lm", "masked_lm", "image_text_to_text", "general"])
def test_the_kind_of_model_is_accepted_and_not_needed(tmp_path: Path, kind: str) -> None:
    ended = command("--checkpoint_path", checkpoint(tmp_path / "step_1"), "--model_general_type", kind)
    assert ended.code == 0 and (tmp_path / "merged" / "step_1" / "model.safetensors").exists()


def test_the_last_line_tells_bytes_seconds_and_speed(tmp_path: Path) -> None:
    ended = command("--checkpoint_path", checkpoint(tmp_path / "step_1"), "--output_path", tmp_path / "out")
    assert re.fullmatch(
        rf"merged {tmp_path / 'step_1'} -> {tmp_path / 'out'}: 1 tensors, 16 bytes in 1 file, \d+\.\d\d s, \d+\.\d\d GB/s\n", ended.out
    )


def test_a_missing_config_is_said_and_a_found_one_is_not(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "step_1")
    assert "no config.json was found" in command("--checkpoint_path", path, "--output_path", tmp_path / "a").err
    (path / "config.json").write_text("{}")
    assert command("--checkpoint_path", path, "--output_path", tmp_path / "b").err == ""


def laid(folder: Path, names: list[str], text: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(text or f'{{"is": "{name}"}}')
    return folder


@pytest.mark.parametrize("where", ["", "huggingface", "actor/huggingface", ".."])
def test_what_stands_around_the_weights_is_copied(tmp_path: Path, where: str) -> None:
    path = checkpoint(tmp_path / "run" / "step_1")
    names = ["config.json", *TOKENIZER, *OTHERS]
    laid(path / where, [*names, "optimizer.json", "trainer_state.txt"])
    assert command("--checkpoint_path", path, "--output_path", tmp_path / "out").code == 0
    assert files(tmp_path / "out") == sorted([*names, "model.safetensors"])
    for name in names:
        assert json.loads((tmp_path / "out" / name).read_text()) == {"is": name}


def test_the_checkpoints_own_files_win_over_the_runs(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "run" / "step_1")
    laid(path.parent, ["config.json", "tokenizer.json"], '{"of": "run"}')
    laid(path, ["config.json"], '{"of": "checkpoint"}')
    command("--checkpoint_path", path, "--output_path", tmp_path / "out")
    assert "checkpoint" in (tmp_path / "out" / "config.json").read_text()
    assert "run" in (tmp_path / "out" / "tokenizer.json").read_text()


def test_what_is_given_wins_over_what_is_found(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "step_1")
    laid(path, ["config.json", "tokenizer.json", "vocab.txt", "generation_config.json"], '{"of": "checkpoint"}')
    given = laid(tmp_path / "given", ["config.json", "tokenizer.json"], '{"of": "given"}')
    words = laid(tmp_path / "words", ["tokenizer.model", "config.json"], '{"of": "words"}')

    def merged(name: str, *flags: object) -> dict[str, str]:
        assert command("--checkpoint_path", path, "--output_path", tmp_path / name, *flags).code == 0
        read = {p.name: json.loads(p.read_text())["of"] for p in (tmp_path / name).iterdir() if p.suffix != ".safetensors"}
        return read

    found = {"config.json": "checkpoint", "tokenizer.json": "checkpoint", "vocab.txt": "checkpoint", "generation_config.json": "checkpoint"}
    assert merged("a") == found
    assert merged("b", "--hf_config", given) == found | {"config.json": "given", "tokenizer.json": "given"}
    assert merged("c", "--hf_config", given / "config.json") == found | {"config.json": "given"}
    kept = {"config.json": "checkpoint", "generation_config.json": "checkpoint"}
    assert merged("d", "--tokenizer", words) == kept | {"tokenizer.model": "words"}
    assert merged("e", "--tokenizer", words, "--hf_config", given) == kept | {"tokenizer.model": "words", "config.json": "given"}


@pytest.mark.parametrize("flag", ["--hf_config", "--tokenizer"])
@pytest.mark.parametrize("what", ["missing", "empty", "damaged", "list"])
def test_a_config_or_tokenizer_that_is_none_is_refused(tmp_path: Path, flag: str, what: str) -> None:
    given = tmp_path / "given"
    if what != "missing":
        given.mkdir()
    if what in ("damaged", "list"):
        (given / "config.json").write_text("{" if what == "damaged" else "[1]")
    said = refused(checkpoint(tmp_path / "step_1"), tmp_path / "out", flag, given, code=2)
    assert str(given) in said


def test_a_damaged_config_of_the_checkpoints_own_is_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "step_1")
    (path / "config.json").write_bytes(b"\xff\xfe{")
    assert "config.json" in refused(path, tmp_path / "out")


def test_the_command_runs_as_a_module_and_below_the_programs_own(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "step_1")
    for number, words in enumerate((["assayer.merge"], ["assayer", "merge"])):
        flags = ["--checkpoint_path", str(path), "--output_path", str(tmp_path / f"out{number}")]
        done = subprocess.run([sys.executable, "-m", *words, *flags], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        assert done.stdout.startswith("merged ")
        assert tensors_in(tmp_path / f"out{number}")["w"].equal(torch.ones(4))


def test_a_merge_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "step_1")
    program = (
        "import sys; from assayer.merge import merge; merge(sys.argv[1], sys.argv[2]); "
        "print({'torch', 'transformers', 'safetensors', 'redis', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path), str(tmp_path / "out")], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


def test_a_checkpoint_given_without_its_flag_is_told_so(tmp_path: Path) -> None:
    ended = command(checkpoint(tmp_path / "step_1"))
    assert ended.code == 2
    assert "--checkpoint_path" in ended.err and len(ended.err.splitlines()) == 1


def test_both_weights_of_a_checkpoint_that_holds_one_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    said = refused(checkpoint(tmp_path / "step_1"), tmp_path / "out", "--checkpoint_type", "both")
    assert "holds no ema weights; give --checkpoint_type regular" in said


def test_a_key_map_that_changes_nothing_is_told(tmp_path: Path) -> None:
    ended = command("--checkpoint_path", checkpoint(tmp_path / "step_1"), "--output_path", tmp_path / "out", "--key_map", "kempnerforge")
    assert ended.code == 0 and "the key map kempnerforge changed no name" in ended.err


def test_a_dry_run_refuses_what_the_run_would(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "step_1")
    for output in (tmp_path, path / "inside"):
        assert command("--checkpoint_path", path, "--output_path", output, "--dry_run").code == 2
