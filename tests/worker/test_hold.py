"""A second name for what waits: what it holds, what it outlives, and who may take it away."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from samples_of_trainers import FOUR, SINGLE, TWO, copied, samples

from assayer import formats, second_names
from assayer.checkpoint import Found, identity, list_path
from assayer.errors import CheckpointError
from assayer.worker import hold
from assayer.worker.hold import Bounds, Held


def found_at(path: Path) -> Found:
    found = formats.identify_path(str(path))
    assert found
    return found


def identity_at(found: Found) -> str:
    return identity(found.listing, formats.of(found.checkpoint).weights(found.listing))


def tensors_in(found: Found) -> object:
    """Names, shapes and dtypes; or what hinders a merge, without the path."""
    try:
        return {t.name: (t.shape, str(t.dtype)) for t in formats.of(found.checkpoint).tensors(found.listing, "regular")}
    except CheckpointError as error:
        return str(error).replace(found.listing.path, "")


def take(path: Path, results_dir: str | None = None) -> Held:
    found = found_at(path)
    held = hold.take(found, identity_at(found), found.listing.signature(), ("regular",), results_dir)
    assert held
    return held


def save(path: Path, value: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"w": torch.full((4,), value)}, path)
    return path


@pytest.mark.parametrize("group", [TWO, FOUR, SINGLE])
def test_of_every_layout_the_hold_is_the_same_checkpoint_without_what_only_resumes(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, group: str
) -> None:
    left_out = 0
    for name, sample in samples(tmp_path_factory, group).items():
        copy = copied(sample, tmp_path / name)
        found = found_at(copy)
        form = formats.of(found.checkpoint)
        held = take(copy)
        listing = held.listing()
        assert os.path.basename(held.path) == copy.name
        assert form.missing(listing) is None, name
        again = found_at(Path(held.path))
        assert again.checkpoint.format == found.checkpoint.format, name
        assert identity_at(again) == held.identity == identity_at(found), name
        # Tokens may be told by a state that only resumes; they are read before.
        assert again.checkpoint.position.step == found.checkpoint.position.step, name
        assert tensors_in(Found(found.checkpoint, listing)) == tensors_in(found), name
        kept = {entry.name for entry in listing.entries}
        gone = {entry.name for entry in found.listing.entries} - kept
        left_out += len(gone)
        assert all(
            any(word in one for word in ("optim", "sched", "rng", "scaler", "state", "sampler", "custom", "critic", "context"))
            for one in gone
        ), gone
        assert not any(one.startswith(("optimizer.", "optimizer_")) for one in kept), name
    assert left_out or group == SINGLE


def test_what_a_model_is_loaded_with_is_held_too(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "run" / "checkpoint-5"
    (path / "processor").mkdir(parents=True)
    (path / "global_step5").mkdir()
    save_file({"w": torch.zeros(2)}, path / "model.safetensors")
    for name in ("config.json", "trainer_state.json", "processor/preprocessor_config.json", "optimizer.pt", "global_step5/mp_rank.pt"):
        (path / name).write_text("{}")
    (tmp_path / "run" / "tokenizer.json").write_text("{}")
    os.symlink("../tokenizer.json", path / "tokenizer.json")
    os.symlink("/no/such/file", path / "dangling")
    held = Path(take(path).path)
    found = sorted(str(one.relative_to(held)) for one in held.rglob("*") if one.is_file())
    assert found == ["config.json", "model.safetensors", "processor/preprocessor_config.json", "tokenizer.json", "trainer_state.json"]


def test_a_hold_outlives_the_trainers_deletion_and_costs_no_bytes_before(tmp_path: Path) -> None:
    path = save(tmp_path / "run" / "m_step1.pt")
    held = take(path)
    assert os.stat(held.path).st_ino == path.stat().st_ino
    path.unlink()
    assert torch.load(held.path, weights_only=True)["w"][0] == 1.0
    assert hold.find(str(path), held.identity) == held
    hold.release(held)
    assert hold.find(str(path), held.identity) is None
    assert not (tmp_path / "run" / "evals" / ".hold").exists()


def test_releasing_deletes_second_names_alone(tmp_path: Path) -> None:
    path = save(tmp_path / "run" / "m_step1.pt")
    hold.release(take(path))
    assert torch.load(path, weights_only=True)["w"][0] == 1.0


def test_what_changes_while_it_is_linked_is_not_held(tmp_path: Path) -> None:
    path = save(tmp_path / "run" / "m_step1.pt")
    found = found_at(path)
    save(path, 2.0)
    assert hold.take(found, "a" * 32, found.listing.signature(), ()) is None
    path.unlink()
    assert hold.take(found, "a" * 32, found.listing.signature(), ()) is None
    assert not (tmp_path / "run" / "evals" / ".hold").exists(), "nothing half made is left"


def test_an_evaluation_and_a_watch_never_both_have_a_hold(tmp_path: Path) -> None:
    held = take(save(tmp_path / "run" / "m_step1.pt"))
    assert hold.claim(held)
    assert hold.claim(held), "another evaluator reads it, too"
    assert not hold.drop(held)
    assert hold.held_in(held.folder.parent) == [replace(held, is_claimed=True)]
    hold.release(held)
    held = take(tmp_path / "run" / "m_step1.pt")
    assert hold.drop(held)
    assert not hold.claim(held)


def test_what_a_killed_watch_left_half_made_or_half_removed_goes_with_the_next_look(tmp_path: Path) -> None:
    path = save(tmp_path / "run" / "m_step1.pt")
    program = """
