"""Never lost, never twice, never in the trainer's way: under every fault once, and under many; and the judge of that sees what is wrong."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from evidence import Sight, Version, versions_of
from faults import Outcome, Scenario, trial
from injuries import INJURIES
from verdict import (
    Moment,
    debts,
    held_before_the_end,
    ledger_faults,
    left_on_disk,
    record_faults,
    status_faults,
    still_owed,
    trainer_faults,
)

# First what needs an evaluation that runs, or a scheduler: a watch worker whose forerunner was killed has none for a while.
FIRST = ("kill work horse", "kill evaluator", "kill scheduler")
KILLS = (*FIRST, *(name for name in INJURIES if name.startswith("kill") and name not in FIRST))
OTHERS = tuple(name for name in INJURIES if not name.startswith("kill"))

# Everything is short here, also the pause before a job is queued again that could not write its record.
SHORT = Scenario(
    0,
    seconds=40,
    pause=0.3,
    longest_stop=1.0,
    slowest_evaluation=1.0,
    slowest_save=0.3,
    pace=0.5,
    runs=2,
    away=(0.0,),
    rest=1.5,
    retry_pause=2.0,
)


def survived(outcome: Outcome) -> None:
    assert not outcome.problems, outcome.story()
    assert outcome.counts["records that say finished"] > 0


@pytest.mark.timeout(360)
def test_nothing_is_lost_or_done_twice_when_every_process_is_killed_in_turn() -> None:
    outcome = trial(replace(SHORT, seed=11, faults=KILLS))
    survived(outcome)
    assert {moment.kind for moment in outcome.faults} >= set(KILLS), outcome.skipped


@pytest.mark.timeout(360)
def test_nothing_is_lost_or_done_twice_when_processes_hang_and_redis_the_disk_and_directories_fail() -> None:
    outcome = trial(replace(SHORT, seed=12, faults=OTHERS))
    survived(outcome)
    skipped = {"fill disk"} if any(text.startswith("fill disk (") for text in outcome.skipped) else set()
    assert {moment.kind for moment in outcome.faults} >= set(OTHERS) - skipped, outcome.skipped


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [21, 22])
def test_nothing_is_lost_or_done_twice_in_minutes_of_faults(seed: int) -> None:
    survived(trial(Scenario(seed, seconds=180)))


PATH = "/runs/run0/model_step1.pt"
RESULTS: dict[str, str | None] = {"/runs/run0": None}
_numbers = itertools.count(1)


def sight(identity: str = "a" * 32, status: str = "finished", ended: float = 20.0, value: float | None = 1.0, name: str = "") -> Sight:
    file = f"/runs/run0/evals/look/{name or 'model_step1.pt'}.json"
    return Sight(ended, file, next(_numbers), PATH, identity, status, f"1970-01-01T00:00:{ended:02g}+00:00", value)


def version(**more: float | None) -> Version:
    return replace(Version(PATH, 1.0, 9.0, "a" * 32, whole=10.0), **more)  # type: ignore[arg-type]


def test_the_journal_tells_when_each_version_lay_there_and_what_became_of_it() -> None:
    events: list[dict[str, object]] = [
        {"event": "begin", "value": 1.0},
        {"event": "whole", "identity": "a"},
        {"event": "begin", "value": 2.0},
        {"event": "whole", "identity": "b"},
        {"event": "delete"},
    ]
    first, second = versions_of([{"at": float(i), "path": PATH, **event} for i, event in enumerate(events)])
    assert (first.identity, first.whole, first.end, first.rewritten, first.deleted) == ("a", 1.0, 2.0, 2.0, None)
    assert (second.identity, second.whole, second.end, second.rewritten, second.deleted) == ("b", 3.0, 4.0, None, 4.0)


def test_one_finished_record_of_the_right_weights_is_all_that_is_asked_for() -> None:
    assert record_faults([version()], [sight()], RESULTS, set()) == []
    assert still_owed([version()], [sight()]) == []
    assert debts([version(end=30.0)], [sight()], {"/runs/run0": {11.0, 12.0}}, [], [], set()) == ([], [])


def test_a_checkpoint_that_lies_there_without_a_record_is_a_fault() -> None:
    assert still_owed([version()], []) == [version()]
    assert still_owed([version()], [sight(status="vanished")]) == [version()]


def test_a_deleted_checkpoint_that_was_looked_at_twice_and_has_no_record_is_a_fault() -> None:
    gone = version(end=15.0, deleted=15.0)
    looks = {"/runs/run0": {11.0, 12.0}}
    assert len(debts([gone], [], looks, [], [], set())[0]) == 1
    assert debts([gone], [sight(status="vanished")], looks, [], [], set())[0] == []
    assert debts([gone], [], {"/runs/run0": {11.0}}, [], [], set())[0] == [], "it was there for one look only"
    assert debts([gone], [], looks, [("/runs/run0", 10.8, 12.2)], [], set())[0] == [], "the directory was away"


def test_that_redis_lost_its_data_excuses_no_version_that_was_held() -> None:
    gone = version(end=15.0, deleted=15.0)
    looks = {"/runs/run0": {11.0, 12.0}}
    flushed = [Moment(13.0, "flush redis", "")]
    held = held_before_the_end([gone], [], looks, [], RESULTS)
    assert held == {(PATH, 1.0)}
    assert [len(texts) for texts in debts([gone], [], looks, [], flushed, held)] == [1, 0]
    assert [len(texts) for texts in debts([gone], [], looks, [], flushed, set())] == [0, 1]


def test_two_looks_hold_a_version_unless_it_cannot_be_linked_or_eight_others_wait() -> None:
    gone = version(end=15.0, deleted=15.0)
    looks = {"/runs/run0": {11.0, 12.0}}
    assert held_before_the_end([gone], [], {"/runs/run0": {11.0}}, [], RESULTS) == set()
    assert held_before_the_end([gone], [], looks, [], {"/runs/run0": "/other"}) == set()
    others = [replace(version(), path=f"/runs/run0/other{i}.pt", identity=f"{i}", value=float(i)) for i in range(2, 10)]
    assert held_before_the_end([gone, *others], [], looks, [], RESULTS) == set()
    done = replace(sight("2"), checkpoint=others[0].path, at=9.5)
    assert held_before_the_end([gone, *others], [done], looks, [], RESULTS) == {(PATH, 1.0)}
    assert held_before_the_end([gone, *others[1:]], [], looks, [], RESULTS) == {(PATH, 1.0)}


@pytest.mark.parametrize(
    ("versions", "sights", "word"),
    [
        ([version()], [sight(), sight(ended=30.0)], "was recorded 2 times"),
        ([version()], [sight(status="failed", value=None)], "instead of a finished one"),
        ([version()], [sight(status="vanished", value=None)], "was not deleted by then"),
        ([version(end=25.0, deleted=25.0)], [sight(status="vanished", value=None)], "was not deleted by then"),
        ([version(end=25.0, rewritten=25.0)], [sight(status="superseded", value=None)], "was still there"),
        ([version()], [sight(value=2.0)], "of other weights"),
        ([version()], [sight(identity="b" * 32)], "weights that never lay whole"),
        ([version()], [sight(name="model_step2.pt")], "not at"),
        ([version()], [sight(name="model_step1.pt@bbbbbbbb")], "not at"),
    ],
)
def test_a_record_that_is_untrue_changed_or_misplaced_is_a_fault(versions: list[Version], sights: list[Sight], word: str) -> None:
    assert any(word in problem for problem in record_faults(versions, sights, RESULTS, set()))


def test_what_was_held_may_be_superseded_where_it_was_written_anew_but_has_not_vanished() -> None:
    again = Version(PATH, 2.0, 15.0, "b" * 32, whole=16.0)
    held = {(PATH, 1.0)}
    gone = version(end=15.0, deleted=15.0)
    for status in ("vanished", "superseded"):
        told = record_faults([gone, again], [sight(status=status, value=None, name="model_step1.pt@aaaaaaaa")], RESULTS, held)
        assert len(told) == 1 and "was held when it was deleted" in told[0]
    superseded = [sight(status="superseded", value=None, name="model_step1.pt@aaaaaaaa")]
    assert record_faults([version(end=15.0, rewritten=15.0), again], superseded, RESULTS, held) == []
    assert record_faults([gone, again], superseded, RESULTS, set()) == []
    assert "nothing else was saved" in record_faults([gone], superseded, RESULTS, set())[0]


def test_two_files_that_tell_of_one_version_are_a_fault_and_two_names_of_one_file_are_not(tmp_path: Path) -> None:
    run = tmp_path / "run0"
    folder = run / "evals" / "look"
    folder.mkdir(parents=True)
    (folder / "m.pt.json").write_text("{}")
    (folder / "m.pt@aaaaaaaa.json").hardlink_to(folder / "m.pt.json")
    made = replace(version(), path=str(run / "m.pt"))
    base = replace(sight(), checkpoint=made.path)
    sights = [replace(base, file=str(path)) for path in sorted(folder.iterdir())]
    assert record_faults([made], sights, {str(run): None}, set()) == []
    (folder / "m.pt@aaaaaaaa.json").unlink()
    (folder / "m.pt@aaaaaaaa.json").write_text("{}")
    assert any("has records in" in problem for problem in record_faults([made], sights, {str(run): None}, set()))


def run(name: str, start: float, end: float | None) -> list[dict[str, object]]:
    line: dict[str, object] = {"run": name, "path": PATH, "value": 1.0}
    return [line | {"event": "start", "at": start}] + ([] if end is None else [line | {"event": "end", "at": end}])


def test_a_second_run_is_right_after_a_fault_only_and_never_beside_the_first() -> None:
    assert ledger_faults(run("a", 100, 101), []) == ([], 1, 0)
    assert ledger_faults(run("a", 100, None) + run("b", 105, 106), [Moment(101, "kill evaluator", "")]) == ([], 2, 1)
    assert "though no fault" in ledger_faults(run("a", 100, 101) + run("b", 105, 106), [])[0][0]
    assert "side by side" in ledger_faults(run("a", 100, 107) + run("b", 105, 106), [Moment(101, "flush redis", "")])[0][0]


def test_half_files_holds_and_merged_checkpoints_may_not_stay(tmp_path: Path) -> None:
    results, temporary = tmp_path / "evals", tmp_path / "tmp"
    (results / "look").mkdir(parents=True)
    (results / "look" / "m.pt.json").write_text("{}")
    (temporary / "assayer-scratch-0").mkdir(parents=True)
    (temporary / "assayer-scratch-0" / "lock").touch()
    assert left_on_disk([results], temporary) == []
    (results / ".hold").mkdir()
    assert left_on_disk([results], temporary) == []
    (results / ".hold" / ".part-of-one").mkdir()
    (results / "look" / "n.pt.json").write_text('{"half')
    (results / "look" / "n.pt.json.tmp-0123").touch()
    (temporary / "assayer-scratch-0" / "merged").mkdir()
    left = left_on_disk([results], temporary)
    assert [any(word in text for text in left) for word in (".hold/.part-of-one", "n.pt.json is no JSON", ".tmp-0123", "merged")] == [
        True
    ] * 4
    assert len(left) == 4


def test_a_status_that_does_not_say_finished_is_a_fault() -> None:
    def told(state: str) -> dict[str, object]:
        return {"watches": [{"checkpoints": [{"path": PATH, "state": state}]}]}

    assert status_faults(told("finished"), [version()]) == []
    assert len(status_faults(told("queued"), [version()])) == 1
    assert status_faults(told("queued"), [version(end=30.0, deleted=30.0)]) == []


def test_a_disturbed_training_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-1"
    path.mkdir()
    for name in ("config.json", "model.safetensors", "trainer_state.json"):
        (path / name).touch()
    saved = {"path": str(path), "kind": "hf", "at": 1.0}
    journal = [saved | {"event": "begin", "value": 1.0}, saved | {"event": "whole", "identity": "a"}]
    assert trainer_faults(journal, versions_of(journal), 0) == []
    assert len(trainer_faults(journal, versions_of(journal), 1)) == 1
    assert len(trainer_faults(journal[:1], versions_of(journal[:1]), 0)) == 1, "a save that did not end"
    deleted = [*journal, saved | {"event": "delete"}]
    assert len(trainer_faults(deleted, versions_of(deleted), 0)) == 1, "a delete that did not end"
    (path / "stranger").touch()
    assert len(trainer_faults(journal, versions_of(journal), 0)) == 1
