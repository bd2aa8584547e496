"""What a record gives to a tracker, and under which names."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from curves import BASE

from assayer.points import is_of_one, point_of, run_name, why_none
from assayer.record import Record

PATH = Path("/runs/exp1/evals/accuracy/m.json")


def a_record(metrics: dict[str, Any], step: int | None = 5, **more: Any) -> Record:
    return replace(BASE, step=step, metrics=metrics, identity="a" * 32, ended="2026-11-20T04:00:00.25+00:00", **more)


def names(metrics: dict[str, Any], owners: dict[str, str] | None = None, how: str = "metric", **more: Any) -> list[str]:
    return sorted(point_of(a_record(metrics, **more), PATH, owners or {}, how)[0].values)


def test_a_metric_is_called_eval_and_its_name_once() -> None:
    assert names({"acc": 1.0, "eval/loss": 2.0, "arc/acc,none": 3.0}) == ["eval/acc", "eval/arc/acc,none", "eval/loss"]


def test_ema_weights_have_curves_of_their_own() -> None:
    assert names({"acc": 1.0, "eval/loss": 2.0}, weights="ema") == ["eval_ema/acc", "eval_ema/loss"]


def test_two_metrics_of_one_record_never_become_one() -> None:
    assert names({"loss": 1.0, "eval/loss": 2.0}) == ["eval/accuracy/loss", "eval/loss"]
    assert point_of(a_record({"loss": 1.0, "eval/loss": 2.0}), PATH, {})[0].values["eval/loss"] == 2.0


def test_a_metric_that_is_no_number_once_leaves_its_name_to_no_other() -> None:
    assert names({"loss": 1.0, "eval/loss": None}) == ["eval/accuracy/loss"]
    assert names({"loss": 1.0, "eval/loss": float("nan")}) == ["eval/accuracy/loss"]


def test_a_name_of_another_evaluator_is_qualified_and_that_is_said() -> None:
    point, notes = point_of(a_record({"acc": 1.0, "loss": 2.0}), PATH, {"eval/acc": "val", "eval/loss": "accuracy"})
    assert sorted(point.values) == ["eval/accuracy/acc", "eval/loss"]
    assert notes == ["eval/acc belongs to the evaluator val: that of accuracy is called eval/accuracy/acc"]


def test_names_can_always_hold_the_evaluator() -> None:
    assert names({"acc": 1.0, "eval/loss": 2.0}, how="evaluator") == ["eval/accuracy/acc", "eval/accuracy/loss"]


def test_only_finite_numbers_are_part_of_a_point() -> None:
    assert names({"acc": 1.0, "loss": None}) == ["eval/acc"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"status": "failed"}, "its status is failed"),
        ({"status": "superseded"}, "its status is superseded"),
        ({"step": None}, "it has neither a step nor a whole number of epochs"),
        ({"step": None, "epoch": 0.5}, "it has neither a step nor a whole number of epochs"),
        ({"metrics": {"acc": None}}, "no metric of it is a finite number"),
    ],
)
def test_what_gives_no_point_says_why(fields: dict[str, Any], reason: str) -> None:
    assert why_none(replace(a_record({"acc": 1.0}), **fields)) == reason


def test_where_there_are_epochs_alone_they_are_the_step() -> None:
    assert point_of(a_record({"acc": 1.0}, step=None, epoch=3.0), PATH, {})[0].step == 3


def test_a_point_is_evaluator_weights_identity_and_step_and_not_the_path() -> None:
    base = a_record({"acc": 1.0})

    def key(record: Record, path: Path = PATH) -> str:
        return point_of(record, path, {})[0].key

    assert key(base) == key(replace(base, checkpoint="/elsewhere", ended="2026-11-21T04:00:00+00:00"), Path("/x/evals/accuracy/n.json"))
    others = [{"step": 6}, {"identity": "b" * 32}, {"weights": "ema"}, {"evaluator": {"name": "other"}}]
    assert len({key(base), *(key(replace(base, **other)) for other in others)}) == 5  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["step_500", "global_step500", "iter-0500", "iteration_500", "checkpoint-500"])
def test_a_folder_called_after_its_one_checkpoint_is_no_run(name: str) -> None:
    assert is_of_one(name, a_record({"acc": 1.0}, step=500))
    assert not is_of_one(name, a_record({"acc": 1.0}, step=50))


def test_a_run_is_called_after_the_folder_of_its_checkpoints() -> None:
    assert run_name(Path("/runs/exp1/evals")) == "exp1"
    assert run_name(Path("/results/exp1-0a1b2c3d")) == "exp1-0a1b2c3d"
