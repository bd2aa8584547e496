"""Merged checkpoints on one host: made once, read side by side, within a budget, and gone when nobody needs them."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from assayer.errors import StateError, UsageError
from assayer.files import write_json
from assayer.worker.scratch import Scratch


def make(scratch: Scratch, key: str, size: int = 10, made: list[str] | None = None) -> Callable[[Path], dict[str, Any]]:
    def merge(path: Path) -> dict[str, Any]:
        assert scratch.reserve(key, size)
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"x" * size)
        if made is not None:
            made.append(key)
        return {"bytes": size}

    return merge


def scratch_in(folder: Path, budget: int | None = None, wanted: Callable[[str], bool] = lambda key: True) -> Scratch:
    return Scratch(str(folder), budget, wanted)


def left(scratch: Scratch) -> set[str]:
    return {path.name for path in scratch.root.iterdir()} - {"lock"}


def test_two_evaluations_read_one_merge_side_by_side(tmp_path: Path) -> None:
    made: list[str] = []
    together = threading.Barrier(2, timeout=90)
    told: list[bool] = []

    def evaluate() -> None:
        scratch = scratch_in(tmp_path)
        with scratch.lend("k", "step_1", make(scratch, "k", made=made)) as (path, facts, now):
            together.wait()
            assert (path / "model.safetensors").read_bytes() == b"x" * facts["bytes"]
            told.append(now)

    threads = [threading.Thread(target=evaluate) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == ["k"]
    assert sorted(told) == [False, True]


def test_who_is_broken_off_while_waiting_takes_nothing_from_who_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = scratch_in(tmp_path)
    with scratch.lend("k", "step_1", make(scratch, "k")) as (path, _, _):
        with monkeypatch.context() as patch:

            def alarm(descriptor: int, how: int) -> None:
                raise TimeoutError

            patch.setattr("assayer.worker.scratch.fcntl.flock", alarm)
            with pytest.raises(TimeoutError), scratch.lend("k", "step_1", make(scratch, "k")):
                pass
        assert (path / "model.safetensors").exists()


def test_a_merge_that_fails_leaves_nothing(tmp_path: Path) -> None:
    scratch = scratch_in(tmp_path)

    def fail(path: Path) -> dict[str, Any]:
        scratch.reserve("k", 10)
        path.mkdir()
        raise StateError("no")

    with pytest.raises(StateError), scratch.lend("k", "step_1", fail):
        pass
    assert left(scratch) == set()


@pytest.mark.parametrize("what", ["no facts", "another boot", "no directory"])
def test_what_a_lost_worker_or_machine_left_is_made_anew(tmp_path: Path, what: str) -> None:
    scratch = scratch_in(tmp_path)
    made: list[str] = []
    with scratch.lend("k", "step_1", make(scratch, "k")) as (path, facts, _):
        pass
    if what == "no facts":
        (path.parent / "merged.json").unlink()
    elif what == "another boot":
        write_json(path.parent / "merged.json", {**facts, "boot": "before"})
    else:
        (path / "model.safetensors").unlink()
        path.rmdir()
    with scratch.lend("k", "step_1", make(scratch, "k", made=made)) as (path, _, now):
        assert now
        assert (path / "model.safetensors").exists()
    assert made == ["k"]


def test_a_merge_goes_when_no_job_needs_it_and_stays_while_one_does(tmp_path: Path) -> None:
    wanted = {"k"}
    scratch = scratch_in(tmp_path, wanted=lambda key: key in wanted)
    with scratch.lend("k", "step_1", make(scratch, "k")):
        pass
    scratch.release("k")
    assert left(scratch) == {"k", "k.lock", "k.bytes"}
    wanted.clear()
    scratch.release("k")
    assert left(scratch) == set()


def test_a_merge_that_is_read_is_not_removed(tmp_path: Path) -> None:
    scratch = scratch_in(tmp_path, wanted=lambda key: False)
    with scratch.lend("k", "step_1", make(scratch, "k")) as (path, _, _):
        scratch.release("k")
        scratch.sweep()
        assert path.exists()
    scratch.sweep()
    assert left(scratch) == set()


def test_the_budget_is_kept_by_removing_what_nobody_reads(tmp_path: Path) -> None:
    scratch = scratch_in(tmp_path, budget=25)
    for key in ("a", "b", "c"):
        with scratch.lend(key, "step_1", make(scratch, key)):
            pass
    assert {name for name in left(scratch) if "." not in name} == {"b", "c"}


def test_while_others_are_read_a_merge_waits_for_room(tmp_path: Path) -> None:
    scratch = scratch_in(tmp_path, budget=15)
    with scratch.lend("a", "step_1", make(scratch, "a")):
        assert not scratch.reserve("b", 10)
        waiting = threading.Thread(target=scratch.wait_for_room, args=("b", 10))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
    waiting.join(20)
    assert not waiting.is_alive()


def test_more_than_the_budget_is_refused_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="takes 100 bytes, --scratch_bytes allows 15"):
        scratch_in(tmp_path, budget=15).reserve("a", 100)


def test_a_scratch_directory_that_is_away_is_waited_for(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="is not there; waiting for it"):
        scratch_in(tmp_path / "nowhere")
