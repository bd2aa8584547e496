"""The LMMs-Eval protocol's messages: upstream's fields, defaults and words."""

import json
import subprocess
import sys
from typing import Any

import pytest

from assayer.errors import ProtocolError
from assayer.protocol import (
    EvaluateRequest,
    HealthResponse,
    JobInfo,
    JobStatus,
    JobSubmitResponse,
    LmmsEngineKwargs,
    MergeRequest,
    MergeResponse,
    Message,
    QueueStatusResponse,
    dump,
    is_finished,
    parse,
)

LEAST = {"model": "m", "tasks": ["t"]}

# What LMMs-Engine's trainer sends.
TRAINER = {
    "model": "qwen_vl",
    "tasks": ["mmmu_val"],
    "model_args": {"num_gpus": 8, "batch_size": 256, "model": "/abs/checkpoint-500"},
    "num_fewshot": 0,
    "batch_size": 1,
    "device": "cuda",
    "log_samples": True,
    "predict_only": False,
    "num_gpus": 1,
    "output_dir": "/abs/checkpoint-500/eval",
    "lmms_engine_kwargs": {"model_path": "/abs/checkpoint-500", "checkpoint_type": "regular", "output_path": None},
}


def refusal(message: type[Message], value: object) -> list[dict[str, Any]]:
    with pytest.raises(ProtocolError) as caught:
        message.from_json(value)
    assert caught.value.status == 422
    json.dumps(caught.value.to_json(), allow_nan=False)
    return caught.value.details


def test_a_request_of_the_least_has_all_keys_with_upstreams_defaults() -> None:
    assert EvaluateRequest.from_json(LEAST).to_json() == {
        "model": "m",
        "tasks": ["t"],
        "model_args": None,
        "num_fewshot": None,
        "batch_size": None,
        "device": None,
        "limit": None,
        "gen_kwargs": None,
        "log_samples": True,
        "predict_only": False,
        "num_gpus": 1,
        "output_dir": None,
    }


def test_what_the_trainer_sends_is_read_with_what_it_asks_to_be_merged() -> None:
    request = EvaluateRequest.from_json(TRAINER)
    assert request.lmms_engine_kwargs == LmmsEngineKwargs("/abs/checkpoint-500", "regular", None)
    assert request.to_json() == {**TRAINER, "limit": None, "gen_kwargs": None}
    assert EvaluateRequest.from_json(request.to_json()) == request


def test_unknown_fields_are_ignored() -> None:
    assert EvaluateRequest.from_json({**LEAST, "priority": float("nan")}) == EvaluateRequest.from_json(LEAST)


@pytest.mark.parametrize(
    ("field", "given", "read"),
    [
        ("num_fewshot", "1_000", 1000),
        ("num_fewshot", 1.0, 1),
        ("batch_size", "auto:4", "auto:4"),
        ("batch_size", "1", "1"),
        ("limit", 0.5, 0.5),
        ("limit", 1.0, 1.0),
        ("limit", "10", 10),
        ("limit", ".5", 0.5),
        ("limit", True, 1),
        ("log_samples", "off", False),
        ("predict_only", 1, True),
        ("num_gpus", "8", 8),
    ],
)
def test_what_pydantic_takes_for_a_type_is_taken(field: str, given: object, read: object) -> None:
    found = getattr(EvaluateRequest.from_json({**LEAST, field: given}), field)
    assert (found, type(found)) == (read, type(read))


@pytest.mark.parametrize(
    ("field", "given", "kind", "loc", "message"),
    [
        ("model", 1, "string_type", [], "Input should be a valid string"),
        ("tasks", "t", "list_type", [], "Input should be a valid list"),
        ("tasks", ["t", None], "string_type", [1], "Input should be a valid string"),
        ("model_args", [], "dict_type", [], "Input should be a valid dictionary"),
        ("num_fewshot", [], "int_type", [], "Input should be a valid integer"),
        ("num_fewshot", "a", "int_parsing", [], "Input should be a valid integer, unable to parse string as an integer"),
        ("num_fewshot", 1.5, "int_from_float", [], "Input should be a valid integer, got a number with a fractional part"),
        ("num_fewshot", 1e20, "int_parsing_size", [], "Unable to parse input string as an integer, exceeded maximum size"),
        ("log_samples", None, "bool_type", [], "Input should be a valid boolean"),
        ("log_samples", "maybe", "bool_parsing", [], "Input should be a valid boolean, unable to interpret input"),
        ("limit", float("nan"), "finite_number", ["float"], "Input should be a finite number"),
        ("model_args", {"a": [float("inf")]}, "finite_number", ["a", 0], "Input should be a finite number"),
    ],
)
def test_a_wrong_field_is_refused_in_upstreams_words(field: str, given: Any, kind: str, loc: list[Any], message: str) -> None:
    (detail,) = refusal(EvaluateRequest, {**LEAST, field: given})
    assert (detail["type"], detail["loc"], detail["msg"]) == (kind, ["body", field, *loc], message)
    assert "input" in detail


