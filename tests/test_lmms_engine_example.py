"""examples/lmms_engine: its YAML is taken as it stands, by assayer's client and by its server, but for the address."""

import importlib
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, House

from assayer.client import EvalConfig
from assayer.client.callback import from_trainer_args
from assayer.protocol import EvaluateRequest

EXAMPLE = REPOSITORY / "examples" / "lmms_engine"
PORT = 8001

SCORE = """
import torch
from safetensors.torch import load_file

def score(path, tasks, model_args):
    assert model_args["model"] == path and model_args["batch_size"] == 256, model_args
    value = load_file(path + "/model.safetensors")["w"].mean().item()
    return {task: {"mean": value} for task in tasks}
"""


def trainer_args() -> dict[str, Any]:
    """The section of the trainer in the example's YAML."""
    found: dict[str, Any] = importlib.import_module("yaml").safe_load((EXAMPLE / "train.yaml").read_text())["trainer_args"]
    return found


def save_with_average(path: Path) -> Path:
    """A checkpoint as LMMs-Engine's trainer lays it out, of one rank: ones, and twos for the moving average."""
    for folder, value in (("pytorch_model_fsdp_0", 1.0), ("pytorch_ema_model_fsdp_0", 2.0)):
        (path / folder).mkdir(parents=True)
        torch.save({"w": torch.full((4, 4), value)}, path / folder / "model_world_size_1_rank_0.pt")
    (path / "config.json").write_text("{}")
    return path


def test_the_client_knows_every_word_of_the_yaml(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = trainer_args()
    with caplog.at_level(logging.WARNING):
        evaluation, schedule = from_trainer_args({**args, "output_dir": str(tmp_path)})
    assert caplog.text == ""
    assert evaluation is not None
    assert (schedule, evaluation.weights) == ({"eval_strategy": "steps", "eval_steps": 500}, ("regular", "ema"))
    for name, value in args["eval_config"].items():
        assert getattr(evaluation.config, name) == (tuple(value) if name == "tasks" else value)
    assert args["eval_config"]["server_url"] == f"http://localhost:{PORT}"
    assert args["save_steps"] == args["eval_steps"]


def test_the_server_s_protocol_knows_what_is_asked_by_it() -> None:
    section = trainer_args()["eval_config"]
    path = "/runs/checkpoint-500"
    ours = EvaluateRequest.from_json(EvalConfig.of(section).request(path, "ema"))
    # What LMMs-Engine makes of the section: all of it but its own three keys, and where it wants the results.
    body = {name: value for name, value in section.items() if name not in ("server_url", "poll_interval", "checkpoint_key")}
    body["model_args"] = {**section["model_args"], section["checkpoint_key"]: path}
    kwargs = {"model_path": path, "checkpoint_type": "ema", "output_path": None}
    theirs = EvaluateRequest.from_json({**body, "output_dir": f"{path}/eval", "lmms_engine_kwargs": kwargs})
    assert {**ours.to_json(), "output_dir": None} == {**theirs.to_json(), "output_dir": None}
    assert set(body) <= set(ours.to_json())
    assert ours.lmms_engine_kwargs is not None
    assert (ours.model, ours.lmms_engine_kwargs.checkpoint_type) == ("qwen_vl", "ema")


@pytest.mark.slow
def test_a_checkpoint_is_evaluated_with_both_weights_and_results_lie_where_the_readme_says(house: House) -> None:
    lines = (EXAMPLE / "README.md").read_text().splitlines()
    (command,) = (line for line in lines if line.startswith("python -m assayer.server"))
    words = command.partition("#")[0].removeprefix("python -m assayer.").split()
    score = house.file("score.py", SCORE)
    out = house.root / "output" / "qwen3_vl"
    path = save_with_average(out / "checkpoint-500")
    words = [word.replace("score.py", str(score)).replace("./output", str(out.parent)) for word in words]
    assert words[words.index("--port") + 1] == str(PORT)
    words[words.index("--port") + 1] = "0"
    with house.running(*words) as serving:
        assert serving.stdout is not None
        url = re.search(r"http://\S+", serving.stdout.readline())
        assert url
        args = trainer_args()
        args |= {"output_dir": str(out), "eval_config": args["eval_config"] | {"server_url": url[0], "poll_interval": 0.1}}
        evaluation, _ = from_trainer_args(args, rank=0)
        assert evaluation is not None
        evaluation.submit(path, 500)
        points = evaluation.finish(60)
        evaluation.close()
        house.command("shutdown")
    assert {name: (value, point.step) for point in points for name, value in point.metrics.items()} == {
        f"{prefix}/{task}_mean": (value, 500)
        for prefix, value in (("eval", 1.0), ("eval_ema", 2.0))
        for task in ("mmmu_val", "textvqa_val")
    }
    records = list((out / "evals" / "qwen_vl").glob("checkpoint-500*@job-????????.json"))
    assert sorted(record.name.split("@job")[0] for record in records) == ["checkpoint-500", "checkpoint-500@ema"]
    for record in records:
        (results,) = record.with_suffix(".files").glob("checkpoint-500*/*_results.json")
        assert set(json.loads(results.read_text())["results"]) == {"mmmu_val", "textvqa_val"}
    assert not (path / "eval").exists()
