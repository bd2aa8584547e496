"""lm-eval's own models through the server: a real small model, a local task, the numbers in lm-eval's own names."""

import json
from pathlib import Path

import pytest
from asking import served
from conftest import House
from language_models import write_llama, write_tokenizer

TASK = """
task: next_word
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: text
doc_to_choice: choices
doc_to_target: label
metric_list:
  - metric: acc
filter_list:
  - name: kept
    filter:
      - function: take_first
"""


@pytest.mark.slow
def test_lm_evals_models_are_evaluated_by_the_built_in_evaluator(house: House) -> None:
    pytest.importorskip("lm_eval")
    data = house.root / "data.jsonl"
    rows = [{"text": "The quick", "choices": [" brown", " lazy"], "label": i % 2} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    house.file("tasks/next_word.yaml", TASK.format(data=data))
    path = house.runs / "run" / "checkpoint-5"
    path.mkdir(parents=True)
    write_llama(path)
    write_tokenizer(path)
    house.environment["XDG_CACHE_HOME"] = str(house.root / "cache")
    with served(house, "--include_path", house.root / "tasks", workers=1) as server:
        args = {"pretrained": str(path), "batch_size": 4}
        first = server.submit("hf", ["next_word"], model_args=args, limit=6)
        bare = server.submit("hf", ["next_word"], model_args=args, limit=6, predict_only=True)
        unknown = server.submit("hf", ["next_wrod"], model_args=args)
        job = server.wait(first, 120)
        assert job["error"] is None
        assert job["metrics"]["next_word"].keys() == {"acc,kept", "acc_stderr,kept"}
        assert job["metrics"]["next_word"]["acc,kept"] == 0.5
        result = job["result"]["checkpoint-5"]
        assert Path(result["results"]).is_relative_to(path.parent / "evals" / "hf")
        (samples,) = result["samples"]
        assert len(Path(samples).read_text().splitlines()) == 6
        assert Path(samples).name.endswith("_samples_next_word.jsonl")
        (record,) = (path.parent / "evals" / "hf").glob("*.json")
        assert json.loads(record.read_text())["details"]["fingerprint"]
        job = server.wait(bare)
        assert job["metrics"] == {"next_word": {"predicted,none": 6.0}}
        assert len(job["result"]["checkpoint-5"]["samples"]) == 1
        job = server.wait(unknown)
        assert job["status"] == "failed"
        assert "next_word" in job["error"], "the nearest"
        assert "next_word" in server.get("/tasks")["tasks"]
