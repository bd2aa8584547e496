"""From listing to decision, with time as an argument."""

import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from assayer.plan import Baseline, Evaluator, Plan
from assayer.record import Place, Record
from assayer.refs import Reference
from assayer.watch.diff import baseline_of
from assayer.watch.look import Lookout, Memory, in_thread, look, see
from assayer.watch.protect import Neighbours

NOW = 2_000_000_000.0
NOTHING = Baseline()


def save(path: Path, value: float = 1.0, legacy: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"w": torch.full((4,), value)}, path, _use_new_zipfile_serialization=not legacy)
    return path


def plan(root: Path, **fields: object) -> Plan:
    evaluator = Evaluator("e", Reference("/none/e.py", "e", "/none"))
    return Plan(**{"directory": str(root), "evaluator": evaluator, **fields})  # type: ignore[arg-type]


def states(p: Plan, memory: Memory, now: float = NOW, idle_since: float = NOW, baseline: Baseline = NOTHING) -> dict[str, str]:
    return {d.seen.checkpoint.name: d.state for d in look(p, baseline, memory, idle_since, now).decisions}


def test_what_was_whole_is_the_baseline_and_what_comes_is_due(tmp_path: Path) -> None:
    save(tmp_path / "m_step1.pt")
    (tmp_path / "m_step2.pt").write_bytes(b"PK\x03\x04 half")
    p = plan(tmp_path)
    there = baseline_of(p, see(p, Memory(), NOW)[0])
    assert len(there) == 1
    memory = Memory()
    assert states(p, memory, baseline=there) == {"m_step2.pt": "writing"}
    save(tmp_path / "m_step2.pt")
    assert states(p, memory, baseline=there) == {"m_step2.pt": "due"}


def test_a_baseline_checkpoint_is_due_when_its_weights_change_and_not_when_it_is_touched(tmp_path: Path) -> None:
    path = save(tmp_path / "last.ckpt")
    p = plan(tmp_path)
    there = baseline_of(p, see(p, Memory(), NOW)[0])
    memory = Memory()
    assert states(p, memory, baseline=there) == {}
    os.utime(path, (1, 1))
    assert states(p, memory, baseline=there) == {"last.ckpt": "baseline"}
    assert states(p, memory, baseline=there) == {}, "what is settled is not spoken of again"
    save(path, 2.0)
    assert states(p, memory, baseline=there) == {"last.ckpt": "due"}


def test_without_a_marker_only_quiet_time_tells(tmp_path: Path) -> None:
    memory = Memory()
    p = plan(tmp_path)
    states(p, memory)
    save(tmp_path / "m_step1.pt", legacy=True)
    assert states(p, memory, NOW) == {"m_step1.pt": "writing"}
    assert states(p, memory, NOW + 29) == {"m_step1.pt": "writing"}
    save(tmp_path / "m_step1.pt", 2.0, legacy=True)
    assert states(p, memory, NOW + 31) == {"m_step1.pt": "writing"}, "it changed: the time starts anew"
    assert states(p, memory, NOW + 61) == {"m_step1.pt": "due"}


def test_at_the_first_look_the_file_systems_clock_counts(tmp_path: Path) -> None:
    save(tmp_path / "m_step1.pt", legacy=True)
    now = time.time()
    assert states(plan(tmp_path), Memory(), now) == {"m_step1.pt": "writing"}
    assert states(plan(tmp_path), Memory(), now + 31) == {"m_step1.pt": "due"}


def test_an_old_modification_time_makes_no_young_copy_whole(tmp_path: Path) -> None:
    path = save(tmp_path / "m_step1.pt", legacy=True)
    os.utime(path, (1, 1))
    assert states(plan(tmp_path), Memory(), time.time()) == {"m_step1.pt": "writing"}