def test_all_that_is_wrong_is_told_at_once() -> None:
    assert refusal(EvaluateRequest, {}) == [
        {"type": "missing", "loc": ["body", "model"], "msg": "Field required", "input": {}},
        {"type": "missing", "loc": ["body", "tasks"], "msg": "Field required", "input": {}},
    ]
    assert [(d["type"], d["loc"]) for d in refusal(EvaluateRequest, {**LEAST, "batch_size": [], "limit": "a"})] == [
        ("int_type", ["body", "batch_size", "int"]),
        ("string_type", ["body", "batch_size", "str"]),
        ("int_parsing", ["body", "limit", "int"]),
        ("float_parsing", ["body", "limit", "float"]),
    ]


def test_a_merge_of_an_unknown_kind_is_refused_with_what_is_allowed() -> None:
    assert MergeRequest.from_json({"checkpoint_path": "/c"}).to_json() == {
        "checkpoint_path": "/c",
        "output_path": None,
        "checkpoint_type": "regular",
    }
    assert refusal(MergeRequest, {"checkpoint_path": "/c", "checkpoint_type": "best"}) == [
        {
            "type": "literal_error",
            "loc": ["body", "checkpoint_type"],
            "msg": "Input should be 'regular' or 'ema'",
            "input": "best",
            "ctx": {"expected": "'regular' or 'ema'"},
        }
    ]


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"", {"type": "missing", "loc": ["body"], "msg": "Field required", "input": None}),
        (
            b'{"a":1,}',
            {
                "type": "json_invalid",
                "loc": ["body", 7],
                "msg": "JSON decode error",
                "input": {},
                "ctx": {"error": "Expecting property name enclosed in double quotes"},
            },
        ),
    ],
)
def test_a_body_that_is_no_json_is_refused_in_upstreams_words(body: bytes, detail: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError) as caught:
        parse(body)
    if sys.version_info < (3, 13) or body == b"":  # A later Python has another word for a comma too many.
        assert caught.value.details == [detail]
    assert caught.value.status == 422


@pytest.mark.parametrize("body", [b'{"model":"\xff"}', b"[" * 200_000, b'{"limit":' + b"9" * 5000 + b"}"])
def test_a_body_that_cannot_be_read_is_a_bad_request(body: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        parse(body)
    assert (caught.value.status, caught.value.to_json()) == (400, {"detail": "There was an error parsing the body"})


def test_arguments_nested_too_deeply_for_an_answer_are_refused() -> None:
    nested: Any = 1
    for _ in range(900):
        nested = [nested]
    assert refusal(EvaluateRequest, {**LEAST, "model_args": {"a": nested}})[0]["type"] == "value_error"
    assert refusal(EvaluateRequest, [nested])[0]["type"] == "model_attributes_type"


def test_a_job_has_upstreams_fields_and_its_metrics() -> None:
    job = {
        "job_id": "b6b4c1a2",
        "status": "completed",
        "created_at": "2026-01-01T00:00:00",
        "started_at": "2026-01-01T00:00:01",
        "completed_at": "2026-01-01T00:01:00",
        "request": EvaluateRequest.from_json(LEAST).to_json(),
        "result": {"m": {"results": "/r/0_results.json", "samples": ["/r/0_samples_t.jsonl"]}},
        "error": None,
        "position_in_queue": None,
    }
    found = JobInfo.from_json(job)
    assert found.status is JobStatus.COMPLETED
    assert list(found.to_json().items()) == [*job.items(), ("metrics", None)]
    assert JobInfo.from_json({**job, "metrics": {"t": {"acc,none": 0.5}}}).metrics == {"t": {"acc,none": 0.5}}


def test_the_answers_are_upstreams() -> None:
    assert JobSubmitResponse.queued("j", 3).to_json() == {
        "job_id": "j",
        "status": "queued",
        "position_in_queue": 3,
        "message": "Job queued successfully. Position in queue: 3",
    }
    assert MergeResponse.merged("/m").to_json() == {"success": True, "message": "Checkpoint merged successfully", "merged_path": "/m"}
    assert list(HealthResponse("healthy", "2026", 0).to_json()) == ["status", "timestamp", "queue_size"]
    assert QueueStatusResponse(0).to_json() == {
        "queue_size": 0,
        "running_job": None,
        "queued_jobs": [],
        "completed_jobs": 0,
        "failed_jobs": 0,
    }


def test_only_three_words_are_an_end() -> None:
    assert [str(word) for word in JobStatus if is_finished(word)] == ["completed", "failed", "cancelled"]


def test_a_path_of_any_bytes_survives_the_way_there_and_back() -> None:
    path = b"/runs/\xff\xe4/checkpoint-5".decode("utf-8", "surrogateescape")
    assert MergeRequest.from_json(parse(dump({"checkpoint_path": path}))).checkpoint_path == path


def test_a_messages_schema_names_its_fields_and_defaults() -> None:
    schema = EvaluateRequest.schema()
    assert schema["required"] == ["model", "tasks"]
    assert schema["properties"]["num_gpus"] == {"type": "integer", "description": "Number of GPUs to use", "default": 1}
    assert {"type": "null"} in schema["properties"]["limit"]["anyOf"]
    json.dumps(schema)


def test_the_protocol_needs_nothing_but_the_standard_library() -> None:
    code = "import sys, assayer.protocol; print([n for n in ('pydantic','click','redis','rq','torch','numpy','rich') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
