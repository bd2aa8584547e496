"""What a training keeps is the same checkpoint under a second name, and nobody takes anything else for it."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from samples_of_trainers import FOUR, SINGLE, TWO, copied, samples

from assayer import formats, kept
from assayer.checkpoint import identity
from assayer.files import write_json
from assayer.kept import Kept
from assayer.worker import hold


def save(path: Path, value: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"w": torch.full((4,), value)}, path)
    return path


def of(path: Path, key: str = "k") -> Kept:
    return Kept.of(str(path), "the owner", key)


@pytest.mark.parametrize("group", [TWO, FOUR, SINGLE])
def test_of_every_layout_what_is_kept_is_the_same_checkpoint(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, group: str) -> None:
    for name, sample in samples(tmp_path_factory, group).items():
        copy = copied(sample, tmp_path / name)
        before = formats.identify_path(str(copy))
        assert before is not None
        one = of(copy)
        assert one.keep(), name
        shutil.rmtree(copy) if copy.is_dir() else copy.unlink()
        assert kept.at(one.path) == one
        found = formats.identify_path(one.path)
        assert found is not None
        form = formats.of(found.checkpoint)
        assert (found.checkpoint.format, found.checkpoint.name) == (before.checkpoint.format, copy.name), name
        assert form.missing(found.listing) is None, name
        assert identity(found.listing, form.weights(found.listing))
        one.release()
        assert not one.folder.parent.exists()


def test_it_costs_no_bytes_and_leaves_out_what_only_resumes(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoint-1" / "pytorch_model.bin").parent
    save(path / "optimizer.pt")
    one = of(path)
    assert one.keep()
    assert os.listdir(one.path) == ["pytorch_model.bin"]
    assert os.path.samefile(path / "pytorch_model.bin", Path(one.path) / "pytorch_model.bin")


def test_what_is_not_there_or_no_format_knows_is_not_kept(tmp_path: Path) -> None:
    assert not of(tmp_path / "checkpoint-1").keep()
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "notes.txt").touch()
    assert not of(tmp_path / "checkpoint-1").keep()
    assert not (tmp_path / "evals" / ".hold").exists()


def test_what_is_deleted_while_it_is_kept_is_not_kept_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "checkpoint-1" / "model-00001-of-00002.safetensors").parent
    save(path / "model-00002-of-00002.safetensors")
    link = os.link

    def rotate(*words: object, **more: object) -> None:
        shutil.rmtree(path, ignore_errors=True)
        link(*words, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "link", rotate)
    assert not of(path).keep()
    assert not (tmp_path / "evals" / ".hold").exists()


def test_it_speaks_for_checkpoints_of_its_own_directory_alone(tmp_path: Path) -> None:
    one = of(save(tmp_path / "run" / "m_step1.pt"))
    assert one.keep()
    assert kept.left_by("the owner", one.folder.parent) == [one]
    assert kept.left_by("another", one.folder.parent) == []
    facts = json.loads((one.folder / "kept.json").read_text())
    elsewhere = {**facts, "checkpoint": str(tmp_path / "elsewhere" / "m_step1.pt")}
    wrongs: list[object] = [elsewhere, {"checkpoint": 1}, [], None]
    for wrong in wrongs:
        write_json(one.folder / "kept.json", wrong)
        assert kept.at(one.path) is None
        assert kept.left_by("the owner", one.folder.parent) == []
    assert kept.at(str(tmp_path / "run" / "m_step1.pt")) is None


def test_a_watch_leaves_it_alone_for_a_month(tmp_path: Path) -> None:
    one = of(save(tmp_path / "run" / "m_step1.pt"))
    assert one.keep()
    assert hold.held_in(one.folder.parent) == []
    assert one.is_there
    month = time.time() - 31 * 86400
    os.utime(one.folder / "kept.json", (month, month))
    assert one.keep(), "who asks for it has it for another month"
    assert hold.held_in(one.folder.parent) == []
    assert one.is_there
    os.utime(one.folder / "kept.json", (month, month))
    assert hold.held_in(one.folder.parent) == []
    assert not one.folder.parent.exists()