def test_a_plain_export_waits_and_one_with_its_trainers_state_does_not(tmp_path: Path) -> None:
    for name in ("checkpoint-1", "checkpoint-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        save_file({"w": torch.zeros(2)}, tmp_path / name / "model.safetensors")
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text('{"global_step": 2}')
    memory = Memory()
    found = look(plan(tmp_path), NOTHING, memory, NOW, time.time())
    assert {d.seen.checkpoint.name: d.state for d in found.decisions} == {"checkpoint-1": "writing", "checkpoint-2": "due"}
    assert found.decisions[0].reason == "waits until nothing has changed for 30 s (no trainer_state.json)"


def record(path: Path, identity: str, **fields: object) -> Record:
    base = {
        "format": "single_file",
        "step": 1,
        "epoch": None,
        "tokens": None,
        "weights": "raw",
        "status": "finished",
        "ended": "2026-01-01T00:00:00+00:00",
    }
    evaluator: dict[str, object] = {"name": "e", "source": None, "arguments": {}}
    return Record(**{**base, "checkpoint": str(path), "identity": identity, "evaluator": evaluator, **fields})  # type: ignore[arg-type]


def test_a_record_with_its_identity_means_done(tmp_path: Path) -> None:
    path = save(tmp_path / "m_step1.pt")
    p, memory = plan(tmp_path), Memory()
    identity = look(p, NOTHING, memory, NOW, NOW).decisions[0].seen.identity
    assert identity
    Place.of(str(path), "e").write(record(path, "other" * 6))
    assert states(p, memory) == {"m_step1.pt": "due"}
    Place.of(str(path), "e").write(record(path, identity))
    assert states(p, memory) == {"m_step1.pt": "done"}
    assert states(replace(p, reevaluate_before=NOW), Memory()) == {"m_step1.pt": "due"}
    assert states(replace(p, retry_failed_before=NOW), Memory()) == {"m_step1.pt": "done"}
    Place.of(str(path), "e").write(record(path, identity, status="timeout"))
    assert states(replace(p, retry_failed_before=NOW), Memory()) == {"m_step1.pt": "due"}


def test_a_record_that_is_taken_away_makes_its_checkpoint_due_again(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"m_step{step}.pt", step) for step in (1, 2)]
    p, memory = plan(tmp_path), Memory()
    seen = {d.seen.checkpoint.name: d.seen for d in look(p, NOTHING, memory, NOW, NOW).decisions}
    for path in paths:
        Place.of(str(path), "e").write(record(path, seen[path.name].identity or ""))
    assert set(states(p, memory).values()) == {"done"}
    assert states(p, memory) == {}
    Place.of(str(paths[0]), "e").record.unlink()
    assert states(p, memory) == {"m_step1.pt": "due", "m_step2.pt": "done"}


@pytest.mark.parametrize("status", ["superseded", "vanished"])
def test_weights_that_are_there_refute_a_record_that_says_they_were_not(tmp_path: Path, status: str) -> None:
    path = save(tmp_path / "m_step1.pt")
    p, memory = plan(tmp_path), Memory()
    identity = look(p, NOTHING, memory, NOW, NOW).decisions[0].seen.identity
    Place.of(str(path), "e").write(record(path, identity or "", status=status))
    assert states(p, memory) == {"m_step1.pt": "due"}


def test_a_record_that_cannot_be_read_is_said_and_hinders_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save(tmp_path / f"m_step{step}.pt", step)
        Place.of(str(tmp_path / f"m_step{step}.pt"), "e").write(record(tmp_path / f"m_step{step}.pt", "other" * 6))
    from assayer.record import read

    def closed(path: Path) -> Record | None:
        if "step1" in path.name:
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr("assayer.record.read", closed)
    found = look(plan(tmp_path), NOTHING, Memory(), NOW, NOW)
    assert [(d.state, d.reason) for d in found.decisions] == [("writing", "its record cannot be read: Permission denied"), ("due", "")]


def test_a_changed_evaluator_is_said_and_not_acted_on(tmp_path: Path) -> None:
    path = save(tmp_path / "m_step1.pt")
    p, memory = plan(tmp_path), Memory()
    identity = look(p, NOTHING, memory, NOW, NOW).decisions[0].seen.identity
    Place.of(str(path), "e").write(record(path, identity or "", evaluator={"name": "e", "source": "old", "arguments": {"limit": 3}}))
    (decision,) = look(p, NOTHING, memory, NOW, NOW).decisions
    assert decision.state == "done"
    assert decision.reason == "evaluated with other source and arguments (--reevaluate acts on it)"


def test_every_counts_steps_else_epochs_and_spares_the_last_at_the_end(tmp_path: Path) -> None:
    for name in ("m_step2.pt", "m_step3.pt", "m_epoch3.pt", "m_step5.pt", "final.pt"):
        save(tmp_path / name)
    p = plan(tmp_path, every=2)
    skipped = {"m_step3.pt", "m_epoch3.pt", "m_step5.pt"}
    assert {n for n, s in states(p, Memory()).items() if s == "skipped"} == skipped
    ended = replace(p, until_file=str(tmp_path / "final.pt"))
    assert {n for n, s in states(ended, Memory()).items() if s == "skipped"} == skipped - {"m_step5.pt"}


