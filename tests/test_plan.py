"""Plans on disk: what a watch was asked to do outlives everything."""

import json
from pathlib import Path

import pytest

from assayer.errors import StateError
from assayer.plan import Baseline, Evaluator, Plan, PlanStore, host_name
from assayer.refs import Reference

EVALUATOR = Evaluator("e", Reference("/x/e.py", "e", "/x"), {"limit": 3})


def plan(**fields: object) -> Plan:
    return Plan(**{"directory": "/run", "evaluator": EVALUATOR, "redis": "r", "host": host_name(), "given": 1.0, **fields})  # type: ignore[arg-type]


def test_a_plan_comes_back_as_it_was_written(tmp_path: Path) -> None:
    store = PlanStore(tmp_path / "state")
    baseline = Baseline.of([("a\udcff.pt", "s", "i")])
    written = plan(until_file="/done", every=3).with_baseline(baseline)
    store.write(written, baseline)
    assert store.read(written.id) == written
    assert store.baseline(written) == baseline
    assert Plan.from_json(json.loads(json.dumps(written.to_json()))) == written


def test_the_same_directory_and_evaluator_are_one_plan() -> None:
    assert plan().id == plan(polling_interval=60.0).id
    assert plan().id != plan(directory="/run2").id
    assert plan().id != plan(evaluator=Evaluator("f", EVALUATOR.reference)).id


def test_stopping_keeps_the_baseline(tmp_path: Path) -> None:
    store = PlanStore(tmp_path / "state")
    baseline = Baseline.of([("a.pt", "s", "i")])
    store.write(plan().with_baseline(baseline), baseline)
    assert list(store.active("r"))
    store.stop(plan().id, given=2.0)
    assert list(store.active("r")), "a later command's plan is not stopped in its place"
    store.stop(plan().id, given=1.0)
    assert not list(store.active("r"))
    stopped = store.read(plan().id)
    assert stopped
    assert store.baseline(stopped) == baseline


def test_a_baseline_knows_files_by_their_signature_and_weights_by_their_identity() -> None:
    baseline = Baseline.of([("a.pt", "s", "i"), ("b.pt", "t", "j")])
    assert len(baseline) == 2
    assert baseline.has_signature("a.pt", "s")
    assert not baseline.has_signature("a.pt", "t")
    assert not baseline.has_signature("a.pt", "i"), "the two kinds of marks are not taken for each other"
    assert baseline.has_identity("b.pt", "j")
    assert Baseline(baseline.to_json()).name == baseline.name != Baseline().name


def test_a_baseline_that_is_gone_is_said_and_never_taken_for_none(tmp_path: Path) -> None:
    store = PlanStore(tmp_path / "state")
    baseline = Baseline.of([("a.pt", "s", "i")])
    written = plan().with_baseline(baseline)
    store.write(written, baseline)
    for path in store.folder.glob("*.marks"):
        path.unlink()
    with pytest.raises(StateError, match="--forget"):
        store.baseline(written)
    assert any("gone or damaged" in sentence for sentence in store.unreadable())


def test_of_two_baselines_only_the_last_one_is_kept(tmp_path: Path) -> None:
    store = PlanStore(tmp_path / "state")
    for name in ("a.pt", "b.pt"):
        baseline = Baseline.of([(name, "s", "i")])
        store.write(plan().with_baseline(baseline), baseline)
    assert len(list(store.folder.glob("*.marks"))) == 1
    assert store.baseline(store.read(plan().id) or plan()) == baseline


def test_another_redis_or_host_has_other_active_plans(tmp_path: Path) -> None:
    store = PlanStore(tmp_path / "state")
    store.write(plan(host="elsewhere"))
    assert not list(store.active("r"))
    assert not list(store.active("other"))


def test_a_damaged_plan_is_one_sentence(tmp_path: Path) -> None:
    store = PlanStore(tmp_path / "state")
    store.path("x").write_text('{"directory": 3}')
    with pytest.raises(StateError, match="remove it"):
        store.read("x")
