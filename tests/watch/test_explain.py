"""What is said of paths that no look takes for a checkpoint, and of those that it does."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from samples import plan as any_plan

from assayer.errors import UsageError
from assayer.kept import Kept
from assayer.plan import Plan, PlanStore
from assayer.watch.explain import Explained, explain


def save(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"w": torch.zeros(2)}, path)
    return path


def told(path: Path, *plans: Plan) -> Explained:
    return explain(str(path), list(plans), PlanStore(path.parent / "state"), None)


def test_what_a_look_passes_over_is_told_with_the_reason(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-5"
    checkpoint.mkdir()
    save_file({"w": torch.zeros(2)}, checkpoint / "model.safetensors")
    os.symlink(save(tmp_path / "m_step1.pt"), tmp_path / "latest.pt")
    reasons = {
        tmp_path / "latest.pt": "a symbolic link",
        save(tmp_path / ".hidden.pt"): "hidden",
        save(tmp_path / "evals" / "m.pt"): "a folder of assayer's own",
        checkpoint / "model.safetensors": f"a part of {checkpoint} (hf_dir)",
        tmp_path: "checkpoints may lie in it",
    }
    for path, reason in reasons.items():
        found = told(path, any_plan(directory=str(tmp_path)))
        assert found.format is None, path
        assert reason in found.why
        assert found.watches[0]["next"] == "nothing, as long as this is no checkpoint"


def test_why_a_watch_does_not_look_at_a_checkpoint_is_told(tmp_path: Path) -> None:
    path = save(tmp_path / "a" / "b" / "m_step1.pt")
    shallow, filtered = (any_plan(directory=str(tmp_path), **more) for more in ({"max_depth": 2}, {"regex_filter": "final"}))
    states = [(watch["state"], watch["reason"]) for watch in told(path, shallow, filtered).watches]
    assert states == [("not looked at", "it lies 3 levels deep"), ("not looked at", "--regex_filter final does not match")]


def test_every_line_can_be_printed_whatever_the_name(tmp_path: Path) -> None:
    path = save(tmp_path / "m_\x1b[31m\n1.pt")
    lines = told(path).lines()
    assert all("\x1b" not in text and "\n" not in text for _, text in lines)
    assert ("watches", "none looks here: give a watch command with this directory (--eval_existing for what is there already)") in lines


def test_a_path_that_never_was_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing lies at"):
        told(tmp_path / "none.pt")


def test_what_a_training_keeps_is_told_also_when_nothing_else_is_left(tmp_path: Path) -> None:
    path = save(tmp_path / "run" / "m_step1.pt")
    one = Kept.of(str(path), "owner", "key")
    assert one.keep()
    path.unlink()
    found = told(path)
    assert (found.why, found.held) == ("nothing lies there any more", f"kept by a training, as {one.path}")
