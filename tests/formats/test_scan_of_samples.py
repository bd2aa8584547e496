"""A look at what a trainer leaves in its directory finds the checkpoints in it, and nothing of what lies inside them or beside them."""

import os

import pytest
from on_disk import ALL, IDS, LAYOUT_IDS, LAYOUTS, original, run_folder

from assayer.watch.scan import scan

# Where the run holds more checkpoints than the sample, or the sample is known by the folder around it too.
FOUND = {
    "lightning_file": ["epoch=0-step=3.ckpt", "epoch=1-step=6.ckpt", "last.ckpt"],
    **{key: ["checkpoints/checkpoint_0", "checkpoints/checkpoint_1"] for key in ("accelerate", "accelerate_tied", "accelerate_bin")},
    "verl": ["global_step_20"],
}


@pytest.mark.parametrize(("group", "name"), ALL, ids=IDS)
def test_a_run_holds_its_checkpoints_and_nothing_of_them_is_another(
    tmp_path_factory: pytest.TempPathFactory, group: str, name: str
) -> None:
    sample = original(tmp_path_factory, group, name)
    run = run_folder(sample)
    expected = sorted(FOUND.get(name, [os.path.relpath(sample.path, run)]))
    for depth in (3, 9):
        found = scan(str(run), depth)
        assert found.problems == ()
        assert sorted(os.path.relpath(f.checkpoint.path, run) for f in found.found) == expected
        assert {f.checkpoint.format for f in found.found} == {sample.format}


@pytest.mark.parametrize(("group", "name"), LAYOUTS, ids=LAYOUT_IDS)
def test_a_checkpoint_that_is_itself_watched_is_found_as_itself_alone(
    tmp_path_factory: pytest.TempPathFactory, group: str, name: str
) -> None:
    path = original(tmp_path_factory, group, name).path
    if path.is_dir():
        assert [f.checkpoint.path for f in scan(str(path), 9).found] == [str(path)]
