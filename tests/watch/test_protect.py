"""What waits is held: the newest, within bounds; what nobody waits for is let go."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from samples import plan as any_plan

from assayer import second_names
from assayer.plan import Baseline, Evaluator, Plan
from assayer.queues import Connection
from assayer.queues.enqueue import Task, enqueue, open_queue
from assayer.record import Place, Record
from assayer.refs import Reference
from assayer.watch.known import Known
from assayer.watch.look import Look, Memory, look
from assayer.watch.protect import Neighbours
from assayer.worker import hold

NOBODY = Neighbours()
NOTHING = Baseline()


def plan(root: Path, **fields: object) -> Plan:
    return any_plan(directory=str(root), **fields)


def save(path: Path, value: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"w": torch.full((4,), value)}, path)
    return path


def tick(p: Plan, memory: Memory, neighbours: Neighbours = NOBODY) -> Look:
    now = time.time()
    return look(p, NOTHING, memory, now, now, neighbours=neighbours)


def held(root: Path) -> set[str]:
    return {one.checkpoint.name for one in hold.held_in(root / "evals" / ".hold")}


def evaluated(p: Plan, path: Path, identity: str, status: str = "finished") -> None:
    evaluator: dict[str, object] = {"name": p.evaluator.name, "source": None, "arguments": {}}
    fields = {"format": "single_file", "step": 1, "epoch": None, "tokens": None, "weights": "regular", "ended": "2030-01-01T00:00:00+00:00"}
    record = Record(checkpoint=str(path), identity=identity, evaluator=evaluator, status=status, **fields)  # type: ignore[arg-type]
    Place.of(str(path), p.evaluator.name, p.results_dir).write(record)


def identities(found: Look) -> dict[str, str]:
    return {d.seen.checkpoint.name: d.seen.identity or "" for d in found.decisions}


def test_the_newest_are_held_and_of_the_others_it_is_said(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path / f"m_step{step}.pt", step)
    p, memory = plan(tmp_path, hold=2), Memory()
    found = tick(p, memory)
    assert held(tmp_path) == {"m_step2.pt", "m_step3.pt"}
    assert found.notes == {str(tmp_path / "m_step1.pt"): "not protected from deletion: newer ones are held (--hold 2)"}
    save(tmp_path / "m_step4.pt", 4)
    tick(p, memory)
    assert held(tmp_path) == {"m_step3.pt", "m_step4.pt"}


def test_what_an_evaluation_reads_keeps_its_hold(tmp_path: Path) -> None:
    save(tmp_path / "m_step1.pt")
    p, memory = plan(tmp_path, hold=1), Memory()
    tick(p, memory)
    (first,) = hold.held_in(tmp_path / "evals" / ".hold")
    assert hold.claim(first)
    save(tmp_path / "m_step2.pt", 2)
    tick(p, memory)
    assert held(tmp_path) == {"m_step1.pt"}


def test_bytes_are_a_bound_too(tmp_path: Path) -> None:
    size = save(tmp_path / "m_step1.pt").stat().st_size
    save(tmp_path / "m_step2.pt", 2)
    found = tick(plan(tmp_path, hold_bytes=size + 1), Memory())
    assert held(tmp_path) == {"m_step2.pt"}
    assert "--hold_bytes" in found.notes[str(tmp_path / "m_step1.pt")]


def test_without_free_space_nothing_is_held_and_the_oldest_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        save(tmp_path / f"m_step{step}.pt", step)
    p, memory = plan(tmp_path), Memory()
    tick(p, memory)
    assert len(held(tmp_path)) == 3
    # Two holds let go make room enough.
    monkeypatch.setattr(second_names, "free_part", lambda path: 0.03 * (5 - len(held(tmp_path))))
    found = tick(p, memory)
    assert held(tmp_path) == {"m_step3.pt"}
    assert "less than 10% of its file system is free" in found.notes[str(tmp_path / "m_step1.pt")]


def test_a_file_system_that_refuses_hard_links_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "m_step1.pt")
    tried = []

    def link(*_: object, **__: object) -> None:
        tried.append(1)
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    p, memory = plan(tmp_path), Memory()
    for _ in range(3):
        found = tick(p, memory)
    assert len(tried) == 1
    assert found.notice == f"hard links cannot be made in {tmp_path} (Operation not permitted): what waits is not held"
    assert [d.state for d in found.decisions] == ["due"]


def test_a_hold_is_let_go_once_there_is_a_record(tmp_path: Path) -> None:
    path = save(tmp_path / "m_step1.pt")
    p, memory = plan(tmp_path), Memory()
    identity = identities(tick(p, memory))["m_step1.pt"]
    evaluated(p, path, identity)
    tick(p, memory)
    assert held(tmp_path) == set()
    assert not (tmp_path / "evals" / ".hold").exists()


def test_what_retention_took_is_still_due_while_it_is_held_also_for_a_process_that_never_saw_it(tmp_path: Path) -> None:
    path = save(tmp_path / "m_step1.pt")
    p = plan(tmp_path)
    tick(p, Memory())
    path.unlink()
    found = tick(p, Memory())
    assert [(d.state, d.seen.checkpoint.path) for d in found.decisions] == [("due", str(path))]
    evaluated(p, path, identities(found)["m_step1.pt"])
    memory = Memory()
    tick(p, memory)
    assert held(tmp_path) == set()


def test_an_older_save_that_is_held_and_the_newer_one_at_its_path_are_both_due(tmp_path: Path) -> None:
    path = save(tmp_path / "last.ckpt")
    p, memory = plan(tmp_path), Memory()
    tick(p, memory)
    path.unlink()
    save(path, 2.0)
    found = tick(p, memory)
    assert [d.state for d in found.decisions] == ["due", "due"]
    assert len({d.seen.identity for d in found.decisions}) == 2


def test_what_no_watch_wants_and_no_job_needs_is_swept(tmp_path: Path) -> None:
    save(tmp_path / "m_step1.pt")
    tick(plan(tmp_path), Memory())
    other = plan(tmp_path, every=2)
    in_flight = Neighbours(in_flight=lambda key: True)
    tick(other, Memory(), in_flight)
    assert held(tmp_path) == {"m_step1.pt"}, "a job that was queued earlier needs it"
    tick(other, Memory())
    assert held(tmp_path) == set()


def test_another_watch_of_the_directory_keeps_what_it_has_not_evaluated(tmp_path: Path) -> None:
    path = save(tmp_path / "m_step1.pt")
    p = plan(tmp_path)
    other = replace(p, evaluator=Evaluator("other", p.evaluator.reference))
    memory = Memory()
    both = Neighbours(plans=lambda path: [(p, NOTHING), (other, NOTHING)])
    identity = identities(tick(p, memory, both))["m_step1.pt"]
    evaluated(p, path, identity)
    tick(p, memory, both)
    assert held(tmp_path) == {"m_step1.pt"}
    evaluated(other, path, identity)
    tick(other, Memory(), both)
    assert held(tmp_path) == set()


def test_a_hold_is_wanted_while_a_job_waits_for_it_that_no_known_watch_has_queued(connection: Connection) -> None:
    """Of a watch on another watch queue, say, or one that has ended."""
    task = Task("/runs/m_step1.pt", "single_file", 1, None, None, "a" * 32, Evaluator("e", Reference("/e.py", "e", "/")), None, 9, 0)
    neighbours = Known().neighbours(connection)
    assert not neighbours.in_flight(task.hold_id)
    enqueue(open_queue(connection, "evaluation"), task, {})
    assert neighbours.in_flight(task.hold_id)
    assert neighbours.plans(task.checkpoint) == []


def test_a_claimed_hold_stays_while_its_reader_lives_and_goes_when_that_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "m_step1.pt")
    p, memory = plan(tmp_path), Memory()
    identity = identities(tick(p, memory))["m_step1.pt"]
    (one,) = hold.held_in(tmp_path / "evals" / ".hold")
    assert hold.claim(one)
    evaluated(p, path, identity)
    tick(p, memory)
    assert held(tmp_path) == {"m_step1.pt"}, "this process lives"
    monkeypatch.setattr(hold, "is_gone", lambda pid: True)
    tick(p, memory)
    assert held(tmp_path) == set()


def test_a_folder_that_refuses_hard_links_leaves_the_others_their_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.link

    def link(source: Path, target: Path, **more: bool) -> None:
        if "/x/" in str(source):
            raise OSError(1, "Operation not permitted")
        real(source, target, **more)

    monkeypatch.setattr(os, "link", link)
    save(tmp_path / "x" / "m_step1.pt")
    save(tmp_path / "y" / "m_step1.pt")
    tick(plan(tmp_path), Memory())
    assert held(tmp_path / "x") == set()
    assert held(tmp_path / "y") == {"m_step1.pt"}


def test_without_holds_of_its_own_a_watch_takes_none_for_another(tmp_path: Path) -> None:
    save(tmp_path / "m_step1.pt")
    p = plan(tmp_path, hold=0)
    other = replace(p, hold=8, evaluator=Evaluator("other", p.evaluator.reference), regex_filter="none")
    found = tick(p, Memory(), Neighbours(plans=lambda path: [(p, NOTHING), (other, NOTHING)]))
    assert held(tmp_path) == set()
    assert found.notes == {str(tmp_path / "m_step1.pt"): "not protected from deletion (--hold 0)"}
