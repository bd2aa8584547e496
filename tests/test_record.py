"""Where results lie, and what counts as a metric."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch

from assayer.errors import AssayerError
from assayer.record import Place, Record, flatten, now_utc, read

BASE = Record(
    checkpoint="/run/model_step5.pt",
    format="single_file",
    step=5,
    epoch=None,
    tokens=None,
    identity="a" * 32,
    weights="raw",
    evaluator={"name": "e"},
    status="finished",
    metrics={"m": 1.0},
    ended=now_utc(),
)


@pytest.mark.parametrize(
    ("checkpoint", "record"),
    [
        ("/run/model_step5.pt", "/run/evals/e/model_step5.pt.json"),
        ("/run/checkpoint-500", "/run/evals/e/checkpoint-500.json"),
        ("/run/checkpoints/checkpoint_3", "/run/evals/e/checkpoint_3.json"),
        ("/run/checkpoints/model_3.pt", "/run/checkpoints/evals/e/model_3.pt.json"),
    ],
)
def test_results_lie_in_evals_beside_the_checkpoint_and_one_higher_for_accelerate(checkpoint: str, record: str) -> None:
    assert str(Place.of(checkpoint, "e").record) == record


def test_with_results_dir_two_runs_of_one_name_stay_apart() -> None:
    one, two = (Place.of(f"/{user}/run/m.pt", "e", "/results").record for user in ("a", "b"))
    assert one != two
    assert one.parent.parent.name.startswith("run-")


def test_a_record_comes_back_as_it_was_written_and_no_temporary_file_stays(tmp_path: Path) -> None:
    place = Place(tmp_path, ("evals", "e"), "m.pt")
    assert place.write(BASE) == place.record
    assert read(place.record) == BASE
    assert place.find("a" * 32) == BASE
    assert place.find("b" * 32) is None
    assert [p.name for p in place.folder.iterdir()] == ["m.pt.json"]


def test_a_path_that_was_saved_again_keeps_its_earlier_record(tmp_path: Path) -> None:
    place = Place(tmp_path, (), "last.ckpt")
    place.write(BASE)
    again = replace(BASE, identity="b" * 32)
    place.write(again)
    assert read(place.record) == again
    assert read(tmp_path / "last.ckpt@aaaaaaaa.json") == BASE
    assert place.find("a" * 32) == BASE


def test_a_superseded_outcome_never_stands_under_the_checkpoints_name(tmp_path: Path) -> None:
    place = Place(tmp_path, (), "last.ckpt")
    place.write(replace(BASE, status="superseded", metrics={}))
    assert not place.record.exists()
    assert place.find("a" * 32)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"schema": 1}'])
def test_what_is_no_record_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.json").write_text(text)
    assert read(tmp_path / "m.json") is None


def test_a_later_versions_record_is_read_as_far_as_it_is_known(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(json.dumps({**BASE.to_json(), "schema": 2, "news": 1}))
    found = read(tmp_path / "m.json")
    assert found
    assert found.schema == 2


def test_a_very_long_name_still_has_a_record(tmp_path: Path) -> None:
    place = Place.of(str(tmp_path / ("x" * 252 + ".pt")), "e")
    place.write(BASE)
    place.write(replace(BASE, identity="b" * 32))
    assert len(list(place.folder.iterdir())) == 2


@pytest.mark.parametrize("field", [{"evaluator": "e"}, {"ended": None}, {"seconds": 3}, {"error": "x"}, {"metrics": []}, {"attempts": "1"}])
def test_a_record_with_fields_of_other_kinds_is_none(tmp_path: Path, field: dict[str, object]) -> None:
    (tmp_path / "m.json").write_text(json.dumps({**BASE.to_json(), **field}))
    assert read(tmp_path / "m.json") is None


def test_a_run_that_is_away_is_not_made_anew(tmp_path: Path) -> None:
    place = Place.of(str(tmp_path / "run" / "m.pt"), "e")
    with pytest.raises(FileNotFoundError):
        place.write(BASE)
    assert not (tmp_path / "run").exists()


def test_nested_mappings_are_joined_and_scalars_are_numbers() -> None:
    result = {"acc": numpy.float32(0.5), "n": numpy.int64(3), "t": {"loss": torch.tensor([2.5]), 7: True}, "i": 2}
    assert flatten(result) == ({"acc": 0.5, "n": 3, "t/loss": 2.5, "t/7": 1, "i": 2}, [])


def test_nan_and_infinity_become_null_with_a_note() -> None:
    metrics, notes = flatten({"a": math.nan, "b": -math.inf, "c": torch.tensor(float("inf")), "d": 1})
    assert metrics == {"a": None, "b": None, "c": None, "d": 1}
    assert flatten({"n": 10**400}) == ({"n": None}, ["n is too large for a number of 64 bits"])
    assert notes == ["a is nan", "b is -inf", "c is inf"]


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (None, "returned None; it must return a mapping"),
        (0.5, "returned a float"),
        ({}, "empty mapping"),
        ({"a": {}}, "empty mapping"),
        ({"a": "0.5"}, "'a' is a str, not a number"),
        ({"a": None}, "'a' is None, not a number"),
        ({"a": [1]}, "'a' is a list"),
        ({"a": torch.zeros(3)}, r"'a' has the shape \(3,\)"),
        ({"a": numpy.zeros((2, 2))}, r"'a' has the shape \(2, 2\)"),
        ({"a/b": 1, "a": {"b": 2}}, "the metric 'a/b' twice"),
        ({"a": 1j}, "'a' is a complex"),
    ],
)
def test_what_is_no_metric_is_a_sentence(result: object, said: str) -> None:
    with pytest.raises(AssayerError, match=said):
        flatten(result)
