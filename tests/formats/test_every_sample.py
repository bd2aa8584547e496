"""Every checkpoint that a trainer's own saver wrote is asked everything."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from on_disk import (
    ALL,
    ALONE,
    GLOO,
    IDS,
    LAYOUT_IDS,
    LAYOUTS,
    assert_merges_to,
    copied,
    files_of,
    identity_of,
    known,
    missing,
    original,
    run_folder,
    unmarked,
    weights,
)
from samples_of_trainers import samples
from trainers import load_expected

from assayer import formats
from assayer.checkpoint import Position
from assayer.errors import CheckpointError
from assayer.merge.run import merge
from assayer.watch.scan import scan

# Formats whose trainer leaves no sign of its end, and samples that lack it for good.
UNMARKED = {
    **dict.fromkeys(("dcp_safetensors", "dcp_safetensors_two"), "nothing tells how many ranks there are"),
    "dcp_safetensors_consolidated": "no trainer_state.json",
    "placements_ranks": "no config.json",
    **dict.fromkeys(("accelerate_fsdp2_ranks", "accelerate_fsdp1_ranks"), "no trainer_state.json and no random_states_0.pkl"),
}
NOT_SHARDED = ("hf_dir", "accelerate", "lightning_file")

# Files whose absence nothing in the layout tells; for all of them but the last the quiet period decides, since ``unmarked`` says why.
UNTOLD = {
    # Neither the shape of a tensor nor the number of ranks is written anywhere.
    "dcp_safetensors": {"shard-00002-model-00001-of-00001.safetensors"},
    # A rank that holds nothing of an output file writes none.
    "dcp_safetensors_two": {
        *("shard-00001-model-00001-of-00002.safetensors", "shard-00001-model-00002-of-00002.safetensors"),
        *("shard-00002-model-00001-of-00002.safetensors", "shard-00002-model-00002-of-00002.safetensors"),
    },
    # No name tells the number of ranks; the placements inside do, when it is merged.
    **{key: {"pytorch_model_fsdp_0_rank1.bin"} for key in ("accelerate_fsdp2_ranks", "accelerate_fsdp1_ranks")},
    # The Trainer writes the model twice: what is left is the other copy, and whole.
    "hf_trainer_fsdp2_full": {"model.safetensors"},
}


@pytest.mark.parametrize(("group", "names"), [("two", GLOO), ("four", GLOO), ("single", ALONE)])
def test_the_list_of_samples_is_what_the_savers_write(tmp_path_factory: pytest.TempPathFactory, group: str, names: tuple[str, ...]) -> None:
    found = set(samples(tmp_path_factory, group))
    assert found <= set(names)
    assert set(names) - found <= {"lightning_file"}


@pytest.mark.parametrize(("group", "name"), ALL, ids=IDS)
def test_a_trainers_checkpoint_is_known_whole_and_placed(tmp_path_factory: pytest.TempPathFactory, group: str, name: str) -> None:
    sample = original(tmp_path_factory, group, name)
    found = known(sample.path)
    form = formats.of(found.checkpoint)
    assert found.checkpoint.format == sample.format
    assert found.checkpoint.position == Position(sample.step, sample.epoch, sample.tokens)
    assert form.missing(found.listing) is None
    assert form.unmarked(found.listing) == UNMARKED.get(name)
    held = form.weights(found.listing)
    assert held
    assert set(held) <= found.listing.names
    assert form.variants(found.listing) == (("regular", "ema") if sample.expected_ema else ("regular",))
    assert form.SHARDED is (sample.format not in NOT_SHARDED)


@pytest.mark.parametrize(("group", "name"), LAYOUTS, ids=LAYOUT_IDS)
def test_a_copy_and_a_touch_keep_the_identity(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, group: str, name: str) -> None:
    sample = original(tmp_path_factory, group, name)
    read = identity_of(sample.path)
    assert len(read) == 32
    assert int(read, 16) >= 0
    path = tmp_path / sample.path.name
    if sample.format == "deepspeed":
        path = copied(sample, tmp_path)
    else:
        subprocess.run(["cp", "-a", sample.path, path], check=True)
    assert missing(path) is None
    assert identity_of(path) == read
    now = time.time_ns()
    for file in sorted(files_of(path), key=lambda file: file.name.endswith(".metadata")):
        now += 1_000_000
        os.utime(file, ns=(now, now))
    assert missing(path) is None
    assert identity_of(path) == read


@pytest.mark.parametrize(("group", "name"), LAYOUTS, ids=LAYOUT_IDS)
def test_no_part_of_a_trainers_weights_may_be_cut_or_gone(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, group: str, name: str
) -> None:
    """Times stay as they were: what tells must be the content."""
    path = copied(original(tmp_path_factory, group, name), tmp_path)
    held = weights(path)
    untold = UNTOLD.get(name, set())
    assert untold <= set(held)
    whole_as = known(path).checkpoint.format
    taken_for_whole = []
    for weight in held:
        file = known(path).listing.file(weight)
        content, status = file.read_bytes(), file.stat()
        for kept in (len(content) - 1, len(content) // 2, 0, None):
            if kept is None:
                file.unlink()
            else:
                file.write_bytes(content[:kept])
                os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
            found = formats.identify_path(str(path)) if path.exists() else None
            if found and formats.of(found.checkpoint).missing(found.listing) is None and not (kept is None and weight in untold):
                taken_for_whole.append(f"{weight} with {kept} of {len(content)} bytes, as {found.checkpoint.format}")
        file.write_bytes(content)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert missing(path) is None
    assert known(path).checkpoint.format == whole_as
    assert taken_for_whole == []


@pytest.mark.parametrize("name", ["accelerate_fsdp2_ranks", "accelerate_fsdp1_ranks"])
def test_the_file_of_a_last_rank_that_no_name_tells_of_is_missed_when_it_is_merged(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, name: str
) -> None:
    path = copied(original(tmp_path_factory, "two", name), tmp_path)
    (path / "pytorch_model_fsdp_0_rank1.bin").unlink()
    assert unmarked(path), "a quiet period must decide"
    with pytest.raises(CheckpointError, match="has pieces for"):
        merge(path, tmp_path / "out")


def test_of_a_model_that_the_trainer_wrote_twice_either_copy_is_the_model(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    sample = original(tmp_path_factory, "two", "hf_trainer_fsdp2_full")
    path = copied(sample, tmp_path)
    assert known(path).checkpoint.format == "hf_dir"
    (path / "model.safetensors").unlink()
    assert (known(path).checkpoint.format, missing(path), unmarked(path)) == ("accelerate_fsdp", None, None)
    assert_merges_to(path, load_expected(sample), tmp_path / "out")


def orders(files: list[Path]) -> list[list[Path]]:
    """As the trainer wrote them; and as a copy or a delete may come upon them."""
    return [sorted(files, key=lambda file: file.stat().st_mtime_ns), sorted(files), sorted(files, reverse=True)]


@pytest.mark.parametrize(("group", "name"), LAYOUTS, ids=LAYOUT_IDS)
def test_file_by_file_nothing_is_whole_too_early_and_no_part_is_a_checkpoint_of_its_own(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, group: str, name: str
) -> None:
    sample = original(tmp_path_factory, group, name)
    run = run_folder(sample)
    held = {known(sample.path).listing.file(weight) for weight in weights(sample.path)}
    paths = {f.checkpoint.path for f in scan(str(run), 9).found}
    for number, order in enumerate(orders([*files_of(run)])):
        copy = tmp_path / f"{number}" / run.name
        arrived: set[Path] = set()
        for file in order:
            target = copy / file.relative_to(run)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, target)
            arrived.add(file)
            for found in scan(str(copy), 9).found:
                at = str(run / os.path.relpath(found.checkpoint.path, copy))
                assert at in paths, f"{at} after {file.name}"
                form = formats.of(found.checkpoint)
                if form.missing(found.listing) is None and form.unmarked(found.listing) is None and at == str(sample.path):
                    absent = {one.name for one in held - arrived}
                    assert absent <= UNTOLD.get(name, set()), f"whole after {file.name}, as {found.checkpoint.format}"
        path = copy / sample.path.relative_to(run)
        assert missing(path) is None
        assert identity_of(path) == identity_of(sample.path)
