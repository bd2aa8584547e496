"""Plans on disk: what a watch was asked to do outlives everything."""

import json
from pathlib import Path

import pytest

from assayer.errors import StateError
from assayer.plan import Evaluator, Mark, Plan, PlanStore, host_name
from assayer.refs import Reference

EVALUATOR = Evaluator("e", Reference("/x/e.py", "e", "/x"), {"limit": 3})


def plan(**fields: object) -> Plan:
    return Plan(**{"directory": "/run", "evaluator": EVALUATOR, "redis": "r", "host": host_name(), "given": 1.0, **fields})  # type: ignore[arg-type]


def test_a_plan_comes_back_as_it_was_written(tmp_path: Path) -> None:
    store = PlanStore(tmp_path / "state")
    written = plan(baseline={"/run/a\udcff.pt": Mark("s", "i")}, until_file="/done", every=3)
    store.write(written)
    assert store.read(written.id) == written
    assert Plan.from_json(json.loads(json.dumps(written.to_json()))) == written


def test_the_same_directory_and_evaluator_are_one_plan() -> None:
    assert plan().id == plan(polling_interval=60.0).id
    assert plan().id != plan(directory="/run2").id
    assert plan().id != plan(evaluator=Evaluator("f", EVALUATOR.reference)).id


def test_stopping_keeps_the_baseline(tmp_path: Path) -> None:
    store = PlanStore(tmp_path / "state")
    store.write(plan(baseline={"/run/a.pt": Mark("s", "i")}))
    assert list(store.active("r"))
    store.stop(plan().id, given=2.0)
    assert list(store.active("r")), "a later command's plan is not stopped in its place"
    store.stop(plan().id, given=1.0)
    assert not list(store.active("r"))
    assert store.read(plan().id).baseline  # type: ignore[union-attr]


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