@pytest.mark.parametrize(
    ("fields", "final"),
    [
        ({"once": True}, True),
        ({"until_step": 5}, True),
        ({"until_step": 6}, False),
        ({"until_idle": 60.0}, True),
        ({"until_idle": 61.0}, False),
        ({"until_file": "/no/such/file"}, False),
        ({}, False),
    ],
)
def test_when_training_has_ended(tmp_path: Path, fields: dict[str, object], final: bool) -> None:
    save(tmp_path / "m_step5.pt")
    assert look(plan(tmp_path, **fields), NOTHING, Memory(), NOW - 60, NOW).final is final


def test_a_missing_directory_is_said_and_nothing_is_taken_for_gone(tmp_path: Path) -> None:
    found = look(plan(tmp_path / "none"), NOTHING, Memory(), NOW, NOW)
    assert found.missing
    assert "No such file or directory" in found.problems[0]


def test_a_hung_file_system_delays_no_other_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from assayer.watch import scan

    hung, real = threading.Event(), scan.open_folder

    def hanging(path: str, *rest: object) -> object:
        return hung.wait() if path.endswith("hung") else real(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("assayer.watch.survey.open_folder", hanging)
    save(tmp_path / "fine" / "m_step1.pt")
    # More of them hang than there are threads to begin with.
    hanging_plans = [plan(tmp_path / str(i) / "hung") for i in range(20)]
    for p in hanging_plans:
        (tmp_path / p.directory).mkdir(parents=True)
    fine = plan(tmp_path / "fine")
    lookout = Lookout()
    for p in (*hanging_plans, fine):
        assert lookout.start(p, NOTHING, NOW)
    ((p, found),) = lookout.ready({fine.id}, 20)
    assert p == fine
    assert not isinstance(found, str)
    assert len(found.decisions) == 1
    assert {p.id for p, _ in lookout.hanging()} == {p.id for p in hanging_plans}
    assert not lookout.start(hanging_plans[0], NOTHING, NOW), "its thread is still there: no second one is started"
    assert lookout.start(fine, NOTHING, NOW)
    hung.set()


def test_a_function_that_hangs_is_left_to_itself() -> None:
    stop = threading.Event()
    assert in_thread(stop.wait, 0.05) is None
    assert in_thread(lambda: 7, 5) == 7
    stop.set()


def test_what_is_held_for_another_watch_is_none_of_one_that_looks_elsewhere(tmp_path: Path) -> None:
    for name in ("a/m_step1.pt", "b/m_step2.pt", "m_step3.pt"):
        save(tmp_path / name)
    look(plan(tmp_path, hold_min_free=0.0), NOTHING, Memory(), NOW, NOW, neighbours=Neighbours())
    assert len(list(tmp_path.glob("**/.hold/*/*.pt"))) == 3

    def told(p: Plan) -> set[str]:
        memory = Memory()
        for _ in range(2):
            seen = look(p, NOTHING, memory, NOW, NOW, neighbours=Neighbours(lambda path: [], lambda key: True))
        return {d.seen.checkpoint.name for d in seen.decisions}

    assert told(plan(tmp_path, regex_filter="^a/")) == {"m_step1.pt"}
    assert told(plan(tmp_path, max_depth=1)) == {"m_step3.pt"}
    assert told(plan(tmp_path / "b*", is_pattern=True)) == {"m_step2.pt"}
    (tmp_path / "a" / "m_step1.pt").unlink()
    assert told(plan(tmp_path, regex_filter="^a/")) == {"m_step1.pt"}, "what it asks for is evaluated from its hold"


def test_a_watched_directory_that_is_a_checkpoint_itself_keeps_its_earlier_save(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-5"
    path.mkdir()
    (path / "config.json").write_text("{}")
    p, memory = plan(path, hold_min_free=0.0, quiet_period=0.0), Memory()
    for value in (1.0, 2.0):
        save_file({"w": torch.full((4,), value)}, path / "new")
        os.replace(path / "new", path / "model.safetensors")
        seen = look(p, NOTHING, memory, NOW, NOW + 100 * value, neighbours=Neighbours()).decisions
    assert [d.state for d in seen] == ["due", "due"]
    assert len(look(p, NOTHING, Memory(), NOW, NOW + 300, neighbours=Neighbours()).decisions) == 2, "a new process finds it, too"


def test_at_the_end_the_last_one_is_the_last_that_lies_there(tmp_path: Path) -> None:
    for step in (100, 103, 105):
        save(tmp_path / f"m_step{step}.pt", step)
    p, memory = plan(tmp_path, every=100, until_file=str(tmp_path / "end")), Memory()
    assert states(p, memory) == {"m_step100.pt": "due", "m_step103.pt": "skipped", "m_step105.pt": "skipped"}
    (tmp_path / "m_step105.pt").unlink()
    (tmp_path / "end").touch()
    assert states(p, memory) == {"m_step100.pt": "due", "m_step103.pt": "due"}
