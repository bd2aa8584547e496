"""The trainers' samples, written once a test session, however many worker processes share it."""

import fcntl
import os
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch
    from trainers import Sample

__all__ = ["FOUR", "SINGLE", "TWO", "copied", "expected", "sample", "samples"]

# Of a session, what two ranks, four ranks and one process alone have written.
TWO, FOUR, SINGLE = "two", "four", "single"
_WRITTEN = "written"


def sample(factory: pytest.TempPathFactory, group: str, name: str) -> "Sample":
    """One sample of a group; a test that needs a trainer that is not installed is skipped."""
    found = samples(factory, group)
    if name not in found:
        pytest.skip(f"the trainer that writes {name} is not installed")
    return found[name]


def copied(one: "Sample", folder: Path) -> Path:
    """A sample's copy, under its own name in a new folder, with the times of its files."""
    copy = folder / one.path.name
    folder.mkdir()
    if one.path.is_dir():
        shutil.copytree(one.path, copy, symlinks=True)
    else:
        shutil.copy2(one.path, copy)
    return copy


def samples(factory: pytest.TempPathFactory, group: str) -> "dict[str, Sample]":
    """Every sample of a group by name; nobody may change them."""
    base = factory.getbasetemp()
    # Each worker of pytest-xdist has a directory of its own inside that of the session.
    return _samples(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base, group)


@cache
def _samples(base: Path, group: str) -> "dict[str, Sample]":
    # The package of savers stands beside the tests of formats, and imports itself by its own name.
    folder = str(Path(__file__).parent / "formats")
    if folder not in sys.path:
        sys.path.append(folder)
    from trainers import load_samples, write_gloo, write_single

    writers: dict[str, Callable[[Path], object]] = {
        TWO: lambda root: write_gloo(root, 2),
        FOUR: lambda root: write_gloo(root, 4),
        SINGLE: write_single,
    }
    root = base / "trainers" / group
    root.mkdir(parents=True, exist_ok=True)
    with (root.parent / f"{group}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / _WRITTEN).exists():
            writers[group](root)
            (root / _WRITTEN).touch()
    return {one.name: one for one in load_samples(root)}


def expected(one: "Sample", *, ema: bool = False) -> "dict[str, torch.Tensor]":
    """What is to be found in a sample: every tensor of its model, whole."""
    from trainers import load_expected

    return load_expected(one, ema=ema)
