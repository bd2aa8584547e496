"""What a training asks to be evaluated, which of its checkpoints, and the names of what comes back."""

import logging
from typing import Any

import pytest

from assayer.client import EvalConfig
from assayer.client.names import named
from assayer.client.schedule import Schedule
from assayer.errors import UsageError

# As LMMs-Engine's documentation gives it.
YAML: dict[str, Any] = {
    "server_url": "http://10.0.0.9:8000",
    "poll_interval": 10.0,
    "checkpoint_key": "model",
    "model": "qwen_vl",
    "tasks": ["mmmu_val", "textvqa_val"],
    "model_args": {"num_gpus": 8, "batch_size": 256, "max_length": 2048},
}


def test_a_metric_is_named_after_its_task() -> None:
    metrics = {"mmmu": {"acc,none": 0.5, "acc_stderr,none": 0.1, "acc_stderr_clt,none": 0.1, "alias": " - mmmu"}, "loss": 2, "note": "text"}
    assert named(metrics) == {"eval/mmmu/acc": 0.5, "eval/loss": 2.0}
    assert named(metrics, "lmms_engine") == {"eval/mmmu_acc": 0.5, "eval/loss": 2.0}
    assert named(metrics, weights="ema") == {"eval_ema/mmmu/acc": 0.5, "eval_ema/loss": 2.0}


@pytest.mark.parametrize("style", ["slash", "lmms_engine"])
def test_two_filters_of_one_metric_stay_two_metrics(style: str) -> None:
    for metrics in (
        {"gsm8k": {"exact_match,strict": 0.25, "exact_match,flexible": 0.5}},
        {"gsm8k": {"exact_match,none": 0.25, "exact_match,flexible": 0.5}},
        {"gsm8k": {"exact_match": 0.25, "exact_match,none": 0.5}},
        {"a_b": {"c": 0.25}, "a": {"b_c": 0.5}},
    ):
        assert sorted(named(metrics, style).values()) == [0.25, 0.5], metrics
    two = {"gsm8k": {"exact_match,strict": 0.25, "exact_match,flexible": 0.5}}
    joint = {"slash": "/", "lmms_engine": "_"}[style]
    assert set(named(two, style)) == {f"eval/gsm8k{joint}exact_match{joint}{name}" for name in ("strict", "flexible")}


def test_what_is_no_finite_number_is_no_point() -> None:
    assert named({"t": {"a,none": None, "b,none": float("nan"), "c,none": True, "d,none": 10**400, "e,none": [1], "f,none": "N/A"}}) == {}


def test_lmms_engines_yaml_is_taken_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    config = EvalConfig.of(YAML)
    assert caplog.text == ""
    assert config.request("/run/checkpoint-500", "ema") == {
        "model": "qwen_vl",
        "tasks": ["mmmu_val", "textvqa_val"],
        "model_args": {"num_gpus": 8, "batch_size": 256, "max_length": 2048, "model": "/run/checkpoint-500"},
        "log_samples": True,
        "predict_only": False,
        "num_gpus": 1,
        "lmms_engine_kwargs": {"model_path": "/run/checkpoint-500", "checkpoint_type": "ema", "output_path": None},
    }


def test_unknown_keys_of_the_yaml_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert EvalConfig.of({**YAML, "tokens": 3, "limit": None}) == EvalConfig.of(YAML)
    assert "left out: tokens; known are batch_size" in caplog.text


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model": None}, "'model' and 'tasks' are required"),
        ({"tasks": "mmmu_val"}, r"eval_config\.tasks: Input should be a valid list"),
        ({"model_args": [1]}, r"eval_config\.model_args: Input should be a valid dictionary"),
        ({"model_args": {"dtype": object()}}, "not JSON serializable"),
        ({"model_args": {"x": float("nan")}}, r"eval_config\.model_args\.x: Input should be a finite number"),
        ({"num_fewshot": "few"}, r"eval_config\.num_fewshot: Input should be a valid integer"),
        ({"poll_interval": 0}, "poll_interval is 0"),
    ],
)
def test_a_value_that_the_server_would_refuse_is_said_when_training_begins(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        EvalConfig.of({**YAML, **values})


def steps_taken(schedule: Schedule, saved: list[tuple[int, float]]) -> list[int]:
    return [step for step, epoch in saved if schedule.takes(step, epoch)]


# A checkpoint every 50 steps, 120 steps an epoch, one more at each epoch's end.
SAVED = sorted([(step, step / 120) for step in range(50, 401, 50)] + [(120, 1.0), (240, 2 - 1e-9), (360, 3.0)])


@pytest.mark.parametrize(
    ("strategy", "every", "taken"),
    [
        (None, None, [step for step, _ in SAVED]),
        ("no", 50, []),
        (False, None, []),
        ("steps", None, [step for step, _ in SAVED]),
        ("steps", 100, [100, 200, 300, 400]),
        ("steps", 130, [150, 300, 400]),
        ("epoch", None, [120, 240, 360]),
        ("epoch", 7, [120, 240, 360]),
    ],
)
def test_the_strategies_mean_what_they_say(strategy: Any, every: int | None, taken: list[int]) -> None:
    assert steps_taken(Schedule(strategy, every), SAVED) == taken


def test_a_resumed_training_does_not_evaluate_what_lies_before() -> None:
    schedule = Schedule("steps", 100)
    schedule.begin(250, 2.1)
    assert steps_taken(schedule, [(260, 2.2), (300, 2.5)]) == [300]
    schedule = Schedule("epoch")
    schedule.begin(250, 2.1)
    assert steps_taken(schedule, [(260, 2.2), (360, 3.0)]) == [360]


@pytest.mark.parametrize(("strategy", "every"), [("epochs", None), ("steps", 0), ("steps", 1.5), ("steps", True)])
def test_a_strategy_that_is_none_is_said(strategy: Any, every: Any) -> None:
    with pytest.raises(UsageError, match=r"allowed|whole number"):
        Schedule(strategy, every)
