"""A merge of what somebody laid there to harm it ends with one line: nothing is run, and nothing is written."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile import SCENES, Street
from merging import command
from safetensors.torch import load_file

from assayer.sealed import sealed


def candidates(street: Street) -> Iterator[Path]:
    """Whatever lies there that a user may take for a checkpoint; links are the user's own word when they are given."""
    for folder, folders, files in os.walk(street.runs):
        for name in [*folders, *files]:
            path = Path(folder, name)
            if not path.is_symlink() and "level" not in folder:
                yield path


def merges(street: Street, output: Path) -> Iterator[list[str]]:
    """Each path with the exit code, the standard error, and what lies beside the output."""
    for path in sorted(candidates(street)):
        ended = command(f"--checkpoint_path={path}", "--output_path", output / "merged")
        for weights in output.rglob("*.safetensors"):
            # Only what lies outside, and is no part of any checkpoint here, holds zeros.
            assert all(tensor.all() for tensor in load_file(weights).values()), path
        written = sorted(str(p.relative_to(output)) for p in output.rglob("*"))
        yield [str(path.relative_to(street.runs)), str(ended.code), ended.out, ended.err, *written]
        for left in sorted(output.rglob("*"), reverse=True):
            left.rmdir() if left.is_dir() else left.unlink()


@pytest.mark.parametrize("scene", [pytest.param(scene, marks=pytest.mark.slow) if scene == "knots" else scene for scene in SCENES])
def test_a_merge_of_what_is_hostile_is_one_line_and_writes_nothing(tmp_path: Path, scene: str) -> None:
    street = Street(tmp_path)
    SCENES[scene][0](street)
    output = tmp_path / "tmp"
    output.mkdir()
    around = street.around()
    # In a process of its own, which may take 1 GiB more than it has.
    tried = list(sealed(lambda: merges(street, output), 1 << 30, 100))
    assert len(tried) > 1 or scene == "depths"
    for name, code, _, said, *written in tried:
        assert said.count("\n") == 1 or code == "0", (name, said)
        assert "\x1b" not in said
        if code == "0":
            assert written and all(line.split("/")[0] == "merged" for line in written), (name, written)
        else:
            assert said.startswith("assayer: error: "), (name, said)
            assert not written, (name, written)
    assert not street.mark.exists()
    assert street.around() == around