import os, signal
from test_hold import hold, Path, take
os.{} = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
{}
"""
    root = tmp_path / "run" / "evals" / ".hold"
    for call, act in (("link", f"take(Path({str(path)!r}))"), ("unlink", f"hold.release(take(Path({str(path)!r})))")):
        folder = str(Path(__file__).parent)
        done = subprocess.run([sys.executable, "-c", program.format(call, act)], env={**os.environ, "PYTHONPATH": f"{folder}:{folder}/.."})
        assert done.returncode == -signal.SIGKILL
        (left,) = root.iterdir()
        assert left.name.startswith("." if call == "link" else ".gone-")
        if call == "link":
            os.utime(left, (time.time() - 3,) * 2)
        assert hold.held_in(root) == []
        assert not root.exists(), call


def test_what_is_half_made_by_somebody_who_lives_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "run" / "m_step1.pt")
    link, root = os.link, tmp_path / "run" / "evals" / ".hold"

    def slow(source: str, target: Path, follow_symlinks: bool) -> None:
        (part,) = root.iterdir()
        os.utime(part, (time.time() - 50,) * 2)
        assert hold.held_in(root) == []
        link(source, target, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(os, "link", slow)
    held = take(path)
    assert hold.held_in(root) == [held]


def test_the_newest_are_held_as_far_as_count_and_bytes_allow() -> None:
    waiting = [(f"step{step}", 10) for step in (5, 4, 3, 2, 1)]
    assert hold.chosen(waiting, [], Bounds(count=2)) == {"step5", "step4"}
    assert hold.chosen(waiting, [("step1", 10)], Bounds(count=2)) == {"step5", "step1"}, "what is read keeps its hold"
    assert hold.chosen(waiting, [], Bounds(count=8, nbytes=35)) == {"step5", "step4", "step3"}
    assert hold.chosen(waiting, [], Bounds(count=0)) == set()


def test_a_hold_speaks_for_its_own_directory_alone(tmp_path: Path) -> None:
    held = take(save(tmp_path / "run" / "m_step1.pt"))
    facts = (held.folder / "hold.json").read_text()
    (held.folder / "hold.json").write_text(facts.replace("run/m_step1.pt", "elsewhere/m_step1.pt"))
    assert hold.held_in(held.folder.parent) == []


def test_a_hold_of_another_results_directory_lies_there(tmp_path: Path) -> None:
    path = save(tmp_path / "run" / "m_step1.pt")
    (tmp_path / "results").mkdir()
    held = take(path, str(tmp_path / "results"))
    assert held.folder.is_relative_to(tmp_path / "results")
    assert os.listdir(tmp_path / "run") == ["m_step1.pt"]
    assert hold.find(str(path), held.identity, str(tmp_path / "results")) == held


def test_a_file_system_that_refuses_hard_links_is_told_from_one_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "run" / "m_step1.pt")
    found = found_at(path)
    for number, refuses in ((1, True), (28, False)):

        def link(*_: object, number: int = number, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "link", link)
        with pytest.raises(OSError) as error:
            hold.take(found, "a" * 32, found.listing.signature(), ())
        assert second_names.is_refusal(error.value) is refuses
        assert not (tmp_path / "run" / "evals" / ".hold").exists()


def test_a_held_name_shows_what_is_written_in_place_and_its_identity_tells(tmp_path: Path) -> None:
    path = save(tmp_path / "run" / "last.ckpt")
    held = take(path)
    save(path, 2.0)
    listing = list_path(held.path)
    assert identity(listing, [listing.name]) != held.identity


def test_a_hold_that_was_made_by_another_path_of_the_folder_is_left_to_its_maker(tmp_path: Path) -> None:
    """As by a watch of a symbolic link, or on a host that mounts the directory elsewhere."""
    path = save(tmp_path / "real" / "m_step1.pt")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    held = take(tmp_path / "link" / path.name)
    assert hold.claim(held)
    assert hold.held_in(tmp_path / "real" / "evals" / ".hold") == []
    assert os.path.exists(held.path), "its evaluation reads it"
    assert [one.key for one in hold.held_in(tmp_path / "link" / "evals" / ".hold")] == [held.key]


def test_a_hold_that_cannot_be_read_hinders_no_look(tmp_path: Path) -> None:
    held = take(save(tmp_path / "run" / "m_step1.pt"))
    (held.folder / "hold.json").unlink()
    (held.folder / "hold.json").symlink_to("hold.json")
    assert hold.held_in(held.folder.parent) == []
    assert os.path.exists(held.path)
